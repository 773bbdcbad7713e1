"""Models that several processes train together (`--launch`), on loopback, beside the same models made by one."""

import shlex
import sys
from pathlib import Path

import pytest
import torch

import graft
from graft import machine
from graft.errors import RecipeError, RequestError
from graft.executors import Here, Launched, misplaced, processes_of, spelt_out
from graft.lineage import read_manifest
from graft.plan.fit import launched
from graft.run import NodesFailed
from graft.tune import VERB

RECIPE = """
family: f
data: {code: {source: python-library, packages: [json, wsgiref], keep: code, pieces: 500, splits: {dev: 0.2}}}
models:
  base:
    pretrain: {data: code, size: 80k, length: 64, tokenizer: {size: 384}, budget: 3k tokens, batch_size: 8,
               keep: {last: 1}}
  adapted: {tune: {from: base, data: code, method: {lora: {rank: 2}}, length: 64, budget: 1k tokens, batch_size: 8}}
  duo: {ensemble: {members: [base, adapted]}}
"""


def launcher(count=2):
    return f"torchrun --standalone --nproc-per-node {count}"


QUICK = f"{shlex.quote(sys.executable)} {Path(__file__).parent / 'helpers' / 'forking_launcher.py'} --nproc-per-node 2"
"""For what any launcher does; that torchrun itself is one is asked where processes fail."""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "family.yaml"
    path.write_text(RECIPE)
    return path


def test_two_processes_make_what_one_makes(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOW_RANK", "1")
    one = graft.run(recipe, tmp_path / "one", device="cpu")
    two = graft.run(recipe, tmp_path / "two", launch=QUICK)
    assert one.made == two.made == ["base", "adapted", "duo"]
    ids = torch.arange(3, 40)[None]
    for name in one.made:
        a, b = (read_manifest(done.folder / "models" / name) for done in (one, two))
        assert abs(a.metrics.get("dev_loss", 0) - b.metrics.get("dev_loss", 0)) < 1e-4
        assert a.parameters == b.parameters
        x, y = (graft.load(done.folder / "models" / name)(ids).logits for done in (one, two))
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
    assert [p.name for p in (two.folder / "models/base/checkpoints").iterdir()] == [
        p.name for p in (one.folder / "models/base/checkpoints").iterdir()
    ]
    assert not list((two.folder / "work").glob("*/"))
    again = graft.run(recipe, tmp_path / "two", launch=QUICK)
    assert again.made == []


SPREAD = "{method: fsdp, devices: 2}"


def test_a_recipe_says_how_many_processes_train_a_model_and_is_the_same_recipe(recipe, tmp_path):
    one = graft.run(recipe, tmp_path / "one", only=["base"], device="cpu")
    recipe.write_text(RECIPE.replace("batch_size: 8,", f"batch_size: 8, parallel: {SPREAD},"))
    assert graft.run(recipe, tmp_path / "one", only=["base"]).made == []
    two = graft.run(recipe, tmp_path / "two", only=["base"], device="cpu")
    ids = torch.arange(3, 40)[None]
    a, b = (read_manifest(done.folder / "models" / "base") for done in (one, two))
    assert a.key == b.key
    assert (a.settings["parallel"], b.settings["parallel"]["devices"]) == (None, 2)
    assert abs(a.metrics["dev_loss"] - b.metrics["dev_loss"]) < 1e-4
    x, y = (graft.load(done.folder / "models" / "base")(ids).logits for done in (one, two))
    torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
    assert {p.name for p in (one.folder / "models/base").iterdir()} == {
        p.name for p in (two.folder / "models/base").iterdir()
    }
    assert not list((two.folder / "work").glob("*/"))


def test_a_plan_says_the_memory_of_one_of_several_devices(recipe, tmp_path):
    found = {}
    for spread in ("null", "{devices: 8}", "{method: fsdp, devices: 8}", "{method: fsdp, devices: 8, offload: cpu}"):
        recipe.write_text(RECIPE.replace("batch_size: 8,", f"batch_size: 8, parallel: {spread},"))
        estimate = graft.plan(recipe, tmp_path / "run").steps["base"].estimate
        found[spread] = estimate.memory_bytes
    one, ddp, fsdp, offload = found.values()
    assert offload < fsdp < ddp < one
    assert "memory of each of 8 devices (fsdp); and 0.00 GB a device in the CPU's memory" in estimate.note


def test_processes_that_nobody_starts_are_asked_for_before_work(recipe, tmp_path):
    recipe.write_text(RECIPE.replace("batch_size: 8,", "batch_size: 8, parallel: fsdp,"))
    with pytest.raises(RequestError, match=r"base: `parallel: fsdp` needs several processes: say how many"):
        graft.run(recipe, tmp_path / "run", device="cpu")
    recipe.write_text(RECIPE.replace("batch_size: 8,", f"batch_size: 8, parallel: {SPREAD},"))
    with pytest.raises(RequestError, match=r"base: expected several models side by side \(jobs\) or several"):
        graft.run(recipe, tmp_path / "run", device="cpu", jobs=2)
    assert not (tmp_path / "run" / "models").exists()


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("torchrun --nproc-per-node 2", 2),
        ("torchrun --nproc 2", 2),
        ("python -m torch.distributed.run --nproc=3", 3),
        ("torchrun --nproc_per_node=4 --nnodes 3 --rdzv-endpoint host:1", 12),
        ("torchrun --standalone", 1),
        ("torchrun --nproc-per-node gpu", None),
        ("torchrun --nproc-per-node 2 --nnodes 1:4", None),
        ("python -m torch.distributed.run --nproc-per-node 8", 8),
        ("accelerate launch --multi_gpu --num_processes 4", 4),
        ("accelerate launch", None),
        ("mpirun -np 6", 6),
        ("srun -n 16", 16),
        ("./start.sh", None),
    ],
)
def test_a_launcher_says_how_many_processes_it_starts(command, processes):
    assert processes_of(spelt_out(shlex.split(command))) == processes


def test_what_torchrun_takes_for_short_of_two_spellings_is_spelt_out(recipe, tmp_path):
    run = graft.run(recipe, tmp_path / "run", only=["base"], launch="torchrun --standalone --nproc 2")
    assert run.made == ["base"]
    assert spelt_out(["mpirun", "--nproc", "2"]) == ["mpirun", "--nproc", "2"]


def test_what_does_not_fit_into_the_memory_of_one_of_the_processes_is_refused_before_they_start(
    recipe, tmp_path, monkeypatch
):
    spread = RECIPE.replace("size: 80k", "size: 40M").replace("batch_size: 8,", "batch_size: 8, parallel: fsdp,")
    recipe.write_text(spread)
    plan = graft.plan(recipe, tmp_path / "run")
    two = launched(plan, 2).steps["base"].estimate.memory_bytes
    recipe.write_text(spread.replace("parallel: fsdp", "parallel: {method: fsdp, devices: 2}"))
    assert two == graft.plan(recipe, tmp_path / "run").steps["base"].estimate.memory_bytes
    assert two < 0.8 * plan.steps["base"].estimate.memory_bytes
    recipe.write_text(spread)
    monkeypatch.setattr(machine, "memory", lambda device: int(0.7 * two))
    with pytest.raises(RequestError, match=r"expected models whose making fits into .* of memory, found base"):
        graft.run(recipe, tmp_path / "run", launch=launcher())
    assert not (tmp_path / "run" / "work").exists()
    # enough for each of two; that the launcher then fails is not found before
    monkeypatch.setattr(machine, "memory", lambda device: two)
    with pytest.raises(NodesFailed, match="its processes ended early"):
        graft.run(recipe, tmp_path / "run", only=["base"], launch="false --nproc-per-node 2")


def test_what_goes_wrong_in_the_processes_is_said(recipe, tmp_path):
    recipe.write_text(RECIPE.replace("{dev: 0.2}", "{dev: 0}").replace("{last: 1}", "{best: 1}"))
    with pytest.raises(NodesFailed, match=r"base: keep\.best need dev rows to measure on, found none"):
        graft.run(recipe, tmp_path / "run", only=["base"], device="cpu", launch=launcher())


UNEVEN = r"expected batch_size to be a multiple of accumulate times processes \(1 × 2\), found 3"


def test_rows_that_processes_cannot_share_are_found_before_they_start(recipe, tmp_path):
    recipe.write_text(RECIPE.replace("batch_size: 8,", "batch_size: 3,"))
    with pytest.raises(RequestError, match=f"base: {UNEVEN}"):
        graft.run(recipe, tmp_path / "run", device="cpu", launch=launcher())
    recipe.write_text(RECIPE.replace("batch_size: 8,", f"batch_size: 3, parallel: {SPREAD},"))
    with pytest.raises(RecipeError, match=UNEVEN):
        graft.plan(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "work").exists()
    split = {"from": "b", "data": "d", "batch_size": 3, "parallel": {"tensor": 2, "devices": 2}}
    assert VERB.parse(split).uneven(2) == ""
    meta = {"tasks": {"t": "d"}, "mixing": {"meta": "reptile"}, "parallel": {"method": "fsdp", "devices": 2}}
    assert VERB.parse({"from": "b", "batch_size": 3, **meta}).uneven(2) == ""


def test_a_launcher_of_another_number_of_processes_is_found_before_they_start(recipe, tmp_path):
    recipe.write_text(RECIPE.replace("batch_size: 8,", "batch_size: 8, parallel: {method: fsdp, devices: 4},"))
    with pytest.raises(RequestError, match=r"base: expected 4 processes \(`parallel.devices`\), found a launcher of 2"):
        graft.run(recipe, tmp_path / "run", only=["base"], device="cpu", launch=launcher())
    split = VERB.parse({"from": "b", "data": "d", "parallel": {"tensor": 4}})
    words = "expected processes in groups of 4 (`parallel.tensor`), found a launcher of 2"
    assert misplaced(Launched(launcher()), "m", split) == f"m: {words}"


def test_more_processes_than_a_machine_can_have_are_refused():
    most = {"batch_size": 9999, "parallel": {"method": "fsdp", "devices": 9999}}
    many = VERB.parse({"from": "b", "data": "d", **most})
    assert "m: expected at most" in misplaced(Here(), "m", many)
    two = VERB.parse({"from": "b", "data": "d", "parallel": {"method": "fsdp", "devices": 2}})
    assert misplaced(Here(), "m", two) is None


def test_a_launcher_that_dies_is_said(recipe, tmp_path):
    with pytest.raises(NodesFailed, match="base: its processes ended early"):
        graft.run(recipe, tmp_path / "run", only=["base"], launch=shlex.join(["false"]))


def test_a_launcher_that_is_not_there_is_found_before_work(recipe, tmp_path):
    with pytest.raises(RequestError, match="found no program 'torchrum'"):
        graft.run(recipe, tmp_path / "run", launch="torchrum --nproc-per-node 2")
    with pytest.raises(RequestError, match="found both"):
        graft.run(recipe, tmp_path / "run", launch="torchrun", jobs=2)
    assert not (tmp_path / "run").exists()
