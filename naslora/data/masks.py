"""Reading images and masks: decoding, labels, and the checks before a run."""

import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps

from naslora.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")


Encoding = Literal["labels", "threshold", "nonzero", "thirds"]


class Sample(NamedTuple):
    """One image, its mask where there is one, and where the user named them, for messages."""

    image: Path
    mask: Path | None
    origin: str
    encoding: Encoding = "labels"
    """How the mask is drawn; see ``read_mask``."""
    group: str | None = None
    """A part of its split that is also scored on its own."""


def list_images(folder: Path) -> list[Path]:
    """Returns the folder's files with a suffix of ``IMAGE_SUFFIXES``, hidden ones left out, sorted.

    Raises:
        UserError: the folder does not exist.
    """
    check_folder(folder)
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def check_folder(folder: Path) -> None:
    """Raises a UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist")


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Names in order for a message, the first of them where they are many."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def read_image(sample: Sample) -> Image.Image:
    """Reads an image as it is meant to be seen.

    Args:
        sample: the image's path is read.

    Returns:
        An RGB image of 8 bits, rotated as its EXIF tag says; palettes are resolved, alpha is
        dropped, and 16-bit greys are scaled by 255 / 65535 (stretch them beforehand where the
        images use only a part of their range).

    Raises:
        UserError: the file is missing, no image, truncated, or of a pixel type that is not read.
    """
    where = f"{sample.origin}: image {sample.image}"
    image, _ = open_upright(sample.image, where)
    return to_rgb(image, where)


def read_mask(sample: Sample, num_classes: int, palette: Sequence[str] | None = None) -> np.ndarray:
    """Reads a mask as class indices.

    The sample's encoding says how the mask is drawn:

    - "labels": grey values and the indices of palette images are the classes; where there are two,
      0/255 (0/65535 at 16 bits) is read as 0/1, and a JPEG is thresholded at 128. Coloured masks of
      a binary task are foreground where any channel is not zero. With a palette, every mask is read
      by its colours.
    - "threshold": two classes, foreground from 128 of 255 on, for masks that were compressed or
      smoothed; masks of nothing but 0 and 1 are read as such.
    - "nonzero": two classes, foreground where any channel is not zero.
    - "thirds": three classes, told apart by the mean of the channels: 0, 85 or 255.

    Args:
        sample: the mask's path, not None, is read.
        num_classes: 1 for a binary task (masks of 0 and 1); K >= 2 for classes 0 .. K-1, of which 0
            is the background.
        palette: colours such as "#ff0000", one per class in order, two for a binary task.

    Returns:
        (H, W) int32, upright as its EXIF tag says.

    Raises:
        UserError: the file cannot be read, holds labels or colours beyond the classes, or would
            need a palette; or the palette itself is wrong.
    """
    return decode_mask(sample, sample.mask, num_classes, palette_codes(palette, num_classes))


def open_upright(file: Path | io.BytesIO, where: str) -> tuple[Image.Image, str]:
    """Returns the upright image and the name of its file format."""
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image), image.format
    # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and others:
    # whatever it is, the file is what is wrong.
    except Exception as error:
        raise unreadable(where, error) from error


def unreadable(where: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(f"{where} cannot be read ({reason}); replace the file or remove its entry")


def to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{where} has grey values beyond 16 bits; save it with 8 or 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise UserError(f"{where} has floating-point pixels; save it with 8 or 16 bits")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise unreadable(where, error) from error


def decode_mask(
    sample: Sample, file: Path | io.BytesIO, num_classes: int, codes: list[int] | None
) -> np.ndarray:
    where = f"{sample.origin}: mask {sample.mask}"
    image, file_format = open_upright(file, where)
    jpeg = file_format in ("JPEG", "MPO")
    exact = codes is not None or num_classes > 2 or sample.encoding in ("nonzero", "thirds")
    if jpeg and exact:
        raise UserError(
            f"{where} is a JPEG, whose compression changes labels and colours; "
            "save masks of colours or of more than two classes as PNG"
        )
    if sample.encoding != "labels":
        labels = _DECODERS[sample.encoding](image, where)
    elif codes is not None:
        labels = _decode_colors(np.asarray(to_rgb(image, where)), codes, where)
    else:
        labels = _decode_values(_pixel_values(image, where), num_classes, jpeg, where)
    return labels.astype(np.int32, copy=False)


def _pixel_values(image: Image.Image, where: str) -> np.ndarray:
    """(H, W) of greys or palette indices, or (H, W, 3) of colours; int32."""
    if image.mode == "F":
        raise UserError(f"{where} has floating-point pixels; save it with 8 or 16 bits")
    if image.mode in ("LA", "La"):
        image = image.getchannel(0)
    elif image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        image = to_rgb(image, where)
    return np.asarray(image).astype(np.int32)


def _decode_threshold(image: Image.Image, where: str) -> np.ndarray:
    rgb = np.asarray(to_rgb(image, where))
    values = _pixel_values(image, where)
    if image.mode == "P":
        if (rgb != rgb[..., :1]).any():  # a palette of colours only shows the indices
            return values > 0
        values = rgb[..., 0]
    if values.max() <= 1:
        return values.any(axis=2) if values.ndim == 3 else values > 0
    return rgb.mean(axis=2) >= 128


def _decode_nonzero(image: Image.Image, where: str) -> np.ndarray:
    return np.asarray(to_rgb(image, where)).any(axis=2)


def _decode_thirds(image: Image.Image, where: str) -> np.ndarray:
    means = np.asarray(to_rgb(image, where)).mean(axis=2)
    labels = np.full(means.shape, -1, dtype=np.int32)
    for label, mean in enumerate((0, 85, 255)):
        labels[means == mean] = label
    if (labels < 0).any():
        strange = np.unique(means[labels < 0])[:8].round(1).tolist()
        raise UserError(
            f"{where} has colours whose channels have the means {', '.join(map(str, strange))}; "
            "expected are 0 (background), 85 (things) and 255 (stuff)"
        )
    return labels


_DECODERS: dict[str, Callable[[Image.Image, str], np.ndarray]] = {
    "threshold": _decode_threshold,
    "nonzero": _decode_nonzero,
    "thirds": _decode_thirds,
}


def _decode_values(values: np.ndarray, num_classes: int, jpeg: bool, where: str) -> np.ndarray:
    if values.ndim == 3:
        if jpeg:
            values = values.mean(axis=2)
        elif (values == values[..., :1]).all():
            values = values[..., 0]
        elif num_classes == 1:
            return values.any(axis=2)
        else:
            found = [_hex(code) for code in np.unique(_pack(values))]
            raise UserError(
                f"{where} is coloured ({listing(found)}); name the {num_classes} classes' colours "
                "in order with --palette, or save it as class indices"
            )
    highest = values.max()
    if jpeg and highest > 1:
        return values >= 128
    if values.min() >= 0 and highest < max(num_classes, 2):
        return values
    # Exactly 0 and the maximum: a tolerance would take an index mask that marks ignored pixels
    # with 255 for a binary one.
    if num_classes <= 2 and highest in (255, 65535) and np.isin(values, (0, highest)).all():
        return values > 0
    raise UserError(_beyond_classes(values, num_classes, where))


def _beyond_classes(values: np.ndarray, num_classes: int, where: str) -> str:
    found = np.unique(values)
    shown = ", ".join(map(str, found[:8])) + (f" .. {found[-1]}" if len(found) > 8 else "")
    if num_classes == 1:
        return (
            f"{where} has the labels {shown}, beyond the two classes 0/1 or 0/255 of a binary "
            "mask; set --num-classes, or save the mask with two values"
        )
    return (
        f"{where} has the labels {shown}, beyond the {num_classes} classes 0 to "
        f"{num_classes - 1}; raise --num-classes, or relabel the mask"
    )


def _decode_colors(rgb: np.ndarray, codes: list[int], where: str) -> np.ndarray:
    packed = _pack(rgb)
    labels = np.full(packed.shape, -1, dtype=np.int32)
    for label, code in enumerate(codes):
        labels[packed == code] = label
    unknown = np.unique(packed[labels < 0])
    if unknown.size:
        raise UserError(
            f"{where} has colours that --palette lacks: {listing([_hex(c) for c in unknown])}; "
            "add them as classes, or correct the mask"
        )
    return labels


def palette_codes(palette: Sequence[str] | None, num_classes: int) -> list[int] | None:
    if palette is None:
        return None
    try:
        codes = [int(_pack(np.array(ImageColor.getcolor(color, "RGB")))) for color in palette]
    except ValueError as error:
        raise UserError(f"--palette: {error}; write colours as #ff0000") from error
    expected = max(num_classes, 2)
    if len(codes) != expected or len(set(codes)) != expected:
        raise UserError(
            f"--palette: expected {expected} different colours, one per class in order, "
            f"got {', '.join(palette)}"
        )
    return codes


def _pack(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) of 0..255 -> (...) int32, red in the highest byte."""
    red, green, blue = np.moveaxis(rgb.astype(np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue


def _hex(code: int) -> str:
    return f"#{code:06x}"


def check_samples(
    samples: Sequence[Sample],
    num_classes: int,
    palette: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Reads every sample once, so that a bad file ends a run in its first seconds.

    Files are decoded in threads, JPEG images at a fraction of their size.

    Args:
        samples: what a run will read.
        num_classes: as in ``read_mask``.
        palette: as in ``read_mask``.
        progress: is called as ``progress(done, total)`` after each sample.

    Raises:
        UserError: of the first sample, in their order, with a file that cannot be read, an image
            and a mask of different sizes, or labels beyond the classes.
    """
    codes = palette_codes(palette, num_classes)

    def check(sample: Sample) -> None:
        size = _check_image(sample)
        if sample.mask is not None:
            mask = decode_mask(sample, sample.mask, num_classes, codes)
            check_sizes(sample, size, mask)

    in_threads(check, samples, progress)


def in_threads(
    work: Callable[[Sample], None],
    samples: Sequence[Sample],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Calls ``work`` with every sample; what the first of them in their order raises is raised."""
    with ThreadPoolExecutor() as threads:
        try:
            for done, _ in enumerate(threads.map(work, samples), start=1):
                if progress is not None:
                    progress(done, len(samples))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _check_image(sample: Sample) -> tuple[int, int]:
    """Returns the upright image's (width, height) after decoding all of the file."""
    where = f"{sample.origin}: image {sample.image}"
    try:
        with Image.open(sample.image) as image:
            size = image.size
            # Orientations 5 to 8 turn by 90 degrees
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            image.draft("RGB", (1, 1))  # a JPEG is read to its end, but at an eighth of its size
            image.load()
    except Exception as error:  # as in _open
        raise unreadable(where, error) from error
    to_rgb(image, where)
    return size[::-1] if turned else size


def check_sizes(sample: Sample, image_size: tuple[int, int], mask: np.ndarray) -> None:
    height, width = mask.shape
    if image_size != (width, height):
        raise UserError(
            f"{sample.origin}: image {sample.image} has {image_size[0]}x{image_size[1]} pixels "
            f"(width x height), its mask {sample.mask} {width}x{height}; they must be the same"
        )
