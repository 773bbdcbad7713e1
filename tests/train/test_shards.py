"""Two processes that hold parameters in parts meet, whatever each of them has gradients of."""

import apart
import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def found(tmp_path_factory, beside):
    """What both found."""
    folder = tmp_path_factory.mktemp("apart")
    beside.together(apart.__file__, folder)
    return [load_file(folder / rank) for rank in "01"]


def test_both_find_the_norm_of_what_either_has_a_gradient_of(found):
    a, b, c, d = (g.double().square() for g in apart.tensors(1).values())
    half = c.sum() / 2  # each has a copy
    wanted = {
        "both": a.sum() + b.sum() + c.sum() + d,
        "first": a[:3].sum() + b[:2].sum() + half + d / 2,
        "none": torch.zeros(()),
        "others": a[:3].sum() + half + b[2:].sum(),
    }
    assert wanted.keys() == apart.WHERE.keys()
    for case, square in wanted.items():
        for process in found:
            torch.testing.assert_close(process[f"norm, {case}"].double(), square.double().sqrt(), rtol=1e-5, atol=0)


def test_a_gradient_that_one_process_lacks_is_zero_there(found):
    """Both then have the same moments to gather, and weights that nobody reaches stay as they are."""
    parameters = {name: tensor.requires_grad_() for name, tensor in apart.tensors(0).items()}
    gradients = apart.tensors(1)
    gradients["a"][3:] = gradients["b"][2:] = 0
    gradients["d"] /= 2  # a mean over the processes
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(2):
        for name in "abd":
            parameters[name].grad = gradients[name].clone()
        optimizer.step()
    states = {f"{number}.{name}": value for number, state in optimizer.state_dict()["state"].items()
              for name, value in state.items()}  # fmt: skip
    wanted = {**states, **{name: parameter.detach() for name, parameter in parameters.items()}}
    assert sorted({name[0] for name in states}) == ["0", "1", "3"]
    for process in found:
        own = {name: tensor for name, tensor in process.items() if not name.startswith("norm")}
        assert own.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(own[name], tensor, rtol=1e-5, atol=1e-7)
