"""Fixtures of the kernel tests."""

import pytest
import torch


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills what torch.empty returns with NaN, so that reading it before writing it shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
