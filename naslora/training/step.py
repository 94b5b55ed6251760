"""The parts of an optimizer step, which all processes take together.

Gradients are sums over the images of the global batch, divided by its size. So a step does not
depend on how many processes or forward passes share the batch.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn

from naslora.training.run_config import Schedule

BUCKET = 1 << 23
"""Numbers of gradients that processes send each other at once: 32 MiB of float32."""
WARMUP_START = 0.01
"""Share of its rate at which a warm-up starts."""


def factor(schedule: Schedule, done: float, warmup: float = 0.0) -> float:
    """What a rate is multiplied by after the share ``done`` of all steps, in [0, 1].

    It rises over the share ``warmup``, then falls as ``schedule`` says.
    """
    if done < warmup:
        return WARMUP_START + (1 - WARMUP_START) * done / warmup
    done = (done - warmup) / (1 - warmup)
    if schedule == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1.0


def fitted_rate(travel: float, factors: Iterable[float], low: float, high: float) -> float:
    """The rate with which the rates of all steps add up to ``travel``, or the nearer bound.

    ``factors`` are what the rate is multiplied by in each step. Without steps it is ``high``.
    """
    total = sum(factors)
    return min(max(low, travel / total if total else high), high)


@dataclass(eq=False)
class Group:
    """The parameters that one kind of step trains, and their optimizer."""

    optimizer: torch.optim.Optimizer
    clip_norm: float
    """Largest norm of the group's gradients; 0 does not clip."""
    schedule: Schedule
    """How the optimizer's rates fall."""
    warmup: float = 0.0
    """Share of all steps over which they rise before."""

    def __post_init__(self) -> None:
        groups = self.optimizer.param_groups
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._rates = [group["lr"] for group in groups]

    def set_rates(self, done: float) -> None:
        """Sets the optimizer's rates to those after the share ``done`` of all steps."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor(self.schedule, done, self.warmup) * rate


class WeightAverage:
    """The exponential average (EMA) of parameters over about ``window`` steps.

    The first ``window`` steps count equally, so that a short run does not remember its start. Below
    1 the average is the last value. Each process averages the same values.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], window: float) -> None:
        def update(means: PARAM_LIST, values: PARAM_LIST, count: Tensor | int) -> None:
            steps = max(min(float(count) + 1, window), 1)
            get_ema_multi_avg_fn(1 - 1 / steps)(means, values, count)

        self.parameters = nn.ParameterList(parameters)
        self.means = AveragedModel(self.parameters, multi_avg_fn=update)

    def add_step(self) -> None:
        """Takes the parameters' values after a step into the average."""
        self.means.update_parameters(self.parameters)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Gives the parameters the averaged values while the body runs."""
        own = copy.deepcopy(self.parameters.state_dict())
        self.parameters.load_state_dict(self.means.module.state_dict())
        try:
            yield
        finally:
            self.parameters.load_state_dict(own)


class Compiled:
    """A function of tensors, compiled as one graph for the shape of the first call's last argument.

    Other shapes, such as the last batch of an epoch, run eagerly, so nothing is compiled for them.
    If the function does not compile, a warning says why, and all calls run eagerly. If it is
    ``captured``, its launches become CUDA graphs. Gradients then lie in the memory of the graphs
    until the next call, so each call's gradients must have been used before it.
    """

    def __init__(self, function: Callable[..., Any], captured: bool) -> None:
        mode = "reduce-overhead" if captured else None
        self._eager = function
        self._compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
        self._shape: torch.Size | None = None

    def __call__(self, *inputs: Any) -> Any:
        self._shape = self._shape or inputs[-1].shape
        if inputs[-1].shape != self._shape:
            return self._eager(*inputs)
        # Imported by torch.compile, which takes seconds.
        from torch._dynamo import exc
        from torch._functorch import config

        try:
            # With the forward, so that an error in it is caught here, too.
            with config.patch(force_non_lazy_backward_lowering=True):
                return self._compiled(*inputs)
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"training goes on without --compile: {reason}", stacklevel=2)
            self._compiled = self._eager
            return self._eager(*inputs)


@contextmanager
def without_gradients(groups: Sequence[Group]) -> Iterator[None]:
    """Lets the groups' parameters require no gradients while the body runs."""
    parameters = [parameter for group in groups for parameter in group.parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def sum_over_processes(groups: Sequence[Group], loss: Tensor, accelerator: Accelerator) -> float:
    """Sums the groups' gradients, in place, and the loss over the processes.

    Gradients travel in buckets, so that the copy in float32 stays small if a whole encoder trains.
    The loss travels with every bucket; the last sum counts.
    """
    if accelerator.num_processes == 1:
        return float(loss)
    parameters = [p for group in groups for p in group.parameters]
    for bucket in _buckets(parameters):
        # None: this process has no share of the batch.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([*(grad.flatten().float() for grad in grads), loss.reshape(1)])
        *summed, total = accelerator.reduce(flat, "sum").split([*map(Tensor.numel, grads), 1])
        for parameter, grad, sum_of_all in zip(bucket, grads, summed, strict=True):
            parameter.grad = grad.copy_(sum_of_all.view_as(grad))
    return float(total)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Cuts the parameters, in order, into lists of about BUCKET numbers; at least one list."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(map(Tensor.numel, bucket)) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    yield bucket


def apply_gradients(groups: Sequence[Group], scaler: torch.amp.GradScaler | None) -> None:
    """Clips the gradients, takes one step of each group's optimizer, and clears the gradients.

    Accelerate's own optimizers are not used: with fp16 they would end the loss scaling at the
    first of two groups.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    for group in groups:
        scaler.unscale_(group.optimizer)
        if group.clip_norm:
            nn.utils.clip_grad_norm_(group.parameters, group.clip_norm)
        scaler.step(group.optimizer)
        group.optimizer.zero_grad()
    scaler.update()


def average_batch_norms(model: nn.Module, accelerator: Accelerator) -> None:
    """Gives every process the same batch-norm statistics: the mean of what each has counted."""
    if accelerator.num_processes > 1:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.training:
                for statistic in (module.running_mean, module.running_var):
                    if statistic is not None:
                        statistic.copy_(accelerator.reduce(statistic, "mean"))
