import pytest

from graft.errors import SettingsError
from graft.settings import parse
from graft.train.settings import TrainSettings


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        ("800 steps", 800),
        ("2 epochs", 25),
        ("1 epoch", 13),
        ("640 tokens", 2),
        ("64k tokens", 125),
        (2000, 4),
        ("1", 1),
    ],
)
def test_a_budget_is_steps_epochs_or_tokens(written, steps):
    budget = parse(TrainSettings, {"budget": written}).budget
    assert budget.steps(rows=100, batch_size=8, row_tokens=64.0) == steps


def test_settings_survive_being_written_down():
    given = parse(TrainSettings, {"budget": "2M tokens", "checkpoint_every": "5 minutes", "keep": {"last": 2}})
    assert parse(TrainSettings, given.plain()) == given
    assert given.plain()["budget"] == "2000000 tokens"
    assert given.checkpoint_every.seconds == 300


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"budget": "2 years"}, "budget: expected a budget such as 2M tokens, 500 steps or 2 epochs, found '2 years'"),
        ({"checkpoint_every": "often"}, "expected an interval such as 100 steps, 30 seconds or 5 minutes"),
        ({"batch_size": 6, "accumulate": 4}, "expected batch_size to be a multiple of accumulate, found 6 and 4"),
        ({"keep": {"lst": 1}}, "keep.lst: unknown key (did you mean 'last'?)"),
    ],
)
def test_what_is_wrong_with_settings_is_said(raw, message):
    with pytest.raises(SettingsError) as error:
        parse(TrainSettings, raw)
    assert message in str(error.value)
