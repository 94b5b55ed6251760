"""Counts the launches and the bytes of whole adapter layers on a GPU, without one.

    python -m bench.gpu.adapter_bytes

The frozen product belongs to a layer here. Ours are the launches of
``bench.gpu.layer_bytes`` and the product. PEFT's LoRA and Conv-LoRA run on tensors that have only
shapes: each operation of PyTorch counts as one launch, and every tensor that it reads or writes
counts once. Conv-LoRA's maps are spread evenly over its experts. Prints Markdown.
"""

import sys
from types import SimpleNamespace

import torch
from torch import nn

from bench import cases
from bench.gpu import attention_bytes, launches, layer_bytes
from naslora.methods.conv_lora import Balance, ConvLoRAConfig, ConvLoRALinear

CASE = (cases.HUGE_BATCH, 3)
WORKS = {"forward": "layer, forward", "backward": "layer, backward, weight step"}
Counted = dict[str, tuple[int, int]]  # launches and bytes, by direction


def ours(case: tuple[cases.Shape, int]) -> Counted:
    """Our layer: its launches, and the frozen product that is added to the expansion.

    The other order moves the same bytes: the second of the two reads what the first has written.
    """
    operands = launches.Operands(*case, layer_bytes.DTYPE)
    x, h, weight = (
        layer_bytes.bytes_of(t) for t in (operands.x, operands.grad_h, operands.linear[0])
    )
    results = {"forward": h, "backward": x}
    counted = {}
    for direction, work in WORKS.items():
        found = layer_bytes.count(launches.WORKS[work], operands, layer_bytes.backends()["triton"])
        moved = sum(launch.read + launch.written for launch in found)
        counted[direction] = (len(found) + 1, moved + x + weight + h + results[direction])
    return counted


def recorded(layer: nn.Module, case: tuple[cases.Shape, int]) -> Counted:
    """What PyTorch launches for a layer, forward and backward."""
    shape, _ = case
    layer = layer.to("meta", layer_bytes.DTYPE)
    like = {"device": "meta", "dtype": layer_bytes.DTYPE}
    x = torch.empty(*shape.grid, shape.c_in, **like).requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    with attention_bytes.Recorder() as forward:
        h = layer(x)
    with attention_bytes.Recorder() as backward:
        torch.autograd.grad(h, leaves, torch.empty_like(h), allow_unused=True)
    return {
        "forward": (len(forward.launches), attention_bytes.moved(forward.launches)),
        "backward": (len(backward.launches), attention_bytes.moved(backward.launches)),
    }


def conv_lora(case: tuple[cases.Shape, int]) -> nn.Module:
    """Conv-LoRA's layer. Its gate is computed; the numbers of maps that it chose are made up."""
    shape, rank = case
    base = nn.Linear(shape.c_in, shape.c_out).requires_grad_(False)
    layer = ConvLoRALinear(base, ConvLoRAConfig(rank=rank), Balance(), torch.Generator())
    choose, experts, maps = layer.choose, len(layer.experts), shape.grid[0]
    spread = [maps // experts + (i < maps % experts) for i in range(experts)]

    def chosen(pooled):
        return choose(pooled)[0], SimpleNamespace(tolist=lambda: spread)

    layer.choose = chosen
    return layer


def main() -> int:
    """Prints the table."""
    shape, rank = CASE
    base = nn.Linear(shape.c_in, shape.c_out).requires_grad_(False)
    rows = {
        "ours": ours(CASE),
        "PEFT LoRA": recorded(cases.peft_lora(base, rank), CASE),
        "Conv-LoRA": recorded(conv_lora(CASE), CASE),
    }
    print("| layer | launches forward | MB | launches backward | MB |\n|---|---|---|---|---|")
    for name, counted in rows.items():
        cells = [f"{n} | {moved / 1e6:.1f}" for n, moved in counted.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
