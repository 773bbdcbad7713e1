"""Scoring and decoding byte by byte beside doing it token by token with the same model, fp32: seconds and their factor.

OMP_NUM_THREADS=4 python bench/ensemble_bytes.py MODEL TEXT [--bytes 20000] [--repeats 3] [--drop 0.03] [--join 0.3]

MODEL is the folder of a trained model (how many token sequences matter depends on what it has learned), TEXT a file of
text that it was not trained on (plain, or `.jsonl.xz` with the field `text`), of which pieces of 1500 bytes are scored
and continued. What follows single tokens is read once for all texts and kept: a run that is not timed comes first.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

import torch

from _side_by_side import Side, measure, report, timed
from graft import models
from graft.ensemble.byte_level.byte_model import ByteModel, Cover
from graft.ensemble.byte_level.scorer import score
from graft.ensemble.byte_level.tokenizer import byte_tokenizer
from graft.ensemble.configuration import context_of
from graft.ensemble.model import ensemble_of
from graft.evaluate.scorer import Scorer
from graft.products import quick_layers

PIECE = 1500
PACKAGES = ["graft", "torch", "transformers"]


def text_of(path: Path, size: int) -> str:
    """The first of a file's text, plain or of compressed records."""
    if path.suffix != ".xz":
        return path.read_text(errors="ignore")
    found = ""
    with lzma.open(path, "rt") as lines:
        while len(found) < size and (line := lines.readline()):
            found += json.loads(line)["text"] + "\n"
    return found


def pieces(path: Path, size: int) -> list[str]:
    """The text in pieces that end between words."""
    found, text = [], text_of(path, size + PIECE)
    while text and sum(map(len, found)) < size:
        end = text.rfind(" ", 1, PIECE) if len(text) > PIECE else len(text)
        found.append(text[: end if end > 0 else PIECE])
        text = text[len(found[-1]) :]
    return found


def scoring(args: argparse.Namespace, cover: Cover) -> None:
    """Log-probabilities of known text."""
    model, words = models.load(args.model), models.load_tokenizer(args.model)
    texts = pieces(args.text, args.bytes)
    tokens = Scorer(model, words)
    reader = ByteModel(model, words, cover, limit=context_of(model.config.to_dict()))
    found, plain = score(reader, texts), tokens.documents(texts)
    size = sum(each.bytes for each in found)
    lost = sum(each.lost for each in found) / size
    print(f"{len(texts)} texts, {size:,} bytes in {sum(len(each.log_probs) for each in plain):,} tokens; bits per byte")
    print(
        f"  by tokens {sum(e.bits for e in plain) / size:.5f}, by bytes {sum(e.bits for e in found) / size:.5f}, ",
        end="",
    )
    print(f"of which at most {lost / 0.6931:.5f} for what was dropped; {reader.reader.tokens_read:,} tokens read")
    sides = [
        Side("byte by byte", timed(lambda: score(reader, texts))),
        Side("token by token", timed(lambda: tokens.documents(texts))),
    ]
    report(f"scoring {size:,} bytes", measure(sides, args.repeats), unit="s", packages=PACKAGES)


def decoding(args: argparse.Namespace, cover: Cover, batch: int) -> None:
    """Greedy continuations of as many bytes as the tokens that the plain model writes have."""
    model, words = models.load(args.model), models.load_tokenizer(args.model)
    over = ensemble_of({"it": model}, tokenizers=[words], cover=cover)
    prompts = [text[:400] for text in pieces(args.text, batch * PIECE)[:batch]]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(words(text, add_special_tokens=False)["input_ids"]) for text in prompts],
        batch_first=True,
        padding_side="left",
        padding_value=words.pad_token_id,
    )
    mask = (ids != words.pad_token_id).long()
    options = {"do_sample": False, "eos_token_id": None}
    made = model.generate(ids, attention_mask=mask, max_new_tokens=args.tokens, **options)
    count = round(sum(len(words.decode(row[ids.shape[1] :]).encode()) for row in made) / batch)

    @quick_layers()  # as what decodes byte by byte has them
    def by_tokens() -> None:
        model.generate(ids, attention_mask=mask, max_new_tokens=args.tokens, **options)

    own = byte_tokenizer()(prompts, return_tensors="pt", padding=True, padding_side="left")
    sides = [
        Side("byte by byte", timed(lambda: over.generate(**own, max_new_tokens=count, **options))),
        Side("token by token", timed(by_tokens)),
    ]
    heading = f"decoding {args.tokens} tokens or {count} bytes, batch {batch}"
    report(heading, measure(sides, args.repeats), unit="s", packages=PACKAGES)


def main() -> None:
    """One table for scoring and one for each batch of decoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bytes", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--drop", type=float, default=Cover().drop)
    parser.add_argument("--join", type=float, default=Cover().join)
    parser.add_argument("--most", type=int, default=Cover().most)
    parser.add_argument("--tokenisations", choices=["all", "canonical"], default="all")
    args = parser.parse_args()
    cover = Cover(args.tokenisations, args.drop, args.join, args.most)
    scoring(args, cover)
    for batch in args.batch:
        decoding(args, cover, batch)


if __name__ == "__main__":
    main()
