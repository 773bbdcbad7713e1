"""What a text says of special tokens stays text; what a chat template writes becomes the tokens."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graft import data
from graft.data import encode as encode_room
from graft.data import render as render_room
from graft.data.encode import encode, encode_with_places
from graft.data.render import render
from graft.data.stream import tokenize

ATTACK = "a</s>b<s><pad>c<mask><extra_id_3></s>"


def content(ids, tokenizer):
    """The text of the tokens and how many of them are special."""
    return tokenizer.decode(ids), sum(int(i) in tokenizer.all_special_ids for i in ids)


@pytest.mark.parametrize(
    ("format", "record", "whole"),
    [
        ("text", {"text": ATTACK}, f"<s>{ATTACK}</s>"),
        ("completion", {"prompt": ATTACK, "completion": ATTACK}, f"<s>{ATTACK}{ATTACK}</s>"),
        ("labelled", {"text": ATTACK, "label": "</s>"}, f"<s>{ATTACK}\n</s></s>"),
    ],
)
def test_only_a_documents_own_ends_are_special(letters, format, record, whole):
    (found,) = render([record], format, letters)
    assert content(found.ids, letters) == (whole, 2)
    assert found.ids[0] == letters.bos_token_id
    assert found.ids[-1] == letters.eos_token_id


def test_places_are_those_of_the_text(letters):
    ((ids, places),) = encode_with_places([ATTACK], letters)
    assert len(ids) == len(ATTACK)
    assert places.tolist() == [[n, n + 1] for n in range(len(ATTACK))]


def test_of_a_chat_the_templates_tokens_are_special_and_those_of_the_messages_are_not(letters):
    talk = [{"role": "user", "content": ATTACK}, {"role": "assistant", "content": f"x{ATTACK}"}]
    (found,) = render([{"messages": talk}], "chat", letters)
    assert content(found.ids, letters) == (letters.apply_chat_template(talk, tokenize=False), 2)
    assert letters.decode(found.ids[found.trained]) == f"x{ATTACK}</s>\n"
    plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (found,) = render([{"messages": plain}], "chat", letters)
    assert found.ids.tolist() == letters.apply_chat_template(plain, tokenize=True, return_dict=False)


def test_a_template_that_takes_tokens_out_of_a_message_finds_them(letters):
    """As templates do that keep reasoning apart: what they look for is theirs."""
    tokenizer = deepcopy(letters)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'].split('<mask>')[-1] + eos_token }}{% endfor %}"
    talk = [{"role": "user", "content": "q<pad>"}, {"role": "assistant", "content": "why<mask>r"}]
    (found,) = render([{"messages": talk}], "chat", tokenizer)
    assert tokenizer.decode(found.ids) == "q<pad></s>r</s>"
    assert found.ids.tolist().count(tokenizer.eos_token_id) == 2


def foreign(model, **more):
    made = Tokenizer(model)
    made.normalizer = more.get("normalizer")
    made.pre_tokenizer = more.get("cut")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="</s>", mask_token=AddedToken("<mask>", lstrip=True)
    )


LETTERS = ["a", "b", "<", "/", "s", ">", "m", "k", " "]
SPECIAL = ["<unk>", "</s>", "<mask>"]
NUMBERS = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}


@pytest.mark.parametrize(
    ("tokenizer", "read"),
    [
        # the best reading of the text by score, or a piece of it as it is cut, would be the special token
        (
            foreign(models.Unigram([*((t, 0.0) for t in SPECIAL), *((t, -3.0) for t in LETTERS)], unk_id=0)),
            "a</s> <mask>",
        ),
        (foreign(models.WordLevel(NUMBERS, unk_token="<unk>"), cut=pre_tokenizers.WhitespaceSplit()), "<unk><unk>"),
        (foreign(models.BPE(NUMBERS, [], unk_token="<unk>"), normalizer=normalizers.Lowercase()), "a</s> <mask>"),
    ],
    ids=["unigram", "words", "pairs"],
)
def test_tokenizers_of_other_makes_write_no_special_token_either(tokenizer, read):
    text = "a</s> <mask>"
    ids, plain = encode([text], tokenizer)[0], tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    special = {tokenizer.eos_token_id, tokenizer.mask_token_id}
    assert special < set(plain)
    assert not special & set(ids)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == read


def test_merges_that_lead_to_a_special_token_are_not_taken():
    numbers = {token: number for number, token in enumerate(["</s>", "<", "/", "s", ">", "</", "s>"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(numbers, merges)), eos_token="</s>")
    assert [tokenizer.convert_ids_to_tokens(i) for i in encode(["</s>"], tokenizer)[0]] == ["</", "s>"]


def test_streams_that_were_made_otherwise_are_not_taken(letters, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(ATTACK)
    raw = {"source": "text", "train": "a.txt", "splits": {"dev": 0, "test": 0}}
    corpus = data.open_corpus({"s": data.parse(raw)}, "s", tmp_path)
    monkeypatch.setattr(render_room, "VERSION", 3)
    with monkeypatch.context() as before:
        before.setattr(encode_room, "sealed", lambda tokenizer: SimpleNamespace(backend=tokenizer.backend_tokenizer))
        old = tokenize(corpus, "train", letters, tmp_path / "cache")
    monkeypatch.undo()
    new = tokenize(corpus, "train", letters, tmp_path / "cache")
    assert (old.ids == letters.eos_token_id).sum() == 3
    assert (new.ids == letters.eos_token_id).sum() == 1


def test_tokens_added_later_are_known(letters):
    tokenizer = deepcopy(letters)
    before = encode(["a<new>"], tokenizer)[0]
    tokenizer.add_tokens(["<new>"])
    assert len(encode(["a<new>"], tokenizer)[0]) == 2
    tokenizer.add_special_tokens({"cls_token": "<cls>"})
    assert encode(["<cls>"], tokenizer)[0] != [tokenizer.cls_token_id]
    assert len(before) == 6
