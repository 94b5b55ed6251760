"""The manifest of predictions: which images are done, by which model.

manifest.csv, manifest-1.csv, ...   columns image, status, model; one file a process
"""

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from naslora.adapter.io.merged_files import MERGED_CONFIG, MERGED_WEIGHTS
from naslora.data.images import Sample
from naslora.errors import UserError, one_line
from naslora.files import file_checksum, reading
from naslora.results import adapter_folder

DONE = "done"
COLUMNS = "image", "status", "model"


class Manifest:
    """Lists images as they are done in the folder ``output``. With ``resume`` earlier ones count.

    ``models`` are folders or files, and ``settings`` is text that differs where masks would.

    Raises:
        UserError: a manifest is of another model, or is damaged.
    """

    def __init__(
        self, output: Path, models: Sequence[Path], settings: str, rank: int, resume: bool
    ) -> None:
        self.path = output / (f"manifest-{rank}.csv" if rank else "manifest.csv")
        self.model = _identity(models, settings)
        self._append = resume
        self._done: set[str] = set()
        for path in output.glob("manifest*.csv") if resume else ():
            with reading(path, "is no manifest"), path.open(encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["model"]]  # a line cut short
            if {row["model"] for row in rows} - {self.model}:
                raise UserError(
                    f"{path} is of another model, or of other options; give another --output"
                )
            self._done |= {row["image"] for row in rows if row["status"] == DONE}

    def __contains__(self, sample: Sample) -> bool:
        """Whether an image is done."""
        return os.path.abspath(sample.image) in self._done

    def add(self, sample: Sample, error: UserError | None) -> None:
        """Adds an image that is done, or that cannot be read."""
        status = DONE if error is None else one_line(str(error))
        rows = [(os.path.abspath(sample.image), status, self.model)]
        fresh = not (self._append and self.path.exists())
        with self.path.open("w" if fresh else "a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows] if fresh else rows)
        self._append = True


def _identity(models: Sequence[Path], settings: str) -> str:
    """Twelve digits that differ between models."""
    digest = hashlib.sha256(settings.encode())
    for model in models:
        files = [model] if model.is_file() else []  # a model may be known by its name
        if (model / MERGED_CONFIG).exists():
            files = [model / MERGED_WEIGHTS]
        elif model.is_dir():
            files = sorted(adapter_folder(model).glob("*.safetensors"))
        digest.update("".join([model.name, *map(file_checksum, files)]).encode())
    return digest.hexdigest()[:12]
