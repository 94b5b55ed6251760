"""Tables and claims from measurements: ``python -m bench.report FILE``.

FILE is what ``pytest bench/ --benchmark-only --benchmark-json FILE`` wrote; several are read as
one. It prints the kernels' ratios, the paper's Table 5 and its cost claims. A ratio is the median
over rounds of two candidates' seconds in the same round. The exit status is 1 if a claim fails or
was not measured, or if a target of the kernels is missed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench import attention
from bench.kinds import KINDS
from bench.models import COMPILED, MERGED, STOCK, UNTOUCHED, Setting
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
    ("attention vit_b global heads=12", "both"): {attention.STOCK: 2.2},
    ("attention vit_b global heads=12", "forward"): {attention.STOCK: 2.0},
    ("attention vit_b windows heads=12", "both"): {attention.STOCK: 1.15},
    ("attention vit_b windows heads=12", "forward"): {attention.STOCK: 1.2},
}


@dataclass
class Measured:
    """What the files hold of one setting."""

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """By (candidate, step), round by round; the step is "inference" without training."""
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    """By candidate: bytes, as ``bench.suite.measure_memory``."""

    def ratio(self, one: tuple[str, str], other: tuple[str, str]) -> Times | None:
        """Seconds of one / seconds of the other, over the rounds; None if one was not measured."""
        if one not in self.seconds or other not in self.seconds:
            return None
        return Times.ratio(self.seconds[one], self.seconds[other])

    def saved(self, one: str, other: str) -> Times | None:
        """The same of the bytes saved for the backward, which do not vary."""
        if one not in self.memory or other not in self.memory:
            return None
        ratio = self.memory[one]["saved"] / self.memory[other]["saved"]
        return Times(ratio, ratio, ratio)


@dataclass(frozen=True)
class Claim:
    """A ratio, and what it must be."""

    text: str
    ratio: Callable[[Measured], Times | None]
    at_most: float | None = None
    at_least: float | None = None

    def holds(self, value: float) -> bool:
        return self.at_most >= value if self.at_least is None else self.at_least <= value

    @property
    def bound(self) -> str:
        return f"≤ {self.at_most}" if self.at_least is None else f"≥ {self.at_least}"


def _title(name: str) -> str:
    for separator in (MERGED, STOCK, COMPILED):
        method, found, rest = name.partition(separator)
        if found:
            return f"{_title(method)},{separator}{rest}"
    return METHODS[name].title if name in METHODS else name


LORA, OURS = ("lora", "weights"), ("nas-pc-lora", "weights")
STOCK_LORA = ("lora" + STOCK, "weights")


def _weight_step(at_most: float) -> Claim:
    text = f"a weight step of NAS-PC-LoRA / of {_title('lora' + STOCK)}"
    return Claim(text, lambda m: m.ratio(OURS, STOCK_LORA), at_most)


def _inference(mode: str, reference: str, at_most: float) -> Claim:
    merged, other = (f"nas-pc-lora{MERGED}{mode}", "inference"), (reference, "inference")
    text = f"inference merged with {mode} / {_title(reference)}"
    return Claim(text, lambda m: m.ratio(merged, other), at_most)


def _saved(reference: str, at_most: float) -> Claim:
    text = f"bytes saved for the backward, NAS-PC-LoRA / {_title(reference)}"
    return Claim(text, lambda m: m.saved("nas-pc-lora", reference), at_most)


ALWAYS = (
    Claim(
        "an architecture step / a weight step of NAS-PC-LoRA",
        lambda m: m.ratio(("nas-pc-lora", "architecture"), OURS),
        at_most=1.0,
    ),
    _inference("center", UNTOUCHED, at_most=1.01),
    _inference("calibrated", UNTOUCHED, at_most=1.01),
    _saved("lora", at_most=1.02),
)
# Other settings have no claims. Their ratios are only shown.
CLAIMS = {
    Setting("vit_b", 256, 4): (
        _weight_step(at_most=0.90),
        _inference("exact", UNTOUCHED, at_most=1.01),
        *ALWAYS,
    ),
    Setting("vit_b", 256, 4, "bf16"): (
        _weight_step(at_most=0.85),
        _inference("exact", UNTOUCHED, at_most=1.01),
        *ALWAYS,
    ),
    Setting("vit_b", 1024, 1): (
        _weight_step(at_most=0.65),
        Claim(
            f"a weight step of {_title('conv-lora' + STOCK)} / of NAS-PC-LoRA",
            lambda m: m.ratio(("conv-lora" + STOCK, "weights"), OURS),
            at_least=1.5,
        ),
        _inference("exact", UNTOUCHED + STOCK, at_most=0.75),
        _saved("lora" + STOCK, at_most=0.5),
        *ALWAYS,
    ),
}


def main() -> int:
    """Prints the tables and the claims; returns 1 if a claim fails or was not measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    files = parser.parse_args().files
    entries = [entry for path in files for entry in json.loads(path.read_text())["benchmarks"]]
    print(about(entries))
    measured = by_setting(entries)
    text, good = kernels_table(entries)
    good &= bool(measured or text)
    if text:
        print(f"\n## kernels\n\n{text}")
    for setting, numbers in measured.items():
        print(f"\n## {setting}\n")
        print("\n\n".join(filter(None, (training(numbers), inference(numbers), memory(numbers)))))
        if setting in CLAIMS:
            text, held = claims(CLAIMS[setting], numbers)
            print(f"\n{text}")
            good &= held
    if startup := startup_table(entries):
        print(f"\n## startup\n\n{startup}")
    return 0 if good else 1


def by_setting(entries: list[dict]) -> dict[Setting, Measured]:
    """Sorts the entries of the groups training_step, inference and memory."""
    found: dict[Setting, Measured] = {}
    for entry in entries:
        info = entry["extra_info"]
        if entry["group"] not in ("training_step", "inference", "memory"):
            continue
        names = ("model", "image_size", "batch", "precision", "device")
        measured = found.setdefault(Setting(*(info[name] for name in names)), Measured())
        if entry["group"] == "memory":
            measured.memory[info["candidate"]] = info
        else:
            step = info.get("step", "inference")
            measured.seconds[info["candidate"], step] = entry["stats"]["data"]
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
    for name, step in measured.seconds:
        if step != "weights":
            continue
        paper = PAPER.get(name.removesuffix(STOCK))
        rows.append(
            [
                _title(name),
                _milliseconds(measured, (name, "weights")),
                _ratio(measured.ratio((name, "weights"), STOCK_LORA)),
                _ratio(measured.ratio((name, "weights"), LORA)),
                _plain(paper and PAPER["lora"][0] / paper[0]),
                _milliseconds(measured, (name, "architecture")),
                _ratio(measured.ratio((name, "architecture"), (name, "weights"))),
                _ratio(measured.ratio((name, "epoch"), LORA)),
                _plain(name in PAPER_EPOCH and PAPER_EPOCH[name] / PAPER_EPOCH["lora"]),
            ]
        )
    head = ["Method", "weight step, ms (p20, p80)", "× LoRA, stock attention", "× LoRA", "paper"]
    head += ["architecture step, ms", "× its weight step", "epoch with α × LoRA", "paper"]
    return _table(head, rows)


def inference(measured: Measured) -> str:
    """Table 5's inference column: every method before and after merging."""
    rows = []
    for name, step in measured.seconds:
        if step != "inference":
            continue
        paper = PAPER.get(name)
        rows.append(
            [
                _title(name),
                _milliseconds(measured, (name, step)),
                _ratio(measured.ratio((name, step), (UNTOUCHED + STOCK, step))),
                _ratio(measured.ratio((name, step), (UNTOUCHED, step))),
                _plain(paper and PAPER["lora"][1] / paper[1]),
            ]
        )
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
        saved = measured.saved(name, "lora" + STOCK)
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


def startup_table(entries: list[dict]) -> str:
    """Medians of the group startup."""
    rows = [
        [entry["name"], f"{1e3 * statistics.median(entry['stats']['data']):,.1f}"]
        for entry in entries
        if entry["group"] == "startup"
    ]
    return _table(["What", "ms"], rows)


def claims(claimed: Iterable[Claim], measured: Measured) -> tuple[str, bool]:
    """The claims as a table, and whether all of them hold."""
    rows, good = [], True
    for claim in claimed:
        value = claim.ratio(measured)
        held = value is not None and claim.holds(value.p50)
        verdict = "not measured" if value is None else "holds" if held else "FAILS"
        rows.append([claim.text, claim.bound, _ratio(value), verdict])
        good &= held
    return _table(["Claim", "required", "measured (p20, p80)", ""], rows), good


def _milliseconds(measured: Measured, key: tuple[str, str]) -> str:
    return _cuts(measured.seconds[key]) if key in measured.seconds else ""


def _cuts(seconds: list[float]) -> str:
    p20, p50, p80 = (f"{1e3 * t:,.{0 if t > 0.1 else 3}f}" for t in Times.of(seconds))
    return f"{p50} ({p20}, {p80})"


def _ratio(times: Times | None) -> str:
    return "" if times is None else f"{times.p50:.3f} ({times.p20:.3f}, {times.p80:.3f})"


def _plain(value: float | bool | None) -> str:
    return f"{value:.2f}" if value else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    return markdown_table(Table(head, rows)) if rows else ""


if __name__ == "__main__":
    sys.exit(main())
