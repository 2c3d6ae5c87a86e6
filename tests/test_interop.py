"""Weights that nobody here made: published intermediates, sorting, greedy text; and our own export."""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from instructax.batches import PromptBatch, padded_layout
from instructax.config import MeshConfig, ModelConfig, UserError
from instructax.interop import llama2c, nano_gpt_json, safetensors_io
from instructax.models import functional as model
from instructax.models import transformer
from instructax.models.attention import attention, heads_first, visible
from instructax.models.layers import Block, activation
from instructax.models.presets import llama
from instructax.rl.generate import generate
from instructax.runtime.mesh import make_mesh
from instructax.stages.context import load_params

TOLERANCE = 1e-5


def greedy(params, config, token_BxP, mask_BxP, length, eos_id, temperature=0.0, key=0):
    copy = model.rollout_copy(params, config)
    slots = token_BxP.shape[1] + length
    prompts = PromptBatch(token_BxP, mask_BxP, jnp.arange(token_BxP.shape[0]))
    return generate(
        jax.random.key(key),
        prompts,
        lambda token, mask: model.prefill(copy, config, token, mask, slots),
        lambda token, cache: model.decode(copy, config, token, cache),
        response_length=length,
        temperature=temperature,
        eos_id=eos_id,
        pad_id=0,
        vocab_size=config.vocab_size,
    )


sampled = jax.jit(greedy, static_argnames=("config", "length", "eos_id", "temperature"))


@pytest.fixture(scope="module")
def nano(real_data):
    return nano_gpt_json.load(real_data / "gpt_nano_sort" / "gpt-nano-sort-model.json")


def nano_intermediates(params, config, token_BxL):
    """Our model taken apart, under the names of the published file."""
    layout = padded_layout(token_BxL, jnp.ones(token_BxL.shape, bool))
    mask = visible(layout)
    found = {
        "tok_emb": params["embed"]["token"][token_BxL],
        "pos_emb": params["embed"]["position"][layout.position_BxL][:1],
    }
    x = found["x"] = transformer.embed(params, config, token_BxL, layout.position_BxL)
    length = token_BxL.shape[1]

    def attend(q, k, v):
        # One-hot values of key i make the output the weights themselves.
        one_hot = jnp.broadcast_to(jnp.eye(length, q.shape[3])[None, :, None, :], q.shape)
        k, v, one_hot = heads_first(k), heads_first(v), heads_first(one_hot)
        weights_BxLxHxS = attention(q, k, one_hot, mask)[..., :length]
        return attention(q, k, v, mask), weights_BxLxHxS

    for i in range(config.num_layers):
        of_layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        before = x
        (x, weights), captured = Block(config).apply(
            {"params": of_layer},
            x,
            layout.position_BxL,
            attend,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        found[f"block{i}"] = x
        if i > 0:
            continue
        seen = captured["intermediates"]
        out = {n: seen["attn"][n]["__call__"][0] for n in ("q", "k", "v", "out")}
        q, k, v = (out[n].transpose(0, 2, 1, 3) for n in "qkv")
        flat = [out[n].reshape(*token_BxL.shape, -1) for n in "qkv"]
        y = attention(out["q"], heads_first(out["k"]), heads_first(out["v"]), mask)
        up = seen["mlp"]["up"]["__call__"][0]
        found |= {
            "ln1": seen["attn_norm"]["__call__"][0],
            "q": q,
            "k": k,
            "v": v,
            "qkv": jnp.concatenate(flat, axis=-1),
            "att": jnp.where(
                mask[:, None], q @ k.swapaxes(2, 3) / config.head_width**0.5, -jnp.inf
            ),
            "attSm": weights.transpose(0, 2, 1, 3),
            "y": y.reshape(before.shape),
            "yProj": out["out"],
            "attnResid": before + out["out"],
            "ln2": seen["mlp_norm"]["__call__"][0],
            "fc": up,
            "gelu": activation(config.activation, up),
            "mlp": seen["mlp"]["down"]["__call__"][0],
            "mlpResid": x,
        }
    found["ln_f"] = transformer.finish(params, config, x)
    logits = found["ln_f"] @ params["head"]["kernel"][: config.vocab_size].T
    return found | {"lm_head": logits, "probs": jax.nn.softmax(logits)}


def test_nano_gpt_reproduces_every_published_intermediate(nano, real_data):
    params, config = nano
    partials, _ = nano_gpt_json.read(real_data / "gpt_nano_sort" / "gpt-nano-sort-t0-partials.json")
    token_BxL = jnp.asarray(partials.pop("idx"), jnp.int32)
    found = jax.jit(nano_intermediates, static_argnums=1)(params, config, token_BxL)
    assert set(found) == set(partials) and len(partials) == 24
    worst = 0.0
    for name, published in partials.items():
        ours = np.asarray(found[name])
        assert ours.shape == published.shape, name
        finite = np.isfinite(published)
        worst = max(worst, float(np.abs(ours[finite] - published[finite]).max()))
        np.testing.assert_allclose(ours, published, rtol=0, atol=TOLERANCE, err_msg=name)
    print(f"largest difference {worst:.2e}")
    # The seam itself: the logits after the last token, and log p of every token that has one before it.
    mask = jnp.ones(token_BxL.shape, bool)
    last, _ = model.prefill(model.rollout_copy(params, config), config, token_BxL, mask, 11)
    last = np.asarray(last)[:, : config.vocab_size]
    np.testing.assert_allclose(last, partials["lm_head"][:, -1], rtol=0, atol=TOLERANCE)
    logp = model.token_logprobs(params, config, padded_layout(token_BxL, mask))[:, 1:]
    before = np.log(partials["probs"])[:, :-1]
    expected = np.take_along_axis(before, np.asarray(token_BxL)[:, 1:, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(logp, expected, rtol=1e-5, atol=TOLERANCE)


def test_nano_gpt_sorts_by_greedy_cached_decoding(nano):
    params, config = nano
    token_BxP = np.random.default_rng(0).integers(0, 3, (300, 6)).astype(np.int32)
    ones = np.ones_like(token_BxP, bool)
    found = sampled(params, config, token_BxP, ones, length=6, eos_id=-1)
    right = (np.asarray(found.token_BxT) == np.sort(token_BxP, axis=1)).all(axis=1)
    assert right.sum() == 300


@pytest.fixture(scope="module")
def dreams(real_data):
    return llama2c.load(real_data / "aidreams260K" / "aidreams260K.bin")


@functools.partial(jax.jit, static_argnums=1)
def next_token(params, config, token_BxL, length):
    """The likeliest token behind the first ``length`` ones, by the training path and no cache."""
    mask = jnp.arange(token_BxL.shape[1])[None, :] < length
    layout = padded_layout(token_BxL, jnp.broadcast_to(mask, token_BxL.shape))
    x = transformer.hidden(params, config, layout)[:, length - 1]
    return jnp.argmax(x @ params["embed"]["token"][: config.vocab_size].T, axis=-1)


def test_dreams_give_the_same_greedy_text_cached_uncached_and_padded(dreams, real_data):
    params, config = dreams
    steps, pad = 100, 20
    found = sampled(
        params, config, np.full((1, 1), llama2c.BOS), np.ones((1, 1), bool), length=steps, eos_id=-1
    )
    cached = np.asarray(found.token_BxT)[0]

    left = np.concatenate([np.full((1, pad), 7), np.full((1, 1), llama2c.BOS)], axis=1)
    mask = np.arange(pad + 1)[None] == pad
    padded = sampled(params, config, left, mask, length=steps, eos_id=-1)
    np.testing.assert_array_equal(np.asarray(padded.token_BxT)[0], cached)

    uncached = np.zeros((1, steps + 1), np.int32)
    uncached[0, 0] = llama2c.BOS
    for t in range(1, steps + 1):
        uncached[0, t] = int(next_token(params, config, uncached, t)[0])
    np.testing.assert_array_equal(uncached[0, 1:], cached)

    pieces = llama2c.load_pieces(real_data / "aidreams260K" / "tok512.bin", config.vocab_size)
    text = llama2c.decode(pieces, [llama2c.BOS, *cached.tolist()])
    print(repr(text))
    assert text.isascii() and len(text.split()) > 25
    assert len(set(text.split())) > 10


def test_dreams_find_their_own_samples_likely_and_shuffled_ones_not(dreams):
    params, config = dreams
    rows, length = 16, 100
    bos = np.full((rows, 1), llama2c.BOS, np.int32)
    found = sampled(
        params, config, bos, np.ones_like(bos, bool), length=length, eos_id=-1, temperature=1.0
    )
    own = np.asarray(found.token_BxT)
    rng = np.random.default_rng(0)
    logprobs = jax.jit(model.token_logprobs, static_argnums=1)

    def perplexity(token_BxT):
        token = jnp.concatenate([bos, token_BxT], axis=1)
        logp = logprobs(params, config, padded_layout(token, jnp.ones(token.shape, bool)))
        return float(np.exp(-np.asarray(logp)[:, 1:].mean()))

    of_own, of_shuffled = perplexity(own), perplexity(rng.permuted(own, axis=1))
    print(f"perplexity {of_own:.2f}, shuffled {of_shuffled:.2f}")
    assert of_own < of_shuffled / 5
    # The sampler's log-probabilities are those of the training path.
    assert np.exp(-np.asarray(found.logp_BxT).mean()) == pytest.approx(of_own, rel=1e-4)


def tiny_llama_file(tied=True, groups=1):
    """Bytes of a small llama2.c model, each number its own, and what they mean."""
    layers, width, hidden, heads, vocab, context = 2, 8, 12, 2, 5, 6
    header = struct.pack(
        "<7i", width, hidden, layers, heads, groups, vocab if tied else -vocab, context
    )
    kv, half = groups * 4, 2
    counts = [vocab * width, layers * width, layers * width * width, *2 * [layers * kv * width]]
    counts += [layers * width * width, layers * width, *3 * [layers * hidden * width], width]
    counts += [*2 * [context * half]] + ([] if tied else [vocab * width])
    numbers = np.arange(sum(counts), dtype="<f4") / 1000
    return header + numbers.tobytes(), np.split(numbers, np.cumsum(counts)[:-1])


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_layout(tied, tmp_path):
    content, parts = tiny_llama_file(tied)
    (tmp_path / "m.bin").write_bytes(content)
    params, config = llama2c.load(tmp_path / "m.bin")
    assert config == llama(
        2, 8, 2, 12, 5, 6, num_kv_heads=1, tie_embeddings=tied, rope_pairing="interleaved"
    )
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), config, "lm"))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, expected)
    attn, mlp = params["blocks"]["attn"], params["blocks"]["mlp"]
    q, k, up = parts[2].reshape(2, 8, 8), parts[3].reshape(2, 4, 8), parts[9].reshape(2, 12, 8)
    assert attn["q"]["kernel"][1, 3, 1, 2] == q[1, 4 + 2, 3]
    assert attn["k"]["kernel"][1, 3, 0, 2] == k[1, 2, 3]
    assert mlp["up"]["kernel"][1, 3, 10] == up[1, 10, 3]
    assert not params["embed"]["token"][5:].any()
    if not tied:
        np.testing.assert_array_equal(params["head"]["kernel"][:5], parts[-1].reshape(5, 8))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b"\0" * 28 + b, lambda b: b + b"1"]
)
def test_llama2c_refuses_what_its_header_does_not_describe(damage, tmp_path):
    (tmp_path / "m.bin").write_bytes(damage(tiny_llama_file()[0]))
    with pytest.raises(UserError, match="m.bin: "):
        llama2c.load(tmp_path / "m.bin")
    with pytest.raises(UserError, match=r"none.bin: cannot read"):
        llama2c.load(tmp_path / "none.bin")


def test_llama2c_pieces_decode(tmp_path):
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0xC3>", b"<0xA9>", b" caf", b" a"]
    content = struct.pack("<i", 6) + b"".join(struct.pack("<fi", 0, len(p)) + p for p in pieces)
    (tmp_path / "t.bin").write_bytes(content)
    assert llama2c.load_pieces(tmp_path / "t.bin", 7) == pieces
    assert llama2c.decode(pieces, [1, 5, 3, 4, 6, 2]) == "caf\u00e9 a"
    with pytest.raises(UserError, match="does not hold 8 pieces"):
        llama2c.load_pieces(tmp_path / "t.bin", 8)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"config": {"n_layer": 1}}', '{"config": {}, "a": {"data": "%"}}']
)
def test_nano_json_refuses_what_it_cannot_read(content, tmp_path):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(UserError, match=r"m.json: "):
        nano_gpt_json.load(tmp_path / "m.json")


SMALL = ModelConfig(
    num_layers=2, d_model=8, num_heads=2, vocab_size=11, vocab_multiple=8, context_length=6
)


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({}, "lm"),
        ({}, "scalar"),
        ({"tie_embeddings": False, "positions": "rope", "activation": "swiglu"}, "lm"),
    ],
)
def test_safetensors_round_trip(changes, head, tmp_path):
    config = dataclasses.replace(SMALL, **changes)
    params = model.init(jax.random.key(0), config, head)
    path = tmp_path / "w" / "m.safetensors"
    safetensors_io.export_params(path, params, config, head=head, tokenizer="abc")
    back = safetensors_io.import_params(path)
    assert (back.model, back.head, back.tokenizer) == (config, head, "abc")
    wider = safetensors_io.import_params(path, vocab_multiple=64)
    assert wider.model.padded_vocab_size == 64

    def without_padding(tree):
        flat = safetensors_io._flatten(tree)
        return {n: v[:11] if n in ("embed.token", "head.kernel") else v for n, v in flat.items()}

    expected = without_padding(params)
    for tree, rows in ((back.params, 16), (wider.params, 64)):
        assert tree["embed"]["token"].shape == (rows, 8) and not tree["embed"]["token"][11:].any()
        found = without_padding(tree)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
    header = path.read_bytes()
    listed = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
    assert listed["embed.token"]["shape"] == [11, 8]
    assert listed["blocks.attn.q.kernel"]["shape"] == [2, 8, 2, 4]
    assert not list(path.parent.glob("*.partial"))


def test_safetensors_refusals(tmp_path):
    params = model.init(jax.random.key(0), SMALL, "lm")
    with pytest.raises(ValueError, match="value_head"):
        safetensors_io.export_params(tmp_path / "m.safetensors", params, SMALL, head="scalar")
    assert not list(tmp_path.iterdir())
    good = {
        "format": safetensors_io.FORMAT,
        "model": json.dumps(dataclasses.asdict(SMALL)),
        "head": "lm",
    }
    for metadata, says in (
        ({}, "was not exported from here"),
        (good | {"model": "{}x"}, "metadata are broken"),
        (good | {"model": '{"layers": 1}'}, "metadata are broken"),
        (good | {"head": "tail"}, "metadata are broken"),
        (good, "has shape"),
    ):
        save_file(
            {"embed.token": np.zeros((11, 7), np.float32)}, tmp_path / "m.safetensors", metadata
        )
        with pytest.raises(UserError, match=says):
            safetensors_io.import_params(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes(b"xxxx")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        safetensors_io.import_params(tmp_path / "m.safetensors")


def test_a_stage_starts_from_a_safetensors_file_of_its_own_kind(tmp_path):
    tokenizer = types.SimpleNamespace(hash="abc")
    run: Any = types.SimpleNamespace(
        folder=tmp_path, mesh=make_mesh(MeshConfig()), tokenizer=tokenizer
    )
    params = model.init(jax.random.key(0), SMALL, "lm")
    path = str(tmp_path / "m.safetensors")
    safetensors_io.export_params(path, params, SMALL, head="lm", tokenizer="abc")
    # Rows of padding, dropout and how it is computed are the run's own business.
    ours = dataclasses.replace(
        SMALL, vocab_multiple=32, dropout=0.1, scan_unroll=2, shard_over="data+fsdp"
    )
    found = load_params(run, path, ours, "lm")
    assert found["embed"]["token"].shape == (32, 8)
    np.testing.assert_array_equal(found["embed"]["token"][:11], params["embed"]["token"][:11])
    for config, head, hashed, says in (
        (dataclasses.replace(SMALL, num_heads=4), "lm", "abc", "num_heads = 2, this run's model 4"),
        (SMALL, "scalar", "abc", "holds a lm head"),
        (SMALL, "lm", "def", "another tokenizer"),
    ):
        tokenizer.hash = hashed
        with pytest.raises(UserError, match=says):
            load_params(run, path, config, head)
