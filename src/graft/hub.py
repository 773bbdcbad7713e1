"""Models and data sets on the hub: brought here by their id, where the network is allowed, or found in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from graft.errors import RequestError

FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""What is taken of a model: weights, configuration, tokenizer; never pickles, never code."""

Kind = Literal["model", "dataset"]
WORDS: dict[Kind, str] = {"model": "model", "dataset": "data set"}
PAGES: dict[Kind, str] = {"model": "", "dataset": "datasets/"}
"""Where the pages of a kind lie, below the hub's address."""


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of the model `name` (ORG/NAME) at `revision` (None: main), downloaded where the cache lacks it.

    Raises RequestError where there is none, or none that may be had.
    """
    return snapshot(name, revision, FILES)


def snapshot(name: str, revision: str | None, files: Sequence[str], kind: Kind = "model") -> Path:
    """The folder, named by the commit, of what `files` stand for (globs) in the repository `name` at `revision`.

    Raises RequestError where there is none, or none that may be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision is not None else ""
        why = _why(error, name, kind)
        raise RequestError(f"{name}: expected a {WORDS[kind]} on the hub{at}, found none: {why}") from None


def whole(name: str, commit: str, kind: Kind = "model") -> Path | None:
    """The folder in this machine's cache of the repository `name` at `commit`, None unless all of it is there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type=kind, revision=commit, local_files_only=True))
    except OSError:
        return None


def _why(error: Exception, name: str, kind: Kind) -> str:
    """What the hub's error means to a person, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return "an id has the form ORG/NAME"
    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{PAGES[kind]}{name}"
        return f"its authors ask for consent first: give it on {page}, then `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such commit, tag or branch"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no {WORDS[kind]} of that name, or it is private: check the name, or `hf auth login`"
    if constants.HF_HUB_OFFLINE:
        return "it is not in this machine's cache, and HF_HUB_OFFLINE=1 forbids the network: unset that once to get it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it is not in this machine's cache, and the hub cannot be reached: check the connection"
    return str(error)
