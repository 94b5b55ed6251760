"""Whether the host calls its adapted layers, or computes with their weights past the adapters."""

import warnings
from typing import Any

import torch
from torch import nn

from naslora.adapter.layer.adapted import AdaptedLinear
from naslora.errors import listing


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
