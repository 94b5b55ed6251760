"""The operators under PyTorch's own machinery: opcheck, compile, autocast, checkpointing."""

import itertools
import json

import pytest
import torch
from fresh_process import run_fresh
from kernel_cases import (
    CELL,
    COMPILER,
    TARGETS,
    UNAVAILABLE,
    attention_case,
    cell_case,
    few_costly,
    layer_case,
    needs_cpp,
    serves_attention,
)
from torch.utils.checkpoint import checkpoint

import naslora_kernels
from naslora_kernels import mixed_cell, nas_lora_linear
from naslora_kernels.ops import operator

only_cpp = pytest.mark.skipif(bool(needs_cpp), reason=str(needs_cpp))
every_target = pytest.mark.parametrize("target", TARGETS)

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

opchecks = pytest.mark.parametrize(
    ("target", "dtype", "c"),
    few_costly(
        TARGETS,
        [(torch.float32, 0), (torch.bfloat16, 2)],  # what is folded and separable has one schema
        lambda dtype, c: c == 2,
    ),
)
# No edge of a block matters here. Sizes differ from each other and from 1, which is specialised.
SMALL_GRID = ((2, 3, 4), 5, 7, 6)

ENDS = ("", "_backward")
NEEDS = ((True, True, True), (True, False, False), (False, True, True))
LAYER_NEEDS = ([True] * 5, [True, False, False, True, False], [False, False, True, False, False])


def utils(target):
    """What opcheck tests. Backends have their dispatch in common, and a simulation takes long."""
    return ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")[: 3 - target.simulated]


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
    torch.library.opcheck(forward, (z, *operands), test_utils=utils(target))
    for need in NEEDS[: 1 if target.simulated else None]:
        torch.library.opcheck(
            backward,
            (case.gradient, z, *operands, *need),
            test_utils=utils(target),
        )


@opchecks
def test_opcheck_layer(target, dtype, c):
    forward, backward = (operator(target.backend, f"nas_lora_linear{end}") for end in ENDS)
    case = layer_case(*SMALL_GRID, c).to(dtype, parameter_dtype=torch.float32).on(target.device)
    a, operands = case.arguments, (*cell_operands(case), 1.5)
    frozen = (a["x"], a["weight"])
    adapter = (a["lora_A"], a["lora_B"])
    simulated = 1 if target.simulated else None  # each call takes long
    for bias in (a["bias"], None)[:simulated]:
        torch.library.opcheck(
            forward, (*frozen, bias, *adapter, *operands),
            test_utils=utils(target),
        )  # fmt: skip
    z = torch.randn(2, 3, 4, 6).to(case.gradient)
    for need in LAYER_NEEDS[:simulated]:
        torch.library.opcheck(
            backward,
            (case.gradient, a["x"], z, a["weight"], *adapter, *operands, *need),
            test_utils=utils(target),
        )


# ---- torch.compile -----------------------------------------------------------------------------

CASES = {
    "cell": lambda: cell_case((2, 5, 4, 6), 4),
    "layer": lambda: layer_case(*GRID, 4),
    "attention": lambda: attention_case(2, 2, (3, 4), 5),
}


def float32_case(target, name):
    return CASES[name]().to(torch.float32).on(target.device)


def compiled_together():
    """The backends of each device. torch.compile calls the device's code, not a simulation's."""
    served = [target.values[0] for target in TARGETS if not UNAVAILABLE[target.values[0].backend]]
    for device in dict.fromkeys(target.device for target in served):
        yield [target for target in served if target.device == device and not target.simulated]


@pytest.mark.parametrize(
    "targets", list(compiled_together()), ids=lambda targets: "-".join(map(str, targets))
)
@pytest.mark.parametrize("dynamic, compiler", [(False, "aot_eager"), (True, COMPILER)])
def test_compiled_training_step_equals_eager(targets, dynamic, compiler):
    """All operators are in one graph, because each compilation takes seconds."""
    cases = [float32_case(targets[0], name) for name in CASES]
    names = [(case.function, name) for case in cases for name in case.arguments]
    values = [value for case in cases for value in case.arguments.values()]
    calls = [
        (case.function, {**case.options, "backend": target.backend})
        for case, target in itertools.product(cases, targets)
        if case.function != "rel_pos_attention" or serves_attention(target)
    ]
    torch.compiler.reset()

    def step(*values):
        loss = 0
        for function, options in calls:
            given = zip(names, values, strict=True)
            arguments = {name: value for (of, name), value in given if of == function}
            result = getattr(naslora_kernels, function)(**arguments, **options)
            loss = loss + (2 * result).square().sum()  # something to fuse around it
        return loss

    def gradients(step):
        leaves = [value.clone().requires_grad_() for value in values]
        return torch.autograd.grad(step(*leaves), leaves)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for name, own, expected in zip(names, gradients(compiled), gradients(step), strict=True):
        torch.testing.assert_close(own, expected, msg=lambda text, name=name: f"{name}: {text}")


# ---- autocast, checkpointing --------------------------------------------------------------

OF_ATTENTION = [target for target in TARGETS if serves_attention(target.values[0])]
layers_and_attention = pytest.mark.parametrize(
    ("target", "name"),
    [*few_costly(TARGETS, [("layer",)], bool), *few_costly(OF_ATTENTION, [("attention",)], bool)],
)


@layers_and_attention
def test_autocast_computes_as_on_cast_tensors(target, name):
    case = float32_case(target, name)
    arguments = {n: t.requires_grad_(n != "weight") for n, t in case.arguments.items()}
    call = getattr(naslora_kernels, case.function)
    with torch.autocast(target.device, torch.bfloat16):
        h = call(**arguments, **case.options, backend=target.backend)
    assert h.dtype == torch.bfloat16
    trained = [n for n in arguments if n != "weight"]
    gradients = torch.autograd.grad(h, [arguments[n] for n in trained], case.gradient.bfloat16())
    cast = case.to(torch.bfloat16, parameter_dtype=torch.float32).run(target, trained)
    assert torch.equal(h, cast["result"])
    # The gradients of leaves are cast back to float32.
    for n, gradient in zip(trained, gradients, strict=True):
        assert torch.equal(gradient, cast[n].float()), n


@layers_and_attention
def test_checkpointing_gives_the_same_gradients(target, name):
    case = float32_case(target, name)
    expected = case.run(target)
    call = getattr(naslora_kernels, case.function)
    # A simulation takes long. One way each: the layer and attention do not differ in this.
    for reentrant in [name == "layer"] if target.simulated else [False, True]:
        leaves = {n: t.clone().requires_grad_() for n, t in case.arguments.items()}

        def function(*values, names=tuple(leaves)):
            values = dict(zip(names, values, strict=True))
            return call(**values, **case.options, backend=target.backend)

        h = checkpoint(function, *leaves.values(), use_reentrant=reentrant)
        h.backward(case.gradient)
        for n, leaf in leaves.items():
            assert torch.equal(leaf.grad, expected[n]), n


# ---- Which code runs ---------------------------------------------------------------------------

PROBE = """
import json, naslora_kernels
print(json.dumps([naslora_kernels.available_backends()["cpp"], naslora_kernels.build_info()]))
"""


def probe(**environment):
    result = run_fresh(PROBE, **environment)
    assert result.status == 0, result.err
    return json.loads(result.out)


@only_cpp
def test_build_info_says_what_runs():
    info = naslora_kernels.build_info()
    assert "cpp" in info["compiled"]
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["instruction_set"] in info["architectures"]
    if torch.cpu._is_avx512_bf16_supported():
        assert info["instruction_set"] in ("avx512_bf16", "amx")
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
