"""What the C library does with memory that is freed."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt(3)


def keep_freed_memory() -> None:
    """Lets the process keep memory that it frees, up to 2 GiB, where the C library is glibc.

    Each step frees its activations, and the next one takes as much. If large blocks go back to the
    system in between, it must clear and map every page again. Peaks of memory grow by some per cent
    because blocks leave gaps. Does nothing if a variable of the environment sets glibc's own
    parameters (``MALLOC_...``, ``GLIBC_TUNABLES``).
    """
    change = None if os.name == "nt" else getattr(ctypes.CDLL(None), "mallopt", None)
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if change is not None and not chosen:
        change(_MMAP_THRESHOLD, 2**30)
        change(_TRIM_THRESHOLD, 2**31 - 1)
