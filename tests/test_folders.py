"""Files beside the weights: found once, the first folder's before the others', and copied under their own names."""

from graft.folders import companions, copy_companions


def folder_of(place, *names):
    for path in map(place.joinpath, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    return place


def test_a_file_that_fits_two_patterns_is_found_once(tmp_path):
    folder = folder_of(tmp_path, "tokenizer.model", "tokenizer.json", "config.json")
    assert list(companions(folder).items()) == [
        ("tokenizer.json", folder / "tokenizer.json"),
        ("tokenizer.model", folder / "tokenizer.model"),
    ]


def test_of_a_file_that_two_folders_have_the_first_folders_counts(tmp_path):
    own = folder_of(tmp_path / "own", "tokenizer.json")
    base = folder_of(tmp_path / "base", "tokenizer.json", "vocab.json")
    assert companions(own, base) == {"tokenizer.json": own / "tokenizer.json", "vocab.json": base / "vocab.json"}


def test_folders_are_no_files(tmp_path):
    folder_of(tmp_path, "vocabulary/words", "additional_chat_templates/rag")
    assert list(companions(tmp_path)) == ["additional_chat_templates/rag"]


def test_files_are_copied_under_their_names_but_for_stale_ones_that_are_not_wanted(tmp_path):
    names = ["tokenizer.json", "vocab.json", "additional_chat_templates/rag"]
    found, every, fresh = companions(folder_of(tmp_path / "of", *names)), tmp_path / "every", tmp_path / "fresh"
    assert copy_companions(found, every) == names
    assert (every / "additional_chat_templates" / "rag").read_text() == "rag"
    assert (every / "vocab.json").is_file()
    assert copy_companions(found, fresh, stale=False) == ["tokenizer.json", "additional_chat_templates/rag"]
    assert not (fresh / "vocab.json").exists()
