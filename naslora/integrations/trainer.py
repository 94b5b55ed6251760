"""The search inside the Hugging Face Trainer. Needs transformers."""

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from naslora.adapter.layer.alpha_search import AlphaSearch, EpochSearch, Loss
from naslora.adapter.layer.modules import draw_channels
from naslora.errors import UserError
from naslora.files import read_torch, write_torch

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


class AlphaCallback(EpochSearch, TrainerCallback):
    """Searches alpha on held-out batches at the end of each epoch of a Trainer.

    The Trainer's own optimizer trains everything else that requires gradients: alpha moves in the
    callback's steps alone. Evaluation and checkpoints of an epoch come after its alpha steps.
    Layers with ``channel_selection="resample"`` draw their channels when an epoch begins.

    ``Trainer(model, args, ..., callbacks=[AlphaCallback(held_out)])``, with an injected model.

    Args:
        held_out: batches as the model takes them; see ``EpochSearch``.
        loss_fn: takes the model and a batch, returns a scalar. None takes the model's own loss.
        options: ``lr``, ``start`` and ``seed`` of ``EpochSearch``.

    Raises:
        UserError: the model has no alpha, or ``held_out`` yields no batches or ends after one pass.
    """

    def __init__(
        self, held_out: Iterable[Any], loss_fn: Loss | None = None, **options: Any
    ) -> None:
        super().__init__(held_out, loss_fn or own_loss, **options)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freezes alpha before the Trainer makes its optimizer."""
        self.attach(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the state of the search if the Trainer resumes."""
        if not hasattr(self, "search"):  # added after the Trainer was made
            self.search = AlphaSearch(kwargs["model"], self.lr, self.start)
        if state.global_step > 0:
            path = checkpoint(args, state) / STATE_NAME
            if path.is_file():
                self.search.load_state_dict(read_torch(path))
            else:
                warnings.warn(f"{path} does not exist, so alpha's Adam starts anew", stacklevel=2)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws channels."""
        draw_channels(kwargs["model"], self.seed, int(state.epoch or 0))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the epoch's alpha steps."""
        # state.epoch is the number of epochs done, as a sum of fractions; max_steps may cut one.
        epoch = max(math.ceil((state.epoch or 0) - 1e-6) - 1, 0)
        self.search_epoch(kwargs["model"], epoch, lambda batch: send_to_device(batch, args.device))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the state of the search into the Trainer's checkpoint."""
        if state.is_world_process_zero:
            write_torch(checkpoint(args, state) / STATE_NAME, self.search.state_dict())


def checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the Trainer's checkpoint at the current step."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
