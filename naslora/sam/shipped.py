"""The pre-trained weights that the package contains, and which weights a model starts from."""

from pathlib import Path

from naslora.errors import UserError
from naslora.files import CHECKSUM, read_metadata
from naslora.sam.hub import PREFIX, download
from naslora.sam.vits import VITS

FOLDER = Path(__file__).parents[1] / "weights"
NONE = "none"
"""What to give as a checkpoint for random weights."""
SHIPPED = "shipped"
"""Start of a checkpoint that names the package's weights with their version."""
SHIPPED_SIZE = 256
"""Side in pixels of the images that the weights in the package were made for."""


def find_checkpoint(name: str, given: str | Path | None) -> Path | None:
    """Finds the file of the checkpoint that a model starts from; None for random weights.

    ``given`` is the user's checkpoint, a path or a name on the Hugging Face Hub; ``NONE`` for
    random weights; None, or what ``shipped_version`` returns, for the weights in the package, or
    for random weights if it contains none of this model.

    Raises:
        UserError: the package lacks a file that it should contain; as ``download``.
    """
    if str(given).startswith(PREFIX):
        return download(str(given))
    if given is not None and not str(given).startswith(f"{SHIPPED} "):
        return None if str(given) == NONE else Path(given)
    path = shipped_file(name)
    if path is not None and not path.is_file():
        raise UserError(
            f"the weights of {name} are missing from the package: {path} does not exist; install "
            f"naslora again, give another --checkpoint, or --checkpoint {NONE} for random weights"
        )
    return path


def shipped_file(name: str) -> Path | None:
    """Where the package contains a model's weights; None if it contains none of this model."""
    vit = VITS.get(name)
    return None if vit is None or vit.weights is None else FOLDER / vit.weights


def shipped_version(name: str) -> str | None:
    """``SHIPPED`` and the first digits of the checksum of the package's weights; None if it has
    none of a model.

    Errors as ``find_checkpoint`` and ``read_metadata``.
    """
    path = find_checkpoint(name, None)
    return None if path is None else f"{SHIPPED} {read_metadata(path).get(CHECKSUM, '')[:12]}"


def describe_shipped() -> dict[str, dict[str, str]]:
    """The package's weights by model: the file, and its metadata or what is wrong with it."""
    found = {}
    for name in VITS:
        path = shipped_file(name)
        if path is not None:
            try:
                about = dict(sorted(read_metadata(path).items()))
            except UserError as error:
                about = {"problem": str(error)}
            found[name] = {"file": str(path), **about}
    return found
