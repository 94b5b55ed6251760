"""How much a distilled encoder is like its teacher, on the photographs that were held out.

    python -m bench.experiments.student runs/distill

RUN is an output of ``bench.experiments.distill``. The table has the cosine similarity of the
embeddings, that of a constant, and the IoU of the masks that both models give for the same prompts.
The prompts are a grid of points, and the boxes around the teacher's masks of them. Masks of the
teacher that cover less than 1 % or more than 60 % of a photograph are left out.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import tyro
from segment_anything import SamPredictor

from bench.experiments.distill import CONFIG, Settings, find_images, similarity
from naslora.data.images import Sample, open_picture
from naslora.files import read_json
from naslora.report.tables import Table, markdown_table
from naslora.sam.prompts import build_predictor
from naslora.study.summary import mean_and_spread, mean_text

GRID = 3
"""Points of a photograph along a side."""
AREAS = (0.01, 0.6)
SMALL = 0.1


def main(run: tyro.conf.Positional[Path]) -> None:
    """Prints a table as Markdown: means ± standard deviations over the photographs.

    Args:
        run: the output of a distillation.
    """
    values = read_json(run / CONFIG)
    names = ("teacher", "checkpoint", "student", "image_size", "held_out", "seed", "photographs")
    settings = Settings(**{name: values[name] for name in names})
    size = settings.image_size
    teacher = build_predictor(settings.teacher, size, settings.checkpoint)
    student = build_predictor(settings.student, size, run / f"{settings.student}.safetensors")
    _, held_out = find_images(settings)
    print(markdown_table(_table(held_out, teacher, student)))


def _table(samples: list[Sample], teacher: SamPredictor, student: SamPredictor) -> Table:
    embeddings, similarities = [], []
    masks: dict[str, list[float]] = {}
    for sample in samples:
        image = open_picture(sample).rows()
        teacher.set_image(image)
        student.set_image(image)
        embeddings.append(teacher.features)
        similarities.append(float(similarity(student.features, teacher.features)))
        own: dict[str, list[float]] = {}
        for kind, area, iou in _agreements(image, teacher, student):
            size = f"of less than {SMALL:.0%}" if area < SMALL else f"of at least {SMALL:.0%}"
            own.setdefault(f"IoU of masks {size}, from {kind}", []).append(iou)
        for name, values in own.items():
            masks.setdefault(name, []).append(float(np.mean(values)))
    constant = torch.cat(embeddings).mean((0, 2, 3)).reshape(1, -1, 1, 1)
    constants = [float(similarity(constant.expand_as(one), one)) for one in embeddings]
    rows = {
        "cosine similarity of the embeddings": similarities,
        "cosine similarity of a constant, the teacher's mean": constants,
        **dict(sorted(masks.items())),
    }
    cells = [[name, str(len(v)), mean_text(*mean_and_spread(v))] for name, v in rows.items()]
    return Table(["score", "photographs", "mean"], cells)


def _agreements(
    image: np.ndarray, teacher: SamPredictor, student: SamPredictor
) -> Iterator[tuple[str, float, float]]:
    """For each prompt its kind, the share of the photograph in the teacher's mask, and the IoU.

    Both predictors have the (H, W, 3) image set.
    """
    height, width = image.shape[:2]
    steps = (np.arange(GRID) + 0.5) / GRID
    for x in steps * width:
        for y in steps * height:
            point = {"point_coords": np.array([[x, y]]), "point_labels": np.array([1])}
            mask = _mask(teacher, **point)
            area = float(mask.mean())
            if not AREAS[0] <= area <= AREAS[1]:
                continue
            yield "points", area, _iou(mask, _mask(student, **point))
            rows, columns = np.nonzero(mask)
            box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            mask = _mask(teacher, box=box)
            yield "boxes", float(mask.mean()), _iou(mask, _mask(student, box=box))


def _mask(predictor: SamPredictor, **prompt: np.ndarray) -> np.ndarray:
    """The mask with the greatest estimated IoU, (H, W) bool."""
    masks, scores, _ = predictor.predict(**prompt)
    return masks[scores.argmax()]


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


if __name__ == "__main__":
    tyro.cli(main)
