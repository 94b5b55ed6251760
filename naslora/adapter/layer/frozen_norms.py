"""Frozen batch norms that stay in evaluation mode, whatever the host calls.

``model.train()`` puts every batch norm into training mode, also those of a frozen encoder. Their
running statistics then follow the training images, and a saved adapter does not contain them. So
``inject`` and ``naslora.methods.apply`` put an attribute in front of the norms' method ``train``,
which ignores the call while the norm's weight does not train.
"""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase


class FrozenTrain:
    """Stands in front of a batch norm's ``train``. Copies and pickles of the norm contain it."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, mode: bool = True) -> nn.Module:
        """Sets the mode; evaluation mode while the norm's weight does not require gradients."""
        weight = self.norm.weight
        trains = weight is not None and weight.requires_grad
        return type(self.norm).train(self.norm, mode and bool(trains))


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
        if not isinstance(module, _BatchNorm) or isinstance(module, _LazyNormBase):
            continue
        if module.weight is not None or module not in left_alone:
            vars(module)["train"] = FrozenTrain(module)
            module.train(module.training)
