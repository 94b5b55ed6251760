"""The two-stage search (paper, Algorithm 1): weights first, then weights and alpha in turn.

Two optimizers share one model. Stage 1 trains the weights (mask decoder, lora_A, lora_B, the
operations' weights) with alpha frozen. In stage 2 every epoch takes weight steps over the training
images, then alpha steps over the images that ``EpochImages`` gives alpha. The search is first
order; nothing is decoded or re-trained afterwards.

Every random choice is a function of (seed, epoch, sample), and gradients are sums over the batch
divided by its size. So the result does not depend on how many processes or forward passes share a
batch, and a resumed run repeats the unbroken one. Three cases are exceptions. The batch norms of
the preset `paper` see one forward pass, and so do the noise and the auxiliary loss of Conv-LoRA.
The prompts of a promptable run are drawn for each forward pass.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor

from naslora import results
from naslora.adapter.io.storage import base_checksum, trained_state, unshared, write_adapter
from naslora.adapter.layer.alpha_search import param_groups
from naslora.adapter.layer.cell import mixture_entropy
from naslora.adapter.layer.modules import adapter_layers, arch_parameters, draw_channels
from naslora.adapter.merging.annealing import annealed, set_spatial, spatial_share
from naslora.data.cache import Cache
from naslora.data.dataset import SegmentationDataset
from naslora.data.sampling import GlobalBatches
from naslora.errors import UserError
from naslora.files import FORMAT, write_torch
from naslora.methods import auxiliary_loss
from naslora.records import to_json
from naslora.results import Epoch, Mixture, OperationHistory, SplitScores
from naslora.sam.losses import WEIGHED, parse_terms
from naslora.sam.precision import cast_frozen
from naslora.sam.prompts import AnySam, PromptableSam
from naslora.training.clicks import score_run
from naslora.training.evaluation import loss_of, make_loader
from naslora.training.interactive import InteractiveLoss
from naslora.training.progress import WORDS, TrainProgress, epoch_line, epoch_numbers
from naslora.training.resuming import LastState, check_last, read_last
from naslora.training.run_config import RunConfig
from naslora.training.run_data import EpochImages
from naslora.training.run_model import frozen_dtype, keep_embeddings
from naslora.training.step import (
    Compiled,
    Group,
    WeightAverage,
    apply_gradients,
    average_batch_norms,
    factor,
    fitted_rate,
    sum_over_processes,
    without_gradients,
)
from naslora.training.trackers import log
from naslora_kernels import OPERATIONS

# Bounds of the automatic rate of alpha, and how far it lets Adam move a logit over all its steps.
PAPER_ALPHA_RATE, MAX_ALPHA_RATE = 3e-4, 0.3
ALPHA_TRAVEL = 12.0
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Trainer:
    """Trains one model; ``run`` does it all.

    The model's parameters that require gradients are trained. The frozen ones of its encoder are
    cast to ``frozen_dtype(config.training)``. ``data`` has the splits ``train`` and ``val``, and
    ``arch`` where alpha has images of its own. Checkpoints go to ``directory``.

    Attributes:
        epoch, history: the number of finished epochs, and their records.
        operations: the mixtures before training and after every epoch.
        images: which images an epoch's steps take.
        weight_steps: number of weight steps of an epoch.
        alpha_steps: number of an epoch's steps for alpha alone, once they start.
        layers: names of the adapted layers with a cell.
        alphas: the architecture parameters; empty for a method without them.
        weights: the weights and their optimizer.
        architecture: alpha and its optimizer; None for a method without alpha.
        average: the averaged weights; None without ``ema``.

    Raises:
        UserError: annealing is asked for, but no cell can be annealed; no image can be held out
            for alpha.
    """

    def __init__(
        self,
        model: AnySam,
        data: dict[str, SegmentationDataset],
        config: RunConfig,
        directory: Path,
        accelerator: Accelerator,
    ) -> None:
        training = config.training
        self.base_checksum = base_checksum(model, trained_state(model))
        encoder, dtype, cache = model.image_encoder, frozen_dtype(training), config.data.cache
        cast_frozen(encoder, dtype)
        self.model = model.to(accelerator.device)
        if config.data.cache_embeddings and cache is not None:
            how = self.base_checksum, dtype, config.model.attention, training.mixed_precision
            keep_embeddings(encoder, Cache(cache), " ".join(map(str, how)))
        self.data, self.directory, self.accelerator = data, directory, accelerator
        self.run_config, self.config = config, training
        self.forward, self.loss = self._compute()
        self.epoch = 0
        self.history: list[Epoch] = []
        self.layers = [name for name, layer in adapter_layers(model) if layer.alpha is not None]
        self.alphas = arch_parameters(model)
        self.operations = [self._mixture(epoch=0)]
        own_steps = bool(self.alphas) and not training.simultaneous
        counts = len(data["train"]), len(data.get("arch", ()))
        self.images = EpochImages(training, *counts, own_steps, config.seed)
        self.weight_steps = -(-sum(counts) // training.batch_size)
        self.alpha_steps = -(-len(self.images.of(0)[1]) // training.batch_size)
        self.weights = self._weight_group()
        self.architecture = self._architecture_group() if self.alphas else None
        self.groups = [group for group in (self.weights, self.architecture) if group]
        window = training.ema * training.epochs * self.weight_steps
        self.average = WeightAverage(self.weights.parameters, window) if window else None
        if training.anneal_epochs and not set_spatial(model, 1.0):
            raise UserError("anneal_epochs anneals the cells of preset 'linear'; there are none")

    def _compute(self) -> tuple[Any, Any]:
        """The model and the loss, which a forward pass calls; compiled if that is asked for."""
        loss: Any = loss_of(self.config)
        # The loss by matching assigns classes on the CPU. Terms of the library choose pixels.
        whole = self.model.num_classes == 1 or self.config.class_loss == "pixel"
        whole = whole and {*parse_terms(self.config.loss)} <= {*WEIGHED}
        if isinstance(self.model, PromptableSam):
            clicks, whole = self.run_config.prompts.clicks, False
            loss = InteractiveLoss(self.model, clicks, self.accelerator.autocast)
        if not self.config.compile:
            return self.model, loss
        captured = self.accelerator.device.type == "cuda" and self.config.accumulation == 1
        return Compiled(self.model, captured), Compiled(loss, captured) if whole else loss

    # ---- Optimizers ------------------------------------------------------------------------------

    def _optimizer(self, parameters: Any, **options: Any) -> torch.optim.Optimizer:
        fused = self.accelerator.device.type == "cuda"  # one launch for all parameters
        return OPTIMIZERS[self.config.optimizer](parameters, fused=fused, **options)

    def _weight_group(self) -> Group:
        config = self.config
        rate, decay = config.learning_rate, config.weight_decay
        parameters = param_groups(self.model, rate, None, decay, config.cell_rate)
        for cells in parameters[1:]:
            cells["weight_decay"] = config.cell_weight_decay
        optimizer = self._optimizer(parameters)
        return Group(optimizer, config.clip_norm, config.schedule, config.warmup)

    def _architecture_group(self) -> Group:
        config = self.config
        schedule, rate = config.alpha_schedule or config.schedule, config.alpha_learning_rate
        if rate is None:  # fits the number of alpha's steps
            steps = self.weight_steps if config.simultaneous else self.alpha_steps
            factors = (
                factor(schedule, (epoch + step / steps) / config.epochs)
                for epoch in range(config.epochs)
                if self._searches(epoch)
                for step in range(steps)
            )
            rate = fitted_rate(ALPHA_TRAVEL, factors, PAPER_ALPHA_RATE, MAX_ALPHA_RATE)
        decay = config.alpha_weight_decay
        optimizer = self._optimizer(self.alphas, lr=rate, weight_decay=decay, betas=(0.5, 0.999))
        return Group(optimizer, 0.0, schedule)

    # ---- Epochs ----------------------------------------------------------------------------------

    def _searches(self, epoch: int) -> bool:
        """Whether an epoch updates alpha."""
        started = self.config.simultaneous or epoch >= self.config.search_start
        return bool(self.alphas) and started

    def _out_of_patience(self) -> bool:
        """Whether ``patience`` epochs did not better the best one, nor came before the search."""
        if not self.config.patience or not self.history:
            return False
        best = results.kept_epoch(self.history, "best").epoch
        start = self.config.search_start if self.alphas else 0
        return self.epoch - max(best, start) >= self.config.patience

    def run(self) -> None:
        """Trains from the current epoch to the last; writes checkpoints after every epoch.

        The accelerator's trackers, if it has any, get every epoch's numbers.

        Raises:
            UserError: the loss is not finite; the message names the batch's files. A tracker fails.
        """
        quiet = not self.accelerator.is_main_process
        console = Console(stderr=True, quiet=quiet, highlight=False)
        epochs = range(self.epoch, self.config.epochs)
        steps = sum(self.weight_steps + self._searches(e) * self.alpha_steps for e in epochs)
        if self.alphas:
            second = next((f", from epoch {e + 1}," for e in epochs if self._searches(e)), "")
            console.print(WORDS.format(second), soft_wrap=True)
        with TrainProgress(console, steps) as progress:
            for _ in epochs:
                if self._out_of_patience():
                    break
                record = self._run_epoch(progress)
                self.history.append(record)
                self.epoch += 1
                self._save(record)
                console.print(epoch_line(record, self.config.epochs), soft_wrap=True)
                mixture = self.operations[-1] if self.alphas else None
                log(self.accelerator, epoch_numbers(record, mixture), record.epoch)
        set_spatial(self.model, 1.0)  # the saved adapters are annealed already

    def _run_epoch(self, progress: TrainProgress) -> Epoch:
        config, epoch = self.config, self.epoch
        draw_channels(self.model, self.run_config.seed, epoch)
        spatial = spatial_share(epoch, config.epochs, config.anneal_epochs)
        set_spatial(self.model, spatial)
        started = time.perf_counter()
        groups = self.groups if config.simultaneous else [self.weights]
        train_images, alpha_images = self.images.of(epoch)
        train_loss = self._optimise(groups, "train", train_images, progress)
        weights_done = time.perf_counter()
        arch_loss = None
        if self.architecture is not None and self._searches(epoch) and not config.simultaneous:
            split = "arch" if "arch" in self.data else "train"
            arch_loss = self._optimise([self.architecture], split, alpha_images, progress)
        arch_done = time.perf_counter()
        with self.average.in_use() if self.average else nullcontext():
            scores = self.evaluate("val")
        if scores.loss is None or not math.isfinite(scores.loss):
            self._stop(scores.loss, "the validation images")  # the last step spoilt the weights
        self.operations.append(self._mixture(epoch + 1))
        entropies = [mixture_entropy(alpha) for alpha in self.alphas]
        return Epoch(
            epoch=epoch + 1,
            stage=2 if self._searches(epoch) else 1,
            spatial=spatial,
            train_loss=train_loss,
            arch_loss=arch_loss,
            val_loss=scores.loss,
            val_dice=scores.dice,
            val_iou=scores.iou,
            val_accuracy=scores.accuracy,
            learning_rate=config.learning_rate
            * factor(config.schedule, epoch / config.epochs, config.warmup),
            entropy=sum(entropies) / len(entropies) if entropies else None,
            seconds_weights=weights_done - started,
            seconds_architecture=arch_done - weights_done,
            seconds_evaluation=time.perf_counter() - arch_done,
        )

    def _optimise(
        self, groups: list[Group], split: str, images: Sequence[int], progress: TrainProgress
    ) -> float:
        """Takes one epoch of steps over images of a split; returns their mean loss.

        Other groups require no gradients meanwhile, so that none are computed: an architecture step
        freezes the weights, and a weight step alpha.
        """
        config, epoch, accelerator = self.config, self.epoch, self.accelerator
        # What the model draws in training depends on seed, epoch and process.
        seed = (self.run_config.seed * 10_007 + epoch) * 10_007 + accelerator.process_index
        torch.manual_seed(seed)
        processes = accelerator.process_index, accelerator.num_processes
        batches = GlobalBatches(images, config.batch_size, *processes, seed=self.run_config.seed)
        batches.set_epoch(epoch)
        self.data[split].set_epoch(epoch)
        loader = make_loader(self.data[split], batches, config.workers, accelerator)
        progress.start_pass(f"epoch {epoch + 1}/{config.epochs}")
        total = 0.0
        with without_gradients([group for group in self.groups if group not in groups]):
            self.model.train()  # after the freeze, by which batch norms decide whether they train
            for step, batch in enumerate(loader):
                for group in groups:
                    group.set_rates((epoch + step / len(batches)) / config.epochs)
                size = batches.global_size(step)
                mean = sum_over_processes(groups, self._backward(batch, size), accelerator)
                if not math.isfinite(mean):  # no step is taken on this batch
                    names = gather_object(list(batch["name"]) if batch else [])
                    self._stop(mean, ", ".join(names))
                apply_gradients(groups, accelerator.scaler)
                if self.average and self.weights in groups:
                    self.average.add_step()
                total += mean * size
                progress.finish_step(mean, size)
        average_batch_norms(self.model, accelerator)
        return total / len(batches.indices)

    def _backward(self, batch: dict[str, Any] | None, size: int) -> Tensor:
        """Adds up the gradients of this process's share of a batch of ``size`` images.

        Returns the share's part of the mean loss. The method's auxiliary loss is not in it, so that
        the losses of methods compare.
        """
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        if batch is None:
            return total
        parts = min(self.config.accumulation, len(batch["image"]))
        pairs = zip(batch["image"].chunk(parts), batch["mask"].chunk(parts), strict=True)
        for images, masks in pairs:
            with self.accelerator.autocast():
                output = self.forward(images.to(device, non_blocking=True))
            value = self.loss(output, masks.to(device, non_blocking=True))
            extra = auxiliary_loss(self.model)
            share = len(images) / size
            self.accelerator.backward((value if extra is None else value + extra) * share)
            total += value.detach() * share
        return total

    def _stop(self, loss: float | None, images: str) -> NoReturn:
        raise UserError(
            f"the loss is {loss} in epoch {self.epoch + 1}/{self.config.epochs} on {images}; the "
            "last good checkpoint is kept; lower --learning-rate, or use --mixed-precision no"
        )

    def evaluate(self, split: str, metrics: Sequence[str] = ()) -> SplitScores:
        """Loss and metrics of a split, as ``naslora.training.clicks.score_run``."""
        data = self.data[split]
        return score_run(self.model, data, self.accelerator, self.run_config, metrics)

    # ---- The state of the search -----------------------------------------------------------------

    def _mixture(self, epoch: int) -> Mixture:
        return Mixture(epoch, [alpha.detach().softmax(0).tolist() for alpha in self.alphas])

    def operation_history(self) -> OperationHistory | None:
        """softmax(alpha) of every layer after every epoch; None for a method without alpha."""
        if not self.alphas:
            return None
        return OperationHistory(list(OPERATIONS), self.layers, self.operations)

    # ---- Checkpoints -----------------------------------------------------------------------------

    def _save(self, record: Epoch) -> None:
        """Writes the checkpoints; a kill at any moment leaves the previous ones whole."""
        if self.accelerator.is_main_process:
            if results.kept_epoch(self.history, self.config.keep) is record:
                with self.average.in_use() if self.average else nullcontext():
                    state = {**unshared(trained_state(self.model)), **annealed(self.model)}
                    write_adapter(
                        self.model, self.directory / results.ADAPTER, state, self.base_checksum
                    )
            write_torch(
                self.directory / results.LAST, {"version": FORMAT, **to_json(self._state())}
            )
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
            self.average.means.state_dict() if self.average else None,
        )

    def resume(self) -> None:
        """Continues from the last checkpoint, if there is one.

        Raises:
            UserError: the checkpoint is damaged or belongs to another run. Nothing is changed.
        """
        path = self.directory / results.LAST
        if not path.exists():
            return
        try:
            last = read_last(path)
            check_last(last, self._state(), self.groups, self.config.epochs)
        except UserError as error:
            raise UserError(
                f"cannot resume from {path}: {error}; start a new run with another --output"
            ) from error
        for group, moments in zip(self.groups, last.moments, strict=True):
            group.optimizer.load_state_dict({**group.optimizer.state_dict(), "state": moments})
        self.model.load_state_dict(last.model, strict=False)
        if self.average and last.average:
            self.average.means.load_state_dict(last.average)
        if self.accelerator.scaler and last.scaler:
            self.accelerator.scaler.load_state_dict(last.scaler)
        self.epoch, self.history, self.operations = last.epoch, last.history, last.operations
