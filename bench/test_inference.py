"""A batch through whole models: ``pytest bench/test_inference.py --benchmark-only``."""

from dataclasses import asdict

import pytest

pytestmark = pytest.mark.benchmark(group="inference")


def test_inference(record, measured, setting, inferring):
    samples = measured("inference", setting)
    if inferring not in samples:
        pytest.skip(f"{inferring} does not fit {setting.model}")
    record(samples[inferring], **asdict(setting), candidate=inferring)
