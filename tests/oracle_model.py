"""A GPT-2 transformer, one PPO-ptx update on it, and nothing of the package: float64, slot by slot.

Written from the papers: pre-norm blocks, learned positions, tanh-GELU, tied unembedding
(Radford et al. 2019), rewards and objective of Ouyang et al. 2022, eq. 2. Gradients are finite
differences. Parameters are nested dicts of NumPy arrays, blocks stacked on a leading axis.
"""

from __future__ import annotations

import math

import numpy as np
import oracles


def layer_norm(x, scale, bias, eps):
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / len(x)
    return np.array(
        [(v - mean) / math.sqrt(var + eps) * s + b for v, s, b in zip(x, scale, bias, strict=True)]
    )


def gelu(x):
    return np.array(
        [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    )


def sees(segment, prefix, i, j):
    return j <= i and segment[j] != 0 and segment[j] in (segment[i], prefix[i])


def hidden(params, token, position, segment, prefix, eps=1e-5):
    """Final hidden state of every slot of one row; None at padding."""
    real = [i for i in range(len(token)) if segment[i] != 0]
    x = {i: params["embed"]["token"][token[i]] + params["embed"]["position"][position[i]]
         for i in real}  # fmt: skip
    blocks = params["blocks"]
    layers, heads = blocks["attn"]["q"]["kernel"].shape[0], blocks["attn"]["q"]["kernel"].shape[2]
    for n in range(layers):
        attn, mlp = blocks["attn"], blocks["mlp"]
        q, k, v = {}, {}, {}
        for i in real:
            h = layer_norm(
                x[i], blocks["attn_norm"]["scale"][n], blocks["attn_norm"]["bias"][n], eps
            )
            for name, into in (("q", q), ("k", k), ("v", v)):
                into[i] = np.einsum("d,dhc->hc", h, attn[name]["kernel"][n]) + attn[name]["bias"][n]
        for i in real:
            seen = [j for j in real if sees(segment, prefix, i, j)]
            out = np.array(attn["out"]["bias"][n], np.float64)
            for head in range(heads):
                score = [q[i][head] @ k[j][head] / math.sqrt(len(q[i][head])) for j in seen]
                weight = [math.exp(s - max(score)) for s in score]
                mixed = sum(w * v[j][head] for w, j in zip(weight, seen, strict=True)) / sum(weight)
                out = out + mixed @ attn["out"]["kernel"][n][head]
            x[i] = x[i] + out
        for i in real:
            h = layer_norm(x[i], blocks["mlp_norm"]["scale"][n], blocks["mlp_norm"]["bias"][n], eps)
            h = gelu(h @ mlp["up"]["kernel"][n] + mlp["up"]["bias"][n])
            x[i] = x[i] + h @ mlp["down"]["kernel"][n] + mlp["down"]["bias"][n]
    final = params["final_norm"]
    return [layer_norm(x[i], final["scale"], final["bias"], eps) if i in x else None
            for i in range(len(token))]  # fmt: skip


def before(segment, prefix, i):
    """The slot whose state predicts slot i's token, or None."""
    own = [j for j in range(i) if segment[j] == segment[i]]
    prompt = [j for j in range(i) if prefix[i] != 0 and segment[j] == prefix[i]]
    return own[-1] if own else prompt[-1] if prompt else None


def token_statistics(params, layout, vocab_size, temperature=1.0):
    """(logp_BxL, entropy_BxL); 0 where nothing precedes."""
    logp, entropy = np.zeros(np.shape(layout[0])), np.zeros(np.shape(layout[0]))
    for b, (token, position, segment, prefix) in enumerate(zip(*layout, strict=True)):
        state = hidden(params, token, position, segment, prefix)
        for i in range(len(token)):
            j = before(segment, prefix, i) if segment[i] != 0 else None
            if j is not None:
                logits = [state[j] @ params["embed"]["token"][v] for v in range(vocab_size)]
                p = oracles.next_token_distribution(logits, temperature)
                logp[b, i] = math.log(p[token[i]])
                entropy[b, i] = -sum(q * math.log(q) for q in p if q > 0)
    return logp, entropy


def scalars(params, layout):
    value = np.zeros(np.shape(layout[0]))
    head = params["value_head"]
    for b, row in enumerate(zip(*layout, strict=True)):
        for i, state in enumerate(hidden(params, *row)):
            if state is not None:
                value[b, i] = state @ head["kernel"][:, 0] + head["bias"][0]
    return value


def values_before(params, layout):
    after, out = scalars(params, layout), np.zeros(np.shape(layout[0]))
    for b, (_, _, segment, prefix) in enumerate(zip(*layout, strict=True)):
        for i in range(out.shape[1]):
            j = before(segment, prefix, i) if segment[i] != 0 else None
            out[b, i] = 0.0 if j is None else after[b, j]
    return out


def leaves(params):
    """The arrays of a nested dict, in one order."""
    if not isinstance(params, dict):
        return [params]
    return [leaf for name in sorted(params) for leaf in leaves(params[name])]


def like(params, new_leaves):
    """A nested dict of the same shape from an iterator of arrays."""
    if not isinstance(params, dict):
        return next(new_leaves)
    return {name: like(params[name], new_leaves) for name in sorted(params)}


def gradient(loss, params, step=1e-5):
    """Central differences, parameter by parameter."""
    arrays = [np.array(leaf, np.float64) for leaf in leaves(params)]
    out = [np.zeros(a.shape) for a in arrays]
    for array, into in zip(arrays, out, strict=True):
        for i in np.ndindex(*array.shape):
            kept = array[i]
            array[i] = kept + step
            up = loss(like(params, iter(arrays)))
            array[i] = kept - step
            down = loss(like(params, iter(arrays)))
            array[i] = kept
            into[i] = (up - down) / (2 * step)
    return like(params, iter(out))


def clip_by_global_norm(grads, limit):
    norm = math.sqrt(sum(float(g) ** 2 for leaf in leaves(grads) for g in leaf.ravel()))
    scale = 1.0 if norm < limit else limit / norm
    return like(grads, (leaf * scale for leaf in leaves(grads))), norm


def rollout(policy, reference, value, reward, layout, mask, last, finished, settings):
    """What an iteration freezes: (old_logp, old_value, advantage, returns, scores, kl a sequence)."""
    s = settings
    raw = scalars(reward, layout)
    score = [raw[b, t] if done else -1.0 for b, (t, done) in enumerate(zip(last, finished))]  # noqa: B905
    logp = token_statistics(policy, layout, s["vocab_size"], s["temperature"])[0]
    ref_logp = token_statistics(reference, layout, s["vocab_size"], s["temperature"])[0]
    kl = oracles.per_token_kl(logp, ref_logp, mask, "k1")
    paid = oracles.shaped_reward(score, kl, mask, s["kl_coef"])
    old_value = np.where(mask, values_before(value, layout), 0.0)
    advantage, returns = oracles.generalized_advantage(
        paid, old_value, mask, s["discount"], s["gae_lambda"]
    )
    advantage = oracles.whiten(advantage, mask, shift_mean=True)
    return np.where(mask, logp, 0.0), old_value, advantage, returns, score, kl.sum(axis=1)


def ppo_ptx_update(policy, value, frozen, layout, mask, text, text_mask, settings):
    """One update of both networks from a fresh optimizer: (policy, value, metrics)."""
    s = settings
    old_logp, old_value, advantage, returns = frozen[:4]

    def surrogate(params):
        logp = token_statistics(params, layout, s["vocab_size"], s["temperature"])[0]
        return oracles.clipped_policy_loss(logp, old_logp, advantage, mask, s["clip_range"])

    def nll(params):
        return oracles.masked_nll(token_statistics(params, text, s["vocab_size"])[0], text_mask)

    def value_error(params):
        return oracles.clipped_value_loss(
            values_before(params, layout), old_value, returns, mask, s["value_clip_range"]
        )

    policy_grads = gradient(lambda p: surrogate(p)["loss"] + s["ptx_coef"] * nll(p), policy)
    value_grads = gradient(lambda p: value_error(p)["loss"], value)
    policy_grads, norm = clip_by_global_norm(policy_grads, s["max_grad_norm"])
    value_grads, value_norm = clip_by_global_norm(value_grads, s["max_grad_norm"])

    def stepped(params, grads):
        pairs = zip(leaves(params), leaves(grads), strict=True)
        return like(
            params,
            iter([oracles.adam(x, [g], s["rate"], 0.9, 0.95, s["eps"]) for x, g in pairs]),
        )

    metrics = {
        "ppo/loss/policy": surrogate(policy)["loss"],
        "ppo/policy/clipfrac": surrogate(policy)["clipfrac"],
        "ppo/policy/approxkl": surrogate(policy)["approxkl"],
        "ppo/loss/value": value_error(value)["loss"],
        "ppo/val/clipfrac": value_error(value)["clipfrac"],
        "ppo/val/var_explained": value_error(value)["var_explained"],
        "ptx/nll": nll(policy),
        "grad_norm/policy": norm,
        "grad_norm/value": value_norm,
    }
    return stepped(policy, policy_grads), stepped(value, value_grads), metrics
