"""An ensemble as a teacher, as the page on ensembles shows it: a student comes nearer to it on real text."""

import json
import re
from pathlib import Path

import torch
from test_ensemble_folder import letters
from tiny_members import llama

import graft
from graft.ensemble.model import ensemble_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ensembles.md"


def shown():
    """The example on the page."""
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "KL(" in block]
    return found


def far(teacher, student, ids):
    """KL(teacher || student) in nats, over all tokens of whole distributions."""
    with torch.no_grad():
        said, found = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (teacher, student))
    return float((said.exp() * (said - found)).sum(-1).mean())


def learned(model, ids):
    """The model after some steps on a text's tokens `[rows, length]`."""
    steps = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        steps.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        steps.step()
    return model.eval()


def test_a_student_comes_nearer_to_an_ensemble_on_real_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer, known = letters(), set(letters().get_vocab())
    size = {"tokens": len(tokenizer)}
    text = json.__doc__.lower() + "\n\n" + (json.JSONDecoder.__doc__ + re.__doc__).lower()
    pieces = ["".join(sign for sign in text[at : at + 90] if sign in known) for at in range(0, len(text) - 90, 60)]
    Path("held-out.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    cut = torch.tensor([tokenizer(piece)["input_ids"][:40] for piece in pieces])
    members = {"coder": learned(llama(1, **size), cut[::2]), "writer": learned(llama(2, **size), cut[1::2])}
    ensemble_of(members, [0.6, 0.4]).save_pretrained("models/duo", self_contained=True)
    members["coder"].save_pretrained("models/coder")
    for name in ("duo", "coder"):
        tokenizer.save_pretrained(f"models/{name}")
    names = {}
    exec(compile(shown(), "ensembles.md", "exec"), names)
    log = [json.loads(line) for line in Path("work/log.jsonl").read_text().splitlines()]
    first, *_, last = [entry["dev_loss"] for entry in log if "dev_loss" in entry]
    assert last < first
    torch.manual_seed(0)
    fresh = type(names["student"])(names["student"].config).eval()
    before, after = (far(names["teacher"], model, cut) for model in (fresh, graft.load("models/student")))
    assert after < 0.5 * before
    assert not any(weight.requires_grad for weight in names["teacher"].parameters())
