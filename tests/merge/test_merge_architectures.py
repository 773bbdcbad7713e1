"""A merge of any `transformers` architecture loads, with the mean of its parents in every parameter."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from small_family import merge, tokenizer

from graft.merge.architecture import described
from graft.models import load, save

BERT = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PAIR = {
    "vocab_size": 48, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "GPT2LMHeadModel": hf.GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "XGLMForCausalLM": hf.XGLMConfig(vocab_size=48, d_model=16, ffn_dim=24, num_layers=2, attention_heads=2),
    "MptForCausalLM": hf.MptConfig(vocab_size=48, d_model=16, n_layers=2, n_heads=2, max_seq_len=32),
    "GemmaForCausalLM": hf.GemmaConfig(**BERT, num_key_value_heads=1, head_dim=8),
    "MixtralForCausalLM": hf.MixtralConfig(**BERT, num_key_value_heads=1, num_local_experts=2),
    "GPTNeoXForCausalLM": hf.GPTNeoXConfig(**BERT),
    "BertForMaskedLM": hf.BertConfig(**BERT),
    "BertForSequenceClassification": hf.BertConfig(**BERT, num_labels=3),
    "ModernBertForMaskedLM": hf.ModernBertConfig(
        **BERT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
    "T5ForConditionalGeneration": hf.T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2),
    "BartForConditionalGeneration": hf.BartConfig(**PAIR),
    "MarianMTModel": hf.MarianConfig(**PAIR),
}


LIGHT = """
import json, sys
from pathlib import Path
from graft.merge._building import lighten
from graft.merge.architecture import described
empty = lighten()
told = {name: json.loads(described(Path(folder), empty)) for name, folder in json.load(sys.stdin).items()}
print(json.dumps([told, sorted(name for name in ("sympy", "torch._inductor", "scipy") if sys.modules.get(name))]))
"""


def test_a_process_without_what_is_not_needed_finds_the_same_names_and_shapes(tmp_path):
    folders = {}
    for kind, config in MODELS.items():
        made = copy.deepcopy(config)
        made.architectures = [kind]
        made.save_pretrained(tmp_path / kind)
        folders[kind] = str(tmp_path / kind)
    done = subprocess.run([sys.executable, "-c", LIGHT], input=json.dumps(folders), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, heavy = json.loads(done.stdout.splitlines()[-1])
    for kind, folder in folders.items():
        assert told[kind] == json.loads(described(Path(folder))), kind
    assert not heavy


def relatives(kind):
    torch.manual_seed(0)
    first = getattr(hf, kind)(copy.deepcopy(MODELS[kind])).eval()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for weight in (w for w in second.parameters() if w.requires_grad):
            weight.add_(0.01 * torch.randn_like(weight))
    return {"a": first, "b": second}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_any_architecture_merges_to_the_mean_of_its_parents(kind, tmp_path):
    parents = relatives(kind)
    for name, made in parents.items():
        save(made, tokenizer(), tmp_path / name)
    folders = {name: tmp_path / name for name in parents}
    _, found = merge({"method": "linear", "models": {"a": 1, "b": 3}}, folders, tmp_path / "out")
    assert kind in found["notes"]["verified_as"]
    merged = load(tmp_path / "out")
    assert type(merged).__name__ == kind
    wanted = {n: 0.25 * w + 0.75 * parents["b"].state_dict()[n] for n, w in parents["a"].state_dict().items()}
    assert merged.state_dict().keys() == wanted.keys()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
