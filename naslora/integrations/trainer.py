"""The search inside the Hugging Face Trainer. Needs transformers."""

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from naslora.errors import UserError
from naslora.files import read_torch, write_torch
from naslora.integrations.epoch_search import EpochSearch, Loss

STATE_NAME = "alpha_search.pt"  # beside Trainer's own files in a checkpoint


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model of transformers returns for a batch with labels.

    Raises:
        UserError: it returns none.
    """
    output = model(**batch)
    loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    if loss is None:
        raise UserError(
            f"{type(model).__name__} returns no loss; give AlphaCallback loss_fn(model, batch)"
        )
    return loss


class AlphaCallback(TrainerCallback):
    """Searches alpha on held-out batches at the end of each epoch of a Trainer.

    The Trainer's own optimizer trains everything else that requires gradients: alpha is frozen
    except in the callback's steps. Evaluation and checkpoints of an epoch come after its alpha
    steps. Layers with ``channel_selection="resample"`` draw their channels when an epoch begins.

    ``Trainer(model, args, ..., callbacks=[AlphaCallback(held_out)])``, with an injected model.

    Args:
        held_out: batches that the weights do not train on, as the model takes them; a DataLoader
            or a list, read anew each epoch. With several processes each one reads its own, and all
            must yield equally many batches.
        loss_fn: takes the model and a batch, returns a scalar. None takes the model's own loss.
        lr: Adam's rate for alpha.
        start: the first epoch with alpha steps, counted from 0.
        seed: seed of the channels.

    Attributes:
        losses: by epoch, the mean loss of its alpha steps.

    Raises:
        UserError: the model has no alpha, the Trainer's optimizer holds alpha, or ``held_out``
            yields no batches or ends after one pass.
    """

    def __init__(
        self,
        held_out: Iterable[Any],
        loss_fn: Loss | None = None,
        *,
        lr: float = 1e-2,
        start: int = 0,
        seed: int = 0,
    ) -> None:
        self._search = EpochSearch(held_out, loss_fn or own_loss, lr, start, seed)

    @property
    def losses(self) -> dict[int, float]:
        """By epoch, the mean loss of its alpha steps."""
        return self._search.losses

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freezes alpha before the Trainer makes its optimizer."""
        self._search.attach(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the optimizer. Reads the state of the search if the Trainer resumes."""
        self._search.attach(kwargs["model"])
        self._search.check_optimizer(kwargs["model"], kwargs["optimizer"])
        if state.global_step > 0:
            path = checkpoint(args, state) / STATE_NAME
            if path.is_file():
                self._search.load_state_dict(read_torch(path))
            else:
                warnings.warn(f"{path} does not exist, so alpha's Adam starts anew", stacklevel=2)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws channels."""
        self._search.draw_channels(kwargs["model"], int(state.epoch or 0))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the epoch's alpha steps."""
        # state.epoch is the number of epochs done, as a sum of fractions; max_steps may cut one.
        epoch = max(math.ceil((state.epoch or 0) - 1e-6) - 1, 0)
        self._search.run(kwargs["model"], epoch, lambda batch: send_to_device(batch, args.device))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the state of the search into the Trainer's checkpoint."""
        if state.is_world_process_zero:
            write_torch(checkpoint(args, state) / STATE_NAME, self._search.state_dict())


def checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the Trainer's checkpoint at the current step."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
