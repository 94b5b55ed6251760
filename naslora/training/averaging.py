"""Averaged weights (EMA), kept by torch's ``AveragedModel`` beside those that train."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """The exponential average of parameters over about ``window`` steps.

    The first ``window`` steps count equally, so that a short run does not remember its start.

    Args:
        parameters: what is averaged. Each process averages the same values.
        window: a number of steps; below 1 the average is the last value.
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
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._set(list(self.means.parameters()))
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
