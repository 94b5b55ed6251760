"""A sweep over the queries and warps of attention's kernels, on the device."""

import argparse
import itertools
import time
from unittest import mock

import torch

from bench.gpu import kernels, launches
from bench.gpu.kernels import Result, Save
from naslora_kernels.triton import attention
from naslora_kernels.triton.primitives import capability
from naslora_kernels.triton.tiles import AttentionTiles

SECONDS = 150
TILES = [None, *itertools.product((32, 64, 128), (4, 8))]  # as shipped; queries and warps
SHAPES = [launches.ATTENTION_SHAPES[i] for i in (1, 0, 3, 2)]


def altered(tiles: AttentionTiles, queries: int, warps: int) -> AttentionTiles:
    """The tiles with other numbers of queries and warps in every kernel."""
    changes = {"QUERIES": queries, "num_warps": warps}
    return AttentionTiles(*(constants | changes for constants in tiles))


def measure_sweep(arguments: argparse.Namespace, save: Save) -> Result:
    """Times each launch of attention as shipped and with other tiles.

    A note for each shape names the fastest as an entry of a table for tiles.py.
    """
    result: Result = {"passed": True, "summary": "", "notes": [], "rows": []}
    if "triton" not in kernels.kernels(arguments, "attention"):
        return {"passed": True, "summary": "left out: Triton cannot be used"}
    deadline = time.perf_counter() + SECONDS
    jobs, choices = list(itertools.product(kernels.DTYPES, SHAPES)), TILES
    if arguments.rehearse:
        jobs, choices = [(torch.float32, (1, 1, (3, 4), 16))], [None, (16, 4)]
    for dtype, shape in jobs:
        title, best = f"attention {shape} {str(dtype).removeprefix('torch.')}", {}
        for choice in choices:
            try:
                if time.perf_counter() > deadline:
                    raise TimeoutError("the step's time was over")
                rows = _rows(arguments, title, dtype, shape, choice)
            except Exception as error:  # it takes more than the card has, most often
                result["notes"].append(f"{title}, {choice or 'as shipped'}: {kernels.told(error)}")
                continue
            result["rows"] += rows
            for row in rows:
                best[row["direction"]] = min(
                    best.get(row["direction"], row), row, key=lambda row: row["p50_us"]
                )
            save(result)
        card = capability(torch.device(arguments.device))
        winners = {name: row["mode"] for name, row in best.items()}
        result["notes"].append(f"    {(card, shape[2], shape[3], str(dtype))}: {winners},")
    return result


def _rows(
    arguments: argparse.Namespace,
    title: str,
    dtype: torch.dtype,
    shape: launches.AttentionShape,
    choice: tuple[int, int] | None,
) -> list[Result]:
    """A row for each kernel, with the tiles of ``choice``; None for the shipped ones."""
    shipped, of, device = attention.attention_tiles, attention.TritonAttention, arguments.device
    tiles = shipped if choice is None else lambda *about: altered(shipped(*about), *choice)
    with mock.patch.object(attention, "attention_tiles", tiles):
        rows = kernels.time_launches(
            arguments,
            title,
            str(choice or "as shipped"),
            lambda launch: launches.attention(of(launch, capability), shape, dtype, device),
        )
    batch, heads, grid, features = shape
    product = 2 * batch * heads * (grid[0] * grid[1]) ** 2 * features
    for row in rows:
        products = launches.PRODUCTS.get(row["direction"], 0)
        row["TFLOP_per_s"] = round(products * product / row["p50_us"] / 1e6, 1)
    return [row for row in rows if row["direction"] in launches.PRODUCTS]
