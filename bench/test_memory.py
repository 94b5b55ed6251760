"""Bytes of a training step: ``pytest bench/test_memory.py --benchmark-only``.

They stand in the entry's ``extra_info``; its seconds are those of one step that was counted.
"""

from dataclasses import asdict

import pytest

pytestmark = pytest.mark.benchmark(group="memory")


def test_memory(record, measured, setting, keeping):
    bytes_of = measured("memory", setting)
    if keeping not in bytes_of:
        pytest.skip(f"{keeping} does not fit {setting.model}")
    seconds, numbers = bytes_of[keeping]
    record([seconds], **asdict(setting), candidate=keeping, **numbers)
