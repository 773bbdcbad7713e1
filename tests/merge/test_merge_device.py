"""Merging on an accelerator: every method gives there what it gives here.

Where there is no CUDA, the same way is gone with the processor in the place of the accelerator, and with one that is
made up, whose tensors cannot meet the processor's.
"""

import elsewhere
import numpy as np
import pytest
import torch
from readers import NAMES, ON
from small_adapters import adapter
from small_family import family, merge, model, save
from streaming import Far, relatives, streamed
from test_merge_methods import CASES, ONE_EACH, RANDOM, THREE
from typer.testing import CliRunner

import graft
import graft.merge.stream
from graft.checkpoint import TensorReader
from graft.cli import app
from graft.errors import RequestError
from graft.merge import VERB
from graft.merge.engine import check_precision
from graft.merge.stream import Workers

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""float32 sums in another order: a few roundings of values around 1."""
SUBSPACE = {
    name: {"method": name.split("-")[0], "base": "base", "models": ["a", "b", "c"]} | more
    for name, more in {
        "tsv_merge": {},
        "iso_c": {},
        "iso_cts": {},
        "wudi": {"steps": 20},
        "wudi-exact": {"solver": "exact"},
        "knots": {"density": 0.5},
        "knots-dare": {"merge": "dare_ties", "density": 0.5},
    }.items()
}
DROPPED = {
    f"{name}-{rescale}": {"method": name, "base": "base", "models": THREE, "density": 0.4, "rescale": rescale}
    for name in RANDOM
    for rescale in ("probability", "l1")
}
MORE = {
    "ties-model": {"method": "ties", "base": "base", "models": THREE, "density": 0.3, "trim": "model"},
    "localize_and_stitch": {"base": "base", "models": THREE, "density": 0.4},
}
EVERY = {name: settings for name, (settings, _) in CASES.items()} | SUBSPACE | DROPPED | MORE


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    """Pieces here and there are cut at different places."""
    monkeypatch.setattr(graft.merge.stream, "PIECE", 20)
    monkeypatch.setattr(graft.merge.stream, "FAR_PIECE", 34)


@pytest.fixture(params=["in its place", "apart", pytest.param("cuda", marks=CUDA)])
def there(request, monkeypatch):
    """How `streamed` is told to work on the accelerator."""
    if request.param != "apart":
        yield {"pool": Far} if request.param == "in its place" else {"device": "cuda"}
        return
    elsewhere.known_to_the_engine(monkeypatch)
    with elsewhere.Elsewhere():
        yield {"pool": elsewhere.Apart}


@pytest.fixture(params=["in its place", pytest.param("cuda", marks=CUDA)])
def device(request, monkeypatch):
    """What a job is told; the verb's own threads then work there."""
    if request.param == "in its place":
        monkeypatch.setattr(Workers, "near", False)
        return "cpu"
    return "cuda"


def test_every_method_that_streams_is_tried():
    assert set(ONE_EACH) <= {EVERY[case].get("method", case) for case in EVERY}


@pytest.mark.parametrize("case", EVERY)
def test_a_method_gives_there_what_it_gives_here(case, there, tmp_path):
    parents = relatives(step=1.5 if "slerp" in case or case == "karcher" else 0.1)
    settings = {"method": case} | EVERY[case]
    here = streamed(settings, parents, tmp_path, seed=4)
    made = streamed(settings, parents, tmp_path, seed=4, **there)
    for name in here:
        torch.testing.assert_close(made[name], here[name], **CLOSE)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_ties", "karcher"])
def test_every_piece_goes_to_the_device_that_is_asked_for_and_comes_back_once(method, tmp_path, monkeypatch):
    parents, base = relatives(2), {} if method in ("linear", "karcher") else {"base": "base"}
    elsewhere.known_to_the_engine(monkeypatch)
    with elsewhere.Elsewhere():
        made = streamed({"method": method, "models": ["a", "b"]} | base, parents, tmp_path, pool=elsewhere.Apart)
    size = sum(value.numel() for value in made.values())
    assert elsewhere.counts["there"] >= (2 + len(base)) * size
    # beside what is written: sums, which are few
    assert size <= elsewhere.counts["back"] <= 2 * size


def test_on_the_device_that_is_made_up_nothing_meets_what_is_not_there():
    with elsewhere.Elsewhere():
        far = torch.arange(3.0).to("meta")
        assert isinstance(far, elsewhere.There)
        assert (far.mul_(2) + far).cpu().tolist() == [0, 4, 8]
        assert isinstance(torch.ones(3, device="meta"), elsewhere.There)
        for mixed in (lambda: far + torch.ones(3), lambda: torch.where(torch.ones(3).bool(), far, far), far.numpy):
            with pytest.raises((RuntimeError, TypeError)):
                mixed()


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_drops_the_same_elements_there(name, there, tmp_path):
    """Draws belong to elements and are made on the processor; what is dropped is then the base's, to the bit."""
    parents = relatives(1, shape=(20, 30))
    settings = {"method": name, "base": "base", "models": ["a"], "density": 0.4}
    here, made = (streamed(settings, parents, tmp_path, seed=9, **how)["w"] for how in ({}, there))
    base = parents["base"]["w"]
    assert torch.equal(here == base, made == base)
    assert 0.3 < float((made == base).double().mean()) < 0.9


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parents_of_every_type_are_read_and_every_type_is_written(stored, there, tmp_path):
    parents = {m: {n: t.to(stored) for n, t in held.items()} for m, held in relatives(2).items()}
    settings = {"method": "task_arithmetic", "base": "base", "models": ["a", "b"]}
    for dtype in ("F32", "BF16", "F16"):
        here, made = (streamed(settings, parents, tmp_path, dtype=dtype, **how)["w"] for how in ({}, there))
        assert made.dtype == here.dtype
        torch.testing.assert_close(made, here, rtol=1e-2, atol=1e-6)


def test_nan_and_what_does_not_fit_are_found_there(there, tmp_path):
    parents = relatives(2)
    large = {m: {"w": torch.full((3, 3), 6e4)} for m in ("a", "b")}
    with pytest.raises(graft.errors.CheckpointError, match="w: the merge gives values that F16 cannot hold"):
        settings = {"method": "linear", "models": ["a", "b"], "normalise": False}
        streamed(settings, large, tmp_path / "1", dtype="F16", **there)
    parents["b"]["w"][3, 4] = float("nan")
    with pytest.raises(graft.errors.CheckpointError, match="b: NaN or Inf in w"):
        streamed({"method": "linear", "models": ["a", "b"]}, parents, tmp_path, **there)


def test_what_is_held_there_are_a_few_pieces(tmp_path, monkeypatch):
    """No piece is larger than it may be, and no more are worked on than there are threads."""
    seen = []
    combine = graft.merge.linear.weighted_sum
    monkeypatch.setattr(graft.merge.linear, "weighted_sum", lambda m, w: seen.append(len(m[0])) or combine(m, w))
    streamed({"method": "linear", "models": ["a", "b"]}, relatives(2, shape=(20, 30)), tmp_path, pool=Far)
    assert max(seen) == graft.merge.stream.FAR_PIECE
    assert sum(seen) == 20 * 30 + 9
    monkeypatch.setattr(graft.merge._workers, "FAR_THREADS", 1)
    with Far() as workers:
        assert workers.threads == 1


@pytest.mark.parametrize("method", ["fisher", "regmean", "regmean_plus", "adamerging", "localize_and_stitch"])
def test_methods_that_read_data_stream_there_as_well(method, merged, device, monkeypatch):
    based = {"base": "base"} if method in ("adamerging", "localize_and_stitch") else {}
    steps = {"steps": 2} if based else {}
    settings = {"method": method, "on": ON, "models": NAMES} | based | steps
    made, _, _ = merged(settings, "there")
    monkeypatch.setattr(Workers, "near", property(lambda self: True))
    here, _, _ = merged(settings, "here")
    for name in here:
        torch.testing.assert_close(made[name], here[name], rtol=1e-4, atol=1e-5)


def test_adapters_and_whole_models_merge_there(device, tmp_path):
    folders = family(tmp_path / "family", 1)
    folders["x"] = adapter(folders["base"], tmp_path / "x", 1)
    settings = {"method": "ties", "base": "base", "models": ["a", "x"], "density": 0.4}
    made, _ = merge(settings, folders, tmp_path / "out", device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "near", property(lambda self: True))
        here, _ = merge(settings, folders, tmp_path / "here")
    for name in here:
        torch.testing.assert_close(made[name], here[name], **CLOSE)


def test_a_lora_is_extracted_there(device, tmp_path):
    folders = family(tmp_path / "family", 1)
    settings = {"method": "extract_lora", "base": "base", "models": ["a"], "energy": 1.0}
    made, _ = merge(settings, folders, tmp_path / "out", device=device)
    weight = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    product = made[weight.format("B")] @ made[weight.format("A")]
    base, tuned = (TensorReader(folders[n]).read("model.layers.0.mlp.up_proj.weight") for n in ("base", "a"))
    np.testing.assert_allclose(product, tuned - base, atol=1e-6)


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    folder = save(model(0), tmp_path / "a")
    monkeypatch.setattr(TensorReader, "read_into", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(RequestError, match=r"expected a device of this machine .*found 'cuda:77'"):
        graft.merge(tmp_path / "out", method="passthrough", models=[folder], device="cuda:77")
    assert not (tmp_path / "out").exists()
    told = CliRunner().invoke(app, ["merge", str(tmp_path / "out"), str(folder), "--device", "cuda:77"])
    assert told.exit_code == 2
    assert "expected a device of this machine (cpu" in " ".join(told.stderr.split())
    (tmp_path / "r.yaml").write_text(f"family: f\nmodels: {{a: {{load: {folder}}}, m: {{merge: {{models: [a]}}}}}}\n")
    told = CliRunner().invoke(app, ["run", str(tmp_path / "r.yaml"), "--device", "cuda:77"])
    assert told.exit_code == 2
    assert "found 'cuda:77'" in " ".join(told.stderr.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"method": "linear", "models": ["a"]}, False),
        ({"method": "ties", "base": "b", "models": ["a"]}, False),
        ({"method": "dare_ties", "base": "b", "models": ["a"]}, False),
        ({"method": "dare_ties", "base": "b", "models": ["a"], "rescale": "l1"}, True),
        ({"method": "della", "base": "b", "models": ["a"], "rescale": "l1"}, True),
        ({"method": "nuslerp", "models": ["a", "b"], "by": "row"}, True),
        ({"method": "model_stock", "base": "b", "models": ["a", "c"], "by": "row"}, True),
        ({"method": "tsv_merge", "base": "b", "models": ["a"]}, True),
        ({"method": "extract_lora", "base": "b", "models": ["a"], "rank": 2}, True),
        ({"method": "fisher", "models": ["a"], "on": "x.train"}, True),
        ({"method": "localize_and_stitch", "base": "b", "models": ["a"]}, False),
    ],
)
def test_a_device_without_float64_is_refused_where_that_is_needed(settings, refused):
    parsed = VERB.parse(settings)
    for name in (None, "cpu", "cuda:0"):
        check_precision(parsed, name)
    if refused:
        with pytest.raises(RequestError, match=f"float64 for {parsed.method}"):
            check_precision(parsed, "mps")
    else:
        check_precision(parsed, "mps:0")
