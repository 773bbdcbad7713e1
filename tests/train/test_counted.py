"""What is said of a model before it is trained."""

from transformers import GPT2Config, GPT2LMHeadModel

from graft.train.on_text import counted


def test_the_trained_parameters_are_told_where_not_all_of_them_are():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2, n_positions=6))
    whole = sum(p.numel() for p in model.parameters())
    assert counted(model) == f"{whole:,} parameters"
    model.requires_grad_(False)
    model.transformer.wte.weight.requires_grad_(True)
    assert counted(model) == f"{whole:,} parameters, 80 of them trained ({100 * 80 / whole:.2g} %)"
