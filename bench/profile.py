"""Where the time of a weight step goes: ``python -m bench.profile``.

One step of each candidate is profiled after one that warms up. The seconds of an operator are its
own, without those of the operators it calls. Candidates are named as in ``bench.models``.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from bench import models
from bench.models import PRECISIONS, STOCK, Setting
from naslora.report.tables import Table, markdown_table

# The first family that has a part of an operator's name counts it.
FAMILIES = {
    "attention": ("rel_pos_attention", "bmm", "softmax", "scaled_dot_product"),
    "the adapter's own kernels": ("nas_lora_linear", "mixed_cell"),
    "linear layers and convolutions": ("mm", "convolution", "linear"),
    "norms and GELU": ("layer_norm", "gelu", "batch_norm"),
    "copies and casts": ("copy_", "cat", "index", "pad", "fill_", "zero_", "clone", "Partition"),
    "additions": ("add",),
}
OTHER = "everything else"


def family_of(operator: str) -> str:
    """The row in which an operator is counted."""
    for family, parts in FAMILIES.items():
        if any(part in operator for part in parts):
            return family
    return OTHER


def seconds_by_family(candidate: models.Candidate) -> dict[str, float]:
    """Seconds of one weight step by family."""
    candidate.weight_step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        candidate.weight_step()
    seconds = dict.fromkeys((*FAMILIES, OTHER), 0.0)
    for event in profiled.key_averages():
        seconds[family_of(event.key)] += event.self_cpu_time_total / 1e6
    return seconds


def main() -> None:
    """Prints a table with one column a candidate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="no")
    parser.add_argument("--names", nargs="+", default=["lora" + STOCK, "nas-pc-lora"])
    arguments = parser.parse_args()
    setting = Setting(arguments.model, arguments.image_size, arguments.batch, arguments.precision)
    found = models.candidates(setting, arguments.names, models.untouched(setting))
    columns = {name: seconds_by_family(candidate) for name, candidate in found.items()}
    rows = [
        [family, *(f"{seconds[family]:.2f}" for seconds in columns.values())]
        for family in (*FAMILIES, OTHER)
    ]
    rows.append(["in all", *(f"{sum(seconds.values()):.2f}" for seconds in columns.values())])
    print(f"{setting}, {torch.get_num_threads()} threads, seconds\n")
    print(markdown_table(Table(["", *columns], rows)))


if __name__ == "__main__":
    main()
