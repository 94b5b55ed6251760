"""Fixtures of the benchmarks: what is timed in turn, and what stands beside every number."""

import functools
import gc
import itertools

import pytest
import torch

from bench import attention, cases, models, suite
from bench.kinds import KINDS
from bench.models import Setting
from naslora.methods import METHODS
from naslora.sam.encoders import VITS, ViT

environment = functools.cache(cases.environment)


def pytest_addoption(parser):
    """What the benchmarks measure; all options but ``--rounds`` concern whole models."""
    group = parser.getgroup("naslora's benchmarks")
    on_gpu = torch.cuda.is_available()
    group.addoption("--models", help="encoders; default: vit_b,vit_t, or vit_h on a GPU")
    group.addoption("--image-size", type=int, default=1024 if on_gpu else 256, help="pixels")
    group.addoption("--batch", type=int, default=1 if on_gpu else 4, help="images a step")
    group.addoption(
        "--precision", choices=list(models.PRECISIONS), default="bf16" if on_gpu else "no"
    )
    group.addoption("--device", default="cuda" if on_gpu else "cpu")
    group.addoption("--methods", default=",".join(METHODS), help="default: all")
    group.addoption(
        "--stock", default="lora,conv-lora", help="which to measure on stock attention, too"
    )
    group.addoption("--compiled", default="", help="which to time through torch.compile, too")
    group.addoption("--rounds", type=int, default=5, help="measurements of each candidate")


def _runs_once(config):
    return config.getoption("benchmark_disable")


def _settings(config):
    """One setting an encoder; a tiny one where nothing is timed."""
    if _runs_once(config):
        return [Setting("vit_t", image_size=64, batch=4)]  # tokens enough to calibrate on
    names = config.getoption("models") or ("vit_h" if torch.cuda.is_available() else "vit_b,vit_t")
    rest = [config.getoption(name) for name in ("image_size", "batch", "precision", "device")]
    return [Setting(name, *rest) for name in names.split(",")]


def _listed(config, option):
    return [name for name in config.getoption(option).split(",") if name]


def _names(config):
    """The candidates of each group."""
    methods, stock = _listed(config, "methods"), _listed(config, "stock")
    return {
        "training_step": models.training_names(methods, stock, _listed(config, "compiled")),
        "inference": models.inference_names(methods),
        "memory": models.training_names(methods, stock),
    }


def _works(config):
    """The kernels' kinds, cases, directions and candidates."""
    for kind in KINDS.values():
        small = [attention.TINY] if _runs_once(config) and kind.name == "attention" else kind.cases
        candidates = ("cpp", *kind.others)
        for case, direction, name in itertools.product(small, cases.DIRECTIONS, candidates):
            if "compiled" not in name or case in cases.COMPILED_CASES:
                title = f"{kind.title(case)}-{direction}-{name}"
                yield pytest.param((kind, case, direction, name), id=title)


def pytest_generate_tests(metafunc):
    config = metafunc.config
    names = _names(config)
    if "setting" in metafunc.fixturenames:
        metafunc.parametrize("setting", _settings(config), ids=str, scope="session")
    if "work" in metafunc.fixturenames:
        metafunc.parametrize("work", list(_works(config)))
    if "training" in metafunc.fixturenames:
        training = names["training_step"]
        pairs = [(name, step) for name in training for step in models.training_steps(name)]
        metafunc.parametrize("training", pairs, ids=" ".join)
    if "inferring" in metafunc.fixturenames:
        metafunc.parametrize("inferring", names["inference"])
    if "keeping" in metafunc.fixturenames:
        metafunc.parametrize("keeping", names["memory"])


def pytest_collection_modifyitems(config, items):
    """The first test of a group measures the whole group, which can take longer than a test may."""
    if not _runs_once(config):
        for item in items:
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(scope="session", autouse=True)
def tiny_when_run_once(pytestconfig):
    """CI runs everything once; on a model that takes a blink."""
    with pytest.MonkeyPatch.context() as patch:
        if _runs_once(pytestconfig):
            patch.setitem(VITS, "vit_t", ViT(width=32, depth=2, heads=2, global_blocks=(1,)))
        yield


@pytest.fixture(scope="session")
def measured(pytestconfig):
    """``measured(group, setting)``: all candidates of a group, measured in turn, once a session."""
    names, methods = _names(pytestconfig), _listed(pytestconfig, "methods")
    rounds = 1 if _runs_once(pytestconfig) else pytestconfig.getoption("rounds")
    groups = {
        "kernels": lambda work: suite.time_kernels(*work, rounds),
        "training_step": lambda setting: suite.time_training(
            setting, names["training_step"], rounds
        ),
        "inference": lambda setting: suite.time_inference(setting, methods, rounds),
        "memory": lambda setting: suite.measure_memory(setting, names["memory"]),
    }

    @functools.cache
    def measure(group, setting):
        result = groups[group](setting)
        gc.collect()  # the models, before those of the next group are built
        return result

    return measure


@pytest.fixture
def record(benchmark):
    """Gives a test's benchmark the samples that were taken in turn with the others'.

    pytest-benchmark times one function at a time, and has no public door for samples.
    """

    def give(seconds, **about):
        benchmark.extra_info.update(about, **environment())
        benchmark._mode = "interleaved"
        if benchmark.enabled:
            stats = benchmark._make_stats(iterations=1)
            for sample in seconds:
                stats.update(sample)

    return give
