"""Bootstrap resamples of documents, for bagging (Breiman 1996): as many as there are, drawn with replacement."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.data.corpus import AnyCorpus, Corpus
from graft.data.stream import Batch, TokenStream, open_stream, stream_name, tokenize, write_stream
from graft.disk import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def times_drawn(documents: int, seed: int, part: int = 0) -> np.ndarray:
    """How often each of `documents` is in the resample, `[documents] uint8`; they sum to `documents`."""
    drawn = np.random.default_rng([seed, part, 5]).integers(0, documents, documents)
    return np.bincount(drawn, minlength=documents).astype(np.uint8)


def bootstrap_stream(
    corpus: Corpus, split: str, tokenizer: PreTrainedTokenizerFast, cache: Path, seed: int, part: int = 0
) -> TokenStream:
    """The token stream of a resample of one split, from `cache` where it has been made before."""
    plain = tokenize(corpus, split, tokenizer, cache)
    name = [*stream_name(corpus, split, tokenizer), "bootstrap", seed, part]
    folder = cache / "streams" / hashlib.sha256(json.dumps(name).encode()).hexdigest()[:32]
    if not (folder / "stream.json").exists():
        with atomic_folder(folder, keep_existing=True) as out:
            drawn = np.repeat(np.arange(plain.documents), times_drawn(plain.documents, seed, part))
            write_stream(out, str(plain.ids.dtype), _chosen(plain, drawn), masked=plain.trained is not None)
    return open_stream(folder)


def _chosen(stream: TokenStream, drawn: np.ndarray) -> Iterator[Batch]:
    """The documents `drawn`, in this order."""
    for first, last in zip(stream.offsets[:-1][drawn].tolist(), stream.offsets[1:][drawn].tolist(), strict=True):
        trained = None if stream.trained is None else stream.trained[first:last]
        yield stream.ids[first:last], trained, np.array([last - first])


def described(
    corpus: AnyCorpus, split: str, tokenizer: PreTrainedTokenizerFast, cache: Path, seed: int
) -> dict[str, Any]:
    """For a manifest: of each part how many documents there are, how many of them are in the resample, and the weights
    (how often each is) as `weights_of` reads them."""
    found = {}
    for place, (part, _) in enumerate(corpus.parts):
        times = times_drawn(tokenize(part, split, tokenizer, cache).documents, seed, place)
        packed = base64.b85encode(zlib.compress(times.tobytes(), 9)).decode()
        found[part.name] = {"documents": len(times), "distinct": int((times > 0).sum()), "weights": packed}
    return {"seed": seed, "parts": found}


def weights_of(packed: str) -> np.ndarray:
    """The weights of a resample from its manifest: how often each document is in it, `[documents] uint8`."""
    return np.frombuffer(zlib.decompress(base64.b85decode(packed)), np.uint8)
