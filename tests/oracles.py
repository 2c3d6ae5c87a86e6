"""The formulas of the papers as plain loops over Python floats: slow, naive, and independent.

Nothing here imports the package. Arrays are NumPy's; the arithmetic is float64.
"""

from __future__ import annotations

import math

import numpy as np


def _cells(mask):
    return [tuple(i) for i in np.argwhere(np.asarray(mask))]


def masked_mean(x, mask):
    values = [float(x[i]) for i in _cells(mask)]
    return sum(values) / len(values) if values else 0.0


def masked_var(x, mask):
    mean = masked_mean(x, mask)
    values = [(float(x[i]) - mean) ** 2 for i in _cells(mask)]
    return sum(values) / len(values) if values else 0.0


def whiten(x, mask, shift_mean):
    mean, var = masked_mean(x, mask), masked_var(x, mask)
    out = np.zeros(np.shape(x))
    for i in _cells(mask):
        out[i] = (float(x[i]) - mean) / math.sqrt(var + 1e-8) + (0.0 if shift_mean else mean)
    return out


def last_token_index(mask):
    return [max([t for t, real in enumerate(row) if real], default=0) for row in mask]


def masked_nll(logp, mask, weight=None):
    total = count = 0.0
    for i in _cells(mask):
        w = 1.0 if weight is None else float(weight[i])
        total, count = total - w * float(logp[i]), count + w
    return total / count if count else 0.0


def masked_nll_metrics(logp, mask, weight=None):
    return {
        "loss": masked_nll(logp, mask, weight),
        "nll": masked_nll(logp, mask),
        "tokens": float(np.sum(mask)),
    }


def preferred_pairs(rank, valid):
    """For each prompt the list of (winner, loser)."""
    prompts = []
    for ranks, valids in zip(rank, valid, strict=True):
        real = [k for k, v in enumerate(valids) if v]
        prompts.append([(w, l_) for w in real for l_ in real if int(ranks[w]) < int(ranks[l_])])
    return prompts


def pairwise_logistic_loss(score, rank, valid):
    losses = []
    for row, pairs in zip(score, preferred_pairs(rank, valid), strict=True):
        if pairs:
            terms = [math.log1p(math.exp(float(row[l_]) - float(row[w]))) for w, l_ in pairs]
            losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses) if losses else 0.0


def pairwise_accuracy(score, rank, valid):
    hits = []
    for row, pairs in zip(score, preferred_pairs(rank, valid), strict=True):
        for w, l_ in pairs:
            hits.append(1.0 if row[w] > row[l_] else 0.5 if row[w] == row[l_] else 0.0)
    return sum(hits) / len(hits) if hits else 0.0


def best_of_k_loss(score, rank, valid):
    losses = []
    for row, ranks, valids in zip(score, rank, valid, strict=True):
        real = [k for k, v in enumerate(valids) if v]
        if len({int(ranks[k]) for k in real}) < 2:
            continue
        lowest = min(int(ranks[k]) for k in real)
        best = [k for k in real if int(ranks[k]) == lowest]
        log_total = math.log(sum(math.exp(float(row[k])) for k in real))
        losses.append(sum(log_total - float(row[k]) for k in best) / len(best))
    return sum(losses) / len(losses) if losses else 0.0


def ranking_metrics(score, rank, valid):
    """Of the pairwise loss, and of the best-of-K loss."""
    prompts = preferred_pairs(rank, valid)
    margins = [
        float(row[w]) - float(row[l_])
        for row, pairs in zip(score, prompts, strict=True)
        for w, l_ in pairs
    ]
    hits = []
    for row, ranks, valids, pairs in zip(score, rank, valid, prompts, strict=True):
        if pairs:
            real = [k for k, v in enumerate(valids) if v]
            top = [k for k in real if row[k] == max(row[j] for j in real)]
            lowest = min(int(ranks[k]) for k in real)
            hits.append(sum(int(ranks[k]) == lowest for k in top) / len(top))
    pairwise = {
        "loss": pairwise_logistic_loss(score, rank, valid),
        "accuracy": pairwise_accuracy(score, rank, valid),
        "margin": sum(margins) / len(margins) if margins else 0.0,
        "pairs": float(len(margins)),
        "prompts": float(sum(map(bool, prompts))),
    }
    best_of_k = {
        "loss": best_of_k_loss(score, rank, valid),
        "accuracy": sum(hits) / len(hits) if hits else 0.0,
        "prompts": float(len(hits)),
    }
    return pairwise, best_of_k


def clipped_policy_loss(logp, old_logp, advantage, mask, clip_range):
    """Loss and metrics."""
    rows = []
    for i in _cells(mask):
        d, a = float(logp[i]) - float(old_logp[i]), float(advantage[i])
        rho = math.exp(max(-20.0, min(20.0, d)))
        clipped = max(1 - clip_range, min(1 + clip_range, rho))
        rows.append((max(-a * rho, -a * clipped), d, -a * clipped > -a * rho, rho, abs(d) > 20))
    n = len(rows) or 1
    ratio = sum(r[3] for r in rows) / n
    return {
        "loss": sum(r[0] for r in rows) / n,
        "approxkl": 0.5 * sum(r[1] ** 2 for r in rows) / n,
        "clipfrac": sum(r[2] for r in rows) / n,
        "ratio": ratio,
        "ratio_var": sum((r[3] - ratio) ** 2 for r in rows) / n,
        "ratio_max_deviation": max([abs(r[3] - 1) for r in rows], default=0.0),
        "logratio_clamped_fraction": sum(r[4] for r in rows) / n,
    }


def clipped_value_loss(value, old_value, returns, mask, clip_range):
    rows = []
    for i in _cells(mask):
        v, old, r = float(value[i]), float(old_value[i]), float(returns[i])
        near = v if clip_range is None else max(old - clip_range, min(old + clip_range, v))
        rows.append(((v - r) ** 2, (near - r) ** 2, v))
    n = len(rows) or 1
    error, var = sum(r[0] for r in rows) / n, masked_var(returns, mask)
    return {
        "loss": 0.5 * sum(max(r[0], r[1]) for r in rows) / n,
        "error": error,
        "clipfrac": sum(r[1] > r[0] for r in rows) / n,
        "vpred": sum(r[2] for r in rows) / n,
        "mean": masked_mean(old_value, mask),
        "var": masked_var(old_value, mask),
        "returns_mean": masked_mean(returns, mask),
        "returns_var": var,
        "var_explained": 1 - error / var if var else 0.0,
    }


def per_token_kl(logp, ref_logp, mask, estimator):
    out = np.zeros(np.shape(logp))
    for i in _cells(mask):
        d = float(logp[i]) - float(ref_logp[i])
        out[i] = {
            "k1": d,
            "k2": d * d / 2,
            "k3": math.exp(-d) - 1 + d,
            "abs": abs(d),
            "max0": max(d, 0.0),
        }[estimator]
    return out


def adaptive_kl_update(kl_coef, observed_kl, target, n_episodes, horizon):
    error = max(-0.2, min(0.2, observed_kl / target - 1))
    return kl_coef * (1 + error * n_episodes / horizon)


def shaped_reward(score, kl, mask, kl_coef):
    out = np.zeros(np.shape(kl))
    for b, row in enumerate(mask):
        real = [t for t, m in enumerate(row) if m]
        for t in real:
            out[b, t] = -kl_coef * float(kl[b, t])
        if real:
            out[b, real[-1]] += float(score[b])
    return out


def generalized_advantage(reward, value, mask, discount, gae_lambda):
    """By the definition as a sum, A_t = sum_l (discount lambda)^l delta_{t+l}: no recursion."""
    advantage, returns = np.zeros(np.shape(reward)), np.zeros(np.shape(reward))
    for b, row in enumerate(mask):
        real = [t for t, m in enumerate(row) if m]
        delta = []
        for j, t in enumerate(real):
            after = float(value[b, real[j + 1]]) if j + 1 < len(real) else 0.0
            delta.append(float(reward[b, t]) + discount * after - float(value[b, t]))
        for j, t in enumerate(real):
            advantage[b, t] = sum(
                (discount * gae_lambda) ** (m - j) * delta[m] for m in range(j, len(real))
            )
            returns[b, t] = advantage[b, t] + float(value[b, t])
    return advantage, returns


def next_token_distribution(logits, temperature, top_k=None, top_p=None, valid_vocab=None):
    """The renormalised distribution over all ids of one row."""
    ids = list(range(len(logits) if valid_vocab is None else valid_vocab))
    highest = max(float(logits[i]) for i in ids)
    mass = {i: math.exp((float(logits[i]) - highest) / temperature) for i in ids}
    order = sorted(ids, key=lambda i: -mass[i])[: top_k or len(ids)]
    total = sum(mass[i] for i in order)
    kept: list[int] = []
    before = 0.0
    for i in order:
        if top_p is None or before < top_p or not kept:
            kept.append(i)
        before += mass[i] / total
    total = sum(mass[i] for i in kept)
    out = np.zeros(len(logits))
    for i in kept:
        out[i] = mass[i] / total
    return out


def central_difference(function, x, step=1e-6):
    """Gradient of a scalar function of one float64 array, cell by cell."""
    gradient = np.zeros(np.shape(x))
    for i in np.ndindex(*np.shape(x)):
        up, down = np.array(x, np.float64), np.array(x, np.float64)
        up[i] += step
        down[i] -= step
        gradient[i] = (float(function(up)) - float(function(down))) / (2 * step)
    return gradient


def adam(start, gradients, learning_rate, b1, b2, eps, eps_inside_correction=False):
    """Parameters after one update a gradient; the rate is a number or a function of the step."""
    x = np.array(start, np.float64)
    for i in np.ndindex(*x.shape):
        m = v = 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = float(np.asarray(gradient)[i])
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            rate = learning_rate(t - 1) if callable(learning_rate) else learning_rate
            if eps_inside_correction:  # TensorFlow 1
                scale = math.sqrt(1 - b2**t) / (1 - b1**t)
                x[i] -= rate * scale * m / (math.sqrt(v) + eps)
            else:
                x[i] -= rate * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    return x


def ema(start, values, decay):
    average = float(start)
    for value in values:
        average = decay * average + (1 - decay) * float(value)
    return average


def learning_rate(step, peak, schedule, final, warmup_steps, warmup_from, total_steps):
    if step < warmup_steps:
        return peak * (warmup_from + (1 - warmup_from) * step / warmup_steps)
    done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    if schedule == "cosine":
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)
    if schedule == "linear":
        return peak * (1 - (1 - final) * done)
    return peak


def apply_missing_eos(score, finished, rule, value):
    out = []
    for s, done in zip(score, finished, strict=True):
        if done or rule == "none":
            out.append(float(s))
        else:
            out.append(value if rule == "replace" else float(s) - value)
    return out


def ranked_pairs(score, rank, valid):
    shape = np.shape(score) + np.shape(score)[1:]
    p, preferred = np.zeros(shape), np.zeros(shape, bool)
    for b, pairs in enumerate(preferred_pairs(rank, valid)):
        for w, l_ in pairs:
            p[b, w, l_] = 1 / (1 + math.exp(float(score[b][l_]) - float(score[b][w])))
            preferred[b, w, l_] = True
    return p, preferred


def combine_gradients(ppo, ptx, gamma):
    """The sum of two flat arrays, and the metrics."""
    total = np.array([float(a) + gamma * float(b) for a, b in zip(ppo, ptx, strict=True)])

    def norm(x):
        return math.sqrt(sum(float(v) ** 2 for v in x))

    dot = sum(float(a) * float(b) for a, b in zip(ppo, ptx, strict=True))
    size = norm(ppo) * norm(ptx)
    return total, {
        "ppo_grad_norm": norm(ppo),
        "ptx_grad_norm": norm(ptx),
        "grad_norm": norm(total),
        "grad_cosine": dot / size if size else 0.0,
    }


def padded_layout(token, mask):
    """(token, position, segment, prefix) by walking each row."""
    out = np.zeros((4, *np.shape(token)), np.int64)
    for b, row in enumerate(mask):
        seen = 0
        for i, real in enumerate(row):
            if real:
                out[:3, b, i] = token[b][i], seen, 1
                seen += 1
    return tuple(out)


def chunked_token_statistics(x, token, unembedding, vocab_size, temperature):
    """(logp, entropy) by the definition; chunks make no difference."""
    logp, entropy = np.zeros(np.shape(token)), np.zeros(np.shape(token))
    for b, i in np.ndindex(*np.shape(token)):
        logits = [
            sum(float(u) * float(v) for u, v in zip(x[b][i], unembedding[k], strict=True))
            for k in range(vocab_size)
        ]
        p = next_token_distribution(logits, temperature)
        logp[b, i] = math.log(p[token[b][i]])
        entropy[b, i] = -sum(q * math.log(q) for q in p if q > 0)
    return logp, entropy
