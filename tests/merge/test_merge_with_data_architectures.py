"""Methods that read data, or look at matrices, on models whose files hold something else than their parameters."""

import copy

import numpy as np
import pytest
import readers
import subspace_twins
import torch
import transformers as hf
from readers import job
from small_family import tensors

from graft import models
from graft.merge import VERB
from graft.merge._layers import Layers

SHAPE = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "experts in one parameter": hf.MixtralConfig(**SHAPE, num_key_value_heads=1, num_local_experts=2),
    "a name that has changed": hf.GPTNeoXConfig(**SHAPE, max_position_embeddings=32),
    "a recurrent state": hf.MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2, state_size=4),
    "windows of attention": hf.Gemma3TextConfig(**SHAPE, num_key_value_heads=1, head_dim=8, sliding_window=8),
}
READING = {
    "fisher": {},
    "regmean": {},
    "regmean_plus": {},
    "adamerging": {"base": "base", "steps": 2, "learning_rate": 0.1},
    "localize_and_stitch": {"base": "base", "steps": 2, "density": 0.3, "learning_rate": 1e5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind → base, a and b, close to each other: name → folder."""
    made = {}
    for kind, config in KINDS.items():
        root = tmp_path_factory.mktemp("kind")
        torch.manual_seed(0)
        base = hf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        made[kind] = {"base": readers.save(base, root / "base")}
        for name in "ab":
            own = copy.deepcopy(base)
            with torch.no_grad():
                for weight in own.parameters():
                    weight.add_(0.01 * torch.randn_like(weight))
            made[kind][name] = readers.save(own, root / name)
    return made


def merge(settings, folders, reading_root, texts, out):
    more = {} if "tsv" in settings["method"] else {"on": "all", "length": 17, "tokens": 170}
    VERB.run(job({"models": ["a", "b"]} | more | settings, folders, texts, reading_root, out))
    return models.load(out, dtype=torch.float32)


def parameters(folder):
    return {name: p.detach().double() for name, p in models.load(folder, dtype=torch.float32).named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", READING)
def test_every_method_merges_every_kind_of_model(method, kind, folders, reading_root, texts, tmp_path):
    own = folders[kind]
    merged = merge({"method": method} | READING[method], own, reading_root, texts, tmp_path / "out")
    a, b = parameters(own["a"]), parameters(own["b"])
    equal = {name: (a[name] + b[name]) / 2 for name in a}
    off = max(float((p.double() - equal[name]).abs().max()) for name, p in merged.named_parameters())
    assert 1e-5 < off < 0.2


@pytest.mark.parametrize("kind", ["experts in one parameter", "a name that has changed"])
def test_lambdas_of_converted_models_are_those_of_their_parameters(kind, folders, reading_root, texts, tmp_path):
    own = folders[kind]
    settings = {"method": "adamerging", "steps": 0, "start": 0.3, "base": "base"}
    merged = merge(settings, own, reading_root, texts, tmp_path / "out")
    base, a, b = (parameters(own[name]) for name in ("base", "a", "b"))
    for name, p in merged.named_parameters():
        torch.testing.assert_close(
            p.double(), base[name] + 0.3 * (a[name] + b[name] - 2 * base[name]), rtol=0, atol=1e-6
        )


def test_fisher_information_of_experts_is_put_where_their_weights_are(folders, reading_root, texts, tmp_path):
    """Where one model is far more certain of a weight than the other, the merge has that model's."""
    own = folders["experts in one parameter"]
    made = job({"method": "fisher", "models": ["a", "b"], "on": "all", "length": 17, "floor": 1e-9}, own, texts,
               reading_root, tmp_path / "out")  # fmt: skip
    VERB.run(made)
    import data_twins

    from graft.merge._reading import rows_for

    model = models.load(own["a"], dtype=torch.float32)
    rows = rows_for(made, made.settings, model, "a")
    read = [torch.from_numpy(rows[i]["input_ids"]) for i in range(len(rows))]
    found = {name: data_twins.fisher(models.load(own[name], dtype=torch.float32), read) for name in "ab"}
    scaled = {m: {n: f / np.concatenate([x.ravel() for x in each.values()]).mean() for n, f in each.items()}
              for m, each in found.items()}  # fmt: skip
    weights = {m: {n: np.maximum(f, 1e-9) for n, f in each.items()} for m, each in scaled.items()}
    a, b = parameters(own["a"]), parameters(own["b"])
    merged = models.load(tmp_path / "out", dtype=torch.float32)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    expected = weights["a"][name] * a[name].numpy() + weights["b"][name] * b[name].numpy()
    expected /= weights["a"][name] + weights["b"][name]
    np.testing.assert_allclose(merged.get_parameter(name).detach().numpy(), expected, rtol=1e-2, atol=2e-4)


def test_experts_are_matrices_of_their_own(folders, reading_root, texts, tmp_path):
    own = folders["experts in one parameter"]
    merge({"method": "tsv_merge", "base": "base"}, own, reading_root, texts, tmp_path / "out")
    stored = {name: tensors(folder) for name, folder in own.items()}
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    base = stored["base"][name].double().numpy()
    deltas = [stored[m][name].double().numpy() - base for m in "ab"]
    made = tensors(tmp_path / "out")[name].double().numpy() - base
    np.testing.assert_allclose(made, subspace_twins.tsv(deltas), rtol=1e-3, atol=1e-5)


def test_what_is_stored_is_known_by_the_parameter_that_it_is_a_part_of():
    layers = Layers.of(hf.MixtralForCausalLM(KINDS["experts in one parameter"]))
    stored = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    assert layers.parameter(stored) == "model.layers.0.mlp.experts.gate_up_proj"
    assert layers.transposed(stored) is None
    assert layers.parameter("nothing") is None
