"""A fine-tuning method as an object, and the record that an adapted encoder keeps of its method.

``apply_method`` freezes an image encoder, adds what a method trains, and leaves an ``Applied``
record on the encoder. The record holds the ``Method`` itself, so saving, merging and the auxiliary
loss ask the record. Only code that starts from a name needs the table of methods.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from naslora.adapter.layer.config import MethodConfig, TargetConfig
from naslora.adapter.layer.frozen_norms import keep_frozen
from naslora.adapter.layer.modules import undone_on_error
from naslora.adapter.layer.targets import with_names
from naslora.adapter.merging.report import MergeMode, MergeReport
from naslora.errors import UserError

ENCODERS = ("image_encoder", "vision_encoder")
"""Names of image encoders: SAM's own, and Hugging Face's."""

RECORD = "method"  # the encoder's attribute that holds the record

OWN = {"own": True}
"""Metadata of a configuration's field that means something else in other configurations."""

Merge = Callable[[nn.Module, MergeMode, Any], MergeReport]
"""Folds a method into the frozen weights, as ``naslora.merge``. Takes the model, the mode, and what
``calibration_batches`` takes."""


def never(config: Any) -> bool:
    """Default of ``Method.searches``: there is no alpha."""
    return False


def no_modes(config: Any) -> list[MergeMode]:
    """Default of ``Method.merge_modes``: the method cannot be merged."""
    return []


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
    merge: Merge | None = None
    """Folds it into the frozen weights; None if that is impossible."""
    merge_modes: Callable[[Any], list[MergeMode]] = no_modes
    """The modes of ``merge`` whose results differ, for a configuration."""
    why_unmerged: str = ""
    """Why it cannot be folded."""
    searches: Callable[[Any], bool] = never
    """Whether there are architecture parameters alpha to search, for a configuration."""
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

    def require_merge(self) -> Merge:
        """Its merge.

        Raises:
            UserError: the method cannot be merged. The message says why.
        """
        if self.merge is None:
            raise UserError(f"{self.title} cannot be merged: {self.why_unmerged}")
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

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name


def find_method(methods: Mapping[str, Method], name: str) -> Method:
    """The method of a name.

    Raises:
        UserError: there is none.
    """
    if name not in methods:
        raise UserError(f"method must be one of {', '.join(methods)}, got {name!r}")
    return methods[name]


def apply_method(
    method: Method, model: nn.Module, config: MethodConfig | None = None, seed: int = 0
) -> None:
    """Freezes the image encoder and adds what a method trains, in place.

    Args:
        method: the method.
        model: a model with an ``image_encoder`` (or, as Hugging Face names it, ``vision_encoder``),
            of which nothing else changes; or the encoder.
        config: the method's own configuration; None for its defaults.
        seed: of every random number.

    Raises:
        UserError: another method's configuration, a model that has a method already, or an encoder
            that the method does not support. The model is then unchanged.
    """
    config = method.checked(config)
    present = applied(model)
    if present is not None:
        raise UserError(f"the model has a method already: {present.name}")
    encoder = image_encoder(model)
    if isinstance(config, TargetConfig):
        config = with_names(config, encoder)
    with undone_on_error(encoder):
        before = {id(tensor) for tensor in encoder.state_dict(keep_vars=True).values()}
        modules = set(encoder.modules())
        encoder.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            method.add(encoder, config, seed)
        for module in set(encoder.modules()) - modules:
            module.training = encoder.training
        keep_frozen(encoder)
        setattr(encoder, RECORD, Applied(method, config, tuple(_own_tensors(encoder, before))))


def applied(model: nn.Module) -> Applied | None:
    """The record of the method that was applied to the model; None if there is none."""
    return getattr(image_encoder(model), RECORD, None)


def image_encoder(model: nn.Module) -> nn.Module:
    """The model's image encoder, or the model itself, which then is the encoder."""
    name = _encoder_name(model)
    return model if name is None else getattr(model, name)


def _encoder_name(model: nn.Module) -> str | None:
    """The name of the model's image encoder; None if the model has none."""
    present = (name for name in ENCODERS if isinstance(getattr(model, name, None), nn.Module))
    return next(present, None)


def own_names(model: nn.Module) -> set[str]:
    """The applied method's tensors, by their names in ``model.state_dict()``."""
    present, encoder = applied(model), _encoder_name(model)
    prefix = "" if encoder is None else f"{encoder}."
    return {prefix + name for name in present.tensors} if present else set()


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


def _own_tensors(encoder: nn.Module, before: set[int]) -> list[str]:
    """Names in the state dict of new tensors, trained ones, and statistics of norms that train."""

    def trains(buffer: str) -> bool:
        own = list(encoder.get_submodule(buffer.rpartition(".")[0]).parameters(recurse=False))
        return bool(own) and all(parameter.requires_grad for parameter in own)

    state = encoder.state_dict(keep_vars=True)
    statistics = {name for name, _ in encoder.named_buffers() if trains(name)}
    return [
        name
        for name, tensor in state.items()
        if id(tensor) not in before or tensor.requires_grad or name in statistics
    ]
