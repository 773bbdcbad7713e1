"""What a step frees, the next one takes again without the system's help."""

import gc
import platform
import resource

import pytest
import torch

from graft.allocator import memory_kept, unsearched

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to keep")
SIZE = 48 << 20


def faults():
    """Pages that the system had to give while a large tensor was made ten times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(SIZE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_large_tensors_are_made_in_the_memory_of_those_before():
    pages = SIZE / resource.getpagesize()
    with memory_kept():
        faults()
        assert faults() < pages


def test_memory_goes_back_to_the_system_afterwards():
    def held():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    before = held()
    with memory_kept():
        tensors = [torch.ones(SIZE // 4) for _ in range(5)]
        del tensors
        assert held() > before + 2 * SIZE
    assert held() < before + SIZE


def test_nothing_is_searched_inside_and_it_is_as_before_behind():
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), unsearched():
        with unsearched():
            assert not gc.isenabled()
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()
