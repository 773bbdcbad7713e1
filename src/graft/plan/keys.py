"""A node's key: the hash of all that makes it, known before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from graft.data import open_corpus, split_ref
from graft.data.contents import contents
from graft.lineage import DataUse, read_manifest
from graft.lineage import known_hash as weights_hash
from graft.recipe import Node, Recipe


def keys_of(recipe: Recipe, recorded: Mapping[str, str] | None = None) -> dict[str, str]:
    """The key of every model of the recipe and of every finished model it names.

    sha256 over verb, its version, resolved settings, seed, fingerprints of the data and keys of the parents.
    `recorded`: hashes that finished models were known by; they are taken as these were.
    """
    fingerprint = cache(lambda name: open_corpus(recipe.data, name, recipe.root).fingerprint)
    known = recorded or {}
    keys = {name: weights_hash(folder, known.get(name)) for name, folder in recipe.outside.items()}
    for name, node in recipe.models.items():
        made_of = {
            "verb": node.verb.name,
            "version": node.verb.version,
            "settings": node.verb.content(node.settings),
            "seed": node.seed,
            "data": [[*split_ref(ref), fingerprint(split_ref(ref)[0])] for ref in node.data],
            "parents": [keys[parent] for parent in node.models],
        }
        keys[name] = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return keys


def data_uses(recipe: Recipe, node: Node) -> list[DataUse]:
    """The splits that a node uses, with their fingerprints and the commits of what is read from the hub."""
    return [_data_use(recipe, *split_ref(ref)) for ref in node.data]


def _data_use(recipe: Recipe, name: str, split: str) -> DataUse:
    corpus = open_corpus(recipe.data, name, recipe.root)
    commits = {part.name: part.commit for part, _ in corpus.parts if part.commit is not None}
    read = contents(corpus, split)
    return DataUse(name=name, split=split, fingerprint=corpus.fingerprint, commits=commits, contents=read)


def recorded_parents(folder: Path) -> Mapping[str, str]:
    """Hashes of the parents at the time a model was made, by name; empty where it has no manifest."""
    manifest = read_manifest(folder)
    return {parent.name: parent.hash for parent in manifest.parents} if manifest else {}
