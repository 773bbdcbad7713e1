"""Runs: what is there stays, a kill loses nothing, one run at a time, failures stay where they are."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from graft.errors import CheckpointError, DiskError, Failure, Locked, RequestError, ScoresFailed, UnknownName
from graft.lineage import read_manifest
from graft.run import NodesFailed, run

FAMILY = """
family: little
models:
  base: {grow: {steps: 3, journal: JOURNAL}}
  left: {grow: {parents: [base], steps: 2, journal: JOURNAL}}
  right: {grow: {parents: [base], steps: 4, journal: JOURNAL}}
  both: {grow: {parents: [left, right], steps: 1, journal: JOURNAL}}
"""


@pytest.fixture
def family(tmp_path, growing):
    """(recipe, folder of the run, the journal of every step that was worked)."""
    return write(tmp_path), tmp_path / "run", tmp_path / "journal"


def write(place, old="", new=""):
    recipe = place / "family.yaml"
    text = FAMILY.replace("JOURNAL", str(place / "journal"))
    assert old in text
    recipe.write_text(text.replace(old, new))
    return recipe


def weights(folder):
    return {p.parent.name: p.read_bytes() for p in folder.glob("models/*/model.safetensors")}


def steps(journal):
    return journal.read_text().split("\n")[:-1] if journal.exists() else []


def test_a_second_run_makes_nothing(family):
    recipe, folder, journal = family
    first = run(recipe, folder)
    assert first.made == ["base", "left", "right", "both"]
    worked = steps(journal)
    assert len(worked) == 10
    second = run(recipe, folder)
    assert (second.made, second.cached) == ([], ["base", "left", "right", "both"])
    assert steps(journal) == worked
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "cache",
        "models",
        "recipe.yaml",
        "report.html",
        "work",
    ]


def test_a_changed_line_makes_anew_only_what_hangs_below_it(family, tmp_path):
    recipe, folder, _ = family
    run(recipe, folder)
    before = weights(folder)
    again = run(write(tmp_path, "parents: [base], steps: 4", "parents: [base], steps: 5"), folder)
    assert (again.made, again.cached) == (["right", "both"], ["base", "left"])
    after = weights(folder)
    assert {name for name in before if before[name] != after[name]} == {"right", "both"}


def test_the_manifest_tells_where_a_model_comes_from(family):
    recipe, folder, _ = family
    run(recipe, folder)
    both, left = (read_manifest(folder / "models" / name) for name in ("both", "left"))
    assert [(p.name, p.path) for p in both.parents] == [("left", "../left"), ("right", "../right")]
    assert both.parents[0].hash == left.hash
    assert both.metrics == {"largest": pytest.approx(1.0, abs=1)}
    assert both.notes == {"steps": 1}
    assert both.versions["graft"]
    assert len(both.key) == 64


def test_only_makes_a_model_and_what_it_needs(family):
    recipe, folder, _ = family
    assert run(recipe, folder, only=["left"]).made == ["base", "left"]
    with pytest.raises(UnknownName, match="unknown model 'lefd' \\(did you mean 'left'\\?\\)"):
        run(recipe, folder, only=["lefd"])


def test_force_makes_anew_and_what_comes_out_the_same_leaves_the_rest_standing(family):
    recipe, folder, journal = family
    run(recipe, folder)
    before, worked = weights(folder), len(steps(journal))
    again = run(recipe, folder, force=["base"])
    assert (again.made, again.cached) == (["base"], ["left", "right", "both"])
    assert len(steps(journal)) == worked + 3
    assert weights(folder) == before


def test_force_of_a_model_that_only_leaves_out_is_refused(family):
    recipe, folder, _ = family
    with pytest.raises(
        RequestError, match=r"expected nodes to make anew, .* among those that left needs, .* found right"
    ):
        run(recipe, folder, only=["left"], force=["base", "right"], dry_run=True)


def test_a_recipe_that_is_not_of_the_run_is_never_written_over(family, tmp_path):
    recipe, _, _ = family
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(RequestError, match=r"recipe\.yaml, which no run put there: choose another"):
        run(recipe, tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    (tmp_path / "recipe.yaml").write_text(recipe.read_text())
    assert run(tmp_path / "recipe.yaml", tmp_path).made == ["base", "left", "right", "both"]


def test_dry_run_touches_nothing(family):
    recipe, folder, _ = family
    plan = run(recipe, folder, dry_run=True).plan
    assert [step.state for step in plan.steps.values()] == ["run"] * 4
    assert not folder.exists()


def test_side_by_side_gives_the_same_bytes_as_one_after_the_other(family, tmp_path):
    recipe, folder, _ = family
    run(recipe, folder)
    beside = run(recipe, tmp_path / "beside", jobs=2)
    assert sorted(beside.made) == ["base", "both", "left", "right"]
    assert weights(tmp_path / "beside") == weights(folder)


def test_a_failed_node_leaves_the_others_made_and_says_what_hangs_on_it(family, tmp_path):
    _, folder, _ = family
    recipe = write(tmp_path, "left: {grow: {", "left: {grow: {fails: true, ")
    for jobs in (1, 2):
        with pytest.raises(NodesFailed) as error:
            run(recipe, folder, jobs=jobs)
        assert str(error.value) == "left: the loss is NaN\nnot made, because they hang on what failed: both"
        assert error.value.exit_code == 1
        assert set(weights(folder)) == {"base", "right"}
    healed = run(write(tmp_path), folder)
    assert healed.made == ["left", "both"]


def test_what_was_made_is_measured_and_reported_although_a_node_failed(family, tmp_path, monkeypatch):
    _, folder, _ = family
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(200)))
    recipe = write(tmp_path, "left: {grow: {", "left: {grow: {fails: true, ")
    recipe.write_text(
        recipe.read_text().rstrip()
        + "\ndata:\n  d: {source: jsonl, path: d.jsonl}\nevaluate:\n  - {measure: bits_per_byte, on: [d.test]}\n"
    )
    asked = []
    monkeypatch.setattr("graft.evaluate.evaluate", lambda models, *_, **__: asked.append(list(models)) or [])
    with pytest.raises(NodesFailed):
        run(recipe, folder)
    assert asked == [["base", "right"]]
    assert (folder / "report.html").is_file()


def test_scores_that_fail_are_told_when_all_else_is_done(family, tmp_path, monkeypatch):
    _, folder, _ = family
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(200)))
    more = "data:\n  d: {source: jsonl, path: d.jsonl}\nevaluate:\n  - {measure: bits_per_byte, on: [d.test]}\n"

    def measured(*_, **__):
        raise ScoresFailed({"bits_per_byte of base on d.test": Failure("no", 1, "")}, [{"kind": "score"}])

    monkeypatch.setattr("graft.evaluate.evaluate", measured)
    recipe = write(tmp_path)
    whole = recipe.read_text().rstrip() + "\n" + more
    recipe.write_text(whole)
    with pytest.raises(ScoresFailed) as told:
        run(recipe, folder)
    assert str(told.value) == "bits_per_byte of base on d.test: no"
    assert told.value.done.made == ["base", "left", "right", "both"]
    assert told.value.done.rows == [{"kind": "score"}]
    assert told.value.done.report == folder / "report.html"
    recipe.write_text(whole.replace("left: {grow: {", "left: {grow: {fails: true, "))
    with pytest.raises(NodesFailed) as both:
        run(recipe, folder, force=["left"])
    assert str(both.value).splitlines() == [
        "left: the loss is NaN",
        "bits_per_byte of base on d.test: no",
        "not made, because they hang on what failed: both",
    ]
    assert both.value.done.cached == ["base", "right"]
    assert both.value.exit_code == 1


def test_weights_that_were_changed_are_found_by_their_hash(family):
    recipe, folder, _ = family
    run(recipe, folder)
    path = folder / "models" / "left" / "model.safetensors"
    stamp = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"left: its weights are not those it was made with.*--force left"):
        run(recipe, folder)
    os.utime(path, (0, 0))  # however old the file is
    with pytest.raises(CheckpointError, match="left: its weights are not those"):
        run(recipe, folder)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert run(recipe, folder).cached  # a file of the same size and time is taken at its word …
    with pytest.raises(CheckpointError, match="left: its weights are not those"):
        run(recipe, folder, verify=True)  # … unless all is to be verified
    assert run(recipe, folder, force=["left"]).made == ["left"]
    assert run(recipe, folder, verify=True).cached == ["base", "left", "right", "both"]


def test_a_truncated_artifact_is_named(family):
    recipe, folder, _ = family
    run(recipe, folder)
    path = folder / "models" / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"base: .*model.safetensors: tensor vector ends at byte .*truncated"):
        run(recipe, folder)


def test_two_runs_on_one_folder_never_work_at_once(family, tmp_path):
    _, folder, journal = family
    recipe = write(tmp_path, "steps: 3", "steps: 30, pause_s: 0.05")
    first = start(recipe, folder)
    wait_until(lambda: len(steps(journal)) > 2)
    with pytest.raises(Locked, match="another run works on"):
        run(recipe, folder, wait=False)
    second = run(recipe, folder)
    assert first.wait(300) == 0
    assert second.made == []
    assert len(steps(journal)) == 37


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(family, tmp_path):
    _, folder, journal = family
    recipe = write(tmp_path, "steps: 3", "steps: 20, pause_s: 0.2")
    for arguments in ([], ["--jobs", "2"]):
        process = start(recipe, folder, *arguments)
        seen = len(steps(journal))
        wait_until(lambda seen=seen: len(steps(journal)) > seen + 2)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 130
        assert "stopped; the same command goes on from where it stood" in errors
        assert "Traceback" not in errors
    done = run(recipe, folder)
    assert done.made == ["base", "left", "right", "both"]
    assert len(set(steps(journal))) == 27
    assert len(steps(journal)) <= 27 + 2


def test_a_killed_run_leaves_no_process_behind(family, tmp_path):
    _, folder, journal = family
    recipe = write(tmp_path, "steps: 3", "steps: 200, pause_s: 0.05")
    process = start(recipe, folder, "--jobs", "2")
    wait_until(lambda: len(steps(journal)) > 2)
    others = psutil.Process(process.pid).children(recursive=True)
    assert others
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(works, others)))


def works(process):
    """Whether it is there, and not as one that has ended and that nobody has asked about."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(recipe, folder, *arguments):
    command = [sys.executable, "-c", "from graft.cli import main; main()", "run", str(recipe), "--out", str(folder)]
    return subprocess.Popen(
        [*command, *arguments],
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        # tests that a shell runs in the background hand down that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition, timeout_s=300):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to kill a run at a chosen moment")
def test_kill_9_at_every_moment_loses_nothing(family, tmp_path):
    recipe, _, journal = family
    run(recipe, tmp_path / "whole", only=["left"])
    whole = weights(tmp_path / "whole")
    journal.unlink()
    killed = 0
    for moment in range(1, 1000):
        folder = tmp_path / f"killed{moment}"
        if not dies(recipe, folder, moment):
            break
        killed += 1
        run(recipe, folder, only=["left"])
        assert weights(folder) == whole, f"killed at moment {moment}"
        assert len(steps(journal)) <= 5 + 1, f"killed at moment {moment}: work was done twice"
        assert not [p for p in (folder / "models").iterdir() if p.name.startswith(".")]
        journal.unlink()
        shutil.rmtree(folder)
    assert killed > 30


def dies(recipe, folder, moment):
    """Whether a run in a process of its own is killed at its `moment`-th change of the disk."""
    child = os.fork()
    if child == 0:
        count = 0

        def watched(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in ("rename", "replace", "mkdir", "rmdir", "unlink"):
            setattr(os, name, watched(getattr(os, name)))
        try:
            run(recipe, folder, only=["left"])
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_an_older_recipe_left_half_made_is_not_gone_on_from(family, tmp_path):
    recipe, folder, journal = family
    assert dies(recipe, folder, 20)
    assert steps(journal)
    changed = write(tmp_path, "steps: 3", "steps: 2")
    run(changed, folder)
    run(changed, tmp_path / "clean")
    assert weights(folder) == weights(tmp_path / "clean")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EACCES, "may not be written; change its permissions"), (errno.ENOSPC, "the disk is full")],
)
def test_a_folder_without_permission_and_a_full_disk_say_so(family, monkeypatch, number, words):
    recipe, folder, _ = family

    def refuse(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DiskError, match=words):
        run(recipe, folder)


def test_a_file_where_the_folder_should_be_says_so(family, tmp_path):
    recipe, _, _ = family
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RequestError, match="expected a folder or room for one, found a file there"):
            run(recipe, place)


def test_load_copies_a_model_and_takes_its_facts(family, tmp_path):
    recipe, folder, _ = family
    run(recipe, folder)
    (tmp_path / "again.yaml").write_text(
        textwrap.dedent("""
        family: again
        models:
          old: {load: run/models/both}
          new: {grow: {parents: [old]}}
        """)
    )
    done = run(tmp_path / "again.yaml", tmp_path / "again")
    assert done.made == ["old", "new"]
    assert weights(tmp_path / "again")["old"] == weights(folder)["both"]
    old, both = read_manifest(tmp_path / "again/models/old"), read_manifest(folder / "models/both")
    assert old.hash == both.hash
    assert old.initialisation == both.initialisation
    assert json.loads(Path(tmp_path / "again/models/old/graft.json").read_text())["verb"] == "load"
