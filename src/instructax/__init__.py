"""instructax: the InstructGPT recipe in JAX/Flax. Exact, sharded, and meant to be read."""

__version__ = "0.1.0"
