"""Who holds which block of the KV cache, and which blocks hold a prefix that somebody may reuse.

Plain ints; knows no sequences and no tensors. A block is free when nobody holds it; a free block
keeps its contents and its key until it is taken again, least recently released first, so that
prefix reuse costs no memory. Only full, computed blocks have a key, and nobody writes to those
again: sharing needs no copy-on-write.

A key is the BLAKE2b digest (256 bits) of the parent block's key and the block's own token ids, so
it stands for the whole prefix. A collision would show one user's context to another; at this width
none can be made.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b


def block_key(parent: bytes, ids: list[int]) -> bytes:
    """The key of a full block: 32 bytes from its parent's key (b"" for the first block) and its
    ids."""
    return blake2b(parent + array("q", ids).tobytes(), digest_size=32).digest()


class BlockManager:
    """The books of `n_blocks` blocks of `block_size` positions each. All methods are O(blocks they
    touch)."""

    def __init__(self, n_blocks: int, block_size: int, prefix_cache: bool = True):
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.n_holders = [0] * n_blocks  # block -> sequences that hold it
        # block -> key, while its contents are good
        self._key_of: list[bytes | None] = [None] * n_blocks
        self._block_of: dict[bytes, int] = {}  # the same, turned round
        # next to be taken first; pops and deletes are O(1)
        self._free = OrderedDict.fromkeys(range(n_blocks))

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds, those that still have a key among them."""
        return len(self._free)

    def n_for(self, n_positions: int) -> int:
        """Blocks that hold `n_positions`."""
        return -(-n_positions // self.block_size)

    def extend_keys(self, keys: list[bytes], ids: list[int]) -> None:
        """Append to `keys`, the keys of the leading full blocks of `ids`, those that are
        missing."""
        for i in range(len(keys), len(ids) // self.block_size):
            block_ids = ids[i * self.block_size : (i + 1) * self.block_size]
            keys.append(block_key(keys[i - 1] if i else b"", block_ids))

    def match(self, keys: list[bytes], n_ids: int) -> list[int]:
        """The blocks that hold the longest known prefix, not taken yet. At least one of `n_ids`
        positions is left to compute, since the logits of the last one are needed."""
        hits = []
        for key in keys[: (n_ids - 1) // self.block_size]:
            block = self._block_of.get(key)
            if block is None:
                break
            hits.append(block)
        return hits

    def can_take(self, n: int, hits: list[int]) -> bool:
        """Whether `take(n, hits)` would succeed; those hits that are free count against the free
        blocks as well."""
        return n + sum(self.n_holders[block] == 0 for block in hits) <= len(self._free)

    def take(self, n: int, hits: Iterable[int] = ()) -> list[int]:
        """Hold `hits` and `n` fresh blocks; returns them in this order. The fresh ones lose their
        key. Ask `can_take`
        (or `n_free`, without hits) first: raises KeyError when none is left."""
        table = list(hits)
        for block in table:  # before any fresh block evicts one of them
            if self.n_holders[block] == 0:
                del self._free[block]
            self.n_holders[block] += 1
        for _ in range(n):
            block, _ = self._free.popitem(last=False)
            key, self._key_of[block] = self._key_of[block], None
            if key is not None:
                del self._block_of[key]
            self.n_holders[block] = 1
            table.append(block)
        return table

    def register(self, block: int, key: bytes) -> None:
        """Offer a full, computed block for reuse. When two sequences computed the same block, the
        first one is kept."""
        if self.prefix_cache and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, blocks: list[int]) -> None:
        """Let go of a sequence's blocks, last first: a chain is then evicted from its end and keeps
        its use longest."""
        for block in reversed(blocks):
            self.n_holders[block] -= 1
            if self.n_holders[block] == 0:
                self._free[block] = None
                if self._key_of[block] is None:
                    self._free.move_to_end(block, last=False)  # nothing to lose: take it first

    def check_integrity(self, tables: Iterable[list[int]] = ()) -> None:
        """Raises RuntimeError unless the books balance with `tables`, the block lists of all
        holders (none: idle)."""
        held = Counter(block for table in tables for block in table)
        for block, n in enumerate(self.n_holders):
            if n != held[block]:
                raise RuntimeError(
                    f"block {block} has {n} holders on the books but is in {held[block]} tables"
                )
            if (block in self._free) != (n == 0):
                raise RuntimeError(
                    f"block {block} has {n} holders and is {'' if n else 'not '}in the free list"
                )
        keyed = {key: block for block, key in enumerate(self._key_of) if key is not None}
        if keyed != self._block_of:
            raise RuntimeError(
                f"{len(keyed)} blocks have a key, {len(self._block_of)} keys have a block"
            )
        if len(held) + len(self._free) != self.n_blocks:
            raise RuntimeError(
                f"{len(held)} held and {len(self._free)} free blocks are not {self.n_blocks}"
            )
