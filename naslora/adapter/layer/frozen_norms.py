"""Frozen batch norms that stay in evaluation mode, whatever the host calls.

``model.train()`` puts every batch norm into training mode, also those of a frozen encoder. Their
running statistics then follow the training images, and a saved adapter does not contain them. So
``inject`` and ``naslora.methods.apply`` give batch norms a subclass of their own class that ignores
``train()`` while the norm's weight does not train. It is set as ``__class__``: the object, its
hooks, its names in the state dict and ``isinstance`` stay as they are.
"""

import functools
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

Norm = TypeVar("Norm", bound="FrozenNorm")


class FrozenNorm(_BatchNorm):
    """Mixed into the class of a batch norm that must not follow the training images."""

    host_class: type[nn.Module]

    def train(self: Norm, mode: bool = True) -> Norm:
        """Sets the mode; evaluation mode while the norm's weight does not require gradients."""
        trains = self.weight is not None and self.weight.requires_grad
        return super().train(mode and trains)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.host_class,), self.__getstate__()


def keep_frozen(model: nn.Module, trained: Iterable[nn.Module] = ()) -> None:
    """Keeps the model's batch norms in evaluation mode while their weights do not train.

    A norm that is made trainable later is in training mode again after the next ``train()``.

    Args:
        model: the model. The norms of adapters count too: they pause while alpha alone trains.
        trained: modules that train. Their batch norms without parameters are left alone; all
            others without parameters count as frozen.
    """
    left_alone = {norm for module in trained for norm in module.modules()}
    for module in model.modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, FrozenNorm | _LazyNormBase):
            continue
        if module.weight is not None or module not in left_alone:
            frozen_class: Any = _frozen_class
            module.__class__ = frozen_class(type(module))
            module.train(module.training)


@functools.cache
def _frozen_class(host_class: Any) -> Any:
    """The subclass. It has the name of ``host_class``, so the model is printed as before."""
    names = {"__module__": host_class.__module__, "__qualname__": host_class.__qualname__}
    attributes = {**names, "__doc__": host_class.__doc__, "host_class": host_class}
    return type(host_class.__name__, (FrozenNorm, host_class), attributes)


def _rebuild(host_class: Any) -> Any:
    """An empty frozen norm, whose state ``copy`` and ``pickle`` fill in."""
    frozen = _frozen_class(host_class)
    return frozen.__new__(frozen)
