"""Which images the steps of an epoch take, for each choice of ``TrainConfig.arch_data``."""

from collections.abc import Sequence
from dataclasses import dataclass

from naslora.data.sampling import draw_part, hold_out, refill
from naslora.training.train_config import ArchData


@dataclass(frozen=True)
class EpochImages:
    """The images of the weight steps and of the alpha steps.

    An epoch's weight steps take equally many images, whatever alpha takes. Images that are left to
    alpha are replaced by others, which then come twice.
    """

    arch_data: ArchData | None
    """As in ``TrainConfig``."""
    fraction: float
    """``TrainConfig.arch_fraction``."""
    search_start: int
    """First epoch with alpha steps."""
    train: int
    """Number of training images."""
    arch: int
    """Number of images in the data's own split for alpha; 0 without one."""
    searches: bool
    """Whether the run takes alpha steps of their own."""
    seed: int

    @property
    def per_epoch(self) -> int:
        """Number of images of an epoch's weight steps."""
        return self.train + self.arch

    def of_weights(self, epoch: int) -> Sequence[int]:
        """Indices of the training images that an epoch's weight steps take."""
        kept: Sequence[int] = range(self.train)
        if self._leaves_out(epoch):
            kept, _ = hold_out(kept, self.fraction, *self._path(epoch))
        missing = self.per_epoch - len(kept)
        return refill(kept, self.per_epoch, self.seed, epoch) if missing else kept

    def of_alpha(self, epoch: int) -> Sequence[int]:
        """Indices of the images that an epoch's alpha steps take: in the data's own split for
        alpha, if there is one, else in the training split."""
        if self.arch:
            return range(self.arch)
        images, fraction = range(self.train), self.fraction
        if self.arch_data in ("rotate", "hold-out"):
            return hold_out(images, fraction, *self._path(epoch))[1]
        return draw_part(images, fraction, *self._path(epoch))

    def alpha_count(self) -> int:
        """Number of images of an epoch's alpha steps; 0 if the run takes none."""
        return len(self.of_alpha(0)) if self.searches else 0

    def _leaves_out(self, epoch: int) -> bool:
        """Whether the weight steps of an epoch leave out the images of alpha."""
        if not self.searches or self.arch:
            return False
        if self.arch_data == "rotate":
            return epoch >= self.search_start
        return self.arch_data == "hold-out"

    def _path(self, epoch: int) -> tuple[int, ...]:
        """What a draw depends on. A fixed part does not depend on the epoch."""
        return (self.seed,) if self.arch_data == "hold-out" else (self.seed, epoch)
