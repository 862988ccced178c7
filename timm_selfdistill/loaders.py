"""Where a run's batches come from: workers, the device's memory, or a stream."""
from typing import Any, Dict, Iterable, Iterator

from accelerate import Accelerator

from .augment import eval_transform, train_transform
from .config import TrainConfig
from .data import DataError, ImageData, ImageSplit, create_eval_loader, create_train_loader, load_image_data

__all__ = ['Loaders', 'WorkerDiedError', 'open_data', 'readable']


class WorkerDiedError(DataError):
    """A loader's worker process was killed."""

    local = True  # of several processes only the one it belonged to knows


def open_data(config: TrainConfig, accelerator: Accelerator) -> ImageData:
    """Open the data that a config names, the main process first, so that it alone prepares them on disk.

    Raises:
        DataError: See `data.load_image_data`.
    """
    with accelerator.main_process_first():
        return load_image_data(
            config.dataset, config.data_dir, config.image_column, config.label_column, config.val_fraction,
            config.in_chans, config.superclass_column,
        )


def readable(batches: Iterable) -> Iterator:
    """Pass batches on; raise what went wrong in a worker as it would have been raised here.

    Raises:
        DataError: An image or a label cannot be used.
        WorkerDiedError: A worker process was killed.
    """
    try:
        yield from batches
    except DataError as e:
        text = str(e)
        if text.startswith('Caught '):  # torch puts the worker's whole traceback there; its last line is the message
            raise type(e)(text.rstrip().splitlines()[-1].partition(': ')[2]) from None
        raise
    except RuntimeError as e:
        if 'DataLoader worker' not in str(e):
            raise
        raise WorkerDiedError(
            f'A loader process died: {e} Often the memory was full: fewer --workers need less of it.') from e


class Loaders:
    """Makes the loaders of a run.

    Args:
        config: The settings.
        data: The data.
        data_config: Preprocessing of the network, see `build.build_model`.
        accelerator: Knows device and processes.
    """

    def __init__(self, config: TrainConfig, data: ImageData, data_config: Dict[str, Any], accelerator: Accelerator):
        self.config = config
        self.data = data
        self.data_config = data_config
        self.accelerator = accelerator
        small = max(data.image_size) <= data_config['input_size'][-1]
        self.crop = config.crop or ('pad' if small else 'rrc')

    def _shared(self) -> Dict[str, Any]:
        on_cpu = self.accelerator.device.type == 'cpu'
        workers = self.config.workers
        return dict(
            workers=workers if workers is not None else 0 if on_cpu else 4,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            pin_memory=not on_cpu,
        )

    def train(self) -> Iterable:
        """Return the loader of training batches; its `batch_sampler` knows the number of steps of an epoch."""
        config, data = self.config, self.data
        transform = train_transform(
            self.data_config,
            crop=self.crop,
            hflip=config.hflip if config.hflip is not None else 0.5 if data.mirrored else 0.,
            scale=config.scale,
            color_jitter=config.color_jitter,
            auto_augment=config.aa,
            re_prob=config.reprob,
            cutout=config.cutout,
        )
        return create_train_loader(
            data.train, transform, config.batch_size, config.seed, accumulate=config.grad_accum_steps,
            **self._shared())

    def evaluation(self, split: ImageSplit) -> Iterable:
        """Return the loader of this process's share of a part."""
        batch_size = max(1, self.config.batch_size // self.accelerator.num_processes)
        return create_eval_loader(split, eval_transform(self.data_config), batch_size, **self._shared())
