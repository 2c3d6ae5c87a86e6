"""Shared by all tests: CPU, strict ranks, a compile cache, real data where it is to be had."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling small programs, which run but a few times.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
_cache = Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_cache))
# For mutation testing: that an example fails is enough, its smallest form is not wanted.
hypothesis.settings.register_profile(
    "mutants", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)
_seconds = os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
jax.config.update("jax_persistent_cache_min_compile_time_secs", float(_seconds))


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items):
    """All that reads the miniature recipe in one worker: no other waits while it is made."""
    for item in items:
        if "mini_run" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("recipe"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data slices; a test that wants it skips visibly where it is absent."""
    folder = os.environ.get("INSTRUCTAX_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("INSTRUCTAX_TEST_DATA is not set to a folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of one finished miniature recipe, made once however many workers test: only read it."""
    import recipe

    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent  # the one that all workers share
    run_dir = folder / "recipe"
    with (folder / "recipe.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (run_dir / "mini" / "report.html").is_file():
            recipe.make(run_dir)
    return run_dir / "mini"


@pytest.fixture(scope="module")
def mini_run(finished_run, tmp_path_factory) -> Path:
    """The module's own copy of the finished recipe, to read and to write into."""
    import recipe

    return recipe.copy(finished_run, tmp_path_factory.mktemp("recipe"))
