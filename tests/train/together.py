"""Run as a script by every process that a launcher starts, several trainings: python together.py FOLDER CASES_JSON

Each case has a name, settings, and may have `stop`: the step in which its first attempt is killed, `width`: that of
the model, and `whole`: whether its loss must have all logits at once.
"""

import contextlib
import copy
import json
import sys
from pathlib import Path

import tiny
import torch
from accelerate import PartialState
from safetensors.torch import save_file


class StopsAt(tiny.ByteLoss):
    """Raises in call `stop` of a training step, in every process, as a kill would; never for 0."""

    def __init__(self, stop, whole):
        self.left, self.whole = stop, whole

    def __call__(self, model, batch):
        self.left -= model.training
        if self.left == 0 and model.training:
            raise tiny.Stops
        return super().__call__(model, batch)


def train_case(folder, given, stop=None, width=16, whole=False):
    """What tiny.train_into does, with a kill on the way; the model that comes out is what a plain one is."""
    fresh = tiny.tiny_model(width=width)
    dev = tiny.byte_rows(20, skip=100)
    if stop is not None:
        with contextlib.suppress(tiny.Stops):
            tiny.run(folder, given, model=copy.deepcopy(fresh), dev=dev, objective=StopsAt(stop, whole))
    result, trained = tiny.run(folder, given, model=copy.deepcopy(fresh), dev=dev, objective=StopsAt(0, whole))
    assert type(trained) is type(fresh)
    assert not any(vars(module).get("forward") for module in trained.modules())
    with torch.no_grad():
        outputs = trained(input_ids=torch.arange(5)[None]).logits
    if PartialState().is_main_process:
        held = {name: p.detach().contiguous() for name, p in trained.named_parameters()}
        save_file({**held, "outputs": outputs.contiguous()}, Path(folder) / "weights")
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState(cpu=True)
    for case in json.loads(sys.argv[2]):
        train_case(Path(sys.argv[1]) / case.pop("name"), **case)
