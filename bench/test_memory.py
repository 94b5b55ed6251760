"""Bytes of a training step: ``pytest bench/test_memory.py --benchmark-only``.

They stand in the entry's ``extra_info``; its seconds are those of one step that was counted.
"""

import pytest

pytestmark = pytest.mark.benchmark(group="memory")


def test_memory(record, measured, setting, method):
    bytes_of = measured("memory", setting)
    if method not in bytes_of:
        pytest.skip(f"{method} does not fit {setting.model}")
    seconds, numbers = bytes_of[method]
    record(setting, [seconds], contestant=method, **numbers)
