"""What the callbacks share: the alpha steps of an epoch."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from naslora.adapter.layer.alpha_search import AlphaSearch
from naslora.errors import UserError

Loss = Callable[[nn.Module, Any], Tensor]
"""Takes the model and a batch. Returns a scalar loss."""


class EpochSearch:
    """Alpha steps at the end of an epoch, for hosts that train the weights themselves.

    Args:
        held_out: batches that the weights do not train on, read anew each epoch: a DataLoader or a
            list. With several processes each one reads its own, and all must yield equally many.
        loss_fn: the loss of a batch.
        lr: Adam's rate for alpha.
        start: the first epoch with alpha steps, counted from 0.
        seed: seed of the channels that ``channel_selection="resample"`` draws each epoch.

    Attributes:
        losses: by epoch, the mean loss of its alpha steps.

    Raises:
        UserError: ``held_out`` can be read only once.
    """

    search: AlphaSearch

    def __init__(
        self,
        held_out: Iterable[Any],
        loss_fn: Loss,
        *,
        lr: float = 1e-2,
        start: int = 0,
        seed: int = 0,
    ) -> None:
        if iter(held_out) is held_out:
            raise UserError(
                "held_out must be readable once an epoch, such as a DataLoader or a list, got "
                f"{type(held_out).__name__}, which ends after one pass"
            )
        self.held_out, self.loss_fn = held_out, loss_fn
        self.lr, self.start, self.seed = lr, start, seed
        self.losses: dict[int, float] = {}

    def attach(self, model: nn.Module) -> None:
        """Starts the search of a model, once, and freezes its alpha.

        Raises:
            UserError: the model has no alpha.
        """
        if not hasattr(self, "search") or self.search.model is not model:
            self.search = AlphaSearch(model, self.lr, self.start)
        self.search.required = False  # also with a process group: the host wraps the model later
        self.search.rest()

    def search_epoch(self, model: nn.Module, epoch: int, move: Callable[[Any], Any]) -> None:
        """Takes one alpha step on each held-out batch, from epoch ``start`` on.

        Args:
            model: the model of ``attach``.
            epoch: counted from 0.
            move: puts a batch on the model's device.

        Raises:
            UserError: there are no held-out batches.
        """
        if epoch < self.start:
            return
        training, losses = model.training, []
        model.train()
        for batch in self.held_out:
            losses.append(self.search.step(move(batch), self.loss_fn, epoch) or 0.0)
        model.train(training)
        if not losses:
            raise UserError("held_out yielded no batches")
        self.losses[epoch] = sum(losses) / len(losses)
