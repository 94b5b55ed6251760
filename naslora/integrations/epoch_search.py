"""What the callbacks share: the alpha steps of an epoch, and its draw of channels."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from naslora.adapter.layer.alpha_search import AlphaSearch
from naslora.adapter.layer.injection import arch_parameters
from naslora.adapter.layer.modules import adapter_layers
from naslora.errors import UserError

Loss = Callable[[nn.Module, Any], Tensor]
"""Takes the model and a batch. Returns a scalar loss."""


class EpochSearch:
    """Alpha steps at the end of an epoch, for host loops that train the weights themselves.

    Between the steps alpha is frozen, so a host's optimizer of everything trainable leaves it out.

    Args:
        held_out: batches that the weights do not train on, read anew each epoch: a DataLoader or a
            list.
        loss_fn: the loss of a batch.
        lr: Adam's rate for alpha.
        start: the first epoch with alpha steps, counted from 0.
        seed: seed of the channels that ``channel_selection="resample"`` draws each epoch.

    Attributes:
        losses: by epoch, the mean loss of its alpha steps.

    Raises:
        UserError: ``held_out`` can be read only once.
    """

    def __init__(
        self, held_out: Iterable[Any], loss_fn: Loss, lr: float, start: int, seed: int
    ) -> None:
        if iter(held_out) is held_out:
            raise UserError(
                "held_out must be readable once an epoch, such as a DataLoader or a list, got "
                f"{type(held_out).__name__}, which ends after one pass"
            )
        self.held_out, self.loss_fn = held_out, loss_fn
        self.lr, self.start, self.seed = lr, start, seed
        self.losses: dict[int, float] = {}
        self.search: AlphaSearch | None = None
        self._model: nn.Module | None = None
        self._stored: dict[str, Any] | None = None

    def attach(self, model: nn.Module) -> None:
        """Starts the search of a model, once, and freezes its alpha.

        Raises:
            UserError: the model has no alpha.
        """
        alphas = arch_parameters(model)
        if not alphas:
            raise UserError(
                "the model has no alpha to search: call inject(model, config) before training, "
                "with channel_ratio greater than 0"
            )
        if self.search is None or self._model is not model:
            self._model, self.search = model, AlphaSearch(model, self.lr, self.start)
        if self._stored is not None:
            self.search.load_state_dict(self._stored)
            self._stored = None
        for alpha in alphas:
            alpha.requires_grad_(False)  # AlphaSearch lets it require gradients in its steps

    def check_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Refuses an optimizer of the host that holds alpha.

        Raises:
            UserError: it does.
        """
        alphas = {id(alpha) for alpha in arch_parameters(model)}
        if any(id(p) in alphas for group in optimizer.param_groups for p in group["params"]):
            raise UserError(
                "the host's optimizer holds alpha; build it of naslora.param_groups(model, lr), "
                "and give AlphaCallback to the trainer when you make it"
            )

    def draw_channels(self, model: nn.Module, epoch: int) -> None:
        """Draws the channels of layers with ``channel_selection="resample"``, in place.

        The draw depends on the seed, the epoch and the layer's position: all processes agree.
        """
        for i, (_, layer) in enumerate(adapter_layers(model)):
            if layer.config.channel_selection == "resample":
                seed = (self.seed * 10_007 + epoch) * 10_007 + i
                layer.draw_channels(torch.Generator().manual_seed(seed))

    def run(self, model: nn.Module, epoch: int, move: Callable[[Any], Any]) -> None:
        """Takes one alpha step on each held-out batch, from epoch ``start`` on.

        Args:
            model: the model of ``attach``.
            epoch: counted from 0.
            move: puts a batch on the model's device.

        Raises:
            UserError: there are no held-out batches.
        """
        if epoch < self.start or self.search is None:
            return
        training, losses = model.training, []
        model.train()
        for batch in self.held_out:
            losses.append(self.search.step(move(batch), self.loss_fn, epoch) or 0.0)
        model.train(training)
        if not losses:
            raise UserError("held_out yielded no batches")
        self.losses[epoch] = sum(losses) / len(losses)

    def state_dict(self) -> dict[str, Any]:
        """The state of alpha's optimizer; alpha itself is the model's."""
        return {} if self.search is None else self.search.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``, before or after ``attach``."""
        if self.search is None:
            self._stored = state
        else:
            self.search.load_state_dict(state)
