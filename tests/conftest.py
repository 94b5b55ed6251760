"""What tests share: tiny data, a tiny SAM, the command, poisoned memory.

The tests of the kernels need torch, pytest and Triton alone. So what needs more is imported where
it is used.
"""

import contextlib
import csv
import gc
import io
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

# One thread, in processes that tests start as well: they fork, and a forked process cannot use the
# threads of OpenMP that its parent has. Accelerate starts two where the variable is not set.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cuda_emulation
import pytest
import torch
import torch.multiprocessing
from fresh_process import Result
from torch import distributed

# Without a GPU, Triton's kernels are interpreted and the CUDA kernels emulated. Both variables are
# read when the backends are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if cuda_emulation.compiler():
        os.environ.setdefault("NASLORA_CUDA_EMULATION", str(cuda_emulation.build()))

# Runs are in float32 unless a test says otherwise, whatever this CPU computes in.
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"

from naslora_kernels import cpp, cuda

torch.set_num_threads(1)
# References that the kernels are held against compute in true float32 on GPUs, too.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

SIZE = 32  # of the images, in pixels
TRAIN = shlex.split("--model vit_t --image-size 32 --epochs 2 --search-start 1 --workers 0")
SHORT = (*TRAIN, "--epochs", "1", "--search-start", "0")  # one epoch, in which alpha trains
TINY = {"width": 32, "depth": 2, "heads": 2, "global_blocks": (1,)}  # of a ViT


def write_pairs(root: Path, draw: Callable, **counts: int) -> Path:
    """A CSV data set of images and masks that ``draw`` makes of a random generator of NumPy, as
    many a split as ``counts`` says."""
    import numpy as np
    from miniatures import save

    rng = np.random.default_rng(0)
    for split, count in counts.items():
        pairs = [f"images/{split}{i}.png,masks/{split}{i}.png" for i in range(count)]
        for pair in pairs:
            for name, pixels in zip(pair.split(","), draw(rng), strict=True):
                save(root / name, pixels)
        (root / f"{split}.csv").write_text("\n".join(["image,label", *pairs]) + "\n")
    return root


def write_data(root: Path, classes: int = 2, **counts: int) -> Path:
    """A CSV data set of bright discs on dark noise."""
    import numpy as np

    def draw(rng):
        y, x = rng.integers(10, SIZE - 10, 2)
        distance = np.hypot(*(np.mgrid[:SIZE, :SIZE] - [[[y]], [[x]]]))
        mask = sum((distance < 10 * k / (classes - 1)).astype(np.uint8) for k in range(classes))
        mask = np.minimum(mask, classes - 1)
        return 200 * mask[..., None] / (classes - 1) + rng.integers(0, 40, (SIZE, SIZE, 3)), mask

    return write_pairs(root, draw, **counts)


def write_checkpoint(path: Path) -> Path:
    """A SAM checkpoint of ``vit_t`` at ``SIZE``, whose weights are not those of ``none``."""
    from safetensors.torch import save_file

    from naslora.sam.segmentation import SamForSegmentation

    torch.manual_seed(1)
    head = {"mask_decoder.iou_prediction_head.layers.0.weight": torch.zeros(4, 4)}
    save_file({**SamForSegmentation("vit_t", SIZE).state_dict(), **head}, path)
    return path


def call(*arguments: object) -> Result:
    """Runs ``naslora`` with the arguments in this process.

    Reports are without plots, which take two thirds of a tiny run. tests/test_report.py draws them.
    """
    from accelerate.state import AcceleratorState

    from naslora import cli
    from naslora.report.figures import Drawing

    out, err = io.StringIO(), io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawing, "svg", lambda drawing: "<svg></svg>")
        patch.setattr(sys, "argv", ["naslora", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as exit:
                status = exit.code
    # Accelerate keeps a process's precision; each command stands for a process of its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Result(status, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> Result:
    """Runs a command that has to succeed."""
    result = call(*arguments)
    assert result.status == 0, result.err
    return result


def refusal(*arguments: object) -> str:
    """What a command writes to standard error that has to end with status 2."""
    result = call(*arguments)
    assert result.status == 2, result.err
    return result.err


def scores_of(run: Path, *options: object) -> dict:
    """What ``naslora evaluate`` prints of a run, a merged model or a family."""
    return json.loads(succeed("evaluate", run, *options).out)


def error_of(function, *arguments, **options) -> str:
    """The message of the ``UserError`` that a function raises, which is one line, as the command
    line prints it."""
    from naslora.errors import UserError, one_line

    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return one_line(str(caught.value))


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def group_lives(group: int) -> bool:
    """Whether a process of the group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    """A port of the loopback address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(condition, *processes) -> None:
    """Waits until a condition holds, for as long as the processes live."""
    while not condition():
        assert all(process.poll() is None for process in processes) or condition()
        time.sleep(0.01)


@contextlib.contextmanager
def process_group(store: Path, rank: int = 0, size: int = 1):
    """A gloo group, which ends after every DistributedDataParallel that the body has let go of.

    A reducer holds the group. If it is the last to do so, it joins the group's threads while it
    holds Python's lock, and never ends if one of them waits for that lock to free a tensor.
    """
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    try:
        yield
    finally:
        gc.collect()
        distributed.destroy_process_group()


def _in_group(rank: int, worker, store: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    with process_group(store, rank, 2):
        worker(rank, *arguments)


def in_two_processes(worker, folder: Path, *arguments) -> None:
    """Calls ``worker(rank, *arguments)`` in the two processes of a group, ranks 0 and 1.

    Forks, because they have imported everything already.
    """
    arguments = (worker, folder / "store", arguments)
    torch.multiprocessing.start_processes(_in_group, arguments, nprocs=2, start_method="fork")


@pytest.fixture
def single_process_group(tmp_path):
    """A group of this process alone."""
    with process_group(tmp_path / "store"):
        yield


@pytest.fixture(scope="module")
def clean_data(tmp_path_factory):
    """Images that tests only read."""
    return write_data(tmp_path_factory.mktemp("data") / "data", train=4, val=2, test=2)


@pytest.fixture
def data(clean_data, tmp_path):
    """A copy of ``clean_data`` to spoil."""
    return shutil.copytree(clean_data, tmp_path / "data")


@contextlib.contextmanager
def tiny_models(decoder: bool = True):
    """Makes ``vit_t``, and unless told otherwise every decoder, so small that a run takes a blink.

    Yields the small ``vit_t``.
    """
    from segment_anything.modeling import TwoWayTransformer

    from naslora.sam import vits

    def transformer(**options):
        return TwoWayTransformer(**options | {"depth": 1, "mlp_dim": 64})

    tiny = vits.ViT(**TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vits.VITS, "vit_t", tiny)
        if decoder:
            patch.setattr("naslora.sam.decoder.TwoWayTransformer", transformer)
        yield tiny


@pytest.fixture(scope="module")
def tiny_vit():
    """Makes ``vit_t`` small. The decoder is SAM's."""
    with tiny_models(decoder=False) as tiny:
        yield tiny


@pytest.fixture(scope="module")
def tiny_sam():
    """Makes ``vit_t`` and the decoders small."""
    with tiny_models() as tiny:
        yield tiny


@pytest.fixture(scope="module")
def run(tiny_sam, clean_data, tmp_path_factory):
    """A finished run on ``clean_data`` that tests only read."""
    output = tmp_path_factory.mktemp("runs") / "run"
    result = succeed("train", "--data", clean_data, *TRAIN, "--output", output)
    # So few and small images have fewer tokens than the second linear of an MLP has inputs.
    warnings = [line for line in result.err.splitlines() if "warning" in line]
    assert all("fewer tokens" in line for line in warnings), result.err
    return output


@pytest.fixture
def fresh_accelerate():
    """Lets a test choose the precision, whatever the test before it chose."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills what torch.empty returns with NaN, so that reading it before writing it shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    extensions = [extension for extension in (cpp._C, cuda._CUDA) if extension is not None]
    for extension in extensions:
        extension.poison(True)
    yield
    for extension in extensions:
        extension.poison(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def instruction_set(request):
    """Lets the C++ kernels compute with the instruction set of the test's target, if it has one."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    name = getattr(parameters.get("target"), "instruction_set", None)
    if name is not None:
        cpp._C.use_capability(name)
    yield
    if name is not None:
        cpp._C.use_capability(cpp.instruction_set())
