"""Conv-LoRA (arXiv 2401.17868): LoRA with a mixture of convolutions at several scales inside.

y = W0 x + b0 + s W_d (z + E_g(z)), z = W_e x: for each map (a window, in windowed blocks) a gate
chooses one of eight experts. Expert i upsamples the map bicubically by i, convolves it densely by
3 x 3, applies GELU and resizes it back. The gate sees the map's mean; in training it is noisy
(arXiv 1701.06538), and an auxiliary loss balances the experts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.config import NASLoRAConfig
from naslora.adapter.injection import find_targets, replace_module
from naslora.adapter.layer import as_grid
from naslora.methods.encoders import beside

EXPERTS = 8
MIN_NOISE = 1e-2  # of the gate's logits, in training
BALANCE_WEIGHT = 1e-2  # of the auxiliary loss
UNMERGED = "each map chooses its own convolution and GELU, no weight stands for them"


class Balance:
    """Gathers the layers' auxiliary losses during one training forward of the encoder.

    Open from the encoder's start to its end: the forwards that gradient checkpointing repeats in
    the backward find it closed, so what they compute again is let go.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.open = False

    def start(self, encoder: nn.Module, inputs: tuple[Tensor]) -> None:
        self.losses, self.open = [], True

    def stop(self, encoder: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.open = False

    def add(self, loss: Tensor) -> None:
        if self.open:
            self.losses.append(loss)

    def take(self) -> Tensor | None:
        """The sum over the layers, which is then forgotten, and the graph behind it with it."""
        losses, self.losses = self.losses, []
        return torch.stack(losses).sum() if losses else None


class ConvLoRALinear(nn.Module):
    """A drop-in for the nn.Linear it wraps; shapes as ``naslora.NASLoRALinear``.

    Attributes:
        base: the frozen nn.Linear.
        lora_A: (r, C_in) encoder W_e; kaiming-uniform(a=sqrt(5)).
        lora_B: (C_out, r) decoder W_d; zero.
        gate: (8, r) the logits' weights; zero.
        noise: (8, r) the noise's weights; zero.
        experts: eight convolutions, r to r.
    """

    def __init__(self, base: nn.Linear, config: NASLoRAConfig, balance: Balance) -> None:
        super().__init__()
        rank = config.rank
        self.balance, self.scaling = balance, config.scaling
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.gate = nn.Parameter(torch.zeros(EXPERTS, rank))
        self.noise = nn.Parameter(torch.zeros(EXPERTS, rank))
        self.experts = nn.ModuleList(nn.Conv2d(rank, rank, 3, padding=1) for _ in range(EXPERTS))
        for expert in self.experts:
            nn.init.zeros_(expert.bias)
        beside(self, base.weight)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C_in) or (B, N, C_in), N a square, to the same with C_out."""
        z = as_grid(F.linear(x, self.lora_A), None)  # (B, H, W, r)
        chosen, counts = self.choose(z.mean((1, 2)))
        counts = counts.tolist()  # the one wait for the device: the shapes below depend on it
        h = self.base(x)  # keeps the device busy while the experts' many small calls are queued
        y = self.scaling * (z + self.mixture(z, chosen, counts))
        return h + F.linear(y, self.lora_B).reshape(h.shape)

    def choose(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """The expert (B,) of each map, from its (B, r) mean, and how many maps (8,) each expert
        got; in training the choice is noisy, and the auxiliary loss is added up."""
        dtype = torch.promote_types(pooled.dtype, torch.float32)
        logits = F.linear(pooled, self.gate).to(dtype)
        if not self.training:
            chosen = logits.argmax(1)
            return chosen, _counts(chosen)
        noise = F.softplus(F.linear(pooled, self.noise).to(dtype)) + MIN_NOISE
        noisy = logits + noise * torch.randn_like(logits)
        chosen = noisy.argmax(1)
        counts = _counts(chosen)
        self.balance.add(BALANCE_WEIGHT * balance_loss(logits, noise, noisy, counts))
        return chosen, counts

    def mixture(self, z: Tensor, chosen: Tensor, counts: list[int]) -> Tensor:
        """(B, H, W, r) to the same: each map through the expert that it chose, the maps of an
        expert in one call."""
        order = chosen.argsort()
        groups = z.index_select(0, order).split(counts)
        outputs = [self.expert(i, group) for i, group in enumerate(groups) if counts[i] > 0]
        return torch.cat(outputs).index_select(0, order.argsort())

    def expert(self, index: int, z: Tensor) -> Tensor:
        """(n, H, W, r) to the same: up by index + 1, convolution, GELU, and back."""
        size = z.shape[1:3]
        maps = z.permute(0, 3, 1, 2)  # (n, r, H, W), its channels last in memory
        if index > 0:
            maps = F.interpolate(maps, scale_factor=index + 1, mode="bicubic")
        maps = F.gelu(self.experts[index](maps))
        if index > 0:
            maps = F.interpolate(maps, size=size, mode="bicubic")
        return maps.permute(0, 2, 3, 1)


def balance_loss(logits: Tensor, noise: Tensor, noisy: Tensor, counts: Tensor) -> Tensor:
    """CV^2(importance) + CV^2(load) over the experts, for B maps and eight experts.

    With one expert a map and gates of one, importance counts the maps that chose an expert. Load
    can be differentiated: how probably another draw of its noise makes an expert a map's choice.

    Args:
        logits: (B, 8) without noise.
        noise: (B, 8) the noise's standard deviations.
        noisy: (B, 8) logits with the noise that was drawn.
        counts: (8,) how many maps chose each expert.
    """
    first, second = noisy.topk(2, dim=1).values.split(1, dim=1)  # each (B, 1)
    rival = torch.where(noisy > second, second, first)  # whom an expert must beat
    load = torch.special.ndtr((logits - rival) / noise).sum(0)
    return _squared_variation(counts.to(load.dtype)) + _squared_variation(load)


def _counts(chosen: Tensor) -> Tensor:
    """(8,) how many maps chose each expert."""
    return (chosen[:, None] == torch.arange(EXPERTS, device=chosen.device)).sum(0)


def _squared_variation(x: Tensor) -> Tensor:
    """The squared coefficient of variation, var / mean^2."""
    return x.var() / (x.mean().square() + 1e-10)


def add(encoder: nn.Module, config: NASLoRAConfig) -> None:
    """Wraps the target layers.

    Raises:
        UserError: as ``naslora.inject``.
    """
    encoder.balance = balance = Balance()
    for name in find_targets(encoder, config.target, config.blocks):
        layer = ConvLoRALinear(encoder.get_submodule(name), config, balance)
        replace_module(encoder, name, layer)
    encoder.register_forward_pre_hook(balance.start)
    encoder.register_forward_hook(balance.stop)
