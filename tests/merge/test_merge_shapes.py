"""Tensors of all shapes: numbers alone, tensors without elements, and matrices that are vectors."""

import pytest
import torch
from streaming import streamed

from graft.merge import VERB

SHAPES = {
    "number": (),
    "empty": (0, 3),
    "none": (3, 0),
    "one": (1,),
    "column": (5, 1),
    "row": (1, 5),
    "three": (2, 3, 4),
}
TWO, BASE = {"models": ["a", "b"]}, {"base": "base", "models": ["a", "b"]}
ALONE = {"nearswap": {"t": 0.1}, "arcee_fusion": {}}
WITHOUT_BASE = ("linear", "uniform_soup", "slerp", "nuslerp", "multislerp", "karcher")
ELSEWHERE = (
    "passthrough", "fisher", "regmean", "regmean_plus", "adamerging", "greedy_soup", "learned_soup", "checkpoints",
    "rebasin", "extract_lora", "add_adapters",
)  # fmt: skip
"""Methods of no arithmetic of their own on a tensor, or that read models whole."""


@pytest.mark.parametrize("name", sorted(VERB.types().keys() - set(ELSEWHERE)))
@pytest.mark.parametrize("same", [False, True])
def test_tensors_of_all_shapes_are_merged(name, same, tmp_path):
    draw = torch.Generator().manual_seed(0)
    parents = {m: {n: torch.randn(shape, generator=draw) for n, shape in SHAPES.items()} for m in ("base", "a", "b")}
    if same:
        parents = dict.fromkeys(parents, parents["base"])
    options = TWO if name in WITHOUT_BASE else BASE | ({"models": ["a"]} if name in ALONE else {})
    made = streamed({"method": name} | options | ALONE.get(name, {}), parents, tmp_path)
    assert {n: tuple(t.shape) for n, t in made.items()} == SHAPES
    for tensor, value in made.items():
        assert torch.isfinite(value).all(), tensor
        if same:
            torch.testing.assert_close(value, parents["base"][tensor], rtol=1e-5, atol=1e-6)
