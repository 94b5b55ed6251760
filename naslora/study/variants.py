"""The rows of an ablation: variants of a configuration that differ in one setting.

The ablations are those of the paper (Tables 6-9 and D1).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from naslora.adapter.injection import find_targets
from naslora.errors import UserError
from naslora.sam.segmentation import build_model
from naslora.sam.shipped import NONE
from naslora.training.run_config import RunConfig
from naslora_kernels import OPERATIONS

AblationName = Literal["operations", "rank", "blocks", "alpha-start", "channel-ratio"]
BASE = "base"  # folder of the unchanged method's runs
RANKS = (3, 6, 12, 24)
FAMILIES = {
    "convolution": OPERATIONS[:4],
    "pooling": OPERATIONS[4:6],
    "skip/no connection": OPERATIONS[6:],
}


class Variant(NamedTuple):
    """A row of an ablation's table."""

    title: str
    folder: str
    """Name of the folder of its runs; ``BASE`` for the unchanged method."""
    config: RunConfig


def variants_of(name: AblationName, config: RunConfig) -> list[Variant]:
    """The rows of an ablation. One of them is the configuration itself.

    Raises:
        UserError: the configuration's method has no cell, or no row has the configured value of
            what the ablation varies.
    """
    if not config.searches:
        raise UserError(f"method {config.method!r} has no cell to ablate; use nas-pc-lora")
    variants = [
        variant._replace(folder=BASE) if variant.config == config else variant
        for variant in ABLATIONS[name](config)
    ]
    if not any(variant.folder == BASE for variant in variants):
        raise UserError(
            f"ablate {name} has no row for the configured value; leave the option that it varies "
            "at its default"
        )
    return variants


def with_adapter(config: RunConfig, **fields: Any) -> RunConfig:
    """The configuration with changed fields of its adapter."""
    return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **fields))


def with_search(config: RunConfig, **fields: Any) -> RunConfig:
    """The configuration with changed fields of its search."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **fields))


def _operations(config: RunConfig) -> list[Variant]:
    """All operations, and each family left out."""
    variants = [
        Variant("all operations", "all-operations", with_adapter(config, operations=None)),
    ]
    for family, left_out in FAMILIES.items():
        kept = tuple(name for name in OPERATIONS if name not in left_out)
        folder = "without-" + family.replace("/", "-").replace(" ", "-")
        varied = with_adapter(config, operations=kept)
        variants.append(Variant(f"without {family}", folder, varied))
    return variants


def _ranks(config: RunConfig) -> list[Variant]:
    """The paper's ranks, and the configured one."""
    return [
        Variant(f"r = {rank}", f"rank-{rank}", with_adapter(config, rank=rank))
        for rank in sorted({*RANKS, config.adapter.rank})
    ]


def _blocks(config: RunConfig) -> list[Variant]:
    """Adapters in the first half, the last half, or all of the encoder's blocks."""
    encoder = build_model(config.model, config.image_size, checkpoint=NONE).image_encoder
    every = with_adapter(config, blocks=None)
    count = len(find_targets(encoder, config.adapter.target))
    first, last = tuple(range(count // 2)), tuple(range(count // 2, count))
    return [
        Variant(f"1 to {len(first)}", "first-half", with_adapter(config, blocks=first)),
        Variant(f"{len(first) + 1} to {count}", "last-half", with_adapter(config, blocks=last)),
        Variant(f"1 to {count} (all)", "all-blocks", every),
    ]


def _alpha_starts(config: RunConfig) -> list[Variant]:
    """Alpha starts at once, at the configured epoch, or at twice that epoch.

    The paper starts alpha in epoch 10, and varies 0, 10 and 20.
    """
    own = config.training.first_search_epoch
    simultaneous = with_search(config, simultaneous=True)
    variants = [Variant("0 (simultaneously)", "simultaneous", simultaneous)]
    for start in dict.fromkeys((0, own, 2 * own)):
        title = "0 (stage-wise)" if start == 0 else str(start)
        varied = config if start == own else with_search(config, search_start=start)
        variants.append(Variant(title, f"alpha-from-{start}", varied))
    return variants


def _channel_ratios(config: RunConfig) -> list[Variant]:
    """All, two thirds, or one third of the channels pass through the cell."""
    variants = []
    for third in (3, 2, 1):
        varied = with_adapter(config, channel_ratio=third / 3)
        channels = f"{varied.adapter.cell_channels} of {config.adapter.rank} channels"
        variants.append(Variant(f"{third}/3 ({channels})", f"ratio-{third}-3", varied))
    return variants


ABLATIONS: dict[AblationName, Callable[[RunConfig], list[Variant]]] = {
    "operations": _operations,
    "rank": _ranks,
    "blocks": _blocks,
    "alpha-start": _alpha_starts,
    "channel-ratio": _channel_ratios,
}
