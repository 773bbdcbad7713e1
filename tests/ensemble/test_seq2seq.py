"""Ensembles of encoder-decoders: against brute force over the members, with beams, padding and caches."""

import itertools
import json

import pytest
import torch
from test_ensemble_folder import run
from tiny_members import llama, prompts, sharp
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from graft import data, models
from graft.ensemble import VERB
from graft.ensemble.dropout import thinned
from graft.ensemble.model import ensemble_of
from graft.errors import CannotCombine, RequestError
from graft.facts import facts_of

ENDS = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
PLAIN = {"max_new_tokens": 8, "eos_token_id": None}


def t5(seed, layers=2, size=16, tokens=37):
    config = T5Config(
        vocab_size=tokens,
        d_model=size,
        d_kv=8,
        d_ff=24,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=2,
        **ENDS,
    )
    return sharp(T5ForConditionalGeneration(config), seed)


def bart(seed, **settings):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=37, d_model=24, encoder_ffn_dim=24, decoder_ffn_dim=24, forced_eos_token_id=None, **sizes, **ENDS,
        **settings,
    )  # fmt: skip
    model = sharp(BartForConditionalGeneration(config), seed)
    model.generation_config.forced_eos_token_id = None
    return model


@pytest.fixture(scope="module")
def members():
    return {"small": t5(1), "deep": t5(2, layers=3, size=24), "bart": bart(3)}


@pytest.fixture(scope="module")
def ensemble(members):
    return ensemble_of(members, [0.5, 0.3, 0.2])


@torch.no_grad()
def mixture(members, source, mask, target):
    alone = [m(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits for m in members.values()]
    return sum(w * logits.softmax(-1) for w, logits in zip([0.5, 0.3, 0.2], alone, strict=True))


def source():
    ids, mask = prompts()
    return ids.flip(1), mask.flip(1)


@torch.no_grad()
def test_logits_and_loss_are_those_of_the_mixture(members, ensemble):
    ids, mask = source()
    target = prompts(padded=())[0]
    shifted = torch.cat([torch.ones(3, 1, dtype=torch.long), target[:, :-1]], 1)
    expected = mixture(members, ids, mask, shifted)
    found = ensemble(input_ids=ids, attention_mask=mask, labels=target)
    assert torch.allclose(found.logits.exp(), expected, atol=1e-6)
    assert found.loss.item() == pytest.approx(-expected.gather(-1, target[..., None]).log().mean().item(), abs=1e-5)


def test_greedy_decoding_of_a_padded_batch_is_brute_force_on_each_source(members, ensemble):
    ids, mask = source()
    found = ensemble.generate(ids, attention_mask=mask, do_sample=False, **PLAIN)
    for row in range(3):
        own = ids[row : row + 1, : int(mask[row].sum())]
        target = torch.tensor([[1]])
        for _ in range(8):
            best = mixture(members, own, torch.ones_like(own), target)[:, -1].argmax(-1)
            target = torch.cat([target, best[:, None]], 1)
        assert found[row].tolist() == target[0].tolist()


@pytest.mark.parametrize("way", [{"num_beams": 4}, {"do_sample": True}, {"num_beams": 3, "do_sample": True}])
def test_decoding_with_a_cache_is_decoding_without(ensemble, way):
    ids, mask = source()
    torch.manual_seed(3)
    cached = ensemble.generate(ids, attention_mask=mask, **PLAIN, **way)
    torch.manual_seed(3)
    assert torch.equal(cached, ensemble.generate(ids, attention_mask=mask, use_cache=False, **PLAIN, **way))


@torch.no_grad()
def test_beam_search_finds_the_best_of_all_translations():
    pair = {"a": t5(5, tokens=5), "b": t5(6, layers=1, tokens=5)}
    source_ids = torch.tensor([[3, 4, 3]])
    every = torch.tensor(list(itertools.product(range(5), repeat=3)))
    begun = torch.cat([torch.ones(len(every), 1, dtype=torch.long), every], 1)
    given = {"input_ids": source_ids.expand(len(every), -1), "decoder_input_ids": begun}
    probs = sum(0.5 * model(**given).logits.double().softmax(-1) for model in pair.values())
    scores = probs[:, :3].gather(-1, every[..., None]).log().sum((1, 2))
    how = {"num_beams": 25, "max_new_tokens": 3, "eos_token_id": None, "length_penalty": 0.0}
    found = ensemble_of(pair).generate(source_ids, **how)
    assert found[0, 1:].tolist() == every[scores.argmax()].tolist()


@torch.no_grad()
def test_samples_follow_the_mixture_of_translators():
    pair = {"a": t5(5, tokens=5), "b": t5(6, tokens=5)}
    ensemble, ids = ensemble_of(pair, [0.7, 0.3]), torch.tensor([[3, 4, 3]])
    torch.manual_seed(0)
    many = ids.expand(4000, -1)
    drawn = ensemble.generate(many, do_sample=True, top_k=0, max_new_tokens=1, eos_token_id=None)[:, -1]
    expected = ensemble(input_ids=ids, decoder_input_ids=torch.tensor([[1]])).logits[0, -1].exp() * 4000
    # chi-square with 4 degrees of freedom is below 23.5 with probability 0.9999
    assert ((torch.bincount(drawn, minlength=5) - expected) ** 2 / expected).sum() < 23.5


@torch.no_grad()
@pytest.mark.parametrize("rule", ["linear", "log_linear"])
def test_copies_of_a_translator_are_that_translator(members, rule):
    ids, mask = source()
    target = prompts(padded=())[0]
    one = members["deep"](input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits.log_softmax(-1)
    copies = ensemble_of({str(n): members["deep"] for n in range(3)}, None, rule)
    found = copies(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    assert torch.allclose(found, one, atol=1e-4)


def test_an_ensemble_of_one_is_that_member(members):
    ids, mask = source()
    model = members["deep"]
    found = ensemble_of({"deep": model}).generate(ids, attention_mask=mask, num_beams=3, **PLAIN)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, num_beams=3, **PLAIN))


def test_it_is_saved_with_its_members_and_loads_by_the_auto_class(ensemble, tmp_path):
    ids, mask = source()
    ensemble.save_pretrained(tmp_path / "both", self_contained=True)
    before = ensemble.generate(ids, attention_mask=mask, num_beams=2, **PLAIN)
    for loaded in (models.load(tmp_path / "both"), AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "both")):
        assert torch.equal(loaded.generate(ids, attention_mask=mask, num_beams=2, **PLAIN), before)


AUTO = """
import sys, graft
from transformers import AutoModelForSeq2SeqLM
print(type(AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])).__name__)
"""


def test_the_auto_class_knows_it_after_import_graft(ensemble, tmp_path, fresh):
    ensemble.save_pretrained(tmp_path / "both", self_contained=True)
    done = fresh.run(AUTO, tmp_path / "both")
    assert done.stdout.split() == ["EnsembleForSeq2SeqLM"], done.stderr


@pytest.mark.parametrize("room", ["model", "seq2seq", "show"])
def test_its_rooms_may_be_imported_in_any_order(room, fresh):
    program = f"import graft.ensemble.{room}; import transformers; import graft.ensemble.model"
    done = fresh.run(program)
    assert done.returncode == 0, done.stderr


def test_decoders_beside_encoder_decoders_are_refused(members):
    with pytest.raises(RequestError, match="encoder-decoders beside decoders"):
        ensemble_of({"translator": members["small"], "writer": llama()})


LETTERS = [chr(place) for place in range(97, 123)]


def signs():
    """A tokenizer with one token a letter, without a start token, as translators have them."""
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<s>", "</s>", " ", "\n", *LETTERS, "."])}
    inner = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


@pytest.fixture
def family(members, tmp_path):
    root = tmp_path / "family" / "models"
    decoders = {"inside": llama(5, bos_token_id=None), "outside": llama(6, bos_token_id=None)}
    for name, model in {**members, **decoders}.items():
        model.save_pretrained(root / name)
        signs().save_pretrained(root / name)
    return root


def pairs(path, count=50):
    rows = [{"source": f"say {LETTERS[i % 26]}", "target": f"{LETTERS[i % 26]} said {i % 7}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "jsonl", "path": str(path), "splits": {"dev": 0.5, "test": 0.1}}


@torch.no_grad()
def told_by(model, record):
    """Log-probabilities of each token of a record's target, and the target's ids."""
    tokenizer = signs()
    read = [*tokenizer(record["source"] + "\n")["input_ids"], 2]
    target = [*tokenizer(record["target"])["input_ids"], 2]
    begun = torch.tensor([[1, *target[:-1]]])
    return model(input_ids=torch.tensor([read]), decoder_input_ids=begun).logits[0].log_softmax(-1), target


@pytest.mark.parametrize("rule", ["linear", "log_linear"])
def test_weights_are_fitted_on_pairs(members, family, rule):
    chosen = ["small", "deep", "bart"]
    raw = {"combine": rule, "members": chosen, "weights": {"fit": "pairs.dev"}}
    sets = {"pairs": pairs(family / "pairs.jsonl")}
    target, found = run(family, raw, sets)
    corpus = data.open_corpus({"pairs": data.parse(sets["pairs"])}, "pairs", family)
    records = list(corpus.records("dev"))
    losses = []
    for name in chosen:
        told = [told_by(members[name], record) for record in records]
        losses.append(-torch.cat([p.gather(-1, torch.tensor(t)[:, None])[:, 0] for p, t in told]).mean().item())
    assert list(found["member_losses"].values()) == pytest.approx(losses, abs=1e-4)
    assert found["loss"] <= min(losses) + 1e-6
    assert models.load(target).config.weights == list(found["weights"].values())


@pytest.mark.parametrize("hidden_states", [False, True])
def test_a_gate_of_translators_is_fitted_and_decodes(family, hidden_states):
    gate = {"units": 4, "hidden_states": hidden_states}
    raw = {"members": ["small", "bart"], "weights": {"fit": "pairs.dev", "gate": gate}}
    target, found = run(family, raw, {"pairs": pairs(family / "pairs.jsonl")})
    assert found["loss"] < found["loss_without_gate"] + 1e-3
    ids, mask = source()
    loaded = models.load(target)
    cached = loaded.generate(ids, attention_mask=mask, num_beams=3, **PLAIN)
    assert torch.equal(cached, loaded.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **PLAIN))


def test_text_says_nothing_of_what_a_translator_should_write(family):
    (family / "t.jsonl").write_text("".join(json.dumps({"text": f"a{i}"}) + "\n" for i in range(20)))
    text = {"source": "jsonl", "path": str(family / "t.jsonl"), "splits": {"dev": 0.5}}
    with pytest.raises(CannotCombine, match="weights of encoder-decoders are fitted on pairs or completion"):
        run(family, {"members": ["small", "bart"], "weights": {"fit": "t.dev"}}, {"t": text})


@torch.no_grad()
def differential(translator, inside, outside, alpha, source_, mask, target):
    """log p ∝ translator + α (in-domain LM − out-of-domain LM), the language models reading the target alone."""
    told = translator(input_ids=source_, attention_mask=mask, decoder_input_ids=target).logits.log_softmax(-1)
    alone = torch.cat([torch.full_like(target[:, :1], 2), target[:, 1:]], 1)
    moved = [model(input_ids=alone).logits.log_softmax(-1) for model in (inside, outside)]
    return (told + alpha * (moved[0] - moved[1])).log_softmax(-1)


def test_domain_differential_adaptation_end_to_end(members, family):
    raw = {"combine": {"experts": {"alpha": 0.7}}, "members": ["deep", "inside", "outside"]}
    names = ("deep", "inside", "outside")
    assert VERB.check(VERB.parse(raw), {name: facts_of(family / name) for name in names}) == []
    loaded = models.load(run(family, raw)[0])
    parts = [models.load(family / name) for name in names]
    ids, mask = source()
    target = torch.cat([torch.ones(3, 1, dtype=torch.long), prompts(padded=())[0][:, :5]], 1)
    found = loaded(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    assert torch.allclose(found, differential(*parts, 0.7, ids, mask, target), atol=1e-4)
    decoded = loaded.generate(ids, attention_mask=mask, do_sample=False, **PLAIN)
    for row in range(3):
        own, begun = ids[row : row + 1, : int(mask[row].sum())], torch.tensor([[1]])
        for _ in range(8):
            best = differential(*parts, 0.7, own, torch.ones_like(own), begun)[:, -1].argmax(-1)
            begun = torch.cat([begun, best[:, None]], 1)
        assert decoded[row].tolist() == begun[0].tolist()
    beams = loaded.generate(ids, attention_mask=mask, num_beams=3, **PLAIN)
    assert torch.equal(beams, loaded.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **PLAIN))


def test_other_mixtures_of_translators_and_decoders_are_refused_before_anything_runs(family):
    facts = {name: facts_of(family / name) for name in ("deep", "inside", "outside")}
    found = VERB.check(VERB.parse({"members": ["deep", "inside"]}), facts)
    assert "inside is a decoder and deep is an encoder-decoder" in found
    swapped = {"combine": "experts", "members": ["inside", "deep", "outside"]}
    assert "deep is an encoder-decoder and inside is a decoder" in VERB.check(VERB.parse(swapped), facts)


def test_how_far_language_models_move_a_translator_is_fitted(members, family, capsys, monkeypatch):
    """Three weights of a product of which one member reads the source and two the target alone; fits never lose."""
    raw = {"combine": "log_linear", "members": ["deep", "inside", "outside"], "weights": {"fit": "pairs.dev"}}
    names = ("deep", "inside", "outside")
    assert VERB.check(VERB.parse(raw), {name: facts_of(family / name) for name in names}) == []
    sets = {"pairs": pairs(family / "pairs.jsonl")}
    monkeypatch.setenv("GRAFT_QUIET", "0")
    target, found = run(family, raw, sets)
    loaded = models.load(target)
    corpus = data.open_corpus({"pairs": data.parse(sets["pairs"])}, "pairs", family)
    told = [told_by(loaded, record) for record in corpus.records("dev")]
    measured = -torch.cat([p.gather(-1, torch.tensor(t)[:, None])[:, 0] for p, t in told]).mean().item()
    assert measured == pytest.approx(found["loss"], abs=1e-4)
    assert found["loss"] < min(found["member_losses"].values())
    assert ("no weight is above zero" in capsys.readouterr().err) == (max(found["weights"].values()) <= 0)


def test_shallow_fusion_decodes_with_a_cache_as_without(members):
    ensemble = ensemble_of({"translator": members["small"], "writer": llama(5)}, [1.0, 0.3], "log_linear")
    ids, mask = source()
    found = ensemble.generate(ids, attention_mask=mask, num_beams=3, **PLAIN)
    assert torch.equal(found, ensemble.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **PLAIN))


@pytest.mark.parametrize("share", [None, 0.2])
def test_passes_of_a_translator_with_dropout(members, share):
    passes = {str(seed): thinned(members["small"], share, seed) for seed in range(3)}
    ensemble = ensemble_of(passes)
    ids, mask = source()
    target = prompts(padded=())[0]
    with torch.no_grad():
        told = [p(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits for p in passes.values()]
        found = ensemble(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    assert torch.allclose(found.exp(), sum(each.softmax(-1) for each in told) / 3, atol=1e-6)
    assert not torch.allclose(told[0], told[1], atol=1e-2)
    decoded = ensemble.generate(ids, attention_mask=mask, num_beams=2, **PLAIN)
    assert torch.equal(decoded, ensemble.generate(ids, attention_mask=mask, num_beams=2, use_cache=False, **PLAIN))
