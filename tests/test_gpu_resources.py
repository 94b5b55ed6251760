"""Registers and bytes of the GPU kernels, without a GPU: ``bench/gpu/resources.py`` and others."""

import importlib
import inspect
import itertools
import os
import pkgutil
import subprocess
import sys

import pytest
import torch

from bench import attention, cases
from bench.gpu import launches, traffic
from bench.kinds import KINDS
from naslora_kernels.triton.tiles import attention_tiles

SHAPE = cases.Shape("small", (2, 14, 14), 64, 96)
ROWS = 2 * 14 * 14


@pytest.mark.campaign
def test_triton_kernels_compile_for_real_cards_without_spills():
    """The oldest and the newest; `make triton-check` has them all."""
    pytest.importorskip("triton")
    # Outside of Triton's interpreter, under which nothing is compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = ("75", "100", "--quick", "--dtypes", "bfloat16")
    command = [sys.executable, "-m", "bench.gpu.triton_resources", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for card in ("sm_75", "sm_100"):
        assert f"{card} torch.bfloat16: 20 kernels\n" in result.stderr
    for kernel in ("attention_forward", "attention_keys", "attention_queries"):
        assert f"\n| {kernel} | – | tcgen05.mma |\n" in result.stdout
    assert result.stdout.splitlines()[-1].endswith(" kernels compiled, 0 problems")


def test_defaults_in_kernels_are_constants_of_triton():
    """Triton 3.6 compiles no call that leaves a default of Python to it."""
    language = pytest.importorskip("triton.language")
    kernels = importlib.import_module("naslora_kernels.triton")
    found = [
        (f"{module.name}.{name}", parameter.default)
        for module in pkgutil.iter_modules(kernels.__path__)
        for name, kernel in vars(
            importlib.import_module(f"{kernels.__name__}.{module.name}")
        ).items()
        if hasattr(kernel, "arg_names")  # compiled, or interpreted
        for parameter in inspect.signature(kernel.fn).parameters.values()
        if parameter.default is not parameter.empty
    ]
    assert found
    assert [where for where, value in found if not isinstance(value, language.constexpr)] == []


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("side", [1, 7, 14, 16, 64, 100])
def test_no_warp_repeats_the_products_of_another(capability, side):
    """A product of tensor cores has 16 rows, so each warp has 16 queries or keys of its own."""
    for dtype, features in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (16, 32, 64, 80, 96, 128)
    ):
        tiles = attention_tiles(side**2, (side, side), features, dtype, capability)
        for kept, own in (
            (tiles.forward["QUERIES"], tiles.forward),
            (tiles.keys_pass["ROWS"] * tiles.keys_pass["COLUMNS"], tiles.keys_pass),
            (tiles.queries_pass["QUERIES"], tiles.queries_pass),
        ):
            if dtype != torch.float32 or own["PRECISION"] != "ieee":
                assert kept >= 16 * own["num_warps"], (dtype, features, own)


WORKS = {**launches.WORKS, **launches.OTHER_WORKS}


def counted(work, case=(SHAPE, 3)):
    return traffic.count(WORKS[work], launches.Operands(*case, torch.bfloat16))


def test_launches_move_what_they_need_once():
    """The forward reads x and writes h once; partial sums are written once and read once."""
    encode, cell, decode = counted("layer, forward")
    maps, parameters = 2 * ROWS * 3, 4 * (8 + 2 * (9 + 25 + 9 + 25) + 4 * 2 * 2)
    assert encode == ("low_rank_pass", 2 * ROWS * 64 + 4 * 3 * 64, maps)
    assert cell == ("cell_forward", maps + parameters + 8 * 2, maps)
    assert decode == ("low_rank_expand", maps + 4 * 3 * 96 + 2 * 96, 2 * ROWS * 96)
    backward = counted("layer, backward, weight step")
    decoder, cell, encoder = backward[1:4]
    partials = (decoder.written - maps) + (cell.written - maps) + encoder.written
    assert backward[-1].read == partials + parameters  # folded again in the last launch


@pytest.mark.parametrize(
    ("direction", "work"),
    [("forward", "layer, forward"), ("backward", "layer, backward, weight step")],
)
def test_a_large_batch_moves_little_beyond_the_least(direction, work):
    case = cases.HUGE_BATCH, 3
    least = KINDS["layer"].least_bytes(*case, direction, traffic.SETTING)
    assert traffic.moved(counted(work, case)) < 1.1 * least


@pytest.mark.parametrize("shape", [cases.HUGE_GLOBAL, cases.HUGE], ids=lambda shape: shape.name)
def test_attention_moves_little_beyond_the_floor(shape):
    pytest.importorskip("triton")
    for direction, launched in traffic.attention_launches((shape, 16)).items():
        number, factor = {"forward": (1, 1.05), "backward": (3, 1.7)}[direction]
        assert len(launched) == number
        floor = attention.least_bytes(shape, 16, direction, traffic.SETTING)
        assert traffic.moved(launched) <= factor * floor
