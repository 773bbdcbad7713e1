"""What a fusion listens to, shown by place and token."""

import json

import pytest
import torch
from typer.testing import CliRunner

import graft
from graft import data, models
from graft.adapters import Point, adapters_of, adopt
from graft.cli import app
from graft.data.tokenizers import train_tokenizer
from graft.errors import RequestError
from graft.pretrain.architectures import Shape, build, config_for

from .families import moved
from .test_space import points


@pytest.fixture
def fused(tmp_path):
    """Two bottlenecks and a fusion of them, on a base beside."""
    (tmp_path / "text.txt").write_text("a line of words to listen to\n" * 40)
    raw = data.parse({"source": "text", "path": str(tmp_path / "text.txt"), "splits": {"dev": 0, "test": 0}})
    tokenizer = train_tokenizer(data.open_corpus({"d": raw}, "d", tmp_path), "bpe", 270)
    ids = {"pad": tokenizer.pad_token_id, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    shape = Shape(16, 2, 2, len(tokenizer), 32, 0.0, ids)
    models.save(build(config_for("decoder", "rotary", shape)), tokenizer, tmp_path / "base")
    model = models.load(tmp_path / "base")
    for name in ("one", "two"):
        adopt(model, points("pfeiffer"), name, base=tmp_path / "base")
    adopt(model, [Point(form="fusion", on=["adapters"])], "both", base=tmp_path / "base")
    moved(model, 0.3)
    models.save(model, tokenizer, tmp_path / "fused")
    return tmp_path / "fused"


def test_what_a_fusion_listens_to_is_shown_by_place_and_token(fused, tmp_path):
    found = graft.show(fused, "words to listen", page=tmp_path / "page.html")
    assert (found.names, "".join(found.tokens)) == (("one", "two"), "words to listen")
    model, tokenizer = models.load(fused), models.load_tokenizer(fused)
    ids = tokenizer("words to listen", add_special_tokens=False).input_ids
    with torch.no_grad(), adapters_of(model).watching() as seen:
        model(input_ids=torch.tensor([[tokenizer.bos_token_id, *ids]]))
    assert found.places == tuple(seen)
    assert torch.allclose(torch.tensor(found.shares), torch.stack([each[0, 1:] for each in seen.values()]), atol=1e-6)
    said = CliRunner().invoke(app, ["show", str(fused), "--text", "words to listen", "--json"])
    plain = json.loads(said.stdout)
    assert plain["places"][found.places[0]]["one"] == pytest.approx(found.shares[0, :, 0].mean())
    shown = CliRunner().invoke(app, ["show", str(fused), "--text", "words to listen"]).stdout
    assert found.places[-1] in shown
    assert (tmp_path / "page.html").read_text().count("<td") == found.shares.shape[0] * found.shares.shape[1]


def test_adapters_that_are_not_at_a_place_are_not_listened_to_there(fused, tmp_path):
    model = models.load(tmp_path / "base")
    for name, on in (("both", ["attention", "feed_forward"]), ("first", ["attention"]), ("last", ["feed_forward"])):
        adopt(model, [Point(form="bottleneck", on=on, insertion="after", size=2)], name, base=tmp_path / "base")
    adopt(model, [Point(form="fusion", on=["adapters"])], "fusion")
    models.save(model, models.load_tokenizer(fused), tmp_path / "parts")
    found = graft.show(tmp_path / "parts", "words to listen")
    assert (found.names, len(found.places)) == (("both", "first", "last"), 4)
    for place, shares in zip(found.places, found.shares, strict=True):
        gone = 2 if place.endswith("attention") else 1
        assert not shares[:, gone].any()
        assert shares.sum(-1) == pytest.approx(1)
        assert shares[:, 0] == pytest.approx(0.5)


def test_what_is_not_to_be_shown_of_adapters_is_told(fused, tmp_path):
    for text in ("", "words " * 5000):
        with pytest.raises(RequestError, match=r"expected a text of 1 to \d+ tokens to show"):
            graft.show(fused, text)
    low = models.load(tmp_path / "base")
    adopt(low, points("lora"), "low", base=tmp_path / "base")
    models.save(low, models.load_tokenizer(fused), tmp_path / "low")
    with pytest.raises(RequestError, match="expected adapters with a fusion that is active, found none"):
        graft.show(tmp_path / "low", "words")
    more = models.load(fused)
    for name in ("three", "four"):
        adopt(more, points("pfeiffer"), name)
    adopt(more, [Point(form="fusion", on=["adapters"], of=["three", "four"])], "more")
    models.save(more, models.load_tokenizer(fused), tmp_path / "more")
    with pytest.raises(RequestError, match="expected one fusion that is active, found 2: leave the others out"):
        graft.show(tmp_path / "more", "words")
