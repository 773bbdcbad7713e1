"""What is noted as finished survives a kill at any byte; what is not noted is made again."""

import pytest

from graft.merge import journal
from graft.merge.journal import Journal

NAMES = ["layers.0.weight", 'a "quoted" name', "layers.10.weight"]


def noted(path, names, folder, what="merge"):
    """A journal that was killed: nothing is done when it is left."""
    made = Journal(path, what, folder)
    for name in names:
        made.note(name, 1)
    return made


@pytest.fixture(autouse=True)
def every_tensor_is_synced(monkeypatch):
    monkeypatch.setattr(journal, "SYNC_BYTES", 1)


def test_names_come_back(tmp_path):
    noted(tmp_path / "journal", NAMES, tmp_path)
    assert Journal(tmp_path / "journal", "merge", tmp_path).finished == set(NAMES)


def test_other_work_begins_anew(tmp_path):
    noted(tmp_path / "journal", NAMES, tmp_path)
    assert Journal(tmp_path / "journal", "another", tmp_path).finished == set()


def test_it_goes_on_wherever_a_kill_cut_it(tmp_path):
    path = tmp_path / "journal"
    noted(path, NAMES, tmp_path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        before = Journal(path, "merge", tmp_path).finished
        assert before <= set(NAMES)
        noted(path, ["later"], tmp_path)
        assert Journal(path, "merge", tmp_path).finished == before | {"later"}


def test_what_was_not_brought_to_the_disk_is_not_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SYNC_BYTES", 100)
    noted(tmp_path / "journal", NAMES, tmp_path)
    assert Journal(tmp_path / "journal", "merge", tmp_path).finished == set()


def test_an_error_keeps_what_was_finished_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SYNC_BYTES", 100)
    with pytest.raises(ZeroDivisionError), Journal(tmp_path / "journal", "merge", tmp_path) as made:
        made.note("a", 1)
        raise ZeroDivisionError
    assert Journal(tmp_path / "journal", "merge", tmp_path).finished == {"a"}
