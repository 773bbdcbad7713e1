"""States behind prompts that compiled functions go through, against those that are followed byte by byte."""

import pytest
import torch
from test_byte_known import home
from tiny_bytes import LEFT, RIGHT, member, pair
from tiny_members import gpt2, mixed

from graft.ensemble.byte_level import prompts
from graft.ensemble.byte_level.byte_model import ByteModel, Cover
from graft.ensemble.byte_level.forest import Forest
from graft.ensemble.byte_level.tokenizer import PAD

__all__ = ["home"]

TEXTS = [b"abcabcacb" * 4, b"a", b"bcab" * 7, b"cabca" * 5, b"bacbacabc" * 3, b"abccba" * 4]
SOME = Cover()


@pytest.fixture(autouse=True)
def long(monkeypatch):
    """Texts of few bytes count as long."""
    monkeypatch.setattr(prompts, "LONG", 20)


def unseen(*_):
    """Notes nothing."""


def behind(reader, forest, state, data):
    """What comes next behind each byte, and the state at the end."""
    found = []
    for byte in data:
        (state,) = reader.advance(forest, [state], [byte])
        found.append(torch.from_numpy(state.next))
    return torch.stack(found), state


@pytest.mark.parametrize(
    "cover",
    [SOME, Cover(drop=0.0, join=0.0, most=2), Cover(drop=0.2, join=0.1), Cover(drop=0.4, join=0.0)],
    ids=str,
)
@pytest.mark.parametrize(
    "make", [lambda: member(1, LEFT, 2), lambda: member(6, LEFT), lambda: gpt2(3), lambda: mixed(gpt2(3))]
)
def test_a_state_is_the_one_that_following_gives_and_goes_on_as_it_does(cover, make):
    reader = ByteModel(make(), LEFT, cover)
    forest, other = Forest(reader.reader), Forest(reader.reader, len(TEXTS))
    found = prompts.reached(reader, forest, TEXTS)
    begun = reader.begin(other, range(len(TEXTS)))
    wanted = reader.follow(other, begun, [text[:-1] for text in TEXTS], [unseen] * len(TEXTS))
    assert [state is None for state in found] == [len(text) < prompts.LONG for text in TEXTS]
    for text, own, state in zip(TEXTS, found, wanted, strict=True):
        if own is None:
            continue
        assert own.log == pytest.approx(state.log, abs=1e-3)
        assert torch.from_numpy(own.next) == pytest.approx(torch.from_numpy(state.next), abs=1e-5)
        rest = text[-1:] + b"cabbacabcaabcbca"
        (own_nexts, own_end), (nexts, end) = behind(reader, forest, own, rest), behind(reader, other, state, rest)
        assert own_nexts == pytest.approx(nexts, abs=1e-5)
        assert own_end.lost == pytest.approx(end.lost, abs=1e-3)


def test_what_cannot_be_taken_over_is_followed():
    for limit, words in ((12, LEFT), (None, RIGHT)):
        cover = SOME if limit else Cover("canonical")
        reader = ByteModel(member(1, words), words, cover, limit=limit)
        assert prompts.reached(reader, Forest(reader.reader), TEXTS) == [None] * len(TEXTS)
    reader = ByteModel(member(1, LEFT), LEFT, SOME)
    unwritten = b"abc" * 5 + b"x" + b"abc" * 5
    assert prompts.reached(reader, Forest(reader.reader), [unwritten]) == [None]


@torch.no_grad()
def test_prompts_of_which_only_the_end_is_asked_are_read_and_decoded_alike():
    model = pair(SOME)
    longest = max(map(len, TEXTS))
    ids = torch.tensor([[PAD] * (longest - len(text)) + list(text) for text in TEXTS])
    mask = (ids != PAD).long()
    whole = model(input_ids=ids, attention_mask=mask).logits[:, -1:]
    last = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits
    assert torch.allclose(last.exp(), whole.exp(), atol=1e-5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    made = model.generate(ids, attention_mask=mask, **options)
    alone = [model.generate(torch.tensor([list(text)]), **options)[0, -12:] for text in TEXTS]
    assert torch.equal(made[:, -12:], torch.stack(alone))
