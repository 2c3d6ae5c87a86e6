"""Small streams whose tokens tell where they come from."""

from __future__ import annotations

import jax
import numpy as np

from instructax.data import demonstrations, pretraining
from instructax.data.demonstrations import DemonstrationExamples


def examples(count: int, length: int = 3) -> DemonstrationExamples:
    """Example i is made of the token 100 + i, so that rows tell where they come from."""
    return DemonstrationExamples(
        prompts=[np.full(length, 100 + i, np.int32) for i in range(count)],
        responses=[np.full(length, 100 + i, np.int32) for i in range(count)],
        record_index_n=np.arange(count),
        dropped={},
        pad_id=0,
    )


def lm_stream(count=20, batch_size=5, seed=0, packed=False, row_length=8):
    return demonstrations.stream(
        examples(count), batch_size=batch_size, row_length=row_length, packed=packed, seed=seed
    )


def text_stream(num_docs=40, batch_size=5, seed=0):
    docs = [np.asarray([1, *range(2000 + 10 * i, 2007 + 10 * i), 2]) for i in range(num_docs)]
    return pretraining.stream(docs, batch_size=batch_size, row_length=8, seed=seed)


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(same))
