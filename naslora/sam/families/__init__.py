"""The families of SAMs. A family's file holds all that naslora knows of it."""

from naslora.errors import UserError
from naslora.sam.families import mobile_sam, plain_vits, sam, sam2, sam3, sam_hq
from naslora.sam.family import Family
from naslora.sam.shipped import SHIPPED_SIZE, shipped_file

FAMILIES = (
    sam.FAMILY,
    mobile_sam.FAMILY,
    sam_hq.FAMILY,
    sam_hq.LIGHT,
    sam2.FAMILY,
    sam2.FAMILY_21,
    sam3.FAMILY,
    *plain_vits.FAMILIES,
)
MODELS = tuple(name for family in FAMILIES for name in family.models)
"""The names for ``--model``."""


def find_family(name: str) -> Family:
    """The family of a model.

    Raises:
        UserError: there is no such model.
    """
    for family in FAMILIES:
        if name in family.models:
            return family
    raise UserError(f"model must be one of {', '.join(MODELS)}, got {name!r}")


def side_of(name: str) -> int:
    """Side in pixels of the images that a model's pre-trained weights were made for.

    Raises:
        UserError: there is no such model.
    """
    return SHIPPED_SIZE if shipped_file(name) else find_family(name).image_size
