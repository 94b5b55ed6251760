"""The operators under PyTorch's own machinery: opcheck, compile, autocast, checkpointing, DDP."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import in_two_processes
from kernel_cases import CELL, COMPILER, TARGETS, cell_case, few_costly, layer_case, needs_cpp
from torch.utils.checkpoint import checkpoint

import naslora_kernels
from naslora_kernels import mixed_cell, nas_lora_linear
from naslora_kernels.ops import operator

only_cpp = pytest.mark.skipif(bool(needs_cpp), reason=str(needs_cpp))
every_target = pytest.mark.parametrize("target", TARGETS)
# What torch.compile generates calls the device's code, which a simulation is not.
compiled_targets = pytest.mark.parametrize(
    "target", [target for target in TARGETS if not target.values[0].simulated]
)

ADAPTER = ("lora_A", "lora_B", *CELL)
GRID = ((2, 7, 6), 20, 24, 6)


@only_cpp
def test_is_the_default_on_cpus():
    case = layer_case(*GRID, 4).to(torch.float32)
    default, named = case.run(None), case.run("cpp")
    assert all(torch.equal(default[name], named[name]) for name in named)
    assert "NASLoRALinear" in str(
        nas_lora_linear(
            **{n: t.requires_grad_() for n, t in case.arguments.items()}, **case.options
        ).grad_fn
    )


# ---- opcheck: schema, fake kernels, and aot dispatch of every operator -------------------------

# Without channels, folded, and separable.
opchecks = pytest.mark.parametrize(
    ("target", "dtype", "c"),
    few_costly(
        TARGETS,
        [(torch.float32, 0), (torch.bfloat16, 2), (torch.float32, 5)],
        lambda dtype, c: c == 2,
    ),
)
# No edge of a block matters here. Sizes differ from each other and from 1, which is specialised.
SMALL_GRID = ((2, 3, 4), 5, 7, 6)

ENDS = ("", "_backward")
UTILS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def cell_operands(case):
    a = case.arguments
    return (
        *(a[name] for name in CELL),
        case.options["channels"],
    )


@opchecks
def test_opcheck_cell(target, dtype, c):
    forward, backward = (operator(target.backend, f"mixed_cell{end}") for end in ENDS)
    case = cell_case((2, 3, 4, 6), c).to(dtype, parameter_dtype=torch.float32).on(target.device)
    z, operands = case.arguments["z"], cell_operands(case)
    torch.library.opcheck(forward, (z, *operands), test_utils=UTILS)
    for need in ((True, True, True), (True, False, False), (False, True, True)):
        torch.library.opcheck(
            backward,
            (case.gradient, z, *operands, *need),
            test_utils=UTILS,
        )


@opchecks
def test_opcheck_layer(target, dtype, c):
    forward, backward = (operator(target.backend, f"nas_lora_linear{end}") for end in ENDS)
    case = layer_case(*SMALL_GRID, c).to(dtype, parameter_dtype=torch.float32).on(target.device)
    a, operands = case.arguments, (*cell_operands(case), 1.5)
    frozen = (a["x"], a["weight"])
    adapter = (a["lora_A"], a["lora_B"])
    for bias in (a["bias"], None):
        torch.library.opcheck(
            forward, (*frozen, bias, *adapter, *operands),
            test_utils=UTILS,
        )  # fmt: skip
    z = torch.randn(2, 3, 4, 6).to(case.gradient)
    for need in ([True] * 5, [True, False, False, True, False], [False, False, True, False, False]):
        torch.library.opcheck(
            backward,
            (case.gradient, a["x"], z, a["weight"], *adapter, *operands, *need),
            test_utils=UTILS,
        )


# ---- torch.compile -----------------------------------------------------------------------------


@compiled_targets
@pytest.mark.parametrize("dynamic, make", [
    (False, lambda: (mixed_cell, cell_case((2, 5, 4, 6), 4))),
    (True, lambda: (nas_lora_linear, layer_case(*GRID, 4))),
], ids=["cell", "layer"])  # fmt: skip
def test_compiled_training_step_equals_eager(target, make, dynamic):
    function, case = make()
    case = case.to(torch.float32).on(target.device)
    case.options["backend"] = target.backend
    names = list(case.arguments)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=COMPILER)
    def step(*values):
        result = function(**dict(zip(names, values, strict=True)), **case.options)
        return (2 * result).square().sum()  # something for the compiler to fuse around it

    def gradients(step):
        leaves = [t.clone().requires_grad_() for t in case.arguments.values()]
        return torch.autograd.grad(step(*leaves), leaves)

    def eager(*values):
        result = function(**dict(zip(names, values, strict=True)), **case.options)
        return (2 * result).square().sum()

    for name, compiled, expected in zip(names, gradients(step), gradients(eager), strict=True):
        torch.testing.assert_close(
            compiled, expected, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- autocast, checkpointing, DDP --------------------------------------------------------------


@every_target
def test_autocast_computes_as_on_cast_tensors(target):
    case = layer_case(*GRID, 4).to(torch.float32).on(target.device)
    arguments = {n: t.requires_grad_(n != "weight") for n, t in case.arguments.items()}
    with torch.autocast(target.device, torch.bfloat16):
        h = nas_lora_linear(**arguments, **case.options, backend=target.backend)
    assert h.dtype == torch.bfloat16
    gradients = torch.autograd.grad(
        h, [arguments["x"], arguments["lora_A"]], case.gradient.bfloat16()
    )
    cast = case.to(torch.bfloat16, parameter_dtype=torch.float32).run(target)
    assert torch.equal(h, cast["result"])
    # The gradient of x is cast back to the float32 of the leaf.
    assert torch.equal(gradients[0], cast["x"].float())
    assert torch.equal(gradients[1], cast["lora_A"])


@every_target
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(target, reentrant):
    case = layer_case(*GRID, 4).to(torch.float32).on(target.device)
    expected = case.run(target)
    leaves = {n: t.clone().requires_grad_() for n, t in case.arguments.items()}

    def layer(*values):
        return nas_lora_linear(
            **dict(zip(leaves, values, strict=True)), **case.options, backend=target.backend
        )

    h = checkpoint(layer, *leaves.values(), use_reentrant=reentrant)
    h.backward(case.gradient)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]), name


class Layer(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case
        for name in ADAPTER:
            self.register_parameter(name, torch.nn.Parameter(case.arguments[name]))

    def forward(self, x):
        a = self.case.arguments
        parameters = {name: getattr(self, name) for name in ADAPTER}
        return nas_lora_linear(
            x, a["weight"], a["bias"], **parameters, **self.case.options, backend="cpp"
        )


def train_under_ddp(rank, folder):
    """One process of two: its half of the batch, two backward passes, its gradients to a file."""
    case = layer_case(*GRID, 4).to(torch.float32)
    half = slice(rank, rank + 1)  # the batch has two maps
    # Without a search for unused parameters: every parameter gets its gradient.
    module = torch.nn.parallel.DistributedDataParallel(Layer(case))
    for _ in range(2):
        module.zero_grad()
        module(case.arguments["x"][half]).backward(case.gradient[half])
    torch.save({n: getattr(module.module, n).grad for n in ADAPTER}, folder / f"{rank}.pt")


@only_cpp
def test_distributed_data_parallel(tmp_path):
    in_two_processes(train_under_ddp, tmp_path, tmp_path)
    expected = layer_case(*GRID, 4).to(torch.float32).run("cpp")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in ADAPTER:
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        # DDP averages, the whole batch sums; the sums are taken in another order.
        torch.testing.assert_close(2 * ranks[0][name], expected[name], rtol=1e-4, atol=1e-5)


# ---- Which code runs ---------------------------------------------------------------------------

PROBE = """
import json, naslora_kernels
print(json.dumps([naslora_kernels.available_backends()["cpp"], naslora_kernels.build_info()]))
"""


def probe(**environment):
    output = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return json.loads(output)


@only_cpp
def test_build_info_says_what_runs():
    info = naslora_kernels.build_info()
    assert "cpp" in info["compiled"]
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["instruction_set"] in info["architectures"]
    assert info["shares_torch_threads"]


@only_cpp
def test_environment_chooses_the_instruction_set():
    reason, info = probe(NASLORA_CPU_CAPABILITY="baseline")
    assert reason is None
    assert info["instruction_set"] == "baseline"


@only_cpp
def test_impossible_instruction_set_is_named():
    reason, _ = probe(NASLORA_CPU_CAPABILITY="mmx")
    assert "'mmx'" in reason
    assert "baseline" in reason


@only_cpp
def test_other_devices_are_refused_by_name():
    case = cell_case((1, 3, 3, 3), 2).to(torch.float32)
    meta = {name: value.to("meta") for name, value in case.arguments.items()}
    with pytest.raises(RuntimeError, match="the tensors are on 'meta'"):
        mixed_cell(**meta, channels=torch.arange(2, device="meta"), backend="cpp")
