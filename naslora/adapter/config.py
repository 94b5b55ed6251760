"""The configuration of an adapter: everything that decides its shapes, start and target layers."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from naslora.errors import UserError
from naslora_kernels import OPERATIONS

ChannelSelection = Literal["first", "random", "resample"]
CellInit = Literal["identity", "kaiming"]


@dataclass(frozen=True)
class NASLoRAConfig:
    """What ``inject`` puts into a model.

    Raises:
        UserError: a value is out of its range; the message names the field.
    """

    rank: int = 3
    """LoRA rank r: how many channels lie between encoder and decoder."""
    lora_alpha: float = 32.0
    """Numerator of the scaling s = lora_alpha / rank of the adapter's output."""
    channel_ratio: float = 2 / 3
    """Share of the r channels that pass through the cell: 1 is NAS-LoRA, 0 is plain LoRA."""
    preset: str = "linear"
    """Operation set of the cell: `linear` (fused kernels, merges) or `paper` (ReLU, batch norm)."""
    target: str = r"(^|\.)attn\.qkv$"
    """Regular expression, searched in module names: the nn.Linear layers to adapt."""
    blocks: tuple[int, ...] | None = None
    """Which of the matching layers to adapt, counted from 0 in model order; None means all."""
    channel_selection: ChannelSelection = "first"
    """Which channels enter the cell: the first ones, a random draw, or a new draw each epoch."""
    cell_init: CellInit = "identity"
    """Start of the cell's convolutions: near the identity, so that the mixture starts with gain 1,
    or kaiming-uniform, with which the search starts slower than LoRA."""
    operations: tuple[str, ...] | None = None
    """Which of the eight operations the cell mixes, for ablations; None means all."""
    seed: int = 0
    """Seed of every random number that ``inject`` draws."""
    backend: str | None = None
    """Kernel backend; None takes the best that serves."""

    def __post_init__(self) -> None:
        _check_whole("rank", self.rank, minimum=1)
        _check_whole("seed", self.seed, minimum=0)
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("channel_ratio", self.channel_ratio)
        if self.lora_alpha <= 0:
            raise UserError(f"lora_alpha must be greater than 0, got {self.lora_alpha}")
        if not 0 <= self.channel_ratio <= 1:
            raise UserError(
                f"channel_ratio must lie in [0, 1] (0 is plain LoRA), got {self.channel_ratio}"
            )
        _check_choice("channel_selection", self.channel_selection, ChannelSelection)
        _check_choice("cell_init", self.cell_init, CellInit)
        self._check_target()
        self._check_operations()
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(self.blocks))
            if not self.blocks or len(set(self.blocks)) != len(self.blocks):
                raise UserError(f"blocks must be distinct indices, or None, got {self.blocks}")
            for block in self.blocks:
                _check_whole("blocks", block, minimum=0)

    def _check_target(self) -> None:
        try:
            re.compile(self.target)
        except (re.error, TypeError) as error:
            raise UserError(f"target is no regular expression: {self.target!r}: {error}") from error

    def _check_operations(self) -> None:
        if self.operations is None:
            return
        object.__setattr__(self, "operations", tuple(self.operations))
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown or not self.operations or len(set(self.operations)) != len(self.operations):
            raise UserError(
                f"operations must be distinct names out of {', '.join(OPERATIONS)}, got "
                f"{', '.join(self.operations) or 'none'}"
            )

    @property
    def scaling(self) -> float:
        """The factor s of the adapter's output."""
        return self.lora_alpha / self.rank

    @property
    def cell_channels(self) -> int:
        """How many channels pass through the cell: c = max(1, round(ratio * r)), 0 for ratio 0."""
        return max(1, round(self.channel_ratio * self.rank)) if self.channel_ratio > 0 else 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NASLoRAConfig":
        """The inverse of ``to_dict``.

        Raises:
            UserError: a field is unknown or out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"adapter configuration has unknown fields: {', '.join(unknown)}")
        return cls(**values)


def _check_whole(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value!r}")


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in choices.__args__:
        raise UserError(f"{name} must be one of {', '.join(choices.__args__)}, got {value!r}")
