"""Configurations of methods: what several of them share, and the configuration of NAS-LoRA."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from naslora.settings import Index, Settings, Share
from naslora_kernels import OPERATIONS
from naslora_kernels.backends import BACKENDS

ChannelSelection = Literal["first", "random", "resample"]
CellInit = Literal["skip", "identity", "kaiming"]
Preset = Literal["linear", "paper"]
if TYPE_CHECKING:
    Operation = str
    Backend = str
else:
    Operation, Backend = Literal[OPERATIONS], Literal[BACKENDS]

Rank = Annotated[int, msgspec.Meta(ge=1, le=1024)]
"""A layer of SAM has 1280 channels at most."""
Alpha = Annotated[float, msgspec.Meta(gt=0)]
Blocks = Annotated[tuple[Index, ...], msgspec.Meta(min_length=1)]
Operations = Annotated[tuple[Operation, ...], msgspec.Meta(min_length=1)]
Prefix = Annotated[int, msgspec.Meta(ge=0, le=65536)]

OUTPUT_FIELDS = ("rank", "lora_alpha", "preset", "prefix_tokens")
"""Fields that change the output of an adapter with given tensors."""


@dataclass(frozen=True)
class MethodConfig(Settings):
    """Base class of the methods' configurations, and the one of methods without settings."""


@dataclass(frozen=True)
class TargetConfig(MethodConfig):
    """The settings that choose layers."""

    target: str | tuple[str, ...] = "all"
    """The nn.Linear layers to adapt: `qkv` (of the attention), `mlp` (the first of the MLP),
    `qkv+mlp`, `all` (these and the projections behind both, those of them that the model has), a
    regular expression, searched in module names, or the names. An adapted model, and its file,
    hold the names."""
    blocks: Blocks | None = None
    """Which of the blocks with matching layers to adapt, counted from 0 in model order; None means
    all."""


@dataclass(frozen=True)
class LowRankConfig(TargetConfig):
    """The settings of a low-rank adapter."""

    rank: Rank = 3
    """LoRA rank r: the number of channels between encoder and decoder."""
    lora_alpha: Alpha = 32.0
    """Numerator of the scaling s = lora_alpha / rank of the adapter's output."""

    @property
    def scaling(self) -> float:
        """The factor s of the adapter's output."""
        return self.lora_alpha / self.rank


@dataclass(frozen=True)
class NASLoRAConfig(LowRankConfig):
    """What ``inject`` puts into a model.

    Raises:
        UserError: a value is out of its range. The message names the field.
    """

    channel_ratio: Share = 2 / 3
    """Share of the r channels that pass through the cell: 1 is NAS-LoRA, 0 is plain LoRA."""
    preset: Preset = "linear"
    """Operation set of the cell: `linear` (fused kernels, merges) or `paper` (ReLU, batch norm)."""
    channel_selection: ChannelSelection = "first"
    """Which channels pass through the cell: the first ones, a random draw, or a new draw each
    epoch."""
    cell_init: CellInit = "skip"
    """Start of the cell: `skip` (alpha favours the skip connection, so that the start is close to
    LoRA; convolutions near the identity, so that the mixture has gain 1), `identity` (the same
    with uniform alpha) or `kaiming` (uniform alpha, kaiming-uniform convolutions; the search then
    starts slower than LoRA)."""
    skip_lead: Annotated[float, msgspec.Meta(ge=0, le=20)] = 3.0
    """How far the logit of the skip connection starts above the others with `cell_init` `skip`. At
    8 a layer starts as LoRA up to 0.2 %, and stays it unless the images of the alpha steps ask for
    neighbours."""
    operations: Operations | None = None
    """Which of the eight operations the cell mixes, for ablations; None means all."""
    prefix_tokens: Prefix | None = None
    """Class and register tokens at the start of a sequence (B, N, C). They have no place in the
    image, so they pass by the cell (plain LoRA). None takes the number that the model states, as
    those of timm do, and 0 of others. SAM's encoders have none."""
    backend: Backend | None = None
    """Kernel backend; None takes the best that can compute here."""

    @property
    def cell_channels(self) -> int:
        """Number of channels that pass through the cell: c = max(1, round(ratio * r)), and c = 0
        for ratio 0."""
        return max(1, round(self.channel_ratio * self.rank)) if self.channel_ratio > 0 else 0
