"""Tiny Llamas near one base are made by the helpers of the merges."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "merge"))
