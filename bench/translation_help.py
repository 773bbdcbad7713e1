"""Do ensembles help translation? Seeds of one translator, and language models of the target that move it to a domain.

    OMP_NUM_THREADS=1 python bench/translation_help.py

Everything is trained here: translators of short everyday sentences (English to French), a language model of their
French side, and one tuned from it on French medical sentences. Domain-differential adaptation (Dou et al. 2019) moves a
translator by α times the difference of the two; shallow fusion fits all three weights on held-out medical pairs. BLEU
and chrF on everyday and medical test sentences, resampled over sentences.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import yaml

import graft
from _help import Scores, difference_table, score_table, source_line, write_lines
from graft.evaluate.metrics import text_metric

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "data"
OUT = HERE / "work" / "translation_help"
EVERYDAY, MEDICAL = SHARED / "mt_tatoeba", SHARED / "mt_tico19_medical"
LONGEST = {"train": 8, "test": 12}
"""Words of an English sentence."""
LEARNED = 800
"""Sentences of the medical dev file whose French is learned from; weights are fitted on the others."""
ALPHAS = (0.25, 0.5, 1.0)
Pair = dict[str, Any]


def read(path: Path, longest: int | None = None) -> list[Pair]:
    """Pairs `en`, `tgt` (a list of translations) whose English has at most so many words."""
    opened: Any = lzma.open if path.suffix == ".xz" else gzip.open
    with opened(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    pairs = [{"en": r["en"], "tgt": [r["tgt"]] if isinstance(r["tgt"], str) else r["tgt"]} for r in records]
    return [pair for pair in pairs if longest is None or len(pair["en"].split()) <= longest]


def write_data(measured: int) -> None:
    """The files that the recipe reads, and the two tasks."""
    train, dev = read(EVERYDAY / "en-fr.train.jsonl.xz", LONGEST["train"]), read(EVERYDAY / "en-fr.val.jsonl.gz", 8)
    for name, pairs in {"everyday": train, "everyday-dev": dev[:300]}.items():
        write_lines(OUT / f"{name}.jsonl", [{"source": p["en"], "target": p["tgt"][0]} for p in pairs])
        write_lines(OUT / f"{name}-french.jsonl", [{"text": p["tgt"][0]} for p in pairs])
    medical = read(MEDICAL / "en-fr.dev.jsonl.gz")
    random.Random(0).shuffle(medical)
    for name, pairs in {"medical": medical[:LEARNED], "medical-dev": medical[LEARNED:]}.items():
        write_lines(OUT / f"{name}-french.jsonl", [{"text": p["tgt"][0]} for p in pairs])
    write_lines(OUT / "medical-fit.jsonl", [{"source": p["en"], "target": p["tgt"][0]} for p in medical[LEARNED:]])
    for name, path in {
        "everyday": EVERYDAY / "en-fr.test.jsonl.gz",
        "medical": MEDICAL / "en-fr.test.jsonl.gz",
    }.items():
        found = read(path, LONGEST["test"])
        write_lines(OUT / f"{name}-test.jsonl", random.Random(0).sample(found, min(measured, len(found))))
        (OUT / f"{name}.yaml").write_text(yaml.safe_dump(task(name)))


def task(name: str) -> dict[str, Any]:
    """Translating the test sentences of a domain, against all their translations."""
    data = {"source": "jsonl", "format": "raw", "test": f"{name}-test.jsonl"}
    asked = {"prompt": "{{ en }}\n", "target": "{{ tgt }}", "metrics": ["bleu", "chrf"], "max_tokens": 40}
    return {"name": name, "data": data, **asked}


def recipe(steps: int) -> dict[str, Any]:
    """Translators, language models, and what is made of them."""
    data = {
        "everyday": {"source": "jsonl", "train": "everyday.jsonl", "dev": "everyday-dev.jsonl"},
        "french": {"source": "jsonl", "train": "everyday-french.jsonl", "dev": "everyday-dev-french.jsonl"},
        "medical_french": {"source": "jsonl", "train": "medical-french.jsonl", "dev": "medical-dev-french.jsonl"},
        "medical_pairs": {"source": "jsonl", "dev": "medical-fit.jsonl"},
    }
    small = {
        "data": "everyday", "architecture": "encoder-decoder", "hidden": 160, "layers": 2, "length": 64,
        "budget": f"{steps} steps", "batch_size": 32, "learning_rate": 2e-3,
    }  # fmt: skip
    like = {"tokenizer": {"of": "translator"}}
    outside = {
        "data": "french", "architecture": "decoder", "size": "1M", "length": 64, "budget": "700k tokens",
        "batch_size": 32, "learning_rate": 2e-3,
    }  # fmt: skip
    inside = {
        "from": "outside",
        "data": "medical_french",
        "budget": "5 epochs",
        "batch_size": 16,
        "learning_rate": 1e-3,
    }
    moved = ["translator", "inside", "outside"]
    fitted = {"fit": "medical_pairs.dev", "documents": 200}
    models: dict[str, Any] = {
        "translator": {"pretrain": small},
        "second": {"seed": 1, "pretrain": {**small, **like}},
        "outside": {"pretrain": {**outside, **like}},
        "inside": {"tune": inside},
        "seeds_linear": {"ensemble": {"members": ["translator", "second"]}},
        "seeds_log_linear": {"ensemble": {"combine": "log_linear", "members": ["translator", "second"]}},
    }
    for alpha in ALPHAS:
        rule = {"experts": {"alpha": alpha}}
        models[f"moved_{100 * alpha:03.0f}"] = {"ensemble": {"combine": rule, "members": moved}}
    models["fusion_fitted"] = {"ensemble": {"combine": "log_linear", "members": moved, "weights": fitted}}
    translators = [name for name in models if name not in ("outside", "inside")]
    evaluate = [{"task": f"{name}.yaml", "models": translators} for name in ("everyday", "medical")]
    evaluate += [{"measure": "perplexity", "on": ["french.dev", "medical_french.dev"], "models": ["outside", "inside"]}]
    return {"family": "translation", "seed": 0, "data": data, "models": models, "evaluate": evaluate}


def tables(run: Path) -> list[str]:
    """BLEU and chrF, and differences: of the seeds to the better one, of the others to the translator they move."""
    singles, seeds, lines = ["translator", "second"], ["seeds_linear", "seeds_log_linear"], []
    columns = {"everyday": ["everyday.test"], "medical": ["medical.test"]}
    moved = [n for n in recipe(1)["models"] if n.startswith(("moved", "fusion"))]
    for name, heading in {"bleu": "BLEU", "chrf": "chrF"}.items():
        scores = Scores(run, text_metric(name, ["a"], [["a"]])[0])
        headed = {f"{heading}, {column}": places for column, places in columns.items()}
        lines += [*score_table(scores, [*singles, *seeds, *moved], headed), ""]
        lines += [*difference_table(scores, seeds, singles, headed), ""]
        lines += [*difference_table(scores, moved, ["translator"], headed), ""]
    return lines


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2200, help="optimizer steps of each translator")
    parser.add_argument("--measured", type=int, default=500, help="test sentences of each domain")
    given = parser.parse_args()
    write_data(given.measured)
    (OUT / "recipe.yaml").write_text(yaml.safe_dump(recipe(given.steps), sort_keys=False))
    graft.run(OUT / "recipe.yaml", OUT / "run")
    print("\n".join(["### Translation\n", *tables(OUT / "run"), source_line()]))


if __name__ == "__main__":
    main()
