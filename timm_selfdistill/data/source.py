"""What images to read, and which share of them falls to a process."""
from dataclasses import dataclass
from typing import Optional, Sequence

from ..config import TrainConfig
from ..errors import DataError
from ..publishing import data_name

__all__ = ['DataSource', 'Shard']


@dataclass(frozen=True)
class DataSource:
    """A data set of labelled images.

    Args:
        dataset: `digits`, a Hugging Face Hub id, or a loader of the `datasets` library such as `imagefolder`. Found
            out from the files when None and `data_dir` is given, else `digits`.
        data_dir: Local folder with parquet or arrow files, a saved data set, or images in one folder a class, see
            `image_folder`.
        image_column: Which column holds the images; read from the features when None.
        label_column: Which column holds the labels; read from the features when None.
        superclass_column: Which column holds the superclass of the label; None where none is needed.
        val_fraction: Share of the training images held out for validation where the data set has no such split; 0
            holds out nothing, as streams always do.
        in_chans: Channels that images are converted to: 3, colour, or 1, grey.
        num_classes: Classes that a network has, or is to have; None where the data decide. Streams need it where the
            labels are plain whole numbers.
        class_names: Names of the classes that a network knows. Labels are given the numbers of these.
        images_per_epoch: Training images of a stream that count as an epoch; all of them when None, where their number
            is known.
        skip_unreadable: Images that cannot be read are left out.
        unlabelled: Any image below `data_dir` belongs to it, and there are no labels.

    Raises:
        DataError: A number is out of range.

    Examples:
        >>> DataSource(data_dir='photos/pets').name
        'pets'
    """
    dataset: Optional[str] = None
    data_dir: Optional[str] = None
    image_column: Optional[str] = None
    label_column: Optional[str] = None
    superclass_column: Optional[str] = None
    val_fraction: float = 0.1
    in_chans: int = 3
    num_classes: Optional[int] = None
    class_names: Optional[Sequence[str]] = None
    images_per_epoch: Optional[int] = None
    skip_unreadable: bool = False
    unlabelled: bool = False

    def __post_init__(self):
        if not 0 <= self.val_fraction < 1:
            raise DataError(f'`val_fraction={self.val_fraction}`: expected 0 or more and less than 1.')

    @property
    def name(self) -> str:
        """What the data are called."""
        return data_name(self.dataset, self.data_dir)

    @classmethod
    def of_run(cls, config: TrainConfig, class_names: Optional[Sequence[str]] = None) -> 'DataSource':
        """Return the data that a run trains on.

        Args:
            config: The settings of the run.
            class_names: Names of the classes that its network knows already, such as those of a run to resume.
        """
        shared = {name: getattr(config, name) for name in cls.__dataclass_fields__ if name != 'class_names'}
        return cls(class_names=class_names, **shared)


@dataclass(frozen=True)
class Shard:
    """The share of the work that falls to one of several processes.

    Args:
        rank: Number of this process.
        world_size: Number of processes.

    Examples:
        >>> list(Shard(1, 3).rows(8))
        [1, 4, 7]
    """
    rank: int = 0
    world_size: int = 1

    def rows(self, count: int) -> range:
        """Return the rows of this process: every row falls to exactly one of them."""
        return range(self.rank, count, self.world_size)
