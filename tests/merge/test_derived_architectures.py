"""Names and shapes that are worked out are those that transformers builds; what is not understood is built."""

import itertools
import json

import pytest
from transformers import CONFIG_MAPPING

from graft.fitting import architecture_of
from graft.merge._derived import KINDS, derived
from graft.models import made_empty

SIZES = {
    "vocab_size": 50, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2,
}  # fmt: skip
CHOICES = {
    "tie_word_embeddings": (False, True),
    "attention_bias": (None, False, True),
    "mlp_bias": (None, False, True),
    "head_dim": (None, 8, 16),
}
LAYERS = {"layer_types": ["full_attention"] * 2}


def said(kind, **more):
    """A configuration as a file has it."""
    extra = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    plain = {name: value for name, value in more.items() if value is not None}
    made = CONFIG_MAPPING[kind](**SIZES, **extra, **plain)
    made.architectures = [KINDS[kind].name]
    return json.loads(made.to_json_string(use_diff=False)), made


@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_of_settings_gives_what_transformers_builds(kind):
    for choice in itertools.product(*CHOICES.values()):
        config, made = said(kind, **dict(zip(CHOICES, choice, strict=True)))
        found, expected = derived(config), architecture_of(made_empty(made))
        assert found == expected, choice
        assert list(found.shapes) == list(expected.shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_short_file_leaves_out_is_what_transformers_takes_by_itself(kind):
    """Files hold the sizes and little else: what is not there is a default of the class, or the model is built."""
    config, made = said(kind)
    kept = {name: config[name] for name in (*SIZES, "model_type", "architectures", "tie_word_embeddings")}
    found, default = derived(kept), CONFIG_MAPPING[kind](**SIZES, tie_word_embeddings=kept["tie_word_embeddings"])
    default.architectures = made.architectures
    assert found in (None, architecture_of(made_empty(default)))
    assert (found is None) == (kind in ("qwen3", "gemma", "gemma2"))


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["LlamaForSequenceClassification"]}, {"architectures": None}, {"model_type": "llama4"},
        {"hidden_size": "wide"}, {"hidden_size": 0}, {"hidden_size": 48.0}, {"num_key_value_heads": 4},
        {"num_key_value_heads": None}, {"num_attention_heads": 7, "head_dim": None}, {"head_dim": 7},
        {"head_dim": True},
        {"tie_word_embeddings": None}, {"attention_bias": "yes"}, {"hidden_act": "nonsense"}, {"dtype": "int8"},
        {"quantization_config": {"bits": 4}}, {"auto_map": {"AutoModel": "mine.Model"}}, {"flavour": "plain"},
        {"pruned_heads": {"0": [1]}}, {"rope_parameters": {"rope_type": "mine"}}, {"rope_parameters": "default"},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, {"layer_types": ["full_attention"]},
        {"layer_types": ["linear_attention"] * 2}, {"layer_types": 2}, {"eos_token_id": ["a"]}, {"text_config": {}},
    ],
)  # fmt: skip
def test_of_what_is_not_understood_the_model_is_built(change):
    config, _ = said("llama")
    assert derived(config) is not None
    assert derived(config | change) is None
