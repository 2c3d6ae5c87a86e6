"""Who may import whom. Read from the sources, so that an import inside a function counts as well."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "instructax"
CONFIGS = SOURCE.parent.parent / "configs"

SETTINGS = {"config", "presence", "ranges", "consistency", "validation", "resolve"}
VOCABULARY = {"config", "records", "batches", "partitioning", "shapes", "masking", "logprobs"}
PACKAGES = {
    "models": VOCABULARY,
    "losses": VOCABULARY,
    "rl": VOCABULARY,
    "data": VOCABULARY,
    "worlds": VOCABULARY,
    "steps": VOCABULARY | {"models", "losses", "rl"},
    "runtime": VOCABULARY | SETTINGS | {"steps.state"},
    "interop": VOCABULARY | {"models"},
    "report": VOCABULARY | SETTINGS,
    "plan": VOCABULARY | SETTINGS | {"models", "steps", "runtime", "stages"},
    "stages": VOCABULARY
    | SETTINGS
    | {"models", "losses", "rl", "data", "worlds", "steps", "runtime", "interop", "report"},
}


def modules() -> dict[str, ast.Module]:
    """Dotted name within instructax -> syntax tree."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts)] = ast.parse(path.read_text("utf-8"))
    return found


def imported(tree: ast.AST) -> set[str]:
    """Absolute dotted names, ``from a import b`` as ``a.b``; relative imports are refused."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(tree: ast.AST) -> set[str]:
    """The modules of instructax that a tree imports, without the package's name."""
    names = set()
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] != "instructax":
            continue
        # Of a.b.c, b.c may be a module, or c a name in module b.
        while parts[1:] and not _is_module(parts[1:]):
            parts = parts[:-1]
        names.add(".".join(parts[1:]))
    return names - {""}


def _is_module(parts: list[str]) -> bool:
    path = SOURCE.joinpath(*parts)
    return path.with_suffix(".py").is_file() or path.is_dir()


MODULES = modules()


def allowed(module: str, permitted: set[str]) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in permitted)


def breaches(module: str, permitted: set[str]) -> set[str]:
    return {name for name in own(MODULES[module]) if not allowed(name, permitted)}


def test_every_module_has_a_layer():
    roots = {name.split(".")[0] for name in MODULES}
    assert roots == VOCABULARY | SETTINGS | set(PACKAGES) | {"__init__", "__main__"}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_a_package_imports_itself_and_what_lies_below(package):
    own_modules = [name for name in MODULES if name.split(".")[0] == package]
    assert own_modules
    found = {m: bad for m in own_modules if (bad := breaches(m, PACKAGES[package] | {package}))}
    assert not found


def test_the_vocabulary_imports_config_and_shapes_alone():
    found = {m: bad for m in VOCABULARY if (bad := breaches(m, {"config", "shapes"}))}
    assert not found
    assert not own(MODULES["config"])


def test_settings_import_settings_alone():
    assert not {m: bad for m in SETTINGS if (bad := breaches(m, SETTINGS))}


def test_one_door_leads_to_the_world():
    importers = {m for m in MODULES if any(n.startswith("worlds") for n in own(MODULES[m]))}
    assert {m for m in importers if not m.startswith("worlds.")} == {"stages.data"}


def test_the_model_is_behind_its_seam():
    """Outside models, only the seam and the tables of presets are known."""
    for name, tree in MODULES.items():
        if not name.startswith("models."):
            inside = {m for m in own(tree) if m.startswith("models")}
            assert inside <= {"models.functional", "models.presets"}, name


def importers_of(*libraries: str) -> dict[str, set[str]]:
    found = defaultdict(set)
    for name, tree in MODULES.items():
        for library in {n.split(".")[0] for n in imported(tree)} & set(libraries):
            found[library].add(name)
    return found


def test_flax_stays_inside_models():
    assert all(name.startswith("models.") for name in importers_of("flax")["flax"])


def test_losses_and_rl_know_arrays_alone():
    outside = {"flax", "optax", "orbax", "grain", "tyro", "tensorflow_datasets", "rich"}
    for library, names in importers_of(*outside).items():
        assert not {n for n in names if n.split(".")[0] in ("losses", "rl")}, library


def test_tyro_grain_and_datasets_are_imported_where_they_are_used():
    """Some images lack them: importing the package must not need them."""
    lazy = {"tyro", "grain", "tensorflow_datasets", "array_record"}
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {n.split(".")[0] for n in imported(node)} & lazy, name


def test_configs_import_the_vocabulary_of_settings_alone():
    for path in CONFIGS.rglob("*.py"):
        assert own(ast.parse(path.read_text("utf-8"))) <= {"config", "models.presets"}, path.name


def test_the_reading_of_imports_sees_what_it_must():
    """The law can fail: imports in functions, of modules, of packages and of names in modules."""
    source = """
import instructax.worlds.world
def f():
    from instructax import masking
    from instructax.losses.language import masked_nll
"""
    assert own(ast.parse(source)) == {"worlds.world", "masking", "losses.language"}
