import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def many_pieces(request, monkeypatch):
    """Pieces so small that every tensor has many; of PIECE elements, where the module of the test says how many.

    Thresholds are guessed from samples as small, and rows sorted a few at a time.
    """
    from graft.merge import _drop, _select, adapted, stream

    monkeypatch.setattr(stream, "PIECE", getattr(request.module, "PIECE", 20))
    monkeypatch.setattr(adapted, "PIECE", 60)
    monkeypatch.setattr(_drop, "SORTED", 30)
    monkeypatch.setattr(_select, "FEW", 4)
    monkeypatch.setattr(_select, "LENGTH", 5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`base` and `a`, `b`, `c` near it: name → folder of a small model."""
    from small_family import family

    return family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder of the trained family's data."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="session")
def data(root):
    """Its data sets by name."""
    from trained_family import write_data

    return write_data(root)


@pytest.fixture(scope="session")
def trained(root):
    """Folders of models that were really trained, by name: see `trained_family.py`."""
    from trained_family import family

    return family(root)


@pytest.fixture
def merge(root, data, trained, tmp_path):
    """Runs the verb on the trained family, in a fresh folder; (folder, notes)."""
    from trained_family import job

    from graft.merge import VERB

    def run(settings, name="out", seed=0, more=()):
        made = job(settings, trained | dict(more), data, root, tmp_path / name, seed)
        return made.out, VERB.run(made)["notes"]

    return run


@pytest.fixture(scope="session")
def measured(root, data):
    """Bits per byte of a folder, as `graft eval` computes them."""
    from graft.evaluate import parse
    from graft.evaluate.judge import Judge
    from graft.models import load, load_tokenizer

    def bits(folder, on="all.dev"):
        judge = Judge.of(parse([{"measure": "bits_per_byte", "on": [on]}])[0], data, root)
        return judge.value(load(folder), load_tokenizer(folder))

    return bits


@pytest.fixture(scope="session")
def reading_root(tmp_path_factory):
    """The folder of the texts that small models have learned: see `readers.py`."""
    return tmp_path_factory.mktemp("readers")


@pytest.fixture(scope="session")
def texts(reading_root):
    """Data sets by name."""
    from readers import write_data

    return write_data(reading_root)


@pytest.fixture(scope="session")
def tuned(reading_root):
    """`base` and a model tuned on each kind of text: name → folder."""
    from readers import family

    return family(reading_root / "models")


@pytest.fixture
def merged(reading_root, texts, tuned, tmp_path):
    """merged(settings, name="out") → (tensors of the output, the notes, its folder), of the tuned models."""
    from readers import LENGTH, NAMES, job
    from small_family import tensors

    from graft.merge import VERB

    def run(settings, name="out", own=tuned):
        raw = {"models": NAMES, "length": LENGTH} | settings
        raw = {key: value for key, value in raw.items() if value is not None}
        found = VERB.run(job(raw, own, texts, reading_root, tmp_path / name))
        return tensors(tmp_path / name), found["notes"], tmp_path / name

    return run
