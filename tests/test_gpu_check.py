"""``make gpu-check`` as far as a machine without a GPU can tell: its kernels step, on the CPU."""

import json
import os
import sys
import types

import pytest
import torch
from fresh_process import run_fresh
from kernel_cases import only_cpp

from bench import gpu_check
from bench.gpu import contact
from naslora_kernels import backends, cpp

CASE = "cell tiny_vit r=3 float32"
CPU = ("--device", "cpu")


def run(monkeypatch, output, *options):
    """The command's exit status and its record of the kernels."""
    arguments = ["--steps", "kernels", "--rounds", "3", "--only", CASE, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments, *options])
    status = gpu_check.main()
    path = output / "gpu_check.json"
    return status, json.loads(path.read_text())["kernels"] if path.exists() else None


@only_cpp
def test_leaves_a_record_and_a_table(monkeypatch, tmp_path, capsys):
    status, record = run(monkeypatch, tmp_path, *CPU)
    rows = record["rows"]
    assert status == 0
    assert {row["mode"] for row in rows} == {"cpp", "reference"}
    assert {row["direction"] for row in rows} == {"forward", "both"}
    assert all(0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] for row in rows)
    # The forward reads and writes 25 maps of 7 x 7 x 3 float32 numbers.
    assert rows[0]["least_bytes"] == 2 * 4 * 25 * 7 * 7 * 3
    table = (tmp_path / "gpu_check.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| {CASE} | both | cpp |" in table


@only_cpp
def test_wrong_kernels_are_not_timed(monkeypatch, tmp_path):
    right = cpp.mixed_cell
    monkeypatch.setattr(cpp, "mixed_cell", lambda *arguments: 1.001 * right(*arguments))
    status, record = run(monkeypatch, tmp_path, *CPU)
    assert status == 1 and not record["rows"] and "not timed" in record["problems"][0]


SMI_OF_H100 = "550.54.15, 1980 MHz, 1980 MHz, 2619 MHz, 700.00 W, Disabled"
CARD = {"name": "NVIDIA H100", "total_memory": 80 << 30, "multi_processor_count": 132, "major": 9}
MISSING_GCC = "Failed to find C compiler. Please specify via CC environment variable"


@pytest.mark.parametrize(
    ("card", "failing", "lines"),
    [
        ({}, {}, []),
        (
            {},
            {"cuda": "CUDA driver version is insufficient for CUDA runtime version"},
            ["cuda on cuda:0: its first launch on cuda:0 fails: CUDA driver version is insuff"],
        ),
        (
            {},
            {"triton": MISSING_GCC},
            [f"triton on cuda:0: its first launch on cuda:0 fails: {MISSING_GCC}"],
        ),
        (
            {"name": "NVIDIA H100 MIG 1g.10gb", "total_memory": 10 << 30},
            {},
            ["cuda:0 is a MIG slice: its times are not those of the whole card"],
        ),
        ({"total_memory": 8 << 30}, {}, ["cuda:0 is a small card: cases that do not fit are le"]),
    ],
    ids=["fine", "old driver", "no gcc", "MIG", "small"],
)
def test_what_a_machine_lacks_is_one_line(card, failing, lines, monkeypatch, tmp_path):
    """By a stubbed driver; the other backend goes on."""
    properties = types.SimpleNamespace(**{**CARD, "minor": 0, **card})

    def load(name):
        def folded_cell(*arguments):
            if name in failing:
                raise RuntimeError(failing[name])

        return types.SimpleNamespace(folded_cell=folded_cell, unavailable_reason=lambda: None)

    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{SMI_OF_H100}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    stub = {"is_available": True, "device_count": 1, "is_current_stream_capturing": False}
    stub |= {"get_device_properties": properties, "synchronize": None}
    for name, value in stub.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(backends, "_unavailable_reason", lambda name: None)
    monkeypatch.setattr(backends, "_load", load)
    monkeypatch.setattr(backends, "probe", backends.probe.__wrapped__)
    found = contact.inspect()
    assert any(line.endswith(SMI_OF_H100) for line in found["notes"])
    about = [*found["problems"], *(line for line in found["notes"] if line[:9] == "cuda:0 is")]
    assert [a.startswith(b) for a, b in zip(about, lines, strict=True)] == [True] * len(lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_report_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path / "out")])
    assert gpu_check.main() == 1
    record = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    (problem,) = record["contact"]["problems"]
    assert problem.startswith("torch sees no GPU: ") and (tmp_path / "out.tar.gz").exists()


def test_tests_of_kernels_need_torch_pytest_and_triton_alone():
    """The other imports of ``pyproject.toml`` are made to fail."""
    program = """
import sys
others = ("accelerate", "peft", "segment_anything", "tyro", "PIL", "matplotlib", "safetensors")
sys.modules.update(dict.fromkeys(others))
import pytest
import bench.gpu_check as check
files = {*check.TESTS["cuda"], *check.TESTS["triton"]}
sys.exit(pytest.main(["--collect-only", "-q", *files]))
"""
    result = run_fresh(program)
    assert result.status == 0, result.out[-2000:]
