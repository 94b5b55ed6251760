"""A large image: in memory once, with as many bytes a pixel as it has channels where possible.

Only the parts that are taken become RGB images of Pillow, which have 4 bytes a pixel.
"""

import numpy as np
from PIL import Image

from naslora.data.images import (
    Sample,
    open_upright,
    read_pixels,
    to_8_bits,
    to_rgb,
)
from naslora.data.intensity import Intensity
from naslora.data.tiles import Box


class LargeImage:
    """An 8-bit image whose parts are taken as RGB images.

    Args:
        pixels: (H, W) or (H, W, 3) uint8, or an image of 8 bits and any mode.
        where: the start of an error message.

    Raises:
        UserError: the pixels cannot become RGB.
    """

    def __init__(self, pixels: np.ndarray | Image.Image, where: str = "image") -> None:
        self._pixels = pixels
        self._where = where
        if isinstance(pixels, Image.Image):
            self.width, self.height = pixels.size
            to_rgb(pixels.crop((0, 0, 1, 1)), where)  # raises if the mode cannot
        else:
            self.height, self.width = pixels.shape[:2]

    @property
    def box(self) -> Box:
        """The whole image."""
        return Box(0, 0, self.height, self.width)

    def crop(self, box: Box) -> Image.Image:
        """Returns a part as an 8-bit RGB image. The whole may be the image itself, not a copy."""
        if isinstance(self._pixels, Image.Image):
            part = self._pixels
            if box != self.box:
                part = part.crop((box.left, box.top, box.right, box.bottom))
        else:
            part = Image.fromarray(self._pixels[box.top : box.bottom, box.left : box.right])
        return to_rgb(part, self._where)

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Returns rows as (bottom - top, W, 3) uint8."""
        return np.asarray(self.crop(Box(top, 0, bottom, self.width)))


def read_large(sample: Sample, intensity: Intensity | None = None) -> LargeImage:
    """Reads an image as ``read_image`` does, with less memory.

    Raises:
        UserError: as ``read_image``.
    """
    where = f"{sample.origin}: image {sample.image}"
    pixels = read_pixels(sample.image, where, intensity)
    if pixels is not None:
        return LargeImage(pixels, where)
    image = open_upright(sample.image, where).image
    return LargeImage(to_8_bits(image, where, intensity), where)
