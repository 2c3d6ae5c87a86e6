"""Attention family by family equals attention under the mask: values, gradients, bands, shared heads, packed rows."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from instructax.batches import ComparisonBatch
from instructax.data.comparisons import FamilySizes, family_sizes, layout_rows
from instructax.models import families
from instructax.models import functional as model
from instructax.models.attention import attention, heads_first, visible
from instructax.models.families import family_attention, rearranged
from instructax.steps.reward import ranking_objective

SIZES = FamilySizes(prompts=3, prompt=8, response=8)


def rows(seed: int, families: FamilySizes | None = SIZES):
    """Two rows of 40 slots: prompts of 1 to 8 tokens with 1 to 4 responses of 1 to 8."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 9, rng.integers(1, 9)) for _ in range(5)]
    responses = [
        [rng.integers(3, 9, rng.integers(1, 9)) for _ in range(k)] for k in (3, 1, 4, 2, 2)
    ]
    return layout_rows(
        prompts, responses, rows=4, row_length=40, pad_id=0, max_responses=4, families=families
    )


def inputs(seed: int, shape, groups: int):
    keys = jax.random.split(jax.random.key(seed), 4)
    q, out = (jax.random.normal(key, (*shape, 4, 6)) for key in keys[:2])
    k, v = (jax.random.normal(key, (*shape, groups, 6)) for key in keys[2:])
    return q, k, v, out


@pytest.mark.laws
@pytest.mark.parametrize("band", [None, 3])
@pytest.mark.parametrize("groups", [4, 2])
def test_families_see_what_the_mask_shows(groups, band):
    layout = rows(groups)[0]
    q, k, v, dout = inputs(7, layout.token_BxL.shape, groups)

    def plain(q, k, v):
        return attention(q, heads_first(k), heads_first(v), visible(layout, band))

    def fast(q, k, v):
        return family_attention(q, k, v, layout.families, band)

    (meant, back), (found, fast_back) = (jax.vjp(f, q, k, v) for f in (plain, fast))
    np.testing.assert_allclose(found, meant, atol=2e-6)
    assert np.all(np.asarray(found)[layout.segment_BxL == 0] == 0.0)
    for a, b in zip(fast_back(dout), back(dout), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.laws
@pytest.mark.parametrize("band", [None, 130])
def test_the_kernel_sees_what_the_products_see(band):
    """A prompt of 88 of 128 slots, responses of 70 and 100 of 100; the kernel's blocks end within texts."""
    sizes, slots = (128, 2, 100), 384
    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (jax.random.normal(key, (1, slots, 2, 128)) for key in keys[:2])
    k, v = (jax.random.normal(key, (1, slots, 1, 128)) for key in keys[2:])
    used = 128 + 2 * 100
    index = jnp.arange(slots)
    real = ((index >= 40) & ~((index >= 198) & (index < 228)) & (index < used))[None]

    def products(q, k, v):
        out = families._by_products(*(x[:, :used] for x in (q, k, v, real)), sizes, band)
        return jnp.where(real[:, :used, None, None], out, 0.0)

    def kernel(q, k, v):
        out = families._by_kernel(q, k, v, real, sizes, band, interpret=True)
        return jnp.where(real[..., None, None], out, 0.0)[:, :used]

    (meant, back), (found, kernel_back) = (jax.vjp(f, q, k, v) for f in (products, kernel))
    same = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=2e-4)
    same(found, meant)
    jax.tree.map(same, kernel_back(dout[:, :used]), back(dout[:, :used]))


@pytest.mark.laws
def test_a_reward_model_scores_and_learns_the_same():
    found = []
    for sizes in (None, SIZES):
        layout, row, last, valid = rows(3, sizes)
        rank = np.broadcast_to(np.arange(4, dtype=np.int32), valid.shape)
        batch = ComparisonBatch(layout, row, last, rank, valid)
        objective = ranking_objective(tiny.MODEL)

        def loss(params, batch=batch, objective=objective):
            return objective.loss(objective.network(params, batch, None), batch, None)[0]

        params = model.init(jax.random.key(1), tiny.MODEL, "scalar")
        found.append(jax.jit(jax.value_and_grad(loss))(params))
    plain, fast = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, fast)


@pytest.mark.laws
def test_going_there_and_back_is_the_identity_and_so_is_its_gradient():
    there = jnp.asarray([[2, -1, 0, 3, -1]])
    home = jnp.asarray([[2, -1, 0, 3]])
    x = jax.random.normal(jax.random.key(0), (1, 4, 3))
    y, back = jax.vjp(lambda x: rearranged(x, there, home), x)
    np.testing.assert_array_equal(
        y[0], np.stack([x[0, 2], 0 * x[0, 0], x[0, 0], x[0, 3], 0 * x[0, 0]])
    )
    again = rearranged(y, home, there)
    np.testing.assert_array_equal(again[0], x[0] * np.asarray([[1.0], [0.0], [1.0], [1.0]]))
    # The sum into slots that a plain gather has as its gradient.
    dy = jax.random.normal(jax.random.key(1), y.shape)
    meant = jnp.zeros_like(x).at[0, there[0]].add(jnp.where(there[0][:, None] >= 0, dy[0], 0.0))
    np.testing.assert_allclose(back(dy)[0], meant, atol=1e-7)


def test_every_real_slot_is_in_one_place():
    layout = rows(0)[0]
    for row in range(4):
        slots = np.concatenate([x[row].ravel() for x in dataclasses.astuple(layout.families)])
        real = np.flatnonzero(layout.segment_BxL[row])
        np.testing.assert_array_equal(np.sort(slots[slots >= 0]), real)


def test_sizes_are_given_where_they_save_scores():
    triangle = 704**2 // 2
    found = family_sizes([100, 127], [62], ways=9, most_in_row=1, row_scores=triangle, tile=8)
    assert found == FamilySizes(1, 128, 64)
    assert found.scores(9) == 128**2 + 9 * 64 * 192
    # Many short comparisons in a row: room for the longest prompt in every place would cost more.
    assert family_sizes([10, 128], [64], ways=9, most_in_row=9, row_scores=triangle, tile=8) is None
