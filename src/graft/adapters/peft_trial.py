"""A peft folder tried on the skeleton of its model, so that what cannot be read is told before anything runs."""

from __future__ import annotations

from pathlib import Path

from graft.adapters.trial import skeleton
from graft.errors import CheckpointError, RequestError
from graft.verb import Facts


def unreadable(folder: Path, model: Facts) -> list[str]:
    """Why the adapter in a peft folder cannot be put on this model: damaged files, a type that graft has no point for,
    another model; empty if nothing is known to speak against it."""
    from graft.adapters.peft_files import read_settings
    from graft.adapters.peft_format import adopt_peft

    try:
        if read_settings(folder).get("peft_type") == "XLORA":  # its experts lie elsewhere
            return []
        bare = skeleton(model.config) if model.config.get("architectures") else None
        if bare is not None:
            adopt_peft(bare, folder, "adapter")
    except (RequestError, CheckpointError) as error:
        return [str(error)]
    except (RuntimeError, NotImplementedError):  # a model that cannot be tried without weights is tried with them
        return []
    return []
