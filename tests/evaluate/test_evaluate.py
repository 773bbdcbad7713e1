"""Measuring whole folders: rows, items, comparisons, tasks, and what a kill leaves."""

import gzip
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import graft
from graft import data, models
from graft.errors import DataError, RequestError, RunError, ScoresFailed, SettingsError
from graft.evaluate import evaluate, parse
from graft.evaluate.items import subjects
from graft.evaluate.scorer import Scorer
from graft.evaluate.statistics import wilson
from graft.evaluate.tasks import load_task

from .conftest import make


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def family(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("family")
    found = {}
    for kind in ("llama", "gpt2"):
        models.save(make(kind), tokenizer, root / kind)
        found[kind] = root / kind
    return found


@pytest.fixture
def sets(tmp_path):
    texts = [{"text": f"sentence number {n} is {'long ' * (n % 7)}here"} for n in range(30)]
    labelled = [{"text": f"item {n}", "label": "even" if n % 2 == 0 else "odd"} for n in range(20)]
    pairs = [{"source": f"say {n}", "target": f"{n}"} for n in range(8)]
    raw = {
        "plain": {"source": "jsonl", "test": write(tmp_path / "plain.jsonl", texts)},
        "other": {"source": "jsonl", "test": write(tmp_path / "other.jsonl", texts[:4])},
        "classes": {"source": "jsonl", "test": write(tmp_path / "classes.jsonl", labelled)},
        "pairs": {"source": "jsonl", "test": write(tmp_path / "pairs.jsonl", pairs)},
        "mixed": {"mix": {"plain": 0.25, "other": 0.75}},
    }
    return {name: data.parse(value) for name, value in raw.items()}


def run(folders, raw, sets, tmp_path, **more):
    out = tmp_path / "out"
    return evaluate(folders, parse(raw), data=sets, root=tmp_path, out=out, **more)


def test_bits_per_byte_is_the_bits_of_all_documents_over_their_bytes(family, sets, tmp_path):
    rows = run(family, [{"measure": "bits_per_byte", "on": ["plain.test"]}], sets, tmp_path)
    scores = [row for row in rows if row["kind"] == "score"]
    for row in scores:
        scorer = Scorer(models.load(family[row["model"]]), models.load_tokenizer(family[row["model"]]))
        texts = [record["text"] for record in data.open_corpus(sets, "plain", tmp_path).records("test")]
        found = scorer.documents(texts)
        assert row["value"] == pytest.approx(sum(d.bits for d in found) / sum(d.bytes for d in found))
        assert row["low"] < row["value"] < row["high"]
        assert row["n"] == len(texts) == 30
    (pair,) = [row for row in rows if row["kind"] == "comparison"]
    assert pair["models"] == ["llama", "gpt2"]
    assert pair["difference"] == pytest.approx(scores[0]["value"] - scores[1]["value"])
    assert pair["low"] <= pair["difference"] <= pair["high"]


def test_a_measure_may_be_taken_of_some_models_only_and_keeps_its_rows_when_more_are_asked_for(family, sets, tmp_path):
    measure = {"measure": "bits_per_byte", "on": ["other.test"]}
    some = run(family, [{**measure, "models": ["gpt2"]}], sets, tmp_path)
    assert [(row["kind"], row["model"]) for row in some] == [("score", "gpt2")]
    every = run(family, [measure], sets, tmp_path)
    assert [row["kind"] for row in every] == ["score", "score", "comparison"]
    assert every[1] == some[0]


def test_every_pair_is_compared_metric_by_metric(family, sets, tmp_path):
    folders = {"a": family["llama"], "b": family["gpt2"], "c": family["llama"]}
    raw = [{"measure": "classification", "on": ["classes.test"], "metrics": ["accuracy", "mcc"]}]
    rows = [row for row in run(folders, raw, sets, tmp_path) if row["kind"] == "comparison"]
    assert {(*row["models"], row["metric"]) for row in rows} == {
        (*pair, metric) for pair in ("ab", "ac", "bc") for metric in ("accuracy", "mcc")
    }
    same = next(row for row in rows if row["models"] == ["a", "c"] and row["metric"] == "mcc")
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)


def test_a_mixture_counts_its_parts_by_their_shares(family, sets, tmp_path):
    rows = run(
        {"llama": family["llama"]},
        [{"measure": "bits_per_byte", "on": ["plain.test", "other.test", "mixed.test"]}],
        sets,
        tmp_path,
    )
    plain, other, mixed = [row["value"] for row in rows]
    assert mixed == pytest.approx(0.25 * plain + 0.75 * other)


def test_what_is_measured_is_not_measured_again(family, sets, tmp_path, monkeypatch):
    raw = [{"measure": "perplexity", "on": ["plain.test"]}]
    first = run(family, raw, sets, tmp_path)
    monkeypatch.setattr(Scorer, "documents", lambda *_: pytest.fail("scored again"))
    assert run(family, raw, sets, tmp_path) == first


def test_another_configuration_of_the_same_weights_is_another_model(family, sets, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(family["llama"], folder)
    asked = [{"measure": "bits_per_byte", "on": ["plain.test"]}]
    (before,) = run({"m": folder}, asked, sets, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    (after,) = run({"m": folder}, asked, sets, tmp_path)
    assert after["key"] != before["key"]
    assert after["value"] != before["value"]


def test_a_torn_last_line_is_cut_and_only_its_row_is_made_again(family, sets, tmp_path):
    raw = [{"measure": "bits_per_byte", "on": ["plain.test", "other.test"]}]
    first = run(family, raw, sets, tmp_path)
    path = tmp_path / "out" / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    again = run(family, raw, sets, tmp_path)
    assert [(r["kind"], r.get("value"), r.get("difference")) for r in again] == [
        (r["kind"], r.get("value"), r.get("difference")) for r in first
    ]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_items_stand_beside_their_row(family, sets, tmp_path):
    (row, *_) = run(family, [{"measure": "bits_per_byte", "on": ["other.test"]}], sets, tmp_path)
    lines = gzip.decompress((tmp_path / "out" / row["items"]).read_bytes()).decode().splitlines()
    items = [json.loads(line) for line in lines]
    assert sum(item["statistics"][0] for item in items) / sum(item["bytes"] for item in items) == pytest.approx(
        row["value"]
    )


def test_classification_chooses_the_likeliest_label(family, sets, tmp_path):
    raw = [{"measure": "classification", "on": ["classes.test"], "metrics": ["accuracy", "mcc"]}]
    rows = run({"llama": family["llama"]}, raw, sets, tmp_path)
    scorer = Scorer(models.load(family["llama"]), models.load_tokenizer(family["llama"]))
    records = list(data.open_corpus(sets, "classes", tmp_path).records("test"))
    right = 0
    for record in records:
        pairs = [("<s>" + record["text"] + "\n", label) for label in ("even", "odd")]  # begun as in training
        even, odd = scorer.loglikelihoods(pairs)
        right += ("even" if even.log_prob >= odd.log_prob else "odd") == record["label"]
    assert [row["metric"] for row in rows] == ["accuracy", "mcc"]
    assert rows[0]["value"] == pytest.approx(right / len(records))
    assert rows[0]["interval"] == "wilson"


def test_scores_that_no_item_leaves_have_an_interval_and_so_has_their_difference(family, sets, tmp_path):
    """No output has a snowman: every item is 0, in every resample."""
    write(tmp_path / "pairs.jsonl", [{"source": f"say {n}", "target": "\u2603 " * (n + 1)} for n in range(8)])
    asked = {"measure": "generation", "on": ["pairs.test"], "metrics": ["token_f1", "bleu"], "max_tokens": 2}
    folders = {**family, "again": family["llama"]}
    rows = run(folders, [asked], sets, tmp_path)
    most = {"token_f1": wilson(0, 8)[1], "bleu": 100 * wilson(0, 8)[1]}
    for row in rows:
        if row["kind"] == "score":
            assert (row["value"], row["low"]) == (0, 0)
            assert row["high"] == pytest.approx(most[row["metric"]])
            assert row["interval"] == "wilson, no item differs"
        elif row["models"] == ["llama", "again"]:
            assert (row["low"], row["high"], row["p"]) == (0, 0, 1)
        else:
            assert (row["low"], row["high"]) == pytest.approx((-most[row["metric"]], most[row["metric"]]))


def test_generation_is_compared_with_its_targets(family, sets, tmp_path):
    raw = [
        {
            "measure": "generation",
            "on": ["pairs.test"],
            "metrics": ["exact_match", "chrf", "bleu", "rougeL"],
            "max_tokens": 4,
        }
    ]
    rows = run(family, raw, sets, tmp_path)
    assert {row["metric"] for row in rows if row["kind"] == "score"} == {"exact_match", "chrf", "bleu", "rougeL"}
    assert {row["test"] for row in rows if row["kind"] == "comparison" and row["metric"] == "exact_match"} == {
        "McNemar, exact"
    }


def test_a_yaml_task_with_choices_and_shots(family, sets, tmp_path):
    rows = [{"q": f"{n} is", "options": ["small", "large"], "answer": n % 2, "n": n} for n in range(12)]
    write(tmp_path / "sizes.jsonl", rows)
    write(
        tmp_path / "examples.jsonl", [{"q": "1 is", "options": ["small", "large"], "answer": 0, "n": 1}] * 2 + rows[:1]
    )
    (tmp_path / "sizes.yaml").write_text(
        "name: sizes\nversion: 3\ndata: {source: jsonl, format: raw, test: sizes.jsonl, train: examples.jsonl}\n"
        "prompt: '{{ q }}'\nchoices: '{{ options }}'\ntarget: '{{ answer }}'\n"
        "metrics: [accuracy, accuracy_per_byte]\nshots: 1\n"
    )
    found = run({"llama": family["llama"]}, [{"task": "sizes.yaml"}], sets, tmp_path)
    scorer = Scorer(models.load(family["llama"]), models.load_tokenizer(family["llama"]))
    items = data.open_corpus(
        {"t": data.parse({"source": "jsonl", "format": "raw", "test": str(tmp_path / "sizes.jsonl")})}, "t", tmp_path
    )
    right = {"accuracy": 0, "accuracy_per_byte": 0}
    count = 0
    for row in items.records("test"):
        answers = scorer.loglikelihoods([("1 issmall\n\n" + row["q"], option) for option in row["options"]])
        raw = [a.log_prob for a in answers]
        right["accuracy"] += int(np.argmax(raw)) == row["answer"]
        right["accuracy_per_byte"] += int(np.argmax([v / 5 for v in raw])) == row["answer"]
        count += 1
    assert {row["metric"]: row["value"] for row in found} == {name: k / count for name, k in right.items()}
    assert found[0]["task"] == "sizes"
    assert found[0]["task_version"] == 3


def test_the_space_in_front_of_a_choice_is_read_and_not_counted(monkeypatch, family, sets, tmp_path):
    told = {" yes": -6.0, " no": -4.1, " naïf": -9.9}
    monkeypatch.setattr(
        Scorer, "loglikelihoods", lambda _, asked, **__: [SimpleNamespace(log_prob=told[c], tokens=1) for _, c in asked]
    )
    write(tmp_path / "some.jsonl", [{"q": "so?"}] * 2)
    (tmp_path / "some.yaml").write_text(
        "name: some\ndata: {source: jsonl, format: raw, test: some.jsonl}\nprompt: '{{ q }}'\n"
        "choices: [' yes', ' no', ' naïf']\ntarget: naïf\nmetrics: [accuracy, accuracy_per_byte]\n"
    )
    found = run({"llama": family["llama"]}, [{"task": "some.yaml"}], sets, tmp_path)
    # a byte, as in lm-eval's acc_bytes: -2, -2.05, -1.98; with the space -1.5, -1.37, -1.65; a character -2.48 at last
    assert {row["metric"]: row["value"] for row in found} == {"accuracy": 0.0, "accuracy_per_byte": 1.0}


@pytest.mark.parametrize(("written", "split"), [("x.dev", "dev"), ("x.train", "train"), ("x", "test")])
def test_a_task_is_measured_on_the_split_that_its_data_name(tmp_path, written, split):
    (tmp_path / "t.yaml").write_text(f"name: t\ndata: {written}\nprompt: '{{{{ n }}}}'\ntarget: x\n")
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.jsonl", [{"n": f"{name} {n}"} for n in range(3)])
    own = {f: str(tmp_path / f"{f}.jsonl") for f in ("train", "dev", "test")}
    sets = {"x": data.parse({"source": "jsonl", "format": "raw", **own})}
    (subject,) = subjects(parse([{"task": "t.yaml"}])[0], sets, tmp_path)
    assert [record["n"] for record in subject.records] == [f"{split} {n}" for n in range(3)]
    assert subject.on == f"t.{split}"


def test_a_task_that_names_two_splits_is_refused(tmp_path):
    (tmp_path / "t.yaml").write_text("name: t\ndata: x.dev\nsplit: test\nprompt: p\ntarget: x\n")
    with pytest.raises(SettingsError, match=r"line 1: expected one split, found `data: x\.dev` and `split: test`"):
        load_task(tmp_path / "t.yaml")


def test_a_limit_draws_from_all_of_a_split_and_the_same_whatever_the_order(sets, tmp_path):
    measure = parse([{"measure": "bits_per_byte", "on": ["plain.test", "mixed.test"], "limit": 6}])[0]
    alone, mixed = subjects(measure, sets, tmp_path)
    every = [record["text"] for record in data.open_corpus(sets, "plain", tmp_path).records("test")]
    chosen = [record["text"] for record in alone.records]
    assert chosen == [text for text in every if text in chosen]
    assert len(chosen) == 6
    assert chosen != every[:6]
    assert len(mixed.records) == 6 + 4
    file = tmp_path / "plain.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert [r["text"] for r in subjects(measure, sets, tmp_path)[0].records] == chosen[::-1]


def test_what_was_drawn_otherwise_is_measured_anew(family, sets, tmp_path, monkeypatch):
    raw = [{"measure": "perplexity", "on": ["plain.test"], "limit": 3}, {"measure": "perplexity", "on": ["other.test"]}]
    one = {"llama": family["llama"]}
    limited, whole = run(one, raw, sets, tmp_path)
    monkeypatch.setattr("graft.evaluate.items.DRAWN", 2)
    again = run(one, raw, sets, tmp_path)
    assert again[0]["key"] != limited["key"]
    assert again[1] == whole


def test_a_python_task_gives_functions_for_templates(tmp_path):
    (tmp_path / "upper.py").write_text(
        "task = {'name': 'upper', 'data': 'x.test', 'target': '{{ word | upper }}'}\n"
        "def prompt(record):\n    return 'Shout: ' + record['word'] + ' '\n"
    )
    task = load_task(tmp_path / "upper.py")
    assert task.prompt({"word": "hi"}) == "Shout: hi "
    assert task.target({"word": "hi"}) == ["HI"]


def test_drawn_shots_follow_their_seed(family, sets, tmp_path):
    write(tmp_path / "numbers.jsonl", [{"n": n} for n in range(40)])
    write(tmp_path / "asked.jsonl", [{"n": 99}])
    found = {}
    for seed in (1, 1, 2):
        (tmp_path / "t.yaml").write_text(
            "name: t\ndata: {source: jsonl, format: raw, test: asked.jsonl, train: numbers.jsonl}\n"
            f"prompt: '{{{{ n }}}}'\ntarget: x\nshots: 3\nshots_seed: {seed}\n"
        )
        (subject,) = subjects(parse([{"task": "t.yaml"}])[0], sets, tmp_path)
        drawn = [example["n"] for example in subject.examples]
        assert found.setdefault(seed, drawn) == drawn
        assert len(set(drawn)) == 3
    assert found[1] != found[2]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            "name: t\ndata: x\nprompt: a\ntarget: b\nsplit: train\nshots: 1\n",
            RequestError,
            "from another split than train",
        ),
        ("name: t\ndata: x\npromt: a\ntarget: b\n", SettingsError, "did you mean 'prompt'"),
        ("name: t\ndata: x\ntarget: b\n", RequestError, "expected `prompt`"),
        (
            "name: t\ndata: x\nprompt: a\ntarget: b\nmetrics: [accuracy]\n",
            RequestError,
            "expected metrics among exact_match",
        ),
        ("name: t\ndata: x\nprompt: '{{ a'\ntarget: b\n", RequestError, "line 3: prompt: expected a template"),
        ("name: [t\n", RequestError, "line 2: this is not YAML"),
        ("- t\n", RequestError, "expected a mapping .*, found list"),
    ],
)
def test_a_wrong_task_says_what_is_wrong_and_names_its_file(tmp_path, content, error, message):
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(error, match=message) as told:
        load_task(tmp_path / "t.yaml")
    assert str(told.value).startswith(str(tmp_path / "t.yaml"))


@pytest.mark.parametrize("code", ["task = {}\ndef prompt(r: return 1\n", "1 / 0\n", "import nowhere\n", "task = 3\n"])
def test_code_that_is_wrong_is_a_wrong_request(tmp_path, code):
    (tmp_path / "t.py").write_text(code)
    with pytest.raises(RequestError) as told:
        load_task(tmp_path / "t.py")
    assert str(told.value).startswith(str(tmp_path / "t.py"))


def test_words_of_a_task_are_words_whatever_they_mean_elsewhere(tmp_path):
    (tmp_path / "t.yaml").write_text("name: t\ndata: x\nprompt: a\nchoices: [yes, no]\ntarget: no\n")
    assert load_task(tmp_path / "t.yaml").right({}) == 1


def test_a_template_that_fails_on_a_record_names_the_file_and_the_template(tmp_path):
    (tmp_path / "t.yaml").write_text("name: t\ndata: x\nprompt: '{{ n + 1 }}'\ntarget: b\n")
    with pytest.raises(DataError, match=r"t\.yaml: `prompt`: template '{{ n \+ 1 }}': .*the record has n"):
        load_task(tmp_path / "t.yaml").prompt({"n": "x"})


def test_a_template_may_not_reach_out_of_its_record(tmp_path):
    (tmp_path / "t.yaml").write_text("name: t\ndata: x\nprompt: \"{{ ''.__class__.__mro__ }}\"\ntarget: b\n")
    with pytest.raises(DataError, match="access to attribute '__class__' of 'str' object is unsafe"):
        load_task(tmp_path / "t.yaml").prompt({"a": 1})


def test_a_missing_field_is_named(tmp_path):
    (tmp_path / "t.yaml").write_text("name: t\ndata: x\nprompt: '{{ question }}'\ntarget: b\n")
    with pytest.raises(DataError, match=r"question.*the record has q"):
        load_task(tmp_path / "t.yaml").prompt({"q": 1})


def test_a_misspelt_measure_is_shown_the_right_one():
    with pytest.raises(SettingsError, match="did you mean 'bits_per_byte'"):
        parse([{"measure": "bits_per_bite", "on": ["a"]}])


def test_a_model_without_a_tokenizer_is_named_before_any_is_measured(family, sets, tmp_path):
    mute = tmp_path / "mute"
    shutil.copytree(next(iter(family.values())), mute, ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(RequestError, match=rf"expected models with a tokenizer, found none in {mute}: put its files"):
        run({**family, "mute": mute}, [{"measure": "bits_per_byte", "on": ["plain.test"]}], sets, tmp_path)
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_model_that_gives_nan_is_named(tokenizer, sets, tmp_path):
    broken = make("llama")
    with torch.no_grad():
        broken.model.norm.weight.fill_(3e38)  # a number, whose products are none
    models.save(broken, tokenizer, tmp_path / "broken")
    with pytest.raises(RunError, match=r"broken on plain\.test"):
        run({"broken": tmp_path / "broken"}, [{"measure": "bits_per_byte", "on": ["plain.test"]}], sets, tmp_path)


def test_what_cannot_be_measured_of_a_model_stops_nothing_else(family, sets, tmp_path):
    raw = [
        {"measure": "generation", "on": ["pairs.test"], "max_tokens": 10**6, "models": ["gpt2"]},
        {"measure": "bits_per_byte", "on": ["other.test"]},
    ]
    with pytest.raises(ScoresFailed) as told:
        run(family, raw, sets, tmp_path)
    assert told.value.exit_code == 1
    (line,) = str(told.value).splitlines()
    assert line.startswith("generation of gpt2 on pairs.test: expected fewer than")
    assert [(row["kind"], row["measure"]) for row in told.value.done] == [
        ("score", "bits_per_byte"), ("score", "bits_per_byte"), ("comparison", "bits_per_byte"),
    ]  # fmt: skip
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 3


def test_data_that_cannot_be_read_stop_no_other_measure(family, sets, tmp_path):
    late = tmp_path / "late.jsonl"
    late.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(99)) + '{"text": 5}\n')
    sets = {**sets, "late": data.parse({"source": "jsonl", "test": str(late)})}
    raw = [{"measure": "bits_per_byte", "on": ["late.test", "other.test"], "models": ["gpt2"]}]
    with pytest.raises(ScoresFailed) as told:
        run(family, raw, sets, tmp_path)
    assert str(told.value) == f"bits_per_byte on late.test: {late}, line 100: expected text in 'text', found int '5'"
    assert told.value.exit_code == 1
    assert [row["on"] for row in told.value.done] == ["other.test"]
    with pytest.raises(ScoresFailed) as alone:
        run(family, [raw[0] | {"on": ["late.test"]}], sets, tmp_path)
    assert alone.value.exit_code == 2


def test_measures_of_one_name_that_fail_are_told_each(family, sets, tmp_path):
    raw = [{"measure": "generation", "on": ["pairs.test"], "max_tokens": size} for size in (10**6, 10**7)]
    with pytest.raises(ScoresFailed) as told:
        run({"gpt2": family["gpt2"]}, raw, sets, tmp_path)
    assert [line.split(":")[-1] for line in str(told.value).splitlines()] == [" 1000000", " 10000000"]


def test_what_leaves_no_room_for_a_prompt_is_said_before_any_is_measured(family, sets, tmp_path):
    plain = {"pairs": {"source": "jsonl", "test": str(tmp_path / "pairs.jsonl")}}
    (tmp_path / "t.yaml").write_text("name: t\ndata: pairs.test\nprompt: p\ntarget: x\nmax_tokens: 1000000\n")
    asked = [{"measure": "generation", "on": ["pairs.test"], "max_tokens": 10**6}, {"task": "t.yaml"}]
    with pytest.raises(SettingsError) as told:
        graft.evaluate(family, asked, data_sets=plain, root=tmp_path, out=tmp_path / "out")
    first, second = str(told.value).splitlines()
    assert first.startswith(
        "evaluate.0.max_tokens: generation writes up to 1000000 tokens: expected models that read more"
    )
    assert "llama (" in first
    assert "gpt2 (" in first
    assert f"{tmp_path / 't.yaml'}: max_tokens: the task writes up to 1000000 tokens" in second
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_model_that_rules_a_text_out_gets_no_number_and_stops_nobody(family, sets, tmp_path, monkeypatch):
    def ruled_out(self, texts):
        found = whole(self, texts)
        if type(self.model).__name__ == "GPT2LMHeadModel":
            found[0].log_probs[0] = -np.inf
        return found

    whole = Scorer.documents
    monkeypatch.setattr(Scorer, "documents", ruled_out)
    rows = run(family, [{"measure": "bits_per_byte", "on": ["plain.test"]}], sets, tmp_path)
    assert [row["kind"] for row in rows] == ["score", "score"]
    assert rows[0]["value"] > 0
    assert rows[1]["value"] is None
    assert "probability zero" in rows[1]["note"]
