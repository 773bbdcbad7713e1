"""Members on several devices run at the same time: a thread for each device, which is its lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any, TypeVar

import torch

Answer = TypeVar("Answer")


class Lanes:
    """Runs calls, those of one lane in order, lanes beside each other. A copy has threads of its own."""

    def __init__(self) -> None:
        self._threads: dict[str, ThreadPoolExecutor] = {}

    def __reduce__(self) -> Any:
        return Lanes, ()

    def run(self, lanes: Sequence[str], calls: Sequence[Callable[[], Answer]]) -> list[Answer]:
        """What the calls return, each in its lane. The first lane is the caller's own thread.

        Gradients, autocast and CUDA streams are as the caller has them. Raises what a call raises, after all lanes have
        ended.
        """
        if len(set(lanes)) < 2:
            return [call() for call in calls]
        parts: dict[str, list[Callable[[], Answer]]] = {}
        for lane, call in zip(lanes, calls, strict=True):
            parts.setdefault(lane, []).append(call)
        first, *others = parts
        conduct = _Conduct(others)
        under_way = {lane: self._thread(lane).submit(conduct.run, parts[lane]) for lane in others}
        try:
            answers = {first: iter([call() for call in parts[first]])}
        finally:
            wait(under_way.values())
        answers |= {lane: iter(future.result()) for lane, future in under_way.items()}
        return [next(answers[lane]) for lane in lanes]

    def _thread(self, lane: str) -> ThreadPoolExecutor:
        if lane not in self._threads:
            self._threads[lane] = ThreadPoolExecutor(1, thread_name_prefix=f"graft-{lane}")
        return self._threads[lane]


class _Conduct:
    """What `torch` knows of the caller's thread only, taken over by the threads of these lanes."""

    def __init__(self, lanes: Sequence[str]):
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        devices = [torch.device(lane) for lane in lanes]
        self.streams = [torch.cuda.current_stream(device) for device in devices if device.type == "cuda"]
        kinds = {"cpu", *(device.type for device in devices)}
        self.casts = {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}

    def run(self, calls: Sequence[Callable[[], Answer]]) -> list[Answer]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for stream in self.streams:
                stack.enter_context(torch.cuda.stream(stream))
            for kind, dtype in self.casts.items():
                stack.enter_context(torch.autocast(kind, dtype))
            return [call() for call in calls]
