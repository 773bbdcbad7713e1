"""Fusion attends over adapters; an invertible adapter is undone before the head."""

import pytest
import torch
import transformers as hf

from graft import models
from graft.adapters import adapters_of, adopt, fold
from graft.adapters.composed import Invertible, ends
from graft.adapters.places import Layout
from graft.errors import RequestError, SettingsError

from .families import family, logits, moved
from .test_space import point, points

FUSION = {"form": "fusion", "on": ["adapters"]}


def fused(model_name="llama", how="houlsby", count=3):
    """A model with trained adapters a, b, c and a fresh fusion of them."""
    model = family(model_name)
    for number in range(count):
        torch.manual_seed(number)
        adopt(model, points(how), "abc"[number])
        moved(model, 0.3 * (number + 1))
    stack = adapters_of(model)
    stack.use(list("abc"[:count]))
    adopt(model, [point(**FUSION)], "fused")
    return model


@pytest.mark.parametrize("how", ["houlsby", "lora"])
def test_fusion_starts_as_the_mean_of_the_changes(how):
    model = fused(how=how)
    stack = adapters_of(model)
    assert [name for name, _ in stack.active] == ["fused"]
    layer, x = model.model.layers[0].mlp.down_proj, torch.randn(2, 5, 24)
    stack.use(None)
    h = layer(x)
    changes = []
    for name in "abc":
        stack.use(name)
        changes.append(layer(x) - h)
    stack.use("fused")
    assert torch.allclose(layer(x), h + sum(changes) / 3, atol=1e-4)


def test_fusion_is_attention_over_the_changes_of_each_token():
    model = fused("gpt2", "lora")
    moved(model, 0.5)
    stack = adapters_of(model)
    layer, x = model.transformer.h[1].attn.c_proj, torch.randn(2, 5, 16)
    site = stack.sites["fused"]["transformer/h/1/attn/c_proj"]
    with stack.watching() as seen:
        found = layer(x)
    stack.use(None)
    h = layer(x)
    changes = torch.stack([stack.sites[name]["transformer/h/1/attn/c_proj"](h, x) - h for name in "abc"], 2)
    scores = torch.einsum("btd,btnd->btn", h @ site.query.T, changes @ site.key.T)
    shares = scores.softmax(-1)
    assert torch.allclose(found, h + torch.einsum("btn,btnd->btd", shares, changes) @ site.value.T, atol=1e-4)
    (place,) = seen
    assert place == "transformer.h.1.attn.c_proj"
    assert torch.allclose(seen[place], shares, atol=1e-5)


def test_only_the_fusion_is_trained_and_its_size_is_the_formulas():
    model = fused()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".fused." in name for name in trained)
    assert adapters_of(model).count("fused") == 2 * 2 * 3 * 16 * 16


def test_a_fusion_comes_back_with_its_adapters(tmp_path):
    family("llama").save_pretrained(tmp_path / "base")
    model = models.load(tmp_path / "base")
    for name in "ab":
        adopt(model, points("pfeiffer"), name, base=tmp_path / "base")
        moved(model, 0.3)
    adopt(model, [point(**FUSION, of=["b", "a"])], "fused")
    moved(model, 0.3)
    expected = logits(model)
    model.save_pretrained(tmp_path / "all")
    loaded = models.load(tmp_path / "all")
    assert torch.equal(logits(loaded), expected)
    assert adapters_of(loaded).points["fused"][0].of == ["b", "a"]
    with pytest.raises(RequestError, match="a fusion, which is not linear"):
        fold(loaded)


def test_what_does_not_meet_is_not_fused():
    model = family("llama")
    adopt(model, points("lora", on=["query"]), "a")
    with pytest.raises(RequestError, match="two adapters or more to fuse, found a"):
        adopt(model, [point(**FUSION)], "fused")
    adopt(model, points("lora", on=["value"]), "b")
    with pytest.raises(RequestError, match="found that a, b do not meet"):
        adopt(model, [point(**FUSION)], "fused")
    with pytest.raises(SettingsError, match="goes with `on: \\[adapters\\]`"):
        point(form="fusion", on=["query"])


def test_a_head_that_reads_other_channels_than_embeddings_give_is_refused():
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.RemBertConfig(**sizes, input_embedding_size=8, output_embedding_size=24, intermediate_size=24)
    with pytest.raises(RequestError, match=r"as many channels as embeddings give, found 24 and 8: use pfeiffer"):
        adopt(hf.RemBertForMaskedLM(config), points("mad_x"))


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "bert", "t5", "bart"])
def test_an_invertible_adapter_changes_every_embedding_that_is_read_and_is_undone_before_the_head(model_name):
    model = family(model_name)
    adopt(model, [point(form="invertible", on=["embeddings"], size=3)])
    inside, outside = ends(Layout(model))
    moved(model, 0.5)
    (site,) = adapters_of(model).sites["adapter"].values()
    assert isinstance(site, Invertible)
    table, given = model.get_input_embeddings().weight, []
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight is table:
            module.register_forward_hook(lambda m, args, out: given.append((args[0], out)))
    e = torch.randn(2, 5, 16)
    changed = site(e, None)
    assert not torch.allclose(changed, e, atol=1e-2)
    assert torch.allclose(site.inverse(changed), e, atol=1e-5)
    seen = {}
    model.get_submodule(outside.target).register_forward_hook(lambda m, args, out: seen.update(h=args[0]))
    found = logits(model)
    bare = family(model_name)
    assert not torch.allclose(found, logits(bare), atol=1e-3)
    assert (inside[0].outputs, outside.before, seen["h"].shape[-1]) == (16, True, 16)
    assert len(given) == (2 if model.config.is_encoder_decoder else 1)
    for ids, out in given:
        assert torch.allclose(out, site(table[ids], None), atol=1e-5)


def test_the_coupling_is_its_formula():
    model = family("llama")
    adopt(model, [point(form="invertible", on=["embeddings"], size=3, nonlinearity="tanh")])
    moved(model, 0.5)
    (site,) = adapters_of(model).sites["adapter"].values()
    e = torch.randn(4, 16)
    first = e[:, :8] + (e[:, 8:] @ site.first_down.T).tanh() @ site.first_up.T
    second = e[:, 8:] + (first @ site.second_down.T).tanh() @ site.second_up.T
    assert torch.allclose(site(e, None), torch.cat([first, second], 1), atol=1e-5)
