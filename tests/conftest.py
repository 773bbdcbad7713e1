"""Fixtures for every room: one thread, no network, and the real data sets where they are at hand."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRAFT_QUIET", "1")
# nothing is kept for the user who runs the tests, nor taken from what is
os.environ["GRAFT_CACHE"] = ""

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from processes import ALL, SLOW, Server

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real data sets are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the verb `grow` known, as another package would: through its entry point."""
    place = Path(__file__).parent / "growing"
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PYTHONPATH", str(place))
    return place


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """What a process has written is there for others, killed or not: only a power cut tells whether it was synced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def fresh():
    """Runs programs in processes that know neither graft nor transformers: `fresh.run(program, *arguments)`."""
    server = Server(SLOW)
    yield server
    server.close()


@pytest.fixture(scope="session")
def beside():
    """Starts programs, at once, in processes of their own: everything heavy is imported there already."""
    server = Server(ALL)
    yield server
    server.close()
