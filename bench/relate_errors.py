"""How often `graft relate` errs: many small families, every kind of pair, a row of the table in docs/relate.md each.

    OMP_NUM_THREADS=1 python bench/relate_errors.py --families 100

Each family grows from an initialisation of its own, on the same text as the others; unrelated pairs are those of two
families, all of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from scipy.stats import beta

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "relate"))

import relatives  # noqa: E402

import graft  # noqa: E402
from graft.models import save  # noqa: E402

RIGHT = {"permuted channels": "permuted", "permuted everything": "permuted", "unrelated": "other initialisation"}


def relatives_of(base: Any, seed: int, steps: int) -> dict[str, Any]:
    """A model of each kind of kin of `base`."""
    one, two = (relatives.trained(base, 10 * seed + i, steps) for i in (1, 2))
    return {
        "tuned": one,
        "tuned, merged": relatives.merged(one, two),
        "tuned, 70 % pruned": relatives.pruned(one, 0.7),
        "tuned, 90 % pruned": relatives.pruned(one, 0.9),
        "tuned, 8 bits": relatives.quantised(one),
        "tuned, 4 bits": relatives.quantised(one, levels=7),
        "permuted channels": relatives.permuted(one, seed, residual=False),
        "permuted everything": relatives.permuted(one, seed),
        "same seed, other text": relatives.trained(relatives.fresh(seed), 10 * seed + 3, 2 * steps),
    }


def grow(root: Path, seeds: range, steps: int) -> Iterator[tuple[str, Path, Path]]:
    """(kind of pair, one folder, the other)."""
    bases = []
    for seed in seeds:
        base = relatives.trained(relatives.fresh(seed), 0, 2 * steps)
        bases.append(kept(base, root / str(seed) / "base"))
        for kind, made in relatives_of(base, seed, steps).items():
            yield kind, bases[-1], kept(made, root / str(seed) / kind)
    for one, other in combinations(bases, 2):
        yield "unrelated", one, other


def kept(model: Any, folder: Path) -> Path:
    save(model, None, folder)
    return folder


def interval(wrong: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, by Clopper and Pearson."""
    low = beta.ppf(0.025, wrong, n - wrong + 1) if wrong else 0.0
    high = beta.ppf(0.975, wrong + 1, n - wrong) if wrong < n else 1.0
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="Seed of the first family.")
    parser.add_argument("--steps", type=int, default=20, help="Steps of Adam from the base; twice as many to the base.")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    said: dict[str, Counter[str]] = {}
    values: dict[str, list[float]] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        for kind, one, other in grow(Path(root), range(asked.first, asked.first + asked.families), asked.steps):
            found = graft.relate(one, other)
            said.setdefault(kind, Counter())[found.kind] += 1
            values.setdefault(kind, []).append(found.correlation or 0.0)
    print("| pair | trials | correlation, least to most | wrong | 95 % interval | said instead |")
    print("|---|---|---|---|---|---|")
    for kind, counts in said.items():
        right = RIGHT.get(kind, "same initialisation")
        n, wrong = counts.total(), counts.total() - counts[right]
        low, high = interval(wrong, n)
        instead = ", ".join(f"{name} {count}" for name, count in counts.items() if name != right) or "–"
        reach = f"{min(values[kind]):.2f} to {max(values[kind]):.2f}"
        print(f"| {kind} | {n} | {reach} | {wrong} | {low:.2%} to {high:.2%} | {instead} |")
    print(f"\n{asked.families} families, {asked.steps} steps, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
