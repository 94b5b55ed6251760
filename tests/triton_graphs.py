"""Prints what torch.compile sees of the ``triton`` backend, as JSON.

That is the launches in the graphs of a layer's forward and backward, with the arguments that each
writes to. The tests run under Triton's interpreter, which has nothing to trace, so this is a
program of its own. It needs no GPU: nothing is launched, and the target is only a name.
"""

import json

import torch
import triton
from functorch.compile import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._higher_order_ops.triton_kernel_wrap import get_kernel, kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from bench.gpu.triton_resources import AbsentCard
from naslora_kernels import triton as backend
from naslora_kernels.cell import Cell, LoRALinear

RANK, CHANNELS = 3, 2
CELL = [(CHANNELS, size, size) for size in (3, 5, 3, 5)] + [(4, CHANNELS, CHANNELS)]


def launches(graph: Graph) -> list[list]:
    """[kernel's name, arguments that it writes to] of each launch, in order."""
    functional = torch.ops.higher_order.triton_kernel_wrapper_functional
    nodes = [node for node in graph.nodes if node.target is functional]
    return [
        [get_kernel(node.kwargs["kernel_idx"]).fn.__name__, sorted(node.kwargs["tensors_to_clone"])]
        for node in nodes
    ]


def traced(dtype: torch.dtype, trained: str, dynamic: bool = False) -> dict[str, object]:
    """The launches of one layer, and the operators that stayed opaque or copy back.

    Args:
        dtype: of the maps; parameters are float32.
        trained: ``weights`` or ``architecture``.
        dynamic: whether the batch has any size.
    """
    weights = trained == "weights"
    kernel_side_table.reset_table()
    graphs: dict[str, Graph] = {}

    def keep(name: str):
        def compiler(module: GraphModule, inputs: list) -> object:
            graphs[name] = module.graph
            return make_boxed_func(module.forward)

        return compiler

    x = torch.empty(2, 14, 14, 64, dtype=dtype)
    sizes = [DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC] + 3 * [DimDynamic.STATIC]
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes)).requires_grad_()
        weight, bias = torch.empty(96, 64, dtype=dtype), torch.empty(96, dtype=dtype)
        adapter = [torch.empty(shape, requires_grad=weights) for shape in ((RANK, 64), (96, RANK))]
        alpha = torch.empty(8, requires_grad=not weights)
        cell = [torch.empty(shape, requires_grad=weights) for shape in CELL]
        channels = torch.empty(CHANNELS, dtype=torch.int64)

        def layer(x, weight, bias, lora_A, lora_B, alpha, channels, *cell):
            linear = LoRALinear(weight, bias, lora_A, lora_B)
            h = backend.nas_lora_linear(x, linear, Cell(alpha, *cell, channels), 1.5)
            return h.relu()

        compiled = aot_function(layer, keep("forward"), keep("backward"))
        compiled(x, weight, bias, *adapter, alpha, channels, *cell).sum().backward()
    names = [str(node.target) for graph in graphs.values() for node in graph.nodes]
    return {
        **{name: launches(graph) for name, graph in graphs.items()},
        "opaque": [name for name in names if "naslora" in name],
        "written back": [name for name in names if "copy_" in name],
    }


if __name__ == "__main__":
    triton.runtime.driver.set_active(AbsentCard(90))
    cases = {
        "weights": traced(torch.float32, "weights"),
        "architecture": traced(torch.bfloat16, "architecture"),
        "dynamic": traced(torch.float32, "weights", dynamic=True),
    }
    print(json.dumps(cases))
