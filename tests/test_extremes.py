"""The doors of the public functions, and what they do at the edges: finite values and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from instructax import logprobs, masking
from instructax.batches import padded_layout
from instructax.losses.language import masked_nll
from instructax.losses.ppo_ptx import combine_gradients
from instructax.losses.ranking import best_of_k_loss, pairwise_logistic_loss, ranked_pairs
from instructax.losses.surrogate import clipped_policy_loss
from instructax.losses.value import clipped_value_loss
from instructax.models import functional as model
from instructax.rl.gae import generalized_advantage
from instructax.rl.kl import ESTIMATORS, adaptive_kl_update, per_token_kl
from instructax.rl.rewards import apply_missing_eos, shaped_reward
from instructax.rl.sampling import episode_keys, sample_tokens

B, T, K = 3, 4, 5
F_BxT, M_BxT = np.ones((B, T), np.float32), np.ones((B, T), bool)
F_BxK, I_BxK, M_BxK = np.ones((B, K), np.float32), np.ones((B, K), np.int32), np.ones((B, K), bool)
F_B, I_B, M_B = F_BxT[:, 0], I_BxK[:, 0], M_BxT[:, 0]
BxT, BxK, SCALAR = (B, T), (B, K), ()

# name -> (function of its array arguments, those arguments by name, the shapes that come out)
DOORS = {
    "masked_mean": (masking.masked_mean, {"x": F_BxT, "mask": M_BxT}, [SCALAR]),
    "masked_var": (masking.masked_var, {"x": F_BxT, "mask": M_BxT}, [SCALAR]),
    "masked_sum": (masking.masked_sum, {"x": F_BxT, "mask": M_BxT}, [SCALAR]),
    "whiten": (masking.whiten, {"x": F_BxT, "mask": M_BxT}, [BxT]),
    "last_token_index": (masking.last_token_index, {"mask_BxT": M_BxT}, [(B,)]),
    "masked_nll": (masked_nll, {"logp_BxT": F_BxT, "mask_BxT": M_BxT}, None),
    "masked_nll, weighted": (
        masked_nll, {"logp_BxT": F_BxT, "mask_BxT": M_BxT, "weight_BxT": F_BxT}, None
    ),
    "pairwise_logistic_loss": (
        pairwise_logistic_loss, {"score_BxK": F_BxK, "rank_BxK": I_BxK, "valid_BxK": M_BxK}, None
    ),
    "best_of_k_loss": (
        best_of_k_loss, {"score_BxK": F_BxK, "rank_BxK": I_BxK, "valid_BxK": M_BxK}, None
    ),
    "ranked_pairs": (
        ranked_pairs, {"score_BxK": F_BxK, "rank_BxK": I_BxK, "valid_BxK": M_BxK}, [(B, K, K)] * 2
    ),
    "clipped_policy_loss": (
        functools.partial(clipped_policy_loss, clip_range=0.2),
        {"logp_BxT": F_BxT, "old_logp_BxT": F_BxT, "advantage_BxT": F_BxT, "mask_BxT": M_BxT},
        None,
    ),
    "clipped_value_loss": (
        functools.partial(clipped_value_loss, clip_range=0.2),
        {"value_BxT": F_BxT, "old_value_BxT": F_BxT, "return_BxT": F_BxT, "mask_BxT": M_BxT},
        None,
    ),
    "per_token_kl": (
        per_token_kl, {"logp_BxT": F_BxT, "ref_logp_BxT": F_BxT, "mask_BxT": M_BxT}, [BxT]
    ),
    "shaped_reward": (
        functools.partial(shaped_reward, kl_coef=0.1),
        {"score_B": F_B, "kl_BxT": F_BxT, "mask_BxT": M_BxT},
        [BxT],
    ),
    "apply_missing_eos": (
        functools.partial(apply_missing_eos, rule="replace", value=-1.0),
        {"score_B": F_B, "finished_B": M_B},
        [(B,)],
    ),
    "generalized_advantage": (
        functools.partial(generalized_advantage, discount=1.0, gae_lambda=0.95),
        {"reward_BxT": F_BxT, "value_BxT": F_BxT, "mask_BxT": M_BxT},
        [BxT, BxT],
    ),
    "chunked_token_statistics": (
        functools.partial(logprobs.chunked_token_statistics, vocab_size=5),
        {"x_BxLxD": np.ones((B, T, 2), np.float32), "token_BxL": np.ones((B, T), np.int32),
         "unembedding_VxD": np.ones((8, 2), np.float32)},
        [BxT, BxT],
    ),
    "sample_tokens": (
        lambda logits_BxV: sample_tokens(
            jax.random.split(jax.random.key(0), B), logits_BxV, temperature=1.0
        ),
        {"logits_BxV": F_BxK},
        [(B,), (B,)],
    ),
    "episode_keys": (
        lambda episode_B: episode_keys(jax.random.key(0), episode_B, 0), {"episode_B": I_B}, [(B,)]
    ),
}  # fmt: skip
ANY_RANK = ("masked_mean", "masked_var", "masked_sum", "whiten")
KINDS = {"f": "floating", "b": "bool", "i": "integer"}


@pytest.mark.parametrize("name", DOORS)
def test_outputs_have_the_shapes_of_the_legend(name):
    function, arguments, shapes = DOORS[name]
    out = jax.tree.leaves(function(**arguments))
    assert [x.shape for x in out] == ([SCALAR] * len(out) if shapes is None else shapes)
    assert all(x.dtype in (jnp.float32, jnp.int32, bool) or name == "episode_keys" for x in out)


@pytest.mark.parametrize("name", DOORS)
def test_another_dtype_is_refused_by_name(name):
    function, arguments, _ = DOORS[name]
    for argument, array in arguments.items():
        kind = KINDS[np.dtype(array.dtype).kind]
        others = {"f": np.float32, "b": np.bool_, "i": np.int32}
        for other in (dtype for key, dtype in others.items() if KINDS[key] != kind):
            with pytest.raises(TypeError) as refused:
                function(**{**arguments, argument: array.astype(other)})
            assert str(refused.value) == f"{argument} must be {kind}, got {np.dtype(other)}"
        with pytest.raises(TypeError) as refused:
            function(**{**arguments, argument: array.tolist()})
        assert str(refused.value) == f"{argument} must be an array, got list"


@pytest.mark.parametrize("name", [name for name in DOORS if name not in ANY_RANK])
def test_another_rank_is_refused_by_name(name):
    function, arguments, _ = DOORS[name]
    for argument, array in arguments.items():
        for other in (array[0], array[None]):
            with pytest.raises(ValueError) as refused:
                function(**{**arguments, argument: other})
            expected = f"{argument} must have rank {array.ndim}, got shape {other.shape}"
            assert str(refused.value) == expected


@pytest.mark.parametrize(
    "name", [n for n, (_, arguments, _) in DOORS.items() if len(arguments) > 1]
)
def test_shapes_that_do_not_agree_are_refused_by_name(name):
    """Never broadcast: a mask of one row would silently be the mask of all."""
    function, arguments, _ = DOORS[name]
    for argument, array in arguments.items():
        for axis in range(array.ndim):
            if argument == "unembedding_VxD" and axis == 0:
                continue  # the vocabulary may have any size
            short = np.take(array, [0], axis=axis)
            with pytest.raises(ValueError) as refused:
                function(**{**arguments, argument: short})
            first, *rest = str(refused.value).split(" has ")
            assert first in arguments and rest, str(refused.value)
            assert argument == first or argument in str(refused.value)


SCALARS = {
    "kl_coef": lambda v: shaped_reward(F_B, F_BxT, M_BxT, v),
    "discount": lambda v: generalized_advantage(F_BxT, F_BxT, M_BxT, v, 0.9),
    "gae_lambda": lambda v: generalized_advantage(F_BxT, F_BxT, M_BxT, 1.0, v),
    "clip_range": lambda v: clipped_policy_loss(F_BxT, F_BxT, F_BxT, M_BxT, v),
    "normalizer": lambda v: masking.masked_mean(F_BxT, M_BxT, v),
    "value": lambda v: apply_missing_eos(F_B, M_B, "subtract", v),
    "ptx_coef": lambda v: combine_gradients({"x": F_B}, {"x": F_B}, v),
    "kl_coef ": lambda v: adaptive_kl_update(v, 1.0, 6.0, 8, 100),
    "observed_kl": lambda v: adaptive_kl_update(0.1, v, 6.0, 8, 100),
    "target": lambda v: adaptive_kl_update(0.1, 1.0, v, 8, 100),
    "n_episodes": lambda v: adaptive_kl_update(0.1, 1.0, 6.0, v, 100),
    "horizon": lambda v: adaptive_kl_update(0.1, 1.0, 6.0, 8, v),
    "clip_range ": lambda v: clipped_value_loss(F_BxT, F_BxT, F_BxT, M_BxT, v),
    "normalizer ": lambda v: masked_nll(F_BxT, M_BxT, v),
    "normalizer  ": lambda v: pairwise_logistic_loss(F_BxK, I_BxK, M_BxK, normalizer=v),
    "normalizer   ": lambda v: best_of_k_loss(F_BxK, I_BxK, M_BxK, normalizer=v),
    "normalizer    ": lambda v: clipped_policy_loss(F_BxT, F_BxT, F_BxT, M_BxT, 0.2, v),
    "normalizer     ": lambda v: clipped_value_loss(F_BxT, F_BxT, F_BxT, M_BxT, 0.2, v),
}


@pytest.mark.parametrize("name", SCALARS)
def test_coefficients_are_real_scalars_and_zero_is_one(name):
    call, name = SCALARS[name], name.strip()
    for good in (0, 0.0, 1, np.float64(0.5), np.int64(2), jnp.float32(0.5), jnp.int32(1)):
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(call(good)))
    for bad, got in (("0.2", "str"), (True, "bool"), (M_B[0], "bool"), (1j, "complex")):
        with pytest.raises(TypeError) as refused:
            call(bad)
        assert str(refused.value) == f"{name} must be a real number, got {got}"
    with pytest.raises(ValueError) as refused:
        call(F_B)
    assert str(refused.value) == f"{name} must be a scalar, got shape (3,)"


@pytest.mark.parametrize("name", SCALARS)
def test_a_float64_coefficient_does_not_raise_the_precision(name):
    """Beta's own precision is the controller's to keep; all others take that of the arrays."""
    if name != "kl_coef ":
        with jax.enable_x64(True):
            out = SCALARS[name](np.float64(0.5))
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(out))


REFUSALS = {
    "temperature must be finite and at least 0, got -1.0": {"temperature": -1.0},
    "temperature must be finite and at least 0, got inf": {"temperature": float("inf")},
    "temperature must be finite and at least 0, got nan": {"temperature": float("nan")},
    "top_k must be at least 1, got 0": {"top_k": 0},
    "top_p must be in (0, 1], got 0.0": {"top_p": 0.0},
    "top_p must be in (0, 1], got 1.5": {"top_p": 1.5},
    "valid_vocab must be in [1, 5], got 0": {"valid_vocab": 0},
    "valid_vocab must be in [1, 5], got 6": {"valid_vocab": 6},
    "key_B has 3 rows, but logits_BxV has 2": {"logits_BxV": F_BxK[:2]},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_options_of_the_sampler_are_refused_by_name(message):
    keys = jax.random.split(jax.random.key(0), B)
    good = {"logits_BxV": F_BxK, "temperature": 1.0}
    with pytest.raises(ValueError) as refused:
        sample_tokens(keys, **{**good, **REFUSALS[message]})
    assert str(refused.value) == message


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1.0}, {"valid_vocab": 5},
                                     {"valid_vocab": 1}, {"temperature": 0}])  # fmt: skip
def test_the_ends_of_the_samplers_ranges_are_inside(options):
    keys = jax.random.split(jax.random.key(0), B)
    sample_tokens(keys, F_BxK, **{"temperature": 1.0, **options})


def test_keys_are_typed_and_refused_by_name():
    key, keys = jax.random.key(0), jax.random.split(jax.random.key(0), B)
    for call, name, rank, other in (
        (lambda k: episode_keys(k, I_B, 0), "key", 1, keys[None]),  # one, or one a row
        (lambda k: sample_tokens(k, F_BxK, 1.0), "key_B", 1, key),
    ):
        with pytest.raises(TypeError) as refused:
            call(np.zeros((B, 2), np.uint32))
        kind = "a typed random key (jax.random.key)"
        assert str(refused.value) == f"{name} must be {kind}, got uint32"
        with pytest.raises(ValueError) as refused:
            call(other)
        assert str(refused.value) == f"{name} must have rank {rank}, got shape {other.shape}"


def test_names_of_estimators_and_rules_are_refused():
    with pytest.raises(ValueError) as refused:
        per_token_kl(F_BxT, F_BxT, M_BxT, "k4")
    assert str(refused.value) == "estimator must be one of k1, k2, k3, abs, max0, got 'k4'"
    with pytest.raises(ValueError) as refused:
        apply_missing_eos(F_B, M_B, "add", 1.0)
    assert str(refused.value) == "rule must be one of replace, subtract, none, got 'add'"


def test_gradients_of_another_structure_shape_or_dtype_are_refused_by_name():
    def refusal(error, ppo, ptx):
        with pytest.raises(error) as refused:
            combine_gradients(ppo, ptx, 1.0)
        return str(refused.value)

    good = {"a": F_B, "b": [F_BxT]}
    assert refusal(ValueError, good, {"a": F_B}) == (
        f"ptx_grads is {jax.tree.structure({'a': 0})}, but ppo_grads is {jax.tree.structure(good)}"
    )
    assert refusal(ValueError, good, good | {"a": F_B[:1]}) == (
        "ptx_grads['a'] has shape (1,), but ppo_grads['a'] has shape (3,)"
    )
    integers = good | {"b": [I_BxK]}
    assert refusal(TypeError, integers, good) == "ppo_grads['b'][0] must be floating, got int32"
    assert refusal(TypeError, good, integers) == "ptx_grads['b'][0] must be floating, got int32"


def test_scores_of_another_number_of_rows_are_refused():
    with pytest.raises(ValueError) as refused:
        shaped_reward(F_B[:2], F_BxT, M_BxT, 0.1)
    assert str(refused.value) == "score_B has 2 rows, but kl_BxT has 3"


def test_sizes_of_the_chunked_logprobs_are_refused_by_name():
    function, arguments, _ = DOORS["chunked_token_statistics"]
    for changes, message in (
        ({"vocab_size": 0}, "vocab_size must be in [1, 8], got 0"),
        ({"vocab_size": 9}, "vocab_size must be in [1, 8], got 9"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError) as refused:
            function(**arguments, **changes)
        assert str(refused.value) == message


@pytest.mark.parametrize("name", ["chunked_token_statistics", "sample_tokens"])
def test_temperatures_are_real_scalars_and_do_not_raise_the_precision(name):
    if name == "sample_tokens":
        keys = jax.random.split(jax.random.key(0), B)
        call = functools.partial(sample_tokens, keys, F_BxK)
    else:
        function, arguments, _ = DOORS[name]
        call = functools.partial(function, **arguments)
    expected = call(temperature=0.5)
    for same in (np.float32(0.5), np.float64(0.5), jnp.float32(0.5)):
        with jax.enable_x64(True):
            out = call(temperature=same)
        jax.tree.map(np.testing.assert_array_equal, out, expected)
        assert [x.dtype for x in out] == [x.dtype for x in expected]
    for bad, got in (("0.5", "str"), (None, "NoneType"), (True, "bool"), (1j, "complex")):
        with pytest.raises(TypeError) as refused:
            call(temperature=bad)
        assert str(refused.value) == f"temperature must be a real number, got {got}"
    with pytest.raises(ValueError) as refused:
        call(temperature=F_B)
    assert str(refused.value) == "temperature must be a scalar, got shape (3,)"


# --- finite at the edges

FULL, EMPTY = np.ones((2, 3), bool), np.zeros((2, 3), bool)
ONE_TOKEN = np.array([[False, True, False], [False] * 3])
MASKS = {"full": FULL, "empty": EMPTY, "one token": ONE_TOKEN}
BIG = np.array([[1.0, -1.0, 1.0], [0.0, -1.0, 1.0]], np.float32)
NUMBERS = {
    "ordinary": BIG,
    "all equal": np.ones((2, 3), np.float32),
    "log-ratios and logits of 1e4": 1e4 * BIG,
    "rewards of 1e6": 1e6 * BIG,
    "tiny": 1e-30 * BIG,
}

# functions of two float arrays and a mask; each returns a tree
EDGES = {
    "masked_mean": lambda x, y, m: masking.masked_mean(x, m),
    "masked_var": lambda x, y, m: masking.masked_var(x, m),
    "whiten": lambda x, y, m: masking.whiten(x, m),
    "whiten, mean kept": lambda x, y, m: masking.whiten(x, m, False),
    "masked_nll": lambda x, y, m: masked_nll(x, m),
    "masked_nll, weighted": lambda x, y, m: masked_nll(x, m, weight_BxT=jnp.abs(y) + 1),
    "clipped_policy_loss": lambda x, y, m: clipped_policy_loss(x, -x, y, m, 0.2),
    "clipped_policy_loss, as advantages": lambda x, y, m: clipped_policy_loss(y, -y, x, m, 0.2),
    "clipped_value_loss": lambda x, y, m: clipped_value_loss(x, y, -x, m, 0.2),
    "clipped_value_loss, no clip": lambda x, y, m: clipped_value_loss(x, y, -x, m, None),
    **{
        f"per_token_kl, {name}": lambda x, y, m, name=name: per_token_kl(x, -x, m, name)
        for name in ESTIMATORS
    },
    "shaped_reward": lambda x, y, m: shaped_reward(x[:, 0], x, m, 0.02),
    "generalized_advantage": lambda x, y, m: generalized_advantage(x, -x, m, 1.0, 0.95),
    # Norms and cosine are figures; nobody descends them.
    "combine_gradients": lambda x, y, m: jax.lax.stop_gradient(combine_gradients(x, y, 27.8)),
}


def finite(tree, what):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.all(np.isfinite(np.asarray(leaf, np.float64))), (what, jax.tree_util.keystr(path))


@functools.cache
def edge(name):
    def total(x, y, mask):
        out = EDGES[name](x, y, mask)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out)), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("name", EDGES)
def test_values_and_gradients_are_finite_at_the_edges(name):
    for of_mask, mask in MASKS.items():
        for of_numbers, x in NUMBERS.items():
            # The second array stays ordinary, or the product of two extremes is what is tried.
            for y in (BIG, x if of_numbers != "rewards of 1e6" else 1e4 * BIG):
                (_, out), grads = edge(name)(x, y, mask)
                finite((out, grads), (of_mask, of_numbers))
                if of_mask == "empty" and name != "combine_gradients":
                    assert not any(np.any(leaf) for leaf in jax.tree.leaves((out, grads)))


RANKINGS = {
    "all tied": (np.full((2, 3), 4), np.ones((2, 3), bool)),
    "one response": (np.array([[1, 2, 3]] * 2), np.array([[True, False, False]] * 2)),
    "no response": (np.array([[1, 2, 3]] * 2), np.zeros((2, 3), bool)),
    "ordered": (np.array([[1, 2, 3], [3, 1, 1]]), np.ones((2, 3), bool)),
}


@pytest.mark.parametrize("loss", [pairwise_logistic_loss, best_of_k_loss])
def test_ranking_losses_are_finite_at_the_edges(loss):
    for name, (rank, valid) in RANKINGS.items():
        for score in NUMBERS.values():
            for sign in (1.0, -1.0):
                (value, metrics), grad = jax.value_and_grad(
                    lambda s, rank=rank, valid=valid: loss(s, rank, valid), has_aux=True
                )(jnp.asarray(np.float32(sign) * score))
                finite((value, metrics, grad), name)
                if name != "ordered":
                    assert value == 0 and not np.any(grad)
                    assert all(m == 0 for m in metrics.values())


@pytest.mark.parametrize("loss", [pairwise_logistic_loss, best_of_k_loss])
def test_no_nan_is_made_on_the_way_and_selected_away(loss):
    """Somebody who hunts a NaN with jax's checks must not be stopped here."""
    with jax.debug_nans(True):
        for rank, valid in RANKINGS.values():
            jax.grad(lambda s, r=rank, v=valid: loss(s, r, v)[0])(jnp.asarray(1e4 * BIG))


def test_a_row_of_no_tokens_at_all():
    none, mask = np.zeros((2, 0), np.float32), np.zeros((2, 0), bool)
    for name, function in EDGES.items():
        if name not in ("shaped_reward", "combine_gradients"):
            for leaf in jax.tree.leaves(function(none, none, mask)):
                assert leaf.shape in ((), (2, 0)) and not np.any(leaf)
    assert shaped_reward(F_B[:2], none, mask, 0.1).shape == (2, 0)


@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("chunk", [None, 1])
def test_chunked_logprobs_are_finite_for_logits_of_1e4(scale, chunk):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    table = (scale * rng.normal(size=(8, 4))).astype(np.float32)
    token = rng.integers(0, 6, (2, 3))

    def total(x, table):
        logp, entropy = logprobs.chunked_token_statistics(
            x, token, table, vocab_size=6, chunk=chunk
        )
        return logp.sum() + entropy.sum(), (logp, entropy)

    (_, (logp, entropy)), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(
        x, table
    )
    finite((logp, entropy, grads), scale)
    assert np.all(np.asarray(logp) <= 0) and np.all(np.asarray(entropy) >= -1e-6)
    if scale == 0.0:
        np.testing.assert_allclose(entropy, np.log(6), rtol=1e-6)
        np.testing.assert_allclose(logp, -np.log(6), rtol=1e-6)
    else:
        assert logp.min() < -1e3, "the extreme is reached"
        np.testing.assert_allclose(entropy, 0.0, atol=1e-3)
    assert not np.any(np.asarray(grads[1])[6:]), "padded vocabulary has no gradient"


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_sampling_is_finite_for_logits_of_1e4(options):
    logits = np.array([[1e4, -1e4, 0, 9e3], [-1e4] * 4, [1e4] * 4], np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    token, logp = sample_tokens(keys, logits, **{"temperature": 1.0, **options})
    finite(logp, options)
    assert token[0] == 0 and logp[0] == 0
    assert np.all((np.asarray(token) >= 0) & (np.asarray(token) < 4))


@functools.cache
def of_model():
    def total(lm, scalar, layout):
        statistics = model.token_statistics(lm, tiny.MODEL, layout)
        logp = model.token_logprobs(lm, tiny.MODEL, layout)
        value = model.scalars(scalar, tiny.MODEL, layout)
        everything = (statistics, logp, value)
        return sum(x.sum() for x in jax.tree.leaves(everything)), everything

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_model_is_finite_on_empty_rows_single_tokens_and_logits_of_1e4(scale):
    lm, scalar = (
        params | {"final_norm": jax.tree.map(lambda x: scale * x, params["final_norm"])}
        for params in (tiny.params(), tiny.params(1, "scalar"))
    )
    mask = np.array([[False] * 5, [False, True, False, False, False], [True] * 5])
    layout = padded_layout(tiny.tokens(3, 5), mask)
    (_, (statistics, logp, value)), grads = of_model()(lm, scalar, layout)
    finite((statistics, logp, value, grads), scale)
    np.testing.assert_array_equal(np.asarray(statistics["logp"])[:2], 0.0)
    np.testing.assert_array_equal(logp, statistics["logp"])
    assert not np.any(np.asarray(value)[~mask])
    if scale > 1:
        assert logp.min() < -1e3 and np.abs(np.asarray(value)).max() > 1e3
