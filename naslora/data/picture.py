"""An image whose windows become 8 bits when they are taken, and the scaling of values."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np

from naslora.errors import UserError

PERCENTILES = (1.0, 99.0)
"""The percentiles that ``percentile`` takes if it is given none."""
BAND = 1 << 20
"""Pixels that are converted at once, to bound the memory for numbers of 8 bytes."""
SAMPLED = 1 << 24
"""Pixels from which on every n-th row and column decide an image's percentiles, to bound the
memory."""


Limits = tuple[float, float]
"""The values that become 0 and 255."""


class Intensity(NamedTuple):
    """How values of more than 8 bits become 0 to 255."""

    kind: Literal["percentile", "window"]
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
    kind, *ends = words or [""]
    if kind == "percentile" and not ends:
        return Intensity("percentile", *PERCENTILES)
    try:
        low, high = map(float, ends)
    except ValueError:  # other than two, or no numbers
        low = high = math.nan
    if kind == "window" and -math.inf < low < high < math.inf:
        return Intensity("window", low, high)
    if kind == "percentile" and 0 <= low < high <= 100:
        return Intensity("percentile", low, high)
    raise UserError(
        "intensity must be percentile, percentile LO HI (0 to 100) or window LO HI, with finite "
        f"numbers and LO below HI, got {' '.join(words) or 'nothing'}"
    )


def scale(values: np.ndarray, limits: Sequence[Limits]) -> np.ndarray:
    """Scales (H, W, C) numbers to uint8, rounded, by the limits of each channel.

    NaN becomes 0. With equal limits, values become 0 up to them and 255 above.
    """
    low, high = np.array(limits).T  # (C,) float64 each
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = (values.astype(np.float64) - low) / (high - low)
    share = np.clip(np.nan_to_num(share, nan=0, posinf=1, neginf=0), 0, 1)
    return np.rint(255 * share).astype(np.uint8)


class ImageError(UserError):
    """An image cannot be read."""


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turns every error of the body, which reads a file, into an ``ImageError``.

    The libraries raise exceptions of many types. ``where`` is the start of the message.
    """
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        text = f"{where} cannot be read ({reason}); replace the file or remove its entry"
        raise ImageError(text) from error


class Source(NamedTuple):
    """The pixels of a file, upright, as they are stored."""

    height: int
    width: int
    values: Callable[[int, int, int, int], np.ndarray]
    """Called as ``values(top, bottom, left, right)``; returns these rows and columns, (n, m) or
    (n, m, C) numbers. A damaged file raises exceptions of many types."""
    white_is_zero: bool = False
    """Whether values of more than 8 bits are inverted after their scaling."""
    by_rows: bool = False
    """Whether a part of a row costs as much as the row."""

    def rows(self, top: int = 0, bottom: int | None = None) -> np.ndarray:
        """Whole rows, all of them by default."""
        return self.values(top, self.height if bottom is None else bottom, 0, self.width)

    def bands(self, top: int = 0, bottom: int | None = None) -> Iterator[tuple[int, int]]:
        """Yields the first row of bands of ``BAND`` pixels, and the row after their last one."""
        end = self.height if bottom is None else bottom
        step = max(1, BAND // self.width)
        for start in range(top, end, step):
            yield start, min(start + step, end)


def joined(sources: Sequence[Source], where: str) -> Source:
    """The channels of several sources, one after another, as one source.

    Raises:
        ImageError: they differ in size; from ``values``: in their type of numbers.
    """
    if len(sources) == 1:
        return sources[0]
    sizes = {(source.width, source.height) for source in sources}
    if len(sizes) > 1:
        shown = " and ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise ImageError(f"{where} has parts of {shown} pixels (width x height); resize them")

    def values(*window: int) -> np.ndarray:
        parts = [np.atleast_3d(source.values(*window)) for source in sources]
        if len({part.dtype.newbyteorder("=") for part in parts}) > 1:
            kinds = ", ".join(str(part.dtype) for part in parts)
            raise ImageError(f"{where} has parts of different types ({kinds}); save them alike")
        return np.concatenate(parts, axis=2)

    by_rows = any(source.by_rows for source in sources)
    return Source(*sources[0][:2], values, sources[0].white_is_zero, by_rows)


class Picture:
    """An image whose windows become channels of 8 bits when they are taken.

    Args:
        source, where: its pixels, and the start of an error message: the origin and the path.
        intensity: how values of more than 8 bits are scaled; None scales 16 bits by 255 / 65535.
        channels: C, the number of channels that the source must have; None makes RGB of three or of
            one.

    Raises:
        ImageError: there is another number of channels, or, without ``intensity``, the values are
            floating-point numbers; here and in ``rows``: the file is damaged, or, without
            ``intensity``, has values beyond 16 bits.
    """

    def __init__(
        self,
        source: Source,
        where: str,
        intensity: Intensity | None = None,
        channels: int | None = None,
    ) -> None:
        self.height, self.width = source.height, source.width
        self.source, self._where, self._intensity = source, where, intensity
        self.highest: int | None = None
        """The highest value so far, of more than 8 bits without ``intensity``."""
        first = self._values(0, 1, 0, 1)
        found = first.shape[2]
        if channels is None and found not in (1, 3):
            raise ImageError(
                f"{where} has {found} channels; save it with one (grey) or three (RGB), or train "
                f"with --channels {found}"
            )
        if channels not in (None, found):
            raise ImageError(f"{where} has {found} channels, and the run has {channels}")
        self.channels = channels or 3
        self._blank = np.full(found, first.dtype.kind == "f")
        if intensity is None and first.dtype.kind not in "bui":
            raise ImageError(
                f"{where} has floating-point pixels; train with --intensity, or save it with 8 or "
                "16 bits"
            )
        self._limits = None if first.dtype == np.uint8 else self._find_limits(found)

    def rows(
        self, top: int = 0, bottom: int | None = None, left: int = 0, right: int | None = None
    ) -> np.ndarray:
        """Returns rows and columns, all of them by default, as (bottom - top, right - left, C)
        uint8."""
        end, side = bottom or self.height, right or self.width
        pixels = np.empty((end - top, side - left, self.channels), np.uint8)
        for start, stop in self.source.bands(top, end):
            values = self._values(start, stop, left, side)
            if self._blank.any():
                self._blank &= ~np.isfinite(values).any(axis=(0, 1))
            if self._limits is not None:
                if self._intensity is None:
                    self.highest = max(self.highest or 0, int(values.max()))
                    if values.min() < 0 or self.highest > 65535:
                        raise ImageError(
                            f"{self._where} has values beyond 16 bits; save it with 8 or 16 bits, "
                            "or train with --intensity"
                        )
                values = scale(values, self._limits)
                values = 255 - values if self.source.white_is_zero else values
            pixels[start - top : stop - top] = values
        return pixels

    def check_channels(self) -> None:
        """Refuses a channel without a number in all rows that were taken.

        Raises:
            ImageError: there is one.
        """
        if self._blank.any():
            number = 1 + int(np.flatnonzero(self._blank)[0])
            raise ImageError(f"{self._where} has only NaN in channel {number}; replace the file")

    def _values(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Rows and columns as they are stored, (n, m, C)."""
        with readable(self._where):
            return np.atleast_3d(self.source.values(top, bottom, left, right))

    def _find_limits(self, channels: int) -> list[Limits]:
        """The values of each channel that become 0 and 255."""
        kind, low, high = self._intensity or ("window", 0, 65535)
        if kind == "window":
            return channels * [(low, high)]
        step = math.isqrt(self.height * self.width // SAMPLED) + 1
        sampled = [
            self._values(top, bottom, 0, self.width)[-top % step :: step, ::step]
            for top, bottom in self.source.bands()
        ]
        limits = []
        for channel in range(channels):
            values = np.concatenate([part[..., channel].ravel() for part in sampled])
            values = values[np.isfinite(values)]
            limits.append(tuple(np.percentile(values, [low, high])) if values.size else (0, 0))
        return limits
