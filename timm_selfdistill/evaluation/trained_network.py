"""What the recipes that measure trained networks share: a checkpoint, and the data to measure it on."""
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Sequence

import numpy as np
import torch
import yaml
from timm.data import resolve_data_config
from torch.utils.data import DataLoader

from ..data.augment import eval_transform
from ..data.image_data import ImageData, ImageSplit, load_image_data
from ..data.source import DataSource
from ..data.unlabelled import load_unlabelled_data
from ..data.unreadable import find_unreadable, leave_out, list_unreadable
from ..data.workers import create_eval_loader
from ..errors import ConfigError, DataError
from ..hub.networks import class_names, load_checkpoint
from ..models.multi_exit import MultiExit

__all__ = [
    'EvaluationConfig', 'SplitConfig', 'TrainedNetwork', 'check_device', 'check_held_out', 'choose_split',
    'list_checkpoints', 'open_network', 'subset',
]


@dataclasses.dataclass
class EvaluationConfig:
    """On which data a network is measured, and where; the recipes add what they need besides."""

    dataset: Optional[str] = None
    """As in train.py. What the run was trained on when neither this nor --data-dir is given."""
    data_dir: Optional[str] = None
    """As in train.py."""
    image_column: Optional[str] = None
    """As in train.py."""
    label_column: Optional[str] = None
    """As in train.py."""
    skip_unreadable: bool = False
    """Go on without the images that cannot be read; a list of them goes to the error output."""
    batch_size: int = 256
    """Images at a time."""
    workers: int = 0
    """Loader processes."""
    device: str = 'cuda' if torch.cuda.is_available() else 'cpu'
    """Where to compute."""


@dataclasses.dataclass
class SplitConfig(EvaluationConfig):
    """On which split of the data as well."""

    split: Optional[Literal['train', 'validation', 'test']] = None
    """Part of the data; when None the test split, or validation, or what there is where there is neither."""


@dataclasses.dataclass
class TrainedNetwork:
    """A checkpoint, opened.

    Attributes:
        model: The network, in eval mode on the device asked for.
        data: The data to measure it on.
        data_config: Its preprocessing, see `timm.data.resolve_data_config`.
        config: What it was opened with.
    """
    model: MultiExit
    data: ImageData
    data_config: Dict[str, Any]
    config: EvaluationConfig

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    def batches(self, split: ImageSplit) -> DataLoader:
        """Return a loader of a split of the data, preprocessed as the network expects.

        With `config.skip_unreadable` the images that cannot be read are taken out of the split first.
        """
        if self.config.skip_unreadable and not split.checked:
            found = find_unreadable(split, self.config.workers, progress=True)
            leave_out(split, found, self.data.label_names)
            list_unreadable(found, partial(print, file=sys.stderr))
        return create_eval_loader(
            split, eval_transform(self.data_config), self.config.batch_size, self.config.workers)


def open_network(
        checkpoint: str,
        config: EvaluationConfig,
        superclass_column: Optional[str] = None,
        other_classes: bool = False,
        unlabelled: bool = False,
) -> TrainedNetwork:
    """Open a checkpoint and the data to measure it on, those it was trained on unless others are asked for.

    Args:
        checkpoint: See `hub.networks.load_checkpoint`.
        config: Which data, and where to compute.
        superclass_column: See `data.source.DataSource`.
        other_classes: Allow classes that the network does not know, where its classifiers are not used.
        unlabelled: Allow images without labels, where the network was trained on such.

    Labels get the numbers that their classes have in the network, by name; what was found is printed to stderr.

    Raises:
        DataError: The data cannot be used, or have classes that the network does not know, or the checkpoint does not
            say on what it was trained and the config does not either.
        ConfigError: See `hub.networks.load_checkpoint` and `check_device`, or a number is out of range.
    """
    for option, value, least in (('batch_size', config.batch_size, 1), ('workers', config.workers, 0)):
        if value < least:
            raise ConfigError(f'`{option}={value}`: expected {least} or more.')
    check_device(config.device)
    model, folder = load_checkpoint(checkpoint)
    source = {name: getattr(config, name) for name in ('dataset', 'data_dir', 'image_column', 'label_column')}
    source['superclass_column'] = superclass_column
    args = folder / 'args.yaml' if folder else None
    trained = yaml.safe_load(args.read_text(encoding='utf-8')) if args is not None and args.is_file() else None
    if not (config.dataset or config.data_dir):
        if trained is None:
            raise DataError(f'`checkpoint={checkpoint}` does not say on what it was trained; pass `dataset`.')
        source = {name: value if value is not None else trained.get(name) for name, value in source.items()}
        source.update(val_fraction=trained.get('val_fraction', 0.), unlabelled=trained.get('unlabelled', False))
        if source['unlabelled'] and not unlabelled:
            raise DataError(
                f'`checkpoint={checkpoint}`: it was trained on images without labels, and labels are needed here; pass '
                f'`data_dir` with images that have some.'
            )
    elif trained is not None and _same_data(source, trained):
        source['val_fraction'] = trained.get('val_fraction', 0.)  # what was held out from training
    elif not other_classes:
        source['val_fraction'] = 0.  # nothing was learned from these data, so nothing of them has to be held out
    data_config = resolve_data_config(model=model)
    classes = {} if other_classes else dict(num_classes=model.num_classes, class_names=class_names(model))
    images = DataSource(
        in_chans=data_config['input_size'][0], skip_unreadable=config.skip_unreadable, **source, **classes)
    data = load_unlabelled_data(images) if images.unlabelled else load_image_data(images, known=not other_classes)
    for line in data.described():
        print(line, file=sys.stderr)
    return TrainedNetwork(model.to(config.device), data, data_config, config)


def _same_data(source: Dict[str, Optional[str]], trained: Dict[str, Any]) -> bool:
    """Return whether a data set is the one that a run was trained on."""
    if source['dataset'] != trained.get('dataset') or None in (source['data_dir'], trained.get('data_dir')):
        return source['dataset'] == trained.get('dataset') and source['data_dir'] == trained.get('data_dir')
    return Path(source['data_dir']).resolve() == Path(trained['data_dir']).resolve()


def check_device(name: str) -> None:
    """Raise ConfigError for a device that this machine does not have."""
    try:
        torch.empty(1, device=name).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as e:  # no such kind, no driver, or no such number
        problem = str(e).splitlines()[0].rstrip('.')
        raise ConfigError(f'`device={name}`: {problem}. `device=cpu` is always there.') from e


def choose_split(data: ImageData, split: Optional[str] = None) -> str:
    """Return the name of the split to measure on: the one asked for, else test, else validation, else train.

    The last one only where the data are not those that the network was trained on: of these some images are held out.

    Raises:
        DataError: The data have no such split.
    """
    parts = data.splits()
    split = split or next(name for name in ('test', 'validation', 'train') if name in parts)
    if split not in parts:
        raise DataError(f'`split={split}`: {data.name} has only the splits {", ".join(parts)}.')
    return split


def check_held_out(network: TrainedNetwork, test: bool = True) -> None:
    """Check that there are images to choose on that nothing was learned from, and others to measure on.

    Args:
        network: The network and its data.
        test: Ask for images to measure on, too.

    Raises:
        DataError: There are none.
    """
    data = network.data
    if data.validation is None:
        raise DataError(
            f'{data.name} has no validation split of its own to choose on, and the network may have learned from its '
            f'train split. Train with `val_fraction`, or pass `data_dir` with data that have a validation split.'
        )
    if test and data.test is None:
        raise DataError(f'{data.name} has no test split to measure on. Pass `data_dir` with data that have one.')


def subset(split: ImageSplit, images: Optional[int], seed: int = 0) -> ImageSplit:
    """Draw images from a split of the data, of every class its share; the whole split when there are no more, or None.

    Raises:
        ConfigError: Fewer than one image is asked for.
    """
    if images is None or images >= len(split):
        return split
    if images < 1:
        raise ConfigError(f'`images={images}`: expected 1 or more.')
    order = np.random.default_rng(seed).permutation(len(split))
    labels = split.labels[order]
    counts = np.unique(labels, return_counts=True)[1]
    # how far down its class an image stands, 0 to 1: the same number of images above a line is drawn from each
    depth = np.empty(len(order))
    depth[np.argsort(labels, kind='stable')] = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    drawn = order[np.argsort(depth, kind='stable')[:images]]
    return split.select(np.sort(drawn), split.name)


def list_checkpoints(checkpoints: Sequence[str]) -> List[str]:
    """Put the runs `generation0`, `generation1`, ... in place of a folder that holds such."""
    found: List[str] = []
    for checkpoint in checkpoints:
        generations = [
            p for p in Path(checkpoint).glob('generation*') if p.is_dir() and p.name[len('generation'):].isdigit()
        ]
        generations.sort(key=lambda p: int(p.name[len('generation'):]))
        found += map(str, generations) if generations else [checkpoint]
    return found
