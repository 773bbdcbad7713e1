"""The loss against cross entropy as torch has it; which models can be told of the documents in a row."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from graft.pretrain.architectures import Shape, build, config_for
from graft.train import cross_entropy
from graft.train.attention import keeps_apart
from graft.train.cross_entropy import summed_cross_entropy
from graft.train.losses import TokenLoss, shifted_left, shifted_right

IDS = {"bos": 1, "eos": 2, "pad": 0}


def small(architecture, positions):
    torch.manual_seed(0)
    return build(config_for(architecture, positions, Shape(32, 2, 2, 60, 32, 0.0, IDS))).eval()


def brute_force(logits, labels):
    """-Σ log(e^x[label] / Σ e^x) in float64, one place at a time."""
    total = 0.0
    for row, label in zip(logits.double().flatten(0, -2), labels.flatten().tolist(), strict=True):
        if label != -100:
            total -= float(row[label] - torch.log(torch.exp(row).sum()))
    return total


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 7), length=st.integers(1, 9), ignored=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_sum_is_the_formulas_however_many_labels_are_ignored(rows, length, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, length, 11, generator=generator)
    labels = torch.randint(0, 11, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < ignored] = -100
    assert float(summed_cross_entropy(logits, labels)) == pytest.approx(brute_force(logits, labels), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("ignored", [0.1, 0.9])
@pytest.mark.parametrize("chunk", [13, 50, 10**6])
def test_chunks_change_neither_the_loss_nor_its_gradient(monkeypatch, chunk, ignored):
    monkeypatch.setattr(cross_entropy, "CHUNK_NUMBERS", chunk)
    torch.manual_seed(0)
    logits = torch.randn(4, 9, 13, requires_grad=True)
    labels = torch.randint(0, 13, (4, 9)).masked_fill(torch.rand(4, 9) < ignored, -100)
    ours = summed_cross_entropy(logits, labels)
    theirs = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    # a scale on the way back, as accumulation and mixed precision put one there
    (found,), (wanted,) = torch.autograd.grad(3 * ours, logits), torch.autograd.grad(3 * theirs, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_gradients_too_small_for_fp16_survive_when_the_loss_is_scaled():
    logits = torch.zeros(1, 1, 8, dtype=torch.float16)
    logits[..., 0] = 18.0  # the others have a probability of 1.5e-8, which fp16 cannot hold
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(65536 * summed_cross_entropy(logits, torch.tensor([[0]])), logits)
    assert gradient[0, 0, 1:].tolist() == pytest.approx([65536 * float(torch.exp(torch.tensor(-18.0)))] * 7, rel=1e-2)


def test_the_loss_is_in_fp32_whatever_the_logits_are():
    logits = torch.randn(2, 50, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(100).reshape(2, 50) % 30
    found = summed_cross_entropy(logits, labels)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(brute_force(logits, labels), rel=1e-6)


def test_labels_are_moved_to_where_they_are_predicted():
    labels = torch.tensor([[5, 6, -100, 8]])
    assert shifted_left(labels).tolist() == [[6, -100, 8, -100]]
    config = transformers.T5Config(decoder_start_token_id=1, pad_token_id=0)
    assert shifted_right(labels, config).tolist() == [[1, 5, 6, 0]]


@pytest.mark.parametrize(
    ("architecture", "positions"),
    [("decoder", "rotary"), ("encoder", "learned"), ("encoder-decoder", "relative"), ("encoder-decoder", "learned")],
)
def test_the_loss_is_that_of_transformers_on_a_full_batch(architecture, positions):
    model = small(architecture, positions)
    ids = torch.randint(4, 60, (3, 10))
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    loss = TokenLoss()
    with torch.no_grad():
        theirs = model(**batch).loss
        ours = loss(model, batch)
    scored = loss.weight(batch) - (3 if architecture == "decoder" else 0)  # a decoder predicts no first token
    assert float(ours) / scored == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("positions", ["relative", "learned", "sinusoidal"])
def test_padding_changes_nothing_for_an_encoder_decoder(positions):
    model, loss = small("encoder-decoder", positions), TokenLoss()
    short, long = torch.randint(4, 60, (1, 5)), torch.randint(4, 60, (1, 9))
    answers = torch.randint(4, 60, (1, 3)), torch.randint(4, 60, (1, 7))
    together = {
        "input_ids": torch.cat([F.pad(short, (0, 4)), long]),
        "attention_mask": torch.cat([F.pad(torch.ones_like(short), (0, 4)), torch.ones_like(long)]),
        "labels": torch.cat([F.pad(answers[0], (0, 4), value=-100), answers[1]]),
    }
    with torch.no_grad():
        alone = [
            loss(model, {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": a})
            for i, a in zip((short, long), answers, strict=True)
        ]
        assert float(loss(model, together)) == pytest.approx(float(sum(alone)), rel=1e-5)


SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "apart"),
    [
        ("LlamaForCausalLM", SIZES, True),
        ("Qwen2ForCausalLM", SIZES | {"num_key_value_heads": 2}, True),
        ("MistralForCausalLM", SIZES | {"num_key_value_heads": 2, "sliding_window": 4096}, True),
        ("MistralForCausalLM", SIZES | {"num_key_value_heads": 2, "sliding_window": 16}, False),
        ("BertForMaskedLM", SIZES, True),
        ("MambaForCausalLM", {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}, False),
    ],
)
def test_what_a_model_does_with_several_documents_in_a_row_is_found_by_trying(name, config, apart):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).train()
    assert keeps_apart(model, 32) == apart
    assert model.training
