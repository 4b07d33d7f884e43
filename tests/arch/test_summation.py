"""The order of sums: the same tree, however its leaves are dealt. The oracle is the tree written
out as text, so that any other order shows."""

from hypothesis import given
from hypothesis import strategies as st

from llama_tp.arch.shard_map import Axis
from llama_tp.arch.summation import add_subtrees, subtrees, tree_add


class Said(str):
    """A sum as it would be written."""

    def __add__(self, other):
        return Said(f"({self}+{other})")


def test_the_tree():
    said = [Said(i) for i in range(8)]
    assert tree_add(said) == "(((0+1)+(2+3))+((4+5)+(6+7)))"
    assert tree_add(said[:5]) == "(((0+1)+(2+3))+4)"
    assert tree_add(said[:3]) == "((0+1)+2)"


def test_subtrees_of_runs():
    assert subtrees(range(0, 3), 8) == [range(0, 2), range(2, 3)]
    assert subtrees(range(3, 6), 8) == [range(3, 4), range(4, 6)]
    assert subtrees(range(6, 8), 8) == [range(6, 8)]
    assert subtrees(range(0, 8), 8) == [range(0, 8)]
    assert subtrees(range(4, 5), 5) == [range(4, 5)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_any_deal_adds_in_the_order_of_one_rank(dealt):
    axis = Axis(1000, tuple(dealt))
    leaves = [Said(i) for i in range(axis.n_leaves)]
    sums = {
        tree: tree_add([leaves[i] for i in tree])
        for rank in range(len(dealt))
        for tree in axis.subtrees[rank]
    }
    assert sorted(i for tree in sums for i in tree) == list(range(axis.n_leaves))
    assert add_subtrees(sums, axis.n_leaves) == tree_add(leaves)
    assert all(1 <= len(axis.subtrees[rank]) <= axis.n_partials for rank in range(len(dealt)))
