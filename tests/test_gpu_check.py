"""``make gpu-check`` as far as a machine without a GPU can tell: its kernels step, on the CPU."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch
from conftest import wait_for
from kernel_cases import needs_cpp

from bench import cases, gpu_check, timing
from bench.gpu import kernels
from naslora_kernels import cpp

CASE = "cell tiny_vit r=3 float32"


def run(monkeypatch, output, *options):
    arguments = ["--steps", "kernels", "--rounds", "3", "--only", CASE, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments, *options])
    return gpu_check.main()


@pytest.mark.skipif(bool(needs_cpp), reason=str(needs_cpp))
def test_leaves_a_record_and_a_table(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, "--device", "cpu") == 0
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = record["kernels"]["rows"]
    assert {row["mode"] for row in rows} == {"cpp", "reference"}
    assert {row["direction"] for row in rows} == {"forward", "both"}
    assert all(0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] for row in rows)
    # The forward reads and writes 25 maps of 7 x 7 x 3 float32 numbers.
    assert rows[0]["least_bytes"] == 2 * 4 * 25 * 7 * 7 * 3
    table = (tmp_path / "gpu_check.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| {CASE} | both | cpp |" in table


@pytest.mark.skipif(bool(needs_cpp), reason=str(needs_cpp))
def test_wrong_kernels_are_not_timed(monkeypatch, tmp_path):
    right = cpp.mixed_cell
    monkeypatch.setattr(cpp, "mixed_cell", lambda *arguments: 1.001 * right(*arguments))
    assert run(monkeypatch, tmp_path, "--device", "cpu") == 1
    record = json.loads((tmp_path / "gpu_check.json").read_text())["kernels"]
    assert not record["rows"]
    assert "not timed" in record["problems"][0]


@pytest.mark.skipif(bool(needs_cpp), reason=str(needs_cpp))
def test_attention_beside_torchs_own(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 1e10)
    case = "attention vit_b 256px heads=12 bfloat16"
    options = ("--device", "cpu", "--only", case)
    assert run(monkeypatch, tmp_path, *options) == 0
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["kernels"]["rows"]
    assert {row["mode"] for row in rows} == {"cpp", "scaled_dot_product_attention"}
    assert {row["work"] for row in rows} == {case}

    right = cpp.rel_pos_attention
    monkeypatch.setattr(cpp, "rel_pos_attention", lambda *arguments: 1.2 * right(*arguments))
    assert run(monkeypatch, tmp_path, *options) == 1
    record = json.loads((tmp_path / "gpu_check.json").read_text())["kernels"]
    assert not record["rows"]
    assert "differs from that of reference in float64" in record["problems"][0]


def test_competitors_that_fail_are_left_out_and_named():
    x = torch.ones((), requires_grad=True)
    right = cases.Work(lambda: 2 * x, [x], torch.ones(()))
    wrong = cases.Work(lambda: 1 / 0, [x], torch.ones(()))
    works = {"triton": wrong, "reference": right, "flex_attention": wrong}
    notes = kernels.leave_out_failing(works, ours=("triton",))
    assert notes == ["flex_attention is left out, ZeroDivisionError: division by zero"]
    assert works.keys() == {"triton", "reference"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path) == 1
    assert "no GPU" in capsys.readouterr().err


def test_a_step_that_fails_or_takes_too_long_is_told(tmp_path):
    def run(program, limit):
        return gpu_check._run(["bash", "-c", program], limit, tmp_path, "step")

    failed = run("echo 3 failed; exit 1", 600)
    assert failed == {"passed": False, "summary": "3 failed"}
    late = run("echo test_a PASSED; sleep 600", 1)
    assert not late["passed"]
    assert late["summary"] == "stopped after 1 s, its time: 1 passed, 0 failed; last: test_a PASSED"


def test_what_a_late_step_started_ends_with_it(tmp_path):
    gpu_check._run(["bash", "-c", "sleep 600 & echo $!; sleep 600"], 1, tmp_path, "step")
    child = pathlib.Path("/proc", (tmp_path / "step.log").read_text().strip(), "stat")
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
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 1e10)
    options = ("--steps", "kernels", "--device", "cpu", "--output", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu_check", *options])
    assert gpu_check.main() == 1
    assert written == [[{"work": "first"}]]
    problems = json.loads((tmp_path / "gpu_check.json").read_text())["kernels"]["problems"]
    assert problems == ["second: RuntimeError: the card is gone"]


def test_missing_packages_are_named_and_no_failure(monkeypatch):
    monkeypatch.setattr(gpu_check, "MODEL_PACKAGES", ("torch", "no_such_package"))
    result = gpu_check.measure_models(None, None)
    assert result == {"passed": True, "summary": "left out: no_such_package is not installed"}


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
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
