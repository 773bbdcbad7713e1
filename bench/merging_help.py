"""Does merging help? Every method on the domains family: bits per byte by domain, and what of the experts is kept.

    OMP_NUM_THREADS=4 python bench/family.py recipes/domains.yaml
    OMP_NUM_THREADS=4 python bench/merging_help.py [--evaluations 8] [--multi-task '2.1M tokens']

λ is searched on the dev split of the mixture where a method has one. "Kept" is the mean over the domains of
(base − model) / (base − that domain's expert): 1 is an expert on every domain at once, 0 is the base.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import yaml

import graft
from _side_by_side import machine, versions
from graft import report

HERE = Path(__file__).resolve().parent
EXPERTS = {"novelist": "novels", "doctor": "medical", "concierge": "dialogue"}
AVERAGES = ["linear", "karcher", "multislerp", "model_stock", "uniform_soup"]
SEARCHED = ["task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs", "tsv_merge", "iso_c"]
PLAIN = ["sce", "ram", "wudi"]


def recipe(evaluations: int, judged: int, measured: int, multi_task: str | None) -> dict[str, Any]:
    """Every method once, as nodes over the finished models of the domains family."""
    family = yaml.safe_load((HERE.parent / "recipes" / "domains.yaml").read_text())
    for source in family["data"].values():
        for key in ("path", "test"):
            if key in source:
                source[key] = str((HERE.parent / "recipes" / source[key]).resolve())
    models = {name: {"load": str(HERE / "work" / "domains" / "models" / name)} for name in ["base", *EXPERTS]}
    experts = list(EXPERTS)
    search = {"over": {"scale": [0.2, 1.6]}, "on": "mixed.dev", "limit": judged, "evaluations": evaluations}
    for method in AVERAGES:
        base = {"base": "base"} if method == "model_stock" else {}
        models[method] = {"merge": {"method": method, "models": experts, **base}}
    for method in PLAIN:
        models[method] = {"merge": {"method": method, "models": experts, "base": "base"}}
    for method in SEARCHED:
        models[method] = {"merge": {"method": method, "models": experts, "base": "base", "search": search}}
    data = {"on": "mixed.dev", "limit": judged}
    models["greedy_soup"] = {"merge": {"method": "greedy_soup", "models": experts, **data}}
    models["ensemble"] = {"ensemble": {"combine": "linear", "members": experts}}
    if multi_task:
        models["multi-task"] = {"tune": {"from": "base", "data": "mixed", "method": "full", "budget": multi_task}}
    evaluate = [
        {"measure": "bits_per_byte", "on": ["novels.test"], "limit": max(measured // 8, 4)},
        {"measure": "bits_per_byte", "on": ["medical.test", "dialogue.test"], "limit": measured},
    ]
    return {"family": "merging_help", "seed": 0, "data": family["data"], "models": models, "evaluate": evaluate}


def table(summary: dict[str, Any]) -> list[str]:
    """Markdown lines, the best kept share first."""
    scores = {
        model["name"]: {score["on"].removesuffix(".test"): score for score in model["scores"]}
        for model in summary["models"]
    }
    kept = {name: statistics.mean(_kept(scores, name)) for name in scores}
    lines = ["| model | " + " | ".join(EXPERTS.values()) + " | kept |", "|---|---|---|---|---|"]
    for name in sorted(scores, key=lambda name: -kept[name]):
        cells = [
            f"{one['value']:.3f} ± {(one['high'] - one['low']) / 2:.3f}"
            for one in (scores[name][domain] for domain in EXPERTS.values())
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {kept[name]:.2f} |")
    return lines


def _kept(scores: dict[str, Any], name: str) -> list[float]:
    def value(model: str, domain: str) -> float:
        return float(scores[model][domain]["value"])

    return [
        (value("base", domain) - value(name, domain)) / (value("base", domain) - value(expert, domain))
        for expert, domain in EXPERTS.items()
    ]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=8, help="merges tried for each λ")
    parser.add_argument(
        "--judged", type=int, default=8, help="documents of each domain's dev split that a λ is tried on"
    )
    parser.add_argument("--measured", type=int, default=120, help="documents of each test split; novels an eighth")
    parser.add_argument("--multi-task", help="budget of a model tuned on all domains at once, such as '2.1M tokens'")
    given = parser.parse_args()
    out = HERE / "work" / "merging_help"
    out.mkdir(parents=True, exist_ok=True)
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(given.evaluations, given.judged, given.measured, given.multi_task)))
    started = time.perf_counter()
    graft.run(path, out / "run")
    minutes = (time.perf_counter() - started) / 60
    print("### merging on the domains family\n")
    print("\n".join(table(report.summary(out / "run"))))
    print(f"\n`{shlex.join(['python', *sys.argv])}`: {minutes:.1f} minutes. {machine()}.")
    print(f"{versions(['graft', 'torch', 'transformers'])}; {datetime.date.today().isoformat()}.")


if __name__ == "__main__":
    main()
