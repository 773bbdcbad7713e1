"""Places are found from module types and names in every kind of architecture."""

import pytest
import transformers as hf

from graft.adapters.places import Layout
from graft.adapters.point import Point
from graft.errors import RequestError

from .families import CLASSES, family


def places(model, on, layers=None, form="bottleneck"):
    return Layout(model).places(Point(form=form, on=[on], size=None if form == "bias" else 2, layers=layers))


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "mamba"])
def test_every_block_has_one_attention_and_one_feed_forward(name):
    model = family(name)
    blocks = sum(Layout(model).stacks.values())
    for part in ("attention", "feed_forward"):
        found = places(model, part)
        assert len(found) == blocks
        assert {(place.inputs, place.outputs) for place in found} == {(16, 16)}
    crossed = 2 if name in ("t5", "bart") else 0
    assert sum(one.part == "cross_attention" and one.role == "query" for one in Layout(model).linears) == crossed


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("llama", {"query": "q_proj", "value": "v_proj", "output": "o_proj", "down": "down_proj"}),
        ("gpt2", {"qkv": "c_attn", "output": "c_proj", "up": "c_fc", "down": "c_proj"}),
        ("opt", {"key": "k_proj", "output": "out_proj", "up": "fc1", "down": "fc2"}),
        ("neox", {"qkv": "query_key_value", "output": "dense", "down": "dense_4h_to_h"}),
        ("bert", {"query": "query", "output": "dense", "up": "dense", "down": "dense"}),
        ("modernbert", {"qkv": "Wqkv", "output": "Wo", "up": "Wi", "down": "Wo"}),
        ("t5", {"query": "q", "output": "o", "up": "wi", "down": "wo"}),
        ("mpt", {"qkv": "Wqkv", "output": "out_proj", "up": "up_proj", "down": "down_proj"}),
        ("afmoe", {"query": "q_proj", "output": "o_proj", "down": "down_proj"}),
        ("deepseek", {"kv": "kv_b_proj", "output": "o_proj", "down": "down_proj"}),
    ],
)
def test_roles_are_read_from_names_and_sizes(name, roles):
    for role, leaf in roles.items():
        assert {place.path.rpartition(".")[2] for place in places(family(name), role)} == {leaf}


def test_the_query_of_cross_attention_is_what_reads_the_block():
    assert all(place.source.endswith("encoder_attn.q_proj") for place in places(family("bart"), "cross_attention"))


def test_a_feed_forward_of_experts_is_one_module_beside_dense_ones():
    for name in ("afmoe", "deepseek"):
        dense, sparse = places(family(name), "feed_forward")
        assert (dense.source, dense.target) == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj")
        assert (sparse.source, sparse.target) == ("model.layers.1.mlp", "model.layers.1.mlp")
    assert [place.target for place in places(family("dbrx"), "feed_forward")] == [
        "transformer.blocks.0.ffn", "transformer.blocks.1.ffn"
    ]  # fmt: skip


def test_what_chooses_experts_is_reached_by_its_name_alone():
    for name, leaf in (("dbrx", "layer"), ("qwen3_next", "shared_expert_gate"), ("afmoe", "gate")):
        model = family(name)
        assert leaf not in {place.path.rpartition(".")[2] for place in places(model, "linears")}
        assert places(model, f"*.{leaf}")


def test_several_attentions_of_one_block_are_as_many_places():
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    experts = {"n_routed_experts": 2, "zero_expert_num": 0, "moe_topk": 1, "expert_ffn_hidden_size": 8}
    usual = {"vocab_size": 60, "hidden_size": 16, "ffn_hidden_size": 24, "num_layers": 1, "num_attention_heads": 4}
    model = hf.LongcatFlashForCausalLM(hf.LongcatFlashConfig(**usual, **sizes, **experts))
    ends = [
        (p.source.rpartition("layers.0.")[2], p.target.rpartition("layers.0.")[2]) for p in places(model, "attention")
    ]
    assert ends == [(f"self_attn.{i}.q_a_proj", f"self_attn.{i}.o_proj") for i in (0, 1)]
    wide = [p.target.rpartition("layers.0.")[2] for p in places(model, "feed_forward")]
    assert wide == ["mlp", "mlps.0.down_proj", "mlps.1.down_proj"]


def test_attention_in_a_list_of_its_own_is_found():
    model = hf.XLMWithLMHeadModel(hf.XLMConfig(vocab_size=60, emb_dim=16, n_layers=2, n_heads=4))
    assert [place.source for place in places(model, "attention")] == [
        f"transformer.attentions.{i}.q_lin" for i in (0, 1)
    ]


def test_layers_choose_blocks():
    model = family("llama")
    assert [place.path for place in places(model, "query", "1:")] == ["model.layers.1.self_attn.q_proj"]
    assert places(model, "query", "-1:") == places(model, "query", [1]) == places(model, "query", [-1])
    assert len(places(family("t5"), "attention", "0:1")) == 2  # of each stack
    with pytest.raises(RequestError, match=r"blocks 0 to 1, found \[0, 7\]"):
        places(model, "query", [0, 7])


def test_patterns_name_linear_layers_anywhere():
    model = family("llama")
    assert len(places(model, "*.mlp.*")) == 6
    assert len(places(model, "q_proj")) == 2
    assert [place.path for place in places(model, "lm_head")] == ["lm_head"]


def test_what_is_not_there_is_refused_with_what_is():
    with pytest.raises(
        RequestError, match=r"'\*\.q_porj', found none \(did you mean 'q_proj'\?\); there are attention"
    ):
        places(family("llama"), "*.q_porj")
    with pytest.raises(RequestError, match=r"MambaForCausalLM: expected a place 'attention'.*in_proj, x_proj"):
        places(family("mamba"), "attention")
    convolving = hf.SqueezeBertForMaskedLM(hf.SqueezeBertConfig(vocab_size=60, num_hidden_layers=1))
    for on in ("attention", "biases"):
        with pytest.raises(
            RequestError, match=r"expected blocks \(a list of modules with linear layers\), found trans"
        ):
            places(convolving, on, form="bias" if on == "biases" else "bottleneck")
    with pytest.raises(RequestError, match="expected layers with biases, found none; use lora"):
        places(family("llama"), "biases", form="bias")


def test_alternatives_take_the_first_that_is_there():
    assert {place.path[-6:] for place in places(family("gpt2"), "query|qkv")} == {"c_attn"}
    assert {place.path[-6:] for place in places(family("llama"), "query|qkv")} == {"q_proj"}
    found = [place.path.rpartition("layers.")[2] for place in places(family("qwen3_next"), "key|kv|qkv")]
    assert found == ["0.linear_attn.in_proj_qkvz", "1.self_attn.k_proj"]  # in each block
