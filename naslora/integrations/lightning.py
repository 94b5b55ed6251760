"""The search inside Lightning. Needs lightning or pytorch_lightning."""

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from naslora.integrations.epoch_search import EpochSearch, Loss

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same library under its older name
    from pytorch_lightning import (  # type: ignore[assignment]
        Callback,
        LightningModule,
        Trainer,
    )


class AlphaCallback(Callback):
    """Searches alpha on held-out batches at the end of each epoch of a Lightning Trainer.

    The module's own optimizers train everything else: alpha is frozen except in the callback's
    steps, which come after an epoch's last batch and before its validation. Layers with
    ``channel_selection="resample"`` draw their channels when an epoch begins.

    ``Trainer(callbacks=[AlphaCallback(held_out, loss_fn)])``, with a module that injects in its
    ``__init__``.

    Args:
        held_out: batches that the weights do not train on; a DataLoader or a list, read anew each
            epoch. With several processes each one reads its own, and all must yield equally many
            batches.
        loss_fn: takes the LightningModule and a batch, returns a scalar. ``training_step`` does not
            serve, because it logs.
        lr: Adam's rate for alpha.
        start: the first epoch with alpha steps, counted from 0.
        seed: seed of the channels.

    Raises:
        UserError: the module has no alpha, an optimizer of the module holds alpha, or ``held_out``
            yields no batches or ends after one pass.
    """

    def __init__(
        self,
        held_out: Iterable[Any],
        loss_fn: Loss,
        *,
        lr: float = 1e-2,
        start: int = 0,
        seed: int = 0,
    ) -> None:
        def loss(module: nn.Module, batch: Any) -> Tensor:
            with cast(LightningModule, module).trainer.precision_plugin.forward_context():
                return loss_fn(module, batch)

        self._search = EpochSearch(held_out, loss, lr, start, seed)

    @property
    def losses(self) -> dict[int, float]:
        """By epoch, the mean loss of its alpha steps."""
        return self._search.losses

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freezes alpha before Lightning asks the module for its optimizers."""
        if stage == "fit":
            self._search.attach(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the optimizers."""
        for optimizer in trainer.optimizers:
            self._search.check_optimizer(pl_module, optimizer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws channels."""
        self._search.draw_channels(pl_module, trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *arguments: Any, **options: Any
    ) -> None:
        """Takes the epoch's alpha steps after its last batch."""
        if trainer.is_last_batch:
            self._search.run(pl_module, trainer.current_epoch, trainer.strategy.batch_to_device)

    def state_dict(self) -> dict[str, Any]:
        """The state of alpha's optimizer, for Lightning's checkpoints."""
        return self._search.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self._search.load_state_dict(state_dict)
