"""Names: of networks, their exits, and entries of their pretrained cfg."""
from typing import Any, Dict, List, Sequence, Tuple, Union

import torch.nn as nn

__all__ = ['SUFFIX', 'WEIGHT_KEYS', 'cfg_without_weights', 'exit_names', 'model_name', 'names_tuple', 'times']

SUFFIX = '_sd'

# Where weights of a pretrained cfg come from; a network that gained exits no longer is what lies there.
WEIGHT_KEYS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'custom_load')


def names_tuple(names: Union[None, str, List[str], Tuple[str, ...]]) -> Tuple[str, ...]:
    """Return the names in an entry of a pretrained cfg, which may hold none, one or several."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def model_name(model: nn.Module) -> str:
    """Return what to call a model in messages: its architecture if timm knows it, else its class."""
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


def times(shape: Sequence[int]) -> str:
    """Return a shape as in 3×224×224."""
    return '×'.join(str(n) for n in shape)


def cfg_without_weights(model: nn.Module, architecture: str) -> Dict[str, Any]:
    """Return a copy of a timm model's pretrained cfg under another name that no longer says where weights are."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return dict({k: v for k, v in cfg.items() if k not in WEIGHT_KEYS}, architecture=architecture)


def exit_names(model: nn.Module) -> List[str]:
    """Return the exits' names for tables and columns, shallow to deep, the ensemble last; a single exit has none."""
    return [f'exit{i}' for i in range(model.num_exits)] + ['ensemble'] * (model.num_exits > 1)
