"""Steps of whole models: ``pytest bench/test_training_step.py --benchmark-only``."""

from dataclasses import asdict

import pytest

pytestmark = pytest.mark.benchmark(group="training_step")


def test_training_step(record, measured, setting, training):
    samples = measured("training_step", setting)
    candidate, step = training
    if training not in samples:
        pytest.skip(f"{candidate} does not fit {setting.model}")
    record(samples[training], **asdict(setting), candidate=candidate, step=step)
