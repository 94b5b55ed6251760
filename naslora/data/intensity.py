"""Images of more than 8 bits: how their values become 8 bits."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from naslora.errors import UserError

Kind = Literal["percentile", "window"]
PERCENTILES = (1.0, 99.0)
"""The percentiles that ``percentile`` takes if it is given none."""
SAMPLED = 1 << 24
"""Values of a channel from which on every n-th one decides its percentiles, to bound the memory."""
SCALED = 1 << 20
"""Values that are scaled at once, to bound the memory."""


class Intensity(NamedTuple):
    """How values of more than 8 bits become 0 to 255."""

    kind: Kind
    """``window``: ``low`` and ``high`` are values, the same for every image. ``percentile``: they
    are percentiles of each channel of each image."""
    low: float
    """Becomes 0, as everything below."""
    high: float
    """Becomes 255, as everything above."""


def parse_intensity(words: Sequence[str]) -> Intensity:
    """Reads ``--intensity``: ``percentile [LO HI]`` or ``window LO HI``.

    Raises:
        UserError: the words are none of the two, or LO and HI are no range.
    """
    usage = "intensity must be percentile, percentile LO HI or window LO HI"
    kind = words[0] if words else ""
    if kind not in get_args(Kind):
        raise UserError(f"{usage}, got {' '.join(words) or 'nothing'}")
    try:
        numbers = [float(word) for word in words[1:]]
    except ValueError as error:
        raise UserError(f"{usage} with two numbers, got {' '.join(words)}") from error
    if not numbers and kind == "percentile":
        numbers = list(PERCENTILES)
    if len(numbers) != 2:
        raise UserError(f"{usage}, got {' '.join(words)}")
    low, high = numbers
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"intensity: LO and HI must be finite and LO smaller, got {low}, {high}")
    if kind == "percentile" and not 0 <= low < high <= 100:
        raise UserError(f"intensity: percentiles lie in 0 to 100, got {low} and {high}")
    return Intensity("window" if kind == "window" else "percentile", low, high)


class Limits(NamedTuple):
    """The values of a channel that become 0 and 255."""

    low: float
    high: float


class Sampler:
    """Finds the limits of the channels of an image that is read piece by piece.

    Of a channel of more than ``SAMPLED`` values, every n-th decides in row-major order, whatever
    the pieces are.

    Args:
        intensity: the scaling.
        size: height and width of the image.
        channels: their number.
    """

    def __init__(self, intensity: Intensity, size: tuple[int, int], channels: int) -> None:
        self.intensity = intensity
        self._width = size[1]
        self._stride = max(1, -(-size[0] * size[1] // SAMPLED))
        self._values: list[list[np.ndarray]] = [[] for _ in range(channels)]

    @property
    def samples_values(self) -> bool:
        """Whether the limits depend on the values."""
        return self.intensity.kind == "percentile"

    def add(self, channel: int, values: np.ndarray, top: int = 0, left: int = 0) -> None:
        """Takes the (h, w) values of a piece, whose first pixel is at (top, left)."""
        for row, own in enumerate(values, top):
            start = -(row * self._width + left) % self._stride
            own = own[start :: self._stride]
            self._values[channel].append(own[np.isfinite(own)])

    def limits(self) -> list[Limits]:
        """The limits of each channel. Without any finite value they are 0."""
        if not self.samples_values:
            return [Limits(self.intensity.low, self.intensity.high) for _ in self._values]
        found = []
        for pieces in self._values:
            values = np.concatenate(pieces) if pieces else np.zeros(0)
            pieces.clear()
            ends = np.percentile(values, self.intensity[1:]) if values.size else (0, 0)
            found.append(Limits(*map(float, ends)))
        return found


def scale(values: np.ndarray, intensity: Intensity) -> np.ndarray:
    """Scales an image to 8 bits, with the limits of each of its channels.

    NaN and infinities do not count for percentiles.

    Args:
        values: (H, W) or (H, W, C) numbers.
        intensity: the scaling.

    Returns:
        uint8, of the same shape.
    """
    planes = values[..., None] if values.ndim == 2 else values
    sampler = Sampler(intensity, planes.shape[:2], planes.shape[2])
    if sampler.samples_values:
        for channel in range(planes.shape[2]):
            sampler.add(channel, planes[..., channel])
    scaled = np.empty(planes.shape, np.uint8)
    for channel, limits in enumerate(sampler.limits()):
        scaled[..., channel] = scale_channel(planes[..., channel], limits)
    return scaled.reshape(values.shape)


def scale_channel(values: np.ndarray, limits: Limits) -> np.ndarray:
    """Scales a channel to 8 bits.

    NaN becomes 0. With equal limits, values become 0 up to them and 255 above.

    Args:
        values: (H, W) numbers.
        limits: what becomes 0 and 255.

    Returns:
        uint8, of the same shape, rounded.
    """
    low, high = limits
    scaled = np.empty(values.shape, np.uint8)
    rows = max(1, SCALED // max(1, values.shape[1]))
    for top in range(0, len(values), rows):
        band = values[top : top + rows].astype(np.float64)
        if high > low:
            with np.errstate(invalid="ignore"):
                share = (band - low) / (high - low)
        else:
            share = np.where(np.isnan(band), np.nan, band > high)
        share = np.clip(np.nan_to_num(share, nan=0, posinf=1, neginf=0), 0, 1)
        scaled[top : top + rows] = np.rint(255 * share)
    return scaled
