"""Which images the steps of an epoch take, for each choice of ``TrainConfig.arch_data``."""

from collections.abc import Sequence
from dataclasses import dataclass

from naslora.data.sampling import draw_part, hold_out, refill
from naslora.training.train_config import TrainConfig, first_search_epoch


@dataclass(frozen=True)
class EpochImages:
    """The images of the weight steps and of the alpha steps.

    An epoch's weight steps take equally many images, whatever alpha takes. Images that are left to
    alpha are replaced by others, which then come twice.
    """

    config: TrainConfig
    train: int
    """Number of training images."""
    arch: int
    """Number of images in the data's own split for alpha; 0 without one."""
    searches: bool
    """Whether the run takes alpha steps of their own."""
    seed: int

    def of_weights(self, epoch: int) -> Sequence[int]:
        """Indices of the training images that an epoch's weight steps take."""
        kept: Sequence[int] = range(self.train)
        count = self.train + self.arch
        started = epoch >= first_search_epoch(self.config)
        leaves_out = {"hold-out": True, "rotate": started}.get(str(self.config.arch_data), False)
        if leaves_out and self.searches and not self.arch:
            kept, _ = self._parts(epoch)
        return refill(kept, count, self.seed, epoch) if len(kept) < count else kept

    def of_alpha(self, epoch: int) -> Sequence[int]:
        """Indices of the images that an epoch's alpha steps take: in the data's own split for
        alpha, if there is one, else in the training split."""
        if self.arch:
            return range(self.arch)
        if self.config.arch_data in ("rotate", "hold-out"):
            return self._parts(epoch)[1]
        return draw_part(range(self.train), self.config.arch_fraction, self.seed, epoch)

    def _parts(self, epoch: int) -> tuple[list[int], list[int]]:
        """The training images of the weights, and those of alpha, which `hold-out` draws once."""
        path = () if self.config.arch_data == "hold-out" else (epoch,)
        return hold_out(range(self.train), self.config.arch_fraction, self.seed, *path)
