"""How many of the bare model's images a second ``naslora predict`` has.

python -m bench.experiments.predict_rate MODEL PHOTOS --images 1000

The model computes 100 times on random pixels, then ``predict`` takes 100 photographs, and so on.
"""

import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import tyro

from naslora.prediction import predict_run
from naslora.predictor import make_predictor

TURN = 100  # photographs


def main(
    model: tyro.conf.Positional[Path],
    photos: tyro.conf.Positional[Path],
    images: int = 1000,
    threads: int = 2,
) -> None:
    """Prints images a second of each turn, and the median of the ratios.

    Args:
        model: a folder or a file, as for naslora predict.
        photos: a folder of JPEG files.
        images: how many of them.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    predictor = make_predictor(model)
    side = predictor.config.model.image_size
    pixels = torch.rand(1, predictor.channels, side, side)
    predictor.class_map(pixels)  # compiles, allocates
    files, ratios = sorted(photos.glob("*.jpg"))[:images], []
    for start in range(0, len(files), TURN):
        turn = files[start : start + TURN]
        started = time.perf_counter()
        for _ in turn:
            predictor.class_map(pixels)
        bare = time.perf_counter() - started
        loaded = mock.patch("naslora.prediction.make_predictor", lambda *_: predictor)
        with tempfile.TemporaryDirectory() as folder, loaded:
            started = time.perf_counter()
            predict_run(model, turn, Path(folder), on_error=print)
            seconds = time.perf_counter() - started
        ratios.append(bare / seconds)
        rates = f"model {len(turn) / bare:.2f}/s, predict {len(turn) / seconds:.2f}/s"
        print(f"{start + len(turn)} photographs: {rates}, {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    tyro.cli(main)
