"""Random choices over samples: held-out splits, and the order and batches of an epoch.

Every choice is a pure function of the seed, the epoch and the index. It is therefore the same in
every worker, with any number of processes, and in a resumed run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch.utils.data import Sampler

from naslora.errors import UserError

Entry = TypeVar("Entry")

HOLD_OUT, ORDER, FLIP, REFILL, AUGMENT, CROP, OBJECTS = range(7)
"""Streams of random numbers, one for each use, so that one use does not change another."""


def seeded_generator(stream: int, seed: int, *path: int) -> np.random.Generator:
    """Makes the generator for one random choice, in a stream of the constants above.

    ``seed`` is any integer, ``path`` further ones that the choice depends on, such as the epoch and
    the index.
    """
    # NumPy mixes all integers of the tuple into the state. The modulus makes negative seeds valid.
    return np.random.default_rng((stream, seed % 2**64, *path))


def hold_out(
    samples: Sequence[Entry], fraction: float, seed: int, *path: int
) -> tuple[list[Entry], list[Entry]]:
    """Splits samples at random into the kept and the held-out ones, in their original order.

    Equal samples, seeds and paths, as in ``seeded_generator``, give equal splits. ``fraction`` is
    the share to hold out, in [0, 1). If it is not 0, both parts get at least one sample.

    Raises:
        UserError: fewer than two samples are to be split.
    """
    if fraction == 0:
        return list(samples), []
    if len(samples) < 2:
        raise UserError(
            f"no sample can be held out from {len(samples)} training sample(s); "
            "give at least 2, or provide the held-out split"
        )
    held = draw_part(range(len(samples)), min(fraction, 1 - 1 / len(samples)), seed, *path)
    chosen = set(held)
    kept = [sample for i, sample in enumerate(samples) if i not in chosen]
    return kept, [samples[i] for i in held]


def draw_part(samples: Sequence[Entry], fraction: float, seed: int, *path: int) -> list[Entry]:
    """Draws a part of the samples, at least one, in their original order.

    Arguments as for ``hold_out``; ``fraction`` may be 1.
    """
    size = max(1, round(fraction * len(samples)))
    order = seeded_generator(HOLD_OUT, seed, *path).permutation(len(samples))
    return [samples[i] for i in sorted(order[:size].tolist())]


def refill(indices: Sequence[int], count: int, seed: int, epoch: int) -> list[int]:
    """The indices, and as many of them again, at random, as are missing to ``count``."""
    order = seeded_generator(REFILL, seed, epoch).permutation(len(indices))
    again = np.resize(order, max(count - len(indices), 0)).tolist()
    return [*indices, *(indices[i] for i in again)]


@dataclass(eq=False)
class GlobalBatches(Sampler[list[int]]):
    """Yields this process's share of each batch. The number of processes does not change batches.

    The order of the samples depends only on the seed and the epoch. A batch is shared by all
    processes. No sample is dropped, so the last batch may be smaller. Process r of n takes the
    samples r, r + n, r + 2n, ... of each batch; its share of a small batch may be empty.
    """

    indices: Sequence[int]
    """Of the samples in the data set."""
    batch_size: int
    """Number of samples in a batch, over all processes."""
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    """False keeps the order of the samples, for evaluation."""
    seed: int = 0
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the order depends on. Call it before the epoch's iteration."""
        self.epoch = epoch

    def global_size(self, step: int) -> int:
        """Returns the number of samples over all processes in the epoch's batch ``step``."""
        return min(self.batch_size, len(self.indices) - step * self.batch_size)

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.indices)
        if self.shuffle:
            shuffled = seeded_generator(ORDER, self.seed, self.epoch).permutation(len(self.indices))
            order = [order[i] for i in shuffled]
        for start in range(0, len(self.indices), self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.world_size]
