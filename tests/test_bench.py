"""The scripts that measure, which only those run who measure: what they take from graft is there."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py"))


def taken(source):
    """(module of graft, name) of what a script imports from graft, and of `module.name` where it uses one."""
    tree, modules = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                if one.name.partition(".")[0] == "graft":
                    modules[one.asname or "graft"] = one.name if one.asname else "graft"
                    yield one.name, None
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "graft":
            for one in node.names:
                yield node.module, one.name
                if is_module(f"{node.module}.{one.name}"):
                    modules[one.asname or one.name] = f"{node.module}.{one.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


def is_module(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_takes_from_graft_is_there(script):
    for module, name in taken((BENCH / script).read_text()):
        found = import_module(module)
        if name is not None and not hasattr(found, name):
            import_module(f"{module}.{name}")


def test_a_name_that_is_gone_is_found():
    source = (
        "from graft.evaluate import statistics\nimport graft\nstatistics.paired(1)\ngraft.merge\nstatistics.gone(1)"
    )
    assert set(taken(source)) == {
        ("graft.evaluate", "statistics"),
        ("graft", None),
        ("graft.evaluate.statistics", "paired"),
        ("graft", "merge"),
        ("graft.evaluate.statistics", "gone"),
    }
