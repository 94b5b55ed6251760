"""How many of the bare model's images a second ``naslora predict`` has.

python -m bench.experiments.predict_rate MODEL PHOTOS --images 1000

The model computes 100 times on random pixels, then ``predict`` takes 100 photographs, and so on. At
the end ``predict`` takes 100 with a model that costs nothing, for the processor time beside it.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import tyro

from naslora.allocator import keep_freed_memory
from naslora.prediction import predict_run
from naslora.predictor import Predictor, make_predictor

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
    keep_freed_memory()  # as the command does
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
        seconds, _ = _predict(predictor, model, turn)
        ratios.append(bare / seconds)
        rates = f"model {len(turn) / bare:.2f}/s, predict {len(turn) / seconds:.2f}/s"
        print(f"{start + len(turn)} photographs: {rates}, {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f}")
    scores = predictor.class_map(pixels)
    torch.set_num_threads(1)  # waiting threads of torch take processor time
    free = dataclasses.replace(predictor, class_map=lambda images: scores)
    masks = dataclasses.replace(free.outputs, overlays=False)
    for title, own, skip in (
        ("with overlays", free, True),
        ("without", dataclasses.replace(free, outputs=masks), True),
        ("with overlays, and every image read before", free, False),
    ):
        _, processor = _predict(own, model, files[:TURN], skip)
        print(f"beside the model, {title}: {1000 * processor / TURN:.1f} ms of processor time")


def _predict(
    predictor: Predictor, model: Path, files: list[Path], skip: bool = True
) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of ``predict``, with or without --skip-errors."""
    loaded = mock.patch("naslora.prediction.make_predictor", lambda *_: predictor)
    with tempfile.TemporaryDirectory() as folder, loaded:
        started = time.perf_counter(), time.process_time()
        predict_run(model, files, Path(folder), on_error=print if skip else None)
        return time.perf_counter() - started[0], time.process_time() - started[1]


if __name__ == "__main__":
    tyro.cli(main)
