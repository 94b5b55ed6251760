"""Whether the host calls its adapted layers, or computes with their weights past the adapters."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from naslora.errors import UserError, listing


class AdaptedLinear(nn.Module):
    """A layer in place of a frozen nn.Linear, which the host has to call.

    Attributes:
        base: the frozen nn.Linear.
        name: the layer's name in the host, for messages.
        called: whether the layer has computed.
    """

    base: nn.Linear
    name = ""
    called = False

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that reads a linear layer's device or dtype."""
        return shown(self.base.weight, self.name)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, for the same."""
        return None if self.base.bias is None else shown(self.base.bias, self.name)


class ShownWeight(Tensor):
    """A frozen weight that shows its dtype, device and shape, and takes part in no computation."""

    layer = ""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Allows what returns no tensor, and ``x.to(weight)``.

        Raises:
            UserError: anything else.
        """
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple) else (result,)
        of_other = func in (Tensor.to, Tensor.type_as) and not isinstance(args[0], cls)
        if of_other or not any(isinstance(item, Tensor) for item in results):
            return result
        given = (*args, *(kwargs or {}).values())
        name = next((item.layer for item in given if isinstance(item, cls)), "")
        raise UserError(
            f"the model computes with the weight of {name or 'an adapted layer'} instead of "
            "calling the layer, so an adapter has no effect there: leave it out of target"
        )


def shown(weight: Tensor, layer: str) -> Tensor:
    """The weight or bias of the layer of this name as a ``ShownWeight``."""
    view = weight.detach().as_subclass(ShownWeight)
    view.layer = layer
    return view


def host_calls(model: nn.Module, name: str) -> None:
    """Lets the attention around the layer of this name call it, where it has a switch for that.

    BEiT, EVA and Swin V2 of timm have one. Without it they read the weight of ``qkv``.
    """
    parent, _, child = name.rpartition(".")
    host = model.get_submodule(parent)
    if child == "qkv" and hasattr(host, "qkv_bias_separate"):
        vars(host)["qkv_bias_separate"] = True


class CallCheck:
    """A forward hook that warns, once, of adapted layers that a forward with gradients left out.

    A copy or a pickle of the model contains it. Compiled and traced forwards are not checked.
    """

    done = False

    def __call__(self, host: nn.Module, inputs: Any, output: Any) -> None:
        """Checks the layers inside ``host``, whose forward ends."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if self.done or not torch.is_grad_enabled():
            return
        self.done = True
        called: dict[str, bool] = {}  # several adapters of PEFT have one name
        for layer in host.modules():
            if isinstance(layer, AdaptedLinear) and layer.name:  # merged layers have none
                called[layer.name] = layer.called or called.get(layer.name, False)
        idle = [name for name in called if not called[name]]
        if idle:
            warnings.warn(
                f"the first forward with gradients did not call {len(idle)} of {len(called)} "
                f"adapted layers, so these do not train: {listing(idle)}",
                stacklevel=2,
            )


def watch(model: nn.Module, names: list[str]) -> None:
    """Hooks a ``CallCheck`` to the modules around the adapted layers: the model and its encoder.

    A user may call a part of the model alone. Blocks get no hook, because fused blocks with hooks
    take a slower path.
    """
    check, host = CallCheck(), model
    host.register_forward_hook(check)
    for step, *others in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if step.isdigit() or {*others} - {step}:
            break
        host = host.get_submodule(step)
        host.register_forward_hook(check)
