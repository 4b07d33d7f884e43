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
