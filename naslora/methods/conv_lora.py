"""Conv-LoRA (arXiv 2401.17868): LoRA with a mixture of convolutions at several scales inside.

y = W0 x + b0 + s W_d (z + E_g(z)), z = W_e x. For each map (a window, in windowed blocks) a gate
selects one expert, g. Expert i upsamples the map bicubically by i, convolves it densely by 3 x 3,
applies GELU and resizes it back. The gate's input is the map's mean. In training the gate is noisy
(arXiv 1701.06538), and an auxiliary loss balances the experts.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.layer.applied import Method
from naslora.adapter.layer.config import LowRankConfig
from naslora.adapter.layer.grid import GridLayer, place_hint
from naslora.adapter.layer.layer import draw_lora_A, layer_generator
from naslora.adapter.layer.modules import replace_module
from naslora.adapter.layer.targets import find_targets
from naslora.methods.encoders import beside

MIN_NOISE = 1e-2  # smallest standard deviation of the logits' noise in training
BALANCE_WEIGHT = 1e-2  # weight of the auxiliary loss


@dataclass(frozen=True)
class ConvLoRAConfig(LowRankConfig):
    """The settings of Conv-LoRA."""

    experts: Annotated[int, msgspec.Meta(ge=2)] = 8
    """Number of experts. Expert i works at i times the map's size, i = 1, 2, ..."""


class Balance:
    """Collects the layers' auxiliary losses during one training forward of the encoder.

    It is open from the start of the encoder's forward to its end. Gradient checkpointing repeats
    layers' forwards in the backward pass. It is closed then, so their losses are not counted twice.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.open = False

    def start(self, *_: Any) -> None:
        """Before the encoder's forward: drops earlier losses and opens."""
        self.losses, self.open = [], True

    def stop(self, *_: Any) -> None:
        """After the encoder's forward: closes."""
        self.open = False

    def add(self, loss: Tensor) -> None:
        """Adds a layer's loss, if open."""
        if self.open:
            self.losses.append(loss)

    def take(self) -> Tensor | None:
        """Returns the sum over the layers and clears it. None if no layer added a loss."""
        losses, self.losses = self.losses, []
        return torch.stack(losses).sum() if losses else None


class ConvLoRALinear(GridLayer):
    """A drop-in for the nn.Linear it wraps; shapes as ``naslora.NASLoRALinear``. A prefix gets
    plain LoRA.

    lora_A comes from ``generator``. The experts draw from PyTorch's global generator.

    Attributes:
        base: the frozen nn.Linear.
        balance: where the layer adds its auxiliary loss.
        lora_A: (r, C_in) encoder W_e; kaiming-uniform(a=sqrt(5)).
        lora_B: (C_out, r) decoder W_d; zero.
        gate: (experts, r) the logits' weights; zero.
        noise: (experts, r) the noise's weights; zero.
        experts: convolutions, r to r.
    """

    def __init__(
        self, base: nn.Linear, config: ConvLoRAConfig, balance: Balance, generator: torch.Generator
    ) -> None:
        super().__init__()
        rank = config.rank
        self.balance, self.scaling = balance, config.scaling
        self.lora_A = nn.Parameter(draw_lora_A(rank, base.in_features, generator))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.gate = nn.Parameter(torch.zeros(config.experts, rank))
        self.noise = nn.Parameter(torch.zeros(config.experts, rank))
        convolutions = [nn.Conv2d(rank, rank, 3, padding=1) for _ in range(config.experts)]
        for convolution in convolutions:
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        self.experts = nn.ModuleList(convolutions)
        beside(self, base.weight)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) or (B, N, C_in) to the same with C_out."""
        prefix, z = self.split(F.linear(x, self.lora_A))  # z: (B, H, W, r)
        chosen, counts = self.choose(z.mean((1, 2)))
        sizes = counts.tolist()  # waits for the device, once: the shapes below depend on the sizes
        h = self.base(x)  # keeps the device busy while the experts' many small calls are queued
        y = z + self.mixture(z, chosen, sizes)
        if prefix is not None:
            y = torch.cat([prefix, y.flatten(1, 2)], 1)
        return h + F.linear(self.scaling * y, self.lora_B).reshape(h.shape)

    def choose(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Selects an expert for each map, by the maps' means, (B, r). In training the choice is
        noisy, and the auxiliary loss is added to ``balance``.

        Returns:
            The expert of each map, (B,) int64, and the number of maps of each expert, (experts,).
        """
        dtype = torch.promote_types(pooled.dtype, torch.float32)
        logits = F.linear(pooled, self.gate).to(dtype)
        noise, noisy = None, logits
        if self.training:
            noise = F.softplus(F.linear(pooled, self.noise).to(dtype)) + MIN_NOISE
            noisy = logits + noise * torch.randn_like(logits)
        chosen = noisy.argmax(1)
        experts = torch.arange(len(self.experts), device=chosen.device)
        counts = (chosen[:, None] == experts).sum(0)
        if noise is not None:
            self.balance.add(BALANCE_WEIGHT * balance_loss(logits, noise, noisy, counts))
        return chosen, counts

    def mixture(self, z: Tensor, chosen: Tensor, counts: list[int]) -> Tensor:
        """Each map through its expert, the maps of an expert in one call: (B, H, W, r) to the same.
        ``chosen`` and ``counts`` are those of ``choose``.
        """
        order = chosen.argsort()
        groups = z.index_select(0, order).split(counts)
        outputs = [self.expert(i, group) for i, group in enumerate(groups) if counts[i] > 0]
        return torch.cat(outputs).index_select(0, order.argsort())

    def expert(self, index: int, z: Tensor) -> Tensor:
        """(n, H, W, r) to the same: upsampled by index + 1, convolved, GELU, resized back."""
        size = z.shape[1:3]
        maps = z.permute(0, 3, 1, 2)  # (n, r, H, W), channels last in memory
        if index > 0:
            maps = F.interpolate(maps, scale_factor=index + 1, mode="bicubic")
        maps = F.gelu(self.experts[index](maps))
        if index > 0:
            maps = F.interpolate(maps, size=size, mode="bicubic")
        return maps.permute(0, 2, 3, 1)


def balance_loss(logits: Tensor, noise: Tensor, noisy: Tensor, counts: Tensor) -> Tensor:
    """CV^2(importance) + CV^2(load) over the experts, for B maps and E experts.

    CV is the coefficient of variation. Each map has one expert with a gate of one, so importance is
    the number of maps of an expert. Load is its differentiable estimate: the sum over the maps of
    the probability that the expert would be selected if its noise were drawn again.

    Args:
        logits: (B, E) without noise.
        noise: (B, E) the noise's standard deviations.
        noisy: (B, E) logits with the drawn noise.
        counts: (E,) the number of maps of each expert.
    """
    first, second = noisy.topk(2, dim=1).values.split(1, dim=1)  # each (B, 1)
    # The logit that an expert must exceed to be selected.
    rival = torch.where(noisy > second, second, first)
    load = torch.special.ndtr((logits - rival) / noise).sum(0)
    return _squared_variation(counts.to(load.dtype)) + _squared_variation(load)


def _squared_variation(x: Tensor) -> Tensor:
    """The squared coefficient of variation, var / mean^2."""
    return x.var() / (x.mean().square() + 1e-10)


def add(encoder: Any, config: ConvLoRAConfig, seed: int) -> None:
    """Wraps the target layers.

    Raises:
        UserError: as ``naslora.inject``.
    """
    encoder.balance = balance = Balance()
    for name, base in find_targets(encoder, config).items():
        layer = ConvLoRALinear(base, config, balance, layer_generator(seed, name))
        place_hint(encoder, name, layer)
        replace_module(encoder, name, layer)
    encoder.register_forward_pre_hook(balance.start)
    encoder.register_forward_hook(balance.stop)


def auxiliary_loss(encoder: Any) -> Tensor | None:
    """Returns the balance loss of the last training forward and clears it."""
    return encoder.balance.take()


METHOD = Method(
    "conv-lora",
    "Conv-LoRA",
    ConvLoRAConfig,
    add,
    "each map selects its own convolution and GELU, no weight stands for them",
    auxiliary_loss=auxiliary_loss,
)
