"""What weights are fitted on: a sample of the whole split, the same however the file is sorted."""

import json

from graft import data
from graft.data.corpus import identity_of
from graft.ensemble import FITTING, VERB
from graft.ensemble.fitting import held_out


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return data.parse({"source": "jsonl", "path": str(path)})


def test_documents_to_fit_on_are_drawn_from_the_whole_split(tmp_path):
    records = [{"text": f"{topic} {n}"} for topic in ("law", "rain") for n in range(300)]
    sets = {"text": written(tmp_path / "text.jsonl", records), "back": written(tmp_path / "back.jsonl", records[::-1])}
    found = held_out("text.train", 40, sets, tmp_path, None)
    split = list(data.open_corpus(sets, "text", tmp_path).records("train"))
    assert found.records == [r for r in split if identity_of(r) in sorted(map(identity_of, split))[:40]]
    topics = [text.split()[0] for text in found.texts]
    # a binomial of 40 draws has a standard deviation of 3
    assert 7 < topics.count("law") < 33
    assert sorted(held_out("back.train", 40, sets, tmp_path, None).texts) == sorted(found.texts)


def test_every_part_of_a_mixture_is_drawn_from_by_itself(tmp_path):
    few, many = ([{"text": f"{name} {n}"} for n in range(count)] for name, count in (("few", 30), ("many", 300)))
    sets = {"few": written(tmp_path / "few.jsonl", few), "many": written(tmp_path / "many.jsonl", many)}
    sets["both"] = data.parse({"mix": {"few": 1, "many": 3}})
    found = held_out("both.train", 20, sets, tmp_path, None)
    assert [text.split()[0] for text in found.texts] == ["few"] * 20 + ["many"] * 20
    assert found.parts.tolist() == [0] * 20 + [1] * 20
    assert found.shares.tolist() == [0.25, 0.75]
    assert found.texts[:20] == held_out("few.train", 20, sets, tmp_path, None).texts


def test_only_fitted_weights_have_the_version_of_the_fitting_in_their_key():
    fitted, given = (VERB.parse({"members": ["a", "b"], "weights": w}) for w in ({"fit": "text.dev"}, "uniform"))
    assert VERB.content(fitted) == {**fitted.content(), "fitting": FITTING}
    assert VERB.content(given) == given.content()
