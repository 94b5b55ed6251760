"""Large images by overlapping tiles: where the tiles lie, and how their class maps are blended.

Tiles start where a patch of the encoder starts. Neighbours share at least the overlap. Across it
the weight of a tile rises from 0 to 1 as a squared sine, over the middle half. In the outer quarter
it is 0: there a tile only sees the surroundings. So a model whose output depends on pixels within a
quarter of the overlap gives the same class map as on the whole image.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from naslora.choices import OVERLAP

SMALLEST, LARGEST = 16, 1 << 16
"""Sides of a tile in pixels."""


class Box(NamedTuple):
    """A rectangle of pixels: rows ``top`` to ``bottom`` - 1, columns ``left`` to ``right`` - 1."""

    top: int
    left: int
    bottom: int
    right: int


class Tiles(NamedTuple):
    """How images are cut into tiles."""

    size: int
    """Side of a tile in the image's own pixels. A shorter side of an image is taken whole."""
    overlap: float = OVERLAP
    """Share of a tile's side that neighbours have in common at least, in [0, 0.5]."""
    step: int = 1
    """Tiles start at multiples of it, in pixels, except for the last of a row or a column."""


def fit_tiles(size: int, image_size: int, patch: int, overlap: float = OVERLAP) -> Tiles:
    """Makes tiles that start where a patch of the encoder starts.

    So the encoder cuts a tile into the same patches as its neighbours, and as the whole image. SAM
    predicts a thin structure differently if it is cut otherwise. The step is 1 if a patch is no
    whole number of the image's pixels.

    Tiles are resized to the model's images, of ``image_size`` pixels a side, where the encoder's
    patch has ``patch`` pixels.
    """
    step, rest = divmod(patch * size, image_size)
    return Tiles(size, overlap, 1 if rest else step)


class Grid:
    """The tiles of one image of ``height`` x ``width`` pixels, spread evenly over it."""

    def __init__(self, tiles: Tiles, height: int, width: int) -> None:
        self._rows, self._columns = _starts(height, tiles), _starts(width, tiles)
        self.size = min(tiles.size, height), min(tiles.size, width)
        self._height, self._width = height, width

    def __len__(self) -> int:
        return len(self._rows) * len(self._columns)

    def boxes(self) -> Iterator[Box]:
        """Yields the tiles, row by row."""
        height, width = self.size
        for top, left in itertools.product(self._rows, self._columns):
            yield Box(top, left, top + height, left + width)

    def blend(self, maps: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Blends the class maps of the tiles.

        The maps are taken one at a time. Only rows of pixels that are not finished are kept, so
        that the memory grows with the width of the image and not with its height.

        Args:
            maps: (K, S, S) float32 scores of each tile, in the order of ``boxes``. A map of another
                size than its tile is resized bilinearly.

        Yields:
            The first row of a band, and its (K, rows, width) float32 scores on the CPU, from the
            top to the bottom of the image.
        """
        down, across = _weights(self._rows, self.size[0]), _weights(self._columns, self.size[1])
        source = iter(maps)
        unfinished: Tensor | None = None
        for row, top in enumerate(self._rows):
            band: Tensor | None = None
            for column, left in enumerate(self._columns):
                scores = fit(next(source), self.size).cpu()
                scores = scores * (down[row][:, None] * across[column])
                if band is None:
                    band = scores.new_zeros(len(scores), self.size[0], self._width)
                band[:, :, left : left + self.size[1]] += scores
            assert band is not None
            if unfinished is not None:
                band[:, : unfinished.shape[1]] += unfinished
            end = self._rows[row + 1] if row + 1 < len(self._rows) else self._height
            yield top, band[:, : end - top]
            unfinished = band[:, end - top :].clone()


def fit(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a (K, S, S) class map bilinearly to ``size``, (height, width)."""
    if scores.shape[-2:] == size:
        return scores
    return F.interpolate(scores[None], size, mode="bilinear")[0]


def _starts(length: int, tiles: Tiles) -> list[int]:
    """The first pixels of as few tiles as cover ``length`` pixels with the overlap."""
    last = length - tiles.size
    if last <= 0:
        return [0]
    most = tiles.size - round(tiles.overlap * tiles.size)  # from a tile to the next
    step = tiles.step if tiles.step <= most else 1
    most -= most % step
    count = -(-last // most)
    # Spread evenly, then rounded up: multiples of the step stay at most ``most`` apart.
    return [-(-i * last // (count * step)) * step for i in range(count)] + [last]


def _weights(starts: list[int], side: int) -> list[Tensor]:
    """(side,) float32 weights of each tile along one axis; over all tiles they sum to 1."""
    position, shared = np.arange(side) + 0.5, [0, *(side - np.diff(starts)), 0]
    ramps = [
        _rise(position, before) * _rise(side - position, after)
        for before, after in itertools.pairwise(shared)
    ]
    total = np.zeros(starts[-1] + side)
    for start, ramp in zip(starts, ramps, strict=True):
        total[start : start + side] += ramp
    return [
        torch.from_numpy(ramp / total[start : start + side]).float()
        for start, ramp in zip(starts, ramps, strict=True)
    ]


def _rise(distance: np.ndarray, overlap: int) -> np.ndarray:
    """The weight at a distance from a tile's side, across an overlap with the next tile."""
    if overlap <= 0:
        return np.ones_like(distance)
    share = np.clip(2 * distance / overlap - 0.5, 0, 1)
    return np.sin(np.pi / 2 * share) ** 2
