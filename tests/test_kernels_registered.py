"""The operators that an extension registers: what they keep and what they refuse."""

import gc
import weakref

import pytest
import torch
from kernel_cases import CELL, TARGETS, cell_case, layer_case

from naslora_kernels import nas_lora_linear
from naslora_kernels.ops import operator

registered_targets = pytest.mark.parametrize(
    "target", [target for target in TARGETS if target.values[0].backend != "triton"]
)
pytestmark = pytest.mark.usefixtures("poisoned_memory")
LAYER = ((2, 5, 4), 7, 9, 4, 3)


@registered_targets
def test_inference_mode_and_training_compute_the_same(target):
    case = layer_case(*LAYER).to(torch.bfloat16, parameter_dtype=torch.float32).on(target.device)
    with torch.inference_mode():
        h = nas_lora_linear(**case.arguments, **case.options, backend=target.backend)
    assert h.is_inference()
    assert torch.equal(case.run(target)["result"], h)


@registered_targets
def test_a_call_keeps_no_tensor(target):
    case = layer_case(*LAYER).to(torch.float32).on(target.device)
    a = case.arguments
    z = torch.zeros(2, 5, 4, 4, device=target.device)
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


@registered_targets
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
    arguments = {
        n: t.requires_grad_(n not in ("weight", "bias")) for n, t in case.arguments.items()
    }
    h = nas_lora_linear(**arguments, **case.options, backend=target.backend)
    arguments[name].data = other.to(target.device)
    with pytest.raises(RuntimeError, match=rf"^{name}: .*changed between forward and backward"):
        h.backward(case.gradient)
