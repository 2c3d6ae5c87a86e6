"""How segments come to lie in rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructax.batches import first_fit


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
