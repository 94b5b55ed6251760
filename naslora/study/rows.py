"""The rows of a study: methods under one recipe, or variants that differ in one setting.

The ablations are those of the paper (Tables 6-9 and D1).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

from naslora.adapter.layer.config import NASLoRAConfig
from naslora.adapter.layer.targets import block_names, find_targets
from naslora.choices import AblationName
from naslora.errors import UserError
from naslora.methods import METHODS, configure, searches
from naslora.sam.segmentation import build_model
from naslora.sam.shipped import NONE
from naslora.training.recipe import load_recipe
from naslora.training.run_config import RunConfig, varied
from naslora_kernels import OPERATIONS

BASE = "base"  # the row of the unchanged method
RANKS = (3, 6, 12, 24)
FAMILIES = {
    "convolution": OPERATIONS[:4],
    "pooling": OPERATIONS[4:6],
    "skip/no connection": OPERATIONS[6:],
}


class Row(NamedTuple):
    """A row of a study's table."""

    title: str
    name: str
    """Of the folder of its runs; ``BASE`` for the unchanged method of an ablation."""
    config: RunConfig


def method_rows(config: RunConfig, methods: Sequence[str]) -> list[Row]:
    """One row a method, under the recipe of ``config``.

    What was changed of the recipe's adapter holds for all methods that have the field.
    """
    default, rows = load_recipe(config.recipe, config.method).adapter, []
    for method in methods:
        start = load_recipe(config.recipe, method).adapter
        adapter = configure(method, config.adapter, default, start)
        own = replace(config, method=method, adapter=adapter)
        rows.append(Row(METHODS[method].title, method, own))
    return rows


def ablation_rows(name: AblationName, config: RunConfig) -> list[Row]:
    """The rows of an ablation. One of them is the configuration itself.

    Raises:
        UserError: the configuration's method has no cell, or no row has the configured value of
            what the ablation varies.
    """
    if not searches(config.method, config.adapter):
        raise UserError(f"method {config.method!r} has no cell to ablate; use nas-pc-lora")
    variants = [
        variant._replace(name=BASE) if variant.config == config else variant
        for variant in ABLATIONS[name](config)
    ]
    if not any(variant.name == BASE for variant in variants):
        raise UserError(
            f"ablate {name} has no row for the configured value; leave the option that it varies "
            "at its default"
        )
    return variants


def _adapter(config: RunConfig) -> NASLoRAConfig:
    """The adapter's configuration of a method with a cell."""
    return cast(NASLoRAConfig, config.adapter)


def _operations(config: RunConfig) -> Iterator[Row]:
    """All operations, and each family left out."""
    yield Row("all operations", "all-operations", varied(config, "adapter", operations=None))
    for family, left_out in FAMILIES.items():
        kept = tuple(name for name in OPERATIONS if name not in left_out)
        folder = "without-" + family.replace("/", "-").replace(" ", "-")
        yield Row(f"without {family}", folder, varied(config, "adapter", operations=kept))


def _ranks(config: RunConfig) -> Iterator[Row]:
    """The paper's ranks, and the configured one."""
    for rank in sorted({*RANKS, _adapter(config).rank}):
        yield Row(f"r = {rank}", f"rank-{rank}", varied(config, "adapter", rank=rank))


def _blocks(config: RunConfig) -> Iterator[Row]:
    """Adapters in the first half, the last half, or all of the encoder's blocks."""
    encoder = build_model(config.model.name, config.model.image_size, checkpoint=NONE).image_encoder
    whole = varied(config, "adapter", blocks=None)
    count = len(block_names(find_targets(encoder, _adapter(whole))))
    half, every = count // 2, tuple(range(count))
    yield Row(f"1 to {half}", "first-half", varied(config, "adapter", blocks=every[:half]))
    yield Row(f"{half + 1} to {count}", "last-half", varied(config, "adapter", blocks=every[half:]))
    yield Row(f"1 to {count} (all)", "all-blocks", whole)


def _alpha_starts(config: RunConfig) -> Iterator[Row]:
    """Alpha starts at once, at the configured epoch, or at twice that epoch.

    The paper starts alpha in epoch 10, and varies 0, 10 and 20.
    """
    own = config.training.search_start
    yield Row("0 (simultaneously)", "simultaneous", varied(config, "training", simultaneous=True))
    for start in dict.fromkeys((0, own, 2 * own)):
        title = "0 (stage-wise)" if start == 0 else str(start)
        changed = config if start == own else varied(config, "training", search_start=start)
        yield Row(title, f"alpha-from-{start}", changed)


def _channel_ratios(config: RunConfig) -> Iterator[Row]:
    """All, two thirds, or one third of the channels pass through the cell."""
    for third in (3, 2, 1):
        changed = varied(config, "adapter", channel_ratio=third / 3)
        channels = f"{_adapter(changed).cell_channels} of {_adapter(config).rank} channels"
        yield Row(f"{third}/3 ({channels})", f"ratio-{third}-3", changed)


ABLATIONS: dict[AblationName, Callable[[RunConfig], Iterator[Row]]] = {
    "operations": _operations,
    "rank": _ranks,
    "blocks": _blocks,
    "alpha-start": _alpha_starts,
    "channel-ratio": _channel_ratios,
}
