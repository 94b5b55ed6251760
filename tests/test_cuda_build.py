"""Building the CUDA kernels, without a GPU: setup.py, the report of nvcc, the served devices."""

import os
import subprocess
import sys

import pytest
from setuptools import Distribution

from bench import cuda_resources
from bench.resources import Usage, table
from naslora_kernels import cuda

setup = cuda_resources.load_setup()
NVCC = setup.find_nvcc()
SWITCHES = ("SKIP_EXT", "SKIP_CUDA", "FORCE_CUDA")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


# `make nvcc-check` has them all.
@needs_nvcc
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(cuda_resources.NAMED[0], id="oldest"),
        pytest.param(cuda_resources.NAMED[-1], id="newest", marks=pytest.mark.campaign),
    ],
)
def test_every_kernel_compiles_without_warning_and_without_spills(architecture):
    compiled = cuda_resources.check(NVCC, [architecture])
    usages = [kernel.usage for kernel in compiled]
    kernels = {usage.kernel for usage in usages}
    assert len(usages) == len(kernels)
    assert {kernel.split("<")[0] for kernel in kernels} == {
        "cell_forward", "cell_backward", "low_rank_pass", "low_rank_expand", "reduce_gradients",
    }  # fmt: skip
    assert not [usage for usage in usages if usage.spilled or usage.stack]
    assert not cuda_resources.problems(compiled)
    # With at most 128 registers, at least two blocks of 256 threads fit a multiprocessor.
    assert all(usage.registers <= 128 for usage in usages)


def test_report_of_ptxas_is_parsed():
    report = """
ptxas info    : Compiling entry function '_Z8a_kernelIfLi2EEvi' for 'sm_80'
ptxas info    : Function properties for _Z8a_kernelIfLi2EEvi
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 656 bytes cmem[0]
"""
    usage = Usage("a<float, 2>", "sm_80", 40, 1024, 16, 12)
    assert cuda_resources.parse(report) == {"_Z8a_kernelIfLi2EEvi": usage}
    assert table([usage]).splitlines()[1].split() == ["a<float,", "2>", "40*"]


# ---- setup.py ----------------------------------------------------------------------------------


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A fake nvcc below CUDA_HOME that lists 5.0 to 9.0 and fails to compile."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--list-gpu-arch) printf 'compute_%s\\n' 50 75 80 90 ;;\n"
        "--version) echo 'Cuda compilation tools, release 12.4, V12.4.99' ;;\n"
        "*) echo 'kernel.cu(7): error: no such luck' >&2; exit 1 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for variable in ("TORCH_CUDA_ARCH_LIST", *(f"NASLORA_{v}" for v in SWITCHES)):
        monkeypatch.delenv(variable, raising=False)
    return str(nvcc)


def test_nvcc_below_cuda_home_is_found_first(fake_nvcc):
    assert setup.find_nvcc() == fake_nvcc


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, ["sm_75", "sm_80", "sm_90", "compute_90"]),
        ("8.0", ["sm_80"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("7.5 9.0a", ["sm_75", "sm_90a"]),
    ],
)
def test_architectures(wanted, expected, fake_nvcc, monkeypatch):
    if wanted:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert setup.architectures(fake_nvcc) == expected


def test_each_capability_is_compiled_once():
    assert setup.code_flags(["sm_80", "sm_90", "compute_90"]) == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]


@pytest.mark.parametrize("unknown", ["5.0", "10.0", "Hopper", "9.0+ptx"])
def test_unknown_architectures_are_refused_in_one_line(unknown, fake_nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{unknown}")
    with pytest.raises(setup.BuildError) as error:
        setup.architectures(fake_nvcc)
    assert str(error.value) == (
        f"TORCH_CUDA_ARCH_LIST: {unknown!r} is not one of 7.5, 8.0, 9.0, with or without +PTX"
    )


def build_cuda(tmp_path):
    builder = setup.BuildKernels(Distribution({"ext_modules": setup.extensions()}))
    builder.build_lib = builder.build_temp = str(tmp_path)
    builder.ensure_finalized()
    extension = next(e for e in builder.extensions if e.name == "naslora_kernels._CUDA")
    builder.build_extension(extension)


def test_failed_build_is_reported_in_one_line(fake_nvcc, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.1")
    build_cuda(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("naslora: the CUDA extension was not built (TORCH_CUDA_ARCH_LIST: '6.1'")
    assert line.endswith("everything will run on the other backends")


def test_failed_build_is_fatal_if_forced(fake_nvcc, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.1")
    monkeypatch.setenv("NASLORA_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"^naslora: the CUDA extension was not built: TORCH_CUDA"):
        build_cuda(tmp_path)


def test_message_of_the_compiler_is_reported(fake_nvcc):
    with pytest.raises(setup.BuildError, match=r"nvcc: kernel.cu\(7\): error: no such luck$"):
        setup.run(fake_nvcc, "-c", "kernel.cu")


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        ("NASLORA_SKIP_EXT", []),
        ("NASLORA_SKIP_CUDA", ["_C"]),
        ("NASLORA_FORCE_CUDA", ["_C", "_CUDA"]),
        ("NOTHING", ["_C", "_CUDA"]),
    ],
)
def test_environment_chooses_what_is_built(variable, names, fake_nvcc, monkeypatch):
    monkeypatch.setenv(variable, "1")
    assert [e.name.removeprefix("naslora_kernels.") for e in setup.extensions()] == names


# ---- The devices that a build serves -----------------------------------------------------------


@pytest.mark.parametrize(
    ("architectures", "capability", "served"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),  # a later minor version
        (["sm_86"], (8, 0), False),  # an earlier one
        (["sm_80"], (9, 0), False),  # another major version
        (["sm_80", "compute_80"], (9, 0), True),  # PTX serves later versions
        (["compute_90"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),  # a suffix restricts it to that version
        (["compute_90a"], (10, 0), False),
        (["sm_75", "compute_121"], (12, 1), True),
        ([], (8, 0), False),
    ],
)
def test_capabilities_served(architectures, capability, served):
    assert cuda._serves(architectures, capability) is served


def test_reason_of_an_absent_extension():
    probe = "import naslora_kernels; print(naslora_kernels.available_backends()['cuda'])"
    reason = subprocess.run(
        [sys.executable, "-c", probe],
        env={**os.environ, cuda.EMULATION_VARIABLE: "/nowhere/_CUDA.abi3.so"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert reason.startswith("the CUDA extension is not there (")
    assert "reinstall naslora with nvcc" in reason
