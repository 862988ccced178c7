"""Multi-exit, self-distilled networks for any timm model. Importing registers `<name>_sd` with timm."""
import importlib
from typing import TYPE_CHECKING, Any

from . import registry
from .models import cifar
from .models.heads import EXIT_HEADS
from .models.multi_exit import MultiExit, add_exits
from .models.stages import Stage, choose_exits, find_stages
from .models.wrapper import checkpoint_filter_fn
from .registry import register_pretrained
from .version import __version__

if TYPE_CHECKING:
    from . import losses
    from .config import TrainConfig
    from .inference.early_exit import EarlyExit
    from .tasks import DistillationConfig, SelfDistillationTask
    from .training.trainer import train

__all__ = [
    'EXIT_HEADS',
    'DistillationConfig',
    'EarlyExit',
    'MultiExit',
    'SelfDistillationTask',
    'Stage',
    'TrainConfig',
    '__version__',
    'add_exits',
    'checkpoint_filter_fn',
    'choose_exits',
    'cifar',
    'find_stages',
    'losses',
    'register_pretrained',
    'registry',
    'train',
]

# What is imported when it is asked for: training and deployment bring libraries along that a network does not need.
_LAZY = {
    'DistillationConfig': 'tasks', 'EarlyExit': 'inference.early_exit', 'SelfDistillationTask': 'tasks',
    'TrainConfig': 'config', 'train': 'training.trainer',
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f'.{_LAZY[name]}', __name__), name)
    if name == 'losses':
        return importlib.import_module('.losses', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list:
    return sorted({*globals(), *__all__})
