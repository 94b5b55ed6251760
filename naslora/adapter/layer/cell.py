"""The operation sets ("presets") of the search cell.

A cell is a module that owns the weights of its operations. It mixes the operations on a map,
collapses the searched mixture into one fixed module, and, where that exists, states what the
mixture does to a single token. ``PRESETS`` names the cells. A new preset changes no kernel.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.layer.config import CellInit
from naslora.errors import UserError
from naslora_kernels import folded_cell, folded_convolution, mixed_cell
from naslora_kernels.operations import (
    AVG_POOL,
    CONVOLUTIONS,
    MAX_POOL,
    NONE,
    SKIP,
    Convolution,
)

LEFT_OUT = -1e4
"""The logit of an operation that is left out. Its softmax and its gradient are exactly zero in any
precision, so weight decay cannot bring the operation back. Minus infinity would give NaN in Adam.
"""

Depthwise = tuple[Tensor, Tensor, Tensor, Tensor]
"""Depthwise kernels (c, k, k) in the order of the operations, k = 3, 5, 3, 5."""


class CellArguments(NamedTuple):
    """A linear cell's tensors, in the order in which the functions of naslora_kernels take them."""

    alpha: Tensor
    """(8,) logits."""
    dw_sep3: Tensor
    """(c, 3, 3) depthwise kernel, as the next three."""
    dw_sep5: Tensor
    dw_dil3: Tensor
    dw_dil5: Tensor
    pw: Tensor
    """(4, c, c) pointwise kernels as [operation, output, input]."""

    @property
    def depthwise(self) -> Depthwise:
        """The four depthwise kernels."""
        return self.dw_sep3, self.dw_sep5, self.dw_dil3, self.dw_dil5


class Cell(nn.Module, ABC):
    """What a preset provides. c is the number of channels that pass through the cell."""

    @abstractmethod
    def forward(
        self, z: Tensor, alpha: Tensor, channels: Tensor | None, backend: str | None = None
    ) -> Tensor:
        """Eq. 3 on (B, H, W, r) maps. ``channels`` is (c,) int64, or None for all."""

    @abstractmethod
    def collapsed(self, alpha: Tensor) -> nn.Module:
        """The trained mixture as a fixed module on (B, H, W, c) maps, equal up to rounding."""

    @abstractmethod
    def centre(self, alpha: Tensor) -> Tensor:
        """(c, c): what the mixture does to a token through its centre taps alone (Eq. 6).

        Raises:
            UserError: the operations have no such taps.
        """


# ---- Preset "linear" -----------------------------------------------------------------------------


class LinearCell(Cell):
    """Depthwise k x k, then pointwise, without bias, norm or activation: the preset of the kernels.

    Attributes:
        dw_sep3, dw_sep5, dw_dil3, dw_dil5: (c, k, k) depthwise kernels.
        pw: (4, c, c) pointwise kernels.
        spatial: share in [0, 1] of the neighbouring tokens in the mixture. ``annealing.py`` lowers
            it from 1 to 0. It is not part of the state dict.
    """

    # With this gain on the four convolutions, average, maximum and skip add up to one on a
    # locally constant map while alpha is uniform: (4 * 5/4 + 3) / 8 = 1. A greater weight of the
    # skip connection leaves the sum as it is, because the others sink together.
    IDENTITY_GAIN = 5 / 4
    IDENTITY_NOISE = 0.02

    def __init__(self, channels: int, init: CellInit, generator: torch.Generator) -> None:
        super().__init__()
        self.spatial = 1.0
        make = self._kaiming if init == "kaiming" else self._near_identity
        kernels = [make(channels, conv.kernel, generator) for conv in CONVOLUTIONS]
        self.dw_sep3, self.dw_sep5, self.dw_dil3, self.dw_dil5 = kernels
        if init != "kaiming":
            pw = torch.eye(channels).repeat(len(CONVOLUTIONS), 1, 1) * self.IDENTITY_GAIN
            pw += self.IDENTITY_NOISE * torch.randn(pw.shape, generator=generator)
        else:
            bound = channels**-0.5  # kaiming-uniform(a=sqrt(5)), PyTorch's start of a convolution
            pw = torch.empty(len(CONVOLUTIONS), channels, channels)
            pw.uniform_(-bound, bound, generator=generator)
        self.pw = nn.Parameter(pw)

    def _near_identity(
        self, channels: int, kernel: int, generator: torch.Generator
    ) -> nn.Parameter:
        dw = self.IDENTITY_NOISE * torch.randn(channels, kernel, kernel, generator=generator)
        dw[:, kernel // 2, kernel // 2] += 1.0
        return nn.Parameter(dw)

    def _kaiming(self, channels: int, kernel: int, generator: torch.Generator) -> nn.Parameter:
        dw = torch.empty(channels, kernel, kernel)
        return nn.Parameter(dw.uniform_(-1 / kernel, 1 / kernel, generator=generator))

    @property
    def depthwise(self) -> Depthwise:
        """The depthwise kernels in the order of the operations."""
        return self.dw_sep3, self.dw_sep5, self.dw_dil3, self.dw_dil5

    def arguments(self, alpha: Tensor) -> CellArguments:
        """What the kernels compute with: the cell's own tensors, or their annealed values."""
        if self.spatial == 1.0:
            return CellArguments(alpha, *self.depthwise, self.pw)
        sep3, sep5, dil3, dil5 = [annealed_kernel(dw, self.spatial) for dw in self.depthwise]
        return CellArguments(annealed_alpha(alpha, self.spatial), sep3, sep5, dil3, dil5, self.pw)

    def forward(
        self, z: Tensor, alpha: Tensor, channels: Tensor | None, backend: str | None = None
    ) -> Tensor:
        return mixed_cell(z, *self.arguments(alpha), channels, backend=backend)

    def collapsed(self, alpha: Tensor) -> nn.Module:
        mixture, kernel = self._folded(alpha)
        return FoldedCell(kernel.to(self.pw.dtype), mixture[[AVG_POOL, MAX_POOL]].to(alpha.dtype))

    def centre(self, alpha: Tensor) -> Tensor:
        # The centre tap of the average pooling is 1/9. The max-pooling has none.
        mixture, kernel = self._folded(alpha)
        middle = kernel.shape[-1] // 2
        average = mixture[AVG_POOL] / 9 * torch.eye(kernel.shape[0]).to(kernel)
        return kernel[:, :, middle, middle] + average

    @torch.no_grad()
    def _folded(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(8,) mixture and (c, c, 9, 9) kernel in float64."""
        arguments = self.arguments(alpha)
        mixture = arguments.alpha.double().softmax(0)
        depthwise = tuple(dw.double() for dw in arguments.depthwise)
        return mixture, folded_convolution(mixture, depthwise, arguments.pw.double())


def annealed_kernel(dw: Tensor, spatial: float) -> Tensor:
    """(c, k, k) with every tap except the centre multiplied by ``spatial``."""
    middle = dw.shape[-1] // 2
    centre = F.pad(dw[:, middle : middle + 1, middle : middle + 1], (middle,) * 4)
    return spatial * dw + (1 - spatial) * centre


def annealed_alpha(alpha: Tensor, spatial: float) -> Tensor:
    """(8,) logits of the mixture whose poolings have moved to their centre taps.

    With t = ``spatial`` in [0, 1), each pooling keeps the share t of its weight. The skip
    connection gets (1 - t) / 9 of the average pooling's weight, ``none`` gets the rest.
    """
    logs = alpha.log_softmax(0)
    kept = math.log(spatial) if spatial > 0 else LEFT_OUT
    lost = math.log(1 - spatial)
    average, maximum = logs[AVG_POOL], logs[MAX_POOL]
    to_none = torch.stack([logs[NONE], average + lost + math.log(8 / 9), maximum + lost])
    moved = {
        AVG_POOL: average + kept,
        MAX_POOL: maximum + kept,
        SKIP: torch.logaddexp(logs[SKIP], average + lost - math.log(9)),
        NONE: to_none.logsumexp(0),
    }
    return torch.stack([moved.get(i, logs[i]) for i in range(len(logs))])


class FoldedCell(nn.Module):
    """A searched linear cell as one convolution and two weighted poolings.

    Args:
        kernel: (c, c, k, k) with k odd, as ``conv2d`` takes it. It is cropped to its non-zero taps.
        pooling: (2,) the weights of average and maximum pooling. A zero weight costs nothing.

    Attributes:
        average: the first weight, as a number that the host can read without a copy.
        maximum: the second.
    """

    kernel: Tensor
    pooling: Tensor

    def __init__(self, kernel: Tensor, pooling: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", _crop(kernel).clone())
        self.register_buffer("pooling", pooling.clone())
        self.average, self.maximum = pooling.tolist()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.average, self.maximum = self.pooling.tolist()

    def forward(self, z: Tensor) -> Tensor:
        """(B, H, W, c) to the same."""
        return folded_cell(z, self.kernel, self.average, self.maximum)


def _crop(kernel: Tensor) -> Tensor:
    """Drops the outer rings of taps that are zero in every channel."""
    while kernel.shape[-1] > 1:
        ring = kernel.clone()
        ring[..., 1:-1, 1:-1] = 0
        if ring.any():
            break
        kernel = kernel[..., 1:-1, 1:-1]
    return kernel


# ---- Preset "paper" ------------------------------------------------------------------------------


class PaperCell(Cell):
    """Twice the block ReLU, depthwise and pointwise convolution with bias, batch norm.

    The parameter counts of these operations are the paper's: 168 c + 8 c^2 a layer.
    """

    def __init__(self, channels: int, init: CellInit, generator: torch.Generator) -> None:
        super().__init__()
        del init  # batch norm fixes the gain of these operations, whatever their weights are
        # The constructors draw from the global generator. Its state is restored, and the values
        # are replaced below.
        with torch.random.fork_rng(devices=[]):
            self.convolutions = nn.ModuleList(
                nn.Sequential(*self._block(channels, conv), *self._block(channels, conv))
                for conv in CONVOLUTIONS
            )
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 4:
                    bound = (parameter.shape[1] * parameter[0, 0].numel()) ** -0.5
                    parameter.copy_(
                        torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    )

    @staticmethod
    def _block(channels: int, conv: Convolution) -> list[nn.Module]:
        depthwise = nn.Conv2d(
            channels, channels, conv.kernel, 1, conv.reach, conv.dilation, groups=channels
        )
        pointwise = nn.Conv2d(channels, channels, 1)
        for convolution in (depthwise, pointwise):
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        return [nn.ReLU(), depthwise, pointwise, nn.BatchNorm2d(channels)]

    def forward(
        self, z: Tensor, alpha: Tensor, channels: Tensor | None, backend: str | None = None
    ) -> Tensor:
        del backend  # this preset is computed by plain PyTorch
        selected = z if channels is None else z.index_select(-1, channels)
        y = self.mix(selected, alpha.softmax(0)).to(z.dtype)
        return y if channels is None else z.index_copy(-1, channels, y)

    def mix(self, z: Tensor, mixture: Tensor) -> Tensor:
        """sum_i mixture_i O_i(z) on (B, H, W, c) maps."""
        maps = z.permute(0, 3, 1, 2).to(mixture.dtype)
        with torch.autocast(z.device.type, enabled=False):
            y = mixture[SKIP] * maps
            for i, operation in enumerate(self.convolutions):
                y = y + mixture[i] * operation(maps)
            y = y + mixture[AVG_POOL] * F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
            y = y + mixture[MAX_POOL] * F.max_pool2d(maps, 3, 1, 1)
        return y.permute(0, 2, 3, 1)

    def collapsed(self, alpha: Tensor) -> nn.Module:
        return FixedMixture(self, alpha.detach().softmax(0))

    def centre(self, alpha: Tensor) -> Tensor:
        raise UserError(
            "mode 'center' cannot fold the preset 'paper': its ReLU and batch norm are not linear; "
            "merge with mode 'exact', or train with the preset 'linear'"
        )


class FixedMixture(nn.Module):
    """A ``PaperCell`` after the search: its operations in evaluation mode at fixed weights."""

    mixture: Tensor

    def __init__(self, cell: PaperCell, mixture: Tensor) -> None:
        super().__init__()
        self.cell = copy.deepcopy(cell).requires_grad_(False)
        self.register_buffer("mixture", mixture.clone())
        self.eval()

    def train(self, mode: bool = True) -> "FixedMixture":
        """Stays in evaluation mode, so that the statistics of batch norm never move."""
        return super().train(False)

    def forward(self, z: Tensor) -> Tensor:
        """(B, H, W, c) to the same."""
        return self.cell.mix(z, self.mixture).to(z.dtype)


# ---- All presets ---------------------------------------------------------------------------------


def restore_collapsed(tensors: dict[str, Tensor], channels: int) -> nn.Module:
    """The collapsed cell of ``channels`` channels that ``tensors``, its state dict, belongs to."""
    if "kernel" in tensors:
        return FoldedCell(tensors["kernel"], tensors["pooling"])
    return FixedMixture(PaperCell(channels, "identity", torch.Generator()), tensors["mixture"])


PRESETS: dict[str, Callable[[int, CellInit, torch.Generator], Cell]] = {
    "linear": LinearCell,
    "paper": PaperCell,
}


def build_cell(preset: str, channels: int, init: CellInit, generator: torch.Generator) -> Cell:
    """Builds the cell of a preset for ``channels`` channels, on the CPU in float32."""
    return PRESETS[preset](channels, init, generator)


def mixture_entropy(alpha: Tensor) -> float:
    """Entropy of softmax(alpha) in nats. It is ln 8 = 2.079 while all weights are equal."""
    mixture = alpha.detach().double().softmax(0)
    return float(torch.special.entr(mixture).sum())
