"""Counts the launches of layers and attention on a GPU and the bytes that they move, without one.

    python -m bench.gpu.traffic

Every tensor that a launch reads or writes counts once: what is read again comes from a cache. Our
launches, and those of PyTorch, one for each operation, run on tensors that have only shapes. Prints
the launches of a step.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import cases
from bench.gpu import launches
from bench.kinds import Case
from naslora_kernels import functional, triton
from naslora_kernels.cell import AttentionOperands
from naslora_kernels.launches import Launches, Primitives
from naslora_kernels.triton.attention import TritonAttention
from naslora_kernels.triton.primitives import TritonPrimitives

SETTING = cases.Setting("cuda", torch.bfloat16)
# The arguments that the primitives other than ``reduce_gradients`` write to.
WRITTEN = ("product", "partials", "y", "grad_z", "out")
WRITTEN_BY = {
    "attention_forward": ("o", "softmax"),
    "attention_delta": ("delta",),
    "attention_keys": ("grad_k", "grad_v"),
    "attention_queries": ("grad_q", "grad_h", "grad_w", "row_sums"),
}
WITHOUT_A_KERNEL = ("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided")


class Launch(NamedTuple):
    """One launch, and the bytes that it reads and writes."""

    kernel: str
    read: int
    written: int


def bytes_of(value: object) -> int:
    """The bytes of all tensors in ``value``; what an expanded tensor repeats counts once."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
    return sum(
        min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        for tensor in tensors.values()
    )


def moved(launched: Sequence[Launch]) -> int:
    """Bytes read and written."""
    return sum(launch.read + launch.written for launch in launched)


def launch_of(kernel: str, tensors: dict[str, Any], names: Sequence[str]) -> Launch:
    """A launch that writes to the arguments of the names and reads all others."""
    written = [tensors.pop(name) for name in names if name in tensors]
    return Launch(kernel, bytes_of(tensors), bytes_of(written))


# ---- Our layers and cells ------------------------------------------------------------------------


class Counter:
    """Primitives that compute nothing and record which bytes each would read and write."""

    def __init__(self, sizes: Primitives) -> None:
        self.launches: list[Launch] = []
        # The backend chooses into how many groups sums are divided.
        self.factor_partials, self.cell_partials = sizes.factor_partials, sizes.cell_partials

    def __getattr__(self, primitive: str):
        signature = inspect.signature(getattr(Primitives, primitive))

        def count(*arguments) -> None:
            named = signature.bind(self, *arguments).arguments
            del named["self"]
            self.launches.append(launch_of(primitive, named, WRITTEN))

        return count

    def reduce_gradients(self, cell, sums, A, B) -> None:
        found = [some for some in (sums, A, B) if some is not None]
        read = bytes_of([cell.parameters, *(partials for partials, _ in found)])
        written = bytes_of([gradients for _, gradients in found])
        self.launches.append(Launch("reduce_gradients", read, written))


SIZES = TritonPrimitives(None, lambda device: (9, 0))  # whose sums have its numbers of groups


def count(work: launches.Work, operands: launches.Operands) -> list[Launch]:
    """The launches of one work by ``triton``."""
    counter = Counter(SIZES)
    work(counter, operands)
    return counter.launches


# ---- PyTorch's operations, and attention ---------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Records the launches of PyTorch's operations and of the ``triton`` backend's."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "naslora_triton":
            kernels: Any = TritonAttention(self._launch, lambda device: (9, 0))
            counter = Counter(SIZES)
            if not hasattr(kernels, func._opname):
                kernels = Launches(counter)
            with self:  # copies that the backend makes are launches, too
                result = getattr(kernels, func._opname)(*args)
            self.launches += counter.launches
            return result
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        on_device = any(leaf.is_meta for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if on_device and not is_view and func._opname not in WITHOUT_A_KERNEL:
            read = bytes_of([args, kwargs])
            self.launches.append(Launch(func._opname, read, bytes_of(result)))
        return result

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any):
        name = kernel.fn.__name__.removesuffix("_kernel")
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        tensors = {n.removesuffix("_ptr"): t for n, t in named.items() if isinstance(t, Tensor)}
        self.launches.append(launch_of(name, tensors, WRITTEN_BY[name]))


def attention_launches(case: Case) -> dict[str, list[Launch]]:
    """The launches of ``triton``: a forward, and a backward with all five gradients."""
    shape, heads = case
    batch, *grid = shape.grid
    tokens, features = grid[0] * grid[1], shape.c_in // heads
    maps = partial(torch.empty, device="meta", dtype=SETTING.dtype)
    sizes = (features, features, features, *grid)
    operands = [maps(batch, heads, tokens, size).requires_grad_() for size in sizes]
    with Recorder() as forward:
        output = triton.rel_pos_attention(AttentionOperands(*operands), features**-0.5)
    with Recorder() as backward:
        torch.autograd.grad(output, operands, torch.empty_like(output))
    return {"forward": forward.launches, "backward": backward.launches}


class _Encoded(nn.Module):
    """In place of an image encoder: an encoding with gradients, and no launch."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.encoding = nn.Parameter(torch.empty(shape, device="meta"))

    def forward(self, images: Tensor) -> Tensor:
        return self.encoding.view_as(self.encoding)


def step_launches(target: str) -> dict[str, dict[str, int]]:
    """The launches of a weight step of NAS-PC-LoRA with ViT-B at batch 1 and 1024 x 1024 pixels,
    by ``triton``, and those of its decoder and loss alone; without casts and the optimizer."""
    from naslora import NASLoRAConfig
    from naslora.adapter.layer.modules import arch_parameters
    from naslora.methods import apply
    from naslora.sam.losses import SegmentationLoss
    from naslora.sam.segmentation import build_model

    with torch.device("meta"):
        model = build_model("vit_b", 1024, checkpoint="none", attention="fused")
        images, masks = torch.empty(1, 3, 1024, 1024), torch.empty(1, 1024, 1024)
    apply("nas-pc-lora", model, NASLoRAConfig(target=target))
    for alpha in arch_parameters(model):
        alpha.requires_grad_(False)
    model = model.to("meta").train()

    def launched() -> dict[str, int]:
        with Recorder() as forward:
            loss = SegmentationLoss()(model(images), masks)
        model.zero_grad()
        with Recorder() as backward:
            loss.backward()
        return {"forward": len(forward.launches), "backward": len(backward.launches)}

    # No backend serves tensors without memory, and autocast does not know them.
    names = {"select_backend": lambda *about: triton, "_autocast_dtype": lambda tensor: None}
    with mock.patch.multiple(functional, **names):
        whole = launched()
        model.image_encoder = _Encoded(model.image_encoder(images).shape)
        return {"the step": whole, "decoder and loss": launched()}


if __name__ == "__main__":
    for target in ("qkv", "all"):
        print(f"ViT-B, --target {target}: {step_launches(target)}")
