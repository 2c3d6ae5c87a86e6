"""When the reward stage looks at held-out pairs."""

from __future__ import annotations

import pytest

from instructax.stages.reward import marks


@pytest.mark.parametrize(
    ("total", "count", "steps"),
    [
        (100, 1, [100]),
        (100, 4, [25, 50, 75, 100]),
        (10, 3, [4, 7, 10]),
        (3, 10, [1, 2, 3]),
        (1, 10, [1]),
    ],
)
def test_marks_are_even_and_end_at_the_end(total, count, steps):
    assert sorted(marks(total, count)) == steps


def test_as_many_marks_as_asked_where_there_are_steps():
    for total in (10, 11, 59, 1234):
        for count in range(1, 11):
            assert len(marks(total, count)) == count and max(marks(total, count)) == total
