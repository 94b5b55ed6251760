"""The check before a run: every image and mask is read once."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

from PIL import ExifTags

from naslora.data.images import (
    Sample,
    decode_image,
    open_image,
    to_8_bits,
    to_rgb,
    unreadable,
)
from naslora.data.intensity import Intensity
from naslora.data.masks import check_sizes, decode_mask, has_foreground
from naslora.data.tiff import is_tiff
from naslora.errors import UserError

T = TypeVar("T")
LARGE = 1 << 24
"""Pixels of an image from which on threads decode one at a time, to bound their memory."""
_one_large = threading.Lock()


def check_sample(
    sample: Sample,
    num_classes: int,
    codes: list[int] | None,
    ignore_index: int | None = None,
    intensity: Intensity | None = None,
) -> bool:
    """Reads a sample once. A JPEG image is decoded at an eighth of its size.

    Args:
        sample: the sample.
        num_classes: as in ``read_mask``.
        codes: the palette, from ``palette_codes``.
        ignore_index: as in ``read_mask``.
        intensity: as in ``read_image``.

    Returns:
        Whether the mask has a pixel of another class than 0. False without a mask.

    Raises:
        UserError: a file cannot be read, the image and its mask differ in size, or the mask
            contains labels outside the classes.
    """
    size = _check_image(sample, intensity)
    if sample.mask is None:
        return False
    mask = decode_mask(sample, sample.mask, num_classes, codes, ignore_index)
    check_sizes(sample, size, mask)
    return has_foreground(mask)


def in_threads(
    work: Callable[[Sample], T],
    samples: Sequence[Sample],
    progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """Calls ``work`` with every sample, in threads.

    If calls raise, the exception of the first such sample in the order of ``samples`` is raised.

    Args:
        work: called with one sample.
        samples: the samples.
        progress: called as ``progress(done, total)`` after each sample.

    Returns:
        What ``work`` returned, in the order of ``samples``.
    """
    results = []
    with ThreadPoolExecutor() as threads:
        try:
            for done, result in enumerate(threads.map(work, samples), start=1):
                results.append(result)
                if progress is not None:
                    progress(done, len(samples))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return results


def _check_image(sample: Sample, intensity: Intensity | None) -> tuple[int, int]:
    """Decodes the whole image file and returns the (width, height) of the upright image."""
    where = f"{sample.origin}: image {sample.image}"
    if intensity is not None and is_tiff(sample.image):
        with _one_large:  # its size is not known before
            return decode_image(sample.image, where, intensity).size
    try:
        with open_image(sample.image) as image:
            size = image.size
            # A JPEG is read to its end at an eighth of its size, which is faster.
            reduced = image.draft("RGB", (1, 1)) is not None
            with _one_large if image.width * image.height > LARGE else nullcontext():
                image.load()
                size = size if reduced else image.size
                # EXIF orientations 5 to 8 rotate by 90 degrees. Loading a TIFF file does so.
                rotated = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                if intensity is None or image.mode not in ("I", "F"):
                    # Whether a mode becomes RGB, one pixel shows.
                    to_rgb(to_8_bits(image, where).crop((0, 0, 1, 1)), where)
                image.close()
    except UserError:
        raise
    except Exception as error:  # any exception, as in open_upright
        raise unreadable(where, error) from error
    return size[::-1] if rotated else size
