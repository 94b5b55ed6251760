"""The vision models of timm and transformers as hosts of the adapter: the table in docs/hosts.md.

A host is the smallest model of a module of timm, or the first one of a folder of transformers, that
computes on an image alone, the same each time, and has nn.Linear layers named qkv, or query, key,
value, or q_proj, k_proj, v_proj outside of a decoder. Its weights are random, its depth is cut if
the constructor allows it.

    python -m bench.experiments.hosts

It takes minutes on a core. Failures are printed, and the status is then 1.
"""

import copy
import importlib
import inspect
import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn

import naslora
from bench.families import Host, adapted, first, gradients, images, same_outputs, saves
from naslora.adapter.layer.targets import TARGETS

PAGE = Path(__file__).parents[2] / "docs/hosts.md"
LAYERS = r"^(?!.*decoder)(.*\.)?(qkv|query|key|value|[qkv]_proj)$"
SOURCE = r"qkv|query = |q_proj|Attention\w*\(|vision_transformer import"
SIZES = ("test", "atto", "femto", "pico", "nano", "xxs", "xs", "tiny", "_ti_", "mini", "s18")
SIZES += ("_s0", "_b0", "small", "base")
MOST = 2e8  # parameters of a model
TINY = dict.fromkeys(("num_hidden_layers", "encoder_layers", "num_layers", "depth"), 2)
TINY |= {"num_blocks": 1, "image_size": 128}
Builds = Iterator[Callable[[], tuple[nn.Module, int]]]  # a model, and the side of its images


def layers(model: nn.Module) -> list[str]:
    """The names of the layers to adapt."""
    linear = (name for name, module in model.named_modules() if type(module) is nn.Linear)
    return [name for name in linear if re.search(LAYERS, name)]


def parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def of_timm(module: str) -> Builds:
    """Ways to build the models of a module, the smallest first."""

    def build(name: str, side: int, **options: int) -> tuple[nn.Module, int]:
        return timm.create_model(name, **options), side

    def size(name: str) -> tuple[int, int]:
        return min((i for i, s in enumerate(SIZES) if s in name), default=len(SIZES)), len(name)

    for name in sorted(timm.list_models(module=module), key=size):
        with torch.device("meta"):
            model = timm.create_model(name)
        if layers(model) and parameters(model) < MOST:
            side = model.default_cfg["input_size"][-1]
            side = side if side <= 256 else 224
            for options in ({"depth": 2, "img_size": side}, {"depth": 2}, {"img_size": side}, {}):
                yield partial(build, name, side, **options)


def of_transformers(folder: str) -> Builds:
    """Ways to build the models of a folder that take an image first."""

    def build(kind: Any) -> tuple[nn.Module, int]:
        inputs = [*inspect.signature(kind.forward).parameters]
        assert inputs[1] == "pixel_values" and "input_ids" not in inputs
        config = kind.config_class()
        parts = [v for v in vars(config).values() if isinstance(v, transformers.PreTrainedConfig)]
        for part in (config, *parts):
            for name, value in TINY.items():
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, min(value, getattr(part, name)))
        with torch.device("meta"):
            assert parameters(kind(config)) < MOST
        side = getattr(getattr(config, "vision_config", config), "image_size", 224)
        return kind(config), side if isinstance(side, int) else side[0]

    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    for kind in list(vars(module).values()):
        own = inspect.isclass(kind) and kind.__module__ == module.__name__
        if own and issubclass(kind, transformers.PreTrainedModel) and kind.config_class:
            yield partial(build, kind)


@torch.no_grad()
def host(title: str, builds: Builds) -> Host | None:
    """The first model that is a host."""
    for build in builds:
        try:
            torch.manual_seed(0)
            model, side = build()
            for parameter in model.parameters():  # some layer scales start at 1e-6
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
            outputs = [first(model.eval()(images((side, side))[:1])) for _ in range(2)]
        except Exception:  # whatever a library raises for what a model does not take
            continue
        if layers(model) and torch.equal(*outputs) and outputs[0].any():
            # Random networks can make much of rounding, and detectors choose among near ties.
            with suppress(RuntimeError):  # some compute in float32 only
                copy.deepcopy(model).double()(images((side, side))[:1].double())
                model.double()
            named = any(re.search(TARGETS["qkv"], name) for name in layers(model))
            target, size = "qkv" if named else LAYERS, (side, side)
            return Host(title, lambda *_, model=model: copy.deepcopy(model), target, size=size)
    return None


def check(host: Host) -> str:
    """What came of it, or naslora's refusal without its numbers and its advice."""
    x = images(host.size)[:1].to(next(host.build(*host.size).parameters()).dtype)
    try:
        same_outputs(host, x)
        model = adapted(host, host.size)
        assert gradients(model, x), "a layer gets no gradient"
        assert saves(host, x), "the loaded adapter computes something else"
        with torch.no_grad():
            before = first(model(x))
            naslora.merge(model, "exact")
            rounding = 1e-5 * float(before.abs().max())
            torch.testing.assert_close(first(model(x)), before, rtol=0, atol=rounding)
    except ValueError as error:  # a UserError is one
        if "naslora/adapter" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        advised = re.search(r"prefix_tokens=(\d+)", str(error))
        if advised and host.prefix is None:
            return check(replace(host, prefix=int(advised[1])))
        return re.sub(r"\d+", "N", str(error).partition(";")[0])
    return "works" + ("" if host.prefix is None else f", `prefix_tokens={host.prefix}`")


def main() -> None:
    """Writes the table into the page, and prints what failed."""
    rows, failures = defaultdict(list), []
    sources = [("timm", path) for path in Path(timm.models.__path__[0]).glob("[a-z]*.py")]
    for path in Path(transformers.models.__path__[0]).glob("*/modeling_*.py"):
        if path.stem == f"modeling_{path.parent.name}" and "pixel_values" in path.read_text():
            sources.append(("transformers", path))
    for library, path in sorted(sources):
        name = path.stem.removeprefix("modeling_")
        builds = {"timm": of_timm, "transformers": of_transformers}[library]
        found = host(name, builds(name)) if re.search(SOURCE, path.read_text()) else None
        if found is not None:
            print(f"{library}: {name}", file=sys.stderr)
            try:
                key = library, "`qkv`" if found.target == "qkv" else "by names", check(found)
                rows[key].append(name)
            except Exception as error:
                failures.append(f"{library}: {name}: {type(error).__name__}: {error}")
    lines = ["| library | `target` | result | hosts |", "| -- | -- | -- | -- |"]
    lines += [f"| {' | '.join(key)} | {', '.join(names)} |" for key, names in sorted(rows.items())]
    text = PAGE.read_text().partition("<!-- table -->")[0]
    PAGE.write_text("\n".join([f"{text}<!-- table -->", "", *lines, ""]))
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
