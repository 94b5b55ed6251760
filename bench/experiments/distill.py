"""Distils a SAM's image encoder into a plain ViT, as was done for the weights in the package.

    python -m bench.experiments.distill --teacher mobile_sam --checkpoint mobile_sam.safetensors \\
        --photographs DIR --also KVASIR LEAF --output runs/distill

The student learns to give the teacher's embedding of random crops of images, which need no masks.
The prompt encoder and the mask decoder are the teacher's. The held-out photographs are scored after
every pass over the images, with the mean of the student's weights: ``OUTPUT/history.csv`` has the
cosine similarity of their embeddings to the teacher's. ``OUTPUT/MODEL.safetensors`` has the weights
with the highest one. It is a checkpoint that ``naslora train --checkpoint`` loads.

An embedding of the teacher is computed once for every crop and kept in ``OUTPUT/cache``. Every
random choice is a function of the seed, the epoch and the image, so that ``--resume`` continues an
interrupted run as if it had not been interrupted.
"""

import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from naslora.data.cache import Cache
from naslora.data.dataset import Item, SegmentationDataset
from naslora.data.images import Sample
from naslora.data.layouts import list_images, read_csv
from naslora.data.sampling import AUGMENT, GlobalBatches, hold_out, seeded_generator
from naslora.errors import UserError
from naslora.files import read_json, read_torch, write_json, write_tensors, write_torch
from naslora.records import from_json, to_json, write_rows
from naslora.report.tables import Table, markdown_table
from naslora.sam.checkpoint import read_checkpoint
from naslora.sam.export import Embedding
from naslora.sam.segmentation import SamForSegmentation, build_model
from naslora.sam.shipped import NONE
from naslora.training.run_config import differing

CONFIG, HISTORY, LAST = "config.json", "history.csv", "last.pt"
POSITIONS = re.compile(r"pos_embed$|rel_pos_[hw]$")
CLIP_NORM = 1.0
FULL_SIZE = 1.375
"""Side of the images from which crops are taken, in sides of a crop."""


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
    """The student's name: a plain ViT of SAM's, DINO's or PE's."""
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


# ---- Images --------------------------------------------------------------------------------------


class Crops(SegmentationDataset):
    """Random crops of images, half of them mirrored.

    An epoch takes one crop of every image. After ``settings.crops`` epochs the crops repeat.
    """

    def __init__(self, samples: Sequence[Sample], settings: Settings, cache: Cache) -> None:
        side = round(FULL_SIZE * settings.image_size)
        super().__init__(samples, side, 1, seed=settings.seed, cache=cache)
        self.settings = settings

    def __getitem__(self, index: int) -> Item:
        """A crop."""
        count, size = self.settings.crops, [self.settings.image_size] * 2
        draw = seeded_generator(AUGMENT, self.seed, int(self._epoch) % count, index)
        pixels, _ = self.read(self.samples[index])
        bicubic = InterpolationMode.BICUBIC
        pixels = transforms.resized_crop(pixels, *self._box(draw), size, bicubic, antialias=True)
        if draw.random() < 0.5:
            pixels = transforms.horizontal_flip(pixels)
        return {"image": transforms.to_dtype(pixels, torch.float32, scale=True)}

    def _box(self, draw: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width: sides between 3:4 and 4:3, as far as they fit."""
        area = draw.uniform(self.settings.smallest_crop, 1)
        ratio = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
        sides = np.clip(np.sqrt([area * ratio, area / ratio]), None, 1)
        height, width = (self.image_size * sides).round().astype(int).tolist()
        top = int(draw.integers(self.image_size - height + 1))
        return top, int(draw.integers(self.image_size - width + 1)), height, width


def find_images(settings: Settings) -> tuple[list[Sample], list[Sample]]:
    """Finds the images to train on, and the photographs to score on.

    Raises:
        UserError: a folder is missing or holds no images.
    """
    folder = Path(settings.photographs)
    found = [Sample(path, None, path.name) for path in list_images(folder)]
    if not found:
        raise UserError(f"there are no images in {folder}; give another --photographs")
    kept, scored = hold_out(found, settings.held_out, settings.seed)
    more = [s._replace(mask=None) for folder in settings.also for s in read_csv(folder)["train"]]
    return settings.repeat * kept + more, scored


# ---- Teacher and student -------------------------------------------------------------------------


def neck_of(model: Any) -> nn.Module:
    """The last layers before the embedding, which are the encoder's or the decoder's."""
    return getattr(model.image_encoder, "neck", None) or model.mask_decoder.neck


def build_student(settings: Settings, teacher: SamForSegmentation) -> SamForSegmentation:
    """The student with random weights, whose last layers are the teacher's.

    Those are the layers of the neck that have the teacher's shapes. Without the last norm, whose
    scale differs between channels, the student needs hundreds of steps to find that scale.

    Raises:
        UserError: the teacher's embedding has another shape.
    """
    student, size = settings.student, settings.image_size
    model = build_model(student, size, 1, NONE, settings.seed, attention="fused")
    images = torch.zeros(1, 3, size, size)
    with torch.no_grad():
        shapes = [tuple(Embedding(one)(images).shape[1:]) for one in (teacher, model)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the embedding of teacher {settings.teacher} has the shape {shapes[0]}, that of "
            f"student {student} the shape {shapes[1]}; choose another --teacher"
        )
    own, given = neck_of(model).state_dict(), neck_of(teacher).state_dict()
    fitting = {name: value for name, value in given.items() if own[name].shape == value.shape}
    neck_of(model).load_state_dict({**own, **fitting})
    model.image_encoder.requires_grad_(True)
    return model


def make_optimizer(encoder: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW, which decays matrices and kernels only."""
    decayed, others = [], []
    for name, parameter in encoder.named_parameters():
        decays = parameter.dim() > 1 and not POSITIONS.search(name)
        (decayed if decays else others).append(parameter)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    rate, decay = settings.learning_rate, settings.weight_decay
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, betas=(0.9, 0.98), fused=True)


def distance(embedding: Tensor, target: Tensor) -> Tensor:
    """The loss of (B, 256, g, g) embeddings: 1 - cosine similarity of tokens, plus smooth L1."""
    return 1 - similarity(embedding, target) + F.smooth_l1_loss(embedding, target)


def similarity(embedding: Tensor, target: Tensor) -> Tensor:
    """Mean over images and tokens of the cosine similarity of (B, 256, g, g) embeddings."""
    return F.cosine_similarity(embedding, target, dim=1).mean()


# ---- Training ------------------------------------------------------------------------------------


class Distillation:
    """The teacher, the student, and what trains it. ``output`` is the folder of its files.

    Raises:
        UserError: as ``build_model``, ``build_student`` and ``find_images``.
    """

    def __init__(self, settings: Settings, output: Path) -> None:
        self.settings, self.output = settings, output
        size = settings.image_size
        if not any(n.startswith("mask_decoder.") for n in read_checkpoint(settings.checkpoint)):
            raise UserError(
                f"{settings.checkpoint} holds an encoder alone, whose embedding is random: give a "
                "model that was trained and exported to safetensors"
            )
        checkpoint = {"checkpoint": settings.checkpoint, "attention": "fused"}
        teacher = build_model(settings.teacher, size, **checkpoint)
        self.teacher = Embedding(teacher.eval())
        self.student = Embedding(build_student(settings, teacher))
        self.optimizer = make_optimizer(self.student, settings)
        self.mean = AveragedModel(self.student, multi_avg_fn=self._average, use_buffers=True)
        train, held_out = find_images(settings)
        self.cache = cache = Cache(output / "cache")
        self.crops = Crops(train, settings, cache)
        self.photographs = SegmentationDataset(held_out, size, 1, cache=cache)
        places = range(len(self.crops))
        self.batches = GlobalBatches(places, settings.batch_size, seed=settings.seed)
        self.history: list[Pass] = []

    def _average(self, mean: list[Tensor], new: list[Tensor], count: Tensor) -> None:
        """One step of the exponential mean, which forgets faster at the start."""
        steps = float(count)
        keep = min(self.settings.averaging, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(mean, new, 1 - keep)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """The teacher's embeddings (B, 256, g, g) of (B, 3, S, S) crops, on disk in 16 bits."""

        def embed(image: Tensor) -> Tensor:
            return self.teacher(image[None])[0].half()

        kept = [
            self.cache.get([image.numpy().tobytes()], "teacher", partial(embed, image))
            for image in images
        ]
        return torch.stack(kept).float()

    def run_pass(self) -> Pass:
        """Trains on one crop of every image, and scores.

        Raises:
            UserError: the loss is not finite.
        """
        settings, epoch, total, started = self.settings, len(self.history), 0.0, time.perf_counter()
        self.batches.set_epoch(epoch)
        self.crops.set_epoch(epoch)
        self.student.train()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for step, batch in enumerate(DataLoader(self.crops, batch_sampler=self.batches)):
            done = epoch + step / len(self.batches)
            rise = min(1.0, (done * len(self.batches) + 1) / settings.warm_up)
            fall = (1 + math.cos(math.pi * (done / settings.epochs))) / 2
            for group in self.optimizer.param_groups:
                group["lr"] = rise * fall * settings.learning_rate
            targets = self.targets(batch["image"])
            loss = distance(self.student(batch["image"]), targets)
            if not loss.isfinite():
                raise UserError(f"the loss is {loss.item()}; lower --learning-rate")
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.mean.update_parameters(self.student)
            total += loss.item() * len(targets)
        seconds, views = time.perf_counter() - started, (epoch + 1) * len(self.crops)
        rate = self.optimizer.param_groups[0]["lr"]
        return Pass(epoch + 1, views, total / len(self.crops), self.score(), rate, seconds)

    @torch.no_grad()
    def score(self) -> float:
        """Cosine similarity on the held-out photographs, of the mean of the weights."""
        self.mean.eval()
        images = [self.photographs[i]["image"] for i in range(len(self.photographs))]
        total = 0.0
        for part in torch.stack(images).split(self.settings.batch_size):
            total += len(part) * float(similarity(self.mean(part), self.teacher(part)))
        return total / len(images)

    # ---- Files -----------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the weights if they are the best, and what ``resume`` needs."""
        similarities = [one.similarity for one in self.history]
        write_rows(self.output / HISTORY, self.history)
        if similarities[-1] == max(similarities):
            self._write_weights()
        state = {name: one.state_dict() for name, one in self._kept().items()}
        write_torch(self.output / LAST, {"history": to_json(self.history), **state})

    def _kept(self) -> dict[str, Any]:
        return {"student": self.student, "mean": self.mean, "optimizer": self.optimizer}

    def _write_weights(self) -> None:
        """Writes a SAM in 16 bits: the mean of the student's weights, the teacher's decoder."""
        given, student = read_checkpoint(self.settings.checkpoint), self.mean.module
        parts = {"image_encoder.": student.encoder, "mask_decoder.neck.": student.neck}
        tensors = {n: value for n, value in given.items() if not n.startswith(tuple(parts))}
        for start, part in parts.items():
            tensors |= {f"{start}{name}": value for name, value in part.state_dict().items()}
        about = {"model": self.settings.student, "image_size": str(self.settings.image_size)}
        best = self.history[-1]
        about |= {"views": str(best.views), "similarity": f"{best.similarity:.4f}"}
        path = self.output / f"{self.settings.student}.safetensors"
        write_tensors(path, {name: value.half() for name, value in tensors.items()}, about)

    def resume(self) -> None:
        """Continues from the file of the last pass.

        Raises:
            UserError: the file is damaged.
        """
        state = read_torch(self.output / LAST)
        self.history = from_json(list[Pass], state["history"], self.output / LAST)
        for name, one in self._kept().items():
            one.load_state_dict(state[name])


def distill(
    settings: tyro.conf.OmitArgPrefixes[Settings], output: Path, resume: bool = False
) -> None:
    """Distils a SAM's image encoder into a plain ViT, and prints the passes as Markdown.

    Args:
        settings: the distillation.
        output: folder for the results; new or empty.
        resume: continue the interrupted distillation in the output, with the same arguments.

    Raises:
        UserError: as ``Distillation``; the output is not empty, or was started with other settings.
    """
    given = json.loads(
        json.dumps(dataclasses.asdict(settings), default=lambda path: str(path.resolve()))
    )
    if resume and (output / CONFIG).is_file():
        names = differing(read_json(output / CONFIG), given)
        if names:
            raise UserError(
                f"{output} was started with other settings (it has {', '.join(names)}); resume "
                "with the same ones"
            )
    elif output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; choose another --output, or add --resume")
    distillation = Distillation(settings, output)
    write_json(output / CONFIG, given)
    if (output / LAST).is_file():
        distillation.resume()
    history = distillation.history
    while len(history) < settings.epochs:
        history.append(distillation.run_pass())
        distillation.save()
        print(history[-1], file=sys.stderr)
    rows = [[str(p.views), f"{p.loss:.3f}", f"{p.similarity:.3f}"] for p in history]
    print(markdown_table(Table(["views", "loss", "similarity"], rows)))


if __name__ == "__main__":
    try:
        tyro.cli(distill)
    except UserError as error:
        sys.exit(f"error: {error}")
