"""What is noted as finished survives a kill at any byte; what is not noted is made again."""

import pytest

from graft import machine
from graft.merge import journal
from graft.merge.journal import Journal

NAMES = ["layers.0.weight", 'a "quoted" name', "layers.10.weight"]


def noted(path, names, folder, what="merge"):
    """A journal that was killed: nothing is done when it is left."""
    made = Journal(path, what, folder)
    for name in names:
        made.note(name, 1)
    return made


@pytest.fixture(params=[1, 2, 1 << 30])
def sync_bytes(request, monkeypatch):
    """Each tensor is brought to the disk, every second one, or none."""
    monkeypatch.setattr(journal, "SYNC_BYTES", request.param)
    return request.param


@pytest.fixture
def reboot(monkeypatch, tmp_path):
    """Call it to have the machine start anew."""

    def change(number):
        (tmp_path / "boot").write_text(f"boot {number}\n")

    change(0)
    monkeypatch.setattr(machine, "BOOT", tmp_path / "boot")
    return change


def test_names_come_back(sync_bytes, reboot, tmp_path):
    noted(tmp_path / "journal", NAMES, tmp_path)
    assert Journal(tmp_path / "journal", "merge", tmp_path).finished == set(NAMES)


def test_other_work_begins_anew(sync_bytes, reboot, tmp_path):
    noted(tmp_path / "journal", NAMES, tmp_path)
    assert Journal(tmp_path / "journal", "another", tmp_path).finished == set()


def test_nothing_lies_there_before_a_tensor_is_finished(reboot, tmp_path):
    noted(tmp_path / "journal", [], tmp_path)
    assert not (tmp_path / "journal").exists()
    noted(tmp_path / "journal", NAMES, tmp_path)
    noted(tmp_path / "journal", [], tmp_path, what="another")
    assert not (tmp_path / "journal").exists()


def test_it_goes_on_wherever_a_kill_cut_it(sync_bytes, reboot, tmp_path):
    path = tmp_path / "journal"
    noted(path, NAMES, tmp_path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        before = Journal(path, "merge", tmp_path).finished
        assert before <= set(NAMES)
        noted(path, ["later"], tmp_path)
        assert Journal(path, "merge", tmp_path).finished == before | {"later"}


@pytest.mark.parametrize(("sync_bytes", "kept"), [(1, 3), (2, 2), (1 << 30, 0)], indirect=["sync_bytes"])
def test_a_machine_that_went_down_has_what_was_brought_to_the_disk(sync_bytes, kept, reboot, tmp_path):
    noted(tmp_path / "journal", NAMES, tmp_path)
    reboot(1)
    assert Journal(tmp_path / "journal", "merge", tmp_path).finished == set(NAMES[:kept])
    assert Journal(tmp_path / "journal", "merge", tmp_path).finished == set(NAMES[:kept]), "what was lost stays lost"


def test_what_an_earlier_process_wrote_is_brought_to_the_disk_with_the_rest(reboot, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SYNC_BYTES", 2)
    noted(tmp_path / "journal", NAMES[:1], tmp_path)
    noted(tmp_path / "journal", NAMES[1:], tmp_path)
    reboot(1)
    assert Journal(tmp_path / "journal", "merge", tmp_path).finished == set(NAMES)


def test_where_nothing_tells_of_a_restart_only_the_disk_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "BOOT", tmp_path / "none")
    monkeypatch.setattr(journal, "UNSURE_BYTES", 2)
    noted(tmp_path / "journal", NAMES, tmp_path)
    assert Journal(tmp_path / "journal", "merge", tmp_path).finished == set(NAMES[:2])
