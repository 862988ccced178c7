"""Registers `<name>_sd` with timm for every name timm has: the same network with auxiliary exits."""
import dataclasses
import sys
import warnings
from collections import deque
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.models import DefaultCfg, PretrainedCfg, build_model_with_cfg, register_model, resolve_pretrained_cfg

from .hub.sources import SOURCES, no_weights, organisation, resolve_weights
from .models import cifar  # noqa: F401  registers networks of its own, which get `_sd` names too
from .models.multi_exit import MultiExit
from .models.names import SUFFIX, WEIGHT_KEYS, times
from .models.stages import ExitSpec
from .models.wrapper import BackboneWrapper, checkpoint_filter_fn

__all__ = ['register_all', 'register_pretrained']

# timm.models.register_model looks here for the cfgs of the names that this module registers.
default_cfgs = {}


def _create_multi_exit(
        base: str,
        pretrained: bool = False,
        exits: ExitSpec = None,
        exit_head: str = 'bottleneck',
        truncate: Optional[int] = None,
        early_exit: Optional[Dict[str, Any]] = None,
        backbone_pretrained: Union[bool, str] = False,
        **kwargs: Any,
) -> nn.Module:
    """Build `<base>_sd`.

    Args:
        base: Name of a timm model.
        pretrained: Load multi-exit weights.
        exits: Where auxiliary exits stand, see `choose_exits`.
        exit_head: Kind of exit head, a name in `EXIT_HEADS`.
        truncate: Number of an exit; gives the network that ends there, see `MultiExit.truncate`.
        early_exit: When images may leave early, as it stands in the `config.json` of calibrated weights.
        backbone_pretrained: Load timm's own weights into the backbone; a string picks their tag.
        **kwargs: What the base model takes.

    Raises:
        RuntimeError: `pretrained` where no multi-exit weights are published.
        ValueError: `exits`, `exit_head`, `truncate`, `early_exit` or `img_size` do not fit the network.
    """
    variant = base + SUFFIX
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise no_weights(variant)
    tag = f'.{backbone_pretrained}' if isinstance(backbone_pretrained, str) else ''
    cache_dir, img_size = kwargs.get('cache_dir'), kwargs.get('img_size')
    if kwargs.get('features_only') and 'out_indices' not in kwargs:
        kwargs['out_indices'] = _default_out_indices(base)

    def build(**model_args: Any) -> nn.Module:
        try:
            backbone = timm.create_model(
                base + tag, pretrained=bool(backbone_pretrained), cache_dir=cache_dir, **model_args)
        except (AssertionError, TypeError, ValueError) as error:
            if img_size is None or (isinstance(error, TypeError) and 'img_size' not in str(error)):
                raise
            raise ValueError(_refused_size(base, img_size, error)) from error
        model = MultiExit(backbone, exits, exit_head, model_args.get('num_classes'), early_exit)
        return model if truncate is None else model.truncate(truncate)

    def fit(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
        _name_layers(model, base)  # which timm looks up next, to adapt the weights to other classes
        return checkpoint_filter_fn(state_dict, model)

    model = build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=fit,
        feature_cfg=dict(feature_cls='getter'),
        **kwargs,
    )
    _name_layers(model, base)
    return model


def _name_layers(model: nn.Module, base: str) -> None:
    """Name the layers of a plain network in its config, which timm made for the one with exits that it was cut from."""
    if not isinstance(model, BackboneWrapper) and 'classifier' in model.pretrained_cfg:
        own = timm.get_pretrained_cfg(base)
        model.pretrained_cfg.update(classifier=own.classifier, first_conv=own.first_conv)


def _default_out_indices(base: str) -> Tuple[int, ...]:
    """Ask the plain network which of its features timm gives by default with `features_only=True`."""
    with torch.device('meta'):
        return tuple(timm.create_model(base, features_only=True).feature_info.out_indices)


def _refused_size(base: str, size: Any, error: Exception) -> str:
    own = times(timm.get_pretrained_cfg(base).input_size[-2:])
    if isinstance(error, TypeError):
        return (
            f'img_size={size!r}: {base} takes no img_size, it runs on images of any size (its own is {own}). '
            f'Leave img_size out.'
        )
    return f'img_size={size!r}: {base} cannot be built for it (its own is {own}): {error}'


def _entrypoint(base: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_multi_exit(base, pretrained, **resolve_weights(base, pretrained, kwargs, _create_multi_exit))

    # under its own name in this module, so that pickle finds it as it finds timm's entry points
    create.__name__ = create.__qualname__ = base + SUFFIX
    create.__doc__ = f'{base} with auxiliary exits.'
    return create


def _default_cfg(base: str) -> PretrainedCfg:
    """Look the cfg up where the model's module declares it: timm.get_pretrained_cfg() would copy all of it, slowly."""
    declared = getattr(sys.modules[timm.model_entrypoint(base).__module__], 'default_cfgs', {}).get(base)
    if isinstance(declared, DefaultCfg):
        return declared.default
    return timm.get_pretrained_cfg(base) or PretrainedCfg()


def register_all() -> None:
    """Register `<name>_sd` for every name that timm has now and that is not registered yet."""
    module = sys.modules[__name__]
    for base in timm.list_models():
        name = base + SUFFIX
        if base.endswith(SUFFIX) or timm.is_model(name):
            continue
        # everything but the weights: they are those of a network without exits
        cfg = dataclasses.replace(_default_cfg(base), architecture=None, **dict.fromkeys(WEIGHT_KEYS))
        default_cfgs[name] = DefaultCfg(tags=deque(['']), cfgs={'': cfg})
        create = _entrypoint(base)
        setattr(module, name, create)
        register_model(create)


def register_pretrained(name: str, source: Optional[str] = None, **cfg: Any) -> None:
    """Register weights, so that `timm.create_model(name, pretrained=True)` finds and `timm.list_pretrained` lists them.

    The first weights of a network are also what its name without a tag gives; those registered without a tag are
    so in any case.

    Args:
        name: Name of the network with a tag, such as `resnet50_sd.byot_cifar100`, or without.
        source: `hf-hub:<org>/<name>`, with `@<revision>` if wanted, or `local-dir:<folder>`. When None the repository
            of that name of the organisation that the environment variable TIMM_SELFDISTILL_ORG names.
        **cfg: What is known of the weights without looking, fields of timm's `PretrainedCfg`.

    Raises:
        ValueError: There is no such network, or no such kind of source.
    """
    variant, _, tag = name.partition('.')
    if variant not in default_cfgs:
        raise ValueError(f'name={name!r}: expected <name>{SUFFIX} or <name>{SUFFIX}.<tag>, <name> being one of timm.')
    kind, _, place = (source or f'hf-hub:{organisation()}/{name}').partition(':')
    where = SOURCES.get(kind)
    if where is None or not place:
        raise ValueError(f'source={source!r}: expected hf-hub:<org>/<name> or local-dir:<folder>.')
    declared = default_cfgs[variant]
    base = dataclasses.replace(declared.default, **dict.fromkeys(WEIGHT_KEYS))
    # as in timm, the network without weights goes from the list where there are some; its name alone means the first
    for name in [t for t in declared.tags if not declared.cfgs[t].has_weights]:
        declared.tags.remove(name)
    declared.cfgs[tag] = dataclasses.replace(base, source=kind, **{where: place}, **cfg)
    if not tag and tag not in declared.tags:
        declared.tags.appendleft(tag)
    elif tag not in declared.tags:
        declared.tags.append(tag)
    declared.is_pretrained = True
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # timm's way to add to an entry is to overwrite it, which it warns of
        register_model(getattr(sys.modules[__name__], variant))


def register_packaged() -> None:
    """Register the weights that come with the package."""
    for folder in sorted((Path(__file__).parent / 'weights').glob('*')):
        register_pretrained(folder.name, f'local-dir:{folder}')


register_all()
register_packaged()
