"""Tokenising a corpus beside `tokenizers` called directly with all cores, and the memory of a large file.

    python bench/tokenise.py [--megabytes 20] [--repeats 5]
    python bench/tokenise.py --memory [--megabytes 1000] [--document file|paragraph|line]

Theirs: reading the file, `encode_batch_fast` over all documents at once, lists of ids. Ours: reading the file, removing
duplicates, splitting by hash, tokenising, and writing the memory-mapped stream to the disk. Every run is a process of
its own; start-up is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from _side_by_side import Side, json_of, measure, report


def make_text(path: Path, megabytes: int) -> None:
    """Paragraphs of the interpreter's library, numbered so that none is a duplicate."""
    from graft import data

    raw = data.parse({"source": "python-library", "splits": {"dev": 0, "test": 0}})
    corpus = data.open_corpus({"c": raw}, "c", path.parent)
    blocks = [b.replace("\n\n", "\n") for r in corpus.records("train") for b in r["text"].split("\n\n\n") if b.strip()]
    written = number = 0
    with open(path, "w") as file:
        while written < megabytes * 10**6:
            block = f"# {number}\n{blocks[number % len(blocks)]}\n\n"
            written += file.write(block)
            number += 1


def make_tokenizer(folder: Path) -> None:
    from graft import data
    from graft.data.tokenizers import train_tokenizer

    raw = data.parse(
        {"source": "python-library", "packages": ["json", "email", "http"], "splits": {"dev": 0, "test": 0}}
    )
    train_tokenizer(data.open_corpus({"c": raw}, "c", folder), "bpe", 8000).save_pretrained(folder / "tokenizer")


def ours(folder: Path, text: Path, document: str) -> dict[str, float]:
    from graft import data, models
    from graft.data.stream import tokenize

    tokenizer = models.load_tokenizer(folder / "tokenizer")
    raw = {"source": "text", "document": document, "path": str(text), "splits": {"dev": 0, "test": 0}}
    corpus = data.open_corpus({"c": data.parse(raw)}, "c", folder)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        start = time.perf_counter()
        stream = tokenize(corpus, "train", tokenizer, Path(cache))
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak_GiB": peak, "tokens": len(stream.ids), "documents": stream.documents}


def theirs(folder: Path, text: Path) -> dict[str, float]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    start = time.perf_counter()
    documents = [d for d in text.read_text().split("\n\n") if d.strip()]
    ids = [encoded.ids for encoded in tokenizer.encode_batch_fast(documents, add_special_tokens=False)]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(map(len, ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory of ours on a file of so many megabytes")
    parser.add_argument("--document", choices=["file", "paragraph", "line"], default="paragraph", help="with --memory")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "FOLDER", "TEXT"), help="one run, for the script itself")
    given = parser.parse_args()
    if given.one:
        side, *places = given.one
        folder, text = map(Path, places)
        print(json.dumps(ours(folder, text, given.document) if side == "ours" else theirs(folder, text)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder, text = Path(place), Path(place) / "text.txt"
        make_tokenizer(folder)
        make_text(text, given.megabytes)
        one = [sys.executable, __file__, "--one"]
        if given.memory:
            kind = ["--document", given.document]
            peak = Side("graft", lambda: json_of([*one, "ours", folder, text, *kind])["peak_GiB"])
            report(
                f"peak memory, tokenising one file of {given.megabytes} MB, a document a {given.document}",
                measure([peak], 1, warmup=0),
                "GiB",
                ["graft", "tokenizers"],
            )
            return
        sides = [
            Side("graft", lambda: json_of([*one, "ours", folder, text])["seconds"]),
            Side("tokenizers", lambda: json_of([*one, "theirs", folder, text])["seconds"]),
        ]
        report(f"tokenising {given.megabytes} MB", measure(sides, given.repeats), "s", ["graft", "tokenizers"])


if __name__ == "__main__":
    main()
