"""NASLoRALinear: a frozen nn.Linear with a searchable low-rank adapter beside it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.cell import LinearCell, build_cell
from naslora.adapter.config import NASLoRAConfig
from naslora_kernels import OPERATIONS, nas_lora_linear

ALPHA_INIT_STD = 1e-3  # the paper's start of alpha: a standard normal scaled by 0.001

# The logit of an operation that is left out. Its softmax is exactly zero, and so is its gradient,
# in any precision; weight decay cannot bring it back. Minus infinity would turn to NaN in Adam.
LEFT_OUT = -1e4


class NASLoRALinear(nn.Module):
    """A drop-in for the nn.Linear it wraps: h = W0 x + b0 + s W_d cell(W_e x) (paper, Eq. 3).

    Takes (B, H, W, C_in), or (B, N, C_in) with N a square number or ``grid`` set to (H, W), and
    returns the same shape with C_out channels. lora_B starts at zero, so a fresh layer computes
    what its base computes.

    Attributes:
        base: the frozen nn.Linear.
        lora_A: (r, C_in) encoder W_e; kaiming-uniform(a=sqrt(5)).
        lora_B: (C_out, r) decoder W_d; zero.
        alpha: (8,) architecture logits, or None for plain LoRA (channel_ratio 0).
        cell: the operations' weights, or None for plain LoRA.
        channels: (c,) int64, the channels that pass through the cell.
        grid: (H, W) of token sequences that are not square, or None.
        config: the configuration it was made with.
    """

    def __init__(
        self, base: nn.Linear, config: NASLoRAConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        generator = generator or torch.Generator().manual_seed(config.seed)
        self.base = base
        self.config = config
        self.rank = config.rank
        self.scaling = config.scaling
        self.backend = config.backend
        self.grid: tuple[int, int] | None = None
        bound = base.in_features**-0.5  # kaiming-uniform(a=sqrt(5)) of a (r, C_in) matrix
        lora_A = torch.empty(self.rank, base.in_features)
        self.lora_A = nn.Parameter(lora_A.uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, self.rank))
        self._add_cell(config, generator)
        self._match_base()
        base.requires_grad_(False)  # last, so that an impossible configuration changes nothing

    def _add_cell(self, config: NASLoRAConfig, generator: torch.Generator) -> None:
        c = config.cell_channels
        self.register_buffer("channels", torch.arange(c))
        self.alpha: nn.Parameter | None = None
        self.cell: nn.Module | None = None
        if c > 0:
            if config.channel_selection != "first":
                self.draw_channels(generator)
            alpha = torch.randn(len(OPERATIONS), generator=generator)
            alpha *= ALPHA_INIT_STD
            if config.operations is not None:
                left_out = [i for i, name in enumerate(OPERATIONS) if name not in config.operations]
                alpha[left_out] = LEFT_OUT
            self.alpha = nn.Parameter(alpha)
            self.cell = build_cell(config.preset, c, config.cell_init, generator)

    def _match_base(self) -> None:
        """Moves the adapter to the base's device and dtype; beside 16-bit weights it is float32."""
        weight = self.base.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for name, parameter in list(self.named_parameters(recurse=False)):
            setattr(self, name, nn.Parameter(parameter.detach().to(weight.device, dtype)))
        self.channels = self.channels.to(weight.device)
        if self.cell is not None:
            self.cell.to(weight.device, dtype)

    @torch.no_grad()
    def draw_channels(self, generator: torch.Generator) -> None:
        """Draws the channels that pass through the cell anew, in rising order."""
        drawn = torch.randperm(self.rank, generator=generator)[: self.channels.shape[0]]
        self.channels.copy_(drawn.sort().values)

    @property
    def in_features(self) -> int:
        """C_in, as of the nn.Linear."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """C_out, as of the nn.Linear."""
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """The frozen weight; code that reads a linear layer's device or dtype finds it here."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) or (B, N, C_in) to the same with C_out.

        Raises:
            ValueError: any other shape, or N neither square nor the declared grid.
        """
        tokens = self._as_grid(x)
        if self.cell is None or isinstance(self.cell, LinearCell):
            h = self._fused(tokens)
        else:
            h = self.base(tokens) + self._update(tokens)
        return h.reshape(*x.shape[:-1], self.out_features)

    def _fused(self, tokens: Tensor) -> Tensor:
        if self.cell is None:
            alpha, weights = _empty_cell(self.lora_A)
        else:
            alpha, depthwise, pw = self.cell.arguments(self.alpha)
            weights = (*depthwise, pw)
        return nas_lora_linear(
            tokens,
            self.base.weight,
            self.base.bias,
            self.lora_A,
            self.lora_B,
            alpha,
            *weights,
            None if self.channels.shape[0] == self.rank else self.channels,
            self.scaling,
            backend=self.backend,
        )

    def mixed(self, x: Tensor) -> Tensor:
        """What the decoder gets: y = cell(W_e x), (B, H, W, r); shapes of x as ``forward``."""
        return self._mixed(self._as_grid(x))

    def centre(self) -> Tensor:
        """(r, r) float64: what the cell does to a token through its centre taps alone (Eq. 6).

        Raises:
            UserError: the operation set has no such taps.
        """
        token_map = torch.eye(self.rank, dtype=torch.float64, device=self.lora_A.device)
        if self.cell is not None:
            centre = self.cell.centre(self.alpha).double()
            token_map[self.channels[:, None], self.channels[None, :]] = centre
        return token_map

    def folded(self, linear_map: Tensor, offset: Tensor | None = None) -> nn.Linear:
        """nn.Linear with W0 + s W_d L and b0 + s W_d g, summed in float64.

        Args:
            linear_map: (r, C_in) float64, L.
            offset: (r,) float64, g; None, or a layer without a bias, takes none.
        """
        base = self.base
        merged = nn.utils.skip_init(
            nn.Linear,
            base.in_features,
            base.out_features,
            bias=base.bias is not None,
            device=base.weight.device,
            dtype=base.weight.dtype,
        ).requires_grad_(False)
        decoder = self.scaling * self.lora_B.double()
        with torch.no_grad():
            merged.weight.copy_(base.weight.double() + decoder @ linear_map)
            if base.bias is not None:
                shift = 0.0 if offset is None else decoder @ offset
                merged.bias.copy_(base.bias.double() + shift)
        return merged

    def update(self, x: Tensor) -> Tensor:
        """The adapter's part of the output alone: s W_d cell(W_e x); shapes as ``forward``."""
        return self._update(self._as_grid(x)).reshape(*x.shape[:-1], self.out_features)

    def _update(self, tokens: Tensor) -> Tensor:
        y = self._mixed(tokens)
        return self.scaling * F.linear(y, self.lora_B.to(y.dtype))

    def _mixed(self, tokens: Tensor) -> Tensor:
        z = F.linear(tokens, self.lora_A.to(tokens.dtype))  # (B, H, W, r)
        if self.cell is None:
            return z
        channels = None if self.channels.shape[0] == self.rank else self.channels
        return self.cell(z, self.alpha, channels, self.backend)

    def _as_grid(self, x: Tensor) -> Tensor:
        if self.cell is None:  # without a cell tokens have no neighbours: any shape will do
            return x.reshape(-1, 1, 1, x.shape[-1])
        return as_grid(x, self.grid)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, cell_channels={self.channels.shape[0]}, scaling={self.scaling:g}"


def as_grid(x: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Views (B, N, C) tokens as a (B, H, W, C) grid; leaves a grid as it is.

    Raises:
        ValueError: another number of dimensions, or N neither square nor the declared grid.
    """
    if x.dim() == 4:
        return x
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, H, W, C_in) or (B, N, C_in), got {tuple(x.shape)}")
    height, width = grid or (math.isqrt(x.shape[1]),) * 2
    if height * width != x.shape[1]:
        raise ValueError(
            f"x: {x.shape[1]} tokens are no {height} x {width} grid; set the layer's `grid` to "
            "(H, W), or leave out layers that see extra tokens"
        )
    return x.reshape(x.shape[0], height, width, x.shape[2])


def _empty_cell(like: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The arguments of a cell on no channels: the kernels then compute plain LoRA."""
    alpha = like.new_zeros(len(OPERATIONS))
    weights = tuple(like.new_zeros(0, k, k) for k in (3, 5, 3, 5))
    return alpha, (*weights, like.new_zeros(4, 0, 0))
