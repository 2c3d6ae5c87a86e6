"""The documented table of traps says what the trap tests do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.traps

HERE = Path(__file__).parent


def trap_tests() -> dict[str, list[str]]:
    """The names of the wrong variants that each trap test rejects."""
    found = {}
    for path in sorted(HERE.glob("test_traps_*.py")):
        for test in ast.parse(path.read_text("utf-8")).body:
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                calls = [n for n in ast.walk(test) if isinstance(n, ast.Call)]
                (call,) = [c for c in calls if getattr(c.func, "id", "") == "rejects"]
                found[test.name] = [argument.id for argument in call.args[2:]]
    return found


def test_the_table_lists_every_trap_and_all_that_its_tests_reject():
    rows = {}
    for line in (HERE.parent / "docs" / "traps.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1].startswith("`test_"):
            rows[cells[1].strip("`")] = cells[2].split("; ")
    expected = {t: [w.replace("_", " ") for w in wrong] for t, wrong in trap_tests().items()}
    assert rows == expected
    numbers = {int(part[1:]) for name in rows for part in name.split("_") if part[1:].isdigit()}
    assert numbers == set(range(1, 21))
    assert min(map(len, expected.values())) >= 2
