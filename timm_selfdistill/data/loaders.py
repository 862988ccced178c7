"""Where a run's batches come from: workers, the device's memory, or a stream."""
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..config import TrainConfig
from ..errors import ConfigError
from ..run_files import UNREADABLE
from .augment import eval_transform, train_transform
from .device_augment import BatchAugment, supports
from .device_loader import DeviceEvalLoader, DeviceLoader, decode_split, fits_on_device
from .epoch_order import EpochBatches
from .image_data import ImageData, ImageSplit, load_image_data
from .source import DataSource, Shard
from .streamed_loader import create_streamed_eval_loader, create_streamed_train_loader
from .streaming import load_streamed_data
from .unlabelled import load_unlabelled_data
from .unreadable import Unreadable, find_unreadable, leave_out, read_unreadable
from .workers import create_eval_loader, create_train_loader

__all__ = ['Loaders', 'leave_out_unreadable', 'open_data', 'shard_of']


def shard_of(accelerator: Accelerator) -> Shard:
    """Return the share of this process."""
    return Shard(accelerator.process_index, accelerator.num_processes)


def open_data(
        config: TrainConfig,
        accelerator: Accelerator,
        class_names: Optional[Sequence[str]] = None,
) -> ImageData:
    """Open the data that a config names, the main process first, so that it alone prepares them on disk.

    Args:
        config: The settings.
        accelerator: Knows the processes.
        class_names: Names of the classes in the order of their numbers, such as those of a run to go on with.

    Raises:
        DataError: See `data.load_image_data` and `streaming.load_streamed_data`.
    """
    source = DataSource.of_run(config, class_names)
    with accelerator.main_process_first():
        if config.unlabelled:
            return load_unlabelled_data(source)
        return load_streamed_data(source) if config.streaming else load_image_data(source)


def leave_out_unreadable(data: ImageData, accelerator: Accelerator, folder: Path) -> List[Unreadable]:
    """Take the images that cannot be read out of every split, the same ones in every process; return them.

    What is held out for validation has been before: it is what it would be without them, less those among them. A run
    that goes on leaves out what it began without, a generation what the first one did.

    Args:
        data: The data.
        accelerator: Each of its processes looks through its share.
        folder: That of the run.

    Raises:
        DataError: Nothing is left of a split, or of a class of the training split.
    """
    files = [folder / UNREADABLE, folder.parent / 'generation0' / UNREADABLE]
    known = next((found for found in map(read_unreadable, files) if found is not None), None)
    images, = broadcast_object_list([known])
    if images is None:
        shard = shard_of(accelerator)
        workers = max(1, torch.get_num_threads())
        images = gather_object([
            image for split in data.splits().values()
            for image in find_unreadable(split, workers, shard, accelerator.is_main_process)
        ])
        images.sort(key=lambda image: (image.split, len(image.place), image.place))
    for split in data.splits().values():
        leave_out(split, images, data.label_names)
    return images


class Loaders:
    """Makes the loaders of a run.

    Args:
        config: The settings.
        data: The data.
        data_config: Preprocessing of the network, see `build.build_model`.
        accelerator: Knows device and processes.

    Attributes:
        kind: Where batches are made: `device`, `workers` or `stream`.

    Raises:
        ConfigError: `--loader device` was asked for and cannot be had.
    """

    def __init__(self, config: TrainConfig, data: ImageData, data_config: Dict[str, Any], accelerator: Accelerator):
        self.config = config
        self.data = data
        self.data_config = data_config
        self.accelerator = accelerator
        small = max(data.image_size) <= data_config['input_size'][-1]
        self.crop = config.crop or ('pad' if small else 'rrc')
        self.augment = dict(
            hflip=config.hflip if config.hflip is not None else 0.5 if data.mirrored else 0.,
            auto_augment=config.aa,
            re_prob=config.reprob,
            cutout=config.cutout,
        )
        if config.streaming:
            self.kind = 'stream'
        else:
            obstacle = 'asked for' if config.loader == 'workers' else self._obstacle()
            self.kind = 'device' if obstacle is None else 'workers'
            if obstacle and config.loader == 'device':
                raise ConfigError(f'`loader=device`: {obstacle}; pass `loader=workers`.')
        self._resident: Dict[str, DeviceEvalLoader] = {}

    def _obstacle(self) -> Optional[str]:
        """Return why batches cannot be made on the device, None if they can."""
        config = self.config
        if not supports(self.crop, config.color_jitter, config.aa):
            recipe = f'`crop={self.crop}`, `aa={config.aa}`, `color_jitter={config.color_jitter:g}`'
            return f'what {recipe} ask for is not done there'
        if config.aa is not None and self.accelerator.device.type == 'mps':
            return f'`aa={config.aa}` needs float64, which {self.accelerator.device} does not have'
        count = sum(len(part) for part in self.data.splits().values())
        if not fits_on_device(count, self.data_config['input_size'], self.accelerator.device):
            return f'{count:,} images do not fit into a quarter of the free memory of {self.accelerator.device}'
        return None

    def _shared(self) -> Dict[str, Any]:
        on_cpu = self.accelerator.device.type == 'cpu'
        workers = self.config.workers
        return dict(
            workers=workers if workers is not None else 0 if on_cpu else 4,
            shard=shard_of(self.accelerator),
            pin_memory=not on_cpu,
        )

    def _decode(self, split: ImageSplit, training: bool = False) -> torch.Tensor:
        main = self.accelerator.is_main_process
        with self.accelerator.main_process_first():  # the others find what it has decoded
            workers = max(1, torch.get_num_threads())
            return decode_split(split, self.data_config, training, workers=workers, progress=main)

    def train(self) -> Iterable:
        """Return the loader of training batches; its `batch_sampler` knows the number of steps of an epoch."""
        config, split, shared = self.config, self.data.train, self._shared()
        if self.kind == 'device':
            batches = EpochBatches(
                len(split), config.batch_size, config.seed, shared['shard'], config.grad_accum_steps,
            )
            augment = BatchAugment(self.data_config, self.accelerator.device, **self.augment)
            return DeviceLoader(self._decode(split, training=True), split.labels, batches, augment)
        transform = train_transform(
            self.data_config, crop=self.crop, scale=config.scale, color_jitter=config.color_jitter, **self.augment)
        create = create_streamed_train_loader if self.kind == 'stream' else create_train_loader
        return create(
            split, transform, config.batch_size, config.seed, accumulate=config.grad_accum_steps, **shared)

    def evaluation(self, split: ImageSplit) -> Iterable:
        """Return the loader of this process's share of a split."""
        batch_size = max(1, self.config.batch_size // self.accelerator.num_processes)
        shared = self._shared()
        if self.kind == 'device':
            if split.name not in self._resident:
                self._resident[split.name] = DeviceEvalLoader(
                    self._decode(split), split.labels, self.data_config, batch_size, self.accelerator.device,
                    shared['shard'],
                )
            return self._resident[split.name]
        create = create_streamed_eval_loader if self.kind == 'stream' else create_eval_loader
        return create(split, eval_transform(self.data_config), batch_size, **shared)
