"""Registers `<name>_sd` with timm for every name timm has: the same network with auxiliary exits."""
import dataclasses
import sys
from collections import deque
from typing import Any, Callable, Union

import timm
from timm.models import DefaultCfg, PretrainedCfg, build_model_with_cfg, register_model, resolve_pretrained_cfg

from .multi_exit import SUFFIX, WEIGHT_KEYS, MultiExit
from .stages import ExitSpec

__all__ = ['register_all']

# timm.models.register_model looks here for the cfgs of the names that this module registers.
default_cfgs = {}


def _create_multi_exit(
        base: str,
        pretrained: bool = False,
        exits: ExitSpec = None,
        exit_head: str = 'bottleneck',
        backbone_pretrained: Union[bool, str] = False,
        **kwargs: Any,
) -> MultiExit:
    """Build `<base>_sd`.

    Args:
        base: Name of a timm model.
        pretrained: Load multi-exit weights.
        exits: Where auxiliary exits stand, see `choose_exits`.
        exit_head: Kind of exit head, a name in `EXIT_HEADS`.
        backbone_pretrained: Load timm's own weights into the backbone; a string picks their tag.
        **kwargs: What the base model takes.

    Raises:
        RuntimeError: `pretrained` where no multi-exit weights are published.
        ValueError: `exits` or `exit_head` do not fit the network.
    """
    variant = base + SUFFIX
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f'No multi-exit weights are published for {variant}. Use backbone_pretrained=True for timm\'s own weights '
            f'in the backbone and new exits, "hf-hub:<org>/<name>" or "local-dir:<folder>" for weights of your own, '
            f'or pretrained=False for random init.'
        )
    tag = f'.{backbone_pretrained}' if isinstance(backbone_pretrained, str) else ''
    cache_dir = kwargs.get('cache_dir')

    def build(**model_args: Any) -> MultiExit:
        backbone = timm.create_model(
            base + tag, pretrained=bool(backbone_pretrained), cache_dir=cache_dir, **model_args)
        return MultiExit(backbone, exits=exits, exit_head=exit_head)

    return build_model_with_cfg(build, variant, pretrained, feature_cfg=dict(feature_cls='getter'), **kwargs)


def _entrypoint(base: str) -> Callable[..., MultiExit]:
    def create(pretrained: bool = False, **kwargs: Any) -> MultiExit:
        return _create_multi_exit(base, pretrained, **kwargs)

    # under its own name in this module, so that pickle finds it as it finds timm's entry points
    create.__name__ = create.__qualname__ = base + SUFFIX
    create.__doc__ = f'{base} with auxiliary exits.'
    return create


def register_all() -> None:
    """Register `<name>_sd` for every name that timm has now and that is not registered yet."""
    module = sys.modules[__name__]
    for base in timm.list_models():
        name = base + SUFFIX
        if base.endswith(SUFFIX) or timm.is_model(name):
            continue
        cfg = timm.get_pretrained_cfg(base) or PretrainedCfg()
        # everything but the weights: they are those of a network without exits
        cfg = dataclasses.replace(cfg, architecture=None, **dict.fromkeys(WEIGHT_KEYS))
        default_cfgs[name] = DefaultCfg(tags=deque(['']), cfgs={'': cfg})
        create = _entrypoint(base)
        setattr(module, name, create)
        register_model(create)


register_all()
