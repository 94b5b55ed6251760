"""Tables and claims from measurements: ``python -m bench.report FILE``.

FILE is what ``pytest bench/ --benchmark-only --benchmark-json FILE`` wrote; several are read as
one. It prints the kernels' ratios, the paper's Table 5 and its cost claims. A ratio is the median
over rounds of two candidates' seconds in the same round. The exit status is 1 if a claim fails or
was not measured, or if a target of the kernels is missed.
"""

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import tyro

from bench import attention, prompts
from bench.kinds import KINDS
from bench.models import COMPILED, MERGED, ON, STOCK, UNTOUCHED, Setting
from bench.timing import Times
from naslora.methods import METHODS
from naslora.report.tables import Table, markdown_table

# Table 5 of the paper, on a V100: iterations a second, training and inference.
PAPER = {
    "bitfit": (1.82, 4.62),
    "sam-adapter": (1.73, 4.38),
    "vpt": (1.41, 4.39),
    "lora": (1.64, 4.62),
    "conv-lora": (1.22, 3.64),
    "dora": (1.61, 4.62),
    "vera": (13.14, 4.62),
    "nas-pc-lora": (1.57, 4.62),
}
PAPER_EPOCH = {"lora": 20.3, "nas-pc-lora": 25.2}  # minutes, with the steps for alpha

# The ratios that the design of the kernels requires, by work and direction. "frozen linear" is the
# other way round: the fused layer takes at most 1.06 x its time.
TARGETS = {
    ("cell vit_b windows r=3", "both"): {"reference": 6.0, "reference compiled": 4.0},
    ("cell vit_b global r=3", "both"): {"reference": 6.0, "reference compiled": 4.0},
    ("cell vit_b windows r=24", "both"): {"reference": 3.0, "reference compiled": 3.0},
    ("layer vit_b windows r=3", "both"): {"frozen linear": 1 / 1.06},
    ("layer vit_b mlp r=3", "both"): {"frozen linear": 1 / 1.06},
    ("attention vit_b global heads=12", "both"): {attention.STOCK: 2.2},
    ("attention vit_b global heads=12", "forward"): {attention.STOCK: 2.0},
    ("attention vit_b windows heads=12", "both"): {attention.STOCK: 1.15},
    ("attention vit_b windows heads=12", "forward"): {attention.STOCK: 1.2},
}


Key = tuple[str, str]
"""A candidate and a step: "weights", "architecture", "epoch", "inference" or "saved"."""


@dataclass
class Measured:
    """What the files hold of one setting."""

    numbers: dict[Key, list[float]] = field(default_factory=dict)
    """Seconds round by round; of "saved" the bytes kept for the backward, which do not vary."""
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    """By candidate: bytes, as ``bench.suite.measure_memory``."""

    def ratio(self, one: Key, other: Key) -> Times | None:
        """One / other, over the rounds; None if one was not measured."""
        if one not in self.numbers or other not in self.numbers:
            return None
        return Times.ratio(self.numbers[one], self.numbers[other])


class Claim(NamedTuple):
    """A ratio of two candidates, and what it may be at the most."""

    one: Key
    other: Key
    at_most: float

    @property
    def text(self) -> str:
        """What the ratio is."""
        second = STEPS[self.other[1]] + " " if self.other[1] != self.one[1] else ""
        return f"{STEPS[self.one[1]]} of {_title(self.one[0])} / {second}of {_title(self.other[0])}"


STEPS = {
    "weights": "a weight step",
    "architecture": "an architecture step",
    "inference": "inference",
    "saved": "bytes saved for the backward",
}


def _title(name: str) -> str:
    for separator in (MERGED, STOCK, COMPILED):
        method, found, rest = name.partition(separator)
        if found:
            return f"{_title(method)},{separator}{rest}"
    method, on, target = name.partition(ON)
    return METHODS[method].title + on + target if method in METHODS else name


LORA, OURS = ("lora", "weights"), ("nas-pc-lora", "weights")
STOCK_LORA = ("lora" + STOCK, "weights")
OURS_SAVED = ("nas-pc-lora", "saved")
EXACT, UNMERGED = (f"nas-pc-lora{MERGED}exact", "inference"), (UNTOUCHED, "inference")
ALWAYS = (
    Claim(("nas-pc-lora", "architecture"), OURS, 1.0),
    Claim((f"nas-pc-lora{MERGED}center", "inference"), UNMERGED, 1.01),
    Claim((f"nas-pc-lora{MERGED}calibrated", "inference"), UNMERGED, 1.01),
    Claim(OURS_SAVED, ("lora", "saved"), 1.02),
)
# Other settings have no claims. Their ratios are only shown.
CLAIMS = {
    Setting("vit_b", 256, 4): (
        Claim(OURS, STOCK_LORA, 0.90),
        Claim(EXACT, UNMERGED, 1.01),
        *ALWAYS,
    ),
    Setting("vit_b", 256, 4, "bf16"): (
        Claim(OURS, STOCK_LORA, 0.85),
        Claim(EXACT, UNMERGED, 1.01),
        *ALWAYS,
    ),
    Setting("vit_b", 1024, 1): (
        Claim(OURS, STOCK_LORA, 0.65),
        Claim(OURS, ("conv-lora" + STOCK, "weights"), 0.667),
        Claim(EXACT, (UNTOUCHED + STOCK, "inference"), 0.75),
        Claim(OURS_SAVED, ("lora" + STOCK, "saved"), 0.5),
        *ALWAYS,
    ),
}


def main(files: tyro.conf.Positional[tuple[Path, ...]]) -> int:
    """Prints the tables and the claims; returns 1 if a claim fails or was not measured.

    Args:
        files: what pytest-benchmark wrote.
    """
    entries = [entry for path in files for entry in json.loads(path.read_text())["benchmarks"]]
    print(about(entries))
    measured = by_setting(entries)
    text, good = kernels_table(entries)
    good &= bool(measured or text)
    if text:
        print(f"\n## kernels\n\n{text}")
    for setting, numbers in measured.items():
        print(f"\n## {setting}\n")
        tables = (show(numbers) for show in (training, promptable, inference, memory))
        print("\n\n".join(filter(None, tables)))
        if setting in CLAIMS:
            text, held = claims(CLAIMS[setting], numbers)
            print(f"\n{text}")
            good &= held
    found = [entry for entry in entries if entry["group"] == "startup"]
    rows = [[e["name"], f"{1e3 * statistics.median(e['stats']['data']):,.1f}"] for e in found]
    if rows:
        print(f"\n## startup, medians\n\n{_table(['What', 'ms'], rows)}")
    return 0 if good else 1


def by_setting(entries: list[dict]) -> dict[Setting, Measured]:
    """Sorts the entries of the groups that measure whole models."""
    found: dict[Setting, Measured] = {}
    for entry in entries:
        info = entry["extra_info"]
        if entry["group"] not in ("training_step", "promptable_step", "inference", "memory"):
            continue
        names = ("model", "image_size", "batch", "precision", "device")
        measured = found.setdefault(Setting(*(info[name] for name in names)), Measured())
        if entry["group"] == "memory":
            measured.memory[info["candidate"]] = info
            measured.numbers[info["candidate"], "saved"] = [info["saved"]] * 2
        else:
            measured.numbers[info["candidate"], info["step"]] = entry["stats"]["data"]
    return found


def about(entries: list[dict]) -> str:
    """Device, versions and commits of the entries that tell them."""
    names = ("processor", "device", "threads", "commit", "version", "torch", "instruction_set")
    lines = []
    for name in names:
        values = {str(e["extra_info"][name]) for e in entries if name in e["extra_info"]}
        lines += [f"{name}: {', '.join(sorted(values))}"] if values else []
    return "\n".join(lines)


def training(measured: Measured) -> str:
    """Table 5's training columns beside the paper's."""
    rows = []
    for name, step in measured.numbers:
        if step != "weights":
            continue
        paper, like = PAPER.get(name.removesuffix(STOCK)), LORA[0] + "".join(name.partition(ON)[1:])
        rows.append(
            [
                _title(name),
                _cuts(measured.numbers.get((name, "weights"))),
                _ratio(measured.ratio((name, "weights"), STOCK_LORA)),
                _ratio(measured.ratio((name, "weights"), (like, "weights"))),
                _plain(paper and PAPER["lora"][0] / paper[0]),
                _cuts(measured.numbers.get((name, "architecture"))),
                _ratio(measured.ratio((name, "architecture"), (name, "weights"))),
                _ratio(measured.ratio((name, "epoch"), (like, "weights"))),
                _plain(name in PAPER_EPOCH and PAPER_EPOCH[name] / PAPER_EPOCH["lora"]),
            ]
        )
    head = ["Method", "weight step, ms (p20, p80)", "× LoRA, stock attention", "× LoRA", "paper"]
    head += ["architecture step, ms", "× its weight step", "epoch with α × LoRA", "paper"]
    return _table(head, rows)


def promptable(measured: Measured) -> str:
    """Promptable steps beside a semantic one."""
    rows = []
    for step in prompts.STEPS:
        ratio = measured.ratio((prompts.PROMPTABLE, step), prompts.SEMANTIC)
        if ratio is not None:
            rows.append([step, _cuts(measured.numbers[prompts.PROMPTABLE, step]), _ratio(ratio)])
    return _table(["Promptable step", "ms (p20, p80)", "× a semantic step"], rows)


def inference(measured: Measured) -> str:
    """Table 5's inference column: every method before and after merging."""
    rows = []
    for name, step in measured.numbers:
        if step != "inference":
            continue
        paper = PAPER.get(name)
        others = ((UNTOUCHED + STOCK, step), (UNTOUCHED, step))
        ratios = [_ratio(measured.ratio((name, step), other)) for other in others]
        times = _cuts(measured.numbers[name, step])
        rows.append([_title(name), times, *ratios, _plain(paper and PAPER["lora"][1] / paper[1])])
    head = ["Model", "inference, ms (p20, p80)", "× untouched, stock attention", "× untouched"]
    return _table([*head, "paper × LoRA"], rows)


def memory(measured: Measured) -> str:
    """What steps take: bytes, operations, calls; of a weight step / of an architecture step."""
    columns = {
        "saved": ("saved for the backward, MB", 1e-6, ",.1f"),
        "peak": ("peak, MB", 1e-6, ",.1f"),
        "operations": ("10⁹ operations", 1e-9, ",.1f"),
        "calls": ("operator calls", 1, ","),
    }
    rows = []
    for name, info in measured.memory.items():
        saved = measured.ratio((name, "saved"), ("lora" + STOCK, "saved"))
        row = [_title(name), _plain(saved and saved.p50)]
        for key, (_, factor, form) in columns.items():
            values = [info[k] for k in (key, f"architecture_{key}") if k in info]
            row.append(" / ".join(format(factor * value, form) for value in values))
        rows.append(row)
    head = ["Method", "saved × LoRA, stock attention"]
    return _table([*head, *(head for head, _, _ in columns.values())], rows)


def kernels_table(entries: list[dict]) -> tuple[str, bool]:
    """Every candidate's seconds, over those of the fused kernels, and whether all targets hold."""
    seconds: dict[tuple[str, str], dict[str, list[float]]] = {}
    about = {}
    for entry in entries:
        if entry["group"] in KINDS:
            info = entry["extra_info"]
            key = info["work"], info["direction"]
            seconds.setdefault(key, {})[info["candidate"]] = entry["stats"]["data"]
            about[key] = info
    rows, good = [], True
    for key, of_case in seconds.items():
        info, fused = about[key], of_case.get("cpp")
        for candidate, own in of_case.items():
            row = [*key, candidate, _cuts(own)]
            if candidate == "cpp":
                reached = info["bytes"] / Times.of(own).p50 / info["copy_bandwidth"]
                work = f"{info['bytes'] / 1e6:.2f}", f"{info['operations'] / 1e6:.1f}"
                row += ["", "", *work, f"{reached:.2f}"]
            else:
                ratio = fused and Times.ratio(own, fused)
                target = TARGETS.get(key, {}).get(candidate)
                good &= target is None or (bool(ratio) and ratio.p50 >= target)
                row += [_ratio(ratio), "" if target is None else f"{target:.3f}", "", "", ""]
            rows.append(row)
    head = ["Work", "direction", "candidate", "ms (p20, p80)", "× fused (p20, p80)", "required"]
    return _table([*head, "MB", "10⁶ operations", "of copy bandwidth"], rows), good


def claims(claimed: Iterable[Claim], measured: Measured) -> tuple[str, bool]:
    """The claims as a table, and whether all of them hold."""
    rows, good = [], True
    for claim in claimed:
        value = measured.ratio(claim.one, claim.other)
        held = value is not None and value.p50 <= claim.at_most
        verdict = "not measured" if value is None else "holds" if held else "FAILS"
        rows.append([claim.text, f"≤ {claim.at_most}", _ratio(value), verdict])
        good &= held
    return _table(["Claim", "required", "measured (p20, p80)", ""], rows), good


def _cuts(seconds: list[float] | None) -> str:
    if seconds is None:
        return ""
    p20, p50, p80 = (f"{1e3 * t:,.{0 if t > 0.1 else 3}f}" for t in Times.of(seconds))
    return f"{p50} ({p20}, {p80})"


def _ratio(times: Times | None) -> str:
    return "" if times is None else f"{times.p50:.3f} ({times.p20:.3f}, {times.p80:.3f})"


def _plain(value: float | bool | None) -> str:
    return f"{value:.2f}" if value else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    return markdown_table(Table(head, rows)) if rows else ""


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
