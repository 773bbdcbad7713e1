"""Does ensembling help? Members of a family, and of one training, against the best single model; with paired tests.

    OMP_NUM_THREADS=4 python bench/family.py recipes/domains.yaml
    OMP_NUM_THREADS=1 python bench/ensembling_help.py domains
    OMP_NUM_THREADS=1 python bench/ensembling_help.py members

`domains`: mixtures and products of the experts of the domains family, uniform, fitted on 52, 100 and 1000 examples of
the mixture's dev split, and with a gate; and a small medical model beside the base, which is larger and general.
`members`: seeds, bags, checkpoints and passes with dropout of one small model, trained on much text and on little.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import graft
from _help import Scores, difference_table, sample, score_table, source_line, write_lines
from graft.lineage import read_manifest

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "recipes"
EXAMPLES = (13, 25, 250)
"""Of each domain, that weights are fitted on."""
FITTED_ON = 240
"""Characters of an example."""
MEDICS = {"medic": "2M tokens", "novice": "500k tokens"}
"""Small models of medical text, and how much of it they read."""


def family() -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe of the domains family, its paths made absolute, and its experts with their domains."""
    found = yaml.safe_load((RECIPES / "domains.yaml").read_text())
    for source in found["data"].values():
        source.update({key: str((RECIPES / source[key]).resolve()) for key in ("path", "test") if key in source})
    return found, {name: node["tune"]["data"] for name, node in found["models"].items() if "tune" in node}


def prepare(out: Path, measured: int, characters: int) -> dict[str, Any]:
    """Samples of the domains' dev and test splits in files; the data section that names them."""
    whole, experts = family()
    found: dict[str, Any] = {}
    for domain in experts.values():
        files = {"dev": (max(EXAMPLES), FITTED_ON), "test": (measured, characters)}
        for split, (count, length) in files.items():
            write_lines(out / f"{domain}.{split}.jsonl", sample(whole["data"][domain], RECIPES, split, count, length))
        found[domain] = {"source": "jsonl", "format": "text", **{s: f"{domain}.{s}.jsonl" for s in files}}
    return {**found, "mixed": {"mix": dict.fromkeys(found, 1)}, "medical_text": whole["data"]["medical"]}


def domains(data: Mapping[str, Any], finished: Path) -> dict[str, Any]:
    """Every ensemble as nodes over the finished models of the domains family."""
    _, experts = family()
    models: dict[str, Any] = {name: {"load": str(finished / name)} for name in ["base", *experts]}
    members = list(experts)
    for rule in ("linear", "log_linear"):
        models[f"uniform_{rule}"] = {"ensemble": {"combine": rule, "members": members}}
        for count in EXAMPLES:
            weights = {"fit": "mixed.dev", "documents": count}
            models[f"{rule}_{4 * count}"] = {"ensemble": {"combine": rule, "members": members, "weights": weights}}
    for count in EXAMPLES[1:]:
        weights = {"fit": "mixed.dev", "documents": count, "gate": {"hidden_states": True}}
        models[f"gated_{4 * count}"] = {"ensemble": {"members": members, "weights": weights}}
    on = [f"{domain}.test" for domain in experts.values()]
    evaluate = [{"measure": "bits_per_byte", "on": on}]
    return {
        "family": "domains_ensembled",
        "data": dict(data),
        "models": {**models, **medical_pairs()},
        "evaluate": evaluate,
    }


def medical_pairs() -> dict[str, Any]:
    """Small models that have read medical text only, more and less of it, each beside the larger, general base."""
    found: dict[str, Any] = {}
    for name, budget in MEDICS.items():
        small = {
            "data": "medical_text", "architecture": "decoder", "size": "1M", "tokenizer": {"of": "base"},
            "budget": budget, "learning_rate": 2e-3, "batch_size": 16,
        }  # fmt: skip
        pair, fits = {"members": ["base", name]}, {"medical": ("medical.dev", 100), "mixture": ("mixed.dev", 25)}
        found[name] = {"pretrain": small}
        found[f"{name}_uniform"] = {"ensemble": pair}
        for place, (text, count) in fits.items():
            found[f"{name}_for_{place}"] = {"ensemble": {**pair, "weights": {"fit": text, "documents": count}}}
        gated = {"fit": "mixed.dev", "documents": 250, "gate": {"hidden_states": True}}
        found[f"{name}_gated"] = {"ensemble": {**pair, "weights": gated}}
    return found


def members(data: Mapping[str, Any]) -> dict[str, Any]:
    """Seeds, bags, checkpoints and passes of one small model, on all medical text (`much`) and on 250 answers."""
    texts = {"much": data["medical_text"], "little": {**data["medical_text"], "limit": 250, "splits": {"dev": 0.05}}}
    models: dict[str, Any] = {}
    for amount in texts:
        small = {
            "data": amount, "architecture": "decoder", "size": "1M", "positions": "learned", "length": 128,
            "dropout": 0.1, "budget": "600k tokens", "batch_size": 16, "learning_rate": 3e-3, "evaluate_every": 30,
        }  # fmt: skip
        base, like = f"{amount}_base", {**small, "tokenizer": {"of": f"{amount}_base"}}
        models[base] = {"pretrain": {**small, "tokenizer": {"size": 2048}, "keep": {"last": 3}}}
        seeds = {f"{amount}_seed_{seed}": {"seed": seed, "pretrain": like} for seed in (1, 2)}
        bags = {f"{amount}_bag_{seed}": {"pretrain": {**like, "bootstrap": seed}} for seed in (1, 2, 3)}
        models |= seeds | bags
        models[f"{amount}_seeds"] = {"ensemble": {"members": [base, *seeds]}}
        models[f"{amount}_bags"] = {"ensemble": {"members": list(bags)}}
        models[f"{amount}_checkpoints"] = {"ensemble": {"members": [{"model": base, "checkpoints": "last 3"}]}}
        models[f"{amount}_passes"] = {"ensemble": {"members": [{"model": base, "dropout": {"passes": 8}}]}}
    evaluate = [{"measure": "bits_per_byte", "on": ["medical.test"]}]
    return {"family": "members_ensembled", "data": {**data, **texts}, "models": models, "evaluate": evaluate}


def report_domains(run: Path) -> list[str]:
    """The tables of `domains`."""
    _, experts = family()
    columns = {domain: [f"{domain}.test"] for domain in experts.values()}
    columns["mixture"] = [place for places in columns.values() for place in places]
    recipe = domains({}, Path())["models"]
    singles, pairs = ["base", *experts], [name for name in medical_pairs() if name not in MEDICS]
    combined = [name for name in recipe if name not in (*singles, *MEDICS, *pairs)]
    scores = Scores(run)
    general = {column: columns[column] for column in ("medical", "mixture")}
    lines = [
        *score_table(scores, [*singles, *combined], columns), "",
        *difference_table(scores, combined, singles, columns), "",
        *weights(run, [*combined, *pairs]), "",
        *score_table(scores, ["base", *medical_pairs()], general), "",
    ]  # fmt: skip
    for name in MEDICS:
        own = [pair for pair in pairs if pair.startswith(name)]
        lines += [*difference_table(scores, own, ["base", name], general), ""]
    return lines


def weights(run: Path, names: list[str]) -> list[str]:
    """Markdown: what was fitted; of a gate the mean."""
    lines = ["| model | weights |", "|---|---|"]
    for name in names:
        manifest = read_manifest(run / "models" / name)
        assert manifest is not None
        found = ", ".join(f"{member} {value:.2f}" for member, value in manifest.metrics["weights"].items())
        lines.append(f"| {name} | {found.replace('-', '−')} |")
    return lines


def report_members(run: Path) -> list[str]:
    """The tables of `members`."""
    scores, columns, lines = Scores(run), {"medical": ["medical.test"]}, []
    for amount in ("much", "little"):
        singles = [f"{amount}_{name}" for name in ("base", "seed_1", "seed_2", "bag_1", "bag_2", "bag_3")]
        combined = [f"{amount}_{name}" for name in ("seeds", "bags", "checkpoints", "passes")]
        lines += [*score_table(scores, [*singles, *combined], columns), ""]
        lines += [*difference_table(scores, combined, singles[:1], columns), ""]
    return lines


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["domains", "members"])
    parser.add_argument("--family", type=Path, default=HERE / "work" / "domains", help="folder of the domains family")
    given = parser.parse_args()
    out = HERE / "work" / f"ensembling_{given.part}"
    measured, characters = (60, 800) if given.part == "domains" else (200, 400)
    data = prepare(out, measured, characters)
    recipe = domains(data, given.family / "models") if given.part == "domains" else members(data)
    (out / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "seed": 0}, sort_keys=False))
    graft.run(out / "recipe.yaml", out / "run")
    show = report_domains if given.part == "domains" else report_members
    print("\n".join([f"### Ensembles: {given.part}\n", *show(out / "run"), "", source_line()]))


if __name__ == "__main__":
    main()
