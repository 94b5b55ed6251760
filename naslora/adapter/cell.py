"""The operation sets ("presets") of the search cell.

A cell is a module that owns the weights of its operations and knows three things: how to mix them
on a map, how the searched mixture collapses into one fixed module, and, where that exists, what it
does to a single token. ``PRESETS`` names them; adding one touches no kernel.
"""

import copy
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.annealing import annealed_alpha, annealed_kernel
from naslora.adapter.config import CellInit
from naslora.errors import UserError
from naslora_kernels import folded_cell, folded_convolution, mixed_cell
from naslora_kernels.operations import AVG_POOL, CONVOLUTIONS, MAX_POOL, SKIP


class Cell(Protocol):
    """What a preset provides; c is the number of channels that pass through the cell."""

    def forward(
        self, z: Tensor, alpha: Tensor, channels: Tensor | None, backend: str | None
    ) -> Tensor:
        """Eq. 3 on (B, H, W, r) maps; ``channels`` (c,) int64 or None for all."""

    def collapsed(self, alpha: Tensor) -> nn.Module:
        """The trained mixture as a fixed module on (B, H, W, c) maps, equal up to rounding."""

    def centre(self, alpha: Tensor) -> Tensor:
        """(c, c): what the mixture does to a token through its centre taps alone (Eq. 6)."""


class LinearCell(nn.Module):
    """Depthwise k x k then pointwise, without bias, norm or activation: the set that is fused.

    Parameters as ``naslora_kernels.mixed_cell`` takes them: ``dw_sep3``, ``dw_sep5``, ``dw_dil3``,
    ``dw_dil5`` of shape (c, k, k) and ``pw`` of shape (4, c, c).
    """

    # With this gain on the four convolutions, average, maximum and skip add up to one on a
    # locally constant map while alpha is uniform: (4 * 5/4 + 3) / 8 = 1.
    IDENTITY_GAIN = 5 / 4
    IDENTITY_NOISE = 0.02

    # How much of its neighbours a token gets. Annealing takes it from 1 to 0 (``annealing.py``).
    spatial = 1.0

    def __init__(self, channels: int, init: CellInit, generator: torch.Generator) -> None:
        super().__init__()
        make = self._near_identity if init == "identity" else self._kaiming
        for name, conv in zip(("sep3", "sep5", "dil3", "dil5"), CONVOLUTIONS, strict=True):
            setattr(self, f"dw_{name}", make(channels, conv.kernel, generator))
        if init == "identity":
            pw = torch.eye(channels).repeat(len(CONVOLUTIONS), 1, 1) * self.IDENTITY_GAIN
            pw += self.IDENTITY_NOISE * torch.randn(pw.shape, generator=generator)
        else:
            bound = channels**-0.5  # kaiming-uniform(a=sqrt(5)), PyTorch's start of a convolution
            pw = torch.empty(len(CONVOLUTIONS), channels, channels)
            pw.uniform_(-bound, bound, generator=generator)
        self.pw = nn.Parameter(pw)

    def _near_identity(self, channels: int, kernel: int, generator: torch.Generator):
        dw = self.IDENTITY_NOISE * torch.randn(channels, kernel, kernel, generator=generator)
        dw[:, kernel // 2, kernel // 2] += 1.0
        return nn.Parameter(dw)

    def _kaiming(self, channels: int, kernel: int, generator: torch.Generator):
        dw = torch.empty(channels, kernel, kernel)
        return nn.Parameter(dw.uniform_(-1 / kernel, 1 / kernel, generator=generator))

    @property
    def depthwise(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The depthwise kernels in the order of the operations."""
        return self.dw_sep3, self.dw_sep5, self.dw_dil3, self.dw_dil5

    def arguments(self, alpha: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """The logits, depthwise and pointwise kernels as ``mixed_cell`` takes them."""
        if self.spatial == 1.0:
            return alpha, self.depthwise, self.pw
        depthwise = tuple(annealed_kernel(dw, self.spatial) for dw in self.depthwise)
        return annealed_alpha(alpha, self.spatial), depthwise, self.pw

    def forward(
        self, z: Tensor, alpha: Tensor, channels: Tensor | None, backend: str | None = None
    ) -> Tensor:
        alpha, depthwise, pw = self.arguments(alpha)
        return mixed_cell(z, alpha, *depthwise, pw, channels, backend=backend)

    def collapsed(self, alpha: Tensor) -> nn.Module:
        mixture, kernel = self._folded(alpha)
        return FoldedCell(kernel.to(self.pw.dtype), mixture[[AVG_POOL, MAX_POOL]].to(alpha.dtype))

    def centre(self, alpha: Tensor) -> Tensor:
        # A pooling has no weights. Its centre tap is 1/9 for the average; the maximum has none.
        mixture, kernel = self._folded(alpha)
        middle = kernel.shape[-1] // 2
        average = mixture[AVG_POOL] / 9 * torch.eye(kernel.shape[0]).to(kernel)
        return kernel[:, :, middle, middle] + average

    @torch.no_grad()
    def _folded(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(8,) mixture and (c, c, 9, 9) kernel in float64."""
        alpha, depthwise, pw = self.arguments(alpha)
        mixture = alpha.double().softmax(0)
        return mixture, folded_convolution(mixture, [dw.double() for dw in depthwise], pw.double())


class FoldedCell(nn.Module):
    """A searched linear cell with the search gone: one convolution, and what pooling remains.

    Args:
        kernel: (c, c, k, k) with k odd, as ``conv2d`` takes it; cropped to its non-zero taps.
        pooling: (2,) the weights of average and maximum pooling; a zero weight costs nothing.

    Attributes:
        average: the first of them, where the host can read it.
        maximum: the second.
    """

    def __init__(self, kernel: Tensor, pooling: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", _crop(kernel).clone())
        self.register_buffer("pooling", pooling.clone())
        self.average, self.maximum = pooling.tolist()

    def _load_from_state_dict(self, *args) -> None:
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


class PaperCell(nn.Module):
    """ReLU, depthwise and pointwise convolution with bias, batch norm; that block twice.

    The operations whose parameter counts are the paper's: 168 c + 8 c^2 a layer.
    """

    def __init__(self, channels: int, init: CellInit, generator: torch.Generator) -> None:
        super().__init__()
        del init  # batch norm fixes the gain of these operations, whatever their weights are
        with torch.random.fork_rng(devices=[]):  # PyTorch's own start is drawn, and replaced below
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
    def _block(channels: int, conv) -> list[nn.Module]:
        depthwise = nn.Conv2d(
            channels, channels, conv.kernel, 1, conv.reach, conv.dilation, groups=channels
        )
        nn.init.zeros_(depthwise.bias)
        pointwise = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(pointwise.bias)
        return [nn.ReLU(), depthwise, pointwise, nn.BatchNorm2d(channels)]

    def forward(
        self, z: Tensor, alpha: Tensor, channels: Tensor | None, backend: str | None = None
    ) -> Tensor:
        del backend  # this set runs in plain PyTorch
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

    def __init__(self, cell: PaperCell, mixture: Tensor) -> None:
        super().__init__()
        self.cell = copy.deepcopy(cell).requires_grad_(False)
        self.register_buffer("mixture", mixture.clone())
        self.eval()

    def train(self, mode: bool = True) -> "FixedMixture":
        return super().train(False)

    def forward(self, z: Tensor) -> Tensor:
        """(B, H, W, c) to the same."""
        return self.cell.mix(z, self.mixture).to(z.dtype)


def restore_collapsed(tensors: dict[str, Tensor]) -> nn.Module:
    """The collapsed cell that ``tensors``, its state dict, belongs to."""
    if "kernel" in tensors:
        return FoldedCell(tensors["kernel"], tensors["pooling"])
    channels = tensors["cell.convolutions.0.1.bias"].shape[0]  # of the first depthwise convolution
    return FixedMixture(PaperCell(channels, "identity", torch.Generator()), tensors["mixture"])


PRESETS: dict[str, type[nn.Module]] = {"linear": LinearCell, "paper": PaperCell}


def build_cell(preset: str, channels: int, init: CellInit, generator: torch.Generator) -> nn.Module:
    """Builds the cell of a preset for ``channels`` channels, on the CPU in float32.

    Raises:
        UserError: there is no such preset.
    """
    if preset not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset](channels, init, generator)


def mixture_entropy(alpha: Tensor) -> float:
    """Entropy of softmax(alpha) in nats; ln 8 = 2.079 while the search has decided nothing."""
    mixture = alpha.detach().double().softmax(0)
    return float(torch.special.entr(mixture).sum())
