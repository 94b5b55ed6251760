"""Encoder inference after merging, against the untouched encoder: ``python -m bench.merged``.

On an otherwise idle machine. Untouched and merged encoders take turns in one process; a ratio is
the median over the rounds. The zero-cost merges must leave the same modules and operators, or
nothing is timed, and `exact` must compute what the adapted encoder does.
"""

import argparse
import sys

import torch

from bench import cases, counts, timing
from bench.models import Setting, adapted, enough, sharing_copy, untouched
from naslora import merge

MODES = ("exact", "center", "calibrated")
TARGETS = {"exact": 1.01}  # times the untouched encoder, at most
SETTINGS = (("vit_b", 256), ("vit_b", 1024), ("vit_t", 256), ("vit_t", 1024))


def main() -> int:
    """Prints the table; returns 1 if a check failed or a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help="measurements of each encoder")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--threads", type=int, help="default: as many as torch chooses")
    parser.add_argument("--only", default="", help="part of a setting's name, e.g. 'vit_t 256'")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    for name, value in cases.environment().items():
        print(f"{name}: {value}")
    print("\n| encoder | merged | p20 ms | p50 ms | p80 ms | x untouched (p20, p80) | target |")
    print("|---|---|---|---|---|---|---|")
    good = True
    for model, size in SETTINGS:
        if arguments.only in f"{model} {size}":
            good &= report(Setting(model, size, arguments.batch), arguments.rounds)
    return 0 if good else 1


@torch.no_grad()
def report(setting: Setting, rounds: int) -> bool:
    """Times one setting and prints its rows; whether its checks and targets were met."""
    base = untouched(setting)
    trained = adapted("nas-pc-lora", base).eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(setting.batch, 3, setting.image_size, setting.image_size, generator=generator)
    encoders = {"untouched": base.image_encoder}
    for mode in MODES:
        merged = sharing_copy(trained).eval()
        merge(merged, mode, enough([x]) if mode == "calibrated" else None)
        encoders[mode] = merged.image_encoder
    expected, exact = trained.image_encoder(x), encoders["exact"](x)
    error = float((exact - expected).norm() / expected.norm())
    if not error < 1e-5:
        print(f"| {setting} | refused: exact differs by {error:.1e} |" + " |" * 5)
        return False
    plain = counts.count(lambda: base.image_encoder(x))
    for mode in ("center", "calibrated"):
        found = counts.count(lambda mode=mode: encoders[mode](x))
        kinds = [[type(m) for m in encoders[name].modules()] for name in ("untouched", mode)]
        same = kinds[0] == kinds[1] and found.calls == plain.calls
        if not same or found.operations != plain.operations:
            print(f"| {setting} | refused: {mode} is another graph |" + " |" * 5)
            return False

    with torch.inference_mode():
        functions = {name: lambda encoder=encoder: encoder(x) for name, encoder in encoders.items()}
        seconds = timing.interleave(functions, rounds)
    good = True
    for name, own in seconds.items():
        times = timing.Times.of(own)
        ratios = timing.Times.of([a / b for a, b in zip(own, seconds["untouched"], strict=True)])
        target = TARGETS.get(name)
        good &= target is None or ratios.p50 <= target
        row = [str(setting), name, *(f"{1e3 * t:.2f}" for t in (times.p20, times.p50, times.p80))]
        row.append(f"{ratios.p50:.4f} ({ratios.p20:.4f}, {ratios.p80:.4f})")
        print(f"| {' | '.join([*row, '' if target is None else str(target)])} |", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
