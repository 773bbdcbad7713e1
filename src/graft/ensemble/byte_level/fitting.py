"""Weights of an ensemble over bytes, fitted to text: as for one vocabulary, with bytes in place of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from graft import models
from graft.ensemble.byte_level.byte_model import ByteModel, Cover
from graft.ensemble.byte_level.scorer import ROWS, bytes_of, distributions, score
from graft.ensemble.configuration import context_of
from graft.ensemble.contributions import Contribution, contributions, contributions_to_product
from graft.ensemble.diversity import error_correlation
from graft.ensemble.gate import features
from graft.ensemble.kept import Columns
from graft.ensemble.members import home_of
from graft.ensemble.settings import CoverSettings, EnsembleSettings, FittedWeights
from graft.ensemble.sources import Source
from graft.ensemble.weights import Fit, fit_gated, fit_linear, fit_log_linear

BYTES = 2**28
"""Distributions of one member that are kept at most; of longer texts, bytes at even distances are."""
LOOKED_AT = 2**23
"""Log-probabilities of one member that are looked at most to say what a product's members contribute, for which every
subset of them is fitted; of longer texts, those of bytes at even distances."""
NOTHING = float(np.log(257))
"""Nats a byte where all bytes and the end are equally likely."""


def fit(
    settings: EnsembleSettings,
    sources: Sequence[Source],
    texts: Sequence[str],
    importance: Callable[[np.ndarray], np.ndarray],
    device: str | None,
    looks_at: Sequence[int] = (),
    seed: int = 0,
) -> Fit:
    """Each member reads the text once; EM for a mixture, Newton's method for a product.

    `importance`: how much each byte counts, from the places of the texts that they are in. `looks_at`, `seed`: of a
    gate, where the settings ask for one.
    """
    data = [bytes_of(text) for text in texts]
    places = np.repeat(np.arange(len(data)), [len(each) for each in data])
    cover = cover_of(settings)
    if settings.rule == "log_linear":
        return _product(sources, data, places, importance, cover, device)
    gate = settings.weights.gate if isinstance(settings.weights, FittedWeights) else None
    readers = (reader_of(source, cover, device) for source in sources)
    said = [_said(reader, data) if gate is not None else (_gold(reader, data), None) for reader in readers]
    told, share = np.stack([gold for gold, _ in said]), importance(places)
    missed = contributions(told, NOTHING, share, texts=places)
    found = replace(fit_linear(told, share), correlation=error_correlation(told), contributions=missed)
    if gate is None:
        return found
    inputs = torch.cat([seen for seen in (said[number][1] for number in looks_at) if seen is not None], -1)
    return fit_gated(found, torch.from_numpy(told).float(), inputs, share, gate, looks_at, seed)


def cover_of(settings: EnsembleSettings) -> Cover:
    """The token sequences that an ensemble's settings ask for."""
    return Cover(**(settings.cover or CoverSettings()).plain())


def reader_of(source: Source, cover: Cover, device: str | None) -> ByteModel:
    """A member, loaded, as a model over bytes."""
    model = source.load(device)
    limit = context_of(model.config.to_dict())
    return ByteModel(model, models.load_tokenizer(home_of(source.folder)), cover, limit=limit, name=source.name)


def _gold(reader: ByteModel, data: Sequence[bytes]) -> np.ndarray:
    return np.concatenate([each.log_probs for each in score(reader, data)])


def _said(reader: ByteModel, data: Sequence[bytes]) -> tuple[np.ndarray, torch.Tensor]:
    """Of every byte of all texts its log-probability `[bytes] float32` and a gate's features before it `[bytes, 2]`."""
    golds, seen = [], []
    for begin in range(0, len(data), ROWS):
        part = data[begin : begin + ROWS]
        for text, nexts in zip(part, distributions(reader, part), strict=True):
            log_probs = torch.from_numpy(nexts).log().float()
            golds.append(log_probs[range(len(text)), list(text)])
            seen.append(features([log_probs]))
    return torch.cat(golds).numpy(), torch.cat(seen)


def _product(
    sources: Sequence[Source],
    data: Sequence[bytes],
    places: np.ndarray,
    importance: Callable[[np.ndarray], np.ndarray],
    cover: Cover,
    device: str | None,
) -> Fit:
    stride = max(1, -(-len(places) * 257 * 4 // BYTES))
    chosen = np.arange(0, len(places), stride)
    log_probs = [_spread(reader_of(source, cover, device), data, stride) for source in sources]
    gold = torch.from_numpy(np.frombuffer(b"".join(data), np.uint8)[chosen].astype(np.int64))
    found = fit_log_linear(log_probs, gold, importance(places[chosen]))
    told = np.stack([each.gather(-1, gold[:, None])[:, 0].numpy() for each in log_probs])
    missed = _contributed(log_probs, gold, places[chosen], importance)
    return replace(found, correlation=error_correlation(told), contributions=missed)


def _contributed(
    log_probs: Sequence[torch.Tensor],
    gold: torch.Tensor,
    places: np.ndarray,
    importance: Callable[[np.ndarray], np.ndarray],
) -> list[Contribution]:
    """What members contribute to the product, from `[bytes, 257]` of each; `gold`, `places` `[bytes]` as they are kept.

    All bytes stand for themselves, so nothing is left out of a distribution.
    """
    step = max(1, -(-log_probs[0].numel() // LOOKED_AT))
    seen = [each[::step] for each in log_probs]
    columns = Columns(seen, gold[::step], seen[0].new_zeros(()).expand_as(seen[0]))
    return contributions_to_product(columns, NOTHING, importance(places[::step]), places[::step])


def _spread(reader: ByteModel, data: Sequence[bytes], stride: int) -> torch.Tensor:
    """`[bytes kept, 257] float32` log-probabilities before every `stride`-th byte of all texts."""
    kept, seen = [], 0
    for begin in range(0, len(data), ROWS):
        for nexts in distributions(reader, data[begin : begin + ROWS]):
            kept.append(torch.from_numpy(nexts[-seen % stride :: stride]).log().float())
            seen += len(nexts)
    return torch.cat(kept)
