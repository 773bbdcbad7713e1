"""A new model's tokenizer puts around a text, by itself, what training put there; graft never puts it twice."""

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizers import models as kinds
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config
from transformers import T5ForConditionalGeneration as T5

from graft import data, models
from graft.chatting import Talk
from graft.data.alone import AnswerRows
from graft.data.render import render
from graft.data.stream import tokenize
from graft.data.tokenizers import put_ends, train_tokenizer
from graft.ensemble.byte_level.spelling import spelling_of
from graft.ensemble.model import ensemble_of
from graft.ensemble.union import union_of
from graft.evaluate.limits import puts_start
from graft.evaluate.scorer import Scorer

RAW = {"source": "python-library", "packages": ["json", "html"]}
CHAT = [{"role": "user", "content": "what is it?"}]


@pytest.fixture(scope="module")
def corpus():
    return data.open_corpus({"c": data.parse(RAW)}, "c", Path())


def made(corpus, architecture=None, algorithm="bpe"):
    tokenizer = train_tokenizer(corpus, algorithm, 600, sentinels=algorithm == "unigram")
    if architecture is not None:
        put_ends(tokenizer, architecture)
    return tokenizer


def small(tokens, kind="decoder"):
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": tokens}
    if kind == "encoder-decoder":
        return T5(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, **ids))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=256, **size, **ids))


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    """The same model with a tokenizer as they were made once, and as they are made now."""
    root = tmp_path_factory.mktemp("ends")
    for name, architecture in (("old", None), ("new", "decoder")):
        tokenizer = made(corpus, architecture)
        models.save(small(len(tokenizer)), tokenizer, root / name)
    return root / "old", root / "new"


@pytest.mark.parametrize(
    ("architecture", "algorithm"), [("decoder", "bpe"), ("decoder", "unigram"), ("encoder", "wordpiece")]
)
def test_anyone_who_loads_the_tokenizer_gets_the_ids_of_training(corpus, tmp_path, architecture, algorithm):
    tokenizer = made(corpus, architecture, algorithm)
    models.save(small(len(tokenizer)), tokenizer, tmp_path / "model")
    stranger = AutoTokenizer.from_pretrained(tmp_path / "model")
    stream = tokenize(corpus, "train", models.load_tokenizer(tmp_path / "model"), tmp_path / "cache")
    text = next(iter(corpus.records("train")))["text"].replace("</s>", "")
    trained = next(render([{"text": text}], "text", tokenizer)).ids.tolist()
    assert stranger(text)["input_ids"] == (trained[:-1] if architecture == "decoder" else trained)
    assert [stream.document(0)[0][0], stream.document(0)[0][-1]] == [1, 2]


def test_what_an_encoder_reads_for_a_decoder_ends_as_in_training(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"source": "a question", "target": "an answer"}\n' * 2)
    raw = {"source": "jsonl", "path": str(tmp_path / "p.jsonl"), "splits": {"dev": 0, "test": 0}}
    pairs = data.open_corpus({"p": data.parse(raw)}, "p", tmp_path)
    tokenizer = made(data.open_corpus({"c": data.parse(RAW)}, "c", Path()), "encoder-decoder", "unigram")
    stream = tokenize(pairs, "train", tokenizer, tmp_path / "cache")
    row = AnswerRows(stream, 64, 0, False, tokenizer.bos_token_id, tokenizer.eos_token_id)[0]
    assert tokenizer("a question\n")["input_ids"] == row["input_ids"].tolist()
    assert tokenizer("an answer")["input_ids"] == row["labels"].tolist()


def test_a_tokenizer_that_does_so_already_stays_as_it_is(corpus):
    tokenizer = made(corpus, "decoder")
    before = tokenizer.backend_tokenizer.to_str()
    put_ends(tokenizer, "decoder")
    assert tokenizer.backend_tokenizer.to_str() == before


def test_one_whose_end_is_its_start_begins_with_it_and_keeps_its_offsets(corpus):
    inner = made(corpus).backend_tokenizer
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="</s>", eos_token="</s>")
    plain = tokenizer("a text", return_offsets_mapping=True)
    put_ends(tokenizer, "decoder")
    put = tokenizer("a text", return_offsets_mapping=True)
    assert put["input_ids"] == [2, *plain["input_ids"]]
    assert put["offset_mapping"][1:] == plain["offset_mapping"]


def test_a_tokenizer_without_special_tokens_puts_nothing():
    inner = Tokenizer(kinds.BPE(vocab={"a": 0}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    put_ends(tokenizer, "encoder")
    assert tokenizer("a")["input_ids"] == [0]


def test_scores_do_not_depend_on_who_puts_the_start_token(folders):
    old, new = (Scorer(models.load(folder), models.load_tokenizer(folder)) for folder in folders)
    texts, asked = ["def f(x):\n    return x", "", "once"], [("a context", " goes on"), ("", "alone")]
    for one, other in zip(old.documents(texts), new.documents(texts), strict=True):
        assert one.log_probs.tolist() == other.log_probs.tolist()
    assert old.loglikelihoods(asked, start=True) == new.loglikelihoods(asked, start=True) == new.loglikelihoods(asked)
    assert old.generate(["def f"], max_tokens=8, start=True) == new.generate(["def f"], max_tokens=8)
    assert (puts_start(old.tokenizer), puts_start(new.tokenizer)) == (False, True)


def test_chats_begin_as_the_template_writes_them(folders):
    old, new = (Talk(folder) for folder in folders)
    for talk in (old, new):
        talk.messages = CHAT
    assert old._ids() == new._ids() != []
    assert new._ids()[0] != new.tokenizer.bos_token_id
    written = [next(render([{"messages": CHAT}], "chat", talk.tokenizer)).ids.tolist() for talk in (old, new)]
    assert written[0] == written[1]


def test_without_a_template_a_conversation_begins_as_a_document(folders, tmp_path):
    for place in folders:
        shutil.copytree(place, tmp_path / place.name)
        (tmp_path / place.name / "chat_template.jinja").unlink()
    old, new = (Talk(tmp_path / place.name) for place in folders)
    old.messages = new.messages = CHAT
    assert new._ids() == [new.tokenizer.bos_token_id, *old._ids()]


def test_a_chat_that_an_encoder_reads_ends_as_in_training(corpus, tmp_path):
    tokenizer = made(corpus, "encoder-decoder")
    models.save(small(len(tokenizer), "encoder-decoder"), tokenizer, tmp_path / "t5")
    talk = Talk(tmp_path / "t5")
    talk.messages = CHAT
    assert talk._ids()[-1] == tokenizer.eos_token_id
    assert talk._ids()[:-1] == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)


def test_ensembles_read_bytes_and_unions_as_before(folders):
    old, new = (models.load_tokenizer(folder) for folder in folders)
    one, other = (spelling_of(tokenizer, name="m") for tokenizer in (old, new))
    assert (one.first, one.later, one.ends, one.start) == (other.first, other.later, other.ends, other.start)
    unions = [union_of([first, second]) for first, second in ((old, old), (old, new), (new, new))]
    assert all(each.tokens == unions[0].tokens for each in unions)
    assert all(each.sides[1].reads == unions[0].sides[1].reads for each in unions)
    ids = torch.tensor([list(b"def main")])
    members = {"a": models.load(folders[0]), "b": models.load(folders[1])}
    assert torch.equal(
        *(ensemble_of(members, tokenizers=two)(input_ids=ids).logits for two in ((old,) * 2, (new,) * 2))
    )
