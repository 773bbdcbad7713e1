"""Does merging help? Every method on the domains family: bits per byte by domain, and what of the experts is kept.

    OMP_NUM_THREADS=4 python bench/family.py recipes/domains.yaml
    OMP_NUM_THREADS=4 python bench/merging_help.py

Each method merges the four experts; beside the merges stand the base, the experts, their ensemble, and one model that
is tuned on all domains at once, on as many tokens as the experts together. λ is searched on held-out text wherever a
method has one; where a search would measure anew for each candidate or there is no λ (localize_and_stitch, sce, ram),
task arithmetic with a searched λ adds the merge's own task vector. Every pair and triple of experts is averaged and
ensembled too.

Texts are drawn evenly from the whole of each domain's dev and test split, cut to what fits into a context. The model
that is tuned on all domains is a run of its own, so that it is trained once: `--step train` makes that alone.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

import graft
from _merging_table import DOMAINS, EXPERTS, ending, picture, subsets, table
from graft import data
from graft.report.ceiling import said
from graft.report.read import read_run

HERE = Path(__file__).resolve().parent
FAMILY = HERE / "work" / "domains" / "models"
WORK = HERE / "work" / "merging_help"
MULTI_TASK = "multi-task"
CHARACTERS = 800
"""Of a text: about 220 tokens of the 256 that the models read."""

AVERAGES = ["linear", "karcher", "multislerp", "model_stock", "uniform_soup"]
SEARCHED = ["task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs", "tsv_merge", "iso_c", "wudi"]
RANGE = [0.05, 1.6]


def family_data() -> dict[str, Any]:
    """The data sets of the family, with absolute paths."""
    raw = yaml.safe_load((HERE.parent / "recipes" / "domains.yaml").read_text())["data"]
    for source in raw.values():
        for key in {"path", "test"} & source.keys():
            source[key] = str((HERE.parent / "recipes" / source[key]).resolve())
    return dict(raw)


def samples(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Data sets of so many texts of each split (`{"dev": 100}`) of each domain, written where they are not yet."""
    cut = {name: raw | {"pieces": CHARACTERS} for name, raw in family_data().items() if name in DOMAINS}
    settings = {name: data.parse(raw, ("data", name)) for name, raw in cut.items()}
    made: dict[str, Any] = {"mixed": {"mix": dict.fromkeys(DOMAINS, 1)}}
    for domain in DOMAINS:
        made[domain] = {"source": "jsonl", "format": "text"}
        for split, count in sizes.items():
            made[domain][split] = str(WORK / "data" / f"{domain}-{split}-{count}.jsonl")
            if not Path(made[domain][split]).exists():
                texts = [record["text"] for record in data.open_corpus(settings, domain, HERE).records(split)]
                write(Path(made[domain][split]), random.Random(0).sample(texts, min(count, len(texts))))
    return made


def write(path: Path, texts: list[str]) -> None:
    """JSON lines, the texts cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text[:CHARACTERS]}) + "\n" for text in texts))


def train(budget: str) -> None:
    """The model tuned on all domains, as the experts were apart from its data and its budget."""
    family = yaml.safe_load((HERE.parent / "recipes" / "domains.yaml").read_text())
    expert = family["models"][next(iter(EXPERTS))]["tune"]
    tune = expert | {"data": "mixed", "budget": budget, "evaluate_every": 4 * expert["evaluate_every"]}
    models = {"base": {"load": str(FAMILY / "base")}, MULTI_TASK: {"tune": tune}}
    run("multi_task", {"data": family_data(), "models": models, "evaluate": []})


def run(name: str, parts: Mapping[str, Any]) -> None:
    """Run a recipe in a folder of its name; what is there already stays."""
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"family": name, "seed": 0, **parts}, sort_keys=False))
    graft.run(path, WORK / name)


def merges(evaluations: int, judged: int) -> dict[str, Any]:
    """Every method once, of all experts."""
    experts, each = list(EXPERTS), {name: f"{domain}.dev" for name, domain in EXPERTS.items()}
    search = {"over": {"scale": RANGE}, "on": "mixed.dev", "limit": judged, "evaluations": evaluations}
    on_delta = {"models": experts, "base": "base"}
    read = {"on": each, "tokens": 16_000, "length": 256}
    made = {method: {"method": method, "models": experts} for method in AVERAGES}
    made["model_stock"] |= {"base": "base"}
    made |= {method: {"method": method, **on_delta, "search": search} for method in SEARCHED}
    made |= {method: {"method": method, "models": experts, **read} for method in ("fisher", "regmean", "regmean_plus")}
    made["adamerging"] = {
        "method": "adamerging", **on_delta, "on": "mixed.dev", "tokens": 16_000, "steps": 40, "learning_rate": 1e-2
    }  # fmt: skip
    made["greedy_soup"] = {"method": "greedy_soup", "models": experts, "on": "mixed.dev", "limit": judged}
    made["learned_soup"] = {
        "method": "learned_soup", "models": experts, "on": "mixed.dev", "rows": 64, "epochs": 2, "length": 256
    }  # fmt: skip
    stitched = {"density": 0.3, "steps": 10, **read}
    for method, options in {"sce": {}, "ram": {}, "localize_and_stitch": stitched}.items():
        made[f"{method}_unscaled"] = {"method": method, **on_delta, **options}
        again = {"method": "task_arithmetic", "base": "base", "models": [f"{method}_unscaled"]}
        made[method] = {**again, "search": search}
    return {name: {"merge": settings} for name, settings in made.items()}


def combined() -> dict[str, Any]:
    """The mean and the ensemble of every pair and triple of experts, and the ensemble of all."""
    made: dict[str, Any] = {"ensemble": {"ensemble": {"combine": "linear", "members": list(EXPERTS)}}}
    for some in (list(some) for size in (2, 3) for some in combinations(EXPERTS, size)):
        made[f"mean_{'_'.join(some)}"] = {"merge": {"method": "linear", "models": some}}
        made[f"ensemble_{'_'.join(some)}"] = {"ensemble": {"combine": "linear", "members": some}}
    return made


def recipe(evaluations: int, judged: int, measured: int) -> dict[str, Any]:
    """All of them as nodes over the finished models of the family."""
    found = {name: FAMILY / name for name in ("base", *EXPERTS)}
    multi_task = WORK / "multi_task" / "models" / MULTI_TASK
    found |= {MULTI_TASK: multi_task} if multi_task.exists() else {}
    models = {name: {"load": str(folder)} for name, folder in found.items()}
    models |= merges(evaluations, judged) | combined()
    shown = [name for name in models if not name.endswith("_unscaled")]
    evaluate = [{"measure": "bits_per_byte", "on": ["mixed.test"], "models": shown}]
    return {"data": samples({"dev": 100, "test": measured}), "models": models, "evaluate": evaluate}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=6, help="merges tried for each λ")
    parser.add_argument("--judged", type=int, default=12, help="texts of each domain that a λ is tried on")
    parser.add_argument("--measured", type=int, default=50, help="texts of each domain's test split")
    parser.add_argument("--multi-task", default="2.8M tokens", help="budget of the model tuned on all domains at once")
    parser.add_argument("--step", choices=["train", "merge"], help="train that model only, or do all but that")
    parser.add_argument("--picture", type=Path, help="where the scatter of averages and ensembles is written, as SVG")
    given = parser.parse_args()
    started = time.perf_counter()
    if given.step != "merge":
        train(given.multi_task)
    if given.step != "train":
        run("merges", recipe(given.evaluations, given.judged, given.measured))
        found = read_run(WORK / "merges")
        print("### merging on the domains family\n")
        print("\n".join([*table(found), "", *subsets(found), "", said(found)]))
        if given.picture:
            given.picture.write_text(picture(found))
    print("\n".join(["", *ending(time.perf_counter() - started)]))


if __name__ == "__main__":
    main()
