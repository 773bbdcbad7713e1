"""Methods on singular vectors once more, by the formulas of their papers: whole matrices, float64, loops."""

import numpy as np
import twins


def svd(matrix):
    return np.linalg.svd(matrix, full_matrices=False)


def polar(matrix):
    """X (XᵀX)^(-1/2) without a singular value decomposition of X."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    values, vectors = np.linalg.eigh(tall.T @ tall)
    made = tall @ (vectors / np.sqrt(values)) @ vectors.T
    return made if matrix.shape[0] >= matrix.shape[1] else made.T


def tsv(deltas):
    keep = min(deltas[0].shape) // len(deltas)
    left, middle, right = [], [], []
    for delta in deltas:
        u, s, v = svd(delta)
        left += [u[:, i] for i in range(keep)]
        middle += [s[i] for i in range(keep)]
        right += [v[i] for i in range(keep)]
    return polar(np.stack(left, axis=1)) @ np.diag(middle) @ polar(np.stack(right))


def iso_c(deltas):
    u, s, v = svd(sum(deltas))
    return sum(s.mean() * np.outer(u[:, i], v[i]) for i in range(len(s)))


def iso_cts(deltas, common):
    r, n = min(deltas[0].shape), len(deltas)
    each = round((r - int(r * common)) / n)
    shared = r - n * each
    u, s, v = svd(sum(deltas))
    basis = u[:, :shared]
    left, middle, right = [basis], [s[:shared]], [v[:shared]]
    for delta in deltas:
        own = svd(delta - basis @ basis.T @ delta)
        left.append(own[0][:, :each])
        middle.append(own[1][:each])
        right.append(own[2][:each])
    return np.concatenate(middle).mean() * polar(np.concatenate(left, axis=1)) @ polar(np.concatenate(right))


def disturbance(made, deltas):
    return sum(np.sum(((made - d) @ d.T) ** 2) / np.sum(d**2) for d in deltas)


def wudi(deltas, steps, rate):
    """Adam (Kingma and Ba 2015, algorithm 1), the gradient summed over the models."""
    made, m, v = sum(deltas), 0.0, 0.0
    for t in range(1, steps + 1):
        gradient = sum(2 * (made - d) @ d.T @ d / np.sum(d**2) for d in deltas)
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        made = made - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return made


def wudi_exact(deltas):
    """The minimum nearest to the sum, by a pseudo-inverse."""
    a = sum(d.T @ d / np.sum(d**2) for d in deltas)
    b = sum(d @ d.T @ d / np.sum(d**2) for d in deltas)
    start = sum(deltas)
    return start - (start @ a - b) @ np.linalg.pinv(a, rcond=1e-6)


def knots(deltas, merge, density, weights, normalise):
    u, s, v = svd(np.concatenate(deltas, axis=1))
    u, s, v = u[:, s > 1e-6], s[s > 1e-6], v[s > 1e-6]
    parts = np.split(np.diag(s) @ v, len(deltas), axis=1)
    if merge == "ties":
        return u @ twins.elect([twins.trim(part, density) for part in parts], weights, normalise)
    return u @ twins.add(parts, weights, normalise)
