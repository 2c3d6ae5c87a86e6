"""How segments come to lie in rows, and the door of a layout."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructax.batches import (
    Layout,
    check_layout,
    first_fit,
    padded_layout,
    scored_slots,
)


@given(st.lists(st.integers(0, 10), max_size=40))
def test_first_fit_places_each_item_once_where_it_first_fits(sizes):
    rows = first_fit(sizes, 10)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 10 for row in rows)
    for later in range(1, len(rows)):
        for item in rows[later]:
            for earlier in rows[:later]:
                before = sum(sizes[i] for i in earlier if i < item)
                assert before + sizes[item] > 10
    capped = first_fit(sizes, 10, max_rows=2)
    placed = sorted(i for row in capped for i in row)
    assert len(capped) <= 2 and placed == list(range(len(placed)))


def test_first_fit_refuses_what_fits_nowhere():
    with pytest.raises(ValueError, match=r"size_n\[1\] is 11"):
        first_fit([3, 11], 10)
    # Two sizes, each with a capacity of its own.
    assert first_fit(np.array([[4, 3], [4, 0], [1, 3], [2, 1]]), (10, 4)) == [[0, 1, 3], [2]]
    with pytest.raises(ValueError, match=r"size_n\[0\] is \[4, 5\]"):
        first_fit(np.array([[4, 5]]), (10, 4))


TOKEN, MASK = np.ones((2, 3), np.int32), np.ones((2, 3), bool)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32"])
def test_any_integers_are_tokens_and_all_four_arrays_are_int32(xp, dtype):
    layout = padded_layout(xp.asarray(TOKEN, dtype), xp.asarray(MASK))
    check_layout(layout)
    for array in (layout.token_BxL, layout.position_BxL, layout.segment_BxL, layout.prefix_BxL):
        assert array.shape == (2, 3) and array.dtype == jnp.int32


@pytest.mark.parametrize("xp", [np, jnp])
def test_tokens_of_another_dtype_and_masks_of_numbers_are_refused_by_name(xp):
    """A float token would be cut to an id, silently: 7.9 would be token 7."""
    for dtype in ("float32", "float16", "bool"):
        with pytest.raises(TypeError) as refused:
            padded_layout(xp.asarray(TOKEN, dtype), xp.asarray(MASK))
        assert str(refused.value) == f"token_BxL must be integer, got {dtype}"
    for dtype in ("float32", "int32"):
        with pytest.raises(TypeError) as refused:
            padded_layout(xp.asarray(TOKEN), xp.asarray(MASK, dtype))
        assert str(refused.value) == f"mask_BxL must be bool, got {dtype}"
    with pytest.raises(TypeError, match="^token_BxL must be an array, got list$"):
        padded_layout(TOKEN.tolist(), MASK)


@pytest.mark.parametrize("name, good", [("token_BxL", TOKEN), ("mask_BxL", MASK)])
def test_a_layouts_arguments_of_another_rank_or_shape_are_refused_by_name(name, good):
    arguments = {"token_BxL": TOKEN, "mask_BxL": MASK}
    for other in (good[0], good[None]):
        with pytest.raises(ValueError) as refused:
            padded_layout(**{**arguments, name: other})
        assert str(refused.value) == f"{name} must have rank 2, got shape {other.shape}"
    for other in (good[:1], good[:, :1]):  # never broadcast
        with pytest.raises(ValueError, match="^mask_BxL has shape .* but token_BxL has shape"):
            padded_layout(**{**arguments, name: other})


def test_a_layout_of_other_arrays_is_refused_by_name():
    """What it refuses of each array, tests/test_functional.py tries through the model's doors."""
    with pytest.raises(TypeError, match="^layout must be a Layout, got tuple$"):
        check_layout((TOKEN,) * 4)
    with pytest.raises(TypeError, match="^layout.prefix_BxL must be integer, got bool$"):
        check_layout(Layout(TOKEN, TOKEN, TOKEN, MASK))
    with pytest.raises(ValueError, match="^layout.segment_BxL has shape"):
        check_layout(Layout(TOKEN, TOKEN, TOKEN[:1], TOKEN))


def test_scored_slots_are_the_weighted_ones_in_few_widths():
    weight = np.zeros((3, 16), np.float32)
    weight[0, [3, 9, 15]], weight[1, 4], weight[2, 5:10] = 1.0, 0.5, -1.0
    scored = scored_slots(weight)
    assert scored.shape == (3, 6) and scored.dtype == np.int32
    for row, slots in zip(weight, scored, strict=True):
        assert slots[slots >= 0].tolist() == np.flatnonzero(row).tolist()
    assert scored_slots(np.zeros((2, 16), np.float32)).tolist() == [[-1, -1], [-1, -1]]
    weight[0, :15] = 1.0
    assert scored_slots(weight) is None
    assert {scored_slots(np.arange(1000)[None] < n).shape[1] for n in range(1, 876)} == {
        125 * k for k in range(1, 8)
    }
