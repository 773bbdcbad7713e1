"""Large text files are read in blocks that lose nothing, and all parts of a file are in one split."""

import lzma

import pytest

from graft import data
from graft.data import sources
from graft.data.files import blocks
from graft.errors import DataError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 64, 10_000])
def test_blocks_join_to_the_text(tmp_path, size):
    text = "ünï\nçødé 😀\n\n  x\nlong line without an end " * 9
    (tmp_path / "a.txt").write_text(text)
    assert "".join(blocks(tmp_path / "a.txt", size)) == text


def test_blocks_end_at_lines(tmp_path):
    text = "".join(f"line {n}\n" for n in range(100))
    (tmp_path / "a.txt").write_text(text)
    *found, _ = blocks(tmp_path / "a.txt", 50)
    assert len(found) > 10
    assert all(block.endswith("\n") for block in found)


def test_marks_and_line_ends_of_other_systems_are_taken_away(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert list(blocks(tmp_path / "a.txt", 1000)) == ["one\ntwo"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\n" * 5 + b"a\xffb\n", "line 6: expected UTF-8 text, found byte 0xff"),
        (b"fine\n" * 5 + b"a\0b\n", "line 6: expected text, found binary data"),
        (b"fine\n" * 5 + "é".encode()[:1], "line 6: expected UTF-8 text, found byte 0xc3"),
    ],
)
@pytest.mark.parametrize("size", [4, 7, 1000])
def test_a_bad_byte_in_any_block_is_named_with_its_line(tmp_path, content, message, size):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(blocks(tmp_path / "a.txt", size))


def test_a_compressed_file_cut_short_is_named(tmp_path):
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"".join(b"%d\n" % n for n in range(9999)))[:-40])
    with pytest.raises(DataError, match="damaged or cut short"):
        list(blocks(tmp_path / "a.txt.xz", 1000))


@pytest.mark.parametrize("how", [{"document": "file"}, {"document": "paragraph"}, {"separator": "---"}])
def test_all_parts_of_a_long_document_are_in_one_split(tmp_path, monkeypatch, how):
    monkeypatch.setattr(sources, "MOST", 300)
    for book in range(30):
        (tmp_path / f"{book}.txt").write_text("".join(f"book {book} line {n}\n" for n in range(99)))
    raw = {"source": "text", "path": "*.txt", "splits": {"dev": 0.3, "test": 0.3}, **how}
    corpus = data.open_corpus({"s": data.parse(raw)}, "s", tmp_path)
    parts = {split: [r["text"] for r in corpus.records(split)] for split in data.SPLITS}
    books = {split: {text.split()[1] for text in texts} for split, texts in parts.items()}
    assert sum(len(found) for found in books.values()) == len(set().union(*books.values())) == 30
    assert all(len(text) < 330 for texts in parts.values() for text in texts)
    lines = sorted(line for texts in parts.values() for text in texts for line in text.splitlines())
    assert lines == sorted(f"book {book} line {n}" for book in range(30) for n in range(99))
