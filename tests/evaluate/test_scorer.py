"""Every fast path against the plainest way to compute the same number."""

import copy

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig

from graft.errors import RequestError, RunError
from graft.evaluate import reading
from graft.evaluate.limits import least_window, longest_context, most_tokens
from graft.evaluate.reading import Reader
from graft.evaluate.scorer import Scorer, _windows

FEW_SHOT = "Question: what is up? Answer: the sky.\n\n" * 3
DECODERS = (
    *("llama", "gpt2", "sliding", "bloom", "mpt", "ensemble", "mixture"),
    *("gptj", "gptneo", "mamba", "convolution", "gpt1"),
)


def requests():
    made = []
    for number in range(4):
        question = f"{FEW_SHOT}Question: is {number} even? Answer:"
        made += [(question, answer) for answer in (" yes", " no", " perhaps so", " y")]
    return [*made, ("", "alone"), ("x", "y"), ("space moves ", "here"), ("x", "yz")]


def by_hand(model, tokenizer, context, continuation):
    """One request, one row, no batch: the definition."""
    trailing = len(context) - len(context.rstrip())
    if trailing:
        context, continuation = context[:-trailing], context[-trailing:] + continuation
    before = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
    after = tokenizer(continuation)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + after])).logits[0].double()
    log_probs = torch.log_softmax(logits, -1)[len(before) - 1 : -1]
    wanted = torch.tensor(after)
    total = log_probs.gather(-1, wanted[:, None]).sum()
    return float(total), bool((log_probs.argmax(-1) == wanted).all())


@pytest.mark.parametrize("kind", DECODERS)
def test_shared_reading_gives_what_one_request_alone_gives(kind, model_of, tokenizer):
    model = model_of(kind)
    found = Scorer(model, tokenizer).loglikelihoods(requests())
    for (context, continuation), answer in zip(requests(), found, strict=True):
        total, greedy = by_hand(model, tokenizer, context, continuation)
        # float32 sums over a different order of the same terms
        assert answer.log_prob == pytest.approx(total, abs=2e-4)
        assert answer.greedy == greedy
        assert answer.tokens == len(continuation) + (context.endswith(" "))


@pytest.mark.parametrize(
    ("kind", "style"),
    [
        *(("llama", "bool"), ("gpt2", "bool"), ("ensemble", "bool"), ("gptj", "additive"), ("mixture", "bool")),
        *(("bloom", "plain"), ("mpt", "plain"), ("gpt1", "plain"), ("mamba", "plain"), ("convolution", "plain")),
    ],
)
def test_a_tree_is_used_where_the_model_honours_its_mask_and_only_there(kind, style, model_of, tokenizer):
    scorer = Scorer(model_of(kind), tokenizer)
    scorer.loglikelihoods(requests())
    assert scorer.branches.style == style


@pytest.mark.parametrize(("kind", "window"), [("sliding", 16), ("gptneo", 8), ("llama", None), ("ensemble", None)])
def test_the_narrowest_window_is_known(kind, window, model_of):
    assert least_window(model_of(kind).config) == window


def test_rows_wider_than_a_window_are_not_shared(model_of, tokenizer):
    scorer, plain = Scorer(model_of("gptneo"), tokenizer), Scorer(model_of("gptneo"), tokenizer, share=False)
    assert scorer.loglikelihoods(requests()) == plain.loglikelihoods(requests())


def test_a_model_that_breaks_only_on_long_rows_is_caught_on_them(model_of, tokenizer, monkeypatch):
    # without the names that configurations give to windows, the difference itself has to show
    monkeypatch.setattr("graft.evaluate.limits.WINDOWS", ())
    for kind in ("gptneo", "sliding"):
        scorer = Scorer(model_of(kind), tokenizer)
        found = scorer.loglikelihoods(requests())
        assert scorer.branches.style == "plain"
        for (context, continuation), answer in zip(requests(), found, strict=True):
            total, _ = by_hand(model_of(kind), tokenizer, context, continuation)
            assert answer.log_prob == pytest.approx(total, abs=2e-4)


def test_a_shared_prompt_is_read_once(model_of, tokenizer):
    shared, plain = Scorer(model_of("llama"), tokenizer), Scorer(model_of("llama"), tokenizer, share=False)
    shared.loglikelihoods(requests() * 2)
    shared.reader.tokens_read = 0  # the first time, a few rows are read twice to see whether the model can be trusted
    shared.loglikelihoods(requests())
    plain.loglikelihoods(requests())
    # one token a byte: the prompt once, and what stands behind it, or without it, once a request at most
    behind = [len(context + answer) + 1 for context, answer in requests()]
    behind = [size - len(FEW_SHOT) * (size > len(FEW_SHOT)) for size in behind]
    assert shared.tokens_read <= len(FEW_SHOT) + sum(behind)
    assert plain.tokens_read >= 16 * len(FEW_SHOT)


def test_few_logits_are_summed_at_a_time_on_a_processor(model_of, monkeypatch):
    reader, wanted = Reader(model_of("llama")), torch.randint(0, 50, (3, 7))
    logits = 8 * torch.randn(3, 7, 50)
    exact = torch.log_softmax(logits.double(), -1).gather(-1, wanted[..., None])[..., 0]
    whole = reader.log_probs(logits, wanted)
    assert torch.allclose(whole.double(), exact, atol=1e-5)
    for piece in (1, 50, 120, 10**6):
        monkeypatch.setattr(reading, "PIECE", piece)
        assert torch.equal(reader.log_probs(logits, wanted), whole)
        assert torch.equal(reader.log_probs(logits[0], wanted[0]), whole[0])
    half = logits.bfloat16()
    assert torch.equal(reader.log_probs(half, wanted), reader.log_probs(half.float(), wanted))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "ensemble", "mpt", "mixture"])
def test_a_document_within_the_context_is_scored_in_one_go(kind, model_of, tokenizer):
    text = "It was a bright cold day in April."
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        log_probs = torch.log_softmax(model_of(kind)(input_ids=torch.tensor([[1, *ids]])).logits[0].double(), -1)
    expected = log_probs[:-1].gather(-1, torch.tensor(ids)[:, None])[:, 0]
    (found,) = Scorer(model_of(kind), tokenizer).documents([text])
    np.testing.assert_allclose(found.log_probs, expected, atol=2e-5)
    assert found.bytes == len(text)
    assert found.bits == pytest.approx(-float(expected.sum()) / np.log(2), abs=1e-3)


def test_a_long_document_is_scored_once_token_by_token_with_half_a_context_before_it(model_of, tokenizer):
    model, text, context = model_of("llama"), "abcdefghij" * 5, 16
    ids = [1, *tokenizer(text)["input_ids"]]
    (found,) = Scorer(model, tokenizer, context=context).documents([text])
    for place, _, _, _ in [(p, *rest) for p, *rest in _windows(0, len(text), context)]:
        assert place == 0
    for target in range(len(text)):
        start = next(s for _, s, e, first in _windows(0, len(text), context) if first <= target < e)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start : target + 1]])).logits[0, -1].double()
        assert found.log_probs[target] == pytest.approx(float(torch.log_softmax(logits, -1)[ids[target + 1]]), abs=2e-5)
        assert start == 0 or target - start >= context // 2 - 1


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 24, 25, 100])
def test_windows_score_every_token_once_within_the_context(tokens):
    windows = list(_windows(0, tokens, 16))
    scored = [t for _, _, end, first in windows for t in range(first, end)]
    assert scored == list(range(tokens))
    assert all(end - start <= 16 for _, start, end, _ in windows)


def test_an_empty_text_costs_nothing(model_of, tokenizer):
    (found,) = Scorer(model_of("llama"), tokenizer).documents([""])
    assert (found.bits, found.bytes, len(found.log_probs)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "ensemble"])
def test_generation_in_batches_is_generation_one_by_one(kind, model_of, tokenizer):
    prompts = ["once", "a much longer prompt than that", "q"]
    scorer = Scorer(model_of(kind), tokenizer)
    assert scorer.generate(prompts, max_tokens=6) == [scorer.generate([p], max_tokens=6)[0] for p in prompts]


def test_writing_ends_before_a_stop_string(model_of, tokenizer):
    scorer = Scorer(model_of("llama"), tokenizer)
    (whole,) = scorer.generate(["hello"], max_tokens=12)
    stop = whole[3]
    (cut,) = scorer.generate(["hello"], max_tokens=12, stop=[stop])
    assert cut == whole[: whole.index(stop)]


def test_an_encoder_decoder_reads_the_context_and_writes_the_continuation(model_of, tokenizer):
    model = model_of("t5")
    pairs = [("read me", "write"), ("a longer context to read", "me")]
    found = Scorer(model, tokenizer).loglikelihoods(pairs)
    for (context, continuation), answer in zip(pairs, found, strict=True):
        source = torch.tensor([[*tokenizer(context)["input_ids"], 2]])
        target = tokenizer(continuation)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([[0, *target[:-1]]])).logits[0].double()
        expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(target)[:, None]).sum()
        assert answer.log_prob == pytest.approx(float(expected), abs=1e-4)


def test_bits_of_an_encoder_decoder_are_refused(model_of, tokenizer):
    with pytest.raises(RequestError, match="left to right"):
        Scorer(model_of("t5"), tokenizer).documents(["text"])


def test_the_start_token_stands_where_the_tokenizer_puts_it_or_where_it_is_asked_for(model_of, tokenizer):
    model = model_of("llama")
    starting = copy.deepcopy(tokenizer)
    starting.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    pair = ("a context", " goes on")
    without, asked = (Scorer(model, tokenizer).loglikelihoods([pair], start=start)[0] for start in (None, True))
    assert without.log_prob == pytest.approx(by_hand(model, tokenizer, *pair)[0], abs=1e-4)
    assert asked.log_prob == pytest.approx(by_hand(model, tokenizer, "<s>" + pair[0], pair[1])[0], abs=1e-4)
    assert Scorer(model, starting).loglikelihoods([pair]) == [asked]
    assert Scorer(model, starting).loglikelihoods([("<s>" + pair[0], pair[1])]) != [asked]  # of which a text may speak


def test_requests_use_all_that_a_model_can_read(model_of, tokenizer):
    assert Scorer(model_of("llama"), tokenizer).longest == 400
    assert Scorer(model_of("bloom"), tokenizer).longest == 2048
    wide = LlamaConfig(max_position_embeddings=8192)
    assert (most_tokens(wide, tokenizer), longest_context(wide)) == (8192, 2048)


def test_a_continuation_longer_than_the_model_reads_is_refused(model_of, tokenizer):
    with pytest.raises(RequestError, match="at most 8, found 9"):
        Scorer(model_of("llama"), tokenizer, context=8).loglikelihoods([("c", " " + "x" * 8)])


def test_writing_more_than_the_model_reads_is_refused(model_of, tokenizer):
    with pytest.raises(RequestError, match="fewer than 8 tokens"):
        Scorer(model_of("llama"), tokenizer, context=8).generate(["a"], max_tokens=8)


def test_a_model_that_knows_several_ends_stops_at_each(model_of, tokenizer):
    model = model_of("llama")
    (whole,) = Scorer(model, tokenizer).generate(["hello"], max_tokens=8)
    stop = tokenizer(whole[2])["input_ids"][0]
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [2, stop]
    try:
        (cut,) = Scorer(model, tokenizer).generate(["hello"], max_tokens=8)
    finally:
        model.generation_config.eos_token_id = kept
    assert cut == whole[: whole.index(whole[2]) + 1]


def test_an_empty_continuation_is_refused(model_of, tokenizer):
    with pytest.raises(RequestError, match="at least one token"):
        Scorer(model_of("llama"), tokenizer).loglikelihoods([("context", "")])


def test_nan_logits_are_named(tokenizer):
    from .conftest import make

    broken = make("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="NaN"):
        Scorer(broken, tokenizer).documents(["text"])


def test_what_is_too_long_loses_its_beginning(model_of, tokenizer):
    model = model_of("llama")
    long, short = Scorer(model, tokenizer, context=20), Scorer(model, tokenizer)
    cut = long.loglikelihoods([("x" * 50 + "the end is near", " now")])[0]
    # 20 tokens of input predict the last of the continuation: the 4 of " now" and 17 before it
    kept = ("x" * 50 + "the end is near")[-17:]
    assert cut.log_prob == pytest.approx(short.loglikelihoods([(kept, " now")])[0].log_prob, abs=1e-4)
