"""Building the extensions, without a GPU: setup.py, the report of nvcc, the served devices."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from setuptools import Distribution

import naslora_kernels
from bench.gpu import cuda_resources
from naslora_kernels import cpp, cuda, triton

setup = cuda_resources.load_setup()
NVCC = setup.find_nvcc()
SWITCHES = ("SKIP_EXT", "SKIP_CUDA", "FORCE_CUDA", "SANITIZE")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


# The oldest and the newest; `make nvcc-check` has them all.
@needs_nvcc
@pytest.mark.campaign
@pytest.mark.parametrize("architecture", [cuda_resources.NAMED[0], cuda_resources.NAMED[-1]])
def test_every_kernel_compiles_without_warning_and_without_spills(architecture):
    usages, problems = cuda_resources.check(NVCC, [architecture])
    kernels = {usage.kernel for usage in usages}
    assert len(usages) == len(kernels)
    assert {kernel.split("<")[0] for kernel in kernels} == {
        "cell_forward", "cell_backward", "low_rank_pass", "low_rank_expand", "reduce_gradients",
    }  # fmt: skip
    assert not problems and not [usage for usage in usages if usage.spilled or usage.stack]
    # With at most 128 registers, at least two blocks of 256 threads fit a multiprocessor.
    assert all(usage.registers <= 128 for usage in usages)


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


@pytest.fixture
def machine(fake_nvcc, monkeypatch):
    """Sets variables, and the compute capabilities that the cards seem to have."""

    def prepare(environment, found):
        monkeypatch.setattr(setup, "cards", lambda: found)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)

    return prepare


FORCED, NAMED = {"NASLORA_FORCE_CUDA": "1"}, "TORCH_CUDA_ARCH_LIST"
UNKNOWN = "TORCH_CUDA_ARCH_LIST: {!r} is not one of 7.5, 8.0, 9.0, with or without +PTX"


@pytest.mark.parametrize(
    ("environment", "found", "expected"),
    [
        (FORCED, [80], ["sm_75", "sm_80", "sm_90", "compute_90"]),
        ({}, [80], ["sm_80"]),
        ({}, [86], ["sm_80"]),  # nvcc does not know 8.6, and a card runs code of an earlier minor
        ({}, [75, 90], ["sm_75", "sm_90"]),
        ({}, [80, 86], ["sm_80"]),
        ({}, [120], ["compute_90"]),  # later than nvcc
        ({}, [61, 90], ["sm_90"]),  # the older card is too old for the kernels
        ({}, [61, 70], "the cards' compute capabilities, 6.1, 7.0, are below 7.5"),
        ({NAMED: "8.0"}, [], ["sm_80"]),
        ({NAMED: "8.0;9.0+PTX"}, [], ["sm_80", "sm_90", "compute_90"]),
        ({NAMED: "7.5 9.0a"}, [], ["sm_75", "sm_90a"]),
        *(
            ({NAMED: f"8.0;{unknown}"}, [], UNKNOWN.format(unknown))
            for unknown in ("5.0", "10.0", "Hopper", "9.0+ptx")
        ),
    ],
)
def test_the_architectures_that_are_built(environment, found, expected, fake_nvcc, machine):
    machine(environment, found)
    if isinstance(expected, str):
        with pytest.raises(setup.BuildError) as error:
            setup.architectures(fake_nvcc)
        assert str(error.value) == expected
        return
    chosen = setup.architectures(fake_nvcc)
    assert chosen == expected
    served = [card for card in found if card >= 75]
    assert all(cuda._serves(chosen, divmod(card, 10)) for card in served)


@pytest.mark.parametrize(
    ("environment", "found", "names"),
    [
        ({}, [], ["_C"]),  # nvcc without a card
        ({}, [90], ["_C", "_CUDA"]),
        ({NAMED: "9.0"}, [], ["_C", "_CUDA"]),
        (FORCED, [], ["_C", "_CUDA"]),
        ({"NASLORA_FORCE_CUDA": "0"}, [], ["_C"]),
        ({"NASLORA_SKIP_CUDA": "1"}, [90], ["_C"]),
        ({"NASLORA_SANITIZE": "1"}, [90], ["_C"]),
        ({"NASLORA_SKIP_EXT": "1"}, [90], []),
    ],
)
def test_the_extensions_that_are_built(environment, found, names, machine):
    machine(environment, found)
    assert [e.name.removeprefix("naslora_kernels.") for e in setup.extensions()] == names


@pytest.mark.parametrize(
    ("smi", "found"),
    [
        ("printf '9.0\\n8.6\\n9.0\\n'", [86, 90]),
        ("printf '12.0\\n[N/A]\\n'", [120]),
        ("echo 'NVIDIA-SMI has failed because it could not communicate'", []),
    ],
)
def test_nvidia_smi_names_the_cards(smi, found, tmp_path, monkeypatch):
    """On a machine on whose PATH nothing else is, without libcuda."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(setup.ctypes, "CDLL", Mock(side_effect=OSError))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert setup.cards() == found


def builder_in(folder):
    """What an install builds with."""
    builder = setup.BuildKernels(Distribution({"ext_modules": setup.extensions()}))
    builder.build_lib = builder.build_temp = str(folder)
    builder.ensure_finalized()
    return builder


def build_cuda(tmp_path):
    """Builds the CUDA extension alone, as an install does."""
    builder = builder_in(tmp_path)
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


def test_windows_compiles_and_links_with_zig(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(setup, "WINDOWS", True)
    monkeypatch.setattr(setup, "run", lambda *command: commands.append(list(command)))
    monkeypatch.setattr(setup.platform, "machine", lambda: "AMD64")
    builder = builder_in(tmp_path)
    builder.build_cpu(builder.extensions[0])
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-windows-gnu"]
    assert all(command[:6] == zig for command in commands)
    *compilers, linker = commands
    objects = {command[-1] for command in compilers}
    assert len(objects) == 1 + sum(len(sources) for *_, sources, _ in setup.INSTRUCTION_SETS)
    assert objects == {part for part in linker if part.endswith(".o")}
    assert all("-DPy_LIMITED_API=0x030A0000" in command for command in compilers)
    assert linker[-3].endswith("python3.lib")
    assert Path(linker[-1]).parent == tmp_path / "naslora_kernels"


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


@pytest.mark.parametrize(
    ("module", "version", "cards", "reason"),
    [
        (cuda.extension, None, [], "this build of torch has no CUDA"),
        (cuda.extension, "12.4", [], "torch finds no CUDA device"),
        (cuda.extension, "12.4", [(8, 0), (7, 5)], "cuda:1 has compute capability 7.5, but the "),
        (cuda.extension, "12.4", [(8, 0), (8, 6)], ""),
        (triton, "12.4", [], "PyTorch finds no GPU, and TRITON_INTERPRET=1 is not set"),
        (triton, "12.4", [(7, 0)], "it needs a GPU of compute capability 7.5, this one has 7.0"),
    ],
)
def test_machines_served(monkeypatch, module, version, cards, reason):
    built = SimpleNamespace(build_info=lambda: ("nvcc", "sm_80"))
    for name, value in {"_CUDA": built, "EMULATION": None, "INTERPRETED": False}.items():
        monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(torch.version, "cuda", version)
    driver = Mock(is_available=lambda: bool(cards), device_count=lambda: len(cards))
    driver.get_device_capability = lambda index=0: cards[index]
    monkeypatch.setattr(torch, "cuda", driver)
    found = module.unavailable_reason() or ""
    assert found.startswith(reason) and bool(found) == bool(reason)


@pytest.mark.parametrize("module", [cpp.extension, cuda.extension])
@pytest.mark.parametrize(
    "present, reason",
    [(None, "is not there (import of"), (SimpleNamespace(), "from an older version")],
)
def test_an_installation_without_extensions(monkeypatch, module, present, reason):
    monkeypatch.delenv(cuda.EMULATION_VARIABLE, raising=False)
    for name in ("_C", "_CUDA"):
        monkeypatch.delattr(naslora_kernels, name, raising=False)
        monkeypatch.setitem(sys.modules, f"naslora_kernels.{name}", present)
    loaded = runpy.run_path(module.__file__)
    assert reason in loaded["unavailable_reason"]() and loaded["build_info"]() == {}
