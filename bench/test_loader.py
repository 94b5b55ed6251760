"""Does the data loader keep up with a model? ``pytest bench/test_loader.py --benchmark-only``.

The images are JPEGs of 2048 x 1536 pixels, as photographs and dermoscopic images are, with PNG
masks. An epoch of them is read from the files, and from the cache of decoded images.
"""

import numpy as np
import pytest
from PIL import Image

from naslora.data.datasets import load_splits
from naslora.data.sampling import GlobalBatches
from naslora.training.accelerator import make_accelerator
from naslora.training.evaluation import make_loader
from naslora.training.resolve import resolve
from naslora.training.run_config import DataConfig, ModelConfig, RunConfig, TrainConfig
from naslora.training.run_data import make_dataset

BATCH = 4


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, pytestconfig):
    """A CSV data set of large smooth pictures with some noise, so that they compress as photographs
    do, and of masks of one disc."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    rows, columns = np.mgrid[:1536, :2048]
    mask = Image.fromarray(255 * (np.hypot(rows - 700, columns - 1000) < 400).astype(np.uint8))
    lines = []
    for i in range(6 if pytestconfig.getoption("benchmark_disable") else 26):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((2048, 1536), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / f"{i}.jpg", quality=90)
        mask.save(root / f"{i}.png")
        lines.append(f"{i}.jpg,{i}.png")
    for split, of_split in (("train", lines[2:]), ("val", lines[:1]), ("test", lines[1:2])):
        (root / f"{split}.csv").write_text("\n".join(["image,label", *of_split]) + "\n")
    return root


@pytest.mark.benchmark(group="loader")
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("source", ["files", "cache"])
def test_loader(benchmark, photographs, tmp_path, source, workers):
    """An epoch, after one that warms the page cache and fills ours."""
    data = DataConfig(root=photographs, cache=tmp_path if source == "cache" else None)
    training = TrainConfig(batch_size=BATCH, workers=0)
    model = ModelConfig("vit_t", None, 1024)
    config = resolve(RunConfig(data=data, model=model, training=training))
    images = load_splits("csv", photographs)["train"]
    dataset = make_dataset(config, images, "trained")
    batches = GlobalBatches(range(len(dataset)), BATCH)
    loader = make_loader(dataset, batches, workers, make_accelerator(config.training))
    benchmark.pedantic(lambda: sum(1 for _ in loader), rounds=2, warmup_rounds=1)
    if benchmark.stats is not None:
        rate = len(dataset) / benchmark.stats.stats.median
        benchmark.extra_info["images_per_second"] = round(rate, 1)
