"""The verb `load`: brings a finished model into the family, from a folder or, where that is allowed, from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from graft.adapters.facts import adapted_base, adapter_of_head, place_base
from graft.errors import CheckpointError, RequestError
from graft.hub import fetch
from graft.lora import base_folder, is_lora, name_base
from graft.machine import cores
from graft.settings import Settings, parse
from graft.train.memory import PROCESS
from graft.verb import Estimate, Facts, Job, Verb

CHECKED_AT_ONCE = 20 << 20
"""Bytes that a thread holds while it looks for NaN and Inf: a piece of a tensor and what is found in it."""


class LoadSettings(Settings):
    """A finished model: `{load: ./folder}`, or with settings `{load: {path: ORG/NAME, hub: true}}`."""

    path: Annotated[str, Field(description="A model's folder, relative to the recipe's, or an id on the hub.")]
    hub: Annotated[bool, Field(description="Allow the network: `path` is an id on the hub.")] = False
    revision: Annotated[str | None, Field(description="Commit, tag or branch on the hub.")] = None


class Load(Verb[LoadSettings]):
    """Copies a finished model into the family."""

    name = "load"
    summary = "Bring in a model that is there already: a folder in Hugging Face form, or a model on the hub."
    comes_first = True

    def types(self) -> Mapping[str, type[Settings]]:
        return {"load": LoadSettings}

    def parse(self, raw: Any, path: tuple[str | int, ...] = ()) -> LoadSettings:
        return parse(LoadSettings, {"path": raw} if isinstance(raw, str) else raw, path)

    def located(self, settings: LoadSettings, root: Path) -> LoadSettings:
        if settings.hub:
            return settings
        if settings.revision is not None:
            raise RequestError("`revision` names a commit on the hub: expected `hub: true` beside it")
        folder = (root / Path(settings.path).expanduser()).resolve()
        if not (folder / "config.json").is_file() and not is_lora(folder):
            from graft.models import nearest_folder

            id_ = f"; for a model on the hub write {{load: {{path: {settings.path}, hub: true}}}}"
            may_be_id = settings.path.count("/") <= 1 and not settings.path.startswith((".", "/", "~"))
            raise RequestError(
                f"expected a model's folder (with config.json) at {folder}, found none{nearest_folder(folder)}"
                f"{id_ if may_be_id else ''}"
            )
        if (adapter := adapter_of_head(folder)) is not None:
            raise RequestError(
                f"{folder} is a head beside an adapter, which cannot stand alone: expected the adapter's folder "
                f"({adapter.resolve()}), whose heads come along"
            )
        return settings.model_copy(update={"path": str(folder)})

    def content(self, settings: LoadSettings) -> Any:
        from graft.lineage import hash_model

        # a key that changes would have all that was trained on the copy made anew
        return {"weights": hash_model(fetched(settings), "sha256"), "files": _hashes(fetched(settings))}

    def facts(self, settings: LoadSettings, models: Mapping[str, Facts], key: str) -> Facts:
        from graft.facts import facts_of

        return facts_of(fetched(settings))

    def check(self, settings: LoadSettings, models: Mapping[str, Facts]) -> list[str]:
        from graft.models import check_stored

        try:
            check_stored(fetched(settings))
        except (RequestError, CheckpointError) as error:
            return [str(error)]
        return []

    def estimate(self, settings: LoadSettings, models: Mapping[str, Facts]) -> Estimate:
        facts, copied = self.facts(settings, models, ""), _copied_bytes(fetched(settings))
        size = facts.bytes if copied is None else copied
        read = min(size, CHECKED_AT_ONCE * cores())
        return Estimate(facts.parameters, size, PROCESS + read, size / 5e8, "looked through and copied")

    def run(self, job: Job) -> dict[str, Any]:
        """Copy the model's files, so that the artifact stays what it is when the original changes."""
        from graft.checkpoint import copy_model, read_headers
        from graft.disk import disk_errors
        from graft.finite import check_folder, check_weights
        from graft.models import check_fit

        assert isinstance(job.settings, LoadSettings)
        folder = fetched(job.settings)
        base = adapted_base(folder)
        if base is not None:
            check_folder(folder)
        elif any(folder.glob("*.safetensors")):
            check_fit(folder, read_headers(folder))
            check_weights(folder)
        with disk_errors(job.out):
            copy_model(folder, job.out, ["graft.json", "checkpoints", ".*"])
        if is_lora(job.out):
            name_base(job.out, base_folder(folder))
        if base is not None:
            place_base(job.out, base, job.target or job.out)
        return {"notes": {"loaded_from": str(folder)}}


def fetched(settings: LoadSettings) -> Path:
    """Where the model lies; downloaded first where it is on the hub. Raises RequestError where the hub has none."""
    return fetch(settings.path, settings.revision) if settings.hub else Path(settings.path)


def _copied_bytes(folder: Path) -> int | None:
    """Size of the weights in the folder itself, where a model is loaded from other folders as well; else None."""
    from graft.folders import parts_of

    if not parts_of(folder):
        return None
    files = (path for path in folder.rglob("*.safetensors") if "checkpoints" not in path.relative_to(folder).parts)
    return sum(path.stat().st_size for path in files)


def _hashes(folder: Path) -> dict[str, str]:
    """Hashes of the small files that decide what the weights compute."""
    from graft.hashing import hash_file

    names = ("config.json", "tokenizer.json", "generation_config.json")
    return {name: hash_file(folder / name) for name in names if (folder / name).is_file()}


VERB = Load()
