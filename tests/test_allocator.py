"""Memory that a process frees stays with it."""

import platform

import pytest
from fresh_process import run_fresh

FAULTS = """
import resource
import torch
from naslora.allocator import keep_freed_memory

def take():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB: 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
take()
print(take())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these parameters")
@pytest.mark.parametrize("threshold", [None, "1048576"])
def test_freed_memory_is_mapped_again_only_if_the_user_says_so(threshold):
    result = run_fresh(FAULTS, MALLOC_MMAP_THRESHOLD_=threshold, GLIBC_TUNABLES=None)
    pages = int(result.out)
    assert pages < 100 if threshold is None else pages > 1000, result
