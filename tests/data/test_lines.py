"""Lines and paragraphs, read in blocks, are those that reading line by line gives; errors name the same line."""

import gzip
import lzma
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.data import files, sources
from graft.errors import DataError

WORDS = ["a", "bc", " ", "\t", "\n", "\n\n", "\r\n", "\r", "\f", "---", "\n---\n", "é", "\u2028", "\x1c", "\ufeff"]
BAD = [b"\0", b"\xff", "é".encode()[:1]]


def line_by_line(path):
    """(number, line), and what went wrong as the last."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if b"\0" in raw:
                yield f"line {number}: expected text, found binary data"
                return
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield f"line {number}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x}"
                return


def between(found, separator, most):
    """Documents by going through the lines one after the other."""
    held, goes_on = [], False
    for _, line in found:
        ends = not line.strip() if separator is None else line == separator
        if ends or sum(len(line) + 1 for line in held) > most:
            yield goes_on, "\n".join(held)
            held, goes_on = [], not ends
        if not ends:
            held.append(line)
    yield goes_on, "\n".join(held)


def read_all(stream):
    """What a stream gives, and what went wrong as the last."""
    found = []
    try:
        found.extend(stream)
    except DataError as error:
        found.append(str(error).partition(", ")[2].partition(";")[0])
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("lines") / "text.txt"


@given(st.lists(st.sampled_from([word.encode() for word in WORDS] + BAD)), st.integers(1, 40))
def test_lines_in_blocks_are_the_lines_of_the_file(path, words, size):
    path.write_bytes(b"".join(words))
    with patch.object(files, "BLOCK", size):
        assert read_all(files.lines(path)) == list(line_by_line(path))


@given(
    st.lists(st.sampled_from(WORDS)), st.integers(1, 40), st.integers(1, 30), st.sampled_from([None, "---", "", " "])
)
def test_documents_in_blocks_are_those_of_the_lines(path, words, size, most, separator):
    path.write_bytes("".join(words).encode())
    settings = SimpleNamespace(separator=separator, document="paragraph")
    expected = [(on, text) for on, text in between(line_by_line(path), separator, most) if text.strip()]
    with patch.object(files, "BLOCK", size), patch.object(sources, "MOST", most):
        assert list(sources._documents(path, settings)) == expected


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_compressed_lines_are_those_of_the_plain_file(tmp_path, pack):
    content = "".join(f"line {n}\n" * (n % 3) + "\n" for n in range(30_000)).encode()
    (tmp_path / "a.txt").write_bytes(content)
    place = tmp_path / f"a.txt.{'gz' if pack is gzip.compress else 'xz'}"
    place.write_bytes(pack(content))
    assert list(files.lines(place)) == list(files.lines(tmp_path / "a.txt"))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_compressed_file_gives_lines_up_to_the_damage(tmp_path, damage):
    content = "".join(f"{n * n}\n" for n in range(200_000)).encode()
    packed = bytearray(gzip.compress(content))
    half = len(packed) // 2
    packed[half : half + 64] = b"" if damage == "cut" else b"\xff" * 64
    (tmp_path / "a.txt.gz").write_bytes(packed[:half] if damage == "cut" else packed)
    *found, told = read_all(files.lines(tmp_path / "a.txt.gz"))
    number = len(found)
    assert number > 50_000
    assert told.startswith(f"after line {number}: the compressed file is damaged or cut short")
    assert [line for _, line in found[:50_000]] == [str(n * n) for n in range(50_000)]
