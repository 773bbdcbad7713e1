"""Who speaks: shares against weights times probabilities, and what the terminal and the page say of them."""

import json
import re

import numpy as np
import pytest
import torch
from tiny_members import gpt2, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from graft.cli import app
from graft.ensemble.model import ensemble_of
from graft.ensemble.show import coloured, page, speaks
from graft.errors import RequestError

TEXT = "a <b> & c"


def letters():
    signs = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz .,\n<>&"]
    inner = Tokenizer(models.BPE(vocab={sign: place for place, sign in enumerate(signs)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("duo")
    members = {"first": llama(), "second": gpt2()}
    ensemble_of(members, [0.7, 0.3]).save_pretrained(place, self_contained=True)
    letters().save_pretrained(place)
    return place


@torch.no_grad()
def test_shares_are_weights_times_probabilities(folder):
    spoken = speaks(folder, TEXT)
    ids = letters()(TEXT)["input_ids"]
    inputs = torch.tensor([[1, *ids[:-1]]])
    told = [0.7 * llama()(input_ids=inputs).logits[0].softmax(-1), 0.3 * gpt2()(input_ids=inputs).logits[0].softmax(-1)]
    parts = torch.stack([each.gather(-1, torch.tensor(ids)[:, None])[:, 0] for each in told], -1)
    assert np.allclose(spoken.shares, (parts / parts.sum(-1, keepdim=True)).numpy(), atol=1e-5)
    assert np.allclose(spoken.weights * spoken.probs, parts.numpy(), atol=1e-6)
    assert "".join(spoken.tokens) == TEXT


def test_the_page_shows_the_text_escaped_and_every_members_part(folder):
    spoken = speaks(folder, TEXT)
    found = re.findall(r'<span style="[^"]*" title="([^"]*)">([^<]*)</span>', page(spoken))
    assert [word for _, word in found] == ["a", " ", "&lt;", "b", "&gt;", " ", "&amp;", " ", "c"]
    assert all(title.count("first: 0.700 ×") == title.count("second: 0.300 ×") == 1 for title, _ in found)
    assert coloured(spoken).plain.startswith(TEXT)


def test_the_command_prints_json_and_writes_the_page(folder, tmp_path):
    done = CliRunner().invoke(app, ["show", str(folder), "--text", TEXT, "--html", str(tmp_path / "p.html"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [each["token"] for each in found["tokens"]] == list(TEXT)
    assert sum(found["mean_shares"].values()) == pytest.approx(1)
    assert (tmp_path / "p.html").read_text() == page(speaks(folder, TEXT))


def test_only_mixtures_are_shown(tmp_path):
    ensemble_of({"a": llama(), "b": gpt2()}, [1, 1], "log_linear").save_pretrained(tmp_path, self_contained=True)
    with pytest.raises(RequestError, match="expected a mixture"):
        speaks(tmp_path, TEXT)
