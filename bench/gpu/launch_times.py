"""The launches of a layer by ``triton`` as functions, so that each can be timed by itself."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bench import cases
from bench.gpu import launches, layer_bytes
from naslora_kernels.launches import Primitives
from naslora_kernels.triton.primitives import TritonPrimitives, capability, launch

WORKS = ("layer, forward", "layer, backward, weight step")


class Call(NamedTuple):
    """One launch on tensors that stay."""

    name: str
    run: Callable[[], None]
    bytes: int
    """What it reads and writes, each tensor once."""


class Recorder:
    """Primitives that launch, and keep every launch so that it can be repeated."""

    def __init__(self, primitives: Primitives) -> None:
        self.calls: list[Call] = []
        self._primitives, self._counter = primitives, layer_bytes.Counter(primitives)
        self.factor_partials = primitives.factor_partials
        self.cell_partials = primitives.cell_partials

    def __getattr__(self, primitive: str):
        compute, count = getattr(self._primitives, primitive), getattr(self._counter, primitive)

        def record(*arguments) -> None:
            run = partial(compute, *arguments)
            run()
            count(*arguments)
            launched = self._counter.launches[-1]
            name = f"{len(self.calls) + 1} {launched.kernel}"
            self.calls.append(Call(name, run, launched.read + launched.written))

        return record


def calls(case: tuple[cases.Shape, int], device: str) -> dict[str, list[Call]]:
    """The launches of ``WORKS`` by ``triton``, in bfloat16, by the name of the work."""
    operands = launches.Operands(*case, torch.bfloat16, device)
    found = {}
    for name in WORKS:
        recorder = Recorder(TritonPrimitives(launch, capability))
        launches.WORKS[name](recorder, operands)
        found[name] = recorder.calls
    return found
