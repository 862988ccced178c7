"""Batches of streamed data: how processes and workers share a stream, and in what order its examples come.

A stream can be read from its beginning alone, piece by piece (shard by shard, as a rule a file each). Where there are
enough shards, each reader gets shards of its own; otherwise every reader reads everything and decodes what is its own.
Order comes from shuffling the shards, and examples in a small buffer. Both are functions of seed and epoch, so that a
resumed run reads up to where it was and goes on with the same batches.
"""
from copy import copy
from itertools import chain, count, islice, tee
from typing import Callable, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from ..errors import StreamError, UnreadableImageError
from .epoch_order import EpochBatches
from .image_data import seeded
from .source import Shard
from .streaming import Example, SizedStreamedSplit, StreamedSplit
from .workers import keep_worker_alive

__all__ = ['StreamedLoader', 'create_streamed_eval_loader', 'create_streamed_train_loader']

# Shards that must fall to each of several readers before they divide a stream by shards; shares of fewer would differ
# too much in length.
_SHARDS = 3

# Images in a row, none of which can be read, that are too many to go on.
_TRIES = 1000


def _shuffled(examples: Iterable[Example], buffer_size: int, rng: np.random.Generator) -> Iterator[Example]:
    """Yield examples in random order, each drawn from the next `buffer_size` that have not come yet.

    The order of the `datasets` library's own shuffling is another one from version to version.
    """
    buffer = []
    for example in examples:
        if len(buffer) < buffer_size:
            buffer.append(example)
            continue
        i = rng.integers(buffer_size)
        yield buffer[i]
        buffer[i] = example
    for i in rng.permutation(len(buffer)):
        yield buffer[i]


class _Share(IterableDataset):
    """What one reader, a worker or a process that has none, makes of a split; the base of training and evaluation."""

    def __init__(self, split: StreamedSplit, transform: Callable, shard: Shard):
        self.split, self.transform, self.shard = split, transform, shard

    def divide(self) -> Tuple[int, int, int, int]:
        """Return worker, workers, piece and pieces.

        The shards are divided into as many pieces as there are readers or processes, or are one piece. `piece` is the
        number of the one that this reader reads.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        readers = self.shard.world_size * workers
        pieces = next((n for n in (readers, self.shard.world_size) if self.split.shards >= _SHARDS * n), 1)
        return worker, workers, (self.shard.rank * workers + worker) * pieces // readers, pieces


class _TrainShare(_Share):
    """Yields the batches of this reader, and None in place of those of the first round that are left out.

    In each round torch takes a batch of every worker, beginning with the first worker wherever in the epoch that is.
    """

    def __init__(self, split: StreamedSplit, transform: Callable, batches: EpochBatches, shuffle_buffer: int):
        super().__init__(split, transform, batches.shard)
        self.batches, self.shuffle_buffer = batches, shuffle_buffer

    def endless(self, piece: int, pieces: int) -> Iterator[Example]:
        """Yield the examples of a piece in the epoch's order, over and over."""
        seeds = (self.batches.seed, self.batches.epoch)
        shards = np.random.default_rng(seeds).permutation(self.split.shards)[piece::pieces].tolist()
        for turn in count():
            rng = np.random.default_rng((*seeds, piece, turn))
            examples = _shuffled(self.split.examples(shards), self.shuffle_buffer, rng)
            first = next(examples, None)
            if first is None:
                raise StreamError(f'There are no examples in shards {shards} of the {self.split.name} split.')
            yield first
            yield from examples

    def item(self, place: int, examples: Iterable[Example]) -> Tuple[torch.Tensor, int]:
        """Return image tensor and label of the first example, with the draws of its place in the epoch.

        Where its image is skipped the next one that can be read takes its place, and comes once more in its own. So who
        sees what does not depend on what others can read, nor on where in the epoch a run goes on.

        Raises:
            UnreadableImageError: An image that is not to be skipped, or too many in a row.
        """
        for tries, example in enumerate(examples, 1):
            try:
                with seeded(self.batches.seed, self.batches.epoch, place):
                    return self.split.item(example, self.transform)
            except UnreadableImageError as e:
                self.split.skip(example, e)
                if tries == _TRIES:
                    raise

    def __iter__(self) -> Iterator[Optional[List[torch.Tensor]]]:
        batches = self.batches
        worker, workers, piece, pieces = self.divide()
        (examples,), read = tee(self.endless(piece, pieces), 1), 0  # a copy of it looks ahead
        left_out = batches.start * batches.accumulate
        if worker < left_out % workers:
            yield None
        for number, places in enumerate(batches.slices(), left_out):
            if number % workers != worker:
                continue
            size = places.stop - places.start
            if pieces == 1:  # everyone's examples
                first = places.start
            else:  # this process's, or this reader's alone
                first = size * (number if pieces == self.shard.world_size else number // workers)
            items = []
            for place, example in enumerate(islice(examples, first - read, first - read + size), places.start):
                items.append(self.item(place, chain([example], copy(examples))))
            read = first + size
            yield default_collate(items)


class _EvalShare(_Share):
    """Yields image tensors and labels of this reader's examples."""

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, int]]:
        worker, workers, piece, pieces = self.divide()
        examples = self.split.examples(range(piece, self.split.shards, pieces))
        sharers = self.shard.world_size * workers // pieces
        for example in islice(examples, (self.shard.rank * workers + worker) % sharers, None, sharers):
            try:
                yield self.split.item(example, self.transform)
            except UnreadableImageError as e:
                self.split.skip(example, e)


class StreamedLoader:
    """Shuffled, augmented batches of a stream: images (N, C, H, W) and labels (N,).

    Attributes:
        batch_sampler: Its `set_epoch` chooses the epoch and the steps of it to leave out.
    """

    def __init__(self, loader: DataLoader, batch_sampler: EpochBatches):
        self.loader, self.batch_sampler = loader, batch_sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[List[torch.Tensor]]:
        return (batch for batch in self.loader if batch is not None)


def create_streamed_train_loader(
        split: SizedStreamedSplit,
        transform: Callable,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        shard: Shard = Shard(),
        accumulate: int = 1,
        pin_memory: bool = False,
        shuffle_buffer: int = 1000,
) -> StreamedLoader:
    """Return a loader of shuffled, augmented batches; call `batch_sampler.set_epoch` before each epoch.

    Shards are shuffled, and so are examples, in a buffer of `shuffle_buffer` encoded ones for each reader. Where at
    least three shards fall to every process, each reads shards of its own, dealt out anew in every epoch, and likewise
    its workers; otherwise all of them read everything and decode only what is theirs. In one pass no example comes
    twice. All processes take the same number of batches: one that has come to the end of its shards begins another
    pass over them, one that has more than it needs leaves the rest.

    The batches are a function of seed and epoch where all read everything, else of the numbers of processes and workers
    too. Started amid the epoch, the loader yields what it would have yielded from there on; what comes before is read,
    but not decoded. (The state that streams of the `datasets` library keep would lose what is in a shuffle buffer.)

    Raises:
        DataError: An epoch is smaller than one batch, or a batch cannot be shared evenly.
    """
    batches = EpochBatches(len(split), batch_size, seed, shard, accumulate)
    loader = DataLoader(
        _TrainShare(split, transform, batches, shuffle_buffer),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=keep_worker_alive,
        generator=torch.Generator(),  # leaves the global one, which a resumed run goes on with, alone
    )
    return StreamedLoader(loader, batches)


def create_streamed_eval_loader(
        split: StreamedSplit,
        transform: Callable,
        batch_size: int,
        workers: int = 0,
        shard: Shard = Shard(),
        pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of one process's share of a split: every example exactly once over all processes, none padded."""
    return DataLoader(
        _EvalShare(split, transform, shard),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=keep_worker_alive,
        generator=torch.Generator(),
    )
