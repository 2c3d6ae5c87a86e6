import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from instructax.rl import sampling
from instructax.rl.sampling import episode_keys, sample_tokens

DRAWS = 20_000


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def draw_many(logits_V, temperature, top_k, top_p, valid_vocab, draws):
    keys = episode_keys(jax.random.key(7), jnp.arange(draws), 3)
    logits = jnp.broadcast_to(logits_V[None], (draws, logits_V.shape[0]))
    return sample_tokens(keys, logits, temperature, top_k, top_p, valid_vocab)


def chi_square(token, p):
    """(statistic - dof) / sqrt(2 dof): about a standard normal where the draws are of p."""
    rare = p * len(token) < 5
    counts = np.bincount(token, minlength=len(p))
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(p[~rare], p[rare].sum()) * len(token)
    observed, expected = observed[expected > 0], expected[expected > 0]
    dof = len(expected) - 1
    return (((observed - expected) ** 2 / expected).sum() - dof) / np.sqrt(2 * dof)


@pytest.mark.laws
@pytest.mark.parametrize(
    "temperature, top_k, top_p, valid_vocab, vocab",
    [
        (1.0, None, None, None, 50),
        (0.7, None, None, 41, 50),  # 41 ids: blocks of 7, the last one short
        (1.5, 8, None, 41, 50),
        (1.0, None, 0.8, None, 37),
        (1.0, 12, 0.7, 30, 37),
        (1.0, None, None, None, 2),
    ],
)
def test_draws_and_logp_are_of_the_stated_distribution(
    temperature, top_k, top_p, valid_vocab, vocab
):
    logits = (1.5 * np.random.default_rng(vocab).normal(size=vocab)).astype(np.float32)
    if valid_vocab is not None:
        logits[valid_vocab:] = 50.0  # padding would win if it took part
    token, logp = draw_many(logits, temperature, top_k, top_p, valid_vocab, DRAWS)
    token, logp = np.asarray(token), np.asarray(logp)
    p = oracles.next_token_distribution(logits, temperature, top_k, top_p, valid_vocab)
    assert token.dtype == np.int32
    assert np.all(p[token] > 0)
    np.testing.assert_allclose(logp, np.log(p[token]), atol=2e-6)
    assert abs(chi_square(token, p)) < 4.5


@pytest.mark.laws
def test_the_chi_square_would_notice():
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
    token, _ = draw_many(logits, 1.0, None, None, None, DRAWS)
    p = oracles.next_token_distribution(logits, 1.1)
    assert chi_square(np.asarray(token), p) > 4.5


def test_many_rare_ids_are_drawn_in_proportion():
    # One likely id, and 3,999 rare ones that share a mass of 0.4 over 64 blocks.
    logits = np.full(4000, np.log(0.4 / 3999), np.float32)
    logits[1234] = np.log(0.6)
    token = np.asarray(draw_many(logits, 1.0, None, None, None, DRAWS)[0])
    np.testing.assert_allclose(np.mean(token == 1234), 0.6, atol=0.015)
    rest = token[token != 1234]
    assert len(np.unique(rest)) > 3000  # 8,000 draws: 1 - exp(-2) of the ids are expected
    np.testing.assert_allclose(rest.mean(), 2000, atol=60)


def test_impossible_ids_are_never_drawn():
    logits = np.full(23, -np.inf, np.float32)
    logits[[4, 5, 22]] = [0.0, 1.0, -200.0]  # the last one's weight underflows
    token, logp = draw_many(logits, 1.0, None, None, None, DRAWS)
    assert set(np.unique(token)) == {4, 5}
    assert np.all(np.isfinite(logp))


def test_temperature_zero_is_greedy_with_the_logp_of_temperature_one():
    logits = np.random.default_rng(1).normal(size=(3, 10)).astype(np.float32)
    logits[:, 8:] = 99.0
    keys = jax.random.split(jax.random.key(0), 3)
    token, logp = sample_tokens(keys, logits, 0.0, valid_vocab=8)
    np.testing.assert_array_equal(token, logits[:, :8].argmax(axis=1))
    p = [oracles.next_token_distribution(r, 1.0, None, None, 8).max() for r in logits]
    np.testing.assert_allclose(logp, np.log(p), rtol=1e-5)
    for option in ({"top_k": 1}, {"top_p": 1e-6}):
        same, certain = sample_tokens(keys, logits, 1.0, valid_vocab=8, **option)
        np.testing.assert_array_equal(same, token)
        np.testing.assert_allclose(certain, 0.0, atol=1e-6)


def test_options_that_keep_everything_change_nothing_but_the_order():
    logits = np.random.default_rng(2).normal(size=30).astype(np.float32)
    p = oracles.next_token_distribution(logits, 1.0)
    for top_k, top_p in ((30, None), (99, None), (None, 1.0)):
        token, logp = draw_many(logits, 1.0, top_k, top_p, None, 500)
        np.testing.assert_allclose(logp, np.log(p[np.asarray(token)]), atol=2e-6)


@pytest.mark.laws
def test_a_row_depends_on_its_own_key_alone():
    logits = np.random.default_rng(3).normal(size=(6, 40)).astype(np.float32)
    episode = np.array([5, 1, 9, 3, 7, 0])
    keys = episode_keys(jax.random.key(1), episode, 2)
    whole, _ = sample_tokens(keys, logits, 1.0)
    order = np.array([4, 0, 2])
    some, _ = sample_tokens(episode_keys(jax.random.key(1), episode[order], 2), logits[order], 1.0)
    np.testing.assert_array_equal(some, np.asarray(whole)[order])


def test_episode_keys_are_the_nested_folds_and_all_differ():
    key = jax.random.key(3)
    keys = jnp.stack([episode_keys(key, np.arange(5), t) for t in range(4)])
    expected = jax.random.fold_in(jax.random.fold_in(key, 2), 3)
    assert keys[3, 2] == expected
    data = np.asarray(jax.random.key_data(keys)).reshape(20, -1)
    assert len(np.unique(data, axis=0)) == 20
    np.testing.assert_array_equal(
        jax.random.key_data(jax.jit(episode_keys)(key, jnp.arange(5), jnp.int32(1))),
        jax.random.key_data(keys[1]),
    )


@pytest.mark.parametrize("vocab", [2, 4, 10])
def test_a_uniform_of_exactly_zero_draws_the_first_possible_id(vocab, monkeypatch):
    monkeypatch.setattr(
        sampling.jax.random, "uniform", lambda key, shape, dtype: jnp.zeros(shape, dtype)
    )
    logits = np.full((1, vocab), -np.inf, np.float32)
    logits[0, vocab - 1] = 0.0
    token, logp = sample_tokens(jax.random.split(jax.random.key(0), 1), logits, 1.0)
    assert token.tolist() == [vocab - 1] and logp.tolist() == [0.0]


def test_top_p_stops_where_the_mass_reaches_p_exactly():
    keys = jax.random.split(jax.random.key(0), 64)
    logits = np.zeros((64, 4), np.float32)
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)):
        token, logp = sample_tokens(keys, logits, 1.0, top_p=top_p)
        assert set(np.asarray(token).tolist()) == set(range(kept))
        np.testing.assert_allclose(logp, -np.log(kept), atol=1e-6)


def test_64_bit_mode_draws_the_same_from_float32_logits():
    keys = jax.random.split(jax.random.key(5), 16)
    logits = np.random.default_rng(5).normal(size=(16, 40)).astype(np.float32)
    for options in ({}, {"top_k": 9}, {"temperature": 0.0}):
        options = {"temperature": 1.0, **options}
        token, logp = sample_tokens(keys, logits, **options)
        with jax.enable_x64(True):
            wide_token, wide_logp = sample_tokens(keys, logits, **options)
        np.testing.assert_array_equal(wide_token, token)
        np.testing.assert_array_equal(wide_logp, logp)
        assert wide_token.dtype == jnp.int32 and wide_logp.dtype == jnp.float32


def test_dtypes():
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample_tokens(keys, jnp.zeros((2, 5), jnp.bfloat16), 1.0)[1].dtype == jnp.float32
    with jax.enable_x64(True):
        token, logp = sample_tokens(keys, np.zeros((2, 5)), 1.0)
        assert token.dtype == jnp.int32 and logp.dtype == jnp.float64


@pytest.mark.parametrize(
    "options, error, name",
    [
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"valid_vocab": 0}, ValueError, "valid_vocab"),
        ({"valid_vocab": 6}, ValueError, "valid_vocab"),
        ({"logits_BxV": np.zeros((2, 5), np.int32)}, TypeError, "logits_BxV"),
        ({"logits_BxV": np.zeros((3, 5), np.float32)}, ValueError, "key_B has 2 rows"),
        ({"key_B": np.zeros((2, 2), np.uint32)}, TypeError, "key_B must be a typed random key"),
    ],
)
def test_the_door(options, error, name):
    arguments = {
        "key_B": jax.random.split(jax.random.key(0), 2),
        "logits_BxV": np.zeros((2, 5), np.float32),
        "temperature": 1.0,
    }
    with pytest.raises(error, match=name):
        sample_tokens(**{**arguments, **options})


@pytest.mark.laws
@pytest.mark.parametrize("shift", [-4096.0, 4096.0])
def test_a_constant_added_to_all_logits_changes_no_draw(shift):
    # Sixteenths stay exact under the shift; exp(4096) does not exist.
    logits = np.random.default_rng(3).integers(-64, 64, (200, 50)).astype(np.float32) / 16
    keys = episode_keys(jax.random.key(2), jnp.arange(200), 0)
    token, logp = sample_tokens(keys, logits, 1.0)
    shifted_token, shifted_logp = sample_tokens(keys, logits + np.float32(shift), 1.0)
    np.testing.assert_array_equal(token, shifted_token)
    np.testing.assert_allclose(logp, shifted_logp, atol=1e-3)  # float32's steps at 4096


@pytest.mark.laws
def test_keys_and_token_indices_a_row_are_those_rows_alone():
    keys, episode, t = jax.random.split(jax.random.key(5), 3), np.array([4, 0, 4]), [2, 0, 1]
    together = episode_keys(keys, episode, jnp.array(t))
    of_one_key = episode_keys(keys[0], episode, jnp.array(t))
    for i in range(3):
        alone = episode_keys(keys[i], episode[i : i + 1], t[i])
        assert (jax.random.key_data(together[i]) == jax.random.key_data(alone[0])).all()
        alone = episode_keys(keys[0], episode[i : i + 1], t[i])
        assert (jax.random.key_data(of_one_key[i]) == jax.random.key_data(alone[0])).all()


@pytest.mark.parametrize(
    "temperature, kind, says",
    [(np.ones(2, np.float32), ValueError, "a scalar"), ("warm", TypeError, "a real number")],
)
def test_a_temperature_is_refused_by_name(temperature, kind, says):
    keys = episode_keys(jax.random.key(0), jnp.arange(2), 0)
    with pytest.raises(kind, match=f"^temperature must be {says}"):
        sample_tokens(keys, np.zeros((2, 3), np.float32), temperature)
