"""What ranks say to each other: sums, gathers and small messages, each a plain function that takes
`ranks`.

The model group carries tensors on the device; the control group carries CPU integers and bytes; CPU
ranks of one host have a communicator in shared memory that stands in for each (shared_memory.py),
GPUs of
one node
a buffer for small sums (one_shot.py). With one rank every function is a no-op that returns what the
only rank would get. Nothing is pickled. Refuses to know what is sent.
"""

import torch
import torch.distributed as dist

from llama_tp.arch.summation import tree_add
from llama_tp.parallel.groups import Ranks

# One broadcast of this many int64 (8 KB) carries a usual step; longer messages take a second one.
MESSAGE_INTS = 1024


def all_reduce(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Sums `x` over the ranks, in place. The order of the sum is the backend's: see `tree_sum` for
    a fixed one."""
    if ranks.tp > 1:
        ranks.counters.collectives += 1
        if ranks.communicator and ranks.communicator.sums(x):
            return ranks.communicator.sum(x)
        dist.all_reduce(x, group=ranks.group)
    return x


def gather_stack(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Every rank's `x` on every rank, in rank order: (tp, *x.shape). Shapes and dtypes must
    agree."""
    if ranks.tp == 1:
        return x.unsqueeze(0)
    ranks.counters.collectives += 1
    if ranks.communicator:
        return ranks.communicator.gather(x.contiguous())
    out = x.new_empty((ranks.tp, *x.shape))
    # The list form works on gloo and nccl in every torch we support; all_gather_into_tensor is
    # deprecated from 2.13.
    dist.all_gather(list(out.unbind()), x.contiguous(), group=ranks.group)
    return out


def tree_sum(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Sums every rank's partial sum `x` (keep it fp32) in `tree_add`'s order; the same bits on
    every rank. May write the sum to `x`."""
    if ranks.communicator and ranks.communicator.in_tree_order and ranks.communicator.sums(x):
        return all_reduce(x, ranks)
    return tree_add(list(gather_stack(x, ranks).unbind()))


def gather_to_driver(x: torch.Tensor, ranks: Ranks) -> list[torch.Tensor] | None:
    """Every rank's `x` in rank order on the driver, None on workers. Built on all-gather: old NCCL
    has no gather."""
    stack = gather_stack(x, ranks)
    return list(stack.unbind()) if ranks.is_driver else None


def broadcast(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Overwrites `x` (contiguous, on the device) with the driver's, in place."""
    if ranks.tp > 1:
        ranks.counters.collectives += 1
        if ranks.communicator:
            return ranks.communicator.broadcast(x)
        dist.broadcast(x, src=0, group=ranks.group)
    return x


def barrier(ranks: Ranks) -> None:
    """Waits for every rank, on the control group: as long as it takes (health watches
    meanwhile)."""
    if ranks.tp > 1:
        ranks.counters.collectives += 1
        dist.all_reduce(torch.zeros(1, dtype=torch.int64), group=ranks.control)


def gather_ints(value: int, ranks: Ranks) -> list[int]:
    """Every rank's `value` (int64), in rank order, on every rank; over the control group."""
    if ranks.tp == 1:
        return [value]
    ranks.counters.collectives += 1
    values = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks.tp)]
    dist.all_gather(values, torch.tensor([value]), group=ranks.control)
    return [int(each) for each in values]


def which_ranks(mine: bool, ranks: Ranks) -> list[int]:
    """The ranks on which it is so, on every rank; a rank that is alone, or simulated, hears of
    itself only."""
    if ranks.control is None:
        return [ranks.rank] if mine else []
    return [rank for rank, its in enumerate(gather_ints(int(mine), ranks)) if its]


def send_ints(ints: list[int], ranks: Ranks) -> None:
    """Driver: sends int64s to all workers, which call `recv_ints`."""
    if ranks.tp == 1:
        return
    first = torch.zeros(MESSAGE_INTS, dtype=torch.int64)
    message = torch.tensor([len(ints), *ints], dtype=torch.int64)
    n_first = min(len(message), MESSAGE_INTS)
    first[:n_first] = message[:n_first]
    _control(first, ranks)
    if len(message) > MESSAGE_INTS:
        _control(message[MESSAGE_INTS:], ranks)


def recv_ints(ranks: Ranks) -> list[int]:
    """Worker: the driver's next `send_ints`, waiting for it as long as it takes."""
    first = torch.empty(MESSAGE_INTS, dtype=torch.int64)
    _control(first, ranks)
    n = int(first[0])
    ints = first[1 : n + 1].tolist()
    if n >= MESSAGE_INTS:
        rest = torch.empty(n + 1 - MESSAGE_INTS, dtype=torch.int64)
        _control(rest, ranks)
        ints += rest.tolist()
    return ints


def share_words(words: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The driver's CPU tensor on every rank, over the control group; workers pass an empty one of
    its shape. -> it."""
    if ranks.tp > 1:
        _control(words, ranks)
    return words


def broadcast_bytes(data: bytes | None, ranks: Ranks) -> bytes:
    """The driver's `data` on every rank; workers pass None. ValueError on a driver without data."""
    if ranks.is_driver:
        if data is None:
            raise ValueError("the driver has nothing to broadcast")
        send_ints([len(data)], ranks)
        if data and ranks.tp > 1:
            _control(torch.frombuffer(bytearray(data), dtype=torch.uint8), ranks)
        return data
    buffer = torch.empty(recv_ints(ranks)[0], dtype=torch.uint8)
    if len(buffer):
        _control(buffer, ranks)
    return buffer.numpy().tobytes()


def _control(x: torch.Tensor, ranks: Ranks) -> None:
    ranks.counters.collectives += 1
    if ranks.control_communicator:
        ranks.control_communicator.broadcast(x)
    else:
        dist.broadcast(x, src=0, group=ranks.control)
