"""A process that makes one node: its work comes on stdin, the outcome goes out on stdout."""

from __future__ import annotations

import os
import pickle
import sys
import threading

from graft.errors import attempt
from graft.making import make


def stop_with_parent() -> None:
    """End this process when the one that started it is gone."""
    # nothing more is ever written to stdin: its end says that the process at the other side is gone
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Make the node; what libraries print goes to stderr."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    work = pickle.load(sys.stdin.buffer)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        outcome = attempt(lambda: make(work))
    except KeyboardInterrupt:
        os._exit(130)
    pickle.dump(outcome, answer)
    answer.close()
    os._exit(0)


if __name__ == "__main__":
    main()
