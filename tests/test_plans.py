"""Plans: the launches of an operator, recorded once and repeated by an extension in one call."""

import gc
import weakref

import pytest
import torch
from kernel_cases import CELL, TARGETS, cell_case, layer_case

from naslora_kernels import mixed_cell, nas_lora_linear, ops, plans
from naslora_kernels.ops import CellNeed, LayerNeed

planned_targets = pytest.mark.parametrize(
    "target", [target for target in TARGETS if target.values[0].backend != "triton"]
)
pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAYER = ((2, 5, 4), 7, 9, 4, 3)
EVERYTHING = LayerNeed(*[True] * 5)
NEEDS = [
    EVERYTHING,
    LayerNeed(True, True, True, False, True),  # a weight step
    LayerNeed(True, False, False, True, False),  # an architecture step
    LayerNeed(False, False, True, False, False),
]


def planned(target, name):
    """The function that runs an operator by plans, without the plans of other tests."""
    function = ops._FUNCTIONS[target.backend][name]
    assert isinstance(function, plans.Planned)
    function._plans.clear()
    return function


def operator(target, name, tensors, numbers):
    """What the operator returns without a plan; None for gradients that are not needed."""
    results = ops._FUNCTIONS[target.backend][name]._function(tensors, numbers)
    if isinstance(results, torch.Tensor):
        return results
    return [None if result.shape == (0,) else result for result in results]


def cell_tensors(case):
    return (*(case.arguments[name] for name in CELL), case.options["channels"])


def forward_tensors(case):
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    return (*(case.arguments.get(name) for name in names), *cell_tensors(case))


def backward_tensors(case, seed=0):
    a = case.arguments
    shape = (*a["x"].shape[:-1], a["lora_A"].shape[0])
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(a["x"])
    matrices = (a["weight"], a["lora_A"], a["lora_B"])
    return (case.gradient, a["x"], z, *matrices, *cell_tensors(case))


def assert_same(results, expected):
    assert len(results) == len(expected)
    for result, other in zip(results, expected, strict=True):
        if other is None:
            assert result is None
        else:
            assert torch.equal(result, other)
            assert (result.dtype, result.stride()) == (other.dtype, other.stride())


@planned_targets
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c", [0, 3])
def test_repeats_the_operators_bit_for_bit(target, adapter, c):
    """The second case has other values at other addresses, which the plan of the first computes."""
    forward, backward = (planned(target, f"nas_lora_linear{end}") for end in ("", "_backward"))
    for seed in (1, 2):
        case = layer_case(*LAYER[:-1], c, seed).to(torch.bfloat16, parameter_dtype=adapter)
        case = case.on(target.device)
        tensors = forward_tensors(case)
        assert_same(forward(tensors, (1.5,)), operator(target, "nas_lora_linear", tensors, (1.5,)))
        for need in NEEDS:
            tensors = backward_tensors(case, seed)
            expected = operator(target, "nas_lora_linear_backward", tensors, (1.5, *need))
            assert_same(backward(tensors, (1.5, *need)), expected)
    assert (len(forward._plans), len(backward._plans)) == (1, len(NEEDS))


@planned_targets
def test_repeats_the_cell(target):
    forward, backward = (planned(target, f"mixed_cell{end}") for end in ("", "_backward"))
    for seed in (1, 2):
        case = cell_case((2, 5, 4, 4), 3, seed).to(torch.float32).on(target.device)
        tensors = (case.arguments["z"], *cell_tensors(case))
        assert torch.equal(forward(tensors, ()), operator(target, "mixed_cell", tensors, ()))
        tensors, need = (case.gradient, *tensors), CellNeed(True, False, True)
        expected = operator(target, "mixed_cell_backward", tensors, need)
        assert_same(backward(tensors, need), expected)
    assert (len(forward._plans), len(backward._plans)) == (1, 1)


@planned_targets
def test_each_layout_dtype_and_number_has_a_plan_of_its_own(target):
    forward = planned(target, "nas_lora_linear")
    case = layer_case(*LAYER).to(torch.float32)
    transposed = layer_case(*LAYER).to(torch.float32)
    transposed.arguments["lora_B"] = transposed.arguments["lora_B"].t().contiguous().t()
    variants = [
        case,
        case.laid_out("every_second", "contiguous"),
        case.laid_out("channels_first", "contiguous"),
        case.to(torch.float64),
        layer_case(*LAYER, bias=False).to(torch.float32),
        transposed,
    ]
    for variant in variants:
        tensors = forward_tensors(variant.on(target.device))
        for scaling in (1.0, 0.5):
            expected = operator(target, "nas_lora_linear", tensors, (scaling,))
            assert_same(forward(tensors, (scaling,)), expected)
    assert len(forward._plans) == 2 * len(variants)


@planned_targets
def test_a_layer_is_two_calls_of_the_extension(target, monkeypatch):
    case = layer_case(*LAYER).to(torch.float32).on(target.device)
    case.run(target)  # makes the plans
    calls = []
    for name in ("nas_lora_linear", "nas_lora_linear_backward"):
        function = ops._FUNCTIONS[target.backend][name]
        run = function._run
        monkeypatch.setattr(
            function, "_run", lambda *a, run=run, name=name: calls.append(name) or run(*a)
        )
        monkeypatch.setattr(function, "_function", None)
    case.run(target)
    assert calls == ["nas_lora_linear", "nas_lora_linear_backward"]


@planned_targets
def test_a_plan_made_in_inference_mode_serves_training(target):
    case = layer_case(*LAYER).to(torch.bfloat16, parameter_dtype=torch.float32).on(target.device)
    expected = operator(target, "nas_lora_linear", forward_tensors(case), (1.5,))[0]
    planned(target, "nas_lora_linear")
    with torch.inference_mode():
        h = nas_lora_linear(**case.arguments, **case.options, backend=target.backend)
    assert h.is_inference()
    assert torch.equal(h, expected)
    assert torch.equal(case.run(target)["result"], expected)


@planned_targets
def test_a_call_keeps_no_tensor(target):
    backward = planned(target, "nas_lora_linear_backward")
    case = layer_case(*LAYER).to(torch.float32).on(target.device)
    tensors = backward_tensors(case)

    def uses():
        return [tensor._use_count() for tensor in tensors if tensor is not None]

    before = uses()
    for _ in range(3):
        results = backward(tensors, (1.0, *EVERYTHING))
        dead = [weakref.ref(result) for result in results]
        storages = [result.untyped_storage() for result in results]
        del results
        gc.collect()
        assert not [reference for reference in dead if reference() is not None]
        assert all(torch._C._storage_Use_Count(s._cdata) == 1 for s in storages)
    assert uses() == before


@planned_targets
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("weight", torch.zeros(3, 2)),
        ("lora_B", torch.zeros(2, 2)),
        ("dw_sep5", torch.zeros(1, 5, 5)),
        ("weight", torch.zeros(9, 7, dtype=torch.float64)),
    ],
)
def test_what_changes_behind_the_back_of_autograd_is_named(target, name, other):
    """Assignments to ``.data`` raise no version; the kernels would read out of bounds."""
    case = layer_case(*LAYER).to(torch.float32).on(target.device)
    case.run(target, ("x", "lora_A", "lora_B", *CELL))  # makes the plans of what follows
    arguments = {
        n: t.requires_grad_(n not in ("weight", "bias")) for n, t in case.arguments.items()
    }
    h = nas_lora_linear(**arguments, **case.options, backend=target.backend)
    arguments[name].data = other.to(target.device)
    with pytest.raises(RuntimeError, match=rf"^{name}: .*changed between forward and backward"):
        h.backward(case.gradient)


@planned_targets
def test_a_storage_that_was_freed_is_named(target):
    if target.device != "cpu":
        pytest.skip("storages are looked at on a CPU alone")
    case = cell_case((2, 5, 4, 4), 3).to(torch.float32)
    for attempt in range(2):  # without a plan and with one
        arguments = {n: t.clone().requires_grad_() for n, t in case.arguments.items()}
        y = mixed_cell(**arguments, **case.options, backend=target.backend)
        if attempt:
            arguments["pw"].untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match=r"^pw: its storage has been freed"):
                y.backward(case.gradient)
        else:
            y.backward(case.gradient)


def test_what_a_plan_cannot_repeat_is_named():
    tensor = torch.empty(2, device="meta")
    with plans._Recorder(), pytest.raises(NotImplementedError, match=r"repeat aten\.add"):
        tensor + 1
