"""How objects are found, apart from the heavy modules that find them."""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from naslora.settings import Index, Settings, Share


@dataclass(frozen=True)
class InstanceConfig(Settings):
    """How objects are found."""

    points_per_side: Annotated[int, Meta(ge=1, le=128)] = 32
    """Points along each side of an image; each is a prompt. Small objects need more."""
    min_iou: Share = 0.5
    """Masks whose IoU the model estimates lower are dropped. SAM has 0.88."""
    min_stability: Share = 0.7
    """Masks that change more with the threshold of the logits (IoU) are dropped. SAM has 0.95."""
    max_overlap: Share = 0.7
    """IoU of the boxes of two masks from which on the worse one is dropped."""
    crops: Annotated[int, Meta(ge=0, le=3)] = 0
    """Layers of crops that are searched as well: 1 adds 4, 2 adds 16. For large images."""
    min_area: Index = 0
    """Masks of fewer pixels are dropped."""
    image_size: Annotated[int, Meta(ge=1)] | None = None
    """Side to which images are resized, for a checkpoint of SAM or `vit_t`: a run knows its own."""
