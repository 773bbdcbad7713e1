"""Processes for programs of tests, quickly: a server has imported what is slow, and forks one for each program.

`python processes.py MODULES_JSON` is the server. It reads a request a line and answers it with a line. The processes
are its children: what one of them imports, changes or is killed in reaches no other.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

OTHERS = "torch torch._dynamo torch.distributed.tensor torch.distributed.fsdp torch.export scipy.optimize scipy.sparse"
SLOW = [*OTHERS.split(), "sklearn.metrics"]
"""What `transformers` imports and is slow: a process that has no more than this knows neither it nor graft."""
ROOMS = "run cli train.loop tune.several evaluate.work report merge.engine ensemble.model"
ALL = [*SLOW, *(f"graft.{room}" for room in ROOMS.split()), "transformers.models.llama.modeling_llama"]


AS_SCRIPT = """
import os, runpy, sys
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Process:
    """A program that runs in a process of its own."""

    def __init__(self, server: Server, pid: int, told: Path):
        self.pid, self.returncode = pid, None
        self._server, self._told = server, told

    def poll(self) -> int | None:
        """The exit status as of `subprocess`, None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self._server.ask({"wait": self.pid})
        return self.returncode

    def kill_after(self, seconds: float) -> bool:
        """Whether it still ran by then, and was killed."""
        end = time.monotonic() + seconds
        return self.kill_when(lambda: time.monotonic() > end)

    def kill_when(self, moment: Callable[[], bool]) -> bool:
        """Kill it as soon as `moment()` is true; whether it ran until then."""
        while self.poll() is None and not moment():
            time.sleep(0.002)
        self.kill()
        return self.wait() == -signal.SIGKILL

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    @property
    def stdout(self) -> str:
        return (self._told / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self._told / "stderr").read_text()


@contextmanager
def meeting() -> Iterator[dict[str, str]]:
    """Where processes find each other, as environment: a store that listens already, as that of torchrun's agent does,
    at a port that the system chose: no other program can take it in between."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    yield {**told, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


class Server:
    """Starts programs in processes that have `modules` imported; the first asks for it to be started."""

    def __init__(self, modules: list[str]):
        self._modules, self._process = modules, None
        self._folder = tempfile.TemporaryDirectory()

    def start(
        self, program: str, *arguments: Any, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> Process:
        """As `python -c PROGRAM ARGUMENTS` would run it."""
        told = Path(tempfile.mkdtemp(dir=self._folder.name))
        request = {"program": program, "arguments": [str(one) for one in arguments], "told": str(told)}
        pid = self.ask({**request, "cwd": str(cwd or Path.cwd()), "env": dict(os.environ) if env is None else env})
        return Process(self, pid, told)

    def run(self, program: str, *arguments: Any, **given: Any) -> Process:
        """The same, at its end."""
        process = self.start(program, *arguments, **given)
        process.wait()
        return process

    def together(self, script: Path, *arguments: Any, count: int = 2) -> None:
        """Run a script in processes that find each other as under torchrun; where one fails, the others are ended."""
        with meeting() as place:
            size = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
            environments = [{**os.environ, **place, **size, **rank} for rank in ranks]
            group = [self.start(AS_SCRIPT, script, *arguments, env=environment) for environment in environments]
            while None in (statuses := [process.poll() for process in group]) and not any(statuses):
                time.sleep(0.01)
            for process in group:
                process.kill()
        assert not any(statuses), "\n".join(process.stderr[-4000:] for process in group)

    def ask(self, request: dict[str, Any]) -> Any:
        if self._process is None:
            words = [sys.executable, __file__, json.dumps(self._modules)]
            pipe = subprocess.PIPE
            # the folder of this file would be the first where modules are looked for
            self._process = subprocess.Popen(
                words, stdin=pipe, stdout=pipe, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"}
            )
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server of processes has ended"
        return json.loads(answer)

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
        self._folder.cleanup()


def serve() -> None:
    for name in json.loads(sys.argv[1]):
        importlib.import_module(name)
    gc.freeze()
    answers = os.dup(1)
    for line in sys.stdin:
        os.write(answers, f"{json.dumps(answer(json.loads(line)))}\n".encode())


def answer(request: dict[str, Any]) -> int | None:
    if "program" not in request:
        asked = request.get("poll", request.get("wait"))
        pid, status = os.waitpid(asked, os.WNOHANG if "poll" in request else 0)
        return os.waitstatus_to_exitcode(status) if pid else None
    pid = os.fork()
    if pid == 0:
        become(**request)
    return pid


def become(program: str, arguments: list[str], told: str, cwd: str, env: dict[str, str]) -> None:
    """Never returns."""
    for number, name in enumerate(("/dev/null", f"{told}/stdout", f"{told}/stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = ["-c", *arguments]
    main = sys.modules["__main__"] = ModuleType("__main__")
    code = 0
    try:
        exec(compile(program, "<string>", "exec"), vars(main))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
