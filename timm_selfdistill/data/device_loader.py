"""Data sets that stay on the device: decoded once to uint8, augmented there in whole batches."""
import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import datasets
import numpy as np
import PIL
import psutil
import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ..run_files import replaced
from .augment import eval_transform
from .device_augment import BatchAugment, normalize, to_device
from .epoch_order import EpochBatches
from .image_data import ImageSplit
from .source import Shard
from .workers import keep_worker_alive, readable

__all__ = ['DeviceEvalLoader', 'DeviceLoader', 'decode_split', 'fits_on_device']

_logger = logging.getLogger(__name__)

LARGE = 5000  # images from which on cache, worker processes and a progress bar pay


def fits_on_device(count: int, input_size: Tuple[int, int, int], device: torch.device) -> bool:
    """Return whether so many images take no more than a quarter of the memory that is free on the device.

    Args:
        count: Images of all parts together.
        input_size: Their channels, height and width in pixels; an eighth of padding on every side is added.
        device: Where they would be.
    """
    channels, height, width = input_size
    size = count * channels * (height + height // 8 * 2) * (width + width // 8 * 2)
    free = torch.cuda.mem_get_info(device)[0] if device.type == 'cuda' else psutil.virtual_memory().available
    return size <= free / 4


class _Pixels(Dataset):
    """Rows of a split as uint8 pixels (H, W, C)."""

    def __init__(self, split: ImageSplit, resize: Callable):
        self.split, self.resize = split, resize

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> torch.Tensor:
        return transforms.functional.pil_to_tensor(self.resize(self.split.image(row))).permute(1, 2, 0)


def _key(split: ImageSplit, options: Dict[str, Any]) -> str:
    """Hash the options and the encoded images, of files their path, size and time of change."""
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for batch in split.images.select(split.index).iter(batch_size=1000):
        for image in batch[split.image_column]:
            data, path = (image['bytes'], image['path']) if image else (b'', None)
            if data is None:
                data = str(path).encode()
                with suppress(OSError):  # decoding names what is missing
                    stat = os.stat(path)
                    data += f' {stat.st_size} {stat.st_mtime_ns}'.encode()
            key.update(len(data).to_bytes(8, 'big') + data)
    return key.hexdigest()


def _read_cache(path: Path, shape: Tuple[int, ...]) -> Optional[torch.Tensor]:
    try:
        if not path.exists():
            return None
        pixels = np.load(path)
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f'it holds {pixels.dtype} {pixels.shape}, expected uint8 {shape}')
        return torch.from_numpy(pixels)
    except (OSError, ValueError, EOFError) as e:
        _logger.warning(f'{path} cannot be used and is made anew: {e}')
        return None


def _write_cache(path: Path, pixels: torch.Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as beside, beside.open('wb') as file:
            np.save(file, pixels.numpy())
    except OSError as e:
        _logger.warning(f'Decoded images are not kept, {path.parent} cannot be written: {e}')


def decode_split(
        split: ImageSplit,
        data_config: Dict[str, Any],
        training: bool = False,
        workers: int = 0,
        cache_dir: Optional[Path] = None,
        progress: bool = False,
) -> torch.Tensor:
    """Decode a split of a data set, resized and cropped as on the way through worker processes.

    Large parts are kept in a cache under a hash of their encoded images and of what is done to them.

    Args:
        split: The split.
        data_config: See `timm.data.resolve_data_config`.
        training: Resize as `augment.train_transform` with `crop='pad'` does, which crops less than for evaluation.
        workers: Processes that decode a large split.
        cache_dir: Folder of the cache; when None beside that of the `datasets` library.
        progress: Show a bar for a large split, if on a terminal.

    Returns:
        Pixels (N, H, W, C), uint8, on the CPU.

    Raises:
        UnreadableImageError: An image cannot be decoded.
    """
    config = dict(data_config, crop_pct=1.0) if training else data_config
    channels, height, width = config['input_size']
    shape = (len(split), height, width, channels)
    large = len(split) >= LARGE
    if large:
        options = {name: config.get(name) for name in ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean')}
        folder = cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / 'timm_selfdistill'
        path = folder / f'{_key(split, dict(options, pillow=PIL.__version__))}.npy'
        pixels = _read_cache(path, shape)
        if pixels is not None:
            return pixels
    resize = transforms.Compose(eval_transform(config).transforms[:2])
    batches = DataLoader(
        _Pixels(split, resize), batch_size=256, num_workers=workers if large else 0, worker_init_fn=keep_worker_alive)
    console = Console()
    hidden = not (progress and large and console.is_terminal)
    pixels, done = torch.empty(shape, dtype=torch.uint8), 0
    for batch in track(readable(batches), f'decode {split.name}', total=len(batches), console=console, transient=True,
                       disable=hidden):
        pixels[done:done + len(batch)] = batch
        done += len(batch)
    if large:
        _write_cache(path, pixels)
    return pixels


class DeviceLoader:
    """Batches of training images that are on the device and are augmented there.

    Which images a step sees, and what becomes of each, are functions of seed and epoch alone, whatever the number of
    processes, the slices of a step and the step that the epoch starts with.

    Args:
        pixels: Decoded images (N, H, W, C), uint8, see `decode_split`.
        labels: Their labels (N,).
        batches: The order; call `batch_sampler.set_epoch` before each epoch.
        augment: What becomes of them; its device is the loader's.

    Iterating gives pairs of images (B, C, H, W), float32, normalised, channels last in memory, and labels (B,), int64.
    """

    def __init__(self, pixels: torch.Tensor, labels: np.ndarray, batches: EpochBatches, augment: BatchAugment):
        self.batch_sampler, self.augment = batches, augment
        self.pixels = augment.pad(pixels.to(augment.device))  # once for all epochs
        self.labels = to_device(labels.astype(np.int64), augment.device)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        batches, augment = self.batch_sampler, self.augment
        seed, epoch = batches.seed, batches.epoch
        order = to_device(batches.order(), augment.device)
        geometry = to_device(augment.draw_geometry(seed, epoch, batches.length), augment.device)
        for places in batches.slices():
            rows = order[places]
            steps = augment.draw_policy(seed, epoch, places)
            yield augment(self.pixels, rows, geometry[places], steps), self.labels[rows]


class DeviceEvalLoader:
    """Batches of one process's share of a split that is on the device: every row once over all processes, none padded.

    Args:
        pixels: Decoded images of the whole split (N, H, W, C), uint8, see `decode_split`.
        labels: Their labels (N,).
        data_config: See `timm.data.resolve_data_config`.
        batch_size: Images of a batch; the last one may have fewer.
        device: Where the share stays.
        shard: The share of this process.

    Iterating gives pairs of images (B, C, H, W), float32, normalised, channels last in memory, and labels (B,), int64.
    """

    def __init__(
            self,
            pixels: torch.Tensor,
            labels: np.ndarray,
            data_config: Dict[str, Any],
            batch_size: int,
            device: torch.device,
            shard: Shard = Shard(),
    ):
        self.pixels = pixels[shard.rank::shard.world_size].to(device)
        self.labels = torch.as_tensor(labels[shard.rank::shard.world_size], dtype=torch.long, device=device)
        self.mean, self.std = (torch.tensor(data_config[k], device=device).view(-1, 1, 1) for k in ('mean', 'std'))
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for pixels, labels in zip(self.pixels.split(self.batch_size), self.labels.split(self.batch_size)):
            yield normalize(pixels, self.mean, self.std), labels
