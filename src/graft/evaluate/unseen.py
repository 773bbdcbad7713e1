"""Whether models have been trained on what they are to be judged by, as far as their manifests tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graft import data, lineage
from graft.data.contents import contents
from graft.errors import CannotCombine
from graft.lineage import DataUse


def check_unseen(folders: Mapping[str, Path], on: Sequence[str], sets: Mapping[str, Any], root: Path) -> None:
    """Raises CannotCombine where a model, or one that it was made from, was trained on one of the data sets `on`.

    A data set is known by its content and settings; under other settings by its files, where documents of them may be
    in both splits; in files of another kind (packed otherwise, as CSV) by its first documents.
    """
    for reference in on:
        name, split = data.split_ref(reference)
        corpus = data.open_corpus(sets, name, root)
        fingerprints = {corpus.fingerprint, *(part.fingerprint for part, _ in corpus.parts)}
        read = contents(corpus, split)
        for model, folder in folders.items():
            for use in trained_on(folder):
                favoured = f"{model} was trained on {use.name}.{use.split}"
                why = "weights fitted on it would favour the model that knows it by heart; fit them on held-out text"
                if use.fingerprint in fingerprints and use.split == split:
                    raise CannotCombine(f"{favoured}: {why} ({use.name}.dev)")
                if any(seen.meets(asked) for seen in use.contents for asked in read):
                    raise CannotCombine(f"{favoured}, which is read from the same files as {reference}: {why}")
                if any(seen.repeats(asked) for seen in use.contents for asked in read):
                    raise CannotCombine(f"{favoured}, which holds documents of {reference}: {why}")


def trained_on(folder: Path) -> Iterator[DataUse]:
    """The data that went into a model's weights, its ancestors' included.

    From the manifests; a split named `dev` only chose among checkpoints. A model without a manifest gives nothing.
    """
    manifest = lineage.read_manifest(folder)
    if manifest is not None:
        yield from (use for use in manifest.data if use.split == "train")
        for parent in manifest.parents:
            yield from trained_on(folder / parent.path)
