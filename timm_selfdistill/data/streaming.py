"""Data sets that are read as they come, from the Hub or from files, and their batches."""
from copy import copy
from itertools import chain, count, islice, tee
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from ..errors import DataError, StreamError, UnreadableImageError
from ..publishing import data_name
from .columns import choose_columns, is_image_feature
from .data_files import (
    DIGITS,
    IMAGES,
    SAVED,
    Files,
    check_tables,
    empty_split,
    find_files,
    name_splits,
    open_files,
    reason_of,
)
from .epoch_order import EpochBatches
from .image_data import ImageData, first_image, seeded
from .images import decode_image, printable
from .labels import Classes, find_classes, shortened, speller
from .unreadable import SkippedImages, Unreadable
from .workers import keep_worker_alive

__all__ = [
    'SizedStreamedSplit', 'StreamedLoader', 'StreamedSplit', 'create_streamed_eval_loader',
    'create_streamed_train_loader', 'load_streamed_data',
]

# Shards that must fall to each of several readers before they divide a stream by shards; shares of fewer would differ
# too much in length.
_SHARDS = 3

# Images in a row, none of which can be read, that are too many to go on.
_TRIES = 1000

# Encoded image, label, number of the shard, number of the example in it.
_Example = Tuple[Any, Any, int, int]


class StreamedSplit:
    """One part of a streamed data set; a `SizedStreamedSplit` where its length is known.

    Args:
        stream: Stream of examples with an image and a label column.
        name: What to call the part in messages.
        image_column: Its image column.
        label_column: Its label column.
        classes: The classes that its labels mean.
        mode: PIL mode that images are converted to, `RGB` or `L`.

    Attributes:
        shards: Number of the pieces, as a rule files, that can be read independently.
        skipped: Takes note of images that cannot be read and are skipped; when None the first of them is an error.
    """

    def __init__(
            self,
            stream: datasets.IterableDataset,
            name: str,
            image_column: str,
            label_column: str,
            classes: Classes,
            mode: str = 'RGB',
    ):
        # images stay encoded until they are needed: most of those that are read for their neighbours never are
        self.stream = stream.decode(False).select_columns([image_column, label_column])
        self.shards = self.stream.num_shards
        self.name, self.image_column, self.label_column = name, image_column, label_column
        self.spell = speller(stream.features[label_column], label_column, f'the {name} part')
        self.classes, self.mode = classes, mode
        self.skipped: Optional[SkippedImages] = None

    def examples(self, shards: Iterable[int]) -> Iterator[_Example]:
        """Yield the examples of some shards, undecoded.

        Raises:
            StreamError: The stream breaks off.
        """
        for shard in shards:
            row = count()
            try:
                # iter(), unlike __iter__, does not divide the stream among torch's workers, which is done here
                for rows in self.stream.shard(num_shards=self.shards, index=shard).iter(batch_size=64):
                    for image, label in zip(rows[self.image_column], rows[self.label_column]):
                        yield image, label, shard, next(row)
            except (OSError, ValueError) as e:
                reason = ' '.join(str(e).split())
                raise StreamError(f'Cannot read on in shard {shard} of the {self.name} part: {reason}') from e

    def skip(self, example: _Example, error: UnreadableImageError) -> None:
        """Go on after an image that cannot be read.

        Raises:
            UnreadableImageError: It is not to be skipped.
        """
        if self.skipped is None:
            raise error
        _, _, shard, row = example
        place = f'example {row} of shard {shard}'
        self.skipped.note(Unreadable(self.name, place, error.path or '', error.reason))

    def _where(self, example: _Example) -> str:
        image, _, shard, row = example
        path = f' ({printable(image["path"])})' if image and image['path'] else ''
        return f'example {row} of shard {shard} of the {self.name} part{path}'

    def image(self, example: _Example):
        """Decode an example's image.

        Raises:
            UnreadableImageError: It cannot be decoded; the message names shard and example, counted from 0.
        """
        return decode_image(example[0], self.mode, f'in {self._where(example)}')

    def item(self, example: _Example, transform: Callable) -> Tuple[torch.Tensor, int]:
        """Return an example's image tensor (C, H, W) and label.

        Raises:
            StreamError: The label is missing or out of range; the message names shard and example, counted from 0.
            UnreadableImageError: The image cannot be decoded.
        """
        key = self.spell(example[1])
        if key is None:
            raise StreamError(f'There is no label in {self._where(example)}.')
        label = self.classes.number(key)
        if label is None:
            names, count = self.classes.names, self.classes.count
            known = f'one of {shortened(names)}' if names else f'0 to {count - 1}'
            raise StreamError(f'Label {key} in {self._where(example)} is out of range: expected {known}.')
        return transform(self.image(example)), label


class SizedStreamedSplit(StreamedSplit):
    """A part that knows its length.

    Args:
        length: Examples of the part; of the training part those that count as an epoch.
    """

    def __init__(self, *args, length: int):
        super().__init__(*args)
        self.length = length

    def __len__(self) -> int:
        return self.length


def _length(stream: datasets.IterableDataset, part: str, files: List[str]) -> Optional[int]:
    """Return the length of a part by the data set's description, or by its files where they are parquet and here."""
    described = (stream.info.splits or {}).get(part)
    if described is not None and described.num_examples:
        return described.num_examples
    if files and all(file.endswith('.parquet') and Path(file).is_file() for file in files):
        return sum(pq.read_metadata(file).num_rows for file in files)
    return None


def _open_streams(files: Files) -> Tuple[Dict[str, datasets.IterableDataset], Dict[str, Optional[int]]]:
    """Open all splits; return them and their lengths, None where only reading to the end would tell."""
    if files.kind in (DIGITS, IMAGES, SAVED):  # rows can be picked without a copy on disk
        tables = open_files(files)
        if files.kind == IMAGES:  # sorted by class, which no buffer would undo
            tables = {name: table.shuffle(seed=0) for name, table in tables.items()}
        streams = {n: t.to_iterable_dataset(num_shards=1 + min(len(t) // 1000, 127)) for n, t in tables.items()}
        return streams, {name: len(table) for name, table in tables.items()}
    try:
        check_tables(files)
        opened, found = {}, {}
        for arguments in files.arguments():
            builder = datasets.load_dataset_builder(**arguments)
            opened.update(builder.as_streaming_dataset())
            found.update(builder.config.data_files or {})
    except DataError:
        raise
    except (ConnectionError, NotImplementedError, OSError, ValueError) as e:
        raise DataError(f'{files.place}: {reason_of(e)}') from e
    named = name_splits({name: name for name in opened}, files)
    streams = {split: opened[name] for split, name in named.items()}
    return streams, {split: _length(opened[name], name, found.get(name, [])) for split, name in named.items()}


def load_streamed_data(
        dataset: Optional[str] = None,
        data_dir: Optional[str] = None,
        image_column: Optional[str] = None,
        label_column: Optional[str] = None,
        in_chans: int = 3,
        num_classes: Optional[int] = None,
        images_per_epoch: Optional[int] = None,
        class_names: Optional[Sequence[str]] = None,
        skip_unreadable: bool = False,
) -> ImageData:
    """Open a data set of labelled images without copying or reading it; see `data.load_image_data`.

    Nothing is held out of the training part. What is wrong with an example shows when it is met. A test part whose
    first label is -1 counts as one whose labels are withheld, as the Hub marks them.

    Args:
        dataset: A Hugging Face Hub id, or a loader of the `datasets` library. Found out from the files when None and
            `data_dir` is given, else `digits`.
        data_dir: Local folder with parquet or arrow files, a saved data set, or images in one folder a class.
        image_column: Which column holds the images; read from the features when None.
        label_column: Which column holds the labels; read from the features when None.
        in_chans: Channels that images are converted to: 3, colour, or 1, grey.
        num_classes: Classes in the data, needed where the labels are plain whole numbers.
        images_per_epoch: Training examples that count as an epoch; all of them when None, where their number is known.
        class_names: Names of the classes that a network knows. Labels are given the numbers of these.
        skip_unreadable: Go on after images that cannot be read, see `StreamedSplit.skipped`.

    Returns:
        The data set; its parts are streams, of which the training part at least knows its length.

    Raises:
        DataError: The data cannot be reached, columns are missing or ambiguous, the number of classes or of training
            examples is not known, no training part.
        UnreadableImageError: The first training image cannot be decoded.
    """
    name, files = data_name(dataset, data_dir), find_files(dataset, data_dir)
    streams, lengths = _open_streams(files)
    notes = files.notes
    if 'train' not in streams:
        raise DataError(f'{name} has no part named train; its parts are: {", ".join(streams)}.')
    features = streams['train'].features
    if features is None:
        raise DataError(f'{name} does not say what its columns hold, so that it cannot be streamed.')
    image_column, label_column = choose_columns(features, image_column, label_column, name, notes)
    for split, stream in list(streams.items()):
        missing = {image_column, label_column}.difference(stream.features or features)
        if missing:
            raise DataError(
                f'The {split} part of {name} has no column {sorted(missing)[0]}; its columns are: '
                f'{", ".join(stream.features)}. Give it the column, or remove the part from the data.'
            )
        if lengths[split] == 0:
            raise DataError(empty_split(split, name))
        if not isinstance(stream.features[image_column], datasets.Image) and is_image_feature(
                stream.features[image_column]):
            streams[split] = stream.cast_column(image_column, datasets.Image())
    classes = _stream_classes(features[label_column], label_column, name, num_classes, class_names, files)
    lengths['train'] = images_per_epoch or lengths['train']
    if lengths['train'] is None:
        raise DataError(
            f'`images_per_epoch`: how many training images {name} has is not known; pass how many count as an epoch.')

    def part(split: str) -> Optional[StreamedSplit]:
        if split not in streams:
            return None
        args = (streams[split], split, image_column, label_column, classes, 'L' if in_chans == 1 else 'RGB')
        return StreamedSplit(*args) if lengths[split] is None else SizedStreamedSplit(*args, length=lengths[split])

    train, validation, test = part('train'), part('validation'), part('test')
    if test is not None and next(test.examples(range(test.shards)), (None, None))[1] == -1:
        test = None
        notes.append('left aside: the test split, as its first label is -1, which stands for withheld')
    examples = train.examples(range(train.shards))
    first = next(examples, None)
    if first is None:
        raise DataError(empty_split('train', name))
    width, height = first_image(train.image, chain([first], examples), skip_unreadable).size
    if skip_unreadable:
        for split in (train, validation, test):
            if split is not None:
                split.skipped = SkippedImages()
    return ImageData(
        name=name,
        train=train,
        validation=validation,
        test=test,
        num_classes=classes.count,
        label_names=classes.names,
        image_size=(height, width),
        mirrored=files.kind != DIGITS,
        notes=notes,
    )


def _stream_classes(
        feature: Any,
        column: str,
        name: str,
        num_classes: Optional[int],
        class_names: Optional[Sequence[str]],
        files: Files,
) -> Classes:
    """Find the classes of a stream: those of its feature, or of its parquet files, whose labels are quickly read.

    Raises:
        DataError: They cannot be known before the stream has been read.
    """
    if class_names is not None:
        return Classes(class_names, num_classes, 'the network')
    spell = speller(feature, column, name)
    if isinstance(feature, datasets.ClassLabel) or feature.dtype == 'bool':
        return find_classes(feature, [spell(False)], column)[0]
    if num_classes is not None and not feature.dtype.startswith(('string', 'large_string')):
        return Classes(None, num_classes)
    if files.kind == 'parquet' and files.data_files and 'train' in files.data_files:
        columns = (pq.read_table(file, columns=[column])[0] for file in files.data_files['train'])
        values = {value for labels in columns for value in labels.unique().to_pylist()}
        keys = [key for key in map(spell, values) if key is not None]
        if keys:
            classes, told = find_classes(feature, keys, column, num_classes)
            files.notes += told
            return classes
    if feature.dtype.startswith(('string', 'large_string')):
        raise DataError(
            f'Column {column} of {name} holds texts, and a stream does not tell which there are. Leave out '
            f'`streaming`, or use parquet files or class labels of the datasets library.'
        )
    raise DataError(
        f'`num_classes`: column {column} of {name} holds whole numbers, and a stream does not tell how many '
        f'classes they stand for; pass their number.'
    )


def _shuffled(examples: Iterable[_Example], buffer_size: int, rng: np.random.Generator) -> Iterator[_Example]:
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
    """What one reader, a worker or a process that has none, makes of a part; the base of training and evaluation."""

    def __init__(self, split: StreamedSplit, transform: Callable, rank: int, world_size: int):
        self.split, self.transform, self.rank, self.world_size = split, transform, rank, world_size

    def divide(self) -> Tuple[int, int, int, int]:
        """Return worker, workers, piece and pieces.

        The shards are divided into as many pieces as there are readers or processes, or are one piece. `piece` is the
        number of the one that this reader reads.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        readers = self.world_size * workers
        pieces = next((n for n in (readers, self.world_size) if self.split.shards >= _SHARDS * n), 1)
        return worker, workers, (self.rank * workers + worker) * pieces // readers, pieces


class _TrainShare(_Share):
    """Yields the batches of this reader, and None in place of those of the first round that are left out.

    In each round torch takes a batch of every worker, beginning with the first worker wherever in the epoch that is.
    """

    def __init__(self, split: StreamedSplit, transform: Callable, batches: EpochBatches, shuffle_buffer: int):
        super().__init__(split, transform, batches.rank, batches.world_size)
        self.batches, self.shuffle_buffer = batches, shuffle_buffer

    def endless(self, piece: int, pieces: int) -> Iterator[_Example]:
        """Yield the examples of a piece in the epoch's order, over and over."""
        seeds = (self.batches.seed, self.batches.epoch)
        shards = np.random.default_rng(seeds).permutation(self.split.shards)[piece::pieces].tolist()
        for turn in count():
            rng = np.random.default_rng((*seeds, piece, turn))
            examples = _shuffled(self.split.examples(shards), self.shuffle_buffer, rng)
            first = next(examples, None)
            if first is None:
                raise StreamError(f'There are no examples in shards {shards} of the {self.split.name} part.')
            yield first
            yield from examples

    def item(self, place: int, examples: Iterable[_Example]) -> Tuple[torch.Tensor, int]:
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
                first = size * (number if pieces == self.world_size else number // workers)
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
        sharers = self.world_size * workers // pieces
        for example in islice(examples, (self.rank * workers + worker) % sharers, None, sharers):
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
        rank: int = 0,
        world_size: int = 1,
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
    batches = EpochBatches(len(split), batch_size, seed, rank, world_size, accumulate)
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
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of one process's share of a part: every example exactly once over all processes, none padded."""
    return DataLoader(
        _EvalShare(split, transform, rank, world_size),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=keep_worker_alive,
        generator=torch.Generator(),
    )
