"""What sees the tokens that it is asked for is taken for a decoder nowhere: not scored, trained or combined."""

import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)
from typer.testing import CliRunner

import graft
from graft import data, models
from graft.cli import app
from graft.data.tokenizers import train_tokenizer
from graft.ensemble.model import ensemble_of
from graft.errors import RequestError
from graft.evaluate.scorer import Scorer
from graft.one_way import check_one_way

TEXT = "we read what was written before, and not what comes after it. " * 20
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MADE = {
    "xlnet": lambda ids: XLNetLMHeadModel(XLNetConfig(vocab_size=ids, d_model=16, n_layer=2, n_head=2, d_inner=32)),
    "bert": lambda ids: BertLMHeadModel(BertConfig(vocab_size=ids, **BERT)),
    "bert from left to right": lambda ids: BertLMHeadModel(BertConfig(vocab_size=ids, is_decoder=True, **BERT)),
    "gpt2": lambda ids: GPT2LMHeadModel(GPT2Config(vocab_size=ids, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
    "rwkv": lambda ids: RwkvForCausalLM(RwkvConfig(vocab_size=ids, hidden_size=16, num_hidden_layers=2)),
}
REFUSED = r"expected a decoder, which reads text from left to right, found XLNetLMHeadModel, which sees the tokens"


def made(kind, ids=50):
    torch.manual_seed(0)
    return MADE[kind](ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """XLNet with a tokenizer of text from here."""
    root = tmp_path_factory.mktemp("xlnet")
    (root / "text.txt").write_text(TEXT)
    raw = data.parse({"source": "text", "path": str(root / "text.txt"), "splits": {"dev": 0, "test": 0}})
    tokenizer = train_tokenizer(data.open_corpus({"c": raw}, "c", root / "corpus"), "bpe", 300)
    for kind in ("xlnet", "gpt2"):
        models.save(made(kind, len(tokenizer)), tokenizer, root / kind)
    return root / "xlnet"


@pytest.mark.parametrize("kind", ["xlnet", "bert"])
def test_what_reads_both_ways_is_told_from_decoders(kind):
    with pytest.raises(RequestError, match=r"which reads text from left to right, found \w+LMHeadModel"):
        check_one_way(made(kind))


@pytest.mark.parametrize("kind", ["bert from left to right", "gpt2", "rwkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_pass_and_stay_as_they_were(kind, dtype):
    model = made(kind).to(dtype).train()
    frozen = next(model.children()).eval()
    check_one_way(model)
    assert model.training
    assert not any(module.training for module in frozen.modules())


def test_it_is_not_scored(folder):
    scorer = Scorer(models.load(folder), models.load_tokenizer(folder))
    with pytest.raises(RequestError, match=REFUSED):
        scorer.documents(["a text"])
    with pytest.raises(RequestError, match=REFUSED):
        scorer.loglikelihoods([("a", " text")])


def test_it_is_no_member(folder, tmp_path):
    with pytest.raises(RequestError, match=REFUSED):
        ensemble_of({"a": made("gpt2"), "b": made("xlnet")})
    graft.ensemble(tmp_path / "both", members=[str(folder.parent / "gpt2"), str(folder)])
    with pytest.raises(RequestError, match=REFUSED):
        models.load(tmp_path / "both")


@pytest.mark.parametrize(
    ("command", "code"), [("eval XLNET --on TEXT", 1), ("tune OUT --from XLNET --data DATA --length 32", 2)]
)
def test_commands_say_so(folder, tmp_path, command, code):
    root = folder.parent
    text = root / "text.txt"
    told = json.dumps({"source": "text", "path": str(text), "splits": {"dev": 0}})
    places = {"OUT": tmp_path / "out", "XLNET": folder, "TEXT": text, "DATA": told}
    done = CliRunner().invoke(app, [str(places.get(word, word)) for word in command.split()] + ["--json"])
    assert done.exit_code == code, done.output
    assert "found XLNetLMHeadModel, which sees the tokens" in json.loads(done.stdout)["error"]
    assert not (tmp_path / "out").exists()
