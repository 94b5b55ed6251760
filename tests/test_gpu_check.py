"""``make gpu-check`` as far as a machine without a GPU can tell: its kernels step, on the CPU."""

import json
import pathlib
import sys

import pytest
import torch
from conftest import wait_for
from fresh_process import run_fresh
from kernel_cases import needs_cpp

from bench import gpu_check, timing
from bench.gpu import kernels
from naslora_kernels import cpp

CASE = "cell tiny_vit r=3 float32"
CPU = ("--device", "cpu")
without_cpp = pytest.mark.skipif(bool(needs_cpp), reason=str(needs_cpp))


def run(monkeypatch, output, *options):
    """The command's exit status and its record of the kernels."""
    arguments = ["--steps", "kernels", "--rounds", "3", "--only", CASE, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments, *options])
    status = gpu_check.main()
    path = output / "gpu_check.json"
    return status, json.loads(path.read_text())["kernels"] if path.exists() else None


@without_cpp
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


@without_cpp
def test_wrong_kernels_are_not_timed(monkeypatch, tmp_path):
    right = cpp.mixed_cell
    monkeypatch.setattr(cpp, "mixed_cell", lambda *arguments: 1.001 * right(*arguments))
    status, record = run(monkeypatch, tmp_path, *CPU)
    assert status == 1 and not record["rows"] and "not timed" in record["problems"][0]


@without_cpp
def test_attention_beside_torchs_own(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e10)
    case = "attention vit_b 256px heads=12 bfloat16"
    status, record = run(monkeypatch, tmp_path, *CPU, "--only", case)
    assert status == 0 and {row["work"] for row in record["rows"]} == {case}
    assert {row["mode"] for row in record["rows"]} == {"cpp", "scaled_dot_product_attention"}

    right = cpp.rel_pos_attention
    monkeypatch.setattr(cpp, "rel_pos_attention", lambda *arguments: 1.2 * right(*arguments))
    status, record = run(monkeypatch, tmp_path, *CPU, "--only", case)
    assert status == 1 and not record["rows"]
    assert "differs from that of reference in float64" in record["problems"][0]


def test_what_is_missing_is_told(monkeypatch, tmp_path, capsys):
    if not torch.cuda.is_available():
        assert run(monkeypatch, tmp_path)[0] == 1 and "no GPU" in capsys.readouterr().err
    monkeypatch.setattr(gpu_check, "MODEL_PACKAGES", ("torch", "no_such_package"))
    result = gpu_check.measure_models(None, None)
    assert result == {"passed": True, "summary": "left out: no_such_package is not installed"}


def test_a_step_that_fails_or_takes_too_long_is_told(tmp_path):
    def run(program, limit):
        return gpu_check._run(["bash", "-c", program], limit, tmp_path, "step")

    failed = run("echo 3 failed; exit 1", 600)
    assert failed == {"passed": False, "summary": "3 failed"}
    late = run("echo test_a PASSED; sleep 600 & echo $!; sleep 600", 1)
    assert not late["passed"]
    assert late["summary"].startswith("stopped after 1 s, its time: 1 passed, 0 failed; last: ")
    child = pathlib.Path("/proc", (tmp_path / "step.log").read_text().split()[-1], "stat")
    # A killed process goes on until it is scheduled, and is a zombie until init has seen it.
    wait_for(lambda: not child.exists() or child.read_text().split()[2] == "Z")


def test_rows_are_written_as_they_come(monkeypatch, tmp_path):
    """A case that fails is a problem of its own. The rows of the cases before it stay."""
    written = []

    def fail(name, result):
        record = json.loads((tmp_path / "gpu_check.json").read_text())
        written.append(record["kernels"]["rows"])
        raise RuntimeError("the card is gone\nand so on")

    def measure(name, result):
        result["rows"].append({"work": name})

    found = [("first", measure), ("second", fail)]
    monkeypatch.setattr(kernels, "measurements", lambda *arguments: found)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e10)
    status, record = run(monkeypatch, tmp_path, *CPU, "--only", "s")
    assert status == 1 and written == [[{"work": "first"}]]
    assert record["problems"] == ["second: RuntimeError: the card is gone"]


def test_tests_of_kernels_need_torch_pytest_and_triton_alone():
    """The other imports of ``pyproject.toml`` are made to fail."""
    program = """
import sys
others = ("accelerate", "peft", "segment_anything", "tyro", "PIL", "matplotlib", "safetensors")
sys.modules.update(dict.fromkeys(others))
import pytest
import bench.gpu_check as check
sys.exit(pytest.main(["--collect-only", "-q", check.PRIMITIVE_TESTS, *check.TRITON_TESTS]))
"""
    result = run_fresh(program)
    assert result.status == 0, result.out[-2000:]
