"""Embeddings matched by token string, against rows looked up one by one in mappings."""

import json

import numpy as np
import pytest
import torch
from small_family import CONFIG, merge, model, save, tensors, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from graft.errors import CannotCombine
from graft.facts import facts_of
from graft.merge.vocabulary import EXTRA, union_tokenizer
from graft.models import load, load_tokenizer

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


pytestmark = pytest.mark.usefixtures("many_pieces")
PIECE = 100


def spoken(words):
    """A tokenizer in which token i is `words[i]`."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=words[0])


def speaking(made, folder, words):
    """`made` saved with a tokenizer of these words; where they are more or fewer than its rows, so be it."""
    save(made, folder)
    spoken(words).save_pretrained(folder)
    return folder


WORDS = [f"w{i}" for i in range(48)]
MIXED = [WORDS[0], *np.random.default_rng(0).permutation(WORDS[1:])]


def permuted(made, words):
    """The same model, its rows in the order of `words`."""
    order = [WORDS.index(word) for word in words]
    other = model(0, tie_word_embeddings=made.config.tie_word_embeddings)
    state = {n: t[order] if n in (EMBED, HEAD) else t for n, t in made.state_dict().items()}
    other.load_state_dict(state)
    return other


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    base = model(0, tie_word_embeddings=request.param)
    own = {n: model(i, near=base, tie_word_embeddings=request.param) for i, n in enumerate("ab", 1)} | {"base": base}
    made = {n: speaking(m, root / n, WORDS) for n, m in own.items()}
    return made | {f"{n} mixed": speaking(permuted(m, MIXED), root / f"{n}-mixed", MIXED) for n, m in own.items()}


METHODS = {
    "linear": {"models": {"a": 1, "b": 3}},
    "slerp": {"models": ["a", "b"]},
    "ties": {"base": "base", "models": ["a", "b"], "density": 0.5},
    "dare_linear": {"base": "base", "models": ["a", "b"]},
    "karcher": {"models": ["a", "b"]},
    "model_stock": {"base": "base", "models": ["a", "b"]},
    "della": {"base": "base", "models": ["a", "b"], "density": 0.5},
}


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "base") for name in METHODS), ("linear", "union"), ("ties", "union")]
)
def test_models_with_permuted_vocabularies_merge_to_what_they_are_without(name, how, folders, tmp_path):
    settings = {"method": name} | METHODS[name]
    wanted, _ = merge(settings, folders, tmp_path / "wanted", seed=2)
    mixed = folders | {"b": folders["b mixed"]}
    out, found = merge(settings | {"vocabulary": how}, mixed, tmp_path / "out", seed=2)
    assert out.keys() == wanted.keys()
    assert all(torch.equal(out[n], wanted[n]) for n in out)
    assert load_tokenizer(tmp_path / "out").get_vocab() == spoken(WORDS).get_vocab()
    assert found["notes"]["vocabulary"]["new_tokens"] == 0
    assert set(found["notes"]["vocabulary"]["lacking"].values()) == {0}


def test_the_vocabulary_is_that_of_the_first_parent(folders, tmp_path):
    mixed = folders | {"a": folders["a mixed"]}
    out, _ = merge({"method": "linear", "models": ["a", "b"], "vocabulary": "base"}, mixed, tmp_path / "out")
    wanted, _ = merge({"method": "linear", "models": ["a", "b"]}, folders, tmp_path / "wanted")
    order = [WORDS.index(word) for word in MIXED]
    torch.testing.assert_close(out[EMBED], wanted[EMBED][order])
    assert load_tokenizer(tmp_path / "out").get_vocab() == spoken(MIXED).get_vocab()


def rows(folder, words, name=EMBED):
    return dict(zip(words, tensors(folder)[name], strict=False))


def twin(words, first, others, weights, base=None):
    """Rows of the output by token, one at a time. `first` and `others`: token → row of each model, in order."""
    everyone = [first, *others]
    made = []
    for word in words:
        having = [m[word] for m in ([base] if base is not None else []) + everyone if word in m]
        stand_in = base[word] if base is not None and word in base else sum(having) / len(having)
        own = [m.get(word, stand_in) for m in everyone]
        if base is None:
            made.append(sum(w * r for w, r in zip(weights, own, strict=True)) / sum(weights))
        else:
            start = base.get(word, stand_in)
            made.append(start + sum(w * (r - start) for w, r in zip(weights, own, strict=True)))
    return torch.stack(made)


A_WORDS = WORDS[:40]
B_WORDS = [*WORDS[5:40][::-1], "new0", "w0", *WORDS[1:5], *WORDS[40:46]]
C_WORDS = ["w0", "new0", "new1", *WORDS[1:41]]


@pytest.fixture(scope="module")
def different(tmp_path_factory):
    root = tmp_path_factory.mktemp("different")
    wide = {
        n: model(i, vocab_size=len(words))
        for i, (n, words) in enumerate(zip("abc", (A_WORDS, B_WORDS, C_WORDS), strict=True))
    }
    for made in wide.values():
        rest = {n: t for n, t in model(0).state_dict().items() if n not in (EMBED, HEAD)}
        made.load_state_dict(rest, strict=False)
    return {
        n: speaking(made, root / n, words)
        for (n, made), words in zip(wide.items(), (A_WORDS, B_WORDS, C_WORDS), strict=True)
    }


def test_a_union_has_all_tokens_and_those_a_model_lacks_are_the_others_mean(different, tmp_path):
    settings = {"method": "linear", "models": {"a": 1, "b": 2, "c": 3}, "vocabulary": "union"}
    out, found = merge(settings, different, tmp_path / "out")
    words = [*A_WORDS, *(w for w in B_WORDS if w not in A_WORDS), "new1"]
    for name in (EMBED, HEAD):
        own = [rows(different[n], w, name) for n, w in zip("abc", (A_WORDS, B_WORDS, C_WORDS), strict=True)]
        torch.testing.assert_close(out[name], twin(words, own[0], own[1:], [1, 2, 3]), **CLOSE)
    vocabulary = load_tokenizer(tmp_path / "out").get_vocab()
    assert vocabulary == {word: i for i, word in enumerate(words)}
    assert load_tokenizer(tmp_path / "out")("w3 new1 w45").input_ids == [3, words.index("new1"), words.index("w45")]
    merged = load(tmp_path / "out")
    assert merged.config.vocab_size == len(words)
    notes = found["notes"]["vocabulary"]
    assert notes["new_tokens"] == len(words) - 40
    assert notes["lacking"]["a"] == len(words) - 40
    assert facts_of(tmp_path / "out").vocabulary != facts_of(different["a"]).vocabulary


@pytest.mark.parametrize("own", [[], ["<own>"]])
@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
def test_special_tokens_that_another_model_brings_stay_special(tmp_path, own, key):
    parents = {}
    for name, extra in (("a", own), ("b", ["<tool>"])):
        made = spoken([*A_WORDS, *extra])
        made.add_special_tokens({"extra_special_tokens": extra})
        parents[name] = save(model(len(parents), vocab_size=40 + len(extra)), tmp_path / name)
        made.save_pretrained(parents[name])
        path = parents[name] / "tokenizer_config.json"
        path.write_text(path.read_text().replace("extra_special_tokens", key))
    merge({"method": "linear", "models": ["a", "b"], "vocabulary": "union", "anyway": True}, parents, tmp_path / "out")
    made = load_tokenizer(tmp_path / "out")
    assert {"<tool>", *own} <= set(made.all_special_tokens)
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert [token for name in EXTRA for token in said.get(name) or ()] == [*own, "<tool>"]
    assert made.decode(made(f"w3 <tool> {' '.join(own)} w4").input_ids, skip_special_tokens=True) == "w3 w4"


def test_task_vectors_of_a_token_that_only_some_have(different, tmp_path):
    settings = {"method": "task_arithmetic", "base": "a", "models": {"b": 0.5, "c": 0.25}, "vocabulary": "union"}
    out, _ = merge(settings, different, tmp_path / "out")
    words = [*A_WORDS, *(w for w in B_WORDS if w not in A_WORDS), "new1"]
    a, b, c = (rows(different[n], w) for n, w in zip("abc", (A_WORDS, B_WORDS, C_WORDS), strict=True))
    torch.testing.assert_close(out[EMBED], twin(words, b, [c], [0.5, 0.25], base=a), **CLOSE)
    # what one model alone has is taken over as it is
    torch.testing.assert_close(out[EMBED][words.index("new1")], c["new1"], **CLOSE)


def test_the_bases_tokens_alone(different, tmp_path):
    settings = {"method": "linear", "models": {"c": 1, "b": 1}, "vocabulary": "base"}
    out, _ = merge(settings, different, tmp_path / "out")
    c, b = rows(different["c"], C_WORDS), rows(different["b"], B_WORDS)
    torch.testing.assert_close(out[EMBED], twin(C_WORDS, c, [b], [1, 1]), **CLOSE)
    assert load_tokenizer(tmp_path / "out").get_vocab() == spoken(C_WORDS).get_vocab()


def test_rows_behind_the_last_token_stay_those_of_the_first_parent(different, tmp_path):
    padded = speaking(model(7, near=None, vocab_size=60), tmp_path / "padded", A_WORDS)
    here = different | {"padded": padded}
    settings = {"method": "linear", "models": ["padded", "a"], "anyway": True}
    out, _ = merge(settings | {"vocabulary": "base"}, here, tmp_path / "out")
    assert torch.equal(out[EMBED][40:], tensors(padded)[EMBED][40:])
    settings["models"] = ["padded", "c"]
    out, _ = merge(settings | {"vocabulary": "union"}, here, tmp_path / "union")
    vocabulary = load_tokenizer(tmp_path / "union").get_vocab()
    assert (len(out[EMBED]), len(vocabulary)) == (60, 43)
    torch.testing.assert_close(out[EMBED][vocabulary["new1"]], rows(different["c"], C_WORDS)["new1"])


def test_entries_that_stand_in_a_row_are_matched_too(tmp_path):
    """BART has a bias [1, tokens] beside its matrices."""
    config = BartConfig(
        vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    made = BartForConditionalGeneration(config)
    made.final_logits_bias = torch.randn(1, 48)
    a = speaking(made, tmp_path / "a", WORDS)
    held = dict(tensors(a))
    order = [WORDS.index(word) for word in MIXED]
    b = speaking(made, tmp_path / "b", MIXED)
    from safetensors.torch import save_file

    bias = "final_logits_bias"
    turned = {n: t[:, order] if n == bias else t[order] if t.shape[0] == 48 else t for n, t in held.items()}
    save_file({n: t.contiguous() for n, t in turned.items()}, b / "model.safetensors", metadata={"format": "pt"})
    out, _ = merge({"method": "linear", "models": ["a", "b"], "vocabulary": "base"}, {"a": a, "b": b}, tmp_path / "out")
    assert all(torch.equal(out[n], held[n]) for n in out)
    assert bias in out


def test_without_being_asked_nothing_is_matched(folders, tmp_path):
    mixed = folders | {"b": folders["b mixed"]}
    with pytest.raises(CannotCombine, match=r"different vocabularies.*`vocabulary: union` \(or base\) matches them"):
        merge({"method": "linear", "models": ["a", "b"]}, mixed, tmp_path / "out")


def test_a_model_without_a_tokenizer_is_refused(folders, tmp_path):
    bare = save(model(1), tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CannotCombine, match=r"bare: its tokens are not known without tokenizer.json"):
        settings = {"method": "linear", "models": ["a", "bare"], "vocabulary": "base", "anyway": True}
        merge(settings, folders | {"bare": bare}, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def trained(text, size, special=()):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), show_progress=False)
    )
    return json.loads(made.to_str())


def test_the_union_of_two_byte_pair_tokenizers_reads_what_either_reads():
    first = trained("the cat sat on the mat and the rat " * 20, 60, ["<s>"])
    second = trained("zebra quiz fizz buzz the jazz zebra quiz " * 20, 60, ["<s>", "<extra>"])
    own, other = (Tokenizer.from_str(json.dumps(raw)) for raw in (first, second))
    order = [""] * own.get_vocab_size()
    for token, place in own.get_vocab().items():
        order[place] = token
    new = [t for t, _ in sorted(other.get_vocab().items(), key=lambda item: item[1]) if t not in own.get_vocab()]
    both = Tokenizer.from_str(json.dumps(union_tokenizer({"a": first, "b": second}, "a", order + new, new)))
    assert both.get_vocab() == {token: place for place, token in enumerate(order + new)}
    for text in ("the cat sat", "zebra quiz"):
        read = both.encode(text)
        assert "".join(read.tokens) == text.replace(" ", "Ġ")
    assert len(both.encode("zebra quiz").ids) <= len(other.encode("zebra quiz").ids)
    assert both.encode("<extra>").ids == [(order + new).index("<extra>")]


def test_special_tokens_behind_the_vocabulary_keep_their_places():
    first = trained("the cat sat on the mat " * 20, 50)
    second = trained("zebra quiz fizz buzz " * 20, 50)
    own = Tokenizer.from_str(json.dumps(first))
    own.add_special_tokens(["<end>"])
    first = json.loads(own.to_str())
    order = [t for t, _ in sorted(own.get_vocab().items(), key=lambda item: item[1])]
    new = [t for t in second["model"]["vocab"] if t not in order]
    both = Tokenizer.from_str(json.dumps(union_tokenizer({"a": first, "b": second}, "a", order + new, new)))
    assert both.token_to_id("<end>") == order.index("<end>")
    assert both.encode("the<end>").tokens[-1] == "<end>"
    assert both.get_vocab() == {token: place for place, token in enumerate(order + new)}


def test_tokens_of_another_kind_of_tokenizer_are_matched_as_they_are_spelt():
    first = json.loads(tokenizer(5).backend_tokenizer.to_str())
    second = trained("zebra quiz " * 20, 40)
    order, new = [f"w{i}" for i in range(5)], [t for t in second["model"]["vocab"] if len(t) > 2]
    both = Tokenizer.from_str(json.dumps(union_tokenizer({"a": first, "b": second}, "a", order + new, new)))
    assert {both.token_to_id(token) for token in new} == set(range(5, 5 + len(new)))


def test_the_configuration_of_the_test_family_is_what_these_tests_think():
    assert CONFIG["vocab_size"] == len(WORDS)
