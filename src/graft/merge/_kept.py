"""What was measured before a merge, kept in the scratch under what decided it: for a run that was killed, for a search.

The candidates of a search have scratch folders inside that of the merge, and find there what was measured for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.checkpoint import TensorReader
from graft.disk import atomic_folder
from graft.merge.inputs import inputs
from graft.merge.settings import MergeSettings
from graft.verb import Job

if TYPE_CHECKING:
    from torch import Tensor

    from graft.merge.stream import Source

MARK = "made_of.json"


class Measured:
    """Tensors that were measured for every model, of the names and shapes of its own, in a folder for each."""

    def __init__(self, folders: Mapping[str, Path]):
        self._readers = {name: TensorReader(folder) for name, folder in folders.items()}

    def read(self, source: Source, start: int, count: int) -> Tensor:
        """`count` values for a model's tensor from element `start`: flat, float32."""
        return self._readers[source.model].read(source.name, start, count).float()

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()


def rooms(job: Job) -> tuple[Path, Path]:
    """Where a job's measurements may lie: its own scratch, and that of the search whose candidate it is."""
    return job.scratch, job.scratch.parent


def kept(job: Job, place: str, made_of: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder `place` of a job's scratch, filled by `make`, unless it holds what came of the same things already."""
    plain = json.dumps(made_of, sort_keys=True)
    for room in rooms(job):
        mark = room / place / MARK
        if mark.is_file() and mark.read_text() == plain:
            return mark.parent
    with atomic_folder(job.scratch / place) as part:
        make(part)
        (part / MARK).write_text(plain)
    return job.scratch / place


def made_of(job: Job, settings: MergeSettings, models: Sequence[str], **more: Any) -> dict[str, Any]:
    """What decides a measurement: the weights of some parents, the seed, and `more`, of the settings only what matters.

    What is left out may vary between the candidates of a search, which then share the measurement.
    """
    from graft.merge.engine import stamps

    # what an adapter stands on
    homes = {name: parent.home for name, parent in inputs(settings, job.models).items() if name in models}
    folders = {name: job.models[name] for name in models}
    return {"method": settings.method, "seed": job.seed, "parents": stamps(folders), "homes": stamps(homes), **more}
