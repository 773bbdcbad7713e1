"""A conversation goes on when more was said than the model reads: the oldest is left out, and one line says so."""

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft import data, models
from graft.chatting import Talk
from graft.data.tokenizers import train_tokenizer
from graft.errors import RequestError

CONTEXT = 128
TALE = "once there was a value that nobody had read. " * 60


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model with a chat template and without."""
    root = tmp_path_factory.mktemp("chat")
    raw = data.parse({"source": "python-library", "packages": ["json"], "splits": {"dev": 0, "test": 0}})
    tokenizer = train_tokenizer(data.open_corpus({"c": raw}, "c", root / "corpus"), "bpe", 400)
    tokenizer.model_max_length = CONTEXT
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, max_position_embeddings=CONTEXT, **size))
    models.save(model, tokenizer, root / "templated")
    tokenizer.chat_template = None
    models.save(model, tokenizer, root / "plain")
    return root


@pytest.fixture
def told(monkeypatch, capsys, caplog):
    """Gives what was said on stderr so far; there are no warnings of transformers."""
    monkeypatch.delenv("GRAFT_QUIET", raising=False)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    yield lambda: capsys.readouterr().err.splitlines()
    assert not [record.message for record in caplog.get_records("call") if record.levelno >= logging.WARNING]


def heard(talk, said, max_tokens):
    """(ids that the model is given, tokens that it may answer)."""
    found, real = {}, type(talk.model).generate
    talk.model.generate = lambda **given: [found.update(given), real(talk.model, **given)][1]
    list(talk.reply(said, max_tokens=max_tokens))
    return found["input_ids"][0].tolist(), found["max_new_tokens"]


def test_what_fits_is_read_whole_and_the_answer_ends_with_the_context(folders, told):
    talk = Talk(folders / "plain")
    ids = talk.tokenizer("def f(x):")["input_ids"]
    assert heard(talk, "def f(x):", 16) == (ids, 16)
    assert heard(talk, "def f(x):", 1000) == (ids, CONTEXT - len(ids))
    assert told() == []


@pytest.mark.parametrize(("max_tokens", "room"), [(16, CONTEXT - 16), (1000, CONTEXT // 2)])
def test_of_a_text_that_is_too_long_the_end_is_gone_on_from(folders, told, max_tokens, room):
    talk = Talk(folders / "plain")
    ids = talk.tokenizer(TALE, verbose=False)["input_ids"]
    given, most = heard(talk, TALE, max_tokens)
    assert len(given) == room
    assert given[1:] == ids[1 - room :]
    assert most == CONTEXT - room
    (line,) = told()
    assert line.startswith(f"what was said is {len(ids)} tokens long, and the model reads {CONTEXT}, ")
    assert line.endswith(f"the oldest {len(ids) - room} are left out")


def test_a_start_token_stays(folders, told):
    from tokenizers.processors import TemplateProcessing

    talk = Talk(folders / "plain")
    start = (talk.tokenizer.bos_token, talk.tokenizer.bos_token_id)
    put = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    talk.tokenizer.backend_tokenizer.post_processor = put
    given, _ = heard(talk, TALE, 16)
    assert given[0] == start[1]
    assert given[1:] == talk.tokenizer(TALE, verbose=False)["input_ids"][-(CONTEXT - 17) :]
    told()


def test_of_a_long_conversation_the_oldest_messages_are_left_out(folders, told):
    talk = Talk(folders / "templated", system="be short")
    for turn in range(12):
        given, _ = heard(talk, f"what is value {turn}?", 16)
        assert len(given) <= CONTEXT - 16
    roles = [message["role"] for message in talk.messages]
    assert roles[:2] == ["system", "user"]
    assert len(roles) < 25
    assert talk.messages[-2]["content"] == "what is value 11?"
    assert "the oldest" in told()[-1]


def test_of_one_message_that_is_too_long_the_beginning_is_left_out(folders, told):
    talk = Talk(folders / "templated", system="be short")
    given, _ = heard(talk, TALE, 16)
    assert CONTEXT - 32 < len(given) <= CONTEXT - 16
    assert talk.messages[0]["content"] == "be short"
    assert talk.messages[1]["content"]
    assert TALE.endswith(talk.messages[1]["content"])
    assert len(told()) == 1


def test_a_system_message_that_leaves_no_room_is_refused(folders):
    talk = Talk(folders / "templated", system=TALE)
    with pytest.raises(RequestError, match=f"the model reads {CONTEXT}, .* expected a shorter system message"):
        list(talk.reply("hello", max_tokens=16))
