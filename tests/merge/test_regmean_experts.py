"""RegMean on mixtures of experts: each expert by the tokens that are sent to it, however the files hold them."""

import copy

import numpy as np
import pytest
import readers
import torch
import transformers as hf
from readers import LENGTH, job, text_rows
from small_family import tensors

from graft import models
from graft.merge import VERB
from graft.merge._experts import experts_of
from graft.merge._grams import Gatherer
from graft.merge._layers import Layers

SHAPE = {
    "vocab_size": 48, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "mixtral": hf.MixtralConfig(**SHAPE, num_local_experts=12, num_experts_per_tok=1),
    "qwen2_moe": hf.Qwen2MoeConfig(
        **SHAPE, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=4, num_experts_per_tok=2
    ),
    # kept as [experts, in, out], gate and up in turns, with biases
    "gpt_oss": hf.GptOssConfig(**SHAPE, head_dim=6, num_local_experts=3, num_experts_per_tok=1),
}
NAMES = ["low", "high"]
ON = {"low": "low.train", "high": "high.train"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind → two models near each other: name → folder."""
    made = {}
    for kind, config in KINDS.items():
        root = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        base = hf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        with torch.no_grad():
            for name, weight in base.named_parameters():
                # sharp routers send tokens to one expert or the other
                weight.mul_(20 if "mlp.gate" in name or "router" in name else 4)
        made[kind] = {}
        for name in NAMES:
            own = copy.deepcopy(base)
            with torch.no_grad():
                for weight in own.parameters():
                    weight.add_(0.02 * torch.randn_like(weight))
            made[kind][name] = readers.save(own, root / name)
    return made


@pytest.fixture
def run(reading_root, texts, tmp_path):
    def merge(settings, own, name="out"):
        raw = {"method": "regmean", "models": NAMES, "on": ON, "length": LENGTH, "alpha": 0.7} | settings
        notes = VERB.run(job(raw, own, texts, reading_root, tmp_path / name))["notes"]
        return models.load(tmp_path / name, dtype=torch.float32), notes

    return merge


def seen(model, kind):
    """By layer the hidden states and the chosen experts that its experts get on a kind of text, token by token."""
    found = {}
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            found[path] = []
            module.register_forward_pre_hook(lambda _, args, path=path: found[path].append((args[0], args[1])))
    with torch.no_grad():
        for row in text_rows(kind):
            model(input_ids=row[None])
    return {path: [torch.cat(side).detach() for side in zip(*each, strict=True)] for path, each in found.items()}


def between(experts, x, expert):
    """What an expert of Mixtral and Qwen makes of one token before its last matrix, float64."""
    weight = experts.gate_up_proj[expert].detach().double()
    gate, up = (weight @ x.double()).chunk(2)
    return torch.nn.functional.silu(gate) * up


def twin(folders, kind):
    """`{parameter: merged}` of all experts in float64, a token after the other."""
    loaded = [models.load(folders[kind][name], dtype=torch.float32) for name in NAMES]
    told = [seen(model, name) for model, name in zip(loaded, NAMES, strict=True)]
    made, reached = {}, []
    for path in told[0]:
        own = [model.get_submodule(path) for model in loaded]
        for name in ("gate_up_proj", "down_proj"):
            values = [getattr(experts, name).detach().double().numpy() for experts in own]
            merged = []
            for expert in range(len(values[0])):
                grams, counts = [], []
                for experts, each in zip(own, told, strict=True):
                    hidden, chosen = each[path]
                    total, count = np.zeros((values[0].shape[2],) * 2), 0
                    for x, to in zip(hidden, chosen, strict=True):
                        if expert in to.tolist():
                            given = (x if name == "gate_up_proj" else between(experts, x, expert)).double().numpy()
                            total += np.outer(given, given)
                            count += 1
                    grams.append(total / len(hidden))
                    counts.append(count)
                reached.append(tuple(counts))
                merged.append(solved([v[expert] for v in values], grams))
            made[f"{path}.{name}"] = np.stack(merged)
    return made, reached


def solved(values, grams):
    """The formula with the pull of the docs, directly: `(W̄ R + sum (W_m − W̄) G_m)`, R the pull, by an inverse."""
    scaled = [(0.7 * g + 0.3 * np.diag(np.diag(g))) / 2 for g in grams]
    mean = (values[0] + values[1]) / 2
    left = sum(scaled)
    left += np.diag(np.where(np.diag(left) <= 0, 1.0, 1e-4 * np.diag(left)))
    return mean + sum((v - mean) @ g for v, g in zip(values, scaled, strict=True)) @ np.linalg.inv(left)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_each_expert_is_regressed_on_the_tokens_that_are_sent_to_it(kind, folders, run):
    merged, notes = run({}, folders[kind])
    expected, reached = twin(folders, kind)
    assert any(0 in counts and max(counts) > 0 for counts in reached) or kind == "qwen2_moe"
    assert len(expected) == 4
    for name, value in expected.items():
        mean = sum(models.load(folders[kind][m]).get_parameter(name).detach().double().numpy() for m in NAMES) / 2
        off = np.abs(value - mean).max()
        assert off > 2e-3
        np.testing.assert_allclose(merged.get_parameter(name).detach().numpy(), value, atol=0.02 * off, err_msg=name)
    whole = tensors(folders[kind]["low"])
    linear = [n for n, t in whole.items() if t.dim() >= 2 and not any(w in n for w in ("embed", "gate.weight"))]
    linear += [n for n in whole if n.endswith(("shared_expert_gate.weight", "shared_expert.gate.weight"))]
    assert notes["merged_by_regression"] == len(set(linear))


def test_without_experts_they_are_averaged(folders, run):
    own = folders["mixtral"]
    merged, _ = run({"experts": False}, own)
    a, b = (models.load(own[name], dtype=torch.float32) for name in NAMES)
    for name in experts_of(merged):
        mean = (a.get_parameter(name) + b.get_parameter(name)) / 2
        torch.testing.assert_close(merged.get_parameter(name), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_fits_the_outputs_of_each_models_experts_better_than_the_mean(kind, method, folders, run):
    """On the tokens that either model sends to them; also where gate and up alternate and there are biases."""
    own = folders[kind]
    merged, _ = run({"method": method, "alpha": 1.0}, own)
    loaded = [models.load(own[name], dtype=torch.float32) for name in NAMES]
    mean = copy.deepcopy(loaded[0])
    with torch.no_grad():
        for parameter, other in zip(mean.parameters(), loaded[1].parameters(), strict=True):
            parameter.copy_((parameter + other) / 2)
    path = next(path for path, _ in mean.named_modules() if path.endswith("0.mlp.experts"))
    errors = {"merged": 0.0, "mean": 0.0}
    for model, name in zip(loaded, NAMES, strict=True):
        hidden, chosen = seen(copy.deepcopy(model), name)[path]
        weights = torch.ones(chosen.shape) / chosen.shape[1]
        with torch.no_grad():
            target = model.get_submodule(path)(hidden, chosen, weights)
            for which, made in (("merged", merged), ("mean", mean)):
                errors[which] += float((made.get_submodule(path)(hidden, chosen, weights) - target).square().sum())
    assert errors["merged"] < 0.9 * errors["mean"]


def test_experts_stored_together_merge_as_those_stored_one_by_one(folders, run, tmp_path):
    """Of gpt_oss the files hold the parameters as they are; the first matrices are [experts, in, out]."""
    own = folders["gpt_oss"]
    merged, _ = run({}, own)
    a, b = (models.load(own[name], dtype=torch.float32) for name in NAMES)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    hidden, chosen = seen(models.load(own["low"], dtype=torch.float32), "low")["model.layers.0.mlp.experts"]
    others = seen(models.load(own["high"], dtype=torch.float32), "high")["model.layers.0.mlp.experts"]
    for expert in range(3):
        grams = []
        for x, to in ((hidden, chosen), others):
            given = x[(to == expert).any(-1)].double().numpy()
            grams.append(given.T @ given / len(x))
        values = [m.get_parameter(name)[expert].detach().double().numpy().T for m in (a, b)]
        np.testing.assert_allclose(
            merged.get_parameter(name)[expert].detach().numpy().T, solved(values, grams), rtol=2e-2, atol=2e-3
        )


def test_one_model_alone_is_that_model(folders, run):
    own = folders["mixtral"]
    merged, _ = run({"models": ["low"], "on": "low.train"}, own)
    for name, value in models.load(own["low"], dtype=torch.float32).named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), value, rtol=1e-5, atol=1e-5)


def test_padding_is_sent_to_no_expert():
    model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(KINDS["mixtral"])).eval()
    layer = "model.layers.0.mlp.experts.gate_up_proj"
    experts = model.get_submodule("model.layers.0.mlp.experts")
    gatherer = Gatherer(mask=torch.tensor([[True, True, False], [True, False, False]]))
    hidden = torch.randn(6, 12)
    gatherer.add_experts(layer, experts, hidden, torch.tensor([[0], [1], [0], [0], [1], [2]]))
    sums = gatherer.means()[layer]
    expected = [hidden[[0, 3]], hidden[[1]], *[hidden[:0]] * 10]
    for found, given in zip(sums, expected, strict=True):
        torch.testing.assert_close(found, given.T @ given / 3)


def test_experts_are_known_by_their_modules():
    for kind, config in KINDS.items():
        with torch.device("meta"):
            model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(config))
        found = Layers.of(model).experts
        assert len(found) == 4, kind
        first = found["model.layers.1.mlp.experts.gate_up_proj"]
        assert (first.inputs, first.transposed) == (12, kind == "gpt_oss")
