"""The command line: quick, the same conduct everywhere, and errors as sentences."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

import graft
from graft import data
from graft._callable import COMMANDS as CALLED
from graft._telling import tidy
from graft._verb_command import fields_of, model_field, models_field, requested
from graft.cli import app
from graft.commands import verbs
from graft.data.tokenizers import train_tokenizer
from graft.errors import Failure, RequestError, attempt
from graft.verbs import verb

COMMANDS = sorted(typer.main.get_command(app).commands)
"""All there are: one that is added is tested like the others."""


def invoke(*words, input=""):
    return CliRunner().invoke(app, [str(word) for word in words], input=input)


def model(folder, vocabulary=40):
    """A tiny model without a tokenizer."""
    from graft.pretrain.architectures import Shape, build, config_for

    ids = {"pad": 0, "bos": 1, "eos": 2}
    build(config_for("decoder", "rotary", Shape(16, 1, 2, vocabulary, 16, 0.0, ids))).save_pretrained(folder)


def test_version_is_printed():
    assert invoke("--version").stdout == f"graft {graft.__version__}\n"


def test_help_loads_nothing_but_the_command_line():
    """What makes it quick: no torch, no transformers, no pydantic, and of graft only the commands' own words."""
    code = "import atexit, sys; from graft.cli import main; atexit.register(lambda: print(*sys.modules))"
    code += "; sys.argv = ['graft', '--help']; main()"
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert all(f" {name} " in shown for name in COMMANDS)
    loaded = shown.splitlines()[-1].split()
    line = {"typer", "rich", "pygments", "markdown_it", "mdurl", "shellingham", "annotated_doc", "graft"}
    before = subprocess.check_output([sys.executable, "-c", "import sys; print(*sys.modules)"], text=True).split()
    rooms = {name.split(".")[0] for name in loaded} - {name.split(".")[0] for name in before}
    assert rooms <= line | sys.stdlib_module_names
    assert sum(name.split(".")[0] == "graft" for name in loaded) < 25


def test_help_of_no_command_loads_what_computes():
    """The help of every command, and of a method where it has some, is read from settings alone."""
    words = [[name] for name in COMMANDS] + [[name, list(verb(name).types())[-1]] for name in verbs.WORDS]
    code = "import json, sys\nfrom typer.testing import CliRunner\nfrom graft.cli import app\n"
    code += "for words in json.loads(sys.argv[1]):\n"
    code += "    assert 'Usage' in CliRunner().invoke(app, [*words, '--help']).stdout\n"
    code += "    print(*words, *({'numpy', 'scipy', 'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    shown = subprocess.check_output([sys.executable, "-c", code, json.dumps(words)], text=True)
    assert shown.splitlines() == [" ".join(each) for each in words]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0, result.output
    assert f"Example: graft {name} " in result.stdout
    assert "--json" in result.stdout


@pytest.mark.parametrize("name", ["pretrain", "tune", "ensemble"])
def test_the_help_of_a_verb_lists_every_setting(name):
    shown = invoke(name, "--help").stdout
    assert not [field for field in fields_of(name) if f"--{field.replace('_', '-')}" not in shown]


def test_the_help_of_a_merge_lists_all_methods_and_the_settings_of_the_one_that_is_named():
    types = verb("merge").types()
    shown = invoke("merge", "--help").stdout
    assert not [name for name in types if name not in shown]
    assert "--density" not in shown
    for name, settings in types.items():
        shown = invoke("merge", name, "--help").stdout
        assert not [field for field in settings.model_fields if f"{field.replace('_', '-')}" not in shown]


def test_the_settings_of_a_method_come_first_and_those_of_a_point_are_listed():
    shown = invoke("tune", "lora", "--help").stdout
    assert shown.index("--method.lora.rank") < shown.index("--batch-size")
    assert "[default: 8]" in shown
    shown = invoke("tune", "point", "--help").stdout
    assert shown.index("Each of points") < shown.index("insertion") < shown.index("--batch-size")
    assert "on: [attention], size: 32" in " ".join(shown.split())


@pytest.fixture
def family(tmp_path, growing):
    recipe = tmp_path / "family.yaml"
    recipe.write_text("family: f\nmodels:\n  a: {grow: }\n  b: {grow: {parents: [a]}}\n")
    return recipe, tmp_path / "run"


def test_a_device_that_is_not_there_is_said_before_anything_runs(family):
    recipe, folder = family
    result = invoke("run", recipe, "--out", folder, "--device", "cuda:99")
    assert result.exit_code == 2
    assert "expected a device of this machine" in result.stderr
    assert not folder.exists()


def test_a_run_of_which_a_part_failed_shows_what_there_is_and_then_what_failed(family):
    recipe, folder = family
    recipe.write_text(recipe.read_text() + "  c: {grow: {fails: true}}\n")
    shown = invoke("run", recipe, "--out", folder)
    assert shown.exit_code == 1
    assert f"report: {folder / 'report.html'}" in shown.stdout
    assert shown.stderr.splitlines()[-1] == "graft: c: the loss is NaN"
    told = json.loads(invoke("run", recipe, "--out", folder, "--json").stdout)
    assert (told["error"], told["kind"], told["exit_code"]) == ("c: the loss is NaN", "NodesFailed", 1)
    assert (told["made"], told["cached"]) == ([], ["a", "b"])
    assert told["report"] == str(folder / "report.html")
    assert {"a", "b"} <= {one["name"] for one in told["models"]}


def test_several_processes_are_refused_instead_of_waiting_for_each_other(family, monkeypatch):
    recipe, folder = family
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("run", recipe, "--out", folder)
    assert result.exit_code == 2
    assert "expected one process, found several (torchrun)" in result.stderr


@pytest.mark.parametrize("words", [["eval", "here", "--on", "d.jsonl"], ["merge", "out", "here"]])
def test_what_cannot_be_shared_is_not_said_to_be(words, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "here")
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    result = invoke(*words)
    assert result.exit_code == 2
    assert "this is done by one; start it without torchrun" in result.stderr
    assert "--launch" not in result.stderr


def test_a_folder_that_cannot_be_made_is_a_wrong_request(family):
    recipe, _ = family
    result = invoke("run", recipe, "--out", "/proc/none/there")
    assert result.exit_code == 2
    assert "a folder cannot be made there" in result.stderr


def test_the_package_is_the_command():
    made = subprocess.run([sys.executable, "-m", "graft", "--version"], capture_output=True, text=True, check=True)
    assert made.stdout == f"graft {graft.__version__}\n"


def test_run_plan_tree_and_report_print_one_json_value_and_nothing_else(family):
    recipe, folder = family
    assert {m["state"] for m in json.loads(invoke("plan", recipe, "--out", folder, "--json").stdout)["models"]} == {
        "run"
    }
    assert json.loads(invoke("run", recipe, "--out", folder, "--dry-run", "--json").stdout)["family"] == "f"
    made = json.loads(invoke("run", recipe, "--out", folder, "--json").stdout)
    assert made["made"] == ["a", "b"]
    assert made["report"] == str(folder / "report.html")
    assert json.loads(invoke("report", folder, "--json").stdout)["family"] == "f"
    tree = json.loads(invoke("tree", folder, "--json").stdout)
    assert [(member["name"], member["parents"]) for member in tree] == [("a", []), ("b", ["a"])]


def test_people_see_tables_and_where_the_report_is(family):
    recipe, folder = family
    ran = invoke("run", recipe, "--out", folder)
    assert ran.exit_code == 0
    assert ran.stdout.rstrip().endswith(f"report: {folder / 'report.html'}")
    assert "└── b · grow" in invoke("tree", recipe).stdout
    assert "there already" in invoke("plan", recipe, "--out", folder).stdout


def test_a_wrong_request_exits_with_2_and_says_all_that_is_wrong_without_a_trace(family):
    recipe, _ = family
    recipe.write_text("family: f\nmodels:\n  a: {grwo: }\n  b: {grow: {parents: [c]}}\n")
    result = invoke("run", recipe)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "line 3: models.a.grwo: unknown verb 'grwo' (did you mean 'grow'?)" in result.stderr
    assert "line 4: models.b.grow.parents.0: unknown model 'c'" in result.stderr
    assert "Traceback" not in result.stderr
    as_json = json.loads(invoke("run", recipe, "--json").stdout)
    assert as_json["exit_code"] == 2
    assert "unknown verb 'grwo'" in as_json["error"]


def test_a_run_that_fails_exits_with_1_and_debug_shows_the_trace(family, monkeypatch):
    recipe, folder = family
    recipe.write_text("family: f\nmodels:\n  a: {grow: {fails: true}}\n")
    result = invoke("run", recipe, "--out", folder)
    assert (result.exit_code, "note: not made yet: a" in result.stdout) == (1, True)
    assert "graft: a: the loss is NaN" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("GRAFT_DEBUG", "1")
    assert "raise TrainingError" in invoke("run", recipe, "--out", folder).stderr


def test_a_defect_of_ours_is_one_line_that_says_how_to_see_more(family, monkeypatch):
    recipe, _ = family
    monkeypatch.setattr("graft.recipe.reader.read_yaml", lambda text: 1 / 0)
    result = invoke("plan", recipe)
    assert result.exit_code == 1
    assert (
        result.stderr == "graft: ZeroDivisionError: division by zero; this is a defect of graft: --debug shows where\n"
    )


def test_a_file_that_may_not_be_used_is_no_defect(family, monkeypatch):
    recipe, _ = family

    def refused(text):
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr("graft.recipe.reader.read_yaml", refused)
    result = invoke("plan", recipe)
    assert result.exit_code == 1
    assert result.stderr == "graft: some/file: permission denied; change its permissions or name another\n"


def test_memory_that_is_not_there_is_no_defect(family, monkeypatch):
    recipe, _ = family
    monkeypatch.setattr("graft.recipe.reader.read_yaml", lambda text: torch.empty(2**60, dtype=torch.uint8))
    result = invoke("plan", recipe)
    assert result.exit_code == 1
    assert re.fullmatch(
        r"graft: expected more memory than there is \(.*\): smaller batches, .* need less; `graft plan` says .*\n",
        result.stderr,
    )
    failure = attempt(lambda: bytearray(2**62))
    assert isinstance(failure, Failure)
    assert failure.message.startswith("expected more memory than there is (no more to be had): ")


def test_debug_may_stand_anywhere(family):
    recipe, _ = family
    recipe.write_text("family: f\nmodels:\n  a: {grow: {fails: true}}\n")
    code = f"import sys; from graft.cli import main; sys.argv = ['graft', 'run', {str(recipe)!r}, '--debug']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=recipe.parent)
    assert done.returncode == 1
    assert "raise TrainingError" in done.stderr


NOWHERE = {
    "run": ["nowhere.yaml"],
    "plan": ["nowhere.yaml"],
    "advise": ["nowhere", "--data", "x.jsonl"],
    "tree": ["nowhere"],
    "report": ["nowhere"],
    "relate": ["nowhere", "nobody"],
    "deltas": ["nowhere", "nobody"],
    "show": ["nowhere", "--text", "x"],
    "chat": ["nowhere", "-p", "x"],
    "eval": ["nowhere", "--on", "x.jsonl"],
    "gains": ["nowhere", "nobody", "--on", "x.jsonl"],
    "pretrain": ["out", "--data", "x.jsonl", "--budget", "1 steps"],
    "tune": ["out", "--from", "nowhere", "--data", "x.jsonl"],
    "adapt": ["out", "nowhere", "nobody"],
    "head": ["out", "nowhere", "--task", "topic"],
    "merge": ["out", "nowhere", "nobody"],
    "ensemble": ["out", "nowhere", "nobody"],
    "quantize": ["out", "nowhere"],
}
"""A request of each command for what is not there."""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_what_is_not_there_with_2_as_a_sentence_or_as_json(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(name, *NOWHERE[name])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("graft: ")
    assert "expected" in result.stderr
    told = json.loads(invoke(name, *NOWHERE[name], "--json").stdout)
    assert told["exit_code"] == 2
    assert result.stderr == f"graft: {told['error']}\n"


def test_what_can_be_called_from_python_is_a_command_and_the_other_way_round():
    """`explain` is an option of merge; what `load` gives is of use in Python only."""
    assert {"evaluate" if name == "eval" else name for name in COMMANDS} == set(CALLED) - {"explain", "load"}


def test_options_of_a_verb_become_settings():
    words = ["out", "--from", "a/model", "--learning-rate=1e-4", "--budget", "2M tokens"]
    assert requested("tune", words, ["method.full.freeze=['*.embed*']", "clip=null"]) == (
        "out",
        {
            "from": "a/model",
            "learning_rate": 1e-4,
            "budget": "2M tokens",
            "method": {"full": {"freeze": ["*.embed*"]}},
            "clip": None,
        },
    )


@pytest.mark.parametrize(
    ("verb", "words", "wanted"),
    [
        (
            "tune",
            ["--method", "lora", "--rank", "8", "--up-rate", "4"],
            "--method.lora.rank, --method.lora.up-rate, found",
        ),
        (
            "tune",
            ["--method", "{houlsby: {}}", "--width=8"],
            "--method.houlsby.width, found --width: options of houlsby",
        ),
        ("ensemble", ["--combine", "experts", "--alpha", "2"], "--combine.experts.alpha, found --alpha"),
    ],
)
def test_an_option_of_a_method_beside_it_is_told_where_it_belongs(verb, words, wanted):
    with pytest.raises(RequestError, match=f"^expected {wanted}"):
        requested(verb, ["out", *words], [])


@pytest.mark.parametrize(
    ("name", "method", "option"),
    [
        ("tune", "lora", "--method.lora.rank"),
        ("ensemble", "experts", "--combine.experts.alpha"),
        ("merge", "ties", "--scale"),
    ],
)
def test_options_of_a_method_are_taken_as_its_help_spells_them(name, method, option):
    shown = CliRunner().invoke(app, [name, method, "--help"], env={"COLUMNS": "200"}).output
    assert option in shown.partition(f"Settings of {method}")[2].split()
    settings = requested(name, ["out", option, "2"], [])[1]
    for step in option[2:].split("."):
        settings = settings[step]
    assert settings == 2


def test_models_stand_behind_the_folder_with_weights_or_without():
    assert models_field(fields_of("ensemble")) == "members"
    assert models_field(fields_of("merge")) == "models"
    assert models_field(fields_of("tune")) is None
    assert [model_field(fields_of(name)) for name in ("tune", "head", "quantize")] == ["from"] * 3
    assert [model_field(fields_of(name)) for name in ("pretrain", "adapt", "ensemble")] == [None] * 3
    assert requested("quantize", ["out", "a", "--bits", "8"], []) == ("out", {"from": "a", "bits": 8})
    assert requested("merge", ["out", "a=0.25", "b/c=0.75"], []) == ("out", {"models": {"a": 0.25, "b/c": 0.75}})
    assert requested("ensemble", ["out", "a", "b"], []) == ("out", {"members": ["a", "b"]})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "expected the folder to write"),
        (["out", "a=0.5", "b"], "expected a weight for every model or for none, found a=0.5 b"),
        (["out", "a=half"], "expected a weight such as 0.5 behind the =, found 'half'"),
        (["out", "--density"], "expected a value after --density"),
        (
            ["out", "--seeds", "3", "--seeds.on", "a.jsonl"],
            "expected settings inside of seeds, for seeds.on, found seeds=3",
        ),
        (["out", "--models", "{a: .5, a: .6}"], "models: expected every key once, found a twice in {a: .5, a: .6}"),
        (["out", "--over", "{x: {y: 1, y: 2}}"], r"over: expected every key once, found x\.y twice"),
    ],
)
def test_words_that_say_nothing_are_refused(words, expected):
    with pytest.raises(RequestError, match=expected):
        requested("merge", words, [])


@pytest.mark.parametrize(
    ("verb", "words", "expected"),
    [
        ("quantize", ["out", "a", "b"], "expected one model behind the folder, found 2: a b"),
        (
            "tune",
            ["out", "a", "--from", "b"],
            "expected the models behind the folder or as --from, found both: a and 'b'",
        ),
        ("pretrain", ["out", "a"], "expected one folder, found a as well: pretrain makes a model of none"),
    ],
)
def test_models_that_a_verb_does_not_take_are_refused(verb, words, expected):
    with pytest.raises(RequestError) as error:
        requested(verb, words, [])
    assert str(error.value) == expected


def test_all_of_a_file_is_measured_where_no_split_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"line number {n}" for n in range(200)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    raw = data.parse({"source": "jsonl", "path": str(tmp_path / "d.jsonl"), "splits": {"dev": 0, "test": 0}})
    tokenizer = train_tokenizer(data.open_corpus({"d": raw}, "d", tmp_path), "bpe", 300)
    model(tmp_path / "here", len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "here")
    counts = {}
    for on in ("d.jsonl", "d.jsonl.test", "d.jsonl.dev", "d.jsonl.train"):
        rows = json.loads(invoke("eval", "here", "--on", on, "--json").stdout)
        assert len(rows) == 1, rows
        row = rows[0]
        counts[on.rpartition(".")[2]] = row["n"]
    assert counts.pop("jsonl") == 200 == sum(counts.values())
    assert counts["train"] < 200


USAGE = {
    "pretrain": "pretrain OUT [OPTIONS]",
    "tune": "tune OUT [MODEL] [OPTIONS]",
    "quantize": "quantize OUT [MODEL] [OPTIONS]",
    "merge": "merge OUT [MODEL[=WEIGHT]]… [OPTIONS]",
}
"""What the help of a verb says that may stand behind it."""


@pytest.mark.parametrize("name", USAGE)
def test_the_help_shows_what_a_verb_takes_and_no_option_that_says_nothing_to_it(name):
    shown = invoke(name, "--help").stdout
    assert USAGE[name] in shown
    assert ("--launch" in shown) == (name in ("pretrain", "tune"))
    assert ("--methods" in shown) == (name in ("tune", "merge"))


def test_the_help_says_whole_sentences_and_keeps_what_stands_in_brackets():
    shown = " ".join(invoke("merge", "--help").stdout.split())
    assert "of each model [first, after the last], equally many." in shown
    assert "those that have it are averaged" in shown
    assert "of the task vectors" in " ".join(invoke("merge", "--methods").stdout.split())


def test_an_option_that_says_nothing_to_a_verb_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "here")
    result = invoke("quantize", "out", "here", "--launch", "torchrun")
    assert result.exit_code == 2
    assert "launch: unknown key; there are: from, bits" in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrian"], "unknown command 'pretrian' (did you mean 'pretrain'?); there are: adapt, "),
        (["run"], "missing argument 'RECIPE'; `graft run --help` shows what there is"),
        (["run", "x.yaml", "--jobs", "many"], "invalid value for '--jobs'"),
        (["run", "x.yaml", "--jbos", "2"], "no such option: --jbos"),
        (["eval", "a", "--top-k", "2"], "settings are given as `--set top_k=…`; `graft eval --help` shows what there"),
    ],
)
def test_what_is_wrong_with_the_words_is_told_as_every_other_error(words, expected):
    result = CliRunner().invoke(app, words, prog_name="graft")
    assert result.exit_code == 2
    assert result.stderr.startswith("graft: ")
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    told = json.loads(CliRunner().invoke(app, [*words, "--json"], prog_name="graft").stdout)
    assert f"graft: {told['error']}\n" == result.stderr
    assert told["exit_code"] == 2


def test_without_any_words_the_help_is_shown():
    assert "Usage: graft [OPTIONS] COMMAND [ARGS]..." in CliRunner().invoke(app, [], prog_name="graft").output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--on FILE, --task FILE or --recipe FILE with measures, as in `graft eval here --on held-out.jsonl`"),
        (["--measure", "perplexity", "--task", "t.yaml"], "expected what to measure on, found nothing: --on FILE"),
        (["--recipe", "r.yaml"], "expected what to measure on, found nothing: --on FILE"),
        (["--on", "d.jsonl", "--measure", "perplexty"], "--measure: unknown measure 'perplexty' (did you mean 'perple"),
        (["--on", "d.jsonl", "--set", "limt=3"], "--set limt=…: unknown key (did you mean 'limit'?)"),
    ],
)
def test_a_request_to_measure_that_is_wrong_is_told_in_words_of_the_command(words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("family: f\n")
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    result = invoke("eval", "here", *words)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert "evaluate." not in result.stderr


def test_an_option_that_a_verb_does_not_have_is_shown_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("pretrain", "out", "--data", "x.jsonl", "--lerning-rate", "1")
    assert result.exit_code == 2
    assert "lerning_rate: unknown key (did you mean 'learning_rate'?)" in result.stderr


def test_an_answer_that_nobody_reads_is_no_defect(monkeypatch, capsys):
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        with pytest.raises(typer.Exit) as ended:
            tidy(lambda: print("an answer", flush=True))()
        monkeypatch.undo()
    assert (ended.value.exit_code, capsys.readouterr().err) == (1, "")
