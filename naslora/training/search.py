"""The two-stage search (paper, Algorithm 1): weights first, then weights and alpha in turn.

Two Adam optimizers share one model. Stage 1 trains the weights - mask decoder, lora_A, lora_B, the
operations - with alpha frozen. In stage 2 every epoch takes weight steps over the training split,
then alpha steps over a split held out for the architecture. First order, no decoding, no
re-training.

Every random choice is a function of (seed, epoch, sample), and gradients are sums over the batch
divided by its size. So a run does not depend on how many processes or forward passes share a batch
(but for the preset `paper`, whose batch norms see one forward pass, and Conv-LoRA, whose noise and
auxiliary loss are of one), and a resumed run repeats the unbroken one.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from naslora.adapter.annealing import fixed, set_spatial, spatial_share
from naslora.adapter.cell import mixture_entropy
from naslora.adapter.injection import adapter_layers, arch_parameters
from naslora.adapter.storage import save_adapter, trained_state
from naslora.data.dataset import SegmentationDataset
from naslora.data.sampling import GlobalBatches
from naslora.errors import UserError
from naslora.files import replaced_file
from naslora.methods import auxiliary_loss
from naslora.results import BEST, LAST
from naslora.training.evaluation import evaluate, make_loader
from naslora.training.search_config import SearchConfig
from naslora_kernels import OPERATIONS

# The automatic rate of alpha: the paper's at least, and such that over all its steps Adam can move
# a logit by about ALPHA_TRAVEL; see docs/experiments.md.
PAPER_ALPHA_RATE, MAX_ALPHA_RATE = 3e-4, 0.1
ALPHA_TRAVEL = 2.0


class Group(NamedTuple):
    """The parameters that one kind of step trains, and their optimizer."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip_norm: float


class Search:
    """Trains one model; ``run`` does it all.

    Args:
        model: a ``SamForSegmentation`` whose trainable parameters are what is trained.
        data: the splits ``train`` and ``val``, and ``arch`` where alpha is searched on its own.
        config: how to train.
        seed: of the order of the images.
        directory: where checkpoints and TensorBoard files go.
        class_names: the foreground classes, for the metrics.
        accelerator: of ``make_accelerator``.
    """

    def __init__(
        self,
        model: nn.Module,
        data: dict[str, SegmentationDataset],
        config: SearchConfig,
        seed: int,
        directory: Path,
        class_names: list[str],
        accelerator: Accelerator,
    ) -> None:
        self.accelerator = accelerator
        self.model = model.to(self.accelerator.device)
        self.data, self.config, self.seed = data, config, seed
        self.directory, self.class_names = directory, class_names
        self.epoch, self.history, self.best_quality = 0, [], (-math.inf,)
        architecture = arch_parameters(model)
        ours = {id(parameter) for parameter in architecture}
        weights = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
        optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        self.weights = self._group(
            weights,
            optimizers[config.optimizer],
            clip_norm=config.clip_norm,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.architecture = self._group(
            architecture,
            torch.optim.Adam,
            clip_norm=0.0,
            lr=config.alpha_learning_rate or PAPER_ALPHA_RATE,
            weight_decay=config.alpha_weight_decay,
            betas=(0.5, 0.999),
        )
        self.operations = [self._mixtures(epoch=-1)]
        if config.anneal_epochs and not set_spatial(model, 1.0):
            raise UserError("anneal_epochs anneals the cells of preset 'linear'; there are none")

    def _group(
        self,
        parameters: list[nn.Parameter],
        optimizer: type[torch.optim.Optimizer],
        clip_norm: float,
        **settings: Any,
    ) -> Group | None:
        if not parameters:
            return None
        return Group(parameters, optimizer(parameters, **settings), clip_norm)

    def run(self) -> None:
        """Trains from the current epoch to the last; writes checkpoints after every epoch.

        Raises:
            UserError: the loss is not finite; the message names the batch's files.
        """
        main = self.accelerator.is_main_process
        console = Console(stderr=True, quiet=not main)
        writer = self._tensorboard() if main else None
        if self.architecture is not None:
            self.architecture.optimizer.param_groups[0]["lr"] = self._alpha_learning_rate()
        with _progress(console) as self.progress:
            self.task = self.progress.add_task(
                "", total=self._steps_left(), loss=math.nan, rate=math.nan
            )
            while self.epoch < self.config.epochs:
                record = self._run_epoch()
                self.history.append(record)
                self.epoch += 1
                self._save(is_best=quality(record) > self.best_quality)
                line = _line(record, self.config.epochs)
                console.print(line, highlight=False, soft_wrap=True)
                if writer is not None:
                    _log(writer, record, self.operations[-1], self.architecture is not None)
        set_spatial(self.model, 1.0)  # what was saved is annealed already
        if writer is not None:
            writer.close()

    def _tensorboard(self) -> SummaryWriter:
        return SummaryWriter(str(self.directory / "tensorboard"), purge_step=self.epoch)

    def _run_epoch(self) -> dict[str, Any]:
        config, epoch = self.config, self.epoch
        self._draw_channels()
        spatial = spatial_share(epoch, config.epochs, config.anneal_epochs)
        set_spatial(self.model, spatial)
        started = time.perf_counter()
        groups = [self.weights]
        if config.simultaneous and self.architecture:
            groups.append(self.architecture)
        train_loss = self._optimise(groups, "train")
        weights_done = time.perf_counter()
        arch_loss = None
        if self._searches(epoch) and not config.simultaneous:
            arch_loss = self._optimise([self.architecture], "arch")
        arch_done = time.perf_counter()
        scores = self.evaluate("val")
        if not math.isfinite(scores["loss"]):  # the epoch's last step spoilt the weights
            self._stop(scores["loss"], "the validation images")
        self.operations.append(self._mixtures(epoch))
        return {
            "epoch": epoch,
            "stage": 2 if self._searches(epoch) else 1,
            "spatial": spatial,
            "train_loss": train_loss,
            "arch_loss": arch_loss,
            "val_loss": scores["loss"],
            "val_dice": scores["dice"],
            "val_iou": scores["iou"],
            "val_accuracy": scores["accuracy"],
            "learning_rate": self._learning_rate(0),
            "entropy": self._entropy(),
            "seconds": {
                "weights": weights_done - started,
                "architecture": arch_done - weights_done,
                "evaluation": time.perf_counter() - arch_done,
            },
        }

    def _searches(self, epoch: int) -> bool:
        """Whether alpha is updated in this epoch."""
        started = self.config.simultaneous or epoch >= self.config.search_start
        return self.architecture is not None and started

    def _optimise(self, groups: list[Group], split: str) -> float:
        """One epoch of optimizer steps over a split; returns the mean loss of its images.

        Only the groups' parameters require gradients meanwhile: an architecture step computes none
        for the weights, and a weight step none for alpha.
        """
        self._require_gradients(groups)
        self.model.train()
        self._seed_noise()
        batches = self._batches(split)
        loader = make_loader(self.data[split], batches, self.config.workers, self.accelerator)
        total, self.step_started = 0.0, time.perf_counter()
        for step, batch in enumerate(loader):
            if self.weights in groups:
                rate = self._learning_rate(step / len(batches))
                self.weights.optimizer.param_groups[0]["lr"] = rate
            size = batches.global_size(step)
            loss = self._backward(batch, size)
            loss = self._sum_over_processes(groups, loss)
            if not math.isfinite(loss):
                names = gather_object(list(batch["name"]) if batch else [])
                self._stop(loss, ", ".join(names))
            self._step(groups)
            total += loss * size
            self._advance(loss, size)
        self._average_statistics()
        self._require_gradients([g for g in (self.weights, self.architecture) if g])
        return total / len(self.data[split])

    def _backward(self, batch: dict[str, Any] | None, size: int) -> Tensor:
        """Adds up gradients and loss of this process's share of a batch of ``size`` images."""
        total = torch.zeros((), device=self.accelerator.device)
        if batch is None:
            return total
        parts = min(self.config.accumulation, len(batch["image"]))
        images, masks = batch["image"].chunk(parts), batch["mask"].chunk(parts)
        for image, mask in zip(images, masks, strict=True):
            loss = self._loss(image, mask) * (len(image) / size)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _loss(self, image: Tensor, mask: Tensor) -> Tensor:
        device = self.accelerator.device
        with self.accelerator.autocast():
            output = self.model(image.to(device, non_blocking=True))
        loss = self.config.loss(output, mask.to(device, non_blocking=True))
        extra = auxiliary_loss(self.model)
        return loss if extra is None else loss + extra

    def _sum_over_processes(self, groups: list[Group], loss: Tensor) -> float:
        """Sums gradients and loss over the processes, in one message."""
        if self.accelerator.num_processes > 1:
            parameters = [p for group in groups for p in group.parameters]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = torch.cat([*(grad.flatten().float() for grad in grads), loss.reshape(1)])
            sizes = [*(parameter.numel() for parameter in parameters), 1]
            *summed, loss = self.accelerator.reduce(flat, "sum").split(sizes)
            for parameter, grad in zip(parameters, summed, strict=True):
                parameter.grad = grad.view_as(parameter).to(parameter.dtype)
        return float(loss)

    def _step(self, groups: list[Group]) -> None:
        # Accelerate's optimizers would end fp16's scaling at the first of two groups.
        scaler = self.accelerator.scaler
        for group in groups:
            if scaler:
                scaler.unscale_(group.optimizer)
            if group.clip_norm:
                nn.utils.clip_grad_norm_(group.parameters, group.clip_norm)
            if scaler:
                scaler.step(group.optimizer)
            else:
                group.optimizer.step()
            group.optimizer.zero_grad()
        if scaler:
            scaler.update()

    def _average_statistics(self) -> None:
        """Gives every process the same batch norms; each has counted its own images so far."""
        if self.accelerator.num_processes > 1:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d) and module.training:
                    for statistic in (module.running_mean, module.running_var):
                        statistic.copy_(self.accelerator.reduce(statistic, "mean"))

    def _stop(self, loss: float, images: str) -> NoReturn:
        raise UserError(
            f"the loss is {loss} in epoch {self.epoch + 1}/{self.config.epochs} on {images}; the "
            "last good checkpoint is kept; lower --learning-rate, or use --mixed-precision no"
        )

    def _require_gradients(self, groups: list[Group]) -> None:
        for group in (self.weights, self.architecture):
            for parameter in group.parameters if group else ():
                parameter.requires_grad_(group in groups)

    def _learning_rate(self, part: float) -> float:
        """The weights' rate after ``part`` of the current epoch."""
        done = (self.epoch + part) / self.config.epochs
        factor = {
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "constant": 1.0,
        }
        return self.config.learning_rate * factor[self.config.schedule]

    def evaluate(self, split: str, metrics: Sequence[str] = ()) -> dict[str, Any]:
        """Loss and metrics of a split, as ``naslora.training.evaluation.evaluate``."""
        config = self.config
        return evaluate(
            self.model,
            self.data[split],
            self.accelerator,
            config.loss,
            self.class_names,
            config.batch_size,
            config.workers,
            metrics,
        )

    def _batches(self, split: str) -> GlobalBatches:
        """This epoch's batches; also tells the data set the epoch, on which its flips depend."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        count = len(self.data[split])
        batches = GlobalBatches(count, self.config.batch_size, rank, world, seed=self.seed)
        batches.set_epoch(self.epoch)
        self.data[split].set_epoch(self.epoch)
        return batches

    def _draw_channels(self) -> None:
        for i, (_, layer) in enumerate(adapter_layers(self.model)):
            if layer.config.channel_selection == "resample":
                seed = (self.seed * 10_007 + self.epoch) * 10_007 + i
                layer.draw_channels(torch.Generator().manual_seed(seed))

    def _seed_noise(self) -> None:
        """Makes what the model itself draws while training a function of seed, epoch, process."""
        process = self.accelerator.process_index
        torch.manual_seed((self.seed * 10_007 + self.epoch) * 10_007 + process)

    def _mixtures(self, epoch: int) -> dict[str, Any]:
        mixtures = [a.detach().softmax(0).tolist() for a in arch_parameters(self.model)]
        return {"epoch": epoch, "softmax": mixtures}

    def _entropy(self) -> float | None:
        entropies = [mixture_entropy(alpha) for alpha in arch_parameters(self.model)]
        return sum(entropies) / len(entropies) if entropies else None

    def operation_history(self) -> dict[str, Any] | None:
        """softmax(alpha) of every layer after every epoch; epoch -1 is the start."""
        if self.architecture is None:
            return None
        layers = [name for name, layer in adapter_layers(self.model) if layer.alpha is not None]
        return {"operations": list(OPERATIONS), "layers": layers, "epochs": self.operations}

    def _alpha_learning_rate(self) -> float:
        """Adam's rate for alpha: the configured one, or one that fits the number of steps."""
        if self.config.alpha_learning_rate is not None:
            return self.config.alpha_learning_rate
        steps = sum(self._alpha_steps(epoch) for epoch in range(self.config.epochs))
        return min(max(PAPER_ALPHA_RATE, ALPHA_TRAVEL / max(steps, 1)), MAX_ALPHA_RATE)

    def _alpha_steps(self, epoch: int) -> int:
        """How many steps update alpha in an epoch."""
        if not self._searches(epoch):
            return 0
        return self._steps("train" if self.config.simultaneous else "arch")

    def _steps(self, split: str) -> int:
        return -(-len(self.data[split]) // self.config.batch_size)

    def _steps_left(self) -> int:
        """Forward-backward batches from the current epoch to the last."""
        own_steps = 0 if self.config.simultaneous else 1
        return sum(
            self._steps("train") + own_steps * self._alpha_steps(epoch)
            for epoch in range(self.epoch, self.config.epochs)
        )

    def _advance(self, loss: float, images: int) -> None:
        now = time.perf_counter()
        rate = images / (now - self.step_started)
        self.step_started = now
        description = f"epoch {self.epoch + 1}/{self.config.epochs}"
        self.progress.update(self.task, advance=1, description=description, loss=loss, rate=rate)

    def _save(self, is_best: bool) -> None:
        """Writes the checkpoints; a kill at any moment leaves the previous ones whole."""
        if is_best:
            self.best_quality = quality(self.history[-1])
        if self.accelerator.is_main_process:
            if is_best:
                with fixed(self.model):
                    save_adapter(self.model, self.directory / BEST)
            with replaced_file(self.directory / LAST) as temporary:
                torch.save(self._state(), temporary)
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        groups = [g for g in (self.weights, self.architecture) if g]
        scaler = self.accelerator.scaler
        return {
            "epoch": self.epoch,
            "best_quality": self.best_quality,
            "history": self.history,
            "operations": self.operations,
            "model": trained_state(self.model),
            "optimizers": [group.optimizer.state_dict() for group in groups],
            "scaler": scaler.state_dict() if scaler else None,
        }

    def resume(self) -> None:
        """Continues from the last checkpoint, if there is one.

        Raises:
            UserError: the checkpoint is damaged or belongs to another model.
        """
        path = self.directory / LAST
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            differing = state["model"].keys() ^ trained_state(self.model).keys()
            if differing:
                raise ValueError(f"it and the model differ in {min(differing)}")
            self.model.load_state_dict(state["model"], strict=False)
            groups = [g for g in (self.weights, self.architecture) if g]
            for group, stored in zip(groups, state["optimizers"], strict=True):
                group.optimizer.load_state_dict(stored)
        except Exception as error:  # whatever a damaged file can raise ends in the same advice
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"cannot resume from {path}: {reason}; start a new run with another --output"
            ) from error
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_quality = state["epoch"], state["best_quality"]
        self.history, self.operations = state["history"], state["operations"]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:.1f} images/s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def quality(record: dict[str, Any]) -> tuple[float, ...]:
    """What the best epoch is chosen by: Dice on the validation split, then the lower loss there.

    The loss decides while a model predicts nothing yet, or where the split has no foreground. With
    annealing only the epochs that end it count.
    """
    return -record["spatial"], record["val_dice"] or 0.0, -record["val_loss"]


def _line(record: dict[str, Any], epochs: int) -> str:
    """One epoch in a line of text, for logs."""
    searched = "" if record["arch_loss"] is None else f"  arch loss {record['arch_loss']:.3f}"
    entropy = "" if record["entropy"] is None else f"  entropy {record['entropy']:.3f}"
    spatial = "" if record["spatial"] == 1 else f"  spatial {record['spatial']:.2f}"
    return (
        f"epoch {record['epoch'] + 1}/{epochs}  stage {record['stage']}  "
        f"loss {record['train_loss']:.3f}{searched}  val loss {record['val_loss']:.3f}  "
        f"val Dice {record['val_dice'] or 0.0:.3f}{entropy}{spatial}  "
        f"{sum(record['seconds'].values()):.1f} s"
    )


def _log(
    writer: SummaryWriter, record: dict[str, Any], mixtures: dict[str, Any], searched: bool
) -> None:
    for name, value in record.items():
        if isinstance(value, float):
            writer.add_scalar(name, value, record["epoch"])
    if searched:
        mean = torch.tensor(mixtures["softmax"]).mean(0)
        for name, weight in zip(OPERATIONS, mean.tolist(), strict=True):
            writer.add_scalar(f"operations/{name}", weight, record["epoch"])
    writer.flush()
