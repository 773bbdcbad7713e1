"""Experts and anti-experts (DExperts): toxicity of what an ensemble writes against its perplexity on clean text.

    OMP_NUM_THREADS=4 python bench/negation.py
    OMP_NUM_THREADS=1 python bench/detoxification.py

The models are those of bench/negation.py: a base that has read toxic text among other text, an expert of clean and one
of toxic text, and a judge. `experts_α` is base · (clean / toxic)^α, `anti_α` base^(1+α) / toxic^α without an expert.
Figures are means over texts; no text is shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import graft
import negation
from _help import source_line
from graft import models
from graft.evaluate.scorer import Scorer
from graft.report.read import Run, read_run

HERE = Path(__file__).resolve().parent
OUT = HERE / "work" / "detoxification"
STRENGTHS = (0.5, 1.0, 2.0, 3.0)


def recipe(finished: Path, limit: int) -> dict[str, Any]:
    """Ensembles over the finished models of the negation family."""
    family = yaml.safe_load((HERE / "negation.yaml").read_text())
    for source in family["data"].values():
        source.update({key: str((HERE / source[key]).resolve()) for key in ("path", "test") if key in source})
    singles = ["base", "clean_expert", "toxic_expert"]
    found: dict[str, Any] = {name: {"load": str(finished / name)} for name in singles}
    for alpha in STRENGTHS:
        name = f"{100 * alpha:03.0f}"
        found[f"experts_{name}"] = {"ensemble": {"combine": {"experts": {"alpha": alpha}}, "members": singles}}
        anti = {"members": {"base": 1 + alpha, "toxic_expert": -alpha}}
        found[f"anti_{name}"] = {"ensemble": {"combine": "log_linear", **anti}}
    evaluate = [{"measure": "perplexity", "on": ["clean.test", "general.test"], "limit": limit}]
    return {"family": "detoxification", "seed": 0, "data": family["data"], "models": found, "evaluate": evaluate}


def table(run: Run, found: Mapping[str, np.ndarray]) -> list[str]:
    """Markdown lines: by model the mean toxicity, also less the base's, how often it is above one half, perplexity."""
    sets = {"clean": "clean.test", "general": "general.test"}
    heads = ["model", "toxicity", "less the base's", "above ½", *(f"perplexity, {name}" for name in sets)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, scores in found.items():
        (low, high), (below, above) = negation.drawn([scores, scores - found["base"]])
        gap = f"{(scores - found['base']).mean():+.3f} ({below:+.3f} to {above:+.3f})" if name != "base" else ""
        cells = [name, f"{scores.mean():.3f} ({low:.3f} to {high:.3f})", gap.replace("-", "−")]
        cells += [f"{(scores > 0.5).mean():.2f}", *(negation.perplexity(run, name, on) for on in sets.values())]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=Path, default=negation.OUT / "run", help="run of bench/negation.py")
    parser.add_argument("--texts", type=int, default=300, help="texts that each model writes")
    parser.add_argument("--words", type=int, default=4, help="words of a clean text that they begin with")
    parser.add_argument("--tokens", type=int, default=30, help="tokens that are written at most")
    given = parser.parse_args()
    finished = given.family / "models"
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "recipe.yaml").write_text(yaml.safe_dump(recipe(finished, given.texts), sort_keys=False))
    graft.run(OUT / "recipe.yaml", OUT / "run")
    run, judge = read_run(OUT / "run"), finished / "judge"
    scorer = Scorer(models.load(judge), models.load_tokenizer(judge))
    starts = negation.prompts(given.texts, given.words)
    folders = {name: OUT / "run" / "models" / name for name in run.models}
    written = {name: negation.continuations(folder, starts, given.tokens) for name, folder in folders.items()}
    print("### Experts and anti-experts\n")
    print("\n".join(table(run, {name: negation.toxicity(scorer, texts) for name, texts in written.items()})))
    print(f"\n{source_line()}")


if __name__ == "__main__":
    main()
