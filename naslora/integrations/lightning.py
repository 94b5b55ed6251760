"""The search inside Lightning. Needs lightning or pytorch_lightning."""

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from naslora.adapter.layer.alpha_search import EpochSearch, Loss
from naslora.adapter.layer.modules import draw_channels

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same library under its older name
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]


class AlphaCallback(EpochSearch, Callback):
    """Searches alpha on held-out batches at the end of each epoch of a Lightning Trainer.

    The module's own optimizers train everything else: alpha moves in the callback's steps alone,
    which come after an epoch's last batch and before its validation. Layers with
    ``channel_selection="resample"`` draw their channels when an epoch begins.

    ``Trainer(callbacks=[AlphaCallback(held_out, loss_fn)])``, with a module that injects in its
    ``__init__``.

    Args:
        held_out: batches as ``loss_fn`` takes them; see ``EpochSearch``.
        loss_fn: takes the LightningModule and a batch, returns a scalar. ``training_step`` does not
            serve, because it logs.
        options: ``lr``, ``start`` and ``seed`` of ``EpochSearch``.

    Raises:
        UserError: the module has no alpha, or ``held_out`` yields no batches or ends after one
            pass.
    """

    def __init__(self, held_out: Iterable[Any], loss_fn: Loss, **options: Any) -> None:
        def loss(module: nn.Module, batch: Any) -> Tensor:
            with cast(LightningModule, module).trainer.precision_plugin.forward_context():
                return loss_fn(module, batch)

        super().__init__(held_out, loss, **options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freezes alpha before Lightning asks the module for its optimizers."""
        if stage == "fit":
            self.attach(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws channels."""
        draw_channels(pl_module, self.seed, trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *arguments: Any, **options: Any
    ) -> None:
        """Takes the epoch's alpha steps after its last batch."""
        if trainer.is_last_batch:
            self.search_epoch(pl_module, trainer.current_epoch, trainer.strategy.batch_to_device)

    def state_dict(self) -> dict[str, Any]:
        """The state of alpha's optimizer, for Lightning's checkpoints."""
        return self.search.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        if hasattr(self, "search"):  # not in tests of a model
            self.search.load_state_dict(state_dict)
