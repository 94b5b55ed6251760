"""Fixtures of the benchmarks: what is timed in turn, and what stands beside every number."""

import functools
import gc
import itertools

import pytest
import torch

from bench import attention, cases, models, prompts, suite
from bench.kinds import KINDS
from bench.models import Setting
from naslora.allocator import keep_freed_memory
from naslora.methods import METHODS
from naslora.sam.vits import VITS, ViT


def pytest_addoption(parser):
    """What the benchmarks measure; all options but ``--rounds`` concern whole models."""
    group = parser.getgroup("naslora's benchmarks")
    on_gpu = torch.cuda.is_available()
    group.addoption("--models", help="encoders; default: vit_b,vit_t, or vit_h on a GPU")
    group.addoption("--image-size", type=int, default=1024 if on_gpu else 256, help="pixels")
    group.addoption("--batch", type=int, default=1 if on_gpu else 4, help="images a step")
    precision, device = ("bf16", "cuda") if on_gpu else ("no", "cpu")
    group.addoption("--precision", choices=list(models.PRECISIONS), default=precision)
    group.addoption("--device", default=device)
    group.addoption("--methods", default=",".join(METHODS), help="default: all")
    group.addoption("--stock", default="lora,conv-lora", help="which on stock attention, too")
    group.addoption("--compiled", default="", help="which to time through torch.compile, too")
    group.addoption("--targets", default="", help="what else the methods adapt, e.g. mlp,all")
    group.addoption("--rounds", type=int, default=5, help="measurements of each candidate")
    group.addoption("--keep-memory", action="store_true", help="as the commands of naslora do")


def pytest_configure(config):
    """Lets all candidates keep the memory that they free, if asked to."""
    if config.getoption("keep_memory"):
        keep_freed_memory()


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


def _training(config, *more):
    return models.training_names(*(_listed(config, name) for name in ("methods", "stock", *more)))


def _entries(config, group):
    """What a group measures together, and the candidate and the step of each entry of it."""
    if group == "kernels":
        for kind in KINDS.values():
            tiny = _runs_once(config) and kind.name == "attention"
            for case in [attention.TINY] if tiny else kind.cases:
                candidates = ("cpp", *kind.others)
                for direction, name in itertools.product(cases.DIRECTIONS, candidates):
                    if "compiled" not in name or case in cases.COMPILED_CASES:
                        title = f"{kind.title(case)}-{direction}-{name}"
                        yield title, (kind, case, direction), (name, direction)
        return
    if group == "training_step":
        names = _training(config, "compiled", "targets")
        keys = [(name, step) for name in names for step in models.training_steps(name)]
        keys.append((models.FLOOR, "weights"))
    elif group == "promptable_step":
        keys = [prompts.SEMANTIC, *((prompts.PROMPTABLE, step) for step in prompts.STEPS)]
    elif group == "memory":
        keys = [(name, "memory") for name in _training(config)]
    else:
        names = models.inference_names(_listed(config, "methods"))
        keys = [(name, "inference") for name in names]
    for setting, (name, step) in itertools.product(_settings(config), keys):
        yield f"{setting}-{name} {step}", setting, (name, step)


def pytest_generate_tests(metafunc):
    if "entry" in metafunc.fixturenames:
        group = metafunc.definition.get_closest_marker("benchmark").kwargs["group"]
        titles, *values = zip(*_entries(metafunc.config, group), strict=True)
        metafunc.parametrize("of,key", list(zip(*values, strict=True)), ids=titles)
    elif "setting" in metafunc.fixturenames:
        metafunc.parametrize("setting", _settings(metafunc.config), ids=str, scope="session")


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
    """``measured(group, of)``: all entries of a group, measured in turn, once a session."""
    rounds = 1 if _runs_once(pytestconfig) else pytestconfig.getoption("rounds")
    methods = _listed(pytestconfig, "methods")
    names, training = _training(pytestconfig), _training(pytestconfig, "compiled", "targets")
    groups = {
        "kernels": lambda work: suite.time_kernels(*work, rounds),
        "training_step": lambda setting: suite.time_training(setting, training, rounds),
        "promptable_step": lambda setting: suite.time_prompts(setting, rounds),
        "inference": lambda setting: suite.time_inference(setting, methods, rounds),
        "memory": lambda setting: suite.measure_memory(setting, names),
    }

    @functools.cache
    def measure(group, of):
        result = groups[group](of)
        gc.collect()  # the models, before those of the next group are built
        return result

    return measure


@pytest.fixture
def entry(benchmark, measured, of, key):
    """Gives a test's benchmark the samples that were taken in turn with the others'.

    pytest-benchmark times one function at a time, and has no public door for samples.
    """

    def give():
        found = measured(benchmark.group, of)
        if key not in found:
            pytest.skip(f"{key[0]} does not fit the model, or is not installed")
        seconds, about = found[key]
        benchmark.group = about.get("group", benchmark.group)
        benchmark.extra_info.update(about, **cases.environment(), candidate=key[0], step=key[1])
        benchmark._mode = "interleaved"
        if benchmark.enabled:
            stats = benchmark._make_stats(iterations=1)
            for sample in seconds:
                stats.update(sample)

    return give
