"""The two-stage search (paper, Algorithm 1): weights first, then weights and alpha in turn.

Two optimizers share one model. Stage 1 trains the weights (mask decoder, lora_A, lora_B, the
operations' weights) with alpha frozen. In stage 2 every epoch takes weight steps over the training
images, then alpha steps over the images that ``EpochImages`` gives alpha. The search is first
order; nothing is decoded or re-trained afterwards.

Every random choice is a function of (seed, epoch, sample), and gradients are sums over the batch
divided by its size. So the result does not depend on how many processes or forward passes share a
batch, and a resumed run repeats the unbroken one. Two cases are exceptions: the batch norms of the
preset `paper` see one forward pass, and so do the noise and the auxiliary loss of Conv-LoRA.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from rich.console import Console

from naslora.adapter.io.storage import base_checksum, trained_state, unshared, write_adapter
from naslora.adapter.layer.cell import mixture_entropy
from naslora.adapter.layer.injection import arch_parameters, cell_parameters
from naslora.adapter.layer.modules import adapter_layers
from naslora.adapter.merging.annealing import fixed, set_spatial, spatial_share
from naslora.data.dataset import SegmentationDataset
from naslora.data.sampling import GlobalBatches
from naslora.errors import UserError
from naslora.results import (
    ADAPTER,
    LAST,
    Epoch,
    Mixture,
    OperationHistory,
    PhaseSeconds,
    SplitScores,
    kept_epoch,
)
from naslora.sam.precision import cast_frozen
from naslora.sam.segmentation import SamForSegmentation
from naslora.training.epoch_images import EpochImages
from naslora.training.evaluation import evaluate, make_loader
from naslora.training.progress import TrainProgress, epoch_line, epoch_numbers
from naslora.training.resuming import (
    LastState,
    check_last,
    read_last,
    write_last,
)
from naslora.training.step import Group, LossNotFiniteError, train_pass
from naslora.training.trackers import log
from naslora.training.train_config import (
    Schedule,
    TrainConfig,
    factor,
    first_search_epoch,
    frozen_dtype,
    loss_of,
)
from naslora_kernels import OPERATIONS

# Bounds of the automatic rate of alpha, and how far it lets Adam move a logit over all its steps.
PAPER_ALPHA_RATE, MAX_ALPHA_RATE = 3e-4, 0.3
ALPHA_TRAVEL = 12.0
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Trainer:
    """Trains one model; ``run`` does it all.

    Args:
        model: its parameters that require gradients are trained. The frozen ones of its encoder
            are cast to ``frozen_dtype(config)``.
        data: the splits ``train`` and ``val``, and ``arch`` where alpha has images of its own.
        config: how to train.
        seed: seed of the order of the images.
        directory: where checkpoints go.
        class_names: the foreground classes, for the metrics.
        accelerator: made by ``make_accelerator``.

    Attributes:
        epoch: the current epoch, counted from 0.
        history: the finished epochs.
        operations: the mixtures before training and after every epoch.
        images: which images an epoch's steps take.
        layers: the adapted layers with their names.
        alphas: the architecture parameters; empty for a method without them.
        weights: the weights and their optimizer.
        architecture: alpha and its optimizer; None for a method without alpha.

    Raises:
        UserError: annealing is asked for, but no cell can be annealed; no image can be held out
            for alpha.
    """

    def __init__(
        self,
        model: SamForSegmentation,
        data: dict[str, SegmentationDataset],
        config: TrainConfig,
        seed: int,
        directory: Path,
        class_names: list[str],
        accelerator: Accelerator,
    ) -> None:
        self.accelerator = accelerator
        self.base_checksum = base_checksum(model, trained_state(model))
        cast_frozen(model.image_encoder, frozen_dtype(config))
        self.model = model.to(accelerator.device)
        self.data, self.config, self.seed = data, config, seed
        self.loss, self.search_start = loss_of(config), first_search_epoch(config)
        self.directory, self.class_names = directory, class_names
        self.epoch = 0
        self.history: list[Epoch] = []
        self.layers = list(adapter_layers(model))
        self.alphas = arch_parameters(model)
        self.operations = [self._mixture(epoch=-1)]
        arch = len(data["arch"]) if "arch" in data else 0
        own_steps = bool(self.alphas) and not config.simultaneous
        self.images = EpochImages(
            config.arch_data,
            config.arch_fraction,
            self.search_start,
            len(data["train"]),
            arch,
            own_steps,
            seed,
        )
        self.weights = self._weight_group()
        self.architecture = self._architecture_group() if self.alphas else None
        self.progress = TrainProgress()
        if config.anneal_epochs and not set_spatial(model, 1.0):
            raise UserError("anneal_epochs anneals the cells of preset 'linear'; there are none")

    # ---- Optimizers ------------------------------------------------------------------------------

    def _weight_group(self) -> Group:
        """The weights; the cells' are a parameter group of their own if their settings differ."""
        config = self.config
        others = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        cells = {
            "lr": config.cell_rate * config.learning_rate,
            "weight_decay": config.cell_weight_decay,
        }
        own = set() if cells == others else {id(p) for p in cell_parameters(self.model)}
        alphas = {id(alpha) for alpha in self.alphas}
        weights = [p for p in self.model.parameters() if p.requires_grad and id(p) not in alphas]
        parameters = [
            {"params": [p for p in weights if id(p) not in own], **others},
            {"params": [p for p in weights if id(p) in own], **cells},
        ]
        optimizer = OPTIMIZERS[config.optimizer]([g for g in parameters if g["params"]])
        return Group(optimizer, config.clip_norm, config.schedule)

    def _architecture_group(self) -> Group:
        config = self.config
        optimizer = OPTIMIZERS[config.optimizer](
            self.alphas,
            lr=self._alpha_learning_rate(),
            weight_decay=config.alpha_weight_decay,
            betas=(0.5, 0.999),
        )
        return Group(optimizer, 0.0, config.alpha_schedule or config.schedule)

    @property
    def groups(self) -> list[Group]:
        """All groups that train."""
        return [self.weights] if self.architecture is None else [self.weights, self.architecture]

    def _set_learning_rates(self, groups: list[Group], part: float) -> None:
        """Sets the rates of the groups after ``part`` of the current epoch."""
        for group in groups:
            group.set_rates(self._factor(group.schedule, self.epoch, part))

    def _factor(self, schedule: Schedule, epoch: int, part: float) -> float:
        """What a rate is multiplied by after ``part`` of an epoch."""
        return factor(schedule, (epoch + part) / self.config.epochs)

    def _alpha_learning_rate(self) -> float:
        """The rate of alpha at the start: the configured one, or one that fits the steps."""
        config = self.config
        if config.alpha_learning_rate is not None:
            return config.alpha_learning_rate
        schedule = config.alpha_schedule or config.schedule
        steps = {epoch: self._alpha_steps(epoch) for epoch in range(config.epochs)}
        factors = sum(
            self._factor(schedule, epoch, step / count)
            for epoch, count in steps.items()
            for step in range(count)
        )
        rate = ALPHA_TRAVEL / factors if factors else MAX_ALPHA_RATE
        return min(max(PAPER_ALPHA_RATE, rate), MAX_ALPHA_RATE)

    # ---- Stages and steps ------------------------------------------------------------------------

    def _searches(self, epoch: int) -> bool:
        """Whether an epoch updates alpha."""
        started = self.config.simultaneous or epoch >= self.search_start
        return bool(self.alphas) and started

    def _alpha_steps(self, epoch: int) -> int:
        """How many steps of an epoch update alpha."""
        if not self._searches(epoch):
            return 0
        return self._weight_steps() if self.config.simultaneous else self._own_alpha_steps()

    def _weight_steps(self) -> int:
        return -(-self.images.per_epoch // self.config.batch_size)

    def _own_alpha_steps(self) -> int:
        """How many steps an epoch of the search takes for alpha alone."""
        return -(-self.images.alpha_count() // self.config.batch_size)

    def _steps_left(self) -> int:
        """Batches with a backward, from the current epoch to the last."""
        return sum(
            self._weight_steps() + (self._own_alpha_steps() if self._searches(epoch) else 0)
            for epoch in range(self.epoch, self.config.epochs)
        )

    def run(self) -> None:
        """Trains from the current epoch to the last; writes checkpoints after every epoch.

        The accelerator's trackers, if it has any, get every epoch's numbers.

        Raises:
            UserError: the loss is not finite; the message names the batch's files. A tracker fails.
        """
        console = Console(stderr=True, quiet=not self.accelerator.is_main_process)
        with self.progress.shown(console, self._steps_left()):
            while self.epoch < self.config.epochs:
                record = self._run_epoch()
                self.history.append(record)
                self.epoch += 1
                self._save(record)
                console.print(
                    epoch_line(record, self.config.epochs), highlight=False, soft_wrap=True
                )
                mixture = self.operations[-1] if self.alphas else None
                log(self.accelerator, epoch_numbers(record, mixture), record.epoch)
        set_spatial(self.model, 1.0)  # the saved adapters are annealed already

    def _run_epoch(self) -> Epoch:
        config, epoch = self.config, self.epoch
        self._draw_channels()
        spatial = spatial_share(epoch, config.epochs, config.anneal_epochs)
        set_spatial(self.model, spatial)
        started = time.perf_counter()
        groups = self.groups if config.simultaneous else [self.weights]
        train_loss = self._optimise(groups, "train", self.images.of_weights(epoch))
        weights_done = time.perf_counter()
        arch_loss = None
        if self.architecture is not None and self._searches(epoch) and not config.simultaneous:
            split = "arch" if "arch" in self.data else "train"
            arch_loss = self._optimise([self.architecture], split, self.images.of_alpha(epoch))
        arch_done = time.perf_counter()
        scores = self.evaluate("val")
        if scores.loss is None or not math.isfinite(
            scores.loss
        ):  # the last step spoilt the weights
            self._stop(scores.loss, "the validation images")
        self.operations.append(self._mixture(epoch))
        return Epoch(
            epoch=epoch,
            stage=2 if self._searches(epoch) else 1,
            spatial=spatial,
            train_loss=train_loss,
            arch_loss=arch_loss,
            val_loss=scores.loss,
            val_dice=scores.dice,
            val_iou=scores.iou,
            val_accuracy=scores.accuracy,
            learning_rate=config.learning_rate * self._factor(config.schedule, epoch, 0),
            entropy=self._entropy(),
            seconds=PhaseSeconds(
                weights=weights_done - started,
                architecture=arch_done - weights_done,
                evaluation=time.perf_counter() - arch_done,
            ),
        )

    def _optimise(self, groups: list[Group], split: str, images: Sequence[int]) -> float:
        """Takes one epoch of steps over images of a split; returns their mean loss."""
        self._seed_noise()
        batches = self._batches(split, images)
        loader = make_loader(self.data[split], batches, self.config.workers, self.accelerator)
        self.progress.start_pass(f"epoch {self.epoch + 1}/{self.config.epochs}")
        try:
            return train_pass(
                self.model,
                groups,
                [g for g in self.groups if all(g is not group for group in groups)],
                batches,
                loader,
                self.loss,
                self.config.accumulation,
                self.accelerator,
                before_step=partial(self._set_learning_rates, groups),
                after_step=self.progress.advance,
            )
        except LossNotFiniteError as error:
            self._stop(error.loss, error.images)

    def _stop(self, loss: float | None, images: str) -> NoReturn:
        raise UserError(
            f"the loss is {loss} in epoch {self.epoch + 1}/{self.config.epochs} on {images}; the "
            "last good checkpoint is kept; lower --learning-rate, or use --mixed-precision no"
        )

    def evaluate(self, split: str, metrics: Sequence[str] = ()) -> SplitScores:
        """Loss and metrics of a split, as ``naslora.training.evaluation.evaluate``."""
        config = self.config
        return evaluate(
            self.model,
            self.data[split],
            self.accelerator,
            self.loss,
            self.class_names,
            config.batch_size,
            config.workers,
            metrics,
        )

    # ---- Random choices --------------------------------------------------------------------------

    def _batches(self, split: str, images: Sequence[int]) -> GlobalBatches:
        """This epoch's batches of images of a split. Sets the epoch on which their flips depend."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = GlobalBatches(images, self.config.batch_size, rank, world, seed=self.seed)
        batches.set_epoch(self.epoch)
        self.data[split].set_epoch(self.epoch)
        return batches

    def _draw_channels(self) -> None:
        for i, (_, layer) in enumerate(self.layers):
            if layer.config.channel_selection == "resample":
                seed = (self.seed * 10_007 + self.epoch) * 10_007 + i
                layer.draw_channels(torch.Generator().manual_seed(seed))

    def _seed_noise(self) -> None:
        """Makes what the model draws in training a function of seed, epoch and process."""
        process = self.accelerator.process_index
        torch.manual_seed((self.seed * 10_007 + self.epoch) * 10_007 + process)

    # ---- The state of the search -----------------------------------------------------------------

    def _mixture(self, epoch: int) -> Mixture:
        softmax = [alpha.detach().softmax(0).tolist() for alpha in self.alphas]
        return Mixture(epoch, softmax)

    def _entropy(self) -> float | None:
        entropies = [mixture_entropy(alpha) for alpha in self.alphas]
        return sum(entropies) / len(entropies) if entropies else None

    def operation_history(self) -> OperationHistory | None:
        """softmax(alpha) of every layer after every epoch; None for a method without alpha."""
        if not self.alphas:
            return None
        layers = [name for name, layer in self.layers if layer.alpha is not None]
        return OperationHistory(list(OPERATIONS), layers, self.operations)

    # ---- Checkpoints -----------------------------------------------------------------------------

    def _save(self, record: Epoch) -> None:
        """Writes the checkpoints; a kill at any moment leaves the previous ones whole."""
        if self.accelerator.is_main_process:
            if kept_epoch(self.history, self.config.keep) is record:
                with fixed(self.model):
                    state = unshared(trained_state(self.model))
                    write_adapter(self.model, self.directory / ADAPTER, state, self.base_checksum)
            write_last(self.directory / LAST, self._state())
        self.accelerator.wait_for_everyone()

    def _state(self) -> LastState:
        scaler = self.accelerator.scaler
        return LastState(
            self.epoch,
            self.history,
            self.operations,
            trained_state(self.model),
            [group.optimizer.state_dict()["state"] for group in self.groups],
            scaler.state_dict() if scaler else None,
            self.base_checksum,
        )

    def resume(self) -> None:
        """Continues from the last checkpoint, if there is one.

        Raises:
            UserError: the checkpoint is damaged or belongs to another run. Nothing is changed.
        """
        path = self.directory / LAST
        if not path.exists():
            return
        try:
            last = read_last(path)
            check_last(last, self._state(), self.config.epochs)
            for group, moments in zip(self.groups, last.moments, strict=True):
                group.check_moments(moments)
        except UserError as error:
            raise UserError(
                f"cannot resume from {path}: {error}; start a new run with another --output"
            ) from error
        for group, moments in zip(self.groups, last.moments, strict=True):
            group.load_moments(moments)
        self.model.load_state_dict(last.model, strict=False)
        if self.accelerator.scaler and last.scaler:
            self.accelerator.scaler.load_state_dict(last.scaler)
        self.epoch, self.history, self.operations = last.epoch, last.history, last.operations
