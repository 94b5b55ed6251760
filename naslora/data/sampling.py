"""Random choices over samples: pure functions of seed, epoch and index."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from naslora.data.masks import Sample
from naslora.errors import UserError

# Each use of random numbers draws from a stream of its own.
HOLD_OUT, ORDER, FLIP = range(3)


def hold_out(
    samples: Sequence[Sample], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Splits samples at random into those kept and those held out for another purpose.

    Args:
        samples: what to split.
        fraction: the share to hold out, in [0, 1); above 0 at least one sample is held out and at
            least one is kept.
        seed: the same seed and samples give the same split.

    Returns:
        The samples kept and those held out, both in the order in which they came.

    Raises:
        UserError: the fraction is outside [0, 1), or there are fewer than two samples to split.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the held-out fraction must be in [0, 1), got {fraction}")
    if fraction == 0:
        return list(samples), []
    if len(samples) < 2:
        raise UserError(
            f"{len(samples)} training sample(s) cannot be split in two, to hold some out; "
            "give at least 2, or a split of its own"
        )
    count = min(max(1, round(fraction * len(samples))), len(samples) - 1)
    chosen = set(seeded_generator(HOLD_OUT, seed).permutation(len(samples))[:count].tolist())
    kept = [sample for i, sample in enumerate(samples) if i not in chosen]
    return kept, [samples[i] for i in sorted(chosen)]


def seeded_generator(stream: int, seed: int, *path: int) -> np.random.Generator:
    # NumPy seeds from any tuple of integers, so that no two (epoch, index) share a state; the
    # modulus admits negative seeds.
    return np.random.default_rng((stream, seed % 2**64, *path))


class GlobalBatches(Sampler[list[int]]):
    """This process's share of each batch, where the batches are the same for any number of them.

    The samples of an epoch, in an order that depends on the seed and the epoch alone, are cut into
    batches over all processes; none is dropped, so the last may be smaller. Process r of n takes
    every n-th sample of each batch from the r-th on, which may be none of a small one.

    Args:
        count: the number of samples.
        batch_size: of a batch over all processes.
        rank: of this process.
        world_size: the number of processes.
        shuffle: False keeps the samples in order, for evaluation.
        seed: of the order.

    Raises:
        UserError: the batch size is below 1.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the order depends on; call it before iterating over the epoch."""
        self.epoch = epoch

    def global_size(self, step: int) -> int:
        """The number of samples that all processes together have in the epoch's batch ``step``."""
        return min(self.batch_size, self.count - step * self.batch_size)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.count))
        if self.shuffle:
            order = seeded_generator(ORDER, self.seed, self.epoch).permutation(self.count).tolist()
        for start in range(0, self.count, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.world_size]
