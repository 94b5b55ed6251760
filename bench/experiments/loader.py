"""Can the data loader keep up with the model? Images a second of both, with and without the cache.

    python -m bench.experiments.loader --model vit_b

Without ``--data`` the images are JPEGs of 2048 x 1536 pixels, as photographs and dermoscopic images
are, with PNG masks. Every rate is taken over whole epochs, after one that warms the page cache and
fills ours.
"""

import dataclasses
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from bench.cases import environment
from naslora.data.datasets import load_splits
from naslora.data.sampling import GlobalBatches
from naslora.training.accelerator import make_accelerator
from naslora.training.evaluation import make_loader
from naslora.training.resolve import resolve
from naslora.training.run_config import DataConfig, ModelConfig, RunConfig
from naslora.training.run_data import make_dataset
from naslora.training.run_model import build_adapted_model
from naslora.training.train_config import TrainConfig, loss_of


def main(
    data: Path | None = None,
    model: str = "vit_t",
    checkpoint: Path | None = None,
    image_size: int = 1024,
    batch_size: int = 4,
    workers: tuple[int, ...] = (0, 1, 2),
    epochs: int = 2,
    steps: int = 3,
) -> None:
    """Prints a table as Markdown.

    Args:
        data: a CSV data set; its training images are read.
        model: as of ``naslora train``.
        checkpoint: as of ``naslora train``.
        image_size: side of the images in pixels.
        batch_size: images a batch.
        workers: numbers of loading processes to try; 0 loads in the training process.
        epochs: how many epochs to time.
        steps: training steps to time; 0 times no model.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = data or write_photographs(Path(folder), count=26)
        _print_rates(data, model, checkpoint, image_size, batch_size, workers, epochs, steps)


def write_photographs(root: Path, count: int) -> Path:
    """A CSV data set of large smooth pictures with some noise, so that they compress as photographs
    do, and of masks of one disc."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:1536, :2048]
    mask = Image.fromarray(255 * (np.hypot(rows - 700, columns - 1000) < 400).astype(np.uint8))
    lines = ["image,label"]
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((2048, 1536), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / f"{i}.jpg", quality=90)
        mask.save(root / f"{i}.png")
        lines.append(f"{i}.jpg,{i}.png")
    header, validation, test, *train = lines
    for split, rows in (("train", train), ("val", [validation]), ("test", [test])):
        (root / f"{split}.csv").write_text("\n".join([header, *rows]) + "\n")
    return root


def _print_rates(
    data: Path,
    model: str,
    checkpoint: Path | None,
    image_size: int,
    batch_size: int,
    workers: tuple[int, ...],
    epochs: int,
    steps: int,
) -> None:
    training = TrainConfig(batch_size=batch_size, workers=0)
    config = resolve(
        RunConfig(
            data=DataConfig(root=data),
            model=ModelConfig(model, checkpoint and str(checkpoint), image_size),
            training=training,
        )
    )
    print(environment())
    print("\n| what | workers | images/s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        own = dataclasses.replace(config.data, cache=Path(cache))
        cached = dataclasses.replace(config, data=own)
        for name, variant in (("files", config), ("cache", cached)):
            for count in workers:
                print(f"| {name} | {count} | {_loader_rate(variant, count, epochs):.1f} |")
    if steps:
        print(f"| training step, {model} at {image_size} | - | {_model_rate(config, steps):.2f} |")


def _loader_rate(config: RunConfig, workers: int, epochs: int) -> float:
    dataset = make_dataset(config, load_splits("csv", config.data.root)["train"], "trained")
    batches = GlobalBatches(len(dataset), config.training.batch_size)
    loader = make_loader(dataset, batches, workers, make_accelerator(config.training))
    for _ in loader:  # warms up
        pass
    started = time.perf_counter()
    for _ in range(epochs):
        for _ in loader:
            pass
    return epochs * len(dataset) / (time.perf_counter() - started)


def _model_rate(config: RunConfig, steps: int) -> float:
    device = make_accelerator(config.training).device
    model = build_adapted_model(config).to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters)
    size = config.training.batch_size, config.model.image_size
    images = torch.rand(size[0], 3, size[1], size[1], device=device)
    masks = torch.randint(0, 2, (size[0], size[1], size[1]), device=device)
    for step in range(-1, steps):
        if step == 0:
            _synchronize(device)
            started = time.perf_counter()
        loss_of(config.training)(model(images), masks).backward()
        optimizer.step()
        optimizer.zero_grad()
    _synchronize(device)
    return steps * size[0] / (time.perf_counter() - started)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tyro.cli(main)
