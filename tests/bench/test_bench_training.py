"""What bench/_trainings.py compares: whole trainings that are at the same work, and none that are not."""

import math
from importlib import import_module

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORK = {"trained": 7, "type": "{torch.float32}", "first_loss": 8.388241, "threads": 4}


@pytest.fixture
def trainings():
    return import_module("_trainings")


def small():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=512, **shape))


def test_all_sides_begin_with_the_same_rows_and_weights(trainings):
    peer = import_module("_training_peer")
    sides = {
        "graft": trainings.ours(small(), 3, 2), "bare": peer.bare(3, 2, small), "Trainer": peer.trainer(3, 2, small),
    }  # fmt: skip
    trainings.check_work({name: figures["work"] for name, figures in sides.items()})
    assert sides["graft"]["work"]["trained"] == sum(p.numel() for p in small().parameters())


def test_work_is_the_same_up_to_the_order_of_sums(trainings):
    trainings.check_work({"graft": WORK, "peer": {**WORK, "first_loss": 8.388244}, "another": WORK})


@pytest.mark.parametrize(
    "other",
    [
        {"trained": 8}, {"type": "{torch.bfloat16}"}, {"threads": 2}, {"first_loss": 8.383625}, {"first_loss": None},
        {"first_loss": math.nan},
    ],
    ids=lambda other: "-".join(f"{key} {value}" for key, value in other.items()),
)  # fmt: skip
def test_other_work_is_told_and_not_compared(trainings, other):
    with pytest.raises(SystemExit, match=r"expected the same work, found graft at .* and peer at "):
        trainings.check_work({"graft": WORK, "equal": WORK, "peer": {**WORK, **other}})
    with pytest.raises(SystemExit, match="expected the same work"):
        trainings.check_work({"graft": {**WORK, **other}, "peer": WORK})


def test_rows_in_another_order_are_other_work(trainings):
    peer = import_module("_training_peer")
    works = {"bare": peer.bare(2, 2, small)["work"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "IN_ORDER", "random")
        works["Trainer"] = peer.trainer(2, 2, small)["work"]
    with pytest.raises(SystemExit, match="expected the same work, found bare"):
        trainings.check_work(works)


def test_a_training_without_a_step_that_counts_is_refused():
    clock = import_module("_training_peer").Clock()
    clock.tick()
    with pytest.raises(SystemExit, match="train for more steps"):
        clock.figures(2, small())
