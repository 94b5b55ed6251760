"""NASLoRALinear: a frozen nn.Linear with a searchable low-rank adapter beside it."""

import copy
import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from naslora.adapter.layer.adapted import AdaptedLinear
from naslora.adapter.layer.cell import LEFT_OUT, PRESETS, Cell, LinearCell
from naslora.adapter.layer.config import NASLoRAConfig
from naslora_kernels import OPERATIONS, nas_lora_linear
from naslora_kernels.cell import Cell as CellTensors
from naslora_kernels.operations import SKIP

ALPHA_INIT_STD = 1e-3  # the paper starts alpha from a standard normal scaled by 0.001


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A layer's own stream of random numbers, a function of the seed and the layer's name.

    Every low-rank method draws lora_A first. So methods with equal seeds and ranks start from equal
    lora_A in every layer, whatever else they draw.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def draw_lora_A(rank: int, in_features: int, generator: torch.Generator) -> Tensor:
    """(rank, in_features) start of W_e: kaiming-uniform(a=sqrt(5)), as in PEFT."""
    bound = in_features**-0.5
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


class NASLoRALinear(AdaptedLinear):
    """A drop-in for the nn.Linear it wraps: h = W0 x + b0 + s W_d cell(W_e x) (paper, Eq. 3).

    Takes (B, H, W, C_in), or (B, N, C_in), and returns the same shape with C_out channels. N tokens
    are ``grid``, or else what ``hint`` states, or else a square. The first ``prefix_tokens`` of
    them are no part of the grid: they get W0 x + b0 + s W_d W_e x. lora_B starts at zero, so a
    fresh layer computes what its base computes.

    The adapter computes in float32 beside 16-bit weights. ``half``, ``bfloat16`` and ``to`` cast
    ``base`` alone; float64 casts all.

    Args:
        base: the nn.Linear to adapt. It is frozen.
        config: the adapter's settings.
        generator: where the random numbers come from; None seeds one with 0.

    Attributes:
        lora_A: (r, C_in) encoder W_e; kaiming-uniform(a=sqrt(5)).
        lora_B: (C_out, r) decoder W_d; zero.
        alpha: (8,) architecture logits, or None for plain LoRA (channel_ratio 0).
        cell: the operations' weights, or None for plain LoRA.
        channels: (c,) int64, the channels that pass through the cell.
        config: the configuration it was made with.
        in_features, out_features: C_in and C_out.

    Raises:
        UserError: there is no such preset.
    """

    channels: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    alpha: nn.Parameter | None
    cell: Cell | None

    def __init__(
        self, base: nn.Linear, config: NASLoRAConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        generator = generator or torch.Generator().manual_seed(0)
        self.base = base
        self.config = config
        self.scaling = config.scaling
        self.rank = config.rank
        self.in_features, self.out_features = base.in_features, base.out_features
        self.backend = config.backend
        self.prefix_tokens = config.prefix_tokens or 0
        self.lora_A = nn.Parameter(draw_lora_A(self.rank, base.in_features, generator))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, self.rank))
        self._add_cell(config, generator)
        self.follow_base()
        base.requires_grad_(False)  # last, so that an impossible configuration changes nothing

    def _add_cell(self, config: NASLoRAConfig, generator: torch.Generator) -> None:
        c = config.cell_channels
        self.all_channels = c == self.rank
        self.register_buffer("channels", torch.arange(c))
        self.alpha = None
        self.cell = None
        if c > 0:
            if config.channel_selection != "first":
                self.draw_channels(generator)
            alpha = ALPHA_INIT_STD * torch.randn(len(OPERATIONS), generator=generator)
            if config.cell_init == "skip":
                alpha[SKIP] += config.skip_lead
            if config.operations is not None:
                left_out = [i for i, name in enumerate(OPERATIONS) if name not in config.operations]
                alpha[left_out] = LEFT_OUT
            self.alpha = nn.Parameter(alpha)
            self.cell = PRESETS[config.preset](c, config.cell_init, generator)

    def follow_base(self) -> None:
        """Moves the adapter to the base's device and dtype. Beside 16-bit weights it is float32."""
        weight = self.base.weight
        self._cast(lambda t: t.to(weight.device, weight.dtype if t.is_floating_point() else None))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NASLoRALinear":
        if recurse:
            self.base._apply(fn)
        self._cast(fn, recurse)
        return self

    def _cast(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
        """Applies a cast or move to the adapter, without casts to 16 bit.

        Alpha and the adapter's weights train in float32. In 16 bit their small steps are lost, and
        Adam's become NaN.
        """

        def applied(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if not result.is_floating_point():
                return result
            dtype = torch.promote_types(result.dtype, torch.float32)
            return result if dtype == result.dtype else tensor.to(result.device, dtype)

        super()._apply(applied, recurse=False)
        if recurse and self.cell is not None:
            self.cell._apply(applied)

    @torch.no_grad()
    def draw_channels(self, generator: torch.Generator) -> None:
        """Draws new channels that pass through the cell, in rising order."""
        drawn = torch.randperm(self.rank, generator=generator)[: self.channels.shape[0]]
        self.channels.copy_(drawn.sort().values)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) or (B, N, C_in) to the same with C_out.

        Raises:
            ValueError: any other shape, or N tokens that are not the layer's grid.
        """
        object.__setattr__(self, "called", True)  # a tenth of the time of Module.__setattr__
        if torch.jit.is_tracing():
            with warnings.catch_warnings():
                # It warns of numbers that become constants, such as c.
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                update = self.update(x)
            return self.base(x) + update
        if self.cell is not None and not isinstance(self.cell, LinearCell):
            return self.base(x) + self.update(x)
        prefix, image = self.split(x)
        h = self._fused(image, self.cell)  # (B, H, W, C_out)
        if prefix is None:
            return h.reshape(*x.shape[:-1], self.out_features)
        plain = self._fused(prefix[:, None], None)  # (B, 1, p, C_out)
        return torch.cat([plain.flatten(1, 2), h.flatten(1, 2)], 1)

    def _fused(self, image: Tensor, cell: LinearCell | None) -> Tensor:
        """(B, H, W, C_in) to (B, H, W, C_out) in the kernels; plain LoRA without a cell."""
        if cell is not None and self.alpha is not None:
            tensors = cell.tensors(self.alpha, self._selected_channels())
        else:
            # A cell on no channels, with which the kernels compute plain LoRA.
            shapes = (8,), (0, 3, 3), (0, 5, 5), (0, 3, 3), (0, 5, 5), (4, 0, 0)
            alpha, sep3, sep5, dil3, dil5, pw = [self.lora_A.new_zeros(own) for own in shapes]
            tensors = CellTensors(alpha, sep3, sep5, dil3, dil5, pw, self.channels[:0])
        return nas_lora_linear(
            image,
            self.base.weight,
            self.base.bias,
            self.lora_A,
            self.lora_B,
            *tensors,
            self.scaling,
            backend=self.backend,
        )

    def _selected_channels(self) -> Tensor | None:
        """(c,) int64, or None for all."""
        return None if self.all_channels else self.channels

    def mix(self, z: Tensor) -> Tensor:
        """The cell on maps, (B, H, W, r) to the same."""
        if self.cell is None:
            return z
        return self.cell(z, self.alpha, self._selected_channels(), self.backend)

    def split(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Without a cell tokens have no neighbours, so any shape works."""
        return (None, x.reshape(-1, 1, 1, x.shape[-1])) if self.cell is None else super().split(x)

    def pointwise(self) -> Tensor:
        """(r, C_in) float64: the map from a token to y through the cell's centre taps (Eq. 6).

        Raises:
            UserError: the operation set has no such taps.
        """
        encoder = self.lora_A.double().clone()
        if self.cell is not None and self.alpha is not None:
            encoder[self.channels] = self.cell.centre(self.alpha).double() @ encoder[self.channels]
        return encoder

    def bypass(self) -> Tensor:
        """(r, C_in) float64: the map from a token to the channels that bypass the cell."""
        return self.lora_A.double().index_fill(0, self.channels, 0.0)

    def folded(self, linear_map: Tensor, offset: Tensor | None = None) -> nn.Linear:
        """nn.Linear with W0 + s W_d L and b0 + s W_d g, summed in float64.

        Args:
            linear_map: (r, C_in) float64, L.
            offset: (r,) float64, g; None for zero. A layer without a bias ignores it.
        """
        base = self.base
        merged = copy.deepcopy(base).requires_grad_(False)
        decoder = self.scaling * self.lora_B.double()
        with torch.no_grad():
            merged.weight.copy_(base.weight.double() + decoder @ linear_map)
            if base.bias is not None:
                shift = 0.0 if offset is None else decoder @ offset
                merged.bias.copy_(base.bias.double() + shift)
        return merged

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Also loads the weight and bias under the names that they had before ``inject``."""
        for name in ("weight", "bias"):
            original, own = f"{prefix}{name}", f"{prefix}base.{name}"
            if original in state_dict and own not in state_dict:
                state_dict[own] = state_dict.pop(original)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """The adapter's numbers, for ``print(model)``."""
        return f"rank={self.rank}, cell_channels={self.channels.shape[0]}, scaling={self.scaling:g}"
