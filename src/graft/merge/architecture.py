"""What a configuration says the weights must be: names and shapes of a model that is built without memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft import remembered
from graft.errors import CannotCombine, CheckpointError
from graft.fitting import Architecture, Shapes, architecture_of, misfits
from graft.folders import read_config
from graft.merge._derived import derived
from graft.models import Empty, load_config, made_empty, without_memory

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

KIND = "architectures"
"""Of what is kept."""


def empty_model(folder: Path, empty: Empty = without_memory) -> PreTrainedModel | None:
    """The model that `config.json` of `folder` names, without memory behind its weights; None where this
    `transformers` does not know it."""
    from transformers import CONFIG_MAPPING

    if read_config(folder).get("model_type") not in CONFIG_MAPPING:
        return None
    return made_empty(load_config(folder), empty)


def token_tensors(folder: Path) -> Shapes:
    """Tensors with a row (or an entry) for each token, which are those that change with the size of the vocabulary.

    Raises CannotCombine where this `transformers` does not know the architecture.
    """
    import copy

    if empty_model(folder) is None:
        raise CannotCombine(
            f"{folder}: this version of transformers does not know the model, nor which rows are tokens"
        )
    config = load_config(folder)
    larger = copy.deepcopy(config)
    text = larger.get_text_config()
    text.vocab_size += 1
    before, after = (_shapes(one) for one in (config, larger))
    return {name: shape for name, shape in before.items() if after.get(name) != shape}


def _shapes(config: PretrainedConfig) -> Shapes:
    return {name: tuple(value.shape) for name, value in made_empty(config).state_dict().items()}


def architecture(folder: Path) -> Architecture | None:
    """The architecture that `config.json` of `folder` names; None where this `transformers` does not know it."""
    return derived(read_config(folder)) or built(folder)


def built(folder: Path, empty: Empty = without_memory) -> Architecture | None:
    """The same, of a model that is built without memory."""
    model = empty_model(folder, empty)
    return None if model is None else architecture_of(model)


def meaning(config: Mapping[str, Any]) -> str:
    """What of a configuration decides names and shapes, as text: the same for all types of the weights."""
    left = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
    return json.dumps({key: value for key, value in config.items() if key not in left}, sort_keys=True)


class Building:
    """A process that builds an architecture. `answer()` waits for it."""

    def __init__(self, config: str):
        # what is imported stays until the end: there is no garbage worth looking for
        program = "import gc; gc.disable(); from graft.merge._building import main; main()"
        command = [sys.executable, "-c", program]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(config)
        self._process.stdin.close()
        self._process.stdin = None
        self._told: tuple[int, str] | None = None
        self._asking = threading.Lock()

    def answer(self) -> tuple[int, str]:
        """(exit status, what it said). From any thread."""
        with self._asking:
            if self._told is None:
                answer, _ = self._process.communicate()
                self._told = (self._process.returncode, answer)
            return self._told

    def close(self) -> None:
        """End the process where it still runs."""
        if self._told is None and self._process.poll() is None:
            self._process.kill()
            self.answer()


@lru_cache(maxsize=4)
def started(config: str) -> Building:
    """The process for a configuration (see `meaning`), started by the first who asks."""
    return Building(config)


def _by(config: str) -> str:
    """A configuration (see `meaning`) and who builds it, as text."""
    return f"{metadata.version('transformers')} {config}"


def begin(folder: Path, cache: Path) -> None:
    """Start to build the architecture of `folder`, which a merge will ask for, unless that is no work here."""
    said = read_config(folder)
    config = meaning(said)
    if (
        derived(said) is None
        and "transformers" not in sys.modules
        and remembered.recall(KIND, _by(config), cache) is None
    ):
        started(config)


class Check:
    """Builds the architecture of a folder beside other work, in a process of its own, where it is not derived.

    `transformers` takes seconds and hundreds of megabytes to import, which a merge has no other use for; where it is
    imported already, this process does it. What was found is kept, named by configuration and version: for all runs, or
    in `cache` where nothing is kept for all.
    """

    def __init__(self, folder: Path, cache: Path):
        self.folder = folder
        self.cache = cache
        config = read_config(folder)
        self._config, self._derived = meaning(config), derived(config)
        self._known = remembered.recall(KIND, _by(self._config), cache) if self._derived is None else None
        self._building: Building | None = None
        self._closed = False
        if self._derived is None and self._known is None and "transformers" not in sys.modules:
            self._building = started(self._config)

    def found(self) -> Architecture | None:
        """The architecture; waits for it. Raises CheckpointError where the configuration does not build a model."""
        if self._derived is not None:
            return self._derived
        if self._known is None:
            self._known = self._built()
            remembered.keep(KIND, _by(self._config), self._known, self.cache)
        plain = json.loads(self._known)
        if plain is None:
            return None
        shapes = {name: tuple(shape) for name, shape in plain["shapes"].items()}
        return Architecture(**plain | {"shapes": shapes, "computed": tuple(plain["computed"])})

    def _built(self) -> str:
        if self._building is not None:
            status, answer = self._building.answer()
            if not status:
                return answer.splitlines()[-1]
            if self._closed:
                raise CheckpointError(f"{self.folder}: nobody waits for what its configuration builds")
        # what the process could not build is tried once more with everything that is installed
        try:
            return described(self.folder)
        # whatever a library makes of a wrong configuration
        except Exception as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[-1].strip()
            raise CheckpointError(f"{self.folder}: the configuration does not build a model ({reason})") from error

    def close(self) -> None:
        """End the process where it still runs."""
        self._closed = True
        if self._building is not None:
            self._building.close()


def verify(made: Architecture | None, shapes: Shapes) -> str:
    """Check the tensors of the output against its architecture; returns what was checked, in words.

    Raises CheckpointError naming tensors that the architecture needs and that are missing or of another shape.
    """
    if made is None:
        return "not checked: this version of transformers does not know the architecture"
    if made.converted:
        return f"not checked by name: transformers converts the tensors of {made.name} while it loads them"
    if wrong := misfits(made, shapes):
        raise CheckpointError(f"the output would not fit {made.name}: {'; '.join(wrong)}")
    return made.name


def described(folder: Path, empty: Empty = without_memory) -> str:
    """The architecture that `config.json` of `folder` names, as JSON."""
    made = built(folder, empty)
    return json.dumps(made and asdict(made))
