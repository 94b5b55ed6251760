"""What the tests of the fused kernels share: random cases, memory layouts, and the error rule."""

import functools
import importlib
import itertools
import math
import os
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import naslora_kernels
from naslora_kernels import cpp
from naslora_kernels.operations import MAX_POOL

# The compiler of torch.compile. The linker commands of Inductor do not quote the path of torch.
COMPILER = "aot_eager" if " " in torch.__file__ else "inductor"

UNAVAILABLE = naslora_kernels.available_backends()
needs_cpp = UNAVAILABLE["cpp"]
only_cpp = pytest.mark.skipif(needs_cpp is not None, reason=str(needs_cpp))
INSTRUCTION_SETS = [] if needs_cpp else cpp._C.capabilities()


class Target(NamedTuple):
    """A backend under test and where its tensors live."""

    backend: str
    device: str = "cpu"
    instruction_set: str | None = None  # of the cpp backend; None leaves the best
    simulated: bool = False  # by Triton's interpreter, which is slow; CUDA's emulation is not

    @property
    def costs_a_case(self):
        """Whether every new shape or dtype takes seconds: Triton interprets it or compiles it."""
        return self.backend == "triton"

    def __str__(self):
        return "-".join(filter(None, (self.backend, self.instruction_set)))


def _targets():
    """Every backend: on its device, else simulated on the CPU, else skipped with the reason."""
    yield pytest.param(Target("cpp"), marks=_skipped_for(UNAVAILABLE["cpp"]), id="cpp")
    for backend in ("triton", "cuda"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        target = Target(backend, device, simulated=device == "cpu" and backend == "triton")
        yield pytest.param(target, marks=_skipped_for(UNAVAILABLE[backend]), id=backend)


def _skipped_for(reason):
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def serves_attention(target):
    """Whether the target's backend computes attention."""
    backend = importlib.import_module(f"naslora_kernels.{target.backend}")
    return hasattr(backend, "rel_pos_attention")


def _patch_language_once():
    """Saves a quarter of the time of Triton's interpreter.

    It replaces the functions of ``triton.language`` at each launch, and again at each call of a
    device function, where they are in place already.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_once(function):
        used = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if used and not any(tl.core.is_builtin(language.load) for language in used):
            return interpreter._LangPatchScope()  # of no changes
        return patch(function)

    interpreter._patch_lang = patch_once


TARGETS = list(_targets())
if any(target.values[0].simulated and not UNAVAILABLE["triton"] for target in TARGETS):
    _patch_language_once()
# With every instruction set of the cpp backend.
ALL_TARGETS = [
    *(pytest.param(Target("cpp", "cpu", name), id=f"cpp-{name}") for name in INSTRUCTION_SETS),
    *(TARGETS if needs_cpp else TARGETS[1:]),
]
# A simulated target takes some 10 microseconds a pixel, channel and thread or tap.
MOST_SIMULATED = int(os.environ.get("NASLORA_MOST_SIMULATED", "1300"))  # numbers in a map


def few_costly(targets, cases, fast=lambda *case: True, size=lambda *case: 0):
    """``targets`` with each of ``cases``, which are tuples of further values.

    Where a case costs seconds, it is a fast test only if ``fast`` returns True for it. The other
    cases are part of the campaign. Simulated targets get the cases of at most MOST_SIMULATED
    numbers in ``size``, and backends without attention none that has the word in its name.
    """
    parameters = []
    for target, case in itertools.product(targets, cases):
        (backend,), names = target.values, (getattr(part, "__name__", str(part)) for part in case)
        name = "-".join([target.id, *names])
        absent = "attention" in name and not serves_attention(backend)
        if not absent and not (backend.simulated and size(*case) > MOST_SIMULATED):
            slow = backend.costs_a_case and not fast(*case)
            marks = [*target.marks, *([pytest.mark.campaign] if slow else [])]
            parameters.append(pytest.param(backend, *case, marks=marks, id=name))
    return parameters


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CELL = ("alpha", "dw_sep3", "dw_sep5", "dw_dil3", "dw_dil5", "pw")


def contiguous(tensor):
    return tensor.clone(memory_format=torch.contiguous_format)


def channels_first(tensor):
    """The same values with the last dimension outermost but one, as a conv's output permuted."""
    return tensor.movedim(-1, 1).contiguous().movedim(1, -1)


def every_second(tensor):
    """The same values as a slice with step 2 of every dimension of a larger tensor."""
    larger = tensor.new_full([2 * size for size in tensor.shape], float("nan"))
    view = larger[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def offset_rows(tensor):
    """The same values inside wider rows, as a chunk of a joint projection has them.

    The padding is NaN, so that reading it shows. It is zero where PyTorch's own bfloat16 product,
    which computes the frozen part, reads it: see ``amx_reads_past_rows``.
    """
    finite = tensor.dtype == torch.bfloat16 and amx_reads_past_rows()
    return F.pad(tensor, (3, 2), value=0.0 if finite else float("nan"))[..., 3:-2]


@functools.cache
def amx_reads_past_rows():
    """Whether PyTorch's bfloat16 product multiplies the numbers behind a row by zero.

    It does on processors with AMX, for rows whose length is no multiple of 4; NaN stays NaN then.
    """
    rows = torch.full((256, 32), float("nan"), dtype=torch.bfloat16)
    rows[:, :25] = 1.0
    return bool(F.linear(rows[:, :25], torch.ones(64, 25, dtype=torch.bfloat16)).isnan().any())


LAYOUTS = {f.__name__: f for f in (contiguous, channels_first, every_second, offset_rows)}
# Layouts of an input and of a gradient. The few have every layout of each once.
LAYOUT_PAIRS = tuple(itertools.product(LAYOUTS, LAYOUTS))
FEW_LAYOUT_PAIRS = tuple(zip(LAYOUTS, [*LAYOUTS][1:] + [*LAYOUTS][:1], strict=True))


@dataclass
class Case:
    """Arguments by name, and the gradient of the result."""

    function: str
    arguments: dict
    options: dict
    gradient: torch.Tensor

    def to(self, dtype, parameter_dtype=None):
        """The case in another dtype; what is no parameter may differ from what is one."""
        own = dict.fromkeys((*CELL, "lora_A", "lora_B"), parameter_dtype or dtype)
        arguments = {name: value.to(own.get(name, dtype)) for name, value in self.arguments.items()}
        return Case(self.function, arguments, self.options, self.gradient.to(dtype))

    def laid_out(self, layout, gradient_layout):
        """The first argument in a layout, each one behind it in the next; and the gradient."""
        layouts = itertools.cycle(LAYOUTS.values())
        following = itertools.dropwhile(lambda own: own is not LAYOUTS[layout], layouts)
        pairs = zip(self.arguments.items(), following, strict=False)
        arguments = {name: own(v) if v.dim() > 1 else v for (name, v), own in pairs}
        return Case(self.function, arguments, self.options, LAYOUTS[gradient_layout](self.gradient))

    def of_each(self, function):
        """The case with every differentiable argument and the gradient replaced."""
        arguments = {name: function(value) for name, value in self.arguments.items()}
        return replace(self, arguments=arguments, gradient=function(self.gradient))

    def on(self, device):
        """The case on another device; strides stay."""
        moved, options = self.of_each(lambda tensor: tensor.to(device)), dict(self.options)
        if options.get("channels") is not None:
            options["channels"] = options["channels"].to(device)
        return replace(moved, options=options)

    def tensor(self, name):
        """An argument, or the gradient."""
        return self.gradient if name == "gradient" else self.arguments[name]

    def run(self, target, needed=None):
        """The result and the gradient of each argument in ``needed`` (None: of all), by name.

        ``target`` is a Target, on whose device the case must be, or a backend's name, or None.
        """
        needed = set(self.arguments if needed is None else needed)
        arguments = {n: v.detach().requires_grad_(n in needed) for n, v in self.arguments.items()}
        function = getattr(naslora_kernels, self.function)
        backend = target.backend if isinstance(target, Target) else target
        result = function(**arguments, **self.options, backend=backend)
        leaves = {name: arguments[name] for name in self.arguments if name in needed}
        if not leaves:
            return {"result": result}
        zero = {"allow_unused": True, "materialize_grads": True}
        gradients = torch.autograd.grad(result, list(leaves.values()), self.gradient, **zero)
        return {"result": result.detach(), **dict(zip(leaves, gradients, strict=True))}


def drawing(seed):
    """A generator, and what draws tensors in float64 by it."""
    generator = torch.Generator().manual_seed(seed)
    return generator, functools.partial(torch.randn, generator=generator, dtype=torch.float64)


def random_cell(generator, draw, rank, c):
    parameters = {
        "alpha": draw(8),
        "dw_sep3": draw(c, 3, 3) / 3,
        "dw_sep5": draw(c, 5, 5) / 5,
        "dw_dil3": draw(c, 3, 3) / 3,
        "dw_dil5": draw(c, 5, 5) / 5,
        "pw": draw(4, c, c) / max(c, 1) ** 0.5,
    }
    channels = torch.randperm(rank, generator=generator)[:c]
    return parameters, {"channels": channels}


def cell_case(shape, c, seed=0):
    """A random ``mixed_cell`` on maps (B, H, W, r), in float64, its channels permuted."""
    generator, draw = drawing(seed)
    parameters, options = random_cell(generator, draw, shape[-1], c)
    return Case("mixed_cell", {"z": draw(shape), **parameters}, options, draw(shape))


def layer_case(grid, c_in, c_out, rank, c, seed=0, bias=True, scaling=1.5):
    """A random ``nas_lora_linear`` on a grid (B, H, W), in float64."""
    generator, draw = drawing(seed)
    parameters, options = random_cell(generator, draw, rank, c)
    arguments = {"x": draw(*grid, c_in), "weight": draw(c_out, c_in) / c_in**0.5}
    arguments["bias"] = draw(c_out)
    if not bias:
        del arguments["bias"]
        options["bias"] = None
    arguments["lora_A"] = draw(rank, c_in) / c_in**0.5
    arguments["lora_B"] = draw(c_out, rank) / rank**0.5
    options["scaling"] = scaling
    return Case("nas_lora_linear", {**arguments, **parameters}, options, draw(*grid, c_out))


def attention_case(batch, heads, grid, features, queries=None, seed=0):
    """A random ``rel_pos_attention`` in float64, of so many queries; None for one of each key."""
    height, width = grid
    keys = height * width
    queries = keys if queries is None else queries
    draw = functools.partial(drawing(seed)[1], batch, heads)
    arguments = {"q": draw(queries, features)}
    arguments |= {name: draw(keys, features) for name in ("k", "v")}
    arguments |= {"rel_h": draw(queries, height), "rel_w": draw(queries, width)}
    return Case("rel_pos_attention", arguments, {"grid": grid}, draw(queries, features))


def without_max_pool(case):
    """In 16 bits z is rounded, which at random changes which pixel is the largest, here as in
    PyTorch, and sends a gradient elsewhere. The cell's tests cover the max-pool."""
    case.arguments["alpha"][MAX_POOL] = -15.0  # a weight of about 1e-7
    return case


# A small case of a (B, H, W) grid for each way to compute: the cell folds few channels. Rows of 4
# and 8 numbers: see amx_reads_past_rows.
KINDS = {
    "folded cell": lambda grid, seed=0: cell_case((*grid, 5), 2, seed),
    "separable cell": lambda grid, seed=0: cell_case((*grid, 5), 4, seed),
    "layer": lambda grid, seed=0: layer_case(grid, 8, 8, 4, 2, seed),
    "attention": lambda grid, seed=0: attention_case(grid[0], 2, grid[1:], 6, seed=seed),
}


def assert_as_good_as_reference(target, case, needed=None, ratios=None):
    """Kernels err at most twice as much as the reference in the same dtype.

    Errors are the largest distances to the reference in float64 on the same (rounded) inputs. On
    small tensors the reference is at times exact by luck, so units in the last place of the
    largest value are granted on top: two, and 16 for parameters' gradients, whose sums cancel so
    that their rounding errors are units of larger numbers. In float64 the truth itself carries
    the reference's rounding, 1e-13 of the largest value over thousands of pixels.

    Args:
        target: the backend under test.
        case: what to run, on the CPU.
        needed: the arguments whose gradients are due; None means all.
        ratios: where given, collects the (kernel, reference) errors of every inexact result, for
            ``assert_better_on_average``.

    Returns:
        What the kernels computed, by name.
    """
    case = case.on(target.device)
    kernel = case.run(target, needed)
    reference = case.run("reference", needed)
    truth = case.to(torch.float64).run("reference", needed)
    assert kernel.keys() == reference.keys()
    for name, exact in truth.items():
        assert kernel[name].dtype == reference[name].dtype, name
        assert kernel[name].shape == reference[name].shape, name
        if not exact.numel():
            continue
        unit = max(torch.finfo(kernel[name].dtype).eps, 1e-13) * exact.abs().max()
        unit *= 2 if name in ("result", "z", "x") else 16
        error = (kernel[name].double() - exact).abs().max()
        reference_error = (reference[name].double() - exact).abs().max()
        allowed = 2 * reference_error + unit
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
        if ratios is not None and error > 0 and reference_error > 0:
            ratios.setdefault(name, []).append(float(error / reference_error))
    return kernel


def assert_better_on_average(ratios):
    """Over many cases luck evens out: the geometric mean of the error ratios is about 1 at most.

    The ratios of a result scatter by a factor of about 1.5, so the mean of n has an uncertainty of
    1.5 ** (1 / sqrt(n)). Three times that is allowed, and 5 percent at least.
    """
    for name, own in ratios.items():
        mean = math.exp(sum(map(math.log, own)) / len(own))
        assert mean <= max(1.05, 1.5 ** (3 / len(own) ** 0.5)), (name, len(own), mean)
