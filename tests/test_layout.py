"""The house: imports run one way, verb folders never meet, what must be light is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "graft"
VERBS = {"pretrain", "tune", "adapt", "head", "merge", "ensemble", "quantize", "_load"}
LAYERS = [
    {
        "allocator",
        "errors",
        "machine",
        "misfits",
        "settings",
        "pointers",
        "progress",
        "_callable",
        "_register",
        "yaml_lines",
    },
    {"methods", "verb", "hub", "disk", "checkpoint", "lora", "pickles", "remembered", "hashing", "machine_code"},
    {"folders", "vocabulary", "lineage", "facts", "finite", "fitting", "data"},
    {"models", "adapters", "multitask", "kinship", "masks", "one_way", "prefix_lm", "products"},
    {"train", "evaluate"},
    VERBS,
    {"verbs"},
    {"recipe"},
    {"plan"},
    {"making"},
    {"executors"},
    {"_launched", "_worker", "run", "report", "recipe_reference", "relate", "tree"},
    {"one", "chatting"},
    {"deltas", "advise"},
    {"api", "_verb_command"},
    {"_telling"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
"""Lower rooms first. A room may import from its own layer and from those above it in this list."""

ALLOWED_LATER = {
    ("_callable", "api"): "a room that is called like a command asks the API, at the time of the call",
    ("_register", "adapters"): "the Auto classes learn of adapters when transformers has been imported",
    ("_register", "ensemble"): "the Auto classes learn of ensembles when transformers has been imported",
    ("models", "ensemble"): "the class of a model that is an ensemble, when one is loaded",
    ("making", "plan"): "the hash of a parent's weights",
    ("report", "deltas"): "task vectors of merges, measured when a report is written for the first time",
}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """(room, line) of every import from graft, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "graft" and not node.level:
            inner = node.module.split(".")[1:]
            names = [inner[0]] if inner else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("graft.")]
        yield from ((name, node.lineno) for name in names)


def layer(name: str) -> int:
    return next(i for i, rooms in enumerate(LAYERS) if name in rooms)


def test_every_room_has_its_place():
    rooms = {room(path) for path in modules()} - {"__init__"}
    assert rooms <= set().union(*LAYERS), f"new rooms need a place in LAYERS: {rooms - set().union(*LAYERS)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    own = room(path)
    if own == "__init__":
        return
    wrong = [
        f"line {line}: {own} imports {other}"
        for other, line in imported_rooms(path)
        if other in set().union(*LAYERS) and layer(other) > layer(own) and (own, other) not in ALLOWED_LATER
    ]
    assert not wrong


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_verb_folders_never_import_each_other(verb):
    files = [path for path in modules() if room(path) == verb]
    met = {other for path in files for other, _ in imported_rooms(path)} & (VERBS - {verb})
    assert not met


def test_the_reader_of_imports_sees_those_inside_functions(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("from graft import merge\n\ndef f():\n    import graft.run\n    from graft.data.rows import Rows\n")
    assert list(imported_rooms(path)) == [("merge", 1), ("run", 4), ("data", 5)]


HEAVY = ["torch", "transformers", "datasets", "accelerate", "pandas", "scipy", "sklearn"]


def loaded_by(code: str, names: list[str]) -> list[str]:
    check = f"import sys; {code}; print(*[n for n in {names} if n in sys.modules])"
    return subprocess.check_output([sys.executable, "-c", check], text=True).split()


def test_graft_itself_imports_nothing():
    assert loaded_by("import graft", [*HEAVY, "numpy", "pydantic", "yaml", "rich"]) == []


def test_the_command_line_and_its_help_import_nothing_that_is_slow():
    code = "from typer.testing import CliRunner; from graft.cli import app; CliRunner().invoke(app, ['--help'])"
    assert loaded_by(code, [*HEAVY, "numpy", "pydantic", "yaml"]) == []


@pytest.mark.parametrize("module", ["recipe", "verbs", *sorted(VERBS)])
def test_recipes_and_verbs_are_light(module):
    assert loaded_by(f"import graft.{module}", HEAVY) == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_module_says_what_it_is_for(path):
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip()


def test_nothing_is_unpickled_but_work_between_our_own_processes():
    users = [path.name for path in modules() if "pickle" in path.read_text() and "import pickle" in path.read_text()]
    assert users == ["_launched.py", "_worker.py", "executors.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_is_evaluated_and_no_remote_code_is_trusted(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [n for n in calls if isinstance(n.func, ast.Name) and n.func.id in ("exec", "eval")]
    trusting = [k for n in calls for k in n.keywords if k.arg == "trust_remote_code"]
    assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in trusting)


COMMANDS_ALONE = {"methods", "only", "nproc-per-node", "show-toplevel"}
"""Options that no hint can name otherwise: questions to the command line, and those of other programs."""


def hints(path: Path) -> Iterator[tuple[int, str]]:
    """(line, words) of every text outside docstrings and field descriptions that names an option of a command."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    described = [k.value for n in nodes if isinstance(n, ast.Call) for k in n.keywords if k.arg == "description"]
    inside = [part for n in nodes if isinstance(n, ast.JoinedStr) for part in n.values]
    quiet = {id(n) for n in [*described, *inside, *(n.value for n in nodes if isinstance(n, ast.Expr))]}
    for node in nodes:
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in quiet:
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = "".join(p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str))
            if OPTION.search(words) and " " in words:
                yield node.lineno, words


OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_hints_that_name_an_option_name_the_setting_as_well(path):
    if room(path) in ("cli", "commands", "_telling", "_verb_command"):
        return
    for line, words in hints(path):
        for option in set(OPTION.findall(words)) - COMMANDS_ALONE:
            setting = option.replace("-", "_")
            assert re.search(rf"`{setting}(=|:|`)", words), (
                f"line {line}: name `{setting}` beside --{option}: {words!r}"
            )
