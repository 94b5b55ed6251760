"""``make gpu-check`` as far as a machine without a GPU can tell: its kernels step, on the CPU."""

import json
import sys

from fresh_process import run_fresh
from kernel_cases import only_cpp

from bench import gpu_check
from naslora_kernels import cpp

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
