"""What the C library does with memory that is freed."""

import ctypes
import os

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_VARIABLES = "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_"


def keep_freed_memory() -> None:
    """Lets the process keep memory that it frees, up to 2 GiB, where the C library is glibc.

    Each step frees its activations, and the next one takes as much. If large blocks go back to the
    system in between, it must clear and map every page again. Peaks of memory grow by some per cent
    because blocks leave gaps. Does nothing if one of glibc's own environment variables is set.
    """
    change = None if os.name == "nt" else getattr(ctypes.CDLL(None), "mallopt", None)
    if change is None or any(name in os.environ for name in (*_VARIABLES, "GLIBC_TUNABLES")):
        return
    change(_MMAP_THRESHOLD, 2**30)
    change(_TRIM_THRESHOLD, 2**31 - 1)
    change(_TOP_PAD, 2**26)
