"""One of several processes that make one node together, started by a launcher such as torchrun.

`LAUNCHER -m graft._launched WORK OUTCOME`: the first process makes the node; the others do the verb's work with it and
write into a folder that is thrown away. What went wrong, or the manifest, is left in files named OUTCOME.<rank>.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft._worker import stop_with_parent
from graft.errors import Failure, attempt
from graft.executors import Outcome
from graft.lineage import Manifest
from graft.making import Work, job_of, make, run_verb


def main() -> None:
    """Take part; the exit status is 0 where this process did its part."""
    from accelerate import PartialState

    from graft.train.place import meet_on_cpu

    os.dup2(2, 1)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    work: Work = pickle.loads(Path(sys.argv[1]).read_bytes())
    place = PartialState(cpu=meet_on_cpu(work.device))
    try:
        outcome = attempt(lambda: _first(work) if place.is_main_process else _other(work, place.process_index))
    except KeyboardInterrupt:
        os._exit(130)
    left = Path(f"{sys.argv[2]}.{place.process_index}")
    part = left.with_name(f".{left.name}")
    part.write_bytes(pickle.dumps(outcome))
    part.rename(left)
    # not through the interpreter's end: after a failure the others may wait for this process until it is gone
    os._exit(int(isinstance(outcome, Failure)))


def _first(work: Work) -> Manifest:
    """Make the node, calling on the others when the verb's work begins; they are let go where it was done before."""
    called = False

    def together(work: Work) -> Manifest:
        nonlocal called
        called = True
        _agree(True)
        manifest = run_verb(work)
        # what is made is finished, whatever becomes of the others; but they write into the folder that is removed then
        with contextlib.suppress(RuntimeError):
            _wait()
        return manifest

    manifest = make(work, together)
    if not called:
        _agree(False)
    return manifest


def _other(work: Work, rank: int) -> Outcome | None:
    """Do the verb's work beside the first process, if it calls."""
    if not _agree(None):
        return None
    job = job_of(work)
    aside = job.scratch / f"process-{rank}"
    aside.mkdir(parents=True, exist_ok=True)
    import importlib

    importlib.import_module("graft.verbs").verb(work.verb).run(replace(job, out=aside))
    shutil.rmtree(aside, ignore_errors=True)
    _wait()
    return None


def _wait() -> None:
    """Until every process is here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def _agree(go: bool | None) -> Any:
    """What the first process says to the others; here `go` is None, and they wait for it."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([go])[0]


if __name__ == "__main__":
    main()
