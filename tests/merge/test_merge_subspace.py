"""Methods on singular vectors against their twins, and what must hold for them."""

import numpy as np
import pytest
import subspace_twins as twins
import torch
from small_family import merge, save, tensors
from streaming import relatives, streamed
from transformers import GPT2Config, GPT2LMHeadModel

import graft.merge.stream
from graft.errors import SettingsError
from graft.merge import VERB
from graft.merge._whole import svd

METHODS = ("tsv_merge", "iso_c", "iso_cts", "wudi", "knots")
W = {"a": 0.5, "b": 1.0, "c": 1.2}
LIST = ["a", "b", "c"]
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
"""float32 decompositions of values around 0.1 against float64 ones."""


pytestmark = pytest.mark.usefixtures("many_pieces")


def deltas(parents, name="w", weights=(1, 1, 1)):
    base = parents["base"][name].double().numpy()
    there = [m for m in "abc" if m in parents]
    return [w * (parents[m][name].double().numpy() - base) for m, w in zip(there, weights, strict=False)]


def merged(settings, parents, tmp_path, name="w", **options):
    made = streamed({"base": "base", "models": LIST} | settings, parents, tmp_path, **options)
    return (made[name].double() - parents["base"][name].double()).numpy()


FORMULAS = {
    "tsv_merge": ({}, twins.tsv),
    "iso_c": ({}, twins.iso_c),
    "iso_cts": ({"common": 0.6}, lambda d: twins.iso_cts(d, 0.6)),
    "wudi": ({"steps": 40, "learning_rate": 1e-3}, lambda d: twins.wudi(d, 40, 1e-3)),
    "wudi-exact": ({"solver": "exact"}, twins.wudi_exact),
}


@pytest.mark.parametrize("shape", [(7, 12), (13, 8)])
@pytest.mark.parametrize("case", FORMULAS)
def test_a_method_is_its_formula(case, shape, tmp_path):
    settings, twin = FORMULAS[case]
    parents = relatives(3, shape=shape)
    method = {"method": case.split("-")[0], "models": W, "scale": 0.7}
    made = merged(method | settings, parents, tmp_path)
    np.testing.assert_allclose(made, 0.7 * twin(deltas(parents, weights=W.values())), **CLOSE)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("how", ["linear", "ties"])
def test_knots_is_its_formula(how, normalise, tmp_path):
    parents = relatives(3)
    settings = {"method": "knots", "models": W, "merge": how, "density": 0.4, "normalise": normalise}
    made = merged(settings, parents, tmp_path)
    expected = twins.knots(deltas(parents), how, 0.4, list(W.values()), normalise)
    np.testing.assert_allclose(made, expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_matrix_of_a_linear_layer_is_averaged(method, tmp_path):
    parents = relatives(3)
    for tensors_ in parents.values():
        tensors_["embed_tokens.weight"] = tensors_.pop("w")
    for name in ("v", "embed_tokens.weight"):
        made = merged({"method": method, "scale": 0.9}, parents, tmp_path, name)
        np.testing.assert_allclose(made, 0.9 * np.mean(deltas(parents, name), axis=0), rtol=2e-5, atol=2e-6)


def test_knots_without_trimming_or_signs_is_task_arithmetic(tmp_path):
    parents = relatives(3)
    plain = merged({"method": "task_arithmetic", "models": W}, parents, tmp_path)
    made = merged({"method": "knots", "models": W, "merge": "linear", "normalise": False}, parents, tmp_path)
    np.testing.assert_allclose(made, plain, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_knots_drops_at_random_what_a_seed_says_and_makes_up_for_it(how, tmp_path):
    parents = relatives(1, shape=(40, 60))
    settings = {"method": "knots", "models": ["a"], "merge": how, "density": 0.5}
    one, again, other = (merged(settings, parents, tmp_path, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(one, again)
    assert not np.allclose(one, other)
    (delta,) = deltas(parents)
    # 2400 elements, half of them kept and doubled: a standard deviation of about 0.02
    assert abs((one * delta).sum() / (delta * delta).sum() - 1) < 0.1


SINGLE = {"tsv_merge": {}, "wudi": {}, "knots": {"density": 1.0}}


@pytest.mark.parametrize("method", SINGLE)
def test_one_model_alone_is_that_model(method, tmp_path):
    parents = relatives(1)
    made = merged({"method": method, "models": ["a"]} | SINGLE[method], parents, tmp_path)
    np.testing.assert_allclose(made, deltas(parents)[0], **CLOSE)


TWICE = {"wudi": {"solver": "exact"}, "knots": {"density": 1.0}}


@pytest.mark.parametrize("method", TWICE)
def test_a_model_merged_with_itself_is_that_model(method, tmp_path):
    parents = relatives(1)
    parents["b"] = parents["a"]
    made = merged({"method": method, "models": ["a", "b"]} | TWICE[method], parents, tmp_path)
    np.testing.assert_allclose(made, deltas(parents)[0], **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_models_changes_nothing(method, tmp_path):
    parents = relatives(3)
    one = merged({"method": method}, parents, tmp_path)
    other = merged({"method": method, "models": ["c", "a", "b"]}, parents, tmp_path)
    np.testing.assert_allclose(one, other, **CLOSE)


def low_rank(rank, shape=(12, 15), seed=0):
    """Task vectors whose left and right spaces do not meet."""
    draw = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draw.normal(size=(side, 3 * rank)))[0] for side in shape)
    found = {"base": {"w": torch.zeros(shape)}}
    for i, name in enumerate(LIST):
        own = slice(i * rank, (i + 1) * rank)
        found[name] = {"w": torch.tensor((left[:, own] * draw.uniform(1, 2, rank)) @ right[:, own].T).float()}
    return found


def test_tsv_merge_of_task_vectors_that_do_not_meet_is_their_sum(tmp_path):
    parents = low_rank(3)
    np.testing.assert_allclose(merged({"method": "tsv_merge"}, parents, tmp_path), sum(deltas(parents)), **CLOSE)


def test_wudi_of_task_vectors_that_do_not_meet_is_their_sum(tmp_path):
    parents = low_rank(3)
    made = merged({"method": "wudi", "solver": "exact"}, parents, tmp_path)
    np.testing.assert_allclose(made, sum(deltas(parents)), **CLOSE)


def test_equal_task_vectors_of_low_rank_are_found_again_by_tsv_merge(tmp_path):
    parents = low_rank(3)
    parents["b"] = parents["c"] = parents["a"]
    np.testing.assert_allclose(merged({"method": "tsv_merge"}, parents, tmp_path), deltas(parents)[0], **CLOSE)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_isotropic_merges_are_equally_strong_in_all_directions(method, tmp_path):
    parents = relatives(3)
    found = np.linalg.svd(merged({"method": method}, parents, tmp_path), compute_uv=False)
    np.testing.assert_allclose(found, found.mean(), rtol=1e-4)
    if method == "iso_c":
        assert found.sum() == pytest.approx(np.linalg.svd(sum(deltas(parents)), compute_uv=False).sum(), rel=1e-4)


def test_wudi_disturbs_less_than_the_sum_and_the_mean_and_its_minimum_least(tmp_path):
    parents = relatives(3)
    found = deltas(parents)
    steps = merged({"method": "wudi", "steps": 100, "learning_rate": 1e-3}, parents, tmp_path)
    least = merged({"method": "wudi", "solver": "exact"}, parents, tmp_path)
    stepped, minimum = twins.disturbance(steps, found), twins.disturbance(least, found)
    assert stepped < 0.9 * twins.disturbance(sum(found), found)
    assert minimum < min(stepped, twins.disturbance(sum(found) / 3, found))


@pytest.mark.parametrize("method", METHODS)
def test_a_task_vector_of_zero_does_no_harm(method, tmp_path):
    parents = relatives(3)
    nothing = dict.fromkeys(LIST, parents["base"])
    assert not merged({"method": method}, parents | nothing, tmp_path).any()
    parents["b"] = parents["base"]
    assert np.isfinite(merged({"method": method}, parents, tmp_path)).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_do_not_depend_on_how_the_work_is_cut(method, tmp_path, monkeypatch):
    parents = relatives(3)
    settings = {"method": method, "base": "base", "models": LIST}
    one = streamed(settings, parents, tmp_path)
    monkeypatch.setattr(graft.merge.stream, "PIECE", 33)
    other = streamed(settings, parents, tmp_path, threads=3)
    half = streamed(settings, parents, tmp_path, dtype="BF16")
    assert all(torch.equal(one[n], other[n]) and torch.equal(one[n].bfloat16(), half[n]) for n in one)


def gpt2(seed, near=None):
    torch.manual_seed(seed)
    made = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    if near is not None:
        made.load_state_dict(near.state_dict())
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return made.eval()


@pytest.mark.parametrize(
    ("settings", "twin"),
    [
        ({"method": "wudi", "solver": "exact"}, twins.wudi_exact),
        ({"method": "knots", "density": 0.5}, lambda d: twins.knots(d, "ties", 0.5, [1, 1], True)),
    ],
)
def test_inputs_and_outputs_of_a_layer_are_known_from_its_type(settings, twin, tmp_path):
    base = gpt2(0)
    made = {"base": base, "a": gpt2(1, base), "b": gpt2(2, base)}
    folders = {name: save(model, tmp_path / name) for name, model in made.items()}
    out, found = merge({"base": "base", "models": ["a", "b"]} | settings, folders, tmp_path / "out")
    assert found["notes"]["linear_layers_found_by"] == "module types"
    parents = {name: {n.removeprefix("transformer."): t for n, t in tensors(f).items()} for name, f in folders.items()}
    change = {n.removeprefix("transformer."): (t - parents["base"][n.removeprefix("transformer.")]).double().numpy()
              for n, t in out.items()}  # fmt: skip
    turned = [d.T for d in deltas(parents, "h.0.attn.c_attn.weight")]
    np.testing.assert_allclose(change["h.0.attn.c_attn.weight"].T, twin(turned), rtol=1e-3, atol=2e-5)
    for name in ("wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.bias"):
        np.testing.assert_allclose(change[name], np.mean(deltas(parents, name), axis=0), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "knots", "merge": "slerp"}, "'linear', 'ties', 'dare_linear' or 'dare_ties'"),
        ({"method": "iso_cts", "common": 0}, "greater than 0"),
        (
            {"method": "tsv_merge", "density": 0.2},
            r"tsv_merge takes no `density`; breadcrumbs, .* name one as `method`",
        ),
        ({"method": "wudi", "learning_rate": 0}, "greater than 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        VERB.parse({"base": "x", "models": ["a", "b"]} | settings)


@pytest.mark.parametrize("shape", [(20, 33), (33, 20)])
def test_decompositions_are_exact_down_to_weak_components_and_leave_out_what_is_rounding(shape):
    draw = np.random.default_rng(0)
    left, right = (np.linalg.qr(draw.normal(size=(side, 20)))[0] for side in shape)
    strengths = np.concatenate([np.geomspace(1, 1e-4, 15), np.full(5, 1e-8)])
    matrix = torch.tensor((left * strengths) @ right.T).float()
    u, s, v = svd(matrix)
    np.testing.assert_allclose(s.numpy(), strengths[:15], rtol=1e-3)
    for made in (u.T @ u, v @ v.T):
        np.testing.assert_allclose(made.numpy(), np.eye(15), atol=1e-3)
    np.testing.assert_allclose((u * s) @ v, matrix, atol=1e-6)
