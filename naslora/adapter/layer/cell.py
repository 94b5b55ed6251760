"""The operation sets ("presets") of the search cell.

A cell is a module that owns the weights of its operations. It mixes the operations on a map,
collapses the searched mixture into one fixed module, and, where that exists, states what the
mixture does to a single token. ``PRESETS`` names the cells. A new preset changes no kernel.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.layer.config import CellInit
from naslora.errors import UserError
from naslora_kernels import folded_cell, folded_convolution, mixed_cell
from naslora_kernels.cell import Cell as CellTensors
from naslora_kernels.operations import AVG_POOL, CONVOLUTIONS, MAX_POOL, NONE, SKIP, Convolution

LEFT_OUT = -1e4
"""The logit of an operation that is left out. Its softmax and its gradient are exactly zero in any
precision, so weight decay cannot bring the operation back. Minus infinity would give NaN in Adam.
"""


def _uniform(tensor: Tensor, fan_in: int, generator: torch.Generator) -> Tensor:
    bound = fan_in**-0.5
    return tensor.uniform_(-bound, bound, generator=generator)


# ---- Preset "linear" -----------------------------------------------------------------------------


class LinearCell(nn.Module):
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

        def start(identity: Tensor, fan_in: int) -> nn.Parameter:
            drawn = torch.empty(identity.shape)
            if init == "kaiming":  # kaiming-uniform(a=sqrt(5)), PyTorch's start of a convolution
                return nn.Parameter(_uniform(drawn, fan_in, generator))
            return nn.Parameter(identity + self.IDENTITY_NOISE * drawn.normal_(generator=generator))

        centre = torch.ones(channels, 1, 1)
        self.dw_sep3, self.dw_sep5, self.dw_dil3, self.dw_dil5 = (
            start(F.pad(centre, (conv.kernel // 2,) * 4), conv.kernel**2) for conv in CONVOLUTIONS
        )
        identity = self.IDENTITY_GAIN * torch.eye(channels)
        self.pw = start(identity.expand(len(CONVOLUTIONS), -1, -1), channels)

    @property
    def depthwise(self) -> tuple[Tensor, ...]:
        """The depthwise kernels in the order of the operations."""
        return self.dw_sep3, self.dw_sep5, self.dw_dil3, self.dw_dil5

    def tensors(self, alpha: Tensor, channels: Tensor | None = None) -> CellTensors:
        """What the kernels compute with: the cell's own tensors, or their annealed values."""
        sep3, sep5, dil3, dil5 = self.depthwise
        if self.spatial != 1.0:
            sep3, sep5, dil3, dil5 = [annealed_kernel(dw, self.spatial) for dw in self.depthwise]
            alpha = annealed_alpha(alpha, self.spatial)
        return CellTensors(alpha, sep3, sep5, dil3, dil5, self.pw, channels)

    def forward(
        self, z: Tensor, alpha: Tensor, channels: Tensor | None, backend: str | None = None
    ) -> Tensor:
        """Eq. 3 on (B, H, W, r) maps. ``channels`` is (c,) int64, or None for all."""
        cell = self.tensors(alpha, channels)
        if torch.jit.is_tracing():
            # The tracer cannot record the kernels. The checks of ``mixed_cell`` read values, and a
            # repeated call skips some, so the tracer would find two different graphs.
            from naslora_kernels import reference  # a backend, so it is imported when it is needed

            return reference.mixed_cell(z, cell)
        return mixed_cell(z, *cell, backend=backend)

    def collapsed(self, alpha: Tensor) -> nn.Module:
        """The trained mixture as a fixed module on (B, H, W, c) maps, equal up to rounding."""
        mixture, kernel = self._folded(alpha)
        return FoldedCell(kernel.to(self.pw.dtype), mixture[[AVG_POOL, MAX_POOL]].to(alpha.dtype))

    def centre(self, alpha: Tensor) -> Tensor:
        """(c, c): what the mixture does to a token through its centre taps alone (Eq. 6).

        The centre tap of the average pooling is 1/9. The max-pooling has none.
        """
        mixture, kernel = self._folded(alpha)
        middle = kernel.shape[-1] // 2
        average = mixture[AVG_POOL] / 9 * torch.eye(kernel.shape[0]).to(kernel)
        return kernel[:, :, middle, middle] + average

    @torch.no_grad()
    def _folded(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(8,) mixture and (c, c, 9, 9) kernel in float64."""
        cell = self.tensors(alpha)
        mixture = cell.alpha.double().softmax(0)
        depthwise = tuple(dw.double() for dw in cell.depthwise)
        return mixture, folded_convolution(mixture, depthwise, cell.pw.double())


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


class PaperCell(nn.Module):
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
            for module in self.modules():
                if isinstance(module, nn.Conv2d) and module.bias is not None:
                    _uniform(module.weight, module.weight[0].numel(), generator)
                    module.bias.zero_()

    @staticmethod
    def _block(channels: int, conv: Convolution) -> list[nn.Module]:
        depthwise = nn.Conv2d(
            channels, channels, conv.kernel, 1, conv.reach, conv.dilation, groups=channels
        )
        return [nn.ReLU(), depthwise, nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)]

    def forward(
        self, z: Tensor, alpha: Tensor, channels: Tensor | None, backend: str | None = None
    ) -> Tensor:
        """As ``LinearCell.forward``, in plain PyTorch."""
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
        """As ``LinearCell.collapsed``."""
        return FixedMixture(self, alpha.detach().softmax(0))

    def centre(self, alpha: Tensor) -> Tensor:
        """Refuses: the operations have no such taps.

        Raises:
            UserError: always.
        """
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


Cell = LinearCell | PaperCell
PRESETS: dict[str, type[Cell]] = {"linear": LinearCell, "paper": PaperCell}


def mixture_entropy(alpha: Tensor) -> float:
    """Entropy of softmax(alpha) in nats. It is ln 8 = 2.079 while all weights are equal."""
    mixture = alpha.detach().double().softmax(0)
    return float(torch.special.entr(mixture).sum())
