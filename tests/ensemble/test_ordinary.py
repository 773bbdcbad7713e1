"""An ensemble is an ordinary `transformers` model: in pipelines, in trainings, with every kind of member and output."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest
import torch
from test_classification import bert
from test_ensemble_folder import letters
from test_gate import gated, some_gate
from test_outputs import GIVEN, ids_and_mask, texts, writers
from test_seq2seq import bart, source, t5
from test_union import MEMBERS, RIGHT, UNION, by_hand
from tiny_members import gpt2, greedy, llama, prompts, qwen, sharp
from transformers import (
    AutoConfig,
    MambaConfig,
    MambaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import graft.ensemble.model as made
from graft.data.rows import ListRows
from graft.ensemble.model import EnsembleForCausalLM, ensemble_of
from graft.errors import RequestError
from graft.settings import parse
from graft.train.loop import train
from graft.train.losses import TokenLoss
from graft.train.settings import TrainSettings


def rows(count=16, length=10):
    torch.manual_seed(2)
    return torch.randint(3, len(letters()), (count, length))


def trainer(model, tmp_path, labelled=None, **settings):
    own = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 0.05, **settings}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    data = labelled or [{"input_ids": row, "labels": row} for row in rows()]
    return Trainer(model=model, args=TrainingArguments(str(tmp_path), **own, **quiet), train_dataset=data)


def test_a_pipeline_writes_with_it():
    tokenizer = letters()
    model = ensemble_of({"a": llama(1, tokens=len(tokenizer)), "b": llama(2, tokens=len(tokenizer))})
    writes = pipeline("text-generation", model=model, tokenizer=tokenizer)
    given = {"max_new_tokens": 5, "do_sample": False}
    found = writes(["ab", "c"], return_full_text=False, batch_size=2, **given)
    for text, (answer,) in zip(["ab", "c"], found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = tokenizer.decode(model.generate(ids, **given)[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer["generated_text"].strip() == expected.strip()


@pytest.fixture(scope="module")
def duo(tmp_path_factory):
    """The folder of an ensemble with its tokenizer."""
    place, tokenizer = tmp_path_factory.mktemp("duo"), letters()
    members = {"a": llama(1, tokens=len(tokenizer)), "b": llama(2, tokens=len(tokenizer))}
    ensemble_of(members, [0.6, 0.4]).save_pretrained(place, self_contained=True)
    tokenizer.save_pretrained(place)
    return place


def test_a_server_that_holds_an_earlier_transformers_finds_the_classes(monkeypatch):
    """Loading a processor puts a new package in the place of the one that the server has imported before."""
    earlier, server = ModuleType("transformers"), ModuleType("server")
    server.transformers = earlier
    monkeypatch.setitem(sys.modules, "server", server)
    made.name_classes()
    assert earlier.EnsembleForCausalLM is EnsembleForCausalLM
    assert sys.modules["transformers"].EnsembleForCausalLM is EnsembleForCausalLM


@pytest.mark.parametrize("device", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")])
def test_it_is_loaded_as_servers_and_pipelines_load_models(duo, device):
    """By the class that the configuration names, where `transformers serve` looks for it, onto a device."""
    named = AutoConfig.from_pretrained(duo).architectures[0]
    given = {"revision": "main", "attn_implementation": None, "dtype": "auto", "trust_remote_code": False}
    # Mamba, which is imported here, makes transformers load itself anew
    served = getattr(made.transformers, named).from_pretrained(duo, device_map=device, **given)
    expected = torch.accelerator.current_accelerator() if device == "auto" else None
    assert served.device.type == (expected or torch.device("cpu")).type
    ids = letters()("ab", return_tensors="pt")["input_ids"].to(served.device)
    plain = EnsembleForCausalLM.from_pretrained(duo).to(served.device)
    assert torch.equal(served(input_ids=ids).logits, plain(input_ids=ids).logits)
    writes = pipeline("text-generation", model=str(duo), device_map=device)
    (found,) = writes("ab", max_new_tokens=4, do_sample=False, return_full_text=False)
    answer = plain.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert found["generated_text"].strip() == letters().decode(answer, skip_special_tokens=True).strip()


class EndsWith(StoppingCriteria):
    """Stops a text that holds so many of a token, row by row."""

    def __init__(self, token, count):
        self.token, self.count = token, count

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids == self.token).sum(-1) >= self.count


def test_it_streams_from_a_thread_until_it_is_told_to_stop(duo):
    model, tokenizer = EnsembleForCausalLM.from_pretrained(duo), letters()
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    given = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(3)
    whole = model.generate(ids, do_sample=True, **given)[0]
    token = int(whole[ids.shape[1] + 9])
    count = int((whole[: ids.shape[1] + 10] == token).sum())
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    stops = StoppingCriteriaList([EndsWith(token, count)])
    asked = {"do_sample": True, "streamer": streamer, "stopping_criteria": stops, **given}
    torch.manual_seed(3)
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs=asked)
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = whole[ids.shape[1] : ids.shape[1] + 10]
    # spaces are put between pieces as they come
    assert "".join(pieces).split() == tokenizer.decode(expected).split()
    assert len([piece for piece in pieces if piece]) > 1


def test_batches_are_written_from_several_threads_at_the_same_time(duo):
    model = EnsembleForCausalLM.from_pretrained(duo)
    batches = [prompts(3, 7, (seed % 3, 1, 0)) for seed in range(4)]
    batches = [((ids + seed) % 30 * mask, mask) for seed, (ids, mask) in enumerate(batches)]
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    stops = StoppingCriteriaList([EndsWith(5, 1)])

    def write(batch):
        return model.generate(batch[0], attention_mask=batch[1], stopping_criteria=stops, **given)

    alone = [write(batch) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(write, batches))
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


def test_a_pipeline_classifies_with_it():
    tokenizer = letters()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = ensemble_of({"a": bert(1), "b": bert(2)}, combine="majority")
    (found,) = pipeline("text-classification", model=model, tokenizer=tokenizer)("hello")
    with torch.no_grad():
        best = int(model(**tokenizer("hello", return_tensors="pt")).logits[0].argmax())
    assert found["label"] == model.config.id2label[best]


def loss_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=rows(), labels=rows()).loss.item()


def test_the_trainer_of_transformers_trains_a_gate_and_saves_it(tmp_path):
    members = {name: model.requires_grad_(False) for name, model in {"a": llama(), "b": gpt2()}.items()}
    model = gated(members, some_gate())
    before, kept = loss_of(model), copy.deepcopy(members["a"].state_dict())
    trainer(model, tmp_path / "runs").train()
    assert loss_of(model) < before - 1e-3
    assert all(torch.equal(weight, kept[name]) for name, weight in members["a"].state_dict().items())
    model.save_pretrained(tmp_path / "saved", self_contained=True)
    assert loss_of(EnsembleForCausalLM.from_pretrained(tmp_path / "saved")) == pytest.approx(loss_of(model), abs=1e-6)


def test_the_training_loop_trains_a_gate(tmp_path):
    members = {name: model.requires_grad_(False) for name, model in {"a": llama(), "b": gpt2()}.items()}
    model = gated(members, some_gate())
    before = loss_of(model)
    plain = [{"input_ids": row.numpy(), "labels": row.numpy()} for row in rows()]
    for row in plain:
        row |= {"segments": np.zeros(10, np.int64), "positions": np.arange(10)}
    settings = parse(TrainSettings, {"budget": "12 steps", "batch_size": 4, "learning_rate": 0.05})
    train(model, ListRows(plain), TokenLoss(), settings, tmp_path / "out", scratch=tmp_path / "scratch", seed=0)
    assert loss_of(model) < before - 1e-3


def test_frozen_members_are_read_without_dropout_while_others_train():
    frozen, free = gpt2().requires_grad_(False), gpt2(4)
    model = ensemble_of({"frozen": frozen, "free": free}).train()
    assert (frozen.training, free.training, model.training) == (False, True, True)


def test_members_that_were_trained_are_saved_as_they_are_now_or_not_at_all(tmp_path):
    made = ensemble_of({"a": llama(1), "b": gpt2()})
    made.save_pretrained(tmp_path / "first", self_contained=True)
    loaded = EnsembleForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "same")
    trainer(loaded, tmp_path / "runs", max_steps=2).train()
    with pytest.raises(RequestError, match="member 'a' has been trained since it was loaded: save it first, or use"):
        loaded.save_pretrained(tmp_path / "no")
    loaded.save_pretrained(tmp_path / "yes", self_contained=True)
    now = loss_of(EnsembleForCausalLM.from_pretrained(tmp_path / "yes"))
    assert now == pytest.approx(loss_of(loaded), abs=1e-6)
    assert now != pytest.approx(loss_of(made), abs=1e-4)
    assert loss_of(EnsembleForCausalLM.from_pretrained(tmp_path / "same")) == pytest.approx(loss_of(made), abs=1e-6)


def without_dropout(model):
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        elif isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0
    return model


def translators():
    ids, _ = source()
    targets = [prompts(padded=())[0][n % 3, : 3 + n % 4] for n in range(4)]
    labels = [torch.nn.functional.pad(each, (0, 7 - len(each)), value=-100) for each in targets]
    rows_ = [{"input_ids": ids[n % 3], "labels": each} for n, each in enumerate(labels)]
    return without_dropout(ensemble_of({"a": t5(1), "b": bart(2)})), rows_


def classifiers():
    ids, _ = source()
    rows_ = [{"input_ids": ids[n % 3], "labels": torch.tensor(n % 3)} for n in range(4)]
    return without_dropout(ensemble_of({"a": bert(1), "b": bert(2)})), rows_


@pytest.mark.parametrize("build", [translators, classifiers])
def test_accumulated_batches_are_one_batch(tmp_path, build):
    found = []
    for size, times in ((4, 1), (2, 2)):
        model, data = build()
        before = torch.cat([weight.flatten() for weight in model.parameters()]).detach()
        given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 1}
        plain = {"lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
        trainer(model, tmp_path, data, **given, **plain).train()
        found.append(torch.cat([weight.flatten() for weight in model.parameters()]).detach() - before)
    assert found[0].abs().max() > 1e-3
    assert torch.allclose(*found, atol=1e-6)


def test_it_gives_tuples_where_they_are_wanted_and_refuses_what_only_one_model_has():
    ids, _ = prompts(padded=())
    model = ensemble_of({"a": llama(), "b": qwen()})
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, return_dict=False)[0], model(input_ids=ids).logits)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(RequestError, match=f"cannot honour {name}: ask one of its `members`"):
            model(input_ids=ids, **{name: True})
    with pytest.raises(RequestError, match="an ensemble reads input_ids, found none"):
        model(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(RequestError, match="single model for continuous batching, found an ensemble"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(RequestError, match="single model for continuous batching"):
        model.generate(ids, cache_implementation="paged", max_new_tokens=2)
    for weights in ([float("nan"), 0.5], [float("inf"), 1.0]):
        with pytest.raises(RequestError, match="expected finite weights"):
            ensemble_of({"a": llama(), "b": qwen()}, weights, "log_linear")


def mamba(seed=5):
    own = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2}
    return sharp(
        MambaForCausalLM(MambaConfig(vocab_size=37, bos_token_id=1, eos_token_id=2, pad_token_id=0, **own)), seed
    )


def test_a_member_with_a_recurrent_state_decodes_by_reading_the_text_anew():
    members = {"a": llama(), "state": mamba()}
    model = ensemble_of(members, [0.5, 0.5])
    ids, mask = prompts(1, 7, ())
    given = {"max_new_tokens": 6, "eos_token_id": None}

    def mixture(text):
        return sum(each(input_ids=text).logits[:, -1].softmax(-1) / 2 for each in members.values())

    with torch.no_grad():
        expected = greedy(mixture, ids, 6)
    assert torch.equal(model.generate(ids, attention_mask=mask, do_sample=False, **given), expected)
    outer = ensemble_of({"inner": model, "other": qwen()}, [0.5, 0.5])
    assert torch.equal(outer.generate(ids, **given), outer.generate(ids, use_cache=False, **given))
    with pytest.raises(RequestError, match="found a recurrent state: use generate"):
        model.speculate(ids, max_new_tokens=3)


def test_a_union_of_vocabularies_may_be_a_member():
    inner = ensemble_of(MEMBERS, [0.6, 0.4], union=UNION)
    other = llama(3, tokens=len(UNION.tokens))
    outer = ensemble_of({"inner": inner, "other": other}, [0.5, 0.5])
    ids = torch.tensor([[1, 8, 9]])

    @torch.no_grad()
    def mixture(text):
        own = torch.tensor([by_hand([UNION.tokens[i] for i in text[0].tolist()])])
        return own / 2 + other(input_ids=text).logits[:, -1].softmax(-1) / 2

    found = outer.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(found, greedy(mixture, ids, 5))
    assert RIGHT.get_vocab()["bc"] not in (None, UNION.tokens.index("bc"))


def test_ensembles_of_translators_may_be_members():
    inner = ensemble_of({"small": t5(1), "deep": t5(2, layers=3, size=24)}, [0.5, 0.5])
    outer = ensemble_of({"inner": inner, "bart": bart(3)}, [0.6, 0.4])
    flat = ensemble_of({"small": t5(1), "deep": t5(2, layers=3, size=24), "bart": bart(3)}, [0.3, 0.3, 0.4])
    ids, mask = source()
    target = prompts(padded=())[0]
    with torch.no_grad():
        found, expected = (
            m(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits for m in (outer, flat)
        )
    assert torch.allclose(found, expected, atol=1e-5)
    given = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 6, "eos_token_id": None}
    assert torch.equal(outer.generate(ids, **given), flat.generate(ids, **given))


def test_what_chooses_whole_outputs_gives_them_to_a_streamer():
    model, tokenizer = ensemble_of(writers(), [0.5, 0.3, 0.2], "majority"), letters()
    ids, _ = ids_and_mask()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    given = {"tokenizer": tokenizer, **GIVEN}
    found = model.generate(ids[2:], streamer=streamer, **given)
    assert "".join(streamer).strip() == texts(found, ids.shape[1])[0]
    with pytest.raises(RequestError, match="cannot honour streamer"):
        model.generate(ids, streamer=streamer, **given)
