"""The rows of an ablation: variants of a configuration that differ in one setting.

The ablations are those of the paper (Tables 6-9 and D1).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from naslora.adapter.injection import find_targets
from naslora.errors import UserError
from naslora.sam.segmentation import build_model
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
        UserError: the configuration's method has no cell, or the configuration changes already what
            the ablation varies.
    """
    if not config.searches:
        raise UserError(f"method {config.method!r} has no cell to ablate; use nas-pc-lora")
    variants = ABLATIONS[name](config)
    if not any(variant.folder == BASE for variant in variants):
        raise UserError(f"ablate {name} sets what --method and the adapter's options set already")
    return variants


def changed(config: RunConfig, **parts: dict[str, Any]) -> RunConfig:
    """The configuration with changed fields.

    Args:
        config: the configuration.
        parts: ``adapter`` and ``search``, each with its changed fields by name.
    """
    replaced: dict[str, Any] = {
        part: dataclasses.replace(getattr(config, part), **fields) for part, fields in parts.items()
    }
    return dataclasses.replace(config, **replaced)


def _variants(config: RunConfig, rows: dict[str, tuple[str, RunConfig]]) -> list[Variant]:
    """Makes variants of {title: (folder, configuration)}.

    A variant that equals the unchanged configuration gets the folder ``BASE``.
    """
    return [
        Variant(title, BASE if varied == config else folder, varied)
        for title, (folder, varied) in rows.items()
    ]


def _operations(config: RunConfig) -> list[Variant]:
    rows = {"all operations": ("all-operations", changed(config, adapter={"operations": None}))}
    for family, left_out in FAMILIES.items():
        kept = tuple(name for name in OPERATIONS if name not in left_out)
        folder = "without-" + family.replace("/", "-").replace(" ", "-")
        rows[f"without {family}"] = (folder, changed(config, adapter={"operations": kept}))
    return _variants(config, rows)


def _ranks(config: RunConfig) -> list[Variant]:
    return _variants(
        config,
        {
            f"r = {r}": (f"rank-{r}", changed(config, adapter={"rank": r}))
            for r in sorted({*RANKS, config.adapter.rank})
        },
    )


def _blocks(config: RunConfig) -> list[Variant]:
    encoder = build_model(config.model, config.image_size).image_encoder
    count = len(find_targets(encoder, config.adapter.target))
    halves = {
        f"1 to {count // 2}": ("first-half", tuple(range(count // 2))),
        f"{count // 2 + 1} to {count}": ("last-half", tuple(range(count // 2, count))),
        f"1 to {count} (all)": ("all-blocks", None),
    }
    return _variants(
        config,
        {
            title: (folder, changed(config, adapter={"blocks": blocks}))
            for title, (folder, blocks) in halves.items()
        },
    )


def _alpha_starts(config: RunConfig) -> list[Variant]:
    """Alpha starts at once, at the configured epoch, or at twice that epoch.

    The paper starts alpha in epoch 10 and varies 0, 10 and 20.
    """
    own = config.search.search_start
    rows = {"0 (simultaneously)": ("simultaneous", changed(config, search={"simultaneous": True}))}
    for start in dict.fromkeys((0, own, 2 * own)):
        title = "0 (stage-wise)" if start == 0 else str(start)
        rows[title] = (f"alpha-from-{start}", changed(config, search={"search_start": start}))
    return _variants(config, rows)


def _channel_ratios(config: RunConfig) -> list[Variant]:
    rank = config.adapter.rank
    rows = {}
    for third in (3, 2, 1):
        varied = changed(config, adapter={"channel_ratio": third / 3})
        rows[f"{third}/3 ({varied.adapter.cell_channels} of {rank} channels)"] = (
            f"ratio-{third}-3",
            varied,
        )
    return _variants(config, rows)


ABLATIONS: dict[AblationName, Callable[[RunConfig], list[Variant]]] = {
    "operations": _operations,
    "rank": _ranks,
    "blocks": _blocks,
    "alpha-start": _alpha_starts,
    "channel-ratio": _channel_ratios,
}
