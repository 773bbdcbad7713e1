"""The command line answers at once."""

import subprocess
import sys

import graft


def test_version_is_printed_without_heavy_imports():
    code = "import sys, graft.cli; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    out = subprocess.check_output([sys.executable, "-c", "from graft.cli import main; main()", "--version"], text=True)
    assert out.strip() == f"graft {graft.__version__}"
