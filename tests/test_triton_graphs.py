"""What torch.compile sees of the ``triton`` backend: its launches, and what each writes to."""

import json
from pathlib import Path

import pytest
from fresh_process import run_fresh

pytest.importorskip("triton")
WRITTEN = {
    "cell_forward_kernel": {"y_ptr"},
    "cell_backward_kernel": {"grad_z_ptr", "partials_ptr"},
    "low_rank_expand_kernel": {"out_ptr"},
    "low_rank_expand_dot_kernel": {"out_ptr"},  # for 16 bits
}
PASSES = ("low_rank_pass_kernel", "low_rank_pass_dot_kernel")  # for 32 and for 16 bits


@pytest.fixture(scope="module")
def graphs():
    """The JSON of triton_graphs.py."""
    program = Path(__file__).with_name("triton_graphs.py").read_text(encoding="utf-8")
    result = run_fresh(program, TRITON_INTERPRET=None, TRITON_DEFAULT_FP_FUSION="1")
    assert result.status == 0, result.err
    assert "assuming every input is mutated" not in result.err
    return json.loads(result.out.splitlines()[-1])


@pytest.mark.parametrize(("trained", "backward"), [("weights", 6), ("architecture", 4)])
def test_launches_are_visible(graphs, trained, backward):
    seen = graphs[trained]
    assert not seen["opaque"]
    assert not seen["written back"]  # inputs that were taken for outputs
    assert len(seen["forward"]) == 3
    assert len(seen["backward"]) == backward
    for kernel, written in (*seen["forward"], *seen["backward"]):
        if kernel in PASSES:
            assert set(written) <= {"product_ptr", "partials_ptr"}
        elif kernel == "reduce_gradients_kernel":
            assert all(name.startswith("grad_") for name in written)
        else:
            assert set(written) == WRITTEN[kernel]


def test_operators_stay_whole_for_unknown_shapes(graphs):
    seen = graphs["dynamic"]
    name = "naslora_triton.nas_lora_linear"
    assert seen["opaque"] == [f"{name}.default", f"{name}_backward.default"]
    assert not seen["forward"] + seen["backward"]
