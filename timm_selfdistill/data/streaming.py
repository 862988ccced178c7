"""Data sets that are read as they come, from the Hub or from files.

Nothing is prepared on disk: a split is a stream of encoded images, whose shards can be read independently. What has to
be known before training (columns, classes, how many images make an epoch) is read from the features and file headers.
`streamed_loader` makes batches of it.
"""
from itertools import chain, count
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import datasets
import pyarrow.parquet as pq
import torch

from ..errors import DataError, StreamError, UnreadableImageError
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
from .image_data import ImageData, first_image
from .images import decode_image, printable
from .labels import Classes, find_classes, shortened, speller
from .source import DataSource
from .unreadable import SkippedImages, Unreadable

__all__ = ['Example', 'SizedStreamedSplit', 'StreamedSplit', 'load_streamed_data']

# Encoded image, label, number of the shard, number of the example in it.
Example = Tuple[Any, Any, int, int]


class StreamedSplit:
    """One split of a streamed data set; a `SizedStreamedSplit` where its length is known.

    Args:
        stream: Stream of examples with an image and a label column.
        name: What to call the split in messages.
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
        self.spell = speller(stream.features[label_column], label_column, f'the {name} split')
        self.classes, self.mode = classes, mode
        self.skipped: Optional[SkippedImages] = None

    def examples(self, shards: Iterable[int]) -> Iterator[Example]:
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
                raise StreamError(f'Cannot read on in shard {shard} of the {self.name} split: {reason}') from e

    def skip(self, example: Example, error: UnreadableImageError) -> None:
        """Go on after an image that cannot be read.

        Raises:
            UnreadableImageError: It is not to be skipped.
        """
        if self.skipped is None:
            raise error
        _, _, shard, row = example
        place = f'example {row} of shard {shard}'
        self.skipped.note(Unreadable(self.name, place, error.path or '', error.reason))

    def _where(self, example: Example) -> str:
        image, _, shard, row = example
        path = f' ({printable(image["path"])})' if image and image['path'] else ''
        return f'example {row} of shard {shard} of the {self.name} split{path}'

    def image(self, example: Example):
        """Decode an example's image.

        Raises:
            UnreadableImageError: It cannot be decoded; the message names shard and example, counted from 0.
        """
        return decode_image(example[0], self.mode, f'in {self._where(example)}')

    def item(self, example: Example, transform: Callable) -> Tuple[torch.Tensor, int]:
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
    """A split that knows its length.

    Args:
        length: Examples of the split; of the training split those that count as an epoch.
    """

    def __init__(self, *args, length: int):
        super().__init__(*args)
        self.length = length

    def __len__(self) -> int:
        return self.length


def _length(stream: datasets.IterableDataset, part: str, files: List[str]) -> Optional[int]:
    """Return the length of a split by the data set's description, or by its files where they are parquet and here."""
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


def load_streamed_data(source: DataSource = DataSource()) -> ImageData:
    """Open a data set of labelled images without copying or reading it; see `image_data.load_image_data`.

    Nothing is held out of the train split. What is wrong with an example shows when it is met. A test split whose
    first label is -1 counts as one whose labels are withheld, as the Hub marks them.

    Args:
        source: What to read. With `skip_unreadable` images that cannot be read are skipped when they are met.

    Returns:
        The data set; its splits are streams, of which the train split at least knows its length.

    Raises:
        DataError: The data cannot be reached, columns are missing or ambiguous, the number of classes or of training
            examples is not known, or there is no train split.
        UnreadableImageError: The first training image cannot be decoded.
    """
    name, files = source.name, find_files(source.dataset, source.data_dir)
    streams, lengths = _open_streams(files)
    notes = files.notes
    if 'train' not in streams:
        raise DataError(f'{name} has no split named train; its splits are: {", ".join(streams)}.')
    features = streams['train'].features
    if features is None:
        raise DataError(f'{name} does not say what its columns hold, so that it cannot be streamed.')
    image_column, label_column = choose_columns(
        features, source.image_column, source.label_column, name, notes)
    for split, stream in list(streams.items()):
        missing = {image_column, label_column}.difference(stream.features or features)
        if missing:
            raise DataError(
                f'The {split} split of {name} has no column {sorted(missing)[0]}; its columns are: '
                f'{", ".join(stream.features)}. Give it the column, or remove the split from the data.'
            )
        if lengths[split] == 0:
            raise DataError(empty_split(split, name))
        if not isinstance(stream.features[image_column], datasets.Image) and is_image_feature(
                stream.features[image_column]):
            streams[split] = stream.cast_column(image_column, datasets.Image())
    classes = _stream_classes(features[label_column], label_column, name, source, files)
    lengths['train'] = source.images_per_epoch or lengths['train']
    if lengths['train'] is None:
        raise DataError(
            f'`images_per_epoch`: how many training images {name} has is not known; pass how many count as an epoch.')

    def part(split: str) -> Optional[StreamedSplit]:
        if split not in streams:
            return None
        args = (streams[split], split, image_column, label_column, classes, 'L' if source.in_chans == 1 else 'RGB')
        return StreamedSplit(*args) if lengths[split] is None else SizedStreamedSplit(*args, length=lengths[split])

    train, validation, test = part('train'), part('validation'), part('test')
    if test is not None and next(test.examples(range(test.shards)), (None, None))[1] == -1:
        test = None
        notes.append('left aside: the test split, as its first label is -1, which stands for withheld')
    examples = train.examples(range(train.shards))
    first = next(examples, None)
    if first is None:
        raise DataError(empty_split('train', name))
    width, height = first_image(train.image, chain([first], examples), source.skip_unreadable).size
    if source.skip_unreadable:
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
        source: DataSource,
        files: Files,
) -> Classes:
    """Find the classes of a stream: those of its feature, or of its parquet files, whose labels are quickly read.

    Raises:
        DataError: They cannot be known before the stream has been read.
    """
    if source.class_names is not None:
        return Classes(source.class_names, source.num_classes, 'the network')
    spell = speller(feature, column, name)
    if isinstance(feature, datasets.ClassLabel) or feature.dtype == 'bool':
        return find_classes(feature, [spell(False)], column)[0]
    if source.num_classes is not None and not feature.dtype.startswith(('string', 'large_string')):
        return Classes(None, source.num_classes)
    if files.kind == 'parquet' and files.data_files and 'train' in files.data_files:
        columns = (pq.read_table(file, columns=[column])[0] for file in files.data_files['train'])
        values = {value for labels in columns for value in labels.unique().to_pylist()}
        keys = [key for key in map(spell, values) if key is not None]
        if keys:
            classes, told = find_classes(feature, keys, column, source.num_classes)
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
