"""Multi-exit, self-distilled networks for any timm model. Importing registers `<name>_sd` with timm."""
from typing import Any

from . import registry
from .models import cifar
from .models.heads import EXIT_HEADS
from .models.multi_exit import MultiExit, add_exits
from .models.stages import Stage, choose_exits, find_stages
from .models.wrapper import checkpoint_filter_fn
from .registry import register_pretrained
from .version import __version__

__all__ = [
    'EXIT_HEADS',
    'EarlyExit',
    'MultiExit',
    'Stage',
    '__version__',
    'add_exits',
    'checkpoint_filter_fn',
    'choose_exits',
    'cifar',
    'find_stages',
    'register_pretrained',
    'registry',
]


def __getattr__(name: str) -> Any:
    if name == 'EarlyExit':  # brings timm's tasks along, a third of the time of importing all the rest
        from .inference.early_exit import EarlyExit
        return EarlyExit
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
