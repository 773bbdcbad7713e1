"""An ensemble over bytes as a `transformers` model: rules, decoding, batches, folders, recipes, evaluation."""

import itertools
import json
import math

import pytest
import torch
from test_seq2seq import t5
from tiny_bytes import LEFT, RIGHT, by_hand, member, pair, tokenizer
from transformers import AutoModelForCausalLM

import graft.data
from graft import models as graft_models
from graft.ensemble import VERB
from graft.ensemble.byte_level.byte_model import EXACT, Cover
from graft.ensemble.byte_level.tokenizer import BOS, EOS, PAD, SIZE, byte_tokenizer
from graft.ensemble.model import EnsembleOverBytes, ensemble_of
from graft.errors import CannotCombine, RequestError, RunError
from graft.evaluate.scorer import Scorer
from graft.facts import facts_of
from graft.verb import Job

SOME = Cover(drop=0.05, most=4)


def ids_of(*texts):
    """Left-padded ids and mask."""
    longest = max(map(len, texts))
    rows = [[PAD] * (longest - len(text)) + list(text) for text in texts]
    ids = torch.tensor(rows)
    return ids, (ids != PAD).long()


def both(text):
    return by_hand(member(1, LEFT, 2), LEFT, text), by_hand(member(5, RIGHT), RIGHT, text)


@torch.no_grad()
def test_a_mixture_is_that_of_the_members_bytes():
    found = pair(EXACT)(input_ids=ids_of(b"abca")[0]).logits[0]
    assert found.shape == (4, SIZE)
    for end in range(1, 5):
        left, right = both(b"abca"[:end])
        assert torch.allclose(found[end - 1, :257].double().exp(), 0.6 * left + 0.4 * right, atol=1e-6)
    assert torch.allclose(found.logsumexp(-1), torch.zeros(4), atol=1e-6)
    assert (found[:, [BOS, PAD]] == -torch.inf).all()


@torch.no_grad()
@pytest.mark.parametrize("weights", [(0.6, 0.4), (1.5, -0.5)])
def test_a_product_is_that_of_the_members_bytes(weights):
    found = pair(EXACT, "log_linear", weights)(input_ids=ids_of(b"cab")[0]).logits[0, -1, :257].double().exp()
    left, right = both(b"cab")
    product = torch.where(left > 0, left ** weights[0] * right.clamp(min=1e-30) ** weights[1], 0)
    assert torch.allclose(found[:257], product / product.sum(), atol=1e-5)


@torch.no_grad()
def test_two_tokenisations_of_one_vocabulary_are_mixed_exactly():
    """A model beside itself with its ids permuted: every mixture and product of the two is the model."""
    order = [4, 0, 6, 2, 5, 1, 3]
    other = tokenizer("abc", [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "a")], order)
    model, moved = member(1, LEFT), member(1, LEFT)
    place = torch.tensor([other.get_vocab()[LEFT.convert_ids_to_tokens(i)] for i in range(len(LEFT.get_vocab()))])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved.get_parameter(name)[place] = model.get_parameter(name)
    ids = ids_of(b"cabcab")[0]
    alone = ensemble_of({"a": model}, tokenizers=[LEFT], cover=EXACT)(input_ids=ids).logits
    assert torch.allclose(alone[0, -1, :257].double().exp(), by_hand(model, LEFT, b"cabcab"), atol=1e-6)
    for rule in ("linear", "log_linear"):
        two = ensemble_of({"a": model, "b": moved}, [0.3, 0.7], rule, tokenizers=[LEFT, other], cover=EXACT)
        found = two(input_ids=ids).logits
        assert torch.allclose(found[..., :257].exp(), alone[..., :257].exp(), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}])
def test_decoding_with_the_cache_is_decoding_without_it_and_a_batch_is_its_rows(options):
    model = pair(SOME)
    ids, mask = ids_of(b"abc", b"cabab")
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD, **options}
    torch.manual_seed(0)
    kept = model.generate(ids, attention_mask=mask, **options)
    torch.manual_seed(0)
    assert kept.tolist() == model.generate(ids, attention_mask=mask, use_cache=False, **options).tolist()
    if not options["do_sample"]:
        for row, text in enumerate((b"abc", b"cabab")):
            alone = model.generate(ids_of(text)[0], **options)[0].tolist()
            assert kept[row, 5 - len(text) :].tolist()[: len(alone)] == alone


@torch.no_grad()
def test_greedy_decoding_takes_the_likeliest_byte():
    model = pair(EXACT)
    found = model.generate(ids_of(b"ca")[0], do_sample=False, max_new_tokens=4, eos_token_id=None)[0].tolist()
    text = b"ca"
    for byte in found[2:]:
        left, right = both(text)
        mixed = 0.6 * left + 0.4 * right
        assert mixed[byte] == pytest.approx(float(mixed.max()), rel=1e-5)
        if byte == EOS:
            break
        text += bytes([byte])


@torch.no_grad()
def test_a_beam_as_wide_as_all_texts_finds_the_best():
    model = pair(EXACT)
    options = {"do_sample": False, "num_beams": 27, "max_new_tokens": 3, "min_new_tokens": 3, "length_penalty": 0.0}
    found = model.generate(torch.tensor([[BOS]]), **options)[0, 1:].tolist()
    best = {}
    for text in itertools.product(b"abc", repeat=3):
        ids = torch.tensor([[BOS, *text]])
        logits = model(input_ids=ids).logits[0]
        logits[:, EOS] = -torch.inf
        told = logits.log_softmax(-1)[range(3), list(text)]
        best[text] = float(model(input_ids=ids).logits[0][range(3), list(text)].sum())
        assert told.isfinite().all()
    assert tuple(found) == max(best, key=best.get)


@torch.no_grad()
def test_decoding_goes_on_from_a_returned_cache_and_in_chunks():
    model = pair(SOME)
    ids = ids_of(b"abcab")[0]
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    whole = model.generate(ids, **{**options, "max_new_tokens": 8})
    first = model.generate(ids, **options, return_dict_in_generate=True)
    assert model.generate(first.sequences, past_key_values=first.past_key_values, **options).tolist() == whole.tolist()
    assert model.generate(ids, **options, prefill_chunk_size=2).tolist() == whole[:, :9].tolist()


@torch.no_grad()
def test_the_loss_is_that_of_the_bytes_and_texts_in_one_row_are_apart():
    model = pair(EXACT)
    ids = torch.tensor([[BOS, *b"ab", EOS, *b"ca"]])
    out = model(input_ids=ids, labels=ids)
    gold = out.logits[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert out.loss == pytest.approx(-float(gold.mean()), rel=1e-5)
    start = model(input_ids=torch.tensor([[BOS, *b"ca"]])).logits[0]
    assert torch.allclose(out.logits[0, 3, :257].exp(), start[0, :257].exp(), atol=1e-6)
    assert torch.allclose(out.logits[0, 5, :257].exp(), start[2, :257].exp(), atol=1e-6)


def test_no_gradient_flows_into_members():
    model = pair(SOME)
    assert not model(input_ids=ids_of(b"ab")[0]).logits.requires_grad
    assert all(each.grad is None for each in model.parameters())


@torch.no_grad()
def test_where_a_member_cannot_write_a_byte_a_mixture_says_what_the_other_does_and_a_product_nothing():
    poor = tokenizer("ab")
    make = lambda rule: ensemble_of(  # noqa: E731
        {"left": member(1, LEFT), "poor": member(2, poor)}, [0.6, 0.4], rule, tokenizers=[LEFT, poor], cover=EXACT
    )
    found = make("linear")(input_ids=ids_of(b"ab")[0]).logits[0, -1]
    assert found[ord("c")].exp() == pytest.approx(
        0.6 * float(by_hand(member(1, LEFT), LEFT, b"ab")[ord("c")]), rel=1e-5
    )
    assert make("log_linear")(input_ids=ids_of(b"ab")[0]).logits[0, -1, ord("c")] == -math.inf


def test_what_cannot_be_done_is_refused():
    model = pair(SOME)
    ids = ids_of(b"abc")[0]
    with pytest.raises(RequestError, match="one vocabulary"):
        model.speculate(ids)
    with pytest.raises(RequestError, match="an id in every prompt"):
        model(input_ids=ids[:, :0])
    with pytest.raises(RequestError, match="cache of its own"):
        model.generate(ids, cache_implementation="static")
    with pytest.raises(RequestError, match="tokenizers"):
        EnsembleOverBytes(model.config, list(model.members))(input_ids=ids)
    with pytest.raises(RequestError, match="names no number"):
        ensemble_of({"bytes": model, "other": pair(SOME)})


def test_members_that_read_a_source_are_refused_over_bytes():
    members = {"one": t5(0), "other": t5(1)}
    with pytest.raises(RequestError, match="member 'one': bytes are for decoders, found encoder-decoders"):
        ensemble_of(members, tokenizers=[LEFT, LEFT])


def saved(folder):
    for name, model, words in (("left", member(1, LEFT, 2), LEFT), ("right", member(5, RIGHT), RIGHT)):
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return {name: folder / name for name in ("left", "right")}


def run(folder, raw):
    folders = saved(folder)
    settings = VERB.parse(raw)
    assert VERB.check(settings, {name: facts_of(place) for name, place in folders.items()}) == []
    out = folder / "both"
    out.mkdir()
    VERB.run(Job("both", settings, 0, out, folder / "s", folder / "c", folders, {}))
    return out


@torch.no_grad()
@pytest.mark.parametrize("inside", [False, True])
def test_a_recipe_makes_a_folder_that_loads_scores_and_writes(tmp_path, inside):
    raw = {
        "members": {"left": 0.6, "right": 0.4},
        "vocabulary": "bytes",
        "cover": {"drop": 0, "join": 0},
        "self_contained": inside,
    }
    out = run(tmp_path, raw)
    assert json.loads((out / "config.json").read_text())["cover"] == {
        "tokenisations": "all",
        "drop": 0.0,
        "join": 0.0,
        "most": 16,
    }
    wanted = pair(Cover(drop=0.0, join=0.0))(input_ids=ids_of(b"abc")[0]).logits
    for model in (graft_models.load(out), AutoModelForCausalLM.from_pretrained(out)):
        assert isinstance(model, EnsembleOverBytes)
        assert torch.equal(model(input_ids=ids_of(b"abc")[0]).logits, wanted)
    words = graft_models.load_tokenizer(out)
    made = model.generate(**words("cab", return_tensors="pt"), do_sample=False, max_new_tokens=3)
    assert words.decode(made[0], skip_special_tokens=True).startswith("cab")
    model.save_pretrained(tmp_path / "again", self_contained=inside)
    again = graft_models.load(tmp_path / "again")
    assert torch.equal(again(input_ids=ids_of(b"abc")[0]).logits, wanted)


@torch.no_grad()
def test_the_scorer_counts_the_bits_of_the_bytes():
    model = pair(EXACT)
    (document,) = Scorer(model, byte_tokenizer()).documents(["abca"])
    told = model(input_ids=torch.tensor([[BOS, *b"abc"]])).logits[0]
    assert document.bytes == 4
    assert document.log_probs == pytest.approx(told[range(4), list(b"abca")].tolist(), abs=1e-5)


def test_different_vocabularies_name_bytes_and_bytes_refuse_what_they_cannot_do(tmp_path):
    facts = {name: facts_of(place) for name, place in saved(tmp_path).items()}
    (problem,) = VERB.check(VERB.parse({"members": ["left", "right"]}), facts)
    assert "`vocabulary: bytes`" in problem
    raw = {"members": ["left", "right"], "vocabulary": "bytes", "draft": "left"}
    assert "one vocabulary" in VERB.check(VERB.parse(raw), facts)[0]
    raw = {"members": ["left", "right"], "cover": {"drop": 0, "join": 0}}
    assert "`vocabulary: bytes`" in "".join(VERB.check(VERB.parse(raw), facts))
    raw = {"members": ["left", "right"], "vocabulary": "bytes", "combine": "least_risk"}
    assert "bytes are for rules that combine probabilities" in "".join(VERB.check(VERB.parse(raw), facts))


def test_a_tokenizer_without_bytes_is_refused_before_anything_is_written(tmp_path):
    folders = saved(tmp_path)
    odd = json.loads((folders["left"] / "tokenizer.json").read_text())
    odd["decoder"] = {"type": "BPEDecoder", "suffix": "</w>"}
    (folders["left"] / "tokenizer.json").write_text(json.dumps(odd))
    settings = VERB.parse({"members": ["left", "right"], "vocabulary": "bytes"})
    out = tmp_path / "both"
    out.mkdir()
    with pytest.raises(CannotCombine, match=r"left.*BPEDecoder"):
        VERB.run(Job("both", settings, 0, out, tmp_path / "s", tmp_path / "c", folders, {}))


@torch.no_grad()
def test_a_damaged_member_is_named():
    model = pair(SOME)
    model.members[1].lm_head.weight[0] = math.nan
    with pytest.raises(RunError, match="member 'right' gives NaN"):
        model(input_ids=ids_of(b"ab")[0])


@pytest.mark.parametrize("rule", ["linear", "log_linear"])
def test_weights_are_fitted_to_bytes_of_held_out_text(tmp_path, rule):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ["abcab", "cab", "bcabc", "a"] * 2))
    sets = {"some": graft.data.parse({"source": "jsonl", "path": "text.jsonl", "splits": {"dev": 0.5}})}
    folders = saved(tmp_path)
    raw = {
        "members": ["left", "right"],
        "vocabulary": "bytes",
        "combine": rule,
        "cover": {"drop": 0, "join": 0, "most": None},
    }
    settings = VERB.parse({**raw, "weights": {"fit": "some.dev"}})
    out = tmp_path / "both"
    out.mkdir()
    made = VERB.run(Job("both", settings, 0, out, tmp_path / "s", tmp_path / "c", folders, sets, root=tmp_path))
    corpus = graft.data.open_corpus(sets, "some", tmp_path)
    texts = [record["text"].encode() for record in corpus.records("dev")]
    weights = list(made["weights"].values())
    members = {"left": member(1, LEFT, 2), "right": member(5, RIGHT)}

    def loss(first):
        shares = (first, 1 - first) if rule == "linear" else (first, weights[1])
        model = ensemble_of(members, shares, rule, tokenizers=[LEFT, RIGHT], cover=EXACT)
        told = [model(input_ids=torch.tensor([[BOS, *text[:-1]]])).logits[0] for text in texts]
        gold = [row[range(len(text)), list(text)] for row, text in zip(told, texts, strict=True)]
        return -float(torch.cat(gold).mean())

    assert made["loss"] == pytest.approx(loss(weights[0]), abs=1e-4)
    assert loss(weights[0]) <= min(loss(max(weights[0] - 0.1, 0)), loss(min(weights[0] + 0.1, 1))) + 1e-6


def test_scoring_reads_nothing_behind_a_text():
    """Texts of different length stand in one batch: what fills the shorter ones costs nothing."""
    words = tokenizer("ab\0", [("a", "b")])
    model = ensemble_of({"it": member(1, words)}, tokenizers=[words], cover=SOME)
    (reader,) = model.readers

    def scored(texts):
        before = reader.reader.tokens_read
        found = Scorer(model, byte_tokenizer()).documents(texts)
        return [each.log_probs for each in found], reader.reader.tokens_read - before

    texts = ["abbaab" * 6, "a", "b"]
    scored(texts)  # what follows single tokens is read once and kept
    alone = [scored([text]) for text in texts]
    together, read = scored(texts)
    assert read <= sum(size for _, size in alone)
    assert all(own == pytest.approx(found[0], abs=1e-4) for own, (found, _) in zip(together, alone, strict=True))
