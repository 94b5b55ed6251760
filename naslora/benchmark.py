"""Models in several runtimes on one machine, side by side: speed, latency, memory and Dice.

benchmark.csv, benchmark.png   one row, one bar a model
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

from naslora.data.images import Sample
from naslora.errors import UserError
from naslora.predictor import Predictor, make_predictor
from naslora.records import write_rows
from naslora.report.figures import BLUE, row_drawing
from naslora.report.tables import Table, markdown_table, number
from naslora.sam.attention import unfuse_attention
from naslora.settings import Count, checked
from naslora.study.measurement import in_own_process, peak_memory, seconds_in_turn
from naslora.trained import dice_of, split_of, with_data
from naslora.training.run_data import make_dataset

FORMS = ["PyTorch, stock", "PyTorch, fused"]
"""In which a folder is measured."""


@dataclass(frozen=True)
class Measured:
    """A model in a runtime: a row of benchmark.csv."""

    model: str
    runtime: str
    images_per_second: float
    p50_ms: float
    """Median latency of a batch."""
    p95_ms: float
    peak_memory_mb: float
    """Of a process that loads it and computes one batch, PyTorch's own memory included."""
    dice: float | None
    """On test images, at the size at which the model sees them; None without data."""


def benchmark(
    paths: Sequence[Path],
    output: Path,
    data: Path | None = None,
    images: int = 32,
    batch_size: int = 1,
    trust: bool = False,
) -> str:
    """Measures models, and returns the table as Markdown.

    Arguments are the options of ``naslora benchmark``. Folders among ``paths`` are measured with
    PyTorch's own and with fused attention. Without data there is no Dice.

    Raises:
        UserError: as ``make_predictor`` and ``find_splits``; the models take images of different
            shapes.
    """
    checked("images", images, Count)
    checked("batch_size", batch_size, Count)
    forms = [(path, form) for path in paths for form in ([""] if path.is_file() else FORMS)]
    models = [_load(path, form, trust) for path, form in forms]
    shapes = {(own.channels, own.config.model.image_size) for own in models}
    if len(shapes) > 1:
        raise UserError("the models take images of different sizes or channels; measure them apart")
    ((channels, size),) = shapes
    batch = torch.rand(batch_size, channels, size, size)
    seconds = seconds_in_turn([partial(model.class_map, batch) for model in models])
    rows, samples = [], _samples(models, data, images)
    for (path, form), model, own in zip(forms, models, seconds, strict=True):
        dataset = make_dataset(model.config, samples)
        rows.append(
            Measured(
                model=path.name,
                runtime=form or path.suffix[1:],
                images_per_second=batch_size / float(np.median(own)),
                p50_ms=1000 * float(np.median(own)),
                p95_ms=1000 * float(np.quantile(own, 0.95)),
                peak_memory_mb=in_own_process(_memory, path, form, trust, batch_size) / 1e6,
                dice=dice_of(model.class_map, dataset) if samples else None,
            )
        )
    write_rows(output / "benchmark.csv", rows)

    def draw(axes: Axes) -> None:
        axes.barh(range(len(rows)), [row.p50_ms for row in rows], color=BLUE, height=0.6)
        for place, row in enumerate(rows):
            axes.plot([row.p50_ms, row.p95_ms], [place, place], color=BLUE)
        axes.set_xlabel("milliseconds")

    caption = "Median latency of a batch in ms, with a line to the 95th percentile."
    titles = [f"{row.model}, {row.runtime}" for row in rows]
    row_drawing("benchmark", caption, titles, draw).save(output)
    return markdown_table(_table(rows))


def _load(path: Path, form: str, trust: bool) -> Predictor:
    predictor = make_predictor(path, trust=trust)
    if form == FORMS[0] and predictor.model is not None:
        unfuse_attention(predictor.model)
    return predictor


def _memory(path: Path, form: str, trust: bool, batch_size: int) -> int:
    predictor = _load(path, form, trust)
    size = predictor.config.model.image_size
    predictor.class_map(torch.rand(batch_size, predictor.channels, size, size))
    return peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _samples(models: Sequence[Predictor], data: Path | None, images: int) -> list[Sample]:
    """Test images, evenly spread over the split; none if no model names data."""
    named = [own.config for own in models if own.config.data.root is not None]
    config = with_data((named or [models[0].config])[0], data)
    samples = [] if config.data.root is None else split_of(config, "test")
    return samples[:: max(1, len(samples) // images)][:images]


def _table(rows: Sequence[Measured]) -> Table:
    head = ["Model", "Runtime", "Images/s", "p50, ms", "p95, ms", "Peak memory, MB", "Dice"]
    forms = (".2f", ".0f", ".0f", ".0f", ".4f")
    cells = []
    for model, runtime, *numbers in (vars(row).values() for row in rows):
        cells.append([model, runtime, *map(number, numbers, forms)])
    return Table(head, cells)
