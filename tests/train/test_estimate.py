"""The speed that estimates of time rest on."""

import os

import pytest

from graft.train.estimate import CORE_FLOPS, cpu_flops, on_this_cpu, threads


@pytest.mark.parametrize(("given", "found"), [("3", 3), ("0", None), ("", None), ("many", None)])
def test_speed_goes_with_the_threads_that_torch_computes_with(monkeypatch, given, found):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads() == found or (found is None and threads() == cores)
    assert cpu_flops() == CORE_FLOPS * threads()


def test_the_speed_is_said(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert on_this_cpu() == "on a CPU at 140 GFLOP/s"
