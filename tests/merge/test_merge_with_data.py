"""Methods that read data against their twins, on models that have learned something; what a killed merge leaves."""

import json
import shutil

import data_twins as twins
import numpy as np
import pytest
import readers
import torch
from readers import KINDS, job, losses, save
from safetensors.torch import load_file, save_file
from small_family import tensors
from streaming import relatives, streamed
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import graft
import graft.merge._adamerging as adamerging
import graft.merge._fisher as fisher
import graft.merge._grams as grams
import graft.merge._localizing as localizing
import graft.merge._through as through
import graft.merge.stream
from graft import models
from graft.errors import CannotCombine, SettingsError
from graft.merge import VERB
from graft.merge._composed import Composed
from graft.merge._layers import Layers
from graft.merge.adamerging import entropy
from graft.merge.fisher import fisher_mean
from graft.merge.regmean import regression_mean
from graft.verb import Facts

NAMES = list(KINDS)
ON = {kind: f"{kind}.train" for kind in KINDS}
LENGTH = readers.LENGTH + 1
"""Every text with its end token is a row."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("readers")


@pytest.fixture(scope="module")
def data(root):
    return readers.write_data(root)


@pytest.fixture(scope="module")
def folders(root):
    return readers.family(root / "models")


@pytest.fixture
def merged(root, data, folders, tmp_path):
    """merged(settings, name="out") → (tensors of the output, the notes, its folder)."""

    def run(settings, name="out", own=folders):
        raw = {"models": NAMES, "length": LENGTH} | settings
        raw = {key: value for key, value in raw.items() if value is not None}
        found = VERB.run(job(raw, own, data, root, tmp_path / name))
        return tensors(tmp_path / name), found["notes"], tmp_path / name

    return run


def text_rows(kind):
    """The rows that are read for a kind: texts with their end, in any order."""
    return [torch.tensor([*readers.line(kind, start), 2]) for start in range(12)]


def mean(folders, name):
    return sum(tensors(folders[kind])[name].double().numpy() for kind in KINDS) / len(KINDS)


# fisher


def test_the_mean_weighed_by_fisher_information_is_its_formula():
    draw = np.random.default_rng(0)
    values, informations = draw.normal(size=(3, 7)), draw.exponential(size=(3, 7))
    informations[:, 2] = 0
    held = np.maximum(informations, 1e-3) * np.array([0.5, 1, 2])[:, None]
    made = fisher_mean(*([torch.tensor(x).float() for x in each] for each in (values, informations)), [0.5, 1, 2], 1e-3)
    np.testing.assert_allclose(made.numpy(), (held * values).sum(0) / held.sum(0), rtol=1e-5)


def test_fisher_information_is_the_mean_square_of_the_gradients_of_rows(folders):
    model = models.load(folders["low"], dtype=torch.float32)
    read = [{"input_ids": row[None], "labels": row[None].clone()} for row in text_rows("low")[:4]]
    found = fisher.diagonal(model, read, "data", 0, 100)
    for name, expected in twins.fisher(model, text_rows("low")[:4]).items():
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=2e-3, atol=1e-9, err_msg=name)


def test_tokens_that_the_model_draws_give_the_exact_fisher_information_on_average():
    model = tiny()
    row = torch.tensor([3, 1, 4, 1, 5, 2])
    exact = twins.exact_fisher(model, row)
    read = [{"input_ids": row[None], "labels": row[None].clone()}] * 200
    drawn = fisher.diagonal(model, read, "sampled", 1, 1)
    again = fisher.diagonal(model, read, "sampled", 1, 1)
    other = fisher.diagonal(model, read, "data", 1, 1)
    whole = sum(e.sum() for e in exact.values())
    # 200 draws of a quantity about as wide as it is large: a standard deviation of 7 % or so
    assert sum(float(d.sum()) for d in drawn.values()) == pytest.approx(whole, rel=0.25)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert abs(sum(float(d.sum()) for d in other.values()) / whole - 1) > 0.3


def tiny():
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=6, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("normalise", [True, False])
def test_fisher_merging_is_its_formula(normalise, merged, folders):
    settings = {"method": "fisher", "on": ON, "normalise": normalise, "floor": 1e-2}
    made, notes, _ = merged(settings | {"models": {"low": 1.0, "middle": 0.5, "high": 2.0}})
    found = {kind: twins.fisher(models.load(folders[kind], dtype=torch.float32), text_rows(kind)) for kind in KINDS}
    means = {kind: np.mean(np.concatenate([f.ravel() for f in each.values()])) for kind, each in found.items()}
    assert notes["mean_fisher_information"] == pytest.approx(means, rel=1e-3)
    whole = np.mean(list(means.values()))
    for name, value in made.items():
        weights = [
            w * np.maximum(found[kind][name] / (means[kind] if normalise else whole), 1e-2)
            for kind, w in zip(KINDS, (1.0, 0.5, 2.0), strict=True)
        ]
        values = [tensors(folders[kind])[name].double().numpy() for kind in KINDS]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        np.testing.assert_allclose(value.numpy(), expected, rtol=2e-3, atol=2e-5, err_msg=name)


def test_a_floor_that_nothing_reaches_makes_fisher_merging_the_mean(merged, folders):
    made, _, _ = merged({"method": "fisher", "on": "all", "floor": 1e12})
    for name, value in made.items():
        np.testing.assert_allclose(value.numpy(), mean(folders, name), rtol=1e-5, atol=1e-6)


# regmean


def test_the_regression_is_its_formula():
    draw = np.random.default_rng(0)
    values = draw.normal(size=(3, 5, 4))
    inputs = [draw.normal(size=(20, 4)) for _ in range(3)]
    found = [twins.gram(x) for x in inputs]
    made = regression_mean(*([torch.tensor(x).float() for x in each] for each in (values, found)), [1, 2, 0.5], 0.7)
    np.testing.assert_allclose(made.numpy(), twins.regmean(values, found, [1, 2, 0.5], 0.7), rtol=1e-4, atol=1e-5)


def test_gram_matrices_that_are_alike_and_diagonal_give_the_weighted_mean():
    values = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    made = regression_mean(values, [torch.eye(4)] * 2, [1, 3], 1.0)
    torch.testing.assert_close(made, (values[0] + 3 * values[1]) / 4, rtol=1e-5, atol=1e-6)


def test_equal_models_come_back_whatever_their_inputs_and_dead_inputs_keep_the_mean():
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(5, 4, generator=draw), torch.randn(5, 4, generator=draw)
    x, y = torch.randn(9, 4, generator=draw), torch.randn(2, 4, generator=draw)
    found = [x.T @ x, y.T @ y]
    torch.testing.assert_close(regression_mean([one, one], found, [1, 1], 1.0), one, rtol=1e-5, atol=1e-5)
    for gram in found:
        gram[2], gram[:, 2] = 0, 0
    made = regression_mean([one, other], found, [1, 1], 0.9)
    torch.testing.assert_close(made[:, 2], (one[:, 2] + other[:, 2]) / 2, rtol=1e-5, atol=1e-6)


def linear_layers():
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return [f"model.layers.{i}.{part}" for i in range(2) for part in parts]


@pytest.mark.parametrize("budget", [2 << 30, 4 * 24 * 24 * 3])
def test_regmean_is_its_formula_however_many_passes_it_takes(budget, merged, folders, monkeypatch):
    monkeypatch.setattr(grams, "BUDGET", budget)
    made, notes, folder = merged({"method": "regmean", "on": ON, "models": {"low": 1, "middle": 2, "high": 1}})
    assert notes["merged_by_regression"] == 15
    passes = len(list((folder.parent / "out.scratch" / "grams").iterdir())) / 3
    assert passes == 1 if budget > 10**6 else passes > 4
    loaded = [models.load(folders[kind], dtype=torch.float32) for kind in KINDS]
    for layer in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        found = [twins.gram(twins.inputs_of(m, layer, text_rows(k))) for m, k in zip(loaded, KINDS, strict=True)]
        values = [m.get_submodule(layer).weight.detach().double().numpy() for m in loaded]
        expected = twins.regmean(values, found, [1, 2, 1], 0.9)
        np.testing.assert_allclose(made[f"{layer}.weight"].numpy(), expected, rtol=1e-2, atol=2e-3, err_msg=layer)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        values = [tensors(folders[kind])[name].double().numpy() for kind in KINDS]
        np.testing.assert_allclose(made[name], (values[0] + 2 * values[1] + values[2]) / 4, rtol=1e-5, atol=1e-6)


def test_layers_that_get_the_same_input_share_a_gram_matrix(merged):
    _, _, folder = merged({"method": "regmean", "on": ON})
    part = folder.parent / "out.scratch" / "grams" / "0-0"
    places = {name: leader for name, (leader, _) in json.loads((part / "grams.json").read_text()).items()}
    assert len(load_file(part / "model.safetensors")) == 9
    assert {places[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkv"} == {
        "model.layers.0.self_attn.q_proj.weight"
    }


def test_padding_is_no_input():
    gatherer = grams.Gatherer(mask=torch.tensor([[True, True, False]]))
    x = torch.randn(1, 3, 4)
    gatherer.add("a", x)
    gatherer.add("b", x)
    gatherer.add("c", x[0, :1])
    torch.testing.assert_close(gatherer.means()["a"], x[0, :2].T @ x[0, :2] / 2)
    torch.testing.assert_close(gatherer.means()["c"], x[0, :1].T @ x[0, :1])
    assert gatherer.shared == {"a": "a", "b": "a", "c": "c"}


def test_regmean_fits_the_outputs_of_every_model_on_held_out_text_better_than_the_mean(merged, folders):
    """Gram matrices from eight of the twelve texts of a kind, the objective on the other four."""
    made, _, _ = merged({"method": "regmean", "on": {kind: f"{kind}-most" for kind in KINDS}})
    plain, _, _ = merged({"method": "linear", "length": None}, "mean")
    loaded = [models.load(folders[kind], dtype=torch.float32) for kind in KINDS]
    better = 0
    for layer in linear_layers():
        off = {"made": 0.0, "plain": 0.0}
        for model, kind in zip(loaded, KINDS, strict=True):
            x = twins.inputs_of(model, layer, text_rows(kind)[8:])
            own = model.get_submodule(layer).weight.detach().double().numpy()
            for name, found in (("made", made), ("plain", plain)):
                off[name] += np.sum((x @ (found[f"{layer}.weight"].double().numpy() - own).T) ** 2) / len(x)
        better += off["made"] < off["plain"]
    assert better == len(linear_layers())


def gpt2_family(root, **config):
    """GPT-2: layers kept as [in, out], and an output matrix that is the embedding."""
    folders = {}
    for seed, kind in enumerate(KINDS):
        torch.manual_seed(0)
        made = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=32, n_embd=8, n_layer=2, n_head=2, **config))
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for weight in made.parameters():
                weight.add_(0.01 * torch.randn_like(weight))
        folders[kind] = save(made.eval(), root / kind)
    return folders


def test_layers_kept_the_other_way_round_and_tied_matrices_are_understood(merged, tmp_path):
    own = gpt2_family(tmp_path)
    made, notes, _ = merged({"method": "regmean", "on": ON}, own=own)
    assert notes["merged_by_regression"] == 8
    loaded = [models.load(own[kind], dtype=torch.float32) for kind in KINDS]
    for layer in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        found = [twins.gram(twins.inputs_of(m, layer, text_rows(k))) for m, k in zip(loaded, KINDS, strict=True)]
        values = [m.get_submodule(layer).weight.detach().double().numpy().T for m in loaded]
        expected = twins.regmean(values, found, [1, 1, 1], 0.9).T
        np.testing.assert_allclose(made[f"{layer}.weight"].numpy(), expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(
        made["transformer.wte.weight"], mean(own, "transformer.wte.weight"), rtol=1e-5, atol=1e-6
    )
    fishers, _, _ = merged({"method": "fisher", "on": ON}, "fisher", own=own)
    assert fishers.keys() == made.keys()


def test_tensors_named_without_the_models_prefix_are_found(merged, tmp_path):
    own = gpt2_family(tmp_path)
    expected, _, _ = merged({"method": "regmean", "on": ON}, "expected", own=own)
    for folder in own.values():
        short = {name.removeprefix("transformer."): t for name, t in tensors(folder).items()}
        save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    for method in ("regmean", "fisher"):
        made, _, _ = merged({"method": method, "on": ON}, method, own=own)
        assert all(not name.startswith("transformer.") for name in made)
    made = tensors(tmp_path / "regmean")
    assert all(torch.equal(made[name.removeprefix("transformer.")], value) for name, value in expected.items())


# regmean_plus


def test_regmean_plus_is_its_formula(merged, folders):
    made, _, _ = merged({"method": "regmean_plus", "on": ON, "models": {"low": 1, "middle": 2, "high": 1}})
    loaded = [models.load(folders[kind], dtype=torch.float32) for kind in KINDS]
    layers = [(f"model.layers.{i}.", [n for n in linear_layers() if f".{i}." in n]) for i in range(2)]
    expected = twins.regmean_plus(
        loaded, [text_rows(kind) for kind in KINDS], [1, 2, 1], 0.9, [*layers, ("", ["lm_head"])]
    )
    for name, value in made.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=2e-2, atol=5e-3, err_msg=name)


def test_the_first_layer_sees_what_regmean_shows_it_where_the_embeddings_are_equal(merged, folders, tmp_path):
    own = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    for kind in KINDS:
        changed = tensors(own[kind]) | {
            "model.embed_tokens.weight": tensors(folders["base"])["model.embed_tokens.weight"]
        }
        save_file(changed, own[kind] / "model.safetensors", metadata={"format": "pt"})
    plain, _, _ = merged({"method": "regmean", "on": ON}, "plain", own=own)
    made, _, _ = merged({"method": "regmean_plus", "on": ON}, "made", own=own)
    first = [name for name in made if "layers.0." in name]
    assert all(torch.allclose(made[name], plain[name], atol=1e-5) for name in first)
    assert not torch.allclose(*(out["model.layers.1.mlp.up_proj.weight"] for out in (made, plain)), atol=1e-5)


# adamerging


def lambdas_of(settings, root, data, folders, out):
    made = job({"models": NAMES, "base": "base", "length": LENGTH} | settings, folders, data, root, out)
    return made, made.settings


@pytest.mark.parametrize("by", ["model", "layer", "tensor"])
def test_lambdas_follow_the_gradient_of_the_entropy(by, merged, folders):
    settings = {"method": "adamerging", "base": "base", "on": ON, "steps": 3, "learning_rate": 0.02, "by": by}
    made, notes, _ = merged(settings | {"batch_size": 12})
    base = models.load(folders["base"], dtype=torch.float32).double()
    start = {name: value.detach() for name, value in base.named_parameters()}
    deltas = []
    for kind in KINDS:
        own = models.load(folders[kind], dtype=torch.float32).double()
        deltas.append({name: value.detach() - start[name] for name, value in own.named_parameters()})
    groups = {name: adamerging.group_of(name, by) for name in start}
    found = {group: torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True) for group in groups.values()}
    assert len(found) == {"model": 1, "layer": 5, "tensor": len(start)}[by]
    adam = torch.optim.Adam(found.values(), lr=0.02)
    entropies = []
    for _ in range(3):
        adam.zero_grad()
        weights = twins.composed(start, deltas, lambda name: found[groups[name]])
        total = 0
        for kind in KINDS:
            ids = torch.stack(text_rows(kind))
            logits = torch.func.functional_call(base, weights, kwargs={"input_ids": ids}).logits[:, :-1]
            total = total + twins.entropy(logits).mean() / 3
        entropies.append(float(total))
        total.backward()
        adam.step()
    assert notes["entropy_by_step"] == pytest.approx(entropies, rel=1e-4)
    for group, expected in found.items():
        assert list(notes["lambdas"][group].values()) == pytest.approx(expected.tolist(), abs=2e-4), group
    weights = twins.composed(start, deltas, lambda name: found[groups[name]])
    for name, value in made.items():
        np.testing.assert_allclose(value.numpy(), weights[name].detach().numpy(), rtol=1e-3, atol=2e-4, err_msg=name)


def test_the_entropy_falls_and_without_steps_it_is_task_arithmetic(merged):
    settings = {"method": "adamerging", "base": "base", "on": "all", "start": 0.4}
    _, notes, _ = merged(settings | {"steps": 25, "learning_rate": 0.03}, "learned")
    assert np.mean(notes["entropy_by_step"][-5:]) < 0.8 * np.mean(notes["entropy_by_step"][:2])
    made, _, _ = merged(settings | {"steps": 0}, "start")
    plain, _, _ = merged({"method": "task_arithmetic", "base": "base", "scale": 0.4, "length": None}, "plain")
    assert all(torch.allclose(made[name], plain[name], atol=1e-6) for name in made)


def test_lambdas_stay_between_0_and_1_unless_told_otherwise(merged):
    settings = {"method": "adamerging", "base": "base", "on": ON, "steps": 4, "learning_rate": 0.5, "by": "model"}
    _, inside, _ = merged(settings, "inside")
    _, outside, _ = merged(settings | {"clamp": False}, "outside")
    assert all(0 <= value <= 1 for value in inside["lambdas"]["model"].values())
    assert any(not 0 <= value <= 1 for value in outside["lambdas"]["model"].values())


def test_the_entropy_is_its_formula():
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(entropy(logits), twins.entropy(logits.double()).float())


def test_what_does_not_fit_into_memory_is_read_again(merged, monkeypatch):
    settings = {"method": "adamerging", "base": "base", "on": ON, "steps": 2}
    held, _, _ = merged(settings, "held")
    monkeypatch.setattr("graft.merge._composed.HELD", 5000)
    read, _, _ = merged(settings, "read")
    assert all(torch.equal(held[name], read[name]) for name in held)


# localize_and_stitch


def stitched_twin(parents, densities, weights):
    """The largest of each task vector over all tensors, ties by place; the weighted mean where regions overlap."""
    names = sorted(parents["base"])
    total, share = 0, 0
    for model, density, weight in zip("abc", densities, weights, strict=True):
        flat = np.concatenate([(parents[model][n] - parents["base"][n]).double().numpy().ravel() for n in names])
        mask = np.zeros(len(flat))
        mask[np.argsort(-np.abs(flat.astype(np.float32)), kind="stable")[: int(density * len(flat))]] = 1
        total, share = total + weight * mask * flat, share + weight * mask
    made = np.divide(total, share, out=np.zeros_like(total), where=share > 0)
    sizes = np.cumsum([parents["base"][n].numel() for n in names])[:-1]
    return {n: part.reshape(parents["base"][n].shape) for n, part in zip(names, np.split(made, sizes), strict=True)}


def test_stitching_the_largest_changes_is_its_formula(tmp_path, monkeypatch):
    monkeypatch.setattr(graft.merge.stream, "PIECE", 20)
    parents = relatives(3)
    weights, densities = {"a": 0.5, "b": 1.0, "c": 1.2}, {"a": 0.2, "b": 0.5, "c": 0.7}
    settings = {"method": "localize_and_stitch", "base": "base", "models": weights, "density": densities, "scale": 0.8}
    made = streamed(settings, parents, tmp_path)
    expected = stitched_twin(parents, densities.values(), weights.values())
    for name, value in made.items():
        change = (value - parents["base"][name]).double().numpy()
        np.testing.assert_allclose(change, 0.8 * expected[name], rtol=1e-4, atol=1e-6)


def test_equal_models_are_stitched_to_that_model_and_the_order_does_not_matter(tmp_path):
    parents = relatives(3)
    settings = {"method": "localize_and_stitch", "base": "base", "models": ["a", "b", "c"], "density": 0.3}
    one = streamed(settings, parents, tmp_path)
    other = streamed(settings | {"models": ["c", "a", "b"]}, parents, tmp_path)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    parents["b"] = parents["c"] = parents["a"]
    whole = streamed(settings | {"density": 1.0}, parents, tmp_path)
    assert all(torch.allclose(whole[name], parents["a"][name], atol=1e-6) for name in whole)


LEARN = {"method": "localize_and_stitch", "base": "base", "on": ON, "density": 0.1, "batch_size": 12, "bias": 3.0}


def test_regions_follow_the_gradient_of_the_loss(root, data, folders, tmp_path):
    made = job(LEARN | {"models": NAMES, "length": LENGTH, "steps": 2, "learning_rate": 2e3, "l1": 1e-3}, folders, data,
               root, tmp_path / "out")  # fmt: skip
    with Composed(made, made.settings) as composed:
        cuts = localizing.largest_of(made, made.settings)
        start = {parameter: cuts[tensor][1] for tensor, parameter in composed.outputs.items()}
        found = localizing.localized(composed, made, made.settings, "middle", start)
    base = models.load(folders["base"], dtype=torch.float32).double()
    own = models.load(folders["middle"], dtype=torch.float32).double()
    weights = {name: value.detach() for name, value in base.named_parameters()}
    delta = {name: value.detach() - weights[name] for name, value in own.named_parameters()}
    flat = torch.cat([d.abs().flatten() for d in delta.values()])
    least = flat.sort(descending=True).values[int(0.1 * len(flat)) - 1]
    scores = {name: torch.where(d.abs() >= least, 3.0, -3.0).double().requires_grad_() for name, d in delta.items()}
    ids = torch.stack(text_rows("middle"))
    for _ in range(2):
        mixed = {name: weights[name] + score.sigmoid() * delta[name] for name, score in scores.items()}
        loss = torch.func.functional_call(base, mixed, kwargs={"input_ids": ids, "labels": ids}).loss
        loss = loss + 1e-3 * sum(score.sigmoid().sum() for score in scores.values())
        slopes = torch.autograd.grad(loss, list(scores.values()))
        scores = {
            name: (score - 2e3 * slope).detach().requires_grad_()
            for (name, score), slope in zip(scores.items(), slopes, strict=True)
        }
    for name, score in scores.items():
        np.testing.assert_allclose(found[name].numpy(), score.detach().numpy(), rtol=5e-3, atol=2e-2, err_msg=name)


def test_learned_regions_are_stitched(merged, folders):
    made, notes, folder = merged(LEARN | {"steps": 3, "learning_rate": 1e4})
    regions = {k: load_file(folder.parent / "out.scratch" / "regions" / str(i) / "model.safetensors")
               for i, k in enumerate(KINDS)}  # fmt: skip
    for kind, found in regions.items():
        share = sum(int(mask.sum()) for mask in found.values()) / sum(mask.numel() for mask in found.values())
        assert notes["share_in_region"][kind] == pytest.approx(share)
    base = tensors(folders["base"])
    for name, value in made.items():
        masks = [regions[kind][name].double() for kind in KINDS]
        deltas = [(tensors(folders[kind])[name] - base[name]).double() for kind in KINDS]
        total = sum(m * d for m, d in zip(masks, deltas, strict=True)) / sum(masks).clamp(min=1)
        torch.testing.assert_close(value.double(), base[name].double() + total, rtol=1e-4, atol=1e-6)


def test_learning_a_region_makes_it_better_at_its_text_and_l1_makes_it_smaller(merged):
    alone = {"models": ["low"], "on": "low"}
    _, _, start = merged(LEARN | alone | {"steps": 0}, "start")
    _, grown, learned = merged(LEARN | alone | {"steps": 20, "learning_rate": 1e4}, "learned")
    _, small, _ = merged(LEARN | alone | {"steps": 20, "learning_rate": 1e4, "l1": 1e-4}, "small")
    assert readers.loss(learned, "low") < readers.loss(start, "low")
    assert small["share_in_region"]["low"] < grown["share_in_region"]["low"]


# all of them

READING = {
    "fisher": {"on": ON},
    "regmean": {"on": ON},
    "regmean_plus": {"on": ON},
    "adamerging": {"base": "base", "on": ON, "steps": 3, "learning_rate": 0.02},
    "localize_and_stitch": {"base": "base", "on": ON, "steps": 2, "density": 0.2},
}
STEPS = {
    "fisher": (fisher, "diagonal"),
    "regmean": (grams, "gather"),
    "regmean_plus": (through, "_behind"),
    "adamerging": (adamerging, "_learn"),
    "localize_and_stitch": (localizing, "localized"),
}


@pytest.mark.parametrize("method", READING)
def test_a_merge_that_was_stopped_goes_on_where_it_stood_and_gives_the_same_bytes(method, merged, monkeypatch):
    settings = {"method": method} | READING[method]
    module, name = STEPS[method]
    step, calls = getattr(module, name), []

    def counted(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return step(*arguments)

    whole, notes, _ = merged(settings, "whole")
    monkeypatch.setattr(module, name, counted)
    with pytest.raises(KeyboardInterrupt):
        merged(settings, "stopped")
    again = []
    monkeypatch.setattr(module, name, lambda *arguments: (again.append(arguments), step(*arguments))[1])
    made, noted, _ = merged(settings, "stopped")
    assert all(torch.equal(made[tensor], whole[tensor]) for tensor in whole)
    assert len(again) == {"regmean_plus": 4}.get(method, 1)
    assert noted == notes


@pytest.mark.parametrize("method", READING)
def test_what_was_measured_on_other_weights_is_not_used(method, merged, folders, tmp_path):
    own = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    settings = {"method": method} | READING[method]
    merged(settings, "out", own=own)
    changed = {name: tensor * 1.1 for name, tensor in tensors(own["low"]).items()}
    save_file(changed, own["low"] / "model.safetensors", metadata={"format": "pt"})
    made, _, _ = merged(settings, "out", own=own)
    fresh, _, _ = merged(settings, "fresh", own=own)
    assert all(torch.equal(made[name], fresh[name]) for name in made)


def test_methods_that_read_data_are_better_on_it_than_the_mean_of_the_weights(merged, folders, root):
    """Three kinds of text that share no word: what each model has learned is of use to none of the others."""
    _, _, plain = merged({"method": "linear", "length": None}, "plain")
    found = {"linear": losses(plain)}
    tuned = {
        "adamerging": {"steps": 40, "learning_rate": 0.03},
        "localize_and_stitch": {"density": 0.1, "steps": 20, "learning_rate": 1e4, "bias": 3.0},
    }
    for method, settings in READING.items():
        _, _, out = merged({"method": method} | settings | tuned.get(method, {}), method)
        found[method] = losses(out)
    worse = {method: value for method, value in found.items() if method != "linear" and value >= found["linear"]}
    assert worse == {}, found


def test_models_that_are_no_causal_ones_are_refused(merged, root, data, tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = BertForMaskedLM(BertConfig(**shape, intermediate_size=8, max_position_embeddings=32))
    own = {kind: save(bert, tmp_path / kind) for kind in KINDS}
    with pytest.raises(CannotCombine, match="low is of architecture encoder: fisher reads text with causal"):
        merged({"method": "fisher", "on": "all"}, own=own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "fisher"}, "on: this key is required"),
        ({"method": "fisher", "on": None}, "expected a data set in `on`"),
        ({"method": "fisher", "on": {"a": "x"}}, "expected a data set for each of a, b, found one for a"),
        ({"method": "fisher", "on": "x", "models": {"a": 1, "b": -1}}, "expected weights above 0"),
        ({"method": "fisher", "on": "x", "labels": "drawn"}, "'data' or 'sampled'"),
        ({"method": "regmean", "on": "x", "alpha": 1.5}, "less than or equal to 1"),
        ({"method": "regmean", "on": "x", "tokens": 100, "length": 128}, "expected at least 128 tokens"),
        ({"method": "adamerging", "on": "x"}, "base: this key is required"),
        ({"method": "localize_and_stitch", "base": "c", "density": 0}, "expected a density above 0"),
        ({"method": "regmean_plus", "on": "x", "slices": [{"a": [0, 1]}]}, "expected whole models, found slices"),
        ({"method": "adamerging", "base": "c", "on": "x", "models": {"a": [0, 1], "b": 1}}, "over the whole model"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        VERB.parse({"models": ["a", "b"]} | settings)


def test_it_is_said_in_python_too_and_the_manifest_names_the_data(folders, root, tmp_path):
    def run(name, texts):
        file = root / f"{texts}.jsonl"
        sets = {"texts": {"source": "jsonl", "path": str(file), "splits": {"dev": 0, "test": 0}}}
        pair = [folders["low"], folders["high"]]
        out = graft.merge(tmp_path / name, method="fisher", models=pair, on="texts", length=LENGTH, data_sets=sets)
        return json.loads((out / "graft.json").read_text())

    manifest, other = run("made", "all"), run("other", "low")
    assert [(use["name"], use["split"]) for use in manifest["data"]] == [("texts", "train")]
    assert manifest["notes"]["mean_fisher_information"].keys() == {str(folders["low"]), str(folders["high"])}
    assert manifest["notes"]["verified_as"] == "LlamaForCausalLM"
    assert manifest["key"] != other["key"]
    assert manifest["data"][0]["fingerprint"] != other["data"][0]["fingerprint"]


def test_an_output_matrix_that_is_tied_counts_as_embedding():
    assert Layers.of(readers.model(tie_word_embeddings=True)).transposed("lm_head.weight") is None
    assert Layers.of(readers.model()).transposed("lm_head.weight") is False


FACTS = Facts("decoder", "i", "v", 10**9, 2 * 10**9, {"hidden_size": 2048, "num_hidden_layers": 22})


def test_what_it_costs_is_said_beforehand():
    plain = VERB.estimate(VERB.parse({"models": ["a", "b"]}), {"a": FACTS, "b": FACTS})
    read = VERB.parse({"method": "fisher", "models": ["a", "b"], "on": "x", "tokens": "1M"})
    found = VERB.estimate(read, {"a": FACTS, "b": FACTS})
    assert found.memory_bytes == plain.memory_bytes + 8 * 10**9
    # forward and backward: six operations a parameter and token, at 6e10 a second
    assert found.seconds - plain.seconds == pytest.approx(6 * 1e9 * 2e6 / 6e10)
    by_size = {"method": "localize_and_stitch", "base": "c", "models": ["a", "b"]}
    assert VERB.estimate(VERB.parse(by_size), dict.fromkeys("abc", FACTS)).note == plain.note
    whole = VERB.parse({"method": "tsv_merge", "base": "c", "models": ["a", "b"]})
    assert VERB.estimate(whole, dict.fromkeys("abc", FACTS)).memory_bytes > plain.memory_bytes + 10 * 4 * 2048 * 8192


def test_few_inputs_are_fitted_and_leave_the_rest_as_the_mean_has_it():
    draw = torch.Generator().manual_seed(1)
    one, other = torch.randn(5, 8, generator=draw), torch.randn(5, 8, generator=draw)
    x, y = torch.randn(2, 8, generator=draw), torch.randn(3, 8, generator=draw)
    made = regression_mean([one, other], [x.T @ x, y.T @ y], [1, 1], 1.0)
    assert float(((made - one) @ x.T).abs().max()) < 0.05
    assert float(((made - other) @ y.T).abs().max()) < 0.05
    # the pull towards the mean is as strong as the inputs are
    free = torch.linalg.svd(torch.cat([x, y])).Vh[5:] * (x.T @ x + y.T @ y).diagonal()
    torch.testing.assert_close(made @ free.T, (one + other) @ free.T / 2, rtol=0.01, atol=0.01)
