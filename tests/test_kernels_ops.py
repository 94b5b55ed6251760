"""The operators under PyTorch's own machinery: opcheck, compile, autocast, checkpointing."""

import gc
import itertools
import json
import weakref

import pytest
import torch
from fresh_process import run_fresh
from kernel_cases import (
    CELL,
    COMPILER,
    TARGETS,
    UNAVAILABLE,
    Target,
    attention_case,
    cell_case,
    few_costly,
    layer_case,
    only_cpp,
    serves_attention,
)
from torch.utils.checkpoint import checkpoint

import naslora_kernels
from naslora_kernels import mixed_cell, nas_lora_linear
from naslora_kernels.ops import operator

GRID = ((2, 7, 6), 20, 24, 6)
REFERENCE = Target("reference")


@only_cpp
def test_is_the_default_on_cpus():
    case = layer_case(*GRID, 4).to(torch.float32)
    default, named = case.run(None), case.run("cpp")
    assert all(torch.equal(default[name], named[name]) for name in named)
    arguments = {name: value.requires_grad_() for name, value in case.arguments.items()}
    assert "NASLoRALinear" in str(nas_lora_linear(**arguments, **case.options).grad_fn)


# ---- opcheck: schema, fake kernels, and aot dispatch of every operator -------------------------

# No edge of a block matters here. Sizes differ from each other and from 1, which is specialised.
# What is folded and separable has one schema.
SMALL_GRID = ((2, 3, 4), 5, 7, 6)
CHECKED = {
    "cell": lambda: cell_case((2, 3, 4, 6), 2),
    "cell without channels": lambda: cell_case((2, 3, 4, 6), 0),
    "layer": lambda: layer_case(*SMALL_GRID, 2),
    "layer without channels and bias": lambda: layer_case(*SMALL_GRID, 0, bias=False),
    "attention": lambda: attention_case(2, 2, (3, 4), 5),
}
# Numbers behind an operator's tensors, and the gradients that its backward is asked for.
SCALES = {"mixed_cell": (), "nas_lora_linear": (1.5,), "rel_pos_attention": (0.5,)}
NEEDS = {
    3: [(True, True, True), (True, False, False), (False, True, True)],
    5: [(True,) * 5, (True, False, True, False, True), (False, False, True, False, False)],
}


@pytest.mark.parametrize(
    ("target", "name", "dtype"),
    few_costly(
        TARGETS,
        itertools.product(CHECKED, (torch.float32, torch.bfloat16)),
        lambda name, dtype: "without" not in name and dtype == torch.bfloat16,
    ),
)
def test_opcheck(target, name, dtype):
    # Backends have their dispatch in common, and a simulation takes long.
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")[: 3 - target.simulated]
    case = CHECKED[name]().to(dtype, parameter_dtype=torch.float32).on(target.device)
    forward, backward = (operator(target.backend, case.function + end) for end in ("", "_backward"))
    operands, scale = [*case.arguments.values()], SCALES[case.function]
    if "bias" in case.options:
        operands.insert(2, None)
    if "channels" in case.options:
        operands.append(case.options["channels"])
    torch.library.opcheck(forward, (*operands, *scale), test_utils=utils)
    kept = forward(*operands, *scale)
    if case.function == "nas_lora_linear":
        x, weight, _, *adapter = operands
        operands, kept = [x, kept[1], weight, *adapter], ()
    saved = (*operands, *(kept if case.function == "rel_pos_attention" else ()), *scale)
    needs = NEEDS[3 if case.function == "mixed_cell" else 5]
    for need in needs[: 1 if target.simulated else None]:
        torch.library.opcheck(backward, (case.gradient, *saved, *need), test_utils=utils)


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
    served = targets if dynamic else [*targets, REFERENCE]  # Inductor would compile the reference
    names = [(case.function, name) for case in cases for name in case.arguments]
    values = [value for case in cases for value in case.arguments.values()]
    calls = [
        (case.function, {**case.options, "backend": target.backend})
        for case, target in itertools.product(cases, served)
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

BACKENDS = [pytest.param(REFERENCE, id="reference"), *TARGETS]
layers_and_attention = pytest.mark.parametrize(
    ("target", "name"), few_costly(BACKENDS, [("layer",), ("attention",)])
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


# ---- What the operators of an extension keep ---------------------------------------------------

registered_targets = pytest.mark.parametrize(
    "target", [target for target in TARGETS if target.values[0].backend != "triton"]
)


@registered_targets
def test_inference_mode_and_training_compute_the_same(target):
    case = layer_case(*SMALL_GRID, 3).to(torch.bfloat16, torch.float32).on(target.device)
    with torch.inference_mode():
        h = nas_lora_linear(**case.arguments, **case.options, backend=target.backend)
    assert h.is_inference()
    assert torch.equal(case.run(target)["result"], h)


@registered_targets
def test_a_call_keeps_no_tensor(target):
    case = layer_case(*SMALL_GRID, 3).to(torch.float32).on(target.device)
    a = case.arguments
    z = torch.zeros(2, 3, 4, 6, device=target.device)
    cell = (*(a[name] for name in CELL), case.options["channels"])
    tensors = (case.gradient, a["x"], z, a["weight"], a["lora_A"], a["lora_B"], *cell)
    backward = operator(target.backend, "nas_lora_linear_backward")

    def uses():
        return [tensor._use_count() for tensor in tensors]

    before = uses()
    results = backward(*tensors, 1.0, True, True, True, True, True)
    dead = [weakref.ref(result) for result in results]
    storages = [result.untyped_storage() for result in results]
    del results
    gc.collect()
    assert not [reference for reference in dead if reference() is not None]
    assert all(torch._C._storage_Use_Count(s._cdata) == 1 for s in storages)
    assert uses() == before


@registered_targets
def test_an_operator_that_refuses_keeps_no_tensor(target):
    case = cell_case((2, 5, 4, 4), 3).to(torch.float32).on(target.device)
    tensors = (*case.arguments.values(), case.options["channels"])
    before = [tensor._use_count() for tensor in tensors]
    forward = operator(target.backend, "mixed_cell")
    for wrong in range(len(tensors)):
        arguments = [t.flatten()[:1] if i == wrong else t for i, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match=r": expected "):
            forward(*arguments)
    assert [tensor._use_count() for tensor in tensors] == before


# ---- Which code runs ---------------------------------------------------------------------------


def probe(**environment):
    call = "[naslora_kernels.available_backends()['cpp'], naslora_kernels.build_info()]"
    result = run_fresh(f"import json, naslora_kernels; print(json.dumps({call}))", **environment)
    assert result.status == 0, result.err
    return json.loads(result.out)


@only_cpp
def test_build_info_says_what_runs():
    info = naslora_kernels.build_info()
    assert "cpp" in info["compiled"] and info["compiler"].split()[0] in ("gcc", "clang")
    assert info["instruction_set"] in info["architectures"]
    if torch.cpu._is_amx_tile_supported() and "amx" in info["architectures"]:
        assert info["instruction_set"] == "amx"
    assert info["shares_torch_threads"]


@only_cpp
def test_environment_chooses_the_instruction_set():
    reason, info = probe(NASLORA_CPU_CAPABILITY="baseline")
    assert reason is None and info["instruction_set"] == "baseline"
    reason, _ = probe(NASLORA_CPU_CAPABILITY="mmx")
    assert "'mmx'" in reason and "baseline" in reason


@only_cpp
def test_other_devices_are_refused_by_name():
    case = cell_case((1, 3, 3, 3), 2).to(torch.float32)
    meta = {name: value.to("meta") for name, value in case.arguments.items()}
    with pytest.raises(RuntimeError, match="the tensors are on 'meta'"):
        mixed_cell(**meta, channels=torch.arange(2, device="meta"), backend="cpp")
