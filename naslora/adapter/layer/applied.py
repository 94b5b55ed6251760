"""A fine-tuning method as an object, and the record that an adapted encoder keeps of its method.

``apply`` freezes an image encoder, adds what a method trains, and leaves an ``Applied`` record on
the encoder. The record holds the ``Method`` itself, so saving, merging and the auxiliary loss ask
the record. Only code that starts from a name needs the table of methods.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from naslora.adapter.layer.config import MethodConfig
from naslora.adapter.merging.report import MergeMode
from naslora.errors import UserError

ENCODERS = ("image_encoder", "vision_encoder")
"""Names of image encoders: SAM's own, and Hugging Face's."""

RECORD = "method"  # the encoder's attribute that holds the record

OWN = {"own": True}
"""Metadata of a configuration's field that means something else in other configurations."""


class Folding(NamedTuple):
    """How ``naslora.merge`` folds a method into the frozen weights."""

    layers: Callable[[nn.Module], Iterable[tuple[str, Any]]]
    """Takes the model. Returns the adapted layers with their names. They have the attributes
    ``in_features`` and ``weight``."""
    fold: Callable[[Any, MergeMode], nn.Module]
    """Takes a layer and the mode. Returns the merged module."""
    update: Callable[[Any, Tensor, Tensor], Tensor]
    """Takes a layer, its input and its output. Returns the adapter's part of the output."""
    modes: Callable[[Any], list[MergeMode]]
    """The modes whose results differ, for a configuration. Without "calibrated" among them ``fold``
    is exact in every mode."""


@dataclass(frozen=True)
class Method:
    """A fine-tuning method: an entry of ``naslora.methods.METHODS``.

    The functions are functions of a module, not lambdas, because adapted models are pickled.
    """

    name: str
    """Its name on the command line, in configurations and in files."""
    title: str
    """Its name in tables."""
    config: type[MethodConfig]
    """The type of its configuration."""
    add: Callable[[nn.Module, Any, int], None]
    """Adds to a frozen encoder, in place, what the method trains. Takes the encoder, a
    configuration of type ``config``, and the seed of its random numbers. Exactly the trained
    parameters require gradients after it."""
    merge: Folding | str
    """How it folds into the frozen weights, or why it cannot."""
    searches: Callable[[Any], bool] | None = None
    """Whether there are architecture parameters alpha to search, for a configuration; None if there
    never are."""
    auxiliary_loss: Callable[[nn.Module], Tensor | None] | None = None
    """Takes the encoder. Returns the auxiliary loss of its last training forward and clears it.
    None if the method has no auxiliary loss."""
    trains_encoder: bool = False
    """Whether all weights of the encoder are trained. Then pre-trained weights are not needed, and
    no other model may share them."""

    def checked(self, config: MethodConfig | None) -> MethodConfig:
        """The configuration, or the default one for None.

        Raises:
            UserError: it is a configuration of another method.
        """
        if config is not None and type(config) is not self.config:
            raise UserError(
                f"method {self.name} takes a {self.config.__name__}, got a {type(config).__name__}"
            )
        return config or self.config()

    def require_merge(self) -> Folding:
        """How it folds.

        Raises:
            UserError: the method cannot be merged. The message says why.
        """
        if isinstance(self.merge, str):
            raise UserError(f"{self.title} cannot be merged: {self.merge}")
        return self.merge


@dataclass(frozen=True)
class Applied:
    """The record of the method that an encoder was adapted with."""

    method: Method
    config: MethodConfig
    """Of the type ``method.config``."""
    tensors: tuple[str, ...]
    """The method's tensors (trained parameters and buffers), by their names in the encoder's state
    dict. Every other tensor has the value it had before."""


METHODS: dict[str, Method] = {}
"""All methods by their names, in the order of rows in tables. ``naslora.methods`` fills it."""


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def applied(model: nn.Module) -> Applied | None:
    """The record of the method that was applied to the model; None if there is none."""
    return getattr(image_encoder(model), RECORD, None)


def image_encoder(model: nn.Module) -> nn.Module:
    """The model's image encoder, or the model itself, which then is the encoder."""
    parts = (getattr(model, name, None) for name in ENCODERS)
    return next((part for part in parts if isinstance(part, nn.Module)), model)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The encoder's parameters that the applied method trains, alpha included."""
    present = applied(model)
    names = set(present.tensors) if present else set()
    encoder = image_encoder(model)
    return [parameter for name, parameter in encoder.named_parameters() if name in names]


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Returns the auxiliary loss of the last training forward and clears it.

    None if the applied method has no auxiliary loss.
    """
    present = applied(model)
    if present is None or present.method.auxiliary_loss is None:
        return None
    return present.method.auxiliary_loss(image_encoder(model))
