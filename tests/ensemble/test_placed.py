"""A cache with a place for each row: rows of unlike lengths are read as if each were alone, nothing is moved."""

import itertools

import pytest
import torch
import transformers
from tiny_members import ENDS, TOKENS, bloom, gpt2, llama, mistral, prompts, qwen, sharp

from graft.ensemble import pending, speculative
from graft.ensemble.model import ensemble_of
from graft.ensemble.pending import Pending
from graft.ensemble.placed import TYPES, can_be_placed
from graft.ensemble.turns import PLAIN, Plan, Turns

OWN = {"vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, **ENDS}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MADE = {
    "llama": llama,
    "mistral": mistral,
    "gpt2": gpt2,
    "qwen2": lambda: other(
        "Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, num_key_value_heads=2
    ),
    "qwen3": lambda: other("Qwen3", num_key_value_heads=1, head_dim=8),
    "gpt_neox": lambda: other("GPTNeoX"),
    "olmo": lambda: other("Olmo"),
    "olmo2": lambda: other("Olmo2"),
    "olmo3": lambda: other("Olmo3", **SLIDING),
    "phi": lambda: other("Phi"),
    "phi3": lambda: other("Phi3", sliding_window=4),
    "cohere": lambda: other("Cohere"),
    "gemma": lambda: other("Gemma", num_key_value_heads=1, head_dim=8),
    "gemma2": lambda: other("Gemma2", sliding_window=4, num_key_value_heads=1, head_dim=8),
    "gemma3_text": lambda: other("Gemma3Text", **SLIDING, num_key_value_heads=1, head_dim=8),
    "granite": lambda: other("Granite", num_key_value_heads=1),
    "smollm3": lambda: other("SmolLM3", **SLIDING, use_sliding_window=True, num_key_value_heads=1),
    "stablelm": lambda: other("StableLm", num_key_value_heads=2),
    "starcoder2": lambda: other("Starcoder2", sliding_window=4),
}


def other(name, **settings):
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=2, **OWN, **settings)
    return sharp(getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config), 11)


class Changing(Turns):
    """Every kind of round in turn."""

    def __post_init__(self):
        super().__post_init__()
        self.plans = itertools.cycle([PLAIN, Plan(0, 1, True), Plan(1, 3), PLAIN, Plan(1, 1, True), Plan(0, 2, True)])

    def plan(self, left):
        return next(self.plans)


@pytest.fixture(autouse=True)
def changing(monkeypatch):
    monkeypatch.setattr(speculative, "Turns", Changing)


def test_every_type_that_is_said_to_be_placed_is_tested():
    assert set(MADE) == TYPES


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, way) for name in MADE for way in ("sdpa", "eager") if (name, way) != ("gemma2", "sdpa")],  # has none
)
def test_rows_of_unlike_lengths_are_read_as_if_each_were_alone(name, attention):
    member = MADE[name]()
    member.set_attn_implementation(attention)
    assert can_be_placed(member)
    duo = ensemble_of({"one": member, "other": qwen()}, [0.6, 0.4])
    ids, mask = prompts(5, 9, (3, 1, 0, 8, 5))
    given = {"attention_mask": mask, "max_new_tokens": 25, "pad_token_id": 0}
    end = int(duo.generate(ids, do_sample=False, eos_token_id=None, **given)[1, 18])
    found = duo.speculate(ids, eos_token_id=end, **given)
    assert 0 < found.kept < found.drafted
    assert torch.equal(found.sequences, duo.generate(ids, do_sample=False, eos_token_id=end, **given))
    for row, start in enumerate((3, 1, 0, 8, 5)):
        alone = duo.speculate(ids[row : row + 1, start:], max_new_tokens=25, eos_token_id=end).sequences[0, 9 - start :]
        assert torch.equal(found.sequences[row, 9 : 9 + len(alone)], alone)


@torch.no_grad()
def test_what_a_member_says_behind_drafts_that_were_dropped_is_what_it_says_of_the_text():
    duo = ensemble_of({"one": mistral(), "other": gpt2()})
    ids, _ = prompts(3, 40, ())
    held = Pending(duo, ids[:, :9], [3, 0, 1])
    for number in (0, 1):
        held.read(number, 9)
    for at, verdicts in enumerate([(0, 2, 1), (1, 0, 2), (2, 2, 0), (0, 1, 0)]):
        for _ in range(2):
            held.draft(0, torch.randint(3, TOKENS, (3,)), None)
        held.read(at % 2, held.length)
        news = [None if kept == 2 else 5 + at for kept in verdicts]
        held.settle([pending.Verdict(2, kept, new) for kept, new in zip(verdicts, news, strict=True)], [False] * 3)
    for number, member in enumerate(duo.members):
        held.read(number, held.length)
        said = held.said(number, held.length, held.length + 1).log_probs[:, 0]
        for row, start in enumerate(held.starts):
            alone = member(input_ids=held.text[row : row + 1, start:]).logits[0, -1].log_softmax(-1)
            # float32: sums of 16 products in another order
            torch.testing.assert_close(said[row], alone, rtol=0, atol=1e-4)


def test_members_whose_positions_come_from_the_mask_are_moved():
    assert not can_be_placed(bloom())
    flexible = llama()
    flexible.config._attn_implementation = "flex_attention"
    assert not can_be_placed(flexible)
