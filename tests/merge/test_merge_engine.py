import pytest
import torch
from small_family import family, merge, tensors

from graft.models import load, load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return family(tmp_path_factory.mktemp("family"))


def test_a_soup_is_the_weighted_mean_and_loads(folders, tmp_path):
    out, found = merge({"method": "linear", "models": {"a": 1, "b": 3}}, folders, tmp_path / "soup")
    a, b = tensors(folders["a"]), tensors(folders["b"])
    assert out.keys() == a.keys()
    for name in out:
        torch.testing.assert_close(out[name], 0.25 * a[name] + 0.75 * b[name], rtol=1e-6, atol=1e-7)
    assert load(tmp_path / "soup").num_parameters() == load(folders["a"]).num_parameters()
    assert load_tokenizer(tmp_path / "soup").get_vocab() == load_tokenizer(folders["a"]).get_vocab()
    assert found["notes"]["verified_as"] == "LlamaForCausalLM"
