"""Configurations: what all methods' configurations share, and the configuration of NAS-LoRA."""

import dataclasses
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from naslora.adapter import checks
from naslora.errors import UserError

ChannelSelection = Literal["first", "random", "resample"]
CellInit = Literal["skip", "identity", "kaiming"]
Config = TypeVar("Config", bound="MethodConfig")

MOST_PREFIX = 65536
"""Largest number of prefix tokens."""
OUTPUT_FIELDS = ("rank", "lora_alpha", "preset", "prefix_tokens")
"""Fields of ``NASLoRAConfig`` that change the output of an adapter with given tensors."""


@dataclass(frozen=True)
class MethodConfig(ABC):
    """Base class of the methods' configurations, which are frozen dataclasses.

    Raises:
        UserError: a value is out of its range. The message names the field.
    """

    CHECKS: ClassVar[Mapping[str, checks.Check]] = {
        "rank": checks.whole(1, checks.MOST_RANK),
        "lora_alpha": checks.positive,
        "target": checks.pattern,
        "blocks": checks.blocks,
        "seed": checks.whole(0, checks.MOST_SEED),
        "backend": checks.backend,
    }
    """How each field is checked, by its name. A configuration adds the checks of its own fields."""

    def __post_init__(self) -> None:
        for name in field_names(type(self)):
            if name in self.CHECKS:
                value = self.CHECKS[name](name, getattr(self, name))
                object.__setattr__(self, name, value)

    @property
    @abstractmethod
    def seed(self) -> int:
        """Seed of every random number that the method draws; each configuration has the field."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The inverse of ``to_dict``. Fields that ``values`` lacks get their defaults.

        Raises:
            UserError: a field is unknown or out of range.
        """
        if not isinstance(values, dict):
            raise UserError(f"adapter configuration must be a dictionary, got {str(values)[:40]!r}")
        unknown = sorted(set(values) - set(field_names(cls)))
        if unknown:
            raise UserError(f"adapter configuration has unknown fields: {', '.join(unknown)}")
        return cls(**values)


def field_names(config: type[MethodConfig]) -> list[str]:
    """The names of a configuration's fields, in their order."""
    return [field.name for field in dataclasses.fields(config)]


def _with_peft_names(cls: type[Config]) -> type[Config]:
    """Lets the constructor of ``NASLoRAConfig`` take three names of PEFT's ``LoraConfig``.

    They are no fields: ``to_dict``, the files and the command line do not have them.
    """
    patched: Any = cls
    init = patched.__init__

    @functools.wraps(init)
    def constructor(
        self: Config,
        *args: Any,
        r: int | None = None,
        target_modules: str | Sequence[str] | None = None,
        modules_to_save: str | Sequence[str] | None = None,
        **fields: Any,
    ) -> None:
        """Takes the fields, and these aliases.

        Args:
            args: the fields in their order.
            r: the field ``rank``.
            target_modules: sets the field ``target``: a list of suffixes of module names, or one
                regular expression that must match the whole name.
            modules_to_save: what stays trainable beside the adapter, as the argument ``train`` of
                ``inject``. It is kept as an attribute. ``dataclasses.replace`` drops it.
            fields: the fields by name.

        Raises:
            UserError: a value is out of its range, or a field and its alias are both given.
        """
        for name, alias, value in (("rank", "r", r), ("target", "target_modules", target_modules)):
            if value is None:
                continue
            if args or name in fields:
                raise UserError(f"give {name} or {alias}, not both, got {alias}={value!r}")
            fields[name] = value if alias == "r" else _target_of(target_modules)
        init(self, *args, **fields)
        if modules_to_save is not None:
            patterns = checks.patterns("modules_to_save", modules_to_save)
            object.__setattr__(self, "modules_to_save", patterns)

    patched.__init__ = constructor
    return cls


@_with_peft_names
@dataclass(frozen=True)
class NASLoRAConfig(MethodConfig):
    """What ``inject`` puts into a model.

    Raises:
        UserError: a value is out of its range. The message names the field.
    """

    CHECKS: ClassVar[Mapping[str, checks.Check]] = {
        **MethodConfig.CHECKS,
        "preset": checks.text,
        "target": checks.target,
        "channel_ratio": checks.channel_ratio,
        "channel_selection": checks.choice(ChannelSelection),
        "cell_init": checks.choice(CellInit),
        "operations": checks.operations,
        "prefix_tokens": checks.whole(0, MOST_PREFIX),
    }

    rank: int = 3
    """LoRA rank r: the number of channels between encoder and decoder."""
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
    """Which channels pass through the cell: the first ones, a random draw, or a new draw each
    epoch."""
    cell_init: CellInit = "skip"
    """Start of the cell: `skip` (alpha favours the skip connection, so that the start is close to
    LoRA; convolutions near the identity, so that the mixture has gain 1), `identity` (the same
    with uniform alpha) or `kaiming` (uniform alpha, kaiming-uniform convolutions; the search then
    starts slower than LoRA)."""
    operations: tuple[str, ...] | None = None
    """Which of the eight operations the cell mixes, for ablations; None means all."""
    prefix_tokens: int = 0
    """Class and register tokens at the start of a sequence (B, N, C). They have no place in the
    image, so they pass by the cell (plain LoRA). SAM's encoders have none."""
    seed: int = 0
    """Seed of every random number that ``inject`` draws."""
    backend: str | None = None
    """Kernel backend; None takes the best that can compute here."""
    if TYPE_CHECKING:  # ``_with_peft_names`` adds these to the constructor
        r: InitVar[int | None] = None
        target_modules: InitVar[str | Sequence[str] | None] = None
        modules_to_save: Sequence[str] = ()

        def __post_init__(self, r: Any, target_modules: Any) -> None: ...

    else:
        modules_to_save = ()

    @property
    def scaling(self) -> float:
        """The factor s of the adapter's output."""
        return self.lora_alpha / self.rank

    @property
    def cell_channels(self) -> int:
        """Number of channels that pass through the cell: c = max(1, round(ratio * r)), and c = 0
        for ratio 0."""
        return max(1, round(self.channel_ratio * self.rank)) if self.channel_ratio > 0 else 0


def _target_of(target_modules: Any) -> str:
    """The regular expression for ``target`` that selects what PEFT's ``target_modules`` selects."""
    patterns = checks.patterns("target_modules", target_modules)
    if not patterns:
        raise UserError("target_modules must name at least one module, got none")
    if isinstance(target_modules, str):
        return rf"^(?:{target_modules})$"
    return rf"(^|\.)(?:{'|'.join(map(re.escape, patterns))})$"
