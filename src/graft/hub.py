"""Models on the hub: brought onto this machine by their id, where the network is allowed; or found in the cache."""

from __future__ import annotations

from pathlib import Path

from graft.errors import RequestError

FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""What is taken: weights, configuration, tokenizer; never pickles, never code."""


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of the model `name` (ORG/NAME) at `revision` (None: main), downloaded where the cache lacks it.

    Raises RequestError where there is none, or none that may be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision is not None else ""
        raise RequestError(f"{name}: expected a model on the hub{at}, found none: {_why(error, name)}") from None


def _why(error: Exception, name: str) -> str:
    """What the hub's error means to a person, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return "an id has the form ORG/NAME"
    if isinstance(error, errors.GatedRepoError):
        return f"its authors ask for consent first: give it on https://huggingface.co/{name}, then `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such commit, tag or branch"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no model of that name, or it is private: check the name, or `hf auth login`"
    if constants.HF_HUB_OFFLINE:
        return "it is not in this machine's cache, and HF_HUB_OFFLINE=1 forbids the network: unset that once to get it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it is not in this machine's cache, and the hub cannot be reached: check the connection"
    return str(error)
