"""Advice names a method that fits, says on what evidence and how sure it is, and writes a recipe that a plan takes."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import graft
from graft import data, models
from graft.advise import advice, candidates, evidence
from graft.advise.evidence import Score, Study, alike, standing
from graft.cli import app
from graft.data.tokenizers import train_tokenizer
from graft.errors import RequestError
from graft.methods import method_names
from graft.pretrain.architectures import Shape, build, config_for
from graft.train.memory import PROCESS
from graft.verb import Facts

ROWS = {
    "text": [{"text": f"plain text number {n} of all the texts that there are"} for n in range(60)],
    "labelled": [{"text": f"item {n}", "label": "even" if n % 2 == 0 else "odd"} for n in range(60)],
    "pairs": [{"source": f"word {n}", "target": f"drow {n}"} for n in range(60)],
    "chat": [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(60)
    ],
}
LARGE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    raw = data.parse({"source": "python-library", "packages": ["json"], "splits": {"dev": 0, "test": 0}})
    tokenizer = train_tokenizer(data.open_corpus({"c": raw}, "c", folder), "bpe", 400)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    torch.manual_seed(0)
    made = build(config_for("decoder", "rotary", Shape(32, 2, 2, len(tokenizer), 64, 0.0, ids)))
    models.save(made, tokenizer, folder)
    return folder


def rows(folder, kind):
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    return path


def advised(tmp_path, base, kind="text", **more):
    return graft.advise(base, rows(tmp_path, kind), budget="2 steps", **more)


def test_the_table_names_methods_that_there_are_and_where_every_figure_comes_from():
    table = evidence()
    named = {score.method for study in table.studies for score in study.scores}
    assert named <= set(method_names("graft.tune"))
    assert all(study.source and study.rows > 0 for study in table.studies)
    assert all(claim.source and claim.on for claim in table.claims)
    assert {study.task for study in table.studies} == {"classification", "generation"}


def study(data, better="higher", parameters=10**8, **scores):
    made = [Score(method=name.rstrip("_"), share=share, score=score) for name, (share, score) in scores.items()]
    return Study(
        task="generation", data=data, rows=1, model="m", architecture="decoder", metric="x", better=better, full=20.0,
        source="s", scores=made, parameters=parameters,
    )  # fmt: skip


def test_a_method_stands_by_the_figures_at_the_nearest_shares():
    one = study("a", lora=(0.1, 10.0), lora_=(4.0, 18.0), prefix=(4.0, 19.0))
    two = study("b", "lower", lora=(5.0, 25.0), prompt=(0.1, 40.0))
    stood = standing([one, two], "lora", 3.0)
    assert stood.kept == pytest.approx((18 / 20 + 20 / 25) / 2)
    assert not stood.far
    assert len(stood.figures) == 2
    few = standing([one, two], "lora", 0.1)
    assert few.kept == pytest.approx(10 / 20)  # the other study has it at fifty times the share
    far = standing([two], "prompt", 5.0)
    assert (far.kept, far.far) == (0.5, True)
    assert standing([one, two], "ia3", 1.0) is None


def test_models_of_another_size_have_no_say_where_nearer_ones_were_studied():
    small, middle, big = (study("d", parameters=10**n) for n in (6, 8, 9))
    assert alike([small, middle, big], 10**6) == [small]
    assert alike([small, middle, big], 7 * 10**9) == [middle, big]
    assert alike([middle], 10**3) == [middle]


def published(monkeypatch):
    """Only what others measured, on models of 100 million parameters and more."""
    table = evidence()
    kept = table.model_copy(update={"studies": [study for study in table.studies if not study.here]})
    monkeypatch.setattr(advice, "evidence", lambda: kept)


def test_methods_are_sized_to_the_share_and_those_that_find_no_place_say_so(base):
    from graft.facts import facts_of

    facts = facts_of(base)
    found = {each.method: each for each in candidates.sized(["lora", "prefix", "mix_and_match", "bitfit"], facts, 900)}
    assert found["full"].trained == facts.parameters
    for name in ("lora", "prefix", "mix_and_match"):
        assert 450 <= found[name].trained <= 1800
        assert found[name].share == pytest.approx(100 * found[name].trained / facts.parameters)
    assert "no place" in found["bitfit"].why_not  # the model has no biases
    (_, small) = candidates.sized(["lora"], facts, 10)
    assert "at its smallest it trains" in small.why_not
    (_, large) = candidates.sized(["lora"], facts, 10**7)
    assert large.options["rank"] <= 32  # no rank above a layer's size


def large(parameters):
    return Facts("decoder", "i", "v", parameters, 4 * parameters, LARGE)


def test_what_does_not_fit_is_changed_then_packed_then_left_out():
    facts, training = large(660_000_000), {"data": "d", "length": 512, "batch_size": 32, "budget": "10 steps"}
    full, lora = candidates.sized(["lora"], facts, 2_000_000)
    roomy = candidates.fitted(lora, facts, training, 100 * 10**9)
    assert (roomy.changes, roomy.packed, roomy.why_not) == ({}, False, "")
    tight = candidates.fitted(lora, facts, training, int(0.6 * roomy.memory_bytes))
    assert tight.changes
    assert tight.memory_bytes <= 0.6 * roomy.memory_bytes
    assert not tight.packed
    weights = 4 * facts.parameters
    refused = candidates.fitted(full, facts, training, 2 * weights)
    assert "does not fit" in refused.why_not
    assert "does not fit" in candidates.fitted(lora, facts, training, 10**8).why_not


def test_a_base_is_packed_where_nothing_else_makes_an_adapter_fit():
    pytest.importorskip("bitsandbytes")
    facts, training = large(660_000_000), {"data": "d", "length": 128, "batch_size": 8, "budget": "10 steps"}
    _, lora = candidates.sized(["lora"], facts, 2_000_000)
    found = candidates.fitted(lora, facts, training, int(2.6e9))
    assert found.packed
    assert not found.why_not
    assert found.memory_bytes <= 2.6e9


def test_text_is_learned_by_all_weights_where_there_is_room_and_by_lora_for_many_tasks(tmp_path, base, monkeypatch):
    published(monkeypatch)
    whole = advised(tmp_path, base)
    assert (whole.task, whole.method) == ("text", "full")
    assert any("Biderman" in reason for reason in whole.why)
    shared = advised(tmp_path, base, many=True)
    assert shared.method == "lora"
    assert any("LoRA Without Regret" in reason for reason in shared.why)
    highest = max(shared.standings, key=lambda name: shared.standings[name].kept)
    assert (highest != "lora") == any(reason.startswith(f"{highest} kept more") for reason in shared.why)
    assert "none of them measured with graft" in shared.strength
    assert "those of generation stand in" in shared.strength


def test_labels_are_learned_by_few_weights_since_figures_say_that_they_suffice(tmp_path, base, monkeypatch):
    published(monkeypatch)
    found = advised(tmp_path, base, "labelled")
    assert found.task == "classification"
    stood = found.standings
    possible = [each.method for each in found.candidates[1:] if not each.why_not]
    assert found.method == max(possible, key=lambda name: stood[name].kept)
    assert stood[found.method].kept >= advice.ENOUGH
    assert any(f"{found.method}: accuracy" in reason for reason in found.why)
    assert "none with a decoder" in found.strength


@pytest.mark.parametrize("kind", ["labelled", "pairs"])
def test_small_models_are_tuned_whole_since_that_was_measured_on_such(tmp_path, base, kind):
    found = advised(tmp_path, base, kind)
    assert found.method == "full"
    assert any("measured with graft: bench/RESULTS.md" in reason for reason in found.why)
    assert any(reason.startswith("full tuning fits, and no method with few weights is known") for reason in found.why)
    assert "none of them measured with graft" not in found.strength
    assert all(stood.here for stood in found.standings.values())


def test_what_is_said_to_be_measured_here_stands_in_the_results():
    text = (Path(__file__).parents[2] / "bench" / "RESULTS.md").read_text(encoding="utf-8")
    for study in (study for study in evidence().studies if study.here):
        heading = study.source.partition(", ")[2]
        assert heading in text, study.source
        section = text[text.index(heading) :]
        section = section[: section.index("Less full tuning:")]
        assert f"full {study.full:.3f} ±" in section
        rows = [line for line in section.splitlines() if line.startswith("| ")]
        for score in study.scores:
            own = [row for row in rows if row.startswith(f"| {score.method} |") or f"| {score.method}, gates" in row]
            cells = [f"{score.score:.3f}" in row.replace("*", "") and f"({score.share:g} %," in row for row in own]
            assert any(cells), (study.source, score)


def test_a_share_that_is_given_is_kept(tmp_path, base):
    found = advised(tmp_path, base, "pairs", share=2.0)
    chosen = next(each for each in found.candidates if each.method == found.method)
    assert 0.5 <= chosen.share <= 4
    assert found.method != "full"


@pytest.mark.parametrize("kind", list(ROWS))
def test_the_recipe_compares_the_method_with_neighbours_and_full_tuning_and_a_plan_takes_it(tmp_path, base, kind):
    found = advised(tmp_path, base, kind, write=tmp_path / "check.yaml")
    text = (tmp_path / "check.yaml").read_text()
    made = yaml.safe_load(text)
    assert not re.search(r"[&*]id\d", text)
    assert {found.method, "full"} <= set(made["models"])
    assert len(made["models"]) >= 1 + 2 * 3
    assert set(re.findall("learning_rate: (.*)", text)) == {"0.0001", "0.0003", "0.001", "0.003"}
    plan = graft.plan(tmp_path / "check.yaml", tmp_path / "run")
    assert set(plan.steps) == set(made["models"])
    assert made["evaluate"]


@pytest.mark.parametrize(
    ("share", "words"), [(100.0, "100"), (12.3, "12"), (0.5, "0.5"), (0.01234, "0.012"), (1.2e-6, "0.0000012")]
)
def test_shares_are_written_without_an_exponent(share, words):
    assert advice.percent(share) == words


def test_advice_within_a_memory_is_what_the_plan_calls_fitting(tmp_path, base):
    from graft.plan.fit import fits

    free = {each.method: each.memory_bytes for each in advised(tmp_path, base).candidates if not each.why_not}
    limit = PROCESS + int(0.5 * (min(free.values()) - PROCESS))
    found = advised(tmp_path, base, fit=f"{limit}b", write=tmp_path / "check.yaml")
    plan = graft.plan(tmp_path / "check.yaml", tmp_path / "run")
    told = {each.node: each for each in fits(plan, limit) if each.node not in ("base", "packed")}
    assert told
    assert all(each.fits for each in told.values())
    said = {each.method: each.memory_bytes for each in found.candidates}
    assert told[found.method].memory_bytes == said[found.method]
    with pytest.raises(RequestError, match=r"nothing fits: full, .*lora, .*: it does not fit into the memory"):
        advised(tmp_path, base, fit="1MB")


def test_of_packed_weights_adapters_alone_are_advised_and_compared(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    four = graft.quantize(tmp_path / "four", from_=base, bits=4)
    found = advised(tmp_path, four, kind="labelled")
    (whole,) = [each for each in found.candidates if each.method == "full"]
    assert whole.why_not.startswith("its weights are packed, and full tuning needs plain ones")
    assert found.method != "full"
    assert "full" not in found.recipe["models"]


def test_what_cannot_be_advised_on_is_refused(tmp_path, base):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"thing": 1}\n')
    odd = {"odd": {"source": "jsonl", "path": str(path), "format": "raw"}}
    with pytest.raises(RequestError, match=r"odd is raw: expected data that say what to produce: give its `format`"):
        graft.advise(base, "odd", data_sets=odd)
    with pytest.raises(RequestError, match="expected a model's folder"):
        graft.advise(tmp_path / "nowhere", path)
    with pytest.raises(RequestError, match="above 0 and up to 100 percent, found 0"):
        graft.advise(base, path, share=0.0)


def test_the_command_says_what_the_function_says_and_its_recipe_runs(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows(tmp_path, "text")
    words = ["advise", str(base), "--data", "text.jsonl", "--many", "--budget", "2 steps", "--write", "check.yaml"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert "try first: lora (rank: " in told.output
    assert "how sure:" in told.output
    assert "prefix" in told.output
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert found["method"] == "lora"
    assert found["recipe"]["models"]["lora"]["tune"]["method"]["lora"]["rank"] >= 1
    done = CliRunner().invoke(app, ["run", "check.yaml", "--only", "lora", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output


def test_a_data_set_of_a_recipe_is_found_from_elsewhere(tmp_path, base, monkeypatch):
    rows(tmp_path, "text")
    family = tmp_path / "family.yaml"
    family.write_text("data:\n  mine: {source: jsonl, path: text.jsonl}\n  both: {mix: {mine: 1.0}}\n")
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    done = CliRunner().invoke(
        app, ["advise", str(base), "--data", "both", "--recipe", str(family), "--write", "check.yaml"]
    )
    assert done.exit_code == 0, done.output
    assert set(graft.plan("check.yaml", "run").recipe.data) == {"mine", "both"}
