"""Shape algebra, without a device."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_ep import DispatchLayout, _shapes

FLAT, RANK_MAJOR, EXPERT_MAJOR = DispatchLayout.FLAT, DispatchLayout.RANK_MAJOR, DispatchLayout.EXPERT_MAJOR


def worst_case_by_trial(num_local_experts: int, num_rows: int, alignment: int) -> int:
    """The most rows, padding included, over all ways to share up to `num_rows` among the local experts."""
    counts = itertools.product(range(num_rows + 1), repeat=num_local_experts)
    return max(sum(_shapes.align_up(count, alignment) for count in split) for split in counts if sum(split) <= num_rows)


def capacity(**overrides) -> int:
    arguments = dict(num_ranks=2, num_local_experts=4, topk=2, max_tokens_per_rank=8, expert_alignment=1, layout=FLAT)
    return _shapes.worst_case_capacity(**arguments | overrides)


def moe_shape(layout: DispatchLayout, capacity: int = 100) -> _shapes.MoEShape:
    return _shapes.MoEShape(
        num_ranks=4,
        num_experts=32,
        topk=6,
        hidden_size=64,
        max_tokens_per_rank=10,
        capacity=capacity,
        expert_alignment=1,
        layout=layout,
    )


@given(n=st.integers(0, 10**12), alignment=st.integers(1, 10**6))
def test_align_up_is_the_next_multiple(n, alignment):
    up = _shapes.align_up(n, alignment)
    assert up % alignment == 0
    assert 0 <= up - n < alignment


def test_shape_of_flat():
    shape = moe_shape(FLAT)
    assert (shape.num_local_experts, shape.rows_per_token, shape.num_row_groups) == (8, 6, 8)


def test_shape_of_rank_major():
    shape = moe_shape(RANK_MAJOR)
    assert (shape.num_local_experts, shape.rows_per_token, shape.num_row_groups) == (8, 1, 4)


def test_shape_of_expert_major():
    shape = moe_shape(EXPERT_MAJOR, capacity=8 * 40)
    assert (shape.num_local_experts, shape.rows_per_token, shape.num_row_groups) == (8, 6, 8)
    assert shape.slots_per_expert == 40


def test_capacity_of_expert_major_has_slots_for_all_tokens_at_each_expert():
    assert capacity(layout=EXPERT_MAJOR) == 4 * 2 * 8
    assert capacity(layout=EXPERT_MAJOR, topk=1) == 4 * 2 * 8


def test_capacity_without_padding_holds_all_rows_of_all_ranks():
    assert capacity() == 2 * 8 * 2
    assert capacity(layout=RANK_MAJOR) == 2 * 8


def test_capacity_of_rank_major_has_no_padding():
    assert capacity(layout=RANK_MAJOR, expert_alignment=128) == 2 * 8


@pytest.mark.parametrize("num_local_experts", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5])
@pytest.mark.parametrize("alignment", [1, 2, 4, 8])
def test_capacity_is_enough_and_at_most_one_block_too_much(num_local_experts, num_tokens, alignment):
    got = capacity(
        num_ranks=1,
        topk=1,
        num_local_experts=num_local_experts,
        max_tokens_per_rank=num_tokens,
        expert_alignment=alignment,
    )
    needed = max(1, worst_case_by_trial(num_local_experts, num_tokens, alignment))
    assert needed <= got <= needed + alignment


def test_capacity_is_never_empty():
    assert capacity(max_tokens_per_rank=0) == 1


def test_capacity_does_not_overflow():
    assert capacity(num_ranks=1024, max_tokens_per_rank=2**20, topk=32) == 2**35
