"""Multiple choice by log-likelihood beside lm-eval 0.4.13 (`hf`, batch 8): seconds a request, fp32.

    sh bench/venv_lm_eval.sh
    OMP_NUM_THREADS=4 python bench/evaluate_choices.py [--questions 200] [--theirs 6] [--repeats 3] [--nothing-shared]

200 questions of 4 choices behind one few-shot prompt of 800 tokens, a Llama of 50M parameters. lm-eval reads every
request whole, so that its time a request does not depend on how many there are: it is given the first few questions.
With `--nothing-shared` every request has a text of its own, and both sides are given the same ones.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from _side_by_side import Measured, Side, json_of, measure, report

HERE = Path(__file__).resolve().parent
PEER = HERE / ".venv-lm-eval" / "bin" / "python"


def make_model(folder: Path) -> None:
    """A Llama of 50M parameters with random weights, and a tokenizer trained on the interpreter's library."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from graft import data, models
    from graft.data.tokenizers import train_tokenizer

    raw = data.parse(
        {"source": "python-library", "packages": ["json", "email", "http"], "splits": {"dev": 0, "test": 0}}
    )
    tokenizer = train_tokenizer(data.open_corpus({"c": raw}, "c", folder), "bpe", 8000)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=640, intermediate_size=1728, num_hidden_layers=9, num_attention_heads=10,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    models.save(LlamaForCausalLM(config), tokenizer, folder)


def make_requests(folder: Path, questions: int, shared: bool) -> list[tuple[str, str]]:
    """(context, choice) of every request; words are drawn from the library's text, so tokens look like real ones."""
    from graft import data, models

    tokenizer = models.load_tokenizer(folder)
    raw = data.parse({"source": "python-library", "keep": "docstrings", "limit": 800, "splits": {"dev": 0, "test": 0}})
    corpus = data.open_corpus({"c": raw}, "c", folder)
    words = " ".join(record["text"] for record in corpus.records("train")).split()
    draw = random.Random(0)

    def text(tokens: int) -> str:
        start = draw.randrange(len(words) - 2 * tokens)
        return tokenizer.decode(tokenizer(" ".join(words[start : start + 2 * tokens]))["input_ids"][:tokens])

    prompt = text(800)
    made = []
    for _ in range(questions):
        question = f"{prompt}\n\nQuestion: {text(40)}\nAnswer:"
        made += [(question if shared else text(100), " " + text(6).strip()) for _ in range(4)]
    return made


def ours(folder: Path, path: Path) -> dict[str, object]:
    """Seconds a request and log-likelihoods of ours."""
    from graft import models
    from graft.evaluate.scorer import Scorer

    pairs = [tuple(pair) for pair in json.loads(path.read_text())]
    scorer = Scorer(models.load(folder, dtype="float32"), models.load_tokenizer(folder))
    start = time.perf_counter()
    answers = scorer.loglikelihoods(pairs)
    seconds = time.perf_counter() - start
    return {"per_request": seconds / len(pairs), "log_probs": [a.log_prob for a in answers]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--theirs", type=int, default=6, help="questions given to lm-eval")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--nothing-shared", action="store_true")
    parser.add_argument("--ours", nargs=2, metavar=("MODEL", "REQUESTS"), help="one run of ours, for the script itself")
    given = parser.parse_args()
    if given.ours:
        print(json.dumps(ours(Path(given.ours[0]), Path(given.ours[1]))))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        folder.mkdir()
        make_model(folder)
        pairs = make_requests(folder, given.questions, not given.nothing_shared)
        few = pairs if given.nothing_shared else pairs[: 4 * given.theirs]
        (Path(place) / "all.json").write_text(json.dumps(pairs))
        (Path(place) / "few.json").write_text(json.dumps(few))
        found: dict[str, list[float]] = {}

        def side(name: str, *command: str | Path) -> Side:
            def run() -> float:
                made = json_of(command)
                found[name] = made["log_probs"]
                return float(made["per_request"])

            return Side(name, run)

        sides = [
            side("graft", sys.executable, __file__, "--ours", folder, Path(place) / "all.json"),
            side("lm-eval 0.4.13", PEER, HERE / "_choices_peer.py", folder, Path(place) / "few.json"),
        ]
        measured: list[Measured] = measure(sides, given.repeats, warmup=0)
    off = max(abs(a - b) for a, b in zip(*(found[s.name] for s in sides), strict=False))
    what = "nothing shared" if given.nothing_shared else f"800-token prompt, {given.questions} × 4"
    report(
        f"choices by log-likelihood, Llama 50M, {what}; log-likelihoods differ by {off:.1e} at most",
        measured,
        "s/request",
    )


if __name__ == "__main__":
    main()
