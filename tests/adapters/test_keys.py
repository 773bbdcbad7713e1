"""Learned keys in front of attention: the paper's gated form, caches, batches, checkpointing; prompt tuning."""

import pytest
import torch
import transformers as hf
from torch.nn import functional

from graft.adapters import adapters_of, adopt, fold
from graft.adapters.folding import remove
from graft.adapters.keys import IMPLEMENTATION, KeySite, Reader, Shapes, attention
from graft.adapters.positions import positions_in
from graft.errors import RequestError
from graft.train.attention import keeps_apart

from .families import family, inputs, logits, moved
from .test_space import point, points


def adopted(model_name, name="prefix", size=0.5, **options):
    model = family(model_name)
    torch.manual_seed(0)
    adopt(model, points(name, **options))
    moved(model, size)
    return model


def test_attention_with_a_prefix_is_the_gated_form_of_the_paper():
    """Equation 5 of He et al. (2022), λ worked out from the two sums."""
    model = adopted("gpt2", gate=False, length=3)
    module = model.transformer.h[0].attn
    site = next(iter(adapters_of(model).sites["adapter"].values()))
    q, k, v = torch.randn(3, 2, 4, 5, 4).unbind()
    found, _ = attention(module, q, k, v, None, is_causal=True)

    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~torch.ones(5, 5).tril().bool(), float("-inf"))
    own, learned = scores.exp(), (q @ site.keys.transpose(-1, -2) / 2).exp()
    share = learned.sum(-1, keepdim=True) / (learned.sum(-1, keepdim=True) + own.sum(-1, keepdim=True))
    h = functional.softmax(scores, -1) @ v
    change = functional.softmax(q @ site.keys.transpose(-1, -2) / 2, -1) @ site.values
    assert torch.allclose(found.transpose(1, 2), (1 - share) * h + share * change, atol=1e-5)


def test_a_gate_goes_from_the_model_as_it_is_to_the_published_form():
    open_, closed, published = (family("llama") for _ in range(3))
    torch.manual_seed(0)
    adopt(published, points("prefix", gate=False))
    for model, value in ((open_, 1.0), (closed, 0.0)):
        adopt(model, points("prefix"))
        for mine, theirs in zip(model.modules(), published.modules(), strict=True):
            if isinstance(mine, KeySite):
                mine.keys.data, mine.values.data = theirs.keys.data, theirs.values.data
                mine.gate.data.fill_(value)
    # as published, the text's positions begin behind the keys: rotary attention does not see that among the text
    adapters_of(published).points["adapter"] = points("prefix")
    assert torch.allclose(logits(open_), logits(published), atol=1e-5)
    assert torch.equal(logits(closed), logits(family("llama")))


@pytest.mark.parametrize(
    ("name", "model_name", "gate"),
    [
        ("prefix", "llama", True),
        ("prefix", "gpt2", False),
        ("prefix", "opt", True),
        ("prompt", "llama", False),
        ("prompt", "gpt2", True),
        ("prompt", "opt", False),
        ("mix_and_match", "llama", True),
    ],
)
def test_generation_with_a_cache_is_generation_without(name, model_name, gate):
    model = adopted(model_name, name, gate=gate)
    ids = inputs(model)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    beams = model.generate(ids, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))


@pytest.mark.parametrize("name", ["prefix", "prompt"])
@pytest.mark.parametrize("model_name", ["t5", "bart"])
def test_translators_generate_with_a_cache_too(name, model_name):
    model = adopted(model_name, name, **({"cross": True} if name == "prefix" else {}))
    ids = inputs(model)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    assert not torch.equal(logits(model), logits(family(model_name)))


@pytest.mark.parametrize("name", ["prefix", "prompt"])
@pytest.mark.parametrize("model_name", ["llama", "gpt2", "bert", "t5"])
def test_padding_changes_nothing(name, model_name):
    model = adopted(model_name, name)
    plain = inputs(model, rows=1)
    ids = plain["input_ids"]
    padded = functional.pad(ids, (0, 3))
    mask = functional.pad(torch.ones_like(ids), (0, 3))
    with torch.no_grad():
        alone = model(**plain).logits
        beside = model(**(plain | {"input_ids": padded}), attention_mask=mask).logits
    assert torch.allclose(beside[:, : alone.shape[1]], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["prefix", "prompt", "lora", "parallel_adapter", "mix_and_match"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    found = []
    for checkpointing in (False, True):
        model = adopted("llama", name, 0.2).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs(model), use_cache=False).logits.square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_prompt_tuning_of_a_decoder_is_learned_embeddings_before_the_text(model_name):
    model = adopted(model_name, "prompt", gate=False, length=4)
    (site,) = adapters_of(model).sites["adapter"].values()
    plain = family(model_name)
    ids = inputs(plain)["input_ids"]
    text = plain.get_input_embeddings()(ids)
    with torch.no_grad():
        whole = plain(inputs_embeds=torch.cat([site.embeddings.expand(2, -1, -1), text], 1)).logits
    assert torch.allclose(logits(model), whole[:, 4:], atol=1e-5)


def test_learned_tokens_follow_the_weights_they_are_read_with():
    model = adopted("llama", "prompt")
    before = logits(model)
    with torch.no_grad():
        next(iter(adapters_of(model).sites["adapter"].values())).embeddings.add_(1.0)
    assert not torch.allclose(logits(model), before, atol=1e-4)


def test_layers_choose_whose_keys_are_learned():
    model = adopted("llama", layers="1:")
    assert list(adapters_of(model).sites["adapter"]) == ["model/layers/1/self_attn/keys"]


def test_taking_adapters_out_leaves_the_model_as_it_was():
    model = adopted("llama", "mix_and_match")
    remove(model)
    assert torch.equal(logits(model), logits(family("llama")))
    assert model.config._attn_implementation == "sdpa" != IMPLEMENTATION
    assert not any("graft_keys" in module.__dict__ for module in model.modules())
    with pytest.raises(RequestError):
        fold(model)


def test_models_that_compute_attention_themselves_are_refused():
    with pytest.raises(RequestError, match=r"MptForCausalLM: expected attention through.*use lora, ia3 or an adapter"):
        adopt(family("mpt"), points("prefix"))
    model = family("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(RequestError, match="found eager: load it with sdpa"):
        adopt(model, points("prefix"))
    with pytest.raises(RequestError, match="expected attention at cross_attention"):
        adopt(family("llama"), [point(form="softmax", on=["cross_attention"], size=2)])


def test_a_model_that_keeps_its_state_in_its_modules_takes_keys_that_move_nothing():
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 48, "num_attention_heads": 4, "lru_width": 16}
    config = hf.RecurrentGemmaConfig(**sizes, num_hidden_layers=3, head_dim=4, attention_window_size=8)
    model = hf.RecurrentGemmaForCausalLM(config).eval()
    for method, options in (("prompt", {}), ("prefix", {"gate": False})):
        with pytest.raises(RequestError, match="keeps what it has read in its own modules"):
            adopt(model, points(method, **options))
    assert adopt(model, points("prefix")).count("adapter")


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_positions_that_begin_behind_padding_stay_so(name):
    """RoBERTa's first token is at position 2, and padding at 1."""
    model = family("roberta")
    stack = adopt(model, points(name, gate=False, length=4))
    ids = functional.pad(inputs(model)["input_ids"], (0, 2), value=1)
    with torch.no_grad():
        plain = family("roberta")(ids).logits
        with stack.each_row(["adapter", None]):
            rows = model(ids).logits
        assert torch.allclose(rows[0], model(ids).logits[0], atol=1e-6)
    assert torch.allclose(rows[1], plain[1], atol=1e-6)
    assert positions_in(model, model.config.to_dict()) == 62


def test_keys_of_a_site_have_the_shapes_of_the_module():
    site = KeySite(point(form="softmax", on=["attention"], size=5), Shapes(4, 2, 8, 6))
    assert (site.keys.shape, site.values.shape, site.gate.shape) == ((2, 5, 8), (2, 5, 6), (4,))


@pytest.mark.parametrize("name", ["prefix", "prompt", "lora"])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("model_name", ["llama", "gpt2", "bert"])
def test_documents_packed_into_a_row_are_read_as_they_are_alone(name, model_name, gate):
    model = adopted(model_name, name, **({"gate": gate} if name != "lora" else {}))
    assert keeps_apart(model, 32)


def test_learned_positions_end_where_the_model_says():
    model = adopted("gpt2", "prompt", gate=False, length=8)
    assert adapters_of(model).taken(model) == 8
    adapters_of(model).use(None)
    assert adapters_of(model).taken(model) == 0


def test_a_name_is_free_again_where_learned_tokens_were_refused(monkeypatch):
    def unread(*_):
        raise RuntimeError("no embeddings alone")

    model, other = family("llama"), family("llama")
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", unread)
        with pytest.raises(RequestError, match="expected a model that reads embeddings alone"):
            adopt(model, points("prompt"), "x")
    for each in (model, other):
        torch.manual_seed(0)
        adopt(each, points("prefix"), "x")
        moved(each, 0.3)
    assert torch.equal(logits(model), logits(other))
