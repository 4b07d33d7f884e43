"""A stand-in for torch's paged FlashAttention: its meaning, in plain torch on CPU, and its
refusals."""

import torch

FLASH_DTYPES = (torch.float16, torch.bfloat16)


class Varlen:
    """torch.nn.attention.varlen.varlen_attn with paged keys, as FlashAttention 2 computes it: a
    sequence and a head at a time.

    It refuses what torch does (the messages are those in libtorch_cuda.so):
    * torch/nn/attention/varlen.py, `varlen_attn` (2.13: lines 293-306): numbers of heads;
    * aten/src/ATen/native/transformers/cuda/attention.cu, `_flash_attention_forward_impl` (near
      line 520): one of cu_seq_q and cu_seq_k alone; in 2.12 any num_splits;
    * flash-attention's csrc/flash_attn/flash_api.cpp, `mha_varlen_fwd`: dtypes, shapes, pages;
      splits asked for beyond one. It reshapes the queries of decodes to (B, K, G, E) if heads are
      grouped and the window is (-1, -1): exactly B rows, then.

    And, louder than torch, what 2.13 and 2.14 compute wrongly (pytorch #194167): without that
    reshape, num_splits None lets the kernel split, and the parts of every sequence are combined
    into the first one's rows. silent: do that, as they do.

    Args:
        version: "2.12" or "2.13" (2.14 is the same).
        dtypes: what it takes; the tests of whole engines compare tokens in fp32.
    """

    def __init__(self, version: str, dtypes=FLASH_DTYPES, silent=False):
        self.version, self.dtypes, self.silent, self.calls = version, dtypes, silent, []

    def __call__(
        self,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        (T, H, E), (_, S, K, _), B = query.shape, key.shape, len(cu_seq_q) - 1
        self.calls.append((max_q, window_size, num_splits))
        require(
            H == K or (enable_gqa and H % K == 0),
            "Expect query and key/value to have the same number of heads",
        )
        require(self.version != "2.12" or num_splits is None, "num_splits requires FA3")
        require(
            cu_seq_k is not None,
            "cumulative_sequence_length_q and ..._k must be both set or both not set",
        )
        require(
            query.dtype in self.dtypes and key.dtype == value.dtype == query.dtype,
            "FlashAttention only support fp16 and bf16",
        )
        for name, x, shape in (
            ("cu_seqlens_q", cu_seq_q, (B + 1,)),
            ("cu_seqlens_k", cu_seq_k, (B + 1,)),
            ("seqused_k", seqused_k, (B,)),
            ("block_table", block_table, (B, block_table.shape[1])),
        ):
            require(
                x.dtype == torch.int32 and x.is_contiguous() and x.shape == shape,
                f"{name} must be int32 of shape {shape}",
            )
        require(
            query.stride(-1) == 1 and key.stride(-1) == 1,
            "Input tensor must have contiguous last dimension",
        )
        require(S % 256 == 0, "Paged KV cache block size must be divisible by 256")
        require(E % 8 == 0 and E <= 256, "head dimension")
        require(num_splits in (None, 0, 1), "num_splits > 1 is not supported for varlen paged KV")
        grouped = max_q == 1 and H > K and window_size == (-1, -1)
        require(
            not grouped or T == B,
            f"shape '[{B}, {K}, {H // K}, {E}]' is invalid for input of size {query.numel()}",
        )
        if query.is_meta:
            return torch.empty_like(query)
        wrong = self.version != "2.12" and not grouped and num_splits != 1 and B > 1
        require(not wrong or self.silent, "pytorch #194167: split without being grouped")
        require(
            max_k >= int(seqused_k.max()) and cu_seq_k.diff().tolist() == seqused_k.tolist(),
            "lengths of keys differ",
        )
        out = torch.full_like(query, float("nan"))  # rows of no sequence hold anything
        for i, n_used in enumerate(seqused_k.tolist()):
            rows = slice(int(cu_seq_q[i]), int(cu_seq_q[i + 1]))
            n = rows.stop - rows.start
            require(0 < n <= max_q and n <= n_used, "lengths of queries differ")
            keys, values = (
                each[block_table[i].long()]
                .flatten(0, 1)[:n_used]
                .repeat_interleave(H // K, dim=1)
                .float()
                for each in (key, value)
            )  # (n_used, H, E)
            scores = torch.einsum("qhe,khe->hqk", query[rows].float(), keys) / E**0.5
            if window_size == (-1, 0):
                late = torch.arange(n_used) > torch.arange(n_used - n, n_used).unsqueeze(1)
                scores = scores.masked_fill(late, -torch.inf)
            there = slice(0, n) if wrong else rows
            out[there] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), values).to(out.dtype)
        return out


def require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def varlen_of_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    """The signature of torch 2.11.0's varlen_attn (torch/nn/attention/varlen.py:159): no pages."""
    raise AssertionError("not to be called")
