"""What is measured: the cases, their candidates, and how much work each must do at least."""

import functools
import importlib.util
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import naslora_kernels
from naslora_kernels import mixed_cell, nas_lora_linear
from naslora_kernels.operations import CONVOLUTIONS

# A compiled backward is timed several times on one forward, so it must not consume its inputs.
torch._functorch.config.donated_buffer = False

DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Setting:
    """Where and in which dtype a case is measured, and which kernels are."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    kernels: tuple[str, ...] = ("cpp",)


CPU = Setting()
RANKS = (3, 6, 12, 24)  # the paper's default, and its ablation
SCALING = 32 / 3


@dataclass(frozen=True)
class Shape:
    """Maps of an encoder as a linear layer gets them: (batch, height, width), C_in -> C_out."""

    name: str
    grid: tuple[int, int, int]
    c_in: int = 768
    c_out: int = 2304


# SAM on an image of 1024 x 1024 pixels, in windows and whole; on one of 256 x 256; MobileSAM.
WINDOWS = Shape("vit_b windows", (25, 14, 14))
GLOBAL = Shape("vit_b global", (1, 64, 64))
MLP = Shape("vit_b mlp", (1, 64, 64), 768, 3072)  # the first linear, of every block
SMALL = Shape("vit_b 256px", (4, 14, 14))
HUGE = Shape("vit_h windows", (25, 14, 14), 1280, 3840)  # the paper's encoder
HUGE_BATCH = Shape("vit_h windows, 4 images", (100, 14, 14), 1280, 3840)
HUGE_GLOBAL = Shape("vit_h global", (1, 64, 64), 1280, 3840)
TINY = Shape("tiny_vit", (25, 7, 7), 320, 960)
CASES = (
    *((WINDOWS, rank) for rank in RANKS),
    (GLOBAL, 3),
    (GLOBAL, 24),
    (MLP, 3),
    (SMALL, 3),
    (HUGE, 3),
    (TINY, 3),
)
CELL_CASES = tuple(c for c in CASES if c[0] not in (HUGE, MLP))  # to a cell, WINDOWS and GLOBAL
# Compiling takes some ten seconds a case, so it is measured on these alone.
COMPILED_CASES = ((WINDOWS, 3), (WINDOWS, 24), (GLOBAL, 3))


def channels_of(rank: int) -> int:
    """The channels in the cell at the default ratio of 2/3."""
    return max(1, round(2 / 3 * rank))


def cell_parameters(rank: int, device: str = "cpu") -> dict[str, Tensor]:
    """A random cell on ``channels_of(rank)`` of ``rank`` channels, in float32."""
    c = channels_of(rank)
    parameters = {"alpha": 1e-3 * torch.randn(8)}
    names = ("dw_sep3", "dw_sep5", "dw_dil3", "dw_dil5")
    for name, conv in zip(names, CONVOLUTIONS, strict=True):
        parameters[name] = torch.randn(c, conv.kernel, conv.kernel) / conv.kernel
    parameters["pw"] = torch.randn(4, c, c) / c**0.5
    return {name: value.to(device).requires_grad_() for name, value in parameters.items()}


@dataclass
class Work:
    """One differentiable computation: what runs, on which leaves, with which incoming gradient."""

    compute: Callable[[], Tensor]
    leaves: list[Tensor]
    gradient: Tensor

    def forward(self) -> Tensor:
        return self.compute()

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.compute(), self.leaves, self.gradient)

    def prepare_backward(self) -> Callable[[], tuple[Tensor, ...]]:
        """Runs the forward; the function returned runs the backward, as often as called."""
        output = self.compute()
        return lambda: torch.autograd.grad(output, self.leaves, self.gradient, retain_graph=True)

    def function(self, direction: str) -> Callable[[], object]:
        return self.prepare_backward() if direction == "backward" else getattr(self, direction)


def cell_works(shape: Shape, rank: int, setting: Setting = CPU) -> dict[str, Work]:
    """The cell by the fused kernels, by the reference, and by the compiled reference."""
    torch.manual_seed(0)
    z = torch.randn(*shape.grid, rank).to(setting.device, setting.dtype).requires_grad_()
    parameters = cell_parameters(rank, setting.device)
    channels = torch.arange(channels_of(rank), device=setting.device)
    gradient = torch.randn(*shape.grid, rank).to(z)

    def cell(z, parameters, backend):
        return mixed_cell(z, **parameters, channels=channels, backend=backend)

    leaves = [z, *parameters.values()]
    return _fused_works(cell, (z, parameters), leaves, gradient, (shape, rank), setting)


def _fused_works(
    function: Callable[..., Tensor],
    given: tuple[object, ...],
    leaves: list[Tensor],
    gradient: Tensor,
    case: tuple[Shape, int],
    setting: Setting,
) -> dict[str, Work]:
    """``function``, whose last argument is the backend, by the fused kernels and the reference."""
    computes = {name: partial(function, *given, name) for name in (*setting.kernels, "reference")}
    if case in COMPILED_CASES:
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        computes["reference compiled"] = partial(compiled, *given, "reference")
    return {name: Work(compute, leaves, gradient) for name, compute in computes.items()}


def layer_works(shape: Shape, rank: int, setting: Setting = CPU) -> dict[str, Work]:
    """The layer by the fused kernels, by the reference eager and compiled, PEFT's LoRA layer on the
    same linear if PEFT is installed, and the frozen linear alone. Ours are float32 adapters, under
    16-bit activations too; PEFT's has the activations' dtype, in which it is fastest."""
    torch.manual_seed(0)
    like = {"device": setting.device, "dtype": setting.dtype}
    linear = torch.nn.Linear(shape.c_in, shape.c_out).requires_grad_(False).to(**like)
    x = torch.randn(*shape.grid, shape.c_in).to(**like).requires_grad_()
    gradient = torch.randn(*shape.grid, shape.c_out).to(**like)
    lora_A = torch.randn(rank, shape.c_in) / shape.c_in**0.5
    lora_B = torch.randn(shape.c_out, rank) / rank**0.5
    adapter = [matrix.to(setting.device).requires_grad_() for matrix in (lora_A, lora_B)]
    cell = cell_parameters(rank, setting.device)
    channels = torch.arange(channels_of(rank), device=setting.device)
    frozen = {"weight": linear.weight, "bias": linear.bias}

    def nas_lora(x, adapter, cell, backend):
        return nas_lora_linear(
            x, **frozen, lora_A=adapter[0], lora_B=adapter[1], **cell, channels=channels,
            scaling=SCALING, backend=backend,
        )  # fmt: skip

    leaves = [x, *adapter, *cell.values()]
    works = _fused_works(nas_lora, (x, adapter, cell), leaves, gradient, (shape, rank), setting)
    if importlib.util.find_spec("peft"):
        from peft.tuners import lora

        config = lora.LoraConfig(r=rank, lora_alpha=32)
        layer = lora.Linear(linear, "default", config=config, r=rank, lora_alpha=32).to(**like)
        peft_leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        works["PEFT LoRA"] = Work(lambda: layer(x), peft_leaves, gradient)
    works["frozen linear"] = Work(lambda: F.linear(x, linear.weight, linear.bias), [x], gradient)
    return works


# ---- What must be moved and computed at the least ----------------------------------------------


def of_direction(direction: str, forward: int, backward: int) -> int:
    """The number of a direction."""
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def cell_bytes(shape: Shape, rank: int, direction: str, setting: Setting = CPU) -> int:
    """Bytes of maps: forward reads z and writes y, backward reads z and dy, writes dz."""
    numbers = of_direction(direction, 2, 3) * torch.Size(shape.grid).numel() * rank
    return setting.dtype.itemsize * numbers


def cell_operations(shape: Shape, rank: int, direction: str) -> int:
    """Multiplications and additions of the separable form, two for each weight and pixel.

    Forward: four depthwise and four pointwise convolutions. Backward: those for dz, for the
    depthwise and pointwise gradients, and the depthwise maps once more, as none is kept.
    """
    c = channels_of(rank)
    depthwise = sum(conv.kernel**2 for conv in CONVOLUTIONS) * c
    pointwise = len(CONVOLUTIONS) * c * c
    per_pixel = of_direction(direction, depthwise + pointwise, 3 * depthwise + 2 * pointwise)
    return 2 * torch.Size(shape.grid).numel() * per_pixel


def layer_bytes(shape: Shape, rank: int, direction: str, setting: Setting = CPU) -> int:
    """Bytes that the adapter moves beside the frozen product.

    Forward: x is read, and the output written once before the product is added to it. Backward:
    the output's gradient and x are read, the input's gradient written before the product.
    """
    tokens = torch.Size(shape.grid).numel()
    per_token = of_direction(direction, shape.c_in + shape.c_out, 2 * shape.c_in + shape.c_out)
    return setting.dtype.itemsize * tokens * per_token + cell_bytes(shape, rank, direction, setting)


def layer_operations(shape: Shape, rank: int, direction: str) -> int:
    """Multiplications and additions beside the frozen product: two rank-r products forward, four
    backward, and the cell."""
    per_token = 2 * rank * (shape.c_in + shape.c_out) * of_direction(direction, 1, 2)
    return torch.Size(shape.grid).numel() * per_token + cell_operations(shape, rank, direction)


# ---- The gate ----------------------------------------------------------------------------------


def gate(works: Mapping[str, Work], setting: Setting = CPU, judge: str = "reference") -> str | None:
    """Why the kernels' results must not be timed, or None: held against those of ``judge``.

    Differences are relative, in the Frobenius norm. Sums over thousands of pixels differ by about
    1e-6 in float32; 16-bit maps by a few units of 2^-8, and more where another pixel becomes the
    largest by rounding.
    """
    bound = 1e-4 if setting.dtype.itemsize >= 4 else 5e-2
    # By default cuDNN multiplies float32 with 10 bits of precision, which is not within the bound.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        judged = {name: works[name] for name in (judge, *setting.kernels)}
        results = {name: (work.forward(), *work.both()) for name, work in judged.items()}
    references = results.pop(judge)
    names = ["output", *(f"gradient {i}" for i in range(len(works[judge].leaves)))]
    for kernel, of_kernel in results.items():
        for name, result, reference in zip(names, of_kernel, references, strict=True):
            error = (result - reference).float().norm() / reference.float().norm()
            if not error < bound:
                part = f"{kernel}: the {name} differs from that of {judge}"
                return f"{part} by {error:.1e} of its norm"
    return None


# ---- The machine -------------------------------------------------------------------------------


def processor(device: str = "cpu") -> str:
    """The name of the processor, or of the GPU."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, marked if files differ from it; empty outside of git."""
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip()


@functools.cache
def environment(device: str = "cpu") -> dict[str, object]:
    """Device, versions and commit, to stand beside every number."""
    return {
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        **naslora_kernels.build_info(),
    }
