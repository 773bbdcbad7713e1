"""Every method once more, the slow and plain way: whole tensors, float64, sorts and loops."""

import itertools
import math

import numpy as np


def linear(models, weights):
    return sum(w * m for w, m in zip(weights, models, strict=True)) / sum(weights)


def deltas(base, models):
    return [m - base for m in models]


def keep_largest(delta, count):
    """Zero all but the `count` largest magnitudes; equal ones by place."""
    flat = delta.ravel()
    order = sorted(range(flat.size), key=lambda i: (-abs(np.float32(flat[i])), i))
    made = np.zeros_like(flat)
    made[order[:count]] = flat[order[:count]]
    return made.reshape(delta.shape)


def trim(delta, density):
    return delta if density >= 1 else keep_largest(delta, max(1, int(density * delta.size)))


def dare(delta, draws, density, rescale):
    """`draws`: a number from 0 to 2³² − 1 for each element; those below the share are kept."""
    thin = np.zeros_like(delta)
    for place in np.ndindex(delta.shape):
        if draws[place] < round(density * 2**32):
            thin[place] = delta[place] / (density if rescale == "probability" else 1)
    return thin * (np.abs(delta).sum() / np.abs(thin).sum() if rescale == "l1" else 1)


def della(delta, draws, density, epsilon, rescale):
    """A share that grows along each row with the rank of the magnitude, smallest first; draws belong to the ranks."""
    rows, drawn = np.atleast_2d(delta), draws.reshape(np.atleast_2d(delta).shape)
    thin = np.zeros_like(rows)
    columns = rows.shape[1]
    for i, row in enumerate(rows):
        for rank, j in enumerate(sorted(range(columns), key=lambda j: (abs(np.float32(row[j])), j))):
            share = density - epsilon + 2 * epsilon * rank / (columns - 1)
            if drawn[i, rank] < round(share * 2**32):
                thin[i, j] = row[j] / (share if rescale == "probability" else 1)
    thin = thin * (np.abs(delta).sum() / np.abs(thin).sum() if rescale == "l1" else 1)
    return thin.reshape(delta.shape)


def crumbs(delta, density, gamma):
    if density >= 1:
        return delta
    kept = int(density * delta.size)
    top = min(int(gamma * delta.size), delta.size - kept)
    return keep_largest(delta, top + kept) - keep_largest(delta, top)


def elect(sparse, weights, normalise):
    made = np.zeros_like(sparse[0])
    for place in np.ndindex(made.shape):
        values = [w * d[place] for w, d in zip(weights, sparse, strict=True)]
        sign = 1 if sum(values) >= 0 else -1
        agree = [(v, w) for v, w in zip(values, weights, strict=True) if v * sign > 0]
        divisor = sum(w for _, w in agree) if normalise else 1
        made[place] = sum(v for v, _ in agree) / (divisor or 1) if agree else 0
    return made


def add(sparse, weights, normalise):
    return sum(w * d for w, d in zip(weights, sparse, strict=True)) / (sum(weights) if normalise else 1)


def angle(a, b):
    return math.acos(np.clip((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))


def slerp(a, b, t):
    theta = angle(a, b)
    if abs(math.cos(theta)) > 0.9995:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def karcher(models, weights, steps=200):
    """Gradient descent on the sum of squared angles, in the space itself."""
    alphas = np.array(weights) / sum(weights)
    units = [m / np.linalg.norm(m) for m in models]
    mean = sum(a * u for a, u in zip(alphas, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        tangent = np.zeros_like(mean)
        for a, u in zip(alphas, units, strict=True):
            theta = angle(mean, u)
            away = u - (u * mean).sum() * mean
            tangent += a * theta * away / max(np.linalg.norm(away), 1e-300)
        mean = mean + 0.5 * tangent
        mean = mean / np.linalg.norm(mean)
    return mean * sum(a * np.linalg.norm(m) for a, m in zip(alphas, models, strict=True))


def multislerp(vectors, weights):
    w = np.array(weights) / sum(weights)
    units = [v / np.linalg.norm(v) for v in vectors]
    mean = sum(a * u for a, u in zip(w, units, strict=True))
    mean /= np.linalg.norm(mean)
    step = sum(a * (u - (u * mean).sum() * mean) for a, u in zip(w, units, strict=True))
    size = np.linalg.norm(step)
    turned = mean * math.cos(size) + (step * math.sin(size) / size if size else 0)
    return turned * sum(a * np.linalg.norm(v) for a, v in zip(w, vectors, strict=True))


def model_stock(base, models):
    found = deltas(base, models)
    cosine = np.mean([math.cos(angle(a, b)) for a, b in itertools.combinations(found, 2)])
    count = len(models)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * sum(models) / count + (1 - t) * base


def nearswap(base, other, t):
    distance = np.abs(other - base)
    share = np.minimum(t / np.maximum(distance, 1e-300), 1)
    return share * other + (1 - share) * base


def arcee_fusion(base, other):
    a, b = np.atleast_2d(base), np.atleast_2d(other)
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) + 1e-8 for x in (b, a))
    score = np.abs(b - a) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    ordered = np.sort(score.ravel())
    low, median, high = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(score >= median + 1.5 * (high - low), b, a).reshape(base.shape)


def sce(base, models, select):
    found = deltas(base, models)
    if select < 1:
        variance = np.var(np.stack(found).astype(np.float32), axis=0)
        mask = keep_largest(variance, int(np.count_nonzero(variance) * select)) > 0
        found = [d * mask for d in found]
    squares = np.array([np.mean(d**2) for d in found])
    weights = squares / squares.sum()
    made = np.zeros_like(base)
    for place in np.ndindex(base.shape):
        values = [d[place] for d in found]
        sign = 1 if sum(values) >= 0 else -1
        agree = [(v, w) for v, w in zip(values, weights, strict=True) if v * sign > 0]
        made[place] = sum(v * w for v, w in agree) / sum(w for _, w in agree) if agree else 0
    return base + made


def ram(base, models, epsilon, r=0.0, alpha=0.0):
    found = deltas(base, models)
    changed = [np.abs(d.astype(np.float32)) > np.float32(epsilon) for d in found]
    count = sum(c.astype(int) for c in changed)
    made = np.zeros_like(base)
    for d, c in zip(found, changed, strict=True):
        own, shared = (c & (count == 1)).sum(), (c & (count > 1)).sum()
        ratio = min(shared / own, alpha) if own else (alpha if shared else 0)
        made += np.where(c, d / np.maximum(count, 1), 0) * np.where(count == 1, 1 + r * ratio, 1)
    return base + made
