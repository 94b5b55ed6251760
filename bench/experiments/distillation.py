"""A distillation: the teacher, the student, and the passes over crops of images."""

import dataclasses
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bench.experiments.crops import Crops, Targets, find_images
from naslora.data.cache import Cache
from naslora.data.dataset import SegmentationDataset
from naslora.data.sampling import GlobalBatches
from naslora.errors import UserError
from naslora.files import read_torch, write_tensors, write_torch
from naslora.records import from_json, to_json, write_rows
from naslora.sam.checkpoint import read_checkpoint
from naslora.sam.encoders import PATCH_SIZE
from naslora.sam.export import Embedding
from naslora.sam.precision import cast_frozen
from naslora.sam.segmentation import SamForSegmentation, build_model
from naslora.sam.shipped import NONE
from naslora.training.accelerator import make_accelerator
from naslora.training.evaluation import make_loader
from naslora.training.progress import TrainProgress
from naslora.training.step import Group, LossNotFiniteError, train_pass
from naslora.training.train_config import Precision, TrainConfig, frozen_dtype
from naslora.training.train_config import factor as schedule_factor

HISTORY, LAST, TEACHER = "history.csv", "last.pt", "teacher"
POSITIONS = re.compile(r"pos_embed$|rel_pos_[hw]$")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides a distillation's result."""

    checkpoint: Path
    """The teacher's checkpoint."""
    photographs: Path
    """Folder of images. A part of them is held out to score the student."""
    also: tuple[Path, ...] = ()
    """CSV data sets whose training images are used as well. Others of their images are not read."""
    teacher: str = "mobile_sam"
    """The teacher's name, as `--model` of `naslora train`."""
    student: str = "vit_t"
    """The student's name: a plain ViT."""
    image_size: int = 256
    """Side of the images that both encoders get, in pixels."""
    epochs: int = 12
    """Passes over the images. Each takes one crop of every image."""
    crops: int = 2
    """Different crops of an image. The teacher sees each of them once."""
    smallest_crop: float = 0.5
    """Smallest share of an image's area that a crop has."""
    held_out: float = 0.05
    """Share of the photographs to hold out."""
    repeat: int = 2
    """How often a pass takes each photograph, because they are more varied than other images."""
    batch_size: int = 8
    """Images a step."""
    learning_rate: float = 1e-3
    """Largest rate of AdamW. It falls to zero along a cosine."""
    weight_decay: float = 0.05
    """Weight decay of the matrices. Norms, biases and positions have none."""
    warm_up: int = 200
    """Steps over which the rate rises from zero."""
    averaging: float = 0.998
    """Share of the mean of the weights that a step keeps."""
    precision: Precision | None = None
    """`no`, `bf16` or `fp16`, as `--mixed-precision` of `naslora train`."""
    seed: int = 0
    """Seed of the student's start, the crops, the held-out photographs and the order."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass over the images: a row of history.csv."""

    epoch: int
    """Counted from 1."""
    views: int
    """Crops that the student has seen so far."""
    loss: float
    """Mean loss of the pass."""
    similarity: float
    """Cosine similarity on the held-out photographs, of the mean of the weights."""
    learning_rate: float
    """Rate of the last step."""
    seconds: float
    """Time of the pass, without the scoring."""


# ---- Teacher and student -------------------------------------------------------------------------


def build_teacher(settings: Settings, dtype: torch.dtype) -> SamForSegmentation:
    """The frozen teacher. All weights but those of its norms have the dtype.

    Raises:
        UserError: as ``build_model``.
    """
    model = build_model(
        settings.teacher, settings.image_size, checkpoint=settings.checkpoint, attention="fused"
    )
    cast_frozen(model.image_encoder, dtype)
    return model.eval()


def build_student(settings: Settings, teacher: nn.Module) -> SamForSegmentation:
    """The student with random weights, whose last layers are the teacher's.

    Those are the layers of the neck that have the teacher's shapes. Without the last norm, whose
    scale differs between channels, the student needs hundreds of steps to find that scale.

    Args:
        settings: the distillation.
        teacher: the teacher's image encoder.

    Raises:
        UserError: the teacher's embedding has another shape.
    """
    model = build_model(
        settings.student, settings.image_size, 1, NONE, settings.seed, attention="fused"
    )
    images = torch.zeros(1, 3, settings.image_size, settings.image_size)
    with torch.no_grad():
        shapes = [tuple(one(images).shape[1:]) for one in (teacher, model.image_encoder)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the embedding of teacher {settings.teacher} has the shape {shapes[0]}, that of "
            f"student {settings.student} the shape {shapes[1]}; choose another --teacher"
        )
    own, given = model.image_encoder.neck.state_dict(), teacher.neck.state_dict()
    fitting = {name: value for name, value in given.items() if own[name].shape == value.shape}
    model.image_encoder.neck.load_state_dict({**own, **fitting})
    model.image_encoder.requires_grad_(True)
    return model


def distance(embedding: Tensor, target: Tensor) -> Tensor:
    """The loss: 1 - cosine similarity of the tokens, plus smooth L1.

    Args:
        embedding: (B, 256, g, g) of the student.
        target: the same of the teacher.
    """
    embedding = embedding.float()
    return 1 - similarity(embedding, target) + F.smooth_l1_loss(embedding, target)


def similarity(embedding: Tensor, target: Tensor) -> Tensor:
    """Mean over images and tokens of the cosine similarity of (B, 256, g, g) embeddings."""
    return F.cosine_similarity(embedding.float(), target.float(), dim=1).mean()


# ---- Training ------------------------------------------------------------------------------------


class Distillation:
    """Trains the student; ``run`` does it all.

    Args:
        settings: the distillation.
        output: folder of its files.

    Raises:
        UserError: as ``build_teacher``, ``build_student`` and ``find_images``.
    """

    def __init__(self, settings: Settings, output: Path) -> None:
        self.settings, self.output = settings, output
        self.config = TrainConfig(
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            schedule="cosine",
            mixed_precision=settings.precision,
            workers=0,
        )
        self.accelerator = make_accelerator(self.config)
        teacher = build_teacher(settings, frozen_dtype(self.config))
        self.teacher = Embedding(teacher)
        self.whole = build_student(settings, teacher.image_encoder)
        self.student = Embedding(self.whole)
        self.mean = AveragedModel(self.student, multi_avg_fn=self._average, use_buffers=True)
        self.group = Group(self._optimizer(), self.config.clip_norm, self.config.schedule)
        train, held_out = find_images(
            settings.photographs, settings.held_out, settings.repeat, settings.also, settings.seed
        )
        size = settings.image_size
        cache = Cache(output / "cache")
        self.crops = Crops(
            train, size, settings.crops, settings.smallest_crop, settings.seed, cache
        )
        self.photographs = SegmentationDataset(held_out, size, 1, cache=cache)
        self.batches = GlobalBatches(
            range(len(self.crops)), settings.batch_size, seed=settings.seed
        )
        grid = size // PATCH_SIZE
        count = settings.crops * len(train)
        self.targets = Targets(output / TEACHER, self._teach, count, grid)
        self.history: list[Pass] = []

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW, which decays matrices and kernels only."""
        parameters = dict(self.whole.image_encoder.named_parameters())
        decayed = [p for n, p in parameters.items() if p.dim() > 1 and not POSITIONS.search(n)]
        ids = {id(p) for p in decayed}
        others = [p for p in parameters.values() if id(p) not in ids]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        rate, decay = self.config.learning_rate, self.config.weight_decay
        return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, betas=(0.9, 0.98), fused=True)

    def _average(self, mean: list[Tensor], new: list[Tensor], count: Tensor) -> None:
        """One step of the exponential mean, which forgets faster at the start."""
        steps = float(count)
        keep = min(self.settings.averaging, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(mean, new, 1 - keep)

    def _teach(self, images: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return self.teacher(images)

    # ---- Passes ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains from the current pass to the last, and writes its files after every pass.

        Raises:
            UserError: the loss is not finite; the files of the last pass are kept.
        """
        console = Console(stderr=True)
        left = self.settings.epochs - len(self.history)
        with TrainProgress(console, left * len(self.batches)) as progress:
            while len(self.history) < self.settings.epochs:
                self._run_pass(progress)
                self._save()
                console.print(_line(self.history[-1], self.settings.epochs), highlight=False)

    def _run_pass(self, progress: TrainProgress) -> None:
        epoch = len(self.history)
        self.batches.set_epoch(epoch)
        self.crops.set_epoch(epoch)

        def after_step(loss: float, images: int) -> None:
            self.mean.update_parameters(self.student)
            progress.finish_step(loss, images)

        progress.start_pass(f"pass {epoch + 1}/{self.settings.epochs}")
        started = time.perf_counter()
        try:
            loss = train_pass(
                self.student,
                [self.group],
                [],
                self.batches,
                self._with_targets(make_loader(self.crops, self.batches, 0, self.accelerator)),
                distance,
                1,
                self.accelerator,
                before_step=self._set_rate,
                after_step=after_step,
            )
        except LossNotFiniteError as error:
            loss, images = error.args
            raise UserError(f"the loss is {loss} on {images}; lower --learning-rate") from error
        seconds = time.perf_counter() - started
        views = (epoch + 1) * len(self.crops)
        rate = self.group.optimizer.param_groups[0]["lr"]
        self.history.append(Pass(epoch + 1, views, loss, self.score(), rate, seconds))

    def _with_targets(self, loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches of crops; the teacher's embeddings stand where a training run has masks."""
        for batch in loader:
            yield {**batch, "mask": self.targets.of(batch["image"], batch["index"])}

    def _set_rate(self, part: float) -> None:
        done = len(self.history) + part
        step = done * len(self.batches)
        rise = min(1.0, (step + 1) / self.settings.warm_up)
        factor = schedule_factor(self.group.schedule, done / self.settings.epochs)
        self.group.set_rates(rise * factor)

    @torch.no_grad()
    def score(self) -> float:
        """Cosine similarity on the held-out photographs, of the mean of the weights."""
        self.mean.eval()
        batches = GlobalBatches(
            range(len(self.photographs)), self.settings.batch_size, shuffle=False
        )
        total = 0.0
        for batch in make_loader(self.photographs, batches, 0, self.accelerator):
            with self.accelerator.autocast():
                found = similarity(self.mean(batch["image"]), self.teacher(batch["image"]))
            total += len(batch["image"]) * float(found)
        return total / len(self.photographs)

    # ---- Files -----------------------------------------------------------------------------------

    def _save(self) -> None:
        """Writes the weights if they are the best, and what ``resume`` needs."""
        similarities = [one.similarity for one in self.history]
        write_rows(self.output / HISTORY, self.history)
        if similarities[-1] == max(similarities):
            self._write_weights()
        state = {
            "history": to_json(self.history),
            "student": self.student.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizer": self.group.optimizer.state_dict(),
        }
        write_torch(self.output / LAST, state)

    def _write_weights(self) -> None:
        """Writes a SAM in 16 bits: the mean of the student's weights, the teacher's decoder."""
        tensors = {
            name: value
            for name, value in read_checkpoint(self.settings.checkpoint).items()
            if not name.startswith("image_encoder.")
        }
        encoder = self.mean.module.encoder.state_dict()
        tensors |= {f"image_encoder.{name}": value for name, value in encoder.items()}
        about = {
            "model": self.settings.student,
            "image_size": str(self.settings.image_size),
            "views": str(self.history[-1].views),
            "similarity": f"{self.history[-1].similarity:.4f}",
        }
        path = self.output / f"{self.settings.student}.safetensors"
        write_tensors(path, {name: value.half() for name, value in tensors.items()}, about)

    def resume(self) -> None:
        """Continues from the files of the last pass, if there are any.

        Raises:
            UserError: the file is damaged, or belongs to another distillation.
        """
        path = self.output / LAST
        if not path.is_file():
            return
        state = read_torch(path)
        try:
            self.history = from_json(list[Pass], state["history"], path)
            self.student.load_state_dict(state["student"])
            self.mean.load_state_dict(state["mean"])
            self.group.load_moments(state["optimizer"]["state"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot resume from {path}: {error}; start anew") from error


def _line(record: Pass, epochs: int) -> str:
    return (
        f"pass {record.epoch}/{epochs}  {record.views} views  loss {record.loss:.3f}  "
        f"similarity {record.similarity:.4f}  {record.seconds:.0f} s"
    )
