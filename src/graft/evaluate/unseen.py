"""Whether models have been trained on what they are to be judged by, as far as their manifests tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft import data, lineage
from graft.errors import CannotCombine


def check_unseen(folders: Mapping[str, Path], on: Sequence[str], sets: Mapping[str, Any], root: Path) -> None:
    """Raises CannotCombine where a model, or one that it was made from, was trained on one of the data sets `on`."""
    for reference in on:
        name, split = data.split_ref(reference)
        corpus = data.open_corpus(sets, name, root)
        fingerprints = [corpus.fingerprint, *(part.fingerprint for part, _ in corpus.parts)]
        for model, folder in folders.items():
            trained = trained_on(folder)
            for seen in (trained[f, split] for f in fingerprints if (f, split) in trained):
                raise CannotCombine(
                    f"{model} was trained on {seen}.{split}: weights fitted on it would favour the model that knows it "
                    f"by heart; fit them on held-out text ({seen}.dev)"
                )


def trained_on(folder: Path) -> dict[tuple[str, str], str]:
    """(fingerprint, split) of the data that went into a model's weights, its ancestors' included, with its name.

    From the manifests; a split named `dev` only chose among checkpoints. A model without a manifest gives nothing.
    """
    manifest = lineage.read_manifest(folder)
    if manifest is None:
        return {}
    found = {(use.fingerprint, use.split): use.name for use in manifest.data if use.split == "train"}
    for parent in manifest.parents:
        found |= trained_on(folder / parent.path)
    return found
