"""Each example runs as a user runs it; so do the README's lines of Python."""

import contextlib
import io
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from adapted_models import build_encoder, original_sam
from conftest import free_port
from miniatures import save
from PIL import Image
from segment_anything.modeling import Sam
from torch.multiprocessing import start_processes

import naslora
from naslora.adapter.layer.modules import adapter_layers
from naslora.files import read_safetensors

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# By the example: the library that it needs beside naslora.
RUNS = {
    "plain_loop": "segment_anything",
    "samed_style": "segment_anything",
    "lightning_loop": "lightning",
    "hf_trainer": "transformers",
    "universal": "transformers",
    "ddp": "torch.distributed",
}
OTHERS = ("model_and_data", "prompts", "serve")


def run(name: str, *arguments: str) -> str:
    """Returns what the example prints, which runs in this process."""
    pytest.importorskip(RUNS.get(name, "segment_anything"))
    path, printed = EXAMPLES / f"{name}.py", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()


def run_as_rank(rank: int, folder: Path, port: int) -> None:
    """An example in a process, with what torchrun gives it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (folder / f"printed{rank}").write_text(run("ddp", "--output", str(folder)))


def losses(output: str) -> list[float]:
    own = re.findall(r"^epoch \d+: loss ([\d.]+)$", output, flags=re.MULTILINE)
    trainers = re.findall(r"'loss': '?([\d.]+)", output)
    return [float(loss) for loss in own or trainers]


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*RUNS, *OTHERS}


@pytest.mark.parametrize("options", [*RUNS, "universal --host mask2former"])
def test_an_example_trains_and_saves(options, tmp_path):
    name, *others = options.split()
    if name == "ddp":
        start_processes(run_as_rank, (tmp_path, free_port()), nprocs=2, start_method="fork")
        output = (tmp_path / "printed0").read_text()
    else:
        output = run(name, *others, "--output", str(tmp_path))
    found = losses(output)
    assert len(found) == 4 and found[-1] < found[0]
    folder = tmp_path / "naslora_adapter" if name == "hf_trainer" else tmp_path
    assert (folder / "adapter_model.safetensors").is_file()
    if RUNS[name] == "transformers":
        assert float(output.rpartition("at most ")[2]) < 1e-5  # loaded, or merged
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    alphas = torch.cat([value for key, value in tensors.items() if key.endswith(".alpha")])
    # All but the one of the skip connection start within 5e-3 of 0; a search's step is 1e-2.
    assert alphas[alphas < 1].abs().max() > 8e-3


def test_an_example_takes_images_from_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        mask = np.zeros((40, 50), np.uint8)
        mask[10:30, 5 * i : 5 * i + 15] = 255
        save(tmp_path / f"masks/{i}.png", mask)
        pixels = mask[..., None] // 2 + rng.integers(0, 99, (40, 50, 3))
        save(tmp_path / f"images/{i}.png", pixels)
    data = ("--data", str(tmp_path), "--epochs", "2", "--output", str(tmp_path / "out"))
    assert len(losses(run("plain_loop", *data))) == 2


def tiny_sam(size: int) -> Sam:
    return original_sam(build_encoder(img_size=size, out_chans=256), size, depth=1, mlp_dim=64)


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_printed_lines_run_at_any_image_size(page, size, tmp_path, monkeypatch, capsys):
    text = (ROOT / page).read_text()
    code = re.search(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)[1]
    monkeypatch.chdir(tmp_path)
    registry = {"vit_b": lambda checkpoint: tiny_sam(size)}
    monkeypatch.setattr("segment_anything.sam_model_registry", registry)
    images = torch.rand(4, 3, size, size)

    def loss_fn(sam, batch):
        features = sam.image_encoder(batch)
        sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
        position = sam.prompt_encoder.get_dense_pe()
        masks, _ = sam.mask_decoder(features, position, sparse, dense, multimask_output=False)
        return masks.square().mean()

    def train_step(sam, batch, optimizer):
        optimizer.zero_grad()
        loss_fn(sam, batch).backward()
        optimizer.step()

    batches = {"train": [images[:2]], "held_out": [images[2:]]}
    scope = {**batches, "loss_fn": loss_fn, "train_step": train_step}
    exec(code, scope)
    assert "merged 8 layers" in capsys.readouterr().out
    fresh = tiny_sam(size)
    naslora.load_adapter(fresh, tmp_path / "adapter")
    assert any(layer.lora_B.any() for _, layer in adapter_layers(fresh))


def test_the_example_of_prompts(tmp_path):
    """The picture shows the photograph twice, with the mask of a point and with that of a box."""
    output = run("prompts", "--output", str(tmp_path / "masks.png"))
    assert re.fullmatch(r"point: \d+% of the image\nbox: \d+% of the image\n", output)
    picture = np.asarray(Image.open(tmp_path / "masks.png"))
    half = picture.shape[1] // 2
    assert picture.shape == (600, 1024, 3) and (picture[:, :half] != picture[:, half:]).any()
