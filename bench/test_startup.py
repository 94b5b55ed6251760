"""What happens once: ``pytest bench/test_startup.py --benchmark-only``."""

import subprocess
import sys

import pytest

from bench import models
from naslora import load_adapter, save_adapter, unmerge
from naslora.methods import apply, merge

pytestmark = pytest.mark.benchmark(group="startup")
STARTS = {
    "torch": ("-c", "import torch"),
    "naslora_kernels": ("-c", "import naslora_kernels"),
    "naslora.inject": ("-c", "from naslora import inject"),
    "naslora --help": ("-m", "naslora", "--help"),
}
METHODS = ("lora", "nas-pc-lora")


@pytest.fixture(scope="module")
def base(setting):
    return models.untouched(setting)


@pytest.fixture
def once(benchmark, setting, pytestconfig):
    """Times a function that changes what it is given, which ``setup`` makes anew."""

    def run(function, setup):
        rounds = min(5, pytestconfig.getoption("rounds"))
        benchmark.extra_info.update(model=setting.model, image_size=setting.image_size)
        return benchmark.pedantic(function, setup=lambda: ((setup(),), {}), rounds=rounds)

    return run


@pytest.mark.parametrize("start", STARTS)
def test_import(benchmark, start):
    """In a fresh interpreter, which takes its own time; ``torch`` alone is for comparison."""
    command = [sys.executable, *STARTS[start]]
    options = {"check": True, "stdout": subprocess.DEVNULL}
    benchmark.pedantic(subprocess.run, (command,), options, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("name", METHODS)
def test_inject(once, base, name):
    once(lambda model: apply(name, model), lambda: models.sharing_copy(base))


@pytest.mark.parametrize("name", METHODS)
def test_save(once, base, name, tmp_path):
    model = models.adapted(name, base)
    once(lambda model: save_adapter(model, tmp_path), lambda: model)
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("name", METHODS)
def test_load(once, base, name, tmp_path):
    save_adapter(models.adapted(name, base), tmp_path)
    once(lambda model: load_adapter(model, tmp_path), lambda: models.sharing_copy(base))


@pytest.mark.parametrize(("name", "mode"), [("lora", "exact"), ("nas-pc-lora", "exact")])
def test_merge(once, base, name, mode):
    """On white noise; errors on calibration images cost the forwards of those images."""
    model, merged = models.adapted(name, base), []

    def restore():
        if merged:
            unmerge(model)
        return model

    once(lambda model: merged.append(merge(model, mode)), restore)
    assert merged[-1].max_update_error < 1e-3
