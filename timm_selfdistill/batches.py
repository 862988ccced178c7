"""Batches that worker processes, or none, make of a data set, and what becomes of workers that fail."""
import signal
from typing import Callable, Iterable, Iterator, List, Tuple

import numpy as np
from torch.utils.data import DataLoader, Sampler

from .data import DataError, ImageSplit
from .signals import keep_worker_alive, starting_workers

__all__ = ['EpochBatches', 'WorkerDiedError', 'create_eval_loader', 'create_train_loader', 'readable']


class WorkerDiedError(DataError):
    """A loader's worker process was killed."""

    local = True  # of several processes only the one it belonged to knows


class EpochBatches(Sampler):
    """Batches in an order that is a function of seed and epoch alone, cut to one process's share.

    A batch of `batch_size` rows is the whole batch of one optimizer step over all processes: with more of them each
    takes a smaller slice, with `accumulate` a slice at a time, and the optimizer sees the same images. The last rows
    that fill no batch are left out, others in every epoch.

    Args:
        length: Rows of the data set.
        batch_size: Rows of a step over all processes.
        seed: Seed of the order.
        rank: Number of this process.
        world_size: Number of processes.
        accumulate: Slices that a process takes of a step, one after the other.

    Attributes:
        epoch: Number of the epoch, see `set_epoch`.
        start: Steps of it that are left out.
        steps: Steps of a whole epoch.

    Raises:
        DataError: The data set is smaller than one batch, or a batch cannot be shared evenly.
    """

    def __init__(
            self,
            length: int,
            batch_size: int,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
            accumulate: int = 1,
    ):
        if batch_size < 1 or batch_size % (world_size * accumulate):
            shares = f'{world_size}' if accumulate == 1 else f'{world_size}, times --grad-accum-steps {accumulate}'
            raise DataError(
                f'--batch-size {batch_size}: expected a multiple of the number of processes, {shares}; '
                f'it counts the images of one step over all of them.'
            )
        if length < batch_size:
            raise DataError(f'--batch-size {batch_size} is more than the {length} training images.')
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
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
        share = self.batch_size // self.world_size
        size = share // self.accumulate
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.rank * share
            for begin in range(first, first + share, size):
                yield slice(begin, begin + size)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        order = self.order()
        for places in self.slices():
            yield [(self.epoch, int(row)) for row in order[places]]


def create_train_loader(
        split: ImageSplit,
        transform: Callable,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of shuffled, augmented batches; call `batch_sampler.set_epoch` before each epoch."""
    split.transform, split.seed = transform, seed
    return DataLoader(
        split,
        batch_sampler=EpochBatches(len(split), batch_size, seed, rank, world_size, accumulate),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=keep_worker_alive,
    )


def create_eval_loader(
        split: ImageSplit,
        transform: Callable,
        batch_size: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of one process's share of a part: every row exactly once over all processes, none padded."""
    split.transform = transform
    return DataLoader(
        split,
        batch_size=batch_size,
        sampler=range(rank, len(split), world_size),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=keep_worker_alive,
    )


def _let_loader_notice() -> None:
    """Take back torch's SIGCHLD handler, which raises as soon as a loader's worker has died, be it amid a step.

    Without it the loader notices by itself where it waits for a batch, between two steps, within 5 seconds.
    """
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except (AttributeError, ValueError):  # Windows has none; only the main thread has handlers
        pass


def readable(batches: Iterable) -> Iterator:
    """Pass batches on; raise what went wrong in a worker as it would have been raised here.

    Raises:
        DataError: An image or a label cannot be used.
        WorkerDiedError: A worker process was killed.
    """
    try:
        with starting_workers():
            iterator = iter(batches)
        for batch in iterator:
            _let_loader_notice()  # torch sets its handler when it starts workers
            yield batch
    except DataError as e:
        text = str(e)
        if text.startswith('Caught '):  # torch puts the worker's whole traceback there; its last line is the message
            raise type(e)(text.rstrip().splitlines()[-1].partition(': ')[2]) from None
        raise
    except RuntimeError as e:
        if 'DataLoader worker' not in str(e):
            raise
        raise WorkerDiedError(
            f'A loader process died: {str(e).rstrip(". ")}. Often the memory was full, or the shared memory: '
            f'fewer --workers need less of it.'
        ) from e
