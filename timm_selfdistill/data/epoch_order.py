"""The order of an epoch's images: a function of seed and epoch alone."""
from typing import Iterator, List, Tuple

import numpy as np
from torch.utils.data import Sampler

from ..errors import DataError
from .source import Shard

__all__ = ['EpochBatches']


class EpochBatches(Sampler):
    """Batches in an order that is a function of seed and epoch alone, cut to one process's share.

    A batch of `batch_size` rows is the whole batch of one optimizer step over all processes: with more of them each
    takes a smaller slice, with `accumulate` a slice at a time, and the optimizer sees the same images. The last rows
    that fill no batch are left out, others in every epoch.

    Args:
        length: Rows of the data set.
        batch_size: Rows of a step over all processes.
        seed: Seed of the order.
        shard: The share of this process.
        accumulate: Slices that a process takes of a step, one after the other.

    Attributes:
        epoch: Number of the epoch, see `set_epoch`.
        start: Steps of it that are left out.
        steps: Steps of a whole epoch.

    Raises:
        DataError: The data set is smaller than one batch, or a batch cannot be shared evenly.

    Examples:
        >>> one, other = (EpochBatches(8, 4, seed=0, shard=Shard(rank, 2)) for rank in (0, 1))
        >>> rows = [row for batches in (one, other) for batch in batches for _, row in batch]
        >>> sorted(rows)
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(
            self,
            length: int,
            batch_size: int,
            seed: int = 0,
            shard: Shard = Shard(),
            accumulate: int = 1,
    ):
        world_size = shard.world_size
        if batch_size < 1 or batch_size % (world_size * accumulate):
            shares = f'{world_size}' if accumulate == 1 else f'{world_size}, times `grad_accum_steps={accumulate}`'
            raise DataError(
                f'`batch_size={batch_size}`: expected a multiple of the number of processes, {shares}; '
                f'it counts the images of one step over all of them.'
            )
        if length < batch_size:
            raise DataError(f'`batch_size={batch_size}` is more than the {length} training images.')
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.shard, self.accumulate = shard, accumulate
        self.steps = length // batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many of its steps to leave out because they are done."""
        self.epoch, self.start = epoch, start

    def order(self) -> np.ndarray:
        """Return the rows in the epoch's order (length,)."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.length)

    def slices(self) -> Iterator[slice]:
        """Yield the places in the epoch's order of one batch of this process after the other."""
        share = self.batch_size // self.shard.world_size
        size = share // self.accumulate
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.shard.rank * share
            for begin in range(first, first + share, size):
                yield slice(begin, begin + size)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        order = self.order()
        for places in self.slices():
            yield [(self.epoch, int(row)) for row in order[places]]
