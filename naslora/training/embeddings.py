"""The maps that a frozen encoder makes of images, kept on disk."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from naslora.data.cache import Cache


def keep_embeddings(encoder: nn.Module, cache: Cache, how: str) -> None:
    """Makes an encoder read the maps of an image that it has seen before, in any run.

    Args:
        encoder: a frozen encoder of ``build_image_encoder``; it is changed in place.
        cache: where the maps are kept.
        how: the weights and all else but the image that the maps depend on.
    """
    forward: Any = encoder.forward
    forms: dict[bool, list[tuple[torch.Size, torch.dtype]]] = {}  # with autocast and without

    def bytes_of(*maps: Tensor) -> np.ndarray:
        flat = [part.cpu().contiguous().view(-1).view(torch.uint8) for part in maps]
        return torch.cat(flat).numpy()

    def maps_of(image: Tensor) -> list[Tensor]:
        found = forward(image[None])
        return list(found) if isinstance(found, tuple) else [found]

    @torch.no_grad()
    def kept(images: Tensor) -> Any:
        autocast = torch.is_autocast_enabled(images.device.type)
        if autocast not in forms:
            maps = maps_of(torch.zeros_like(images[0]))
            forms[autocast] = [(part.shape, part.dtype) for part in maps]
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in forms[autocast]]
        batch = []
        for image in images:
            compute = partial(lambda image: bytes_of(*maps_of(image)), image)
            stored = cache.get([bytes_of(image).tobytes()], f"{how} {autocast}", compute)
            parts = zip(torch.from_numpy(stored).split(sizes), forms[autocast], strict=True)
            batch.append([part.view(dtype).view(shape) for part, (shape, dtype) in parts])
        found = tuple(torch.cat(part).to(images.device) for part in zip(*batch, strict=True))
        return found if len(found) > 1 else found[0]

    encoder.forward = kept  # type: ignore[method-assign]
