"""What bench/tuning_help.py decides by itself: learning rates, which results belong together, which pairs join."""

from argparse import Namespace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@pytest.fixture
def grids():
    return import_module("_tuning_grid")


def peak(at):
    """A score that is best at one rate, and the rates it was asked for."""
    asked = set()

    def score(rate):
        asked.add(rate)
        return -abs(LADDER.index(rate) - LADDER.index(at))

    return score, asked


@pytest.mark.parametrize("at", [1e-3, 3e-3, 1e-2, 3e-2])
def test_a_search_finds_what_lies_within_two_steps_with_four_trainings_at_most(grids, at):
    score, asked = peak(at)
    assert grids.climbed(score, 3e-3) == at
    assert len(asked) == (3 if at == 3e-3 else 4)


def test_a_search_stays_on_the_ladder(grids):
    for start in LADDER:
        for at in LADDER:
            found = grids.climbed(peak(at)[0], start)
            assert abs(LADDER.index(found) - LADDER.index(at)) == max(
                0, abs(LADDER.index(start) - LADDER.index(at)) - 2
            )


def test_a_walk_goes_one_way_as_long_as_it_is_better(grids):
    assert grids.walked(peak(1e-1)[0], 1e-3, 1) == 1e-1
    assert grids.walked(peak(1e-1)[0], 1e-3, -1) == 1e-3
    assert grids.walked(lambda rate: 0.0, 1e-3, 1) == 1e-3


BEST = {"head alone": (3e-2, None), "full": (1e-3, 1e-2), "lora": (1e-2, 1e-1)}


def grid_of(grids, folder, kind="classification", head_rate=None, base="base-1", best=BEST):
    """A grid of LoRA whose trainings are made up: best at BEST, larger adapters a step lower."""
    metric = {"classification": "accuracy", "text": "bits_per_byte"}[kind]
    task = Namespace(name="made", kind=kind, metric=metric, steps=10)

    class MadeUp(grids.Grid):
        def __init__(self):
            self.task, self.base = task, Path(base)
            self.given = Namespace(methods=["lora"], seeds=3, head_rate=head_rate, shares=grids.SHARES, longer=False)
            self.searching, self.whole = range(2), 1000
            self.results = import_module("_tuning_runs").Results(folder)
            self.own = ("untuned", "full") if kind == "text" else ("head alone", "full")
            self.sign = -1 if kind == "text" else 1

        def sizes(self, name):
            return {0.001: 1, 0.01: 2, 0.05: 3}

        def _new(self, key, name, share, rates, seed):
            body, head = best.get(name, (3e-3, None))
            body = LADDER[LADDER.index(body) - (share == 0.05)]
            far = abs(LADDER.index(rates.body) - LADDER.index(body))
            if rates.head is not None and head is not None and rates.head in LADDER:
                far += abs(LADDER.index(rates.head) - LADDER.index(head))
            dev = self.sign * (1 - 0.1 * far + 0.001 * seed)
            return self.results.append(
                {"key": key, "method": name, "share": share, "rate": rates.body, "head_rate": rates.head, "seed": seed,
                 "trained": 7, "dev": dev, "test": {task.metric: [[dev, 1.0]] * 4}}
            )  # fmt: skip

    return MadeUp()


def found(grid):
    cells = grid.cells(grid.task.metric)
    return {(name, share): tuple(cell.rates) for name, own in cells.items() for share, cell in own.items()}


def test_body_and_head_each_come_to_their_best_rate(grids, tmp_path):
    grid = grid_of(grids, tmp_path)
    grid.fill()
    assert found(grid) == {
        ("head alone", 0.0): (3e-2, None), ("full", 0.0): (1e-3, 1e-2), ("lora", 0.001): (1e-2, 1e-1),
        ("lora", 0.01): (1e-2, 1e-1), ("lora", 0.05): (3e-3, 1e-1),
    }  # fmt: skip
    cells = grid.cells("accuracy")
    assert all(cell.scores.statistics.shape == (3, 4, 2) for own in cells.values() for cell in own.values())


def test_a_grid_goes_on_where_it_stood(grids, tmp_path):
    first = grid_of(grids, tmp_path)
    first.fill()
    again = grid_of(grids, tmp_path)
    again._new = lambda *_: pytest.fail("nothing is trained twice")
    again.fill()
    assert found(again) == found(first)


def test_a_longer_training_searches_from_the_rates_of_the_shorter_one_down_or_up(grids, tmp_path):
    shorter = grid_of(grids, tmp_path / "shorter")
    shorter.fill()
    longer = grid_of(grids, tmp_path / "longer", best={"head alone": (1e-1, None), "full": (1e-4, 1e-2)})
    longer.given.longer, longer.given.shares, longer.searching = True, [0.01], range(1)
    longer.shorter = shorter.results.rows
    longer.fill()
    assert found(longer) == {
        ("head alone", 0.0): (1e-1, None), ("full", 0.0): (1e-4, 1e-2), ("lora", 0.01): (3e-3, 1e-1),
    }  # fmt: skip
    tried = {row["rate"] for row in longer.results.rows if row["method"] == "lora"}
    assert tried == {1e-2, 3e-3, 1e-3}


def test_a_longer_training_is_compared_with_the_shorter_one(grids, tmp_path):
    shorter, longer = (grid_of(grids, tmp_path / name) for name in ("shorter", "longer"))
    shorter.fill()
    longer.given.longer, longer.shorter = (
        True,
        [{**row, "test": {"accuracy": [[0.5, 1.0]] * 4}} for row in shorter.results.rows],
    )
    longer.fill()
    told = longer._gained(longer.cells("accuracy"), "accuracy")
    assert [line.split(" | ")[:2] for line in told[2:4]] == [["| head alone", "100 %"], ["| full", "100 %"]]
    assert told[4].startswith("| lora | 1 % | +0.501 (+0.500 to +0.502)")
    longer.shorter = [{**row, "test": {"accuracy": [[0.5, 1.0]] * 3}} for row in shorter.results.rows]
    assert len(longer._gained(longer.cells("accuracy"), "accuracy")) == 3


def test_a_longer_training_needs_the_shorter_one(grids, tmp_path):
    grid = grid_of(grids, tmp_path)
    grid.given.longer, grid.shorter = True, []
    with pytest.raises(SystemExit, match=r"no training of lora at 0\.01 is kept"):
        grid.rates_of("lora", 0.01)


def test_a_head_rate_that_is_given_is_kept(grids, tmp_path):
    grid = grid_of(grids, tmp_path, head_rate=5e-3)
    grid.fill()
    assert {row["head_rate"] for row in grid.results.rows if row["method"] != "head alone"} == {5e-3}
    assert all(len(rates) == 1 for rates in found(grid).values())


def test_of_equally_good_rates_that_is_shown_which_all_seeds_were_trained_at(grids, tmp_path):
    grid = grid_of(grids, tmp_path)
    for rate, seeds in ((1e-2, 2), (3e-3, 3)):
        for seed in range(seeds):
            row = {"method": "lora", "share": 0.01, "rate": rate, "head_rate": None, "seed": seed, "trained": 7}
            grid.results.append({"key": f"{rate} {seed}", **row, "dev": 0.5, "test": {"accuracy": [[1.0, 1.0]] * 4}})
    assert found(grid) == {("lora", 0.01): (3e-3, None)}


def test_less_is_better_for_bits_and_text_has_no_head(grids, tmp_path):
    grid = grid_of(grids, tmp_path, kind="text")
    grid.fill()
    assert found(grid)[("lora", 0.05)] == (3e-3, None)
    assert found(grid)[("untuned", 0.0)] == (1e-3, None)


def test_a_head_at_its_own_rate_is_compared_with_one_at_that_of_the_head_alone(grids, tmp_path):
    grid = grid_of(grids, tmp_path, best=BEST | {"pfeiffer": (1e-3, 3e-2)})
    grid.given.methods = ["lora", "pfeiffer"]
    grid.fill()
    words = grids.heads([grid, grid_of(grids, tmp_path / "text", kind="text")])
    assert words[0] == "| method | made |"
    assert words[2:] == [
        "| full | 0.01: +0.100 (+0.100 to +0.100), p = 0.12 |",
        "| lora | 0.1: +0.100 (+0.100 to +0.100), p = 0.12 |",
        "| pfeiffer | 0.03, as alone |",
    ]


def test_pairs_are_compared_where_both_are_there(grids):
    table = import_module("_tuning_table")
    metric = import_module("graft.evaluate.metrics").BITS_PER_BYTE
    cell = {
        name: table.Cell(7, (1e-3,), table.Seeds(metric, np.array([[[bits, 2.0]] * 4] * 3)))
        for name, bits in {"lora": 8.0, "lora, feed-forward": 7.0, "pfeiffer": 9.0}.items()
    }
    methods = {"lora": {0.01: cell["lora"]}, "lora, feed-forward": {0.01: cell["lora, feed-forward"]}}
    lines = grids.compared({**methods, "pfeiffer": {0.01: cell["pfeiffer"]}})
    assert len(lines) == 3
    assert lines[2].startswith("| feed-forward less attention, LoRA |  | −0.500 (−0.500 to −0.500)")
    assert grids.compared({"lora": methods["lora"]}) == []


def test_results_of_a_base_are_not_those_of_another_of_its_name(tmp_path):
    runs, checkpoint = import_module("_tuning_runs"), import_module("safetensors.torch")
    torch = import_module("torch")
    for place, value in (("a", 0.0), ("b", 1.0)):
        folder = tmp_path / place / "base"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        checkpoint.save_file({"w": torch.full((2,), value)}, folder / "model.safetensors")
    first, second = (runs.named(tmp_path / place / "base") for place in ("a", "b"))
    assert first != second
    assert first.startswith("base-")
    assert second.startswith("base-")


def test_directions_are_joined_by_the_english_that_both_have():
    joined = import_module("_tuning_directions").joined
    pairs = {
        "en": {"Hi.": "Hi.", "Go.": "Go.", "No.": "No."},
        "de": {"Hi.": "Hallo.", "No.": "Nein."},
        "fr": {"Hi.": "Salut.", "Go.": "Va."},
    }
    assert joined(pairs, "de", "fr") == [{"source": "Hallo.", "target": "Salut."}]
    assert joined(pairs, "en", "de") == [{"source": "Hi.", "target": "Hallo."}, {"source": "No.", "target": "Nein."}]
    assert joined(pairs, "fr", "en") == [{"source": "Salut.", "target": "Hi."}, {"source": "Va.", "target": "Go."}]


def test_ways_are_scored_over_the_moves_that_are_there(tmp_path, monkeypatch):
    module = import_module("_tuning_ways")
    monkeypatch.setattr(import_module("_tuning_runs"), "WORK", tmp_path)
    ways = module.Ways("made", "bits_per_byte", Namespace(seeds=2, search_seeds=1))
    moves = [("a", "b"), ("b", "a")]
    for seed in range(2):
        for start, end in moves:
            key = module.key_of(name="one", source=start, target=end, seed=seed)
            row = {"name": "one", "source": start, "target": end, "seed": seed, "test": [[8.0, 2.0], [4.0 + seed, 2.0]]}
            ways.results.append({"key": key, **row})
    ways.results.append({"key": "searched", "kind": "fusion", "dev": 1.0})
    assert not ways.lacks(["one"], moves, 1)
    assert ways.lacks(["one", "two"], moves, 1)
    assert ways.scores("one", moves).value == pytest.approx((4 * 8 + 2 * 4 + 2 * 5) / 16)
    assert ways.scores("two", moves) is None
    lines = ways.table(["one", "two"], {"there": moves[:1], "both": moves}, "one")
    assert lines[0] == "| | there | both | both, less one |"
    assert lines[3] == "| two |  |  |  |"


@pytest.mark.parametrize(("metric", "best"), [("bits_per_byte", 3e-3), ("entity_f1", 1e-2)])
def test_the_rate_of_a_kind_is_that_with_the_best_mean_over_the_seeds(tmp_path, monkeypatch, metric, best):
    module = import_module("_tuning_ways")
    monkeypatch.setattr(import_module("_tuning_runs"), "WORK", tmp_path)
    dev = {(1e-3, 0): 0.1, (1e-3, 1): 0.4, (3e-3, 0): 0.2, (3e-3, 1): 0.2, (1e-2, 0): 0.3, (1e-2, 1): 0.3}

    class MadeUp(module.Ways):
        starts = {"adapter": 3e-3}

        def _tried(self, key, kind, rate, seed):
            value = dev.get((rate, seed), 0.25)
            return self.results.append({"key": key, "kind": kind, "rate": rate, "dev": value, "metric": metric})

    ways = MadeUp("made", "accuracy", Namespace(seeds=3, search_seeds=2))
    assert ways.rate("adapter") == best
    assert ways.rates_found() == f"Learning rates: adapter {best:g}."
    assert {row["rate"] for row in ways.results.rows} >= {1e-3, 3e-3, 1e-2}


def test_only_scores_of_the_same_seeds_and_items_are_subtracted():
    module = import_module("_tuning_table")
    metric = import_module("graft.evaluate.metrics").BITS_PER_BYTE
    rng = np.random.default_rng(0)
    own = rng.uniform(1, 2, (3, 50, 2))
    better = own - [0.5, 0.0]
    one, other = module.Seeds(metric, better), module.Seeds(metric, own)
    assert module.less(one, other).startswith("−0.3")
    assert module.less(one, module.Seeds(metric, own[:2])) == ""
    assert module.less(None, other) == ""


def test_what_was_trained_for_the_tables_is_taken_where_nothing_was_trained(tmp_path, monkeypatch):
    tuning = import_module("_tuning_runs")
    monkeypatch.setattr(tuning, "WORK", tmp_path / "work")
    monkeypatch.setattr(tuning, "KEPT", tmp_path / "kept")
    done = tuning.runs("task-base")
    assert done.rows == []
    done.append({"key": "a", "dev": 0.5})
    tuning.keep(done)
    monkeypatch.setattr(tuning, "WORK", tmp_path / "elsewhere")
    assert tuning.runs("task-base").get("a")["dev"] == 0.5
    tuning.runs("task-base").append({"key": "b", "dev": 1.0})
    assert [row["key"] for row in tuning.runs("task-base").rows] == ["a", "b"]
