"""Run as a script, one training on several tasks: python train_on_tasks.py FOLDER START SETTINGS_JSON

Each process that a launcher starts has its own folder below FOLDER; START is the model to start from.
"""

import importlib
import json
import os
import sys
import types
from pathlib import Path

import torch

if __name__ == "__main__":
    package = types.ModuleType("tune_tests")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules["tune_tests"] = package
    several = importlib.import_module("tune_tests.test_several")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) / os.environ.get("RANK", "0")
    job = several.job(folder, Path(sys.argv[2]), several.TASKS, **json.loads(sys.argv[3]))
    several.VERB.run(job)
