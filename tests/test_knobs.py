"""No setting without effect: every field of every config is read somewhere."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import instructax
from instructax import config as config_module

SOURCE = Path(instructax.__file__).parent
# Where fields are declared and checked, but not obeyed.
CHECKERS = ("config.py", "validation.py", "consistency.py", "presence.py", "ranges.py")
# A property of ModelConfig reads for those that read the property.
THROUGH = {
    "d_head": "head_width",
    "num_kv_heads": "kv_heads",
    "d_ff": "mlp_width",
    "vocab_multiple": "padded_vocab_size",
}


def names_read(*files: Path) -> set[str]:
    """Names of attributes that are read; in a module with ``getattr(x, name)``, its strings too."""
    found: set[str] = set()
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
        found |= {
            n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
        }
        if any(_reads_by_variable(n) for n in nodes):
            found |= {
                n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
    return found


def _reads_by_variable(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and not isinstance(node.args[1], ast.Constant)
    )


def unread(files: list[Path]) -> list[str]:
    read = names_read(*files)
    return [
        f"{cls.__name__}.{f.name}"
        for cls in vars(config_module).values()
        if isinstance(cls, type) and dataclasses.is_dataclass(cls)
        for f in dataclasses.fields(cls)
        if not {f.name, THROUGH.get(f.name)} & read
    ]


def test_every_field_is_read():
    found = unread([p for p in SOURCE.rglob("*.py") if p.name not in CHECKERS])
    assert not found, f"fields that nothing reads: {', '.join(found)}"


def test_an_unread_field_is_found(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("x.kl_coef = 1\nprint(x.ptx_coef, 'episodes', x.head_width)\n")
    found = unread([file])
    assert {"PpoConfig.kl_coef", "PpoConfig.episodes"} <= set(found)
    assert not {"PpoConfig.ptx_coef", "ModelConfig.d_head"} & set(found)
    file.write_text("for name in ('episodes',):\n    print(getattr(x, name))\n")
    assert "PpoConfig.episodes" not in unread([file])
