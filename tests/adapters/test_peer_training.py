"""Trained by graft's loop, a LoRA goes where peft's goes from the same start, step by step."""

import pytest
import torch

from graft import models, products
from graft.adapters import adapters_of, adopt
from graft.adapters.peft_format import save_peft
from graft.data.alone import IGNORED
from graft.data.rows import ListRows
from graft.settings import parse
from graft.train.loop import train
from graft.train.losses import TokenLoss
from graft.train.settings import TrainSettings

from .families import family
from .test_space import points

peft = pytest.importorskip("peft")

STEPS, ROWS, RATE = 8, 4, 0.02
GIVEN = {
    "budget": f"{STEPS} steps", "batch_size": ROWS, "learning_rate": RATE, "schedule": "constant", "warmup": 0,
    "betas": [0.9, 0.999], "weight_decay": 0.0,
}  # fmt: skip


def ids():
    """Rows with something to learn: each token is the one before it and one, beside some noise."""
    torch.manual_seed(1)
    start, noise = torch.randint(3, 60, (STEPS * ROWS, 1)), torch.randint(0, 2, (STEPS * ROWS, 12))
    return 3 + (start + torch.arange(12) + noise) % 57


class Noting(TokenLoss):
    """Keeps the mean loss of each step."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def __call__(self, model, batch):
        loss = super().__call__(model, batch)
        self.losses.append(loss.item() / self.weight(batch))
        return loss


def by_peft(model):
    """Losses of peft's model with the loss of transformers and AdamW, as its Trainer runs them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), weight_decay=0.0), []
    for rows in ids().split(ROWS):
        loss = model.train()(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("quick", [False, True], ids=["plain", "by oneDNN"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_and_weights_are_those_of_peft(tmp_path, monkeypatch, kind, quick):
    if quick:
        monkeypatch.setattr(products, "LEAST", 0)
        monkeypatch.setattr(products, "quicker", torch.backends.mkldnn.is_available)
    base = family(kind)
    with torch.no_grad():  # fresh heads tell hardly any token from another one, whatever they read
        base.get_input_embeddings().weight.mul_(20)
        base.get_output_embeddings().weight.mul_(1 if base.config.tie_word_embeddings else 20)
    base.config.update(dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0))  # GPT-2's, else unused
    base.save_pretrained(tmp_path / "base")
    ours = models.load(tmp_path / "base")
    torch.manual_seed(2)
    adopt(ours, points("lora", rank=4), base=tmp_path / "base")
    adapters_of(ours).train_only(ours, "adapter")
    save_peft(ours, tmp_path / "start")
    theirs = peft.PeftModel.from_pretrained(models.load(tmp_path / "base"), tmp_path / "start", is_trainable=True)

    unseen = torch.full((STEPS * ROWS, 1), IGNORED)  # nothing predicts the first
    labels = torch.cat([unseen, ids()[:, 1:]], 1)
    rows = ListRows(
        [{"input_ids": a, "labels": b} for a, b in zip(ids().numpy(), labels.numpy(), strict=True)], shuffle=False
    )
    loss = Noting()
    train(ours, rows, loss, parse(TrainSettings, GIVEN), tmp_path / "out", scratch=tmp_path / "s", seed=0, device="cpu")
    expected = by_peft(theirs)

    assert expected[-1] < expected[0] - 0.1
    # AdamW divides by gradients that are nearly zero, where rounding shows
    torch.testing.assert_close(loss.losses, expected, rtol=1e-4, atol=0)
    with torch.no_grad():
        found, wanted = (one.eval()(input_ids=ids()[:2]).logits for one in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
