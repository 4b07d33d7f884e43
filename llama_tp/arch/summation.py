"""The order in which partial sums are added: one binary tree, the same for every number of ranks.

A sum over K is cut into chunks. A rank that holds a run of chunks computes a subtree of that tree.
"""

from typing import Any, Protocol, TypeVar


class Addable(Protocol):
    """What has a +: tensors, and numbers in tests."""

    def __add__(self, other: Any, /) -> Any: ...


A = TypeVar("A", bound=Addable)


def tree_add(parts: list[A]) -> A:
    """Adds the parts as a binary tree, ((0 + 1) + (2 + 3)) + ...: neighbours first; an odd one out
    waits for the next round.

    With 2**k parts, a rank that adds its own run of parts computes exactly one subtree. So the sum
    of such partial sums has the same bits on every number of ranks that divides the number of
    parts.

    Args:
        parts: at least one; tensors of one shape and dtype. They are not changed.
    """
    while len(parts) > 1:
        pairs = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(parts) - len(parts) % 2 :]
    return parts[0]


def subtrees(leaves: range, n_leaves: int) -> list[range]:
    """The parts of `leaves` that are whole subtrees of the tree over `n_leaves`, as large as they
    can be, in order: 3, 4 and 5 of 8 are (3) and (4 + 5)."""
    found: list[range] = []

    def visit(first: int, size: int) -> None:
        node = range(first, min(first + size, n_leaves))
        if node.start >= leaves.start and node.stop <= leaves.stop:
            found.extend([node] if node else [])
        elif node.start < leaves.stop and leaves.start < node.stop:
            visit(first, size // 2)
            visit(first + size // 2, size // 2)

    visit(0, _height(n_leaves))
    return found


def add_subtrees(sums: dict[range, A], n_leaves: int) -> A:
    """What `tree_add` gives for `n_leaves` parts, from the sums of subtrees that cover all."""

    def value(first: int, size: int) -> A:
        node = range(first, min(first + size, n_leaves))
        if node in sums:
            return sums[node]
        left = value(first, size // 2)
        middle = first + size // 2
        return left + value(middle, size // 2) if middle < n_leaves else left

    return value(0, _height(n_leaves))


def _height(n_leaves: int) -> int:
    """Leaves of the full tree that `n_leaves` are the first of: the next power of two."""
    return 1 << (n_leaves - 1).bit_length()
