"""Prefix LMs are read as they were trained: the prompt both ways, what comes behind it from left to right."""

import copy
import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
    XGLMConfig,
    XGLMForCausalLM,
)

from graft import models
from graft.chatting import Talk
from graft.data.objectives import Causal, Prefix, is_prefix_lm, objective_for, told_of
from graft.ensemble.model import ensemble_of
from graft.errors import RequestError
from graft.evaluate.scorer import Scorer
from graft.prefix_lm import mark, read_both_ways, write_as_trained

SIZE = 259
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": SIZE}
KINDS = ("llama", "gpt2", "xglm", "mpt")
REQUESTS = [
    ("the colour is", " red"), ("the colour is", " reddish"), ("the colour is", " blue"),
    ("another prompt", " b"), ("another prompt, longer", " c"), ("", "alone"), ("the colour is", " red and blue"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place + 3 for place, letter in enumerate(letters)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    made = Tokenizer(kinds.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make(kind, seed=0, prefix=True):
    torch.manual_seed(seed)
    model = {
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **IDS)
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **IDS)),
        "xglm": lambda: XGLMForCausalLM(
            XGLMConfig(d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, max_position_embeddings=256, **IDS)
        ),
        "mpt": lambda: MptForCausalLM(MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=256, **IDS)),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    mark(model, prefix)
    return write_as_trained(model.eval())


def by_hand(model, ids, prompt):
    """log-probabilities [length, vocabulary] of one row, under a mask made cell by cell; `prompt` 0: a causal model."""
    length = len(ids)
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
    for query, key in itertools.product(range(length), repeat=2):
        mask[0, 0, query, key] = key <= query or (query < prompt and key < prompt)
    if model.config._attn_implementation != "sdpa":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0].double().log_softmax(-1)


def score_by_hand(model, tokenizer, context, continuation):
    context_ids = tokenizer(context)["input_ids"] or [1]
    ids = [*context_ids, *tokenizer(continuation)["input_ids"]]
    told = by_hand(model, ids[:-1], len(context_ids))
    return sum(float(told[place - 1, ids[place]]) for place in range(len(context_ids), len(ids)))


def greedy_by_hand(model, ids, steps):
    written = list(ids)
    for _ in range(steps):
        written.append(int(by_hand(model, written, len(ids))[-1].argmax()))
    return written


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [True, False])
def test_choices_score_as_by_hand(tokenizer, kind, share):
    model = make(kind)
    scorer = Scorer(model, tokenizer, share=share)
    found = scorer.loglikelihoods(REQUESTS)
    for request, answer in zip(REQUESTS, found, strict=True):
        assert answer.log_prob == pytest.approx(score_by_hand(model, tokenizer, *request), abs=2e-4)
    # ALiBi's distances are those of columns, so that branches cannot stand side by side
    assert (scorer.branches.style != "plain") == (share and kind != "mpt")


def test_choices_of_one_prompt_are_read_with_it_once(tokenizer):
    prompt = "a long question that has several answers: " * 4
    requests = [(prompt, f" {word}") for word in ("one", "two", "three", "four")]
    model, read = make("llama"), []
    for share in (True, False):
        scorer = Scorer(model, tokenizer, share=share)
        read.append((scorer.loglikelihoods(requests), scorer.reader.tokens_read))
    for one, other in zip(read[0][0], read[1][0], strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=2e-4)
    scorer = Scorer(model, tokenizer)
    scorer.branches.style, scorer.branches._proved = "bool", (10**6, 10**6)
    scorer.loglikelihoods(requests)
    assert scorer.reader.tokens_read < 0.4 * read[1][1]


def test_a_causal_reading_scores_differently_and_documents_are_causal(tokenizer):
    model = make("llama")
    causal = make("llama", prefix=False)
    pair = ("the colour is", " red")
    one, other = (Scorer(m, tokenizer).loglikelihoods([pair])[0].log_prob for m in (model, causal))
    assert abs(one - other) > 1e-3
    texts = ["a document without a prompt"]
    assert Scorer(model, tokenizer).documents(texts)[0].bits == Scorer(causal, tokenizer).documents(texts)[0].bits


@pytest.mark.parametrize("kind", KINDS)
def test_generation_reads_the_prompt_both_ways_alone_in_batches_and_without_a_cache(kind):
    model = make(kind)
    prompts = [[1, 40, 41, 42, 43, 90], [1, 77, 78]]
    expected = [greedy_by_hand(model, prompt, 5) for prompt in prompts]
    conduct = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, wanted in zip(prompts, expected, strict=True):
        for cache in (True, False):
            assert model.generate(torch.tensor([prompt]), use_cache=cache, **conduct)[0].tolist() == wanted
    padded = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    found = model.generate(padded, attention_mask=(padded != 0).long(), **conduct)
    assert [found[0].tolist(), found[1, 3:].tolist()] == expected


def test_beams_find_what_all_continuations_show():
    model, prompt = make("llama"), [1, 40, 41, 42]
    first = by_hand(model, prompt, 4)[-1]
    behind = {int(a): by_hand(model, [*prompt, int(a)], 4)[-1] for a in first.topk(8).indices}
    best = max(behind, key=lambda a: float(first[a] + behind[a].max()))
    found = model.generate(torch.tensor([prompt]), num_beams=8, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert found[0, 4:].tolist() == [best, int(behind[best].argmax())]


def test_how_much_is_prompt_may_be_said(tokenizer):
    model = make("llama")
    ids = [1, 40, 41, 42, 43, 90]
    found = model.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False, prompt_tokens=3, output_logits=True,
                           return_dict_in_generate=True)  # fmt: skip
    assert torch.allclose(found.logits[0].double().log_softmax(-1), by_hand(model, ids, 3)[-1:], atol=1e-4)


def test_a_copy_reads_with_its_own_weights():
    model = make("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.copy_(-other.lm_head.weight)
    ids = torch.tensor([[1, 40, 41]])
    written = other.generate(ids, max_new_tokens=1, do_sample=False)[0].tolist()
    assert written == greedy_by_hand(other, [1, 40, 41], 1) != greedy_by_hand(model, [1, 40, 41], 1)


def test_members_of_an_ensemble_are_each_read_as_they_were_trained(tokenizer):
    both, causal = make("llama", 1), make("gpt2", 2, prefix=False)
    duo = write_as_trained(ensemble_of({"a": both, "b": causal}))
    for context, continuation in REQUESTS[:3]:
        (answer,) = Scorer(duo, tokenizer).loglikelihoods([(context, continuation)])
        ids = tokenizer(context + continuation)["input_ids"]
        prompt = len(tokenizer(context)["input_ids"])
        mixed = (by_hand(both, ids[:-1], prompt).exp() + by_hand(causal, ids[:-1], 0).exp()).log() - torch.tensor(
            2.0
        ).log()
        expected = sum(float(mixed[place - 1, ids[place]]) for place in range(prompt, len(ids)))
        assert answer.log_prob == pytest.approx(expected, abs=2e-4)
    shared = Scorer(duo, tokenizer).loglikelihoods(REQUESTS)
    plain = Scorer(duo, tokenizer, share=False).loglikelihoods(REQUESTS)
    for one, other in zip(shared, plain, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=2e-4)
    ids = [1, 40, 41, 42]
    token = int((by_hand(both, ids, 4).exp() + by_hand(causal, ids, 0).exp())[-1].argmax())
    assert int(duo.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False)[0, -1]) == token


def test_speculation_with_a_prefix_lm_is_refused():
    duo = ensemble_of({"a": make("llama", 1), "b": make("llama", 2)})
    with pytest.raises(RequestError, match="found a prefix LM: use `generate`"):
        duo.speculate(torch.tensor([[1, 5]]), max_new_tokens=2)


def test_a_mask_that_cannot_be_widened_is_refused():
    model = make("llama")
    with read_both_ways(model, 2), pytest.raises(ValueError, match="expected a mask of padding or of 3 tokens"):
        model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3, 3))


def test_in_a_conversation_what_stands_before_the_first_answer_is_read_both_ways(tokenizer, tmp_path):
    told = copy.deepcopy(tokenizer)
    told.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    models.save(make("llama"), told, tmp_path / "m")
    talk = Talk(tmp_path / "m")
    asked, real = [], talk.model.generate
    talk.model.generate = lambda **given: [asked.append(given["prompt_tokens"]), real(**given)][1]
    for said in ("hello", "and more"):
        list(talk.reply(said, max_tokens=2, temperature=0))
    assert asked == [len("hello|"), len("hello|")]


def test_a_folder_says_what_it_is_and_tuning_without_an_objective_leaves_it_so(tokenizer, tmp_path):
    models.save(make("llama"), tokenizer, tmp_path / "m")
    loaded = models.load(tmp_path / "m")
    assert is_prefix_lm(loaded.config)
    assert loaded.generate(torch.tensor([[1, 40, 41]]), max_new_tokens=3, do_sample=False)[0].tolist() == (
        greedy_by_hand(loaded, [1, 40, 41], 3)
    )
    assert isinstance(objective_for("decoder", None, loaded.config), Prefix)
    assert isinstance(objective_for("decoder", Causal(), loaded.config), Causal)
    assert isinstance(objective_for("decoder", None, {}), Causal)
    assert told_of({"prefix_lm": True, "a": 1}, Causal()) == {"a": 1}
    mark(loaded, False)
    assert not is_prefix_lm(loaded.config)
    assert "prefix_lm" not in loaded.config.to_dict()
