"""What adapted and merged layers have in common: a layer in place of a frozen nn.Linear."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.layer.grid import GridLayer
from naslora.adapter.layer.windows import Windows
from naslora.errors import UserError


class AdaptedLinear(GridLayer):
    """W0 x + b0 + s W_d f(W_e x), in place of a frozen nn.Linear. The host has to call it.

    Attributes:
        base: the frozen nn.Linear.
        lora_A: (r, C_in) encoder W_e.
        lora_B: (C_out, r) decoder W_d.
        scaling: s; 1 where lora_B holds it.
        called: whether the layer has computed.
    """

    base: nn.Linear
    lora_A: Tensor
    lora_B: Tensor
    scaling = 1.0
    called = False

    def encoded(self, x: Tensor) -> Tensor:
        """W_e x, (..., C_in) to (..., r)."""
        return F.linear(x, self.lora_A.to(x.dtype))

    def decoded(self, y: Tensor) -> Tensor:
        """s W_d y, (..., r) to (..., C_out)."""
        h = F.linear(y, self.lora_B.to(y.dtype))
        return h if self.scaling == 1 else self.scaling * h

    def mix(self, z: Tensor) -> Tensor:
        """f on images, (B, H, W, r) to the same, which each subclass defines. A prefix skips it."""
        raise NotImplementedError

    def mixed(self, x: Tensor) -> Tensor:
        """The decoder's input y = f(W_e x), (..., r). x is (B, H, W, C_in) or (B, N, C_in)."""
        prefix, image = self.split(x)
        y = self.mix(self.encoded(image))
        if prefix is None:
            return y.reshape(*x.shape[:-1], y.shape[-1])
        return torch.cat([self.encoded(prefix), y.flatten(1, 2)], 1)

    def update(self, x: Tensor) -> Tensor:
        """The adapter's part of the output, s W_d f(W_e x), (..., C_out)."""
        return self.decoded(self.mixed(x))

    def in_windows(self, x: Tensor, windows: Windows) -> Tensor:
        """The layer on the windows of images, whose edge is padded with zeros: (B, H, W, C_in) to
        (B * windows, size, size, C_out).

        The frozen product is computed on the images' tokens alone; beyond them it is the bias. The
        cell sees the padding, because it looks at a token's neighbours.
        """
        object.__setattr__(self, "called", True)  # a tenth of the time of Module.__setattr__
        y = self.mix(windows.partition(self.encoded(x)))
        h = windows.tokens(self.base(x), self.base.bias)
        # Not in place of a view of h: autograd would copy the gradient of h twice.
        h.addmm_(y.flatten(0, 2).to(h.dtype), (self.scaling * self.lora_B).to(h.dtype).t())
        return h.view(*y.shape[:-1], -1)

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
