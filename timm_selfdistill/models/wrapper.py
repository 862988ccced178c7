"""timm's model contract for a module that holds a timm model."""
from typing import Any, Callable, Dict, Set, Tuple

import torch
import torch.nn as nn
from timm.models import get_model_input_config, group_parameters

from .names import model_name, names_tuple, times

__all__ = ['GATES', 'BackboneWrapper', 'checkpoint_filter_fn', 'nested_group_matcher']

GATES = 'exit_gates.'  # how the names of an exit rule's weights begin


def nested_group_matcher(owner: nn.Module, child: str, coarse: bool) -> Callable[[str], int]:
    """Return a matcher for layer-wise learning rates: the layers of one timm model, the rest of its owner the last.

    Args:
        owner: Module that holds the model.
        child: Name of the model in it.
        coarse: See timm's `group_matcher`.
    """
    model = getattr(owner, child)
    layers = {
        f'{child}.{name}': layer
        for name, layer in group_parameters(model, model.group_matcher(coarse=coarse), reverse=True).items()
    }
    last = max(layers.values(), default=0)
    return lambda name: layers.get(name, last)


def _of_backbone(name: str) -> property:
    # where the backbone has no such attribute the wrapper has none either, so that hasattr() tells the truth
    return property(lambda self: getattr(self.backbone, name), doc=f'`{name}` of the backbone.')


class BackboneWrapper(nn.Module):
    """A module around a timm model that is a timm model itself.

    A subclass says what its `classifiers` and `wrapper_args` are and sets `pretrained_cfg` at the end of its
    constructor; what else is its own it overrides, the rest is the backbone's.

    Args:
        backbone: A timm model. It is held, not copied.

    Attributes:
        backbone: The plain timm model.
        pruned: Whether parts of the backbone are gone, so that a checkpoint of the plain network holds more.
    """

    pruned = False
    num_features = _of_backbone('num_features')
    feature_info = _of_backbone('feature_info')
    feature_dim = _of_backbone('feature_dim')
    output_fmt = _of_backbone('output_fmt')
    set_input_size = _of_backbone('set_input_size')

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def explain_refusal(self, x: torch.Tensor, error: Exception) -> None:
        """Raise an error that says which images the backbone takes, if it failed on the shape of these (N, C, H, W).

        Raises:
            ValueError: Their channels or size are not those that the backbone was built for.
        """
        config = get_model_input_config(self.backbone)
        given, own = tuple(x.shape[1:]), tuple(config['input_size'])
        # networks without a fixed size assert what they need of it; any other error is about something else
        about_shape = isinstance(error, AssertionError) or config['fixed_input_size'] or given[:1] != own[:1]
        if given != own and about_shape and not isinstance(error, torch.OutOfMemoryError):
            raise ValueError(
                f'{model_name(self)} cannot take images of {times(given)} (channels, height, width), it was built for '
                f'{times(own)}: {error}'
            ) from error

    def classifiers(self) -> Tuple[str, ...]:
        """Names of the layers whose shape depends on the number of classes."""
        raise NotImplementedError

    def wrapper_args(self) -> Dict[str, Any]:
        """Arguments of `timm.create_model` that rebuild the wrapper, beyond those that rebuild its backbone."""
        raise NotImplementedError

    @property
    def head_hidden_size(self) -> int:
        return getattr(self.backbone, 'head_hidden_size', self.backbone.num_features)

    @property
    def in_chans(self) -> int:
        return get_model_input_config(self.backbone)['input_size'][0]

    @property
    def pretrained_cfg(self) -> Dict[str, Any]:
        return self._pretrained_cfg

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: Dict[str, Any]) -> None:
        # Changed in place: timm's load_pretrained() goes on with the dict that its builder assigned here, and adapts
        # to other classes or channels just those tensors which the cfg names.
        cfg['classifier'] = self.classifiers()
        cfg['first_conv'] = self._traits['first_conv']
        self._pretrained_cfg = self.default_cfg = cfg

    # What timm's factory and builder know of a model after they made it. They made the backbone with the same
    # arguments, and it is the backbone that keeps them up to date, so theirs for the wrapper are not stored.

    @property
    def _traits(self) -> Dict[str, Any]:
        traits = getattr(self.backbone, '_traits', {})
        cfg = getattr(self.backbone, 'pretrained_cfg', None) or {}
        first_conv = names_tuple(traits.get('first_conv', cfg.get('first_conv')))
        return dict(traits, first_conv=tuple(f'backbone.{n}' for n in first_conv) or None)

    @_traits.setter
    def _traits(self, traits: Dict[str, Any]) -> None:
        pass

    @property
    def _model_args(self) -> Dict[str, Any]:
        return dict(getattr(self.backbone, '_model_args', {}), **self.wrapper_args())

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        pass

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def fit_state_dict(self, state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Return a checkpoint in this model's keys: one of the plain network goes to the backbone.

        What is not the backbone's then keeps the weights it has. Gates of an exit rule that the model has not got are
        left out.
        """
        if not getattr(self, 'exit_gates', None):
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(GATES)}
        if not state_dict or any(k.startswith(('backbone.', 'exit_heads.')) for k in state_dict):
            return state_dict
        own = self.state_dict()
        fitted = {f'backbone.{k}': v for k, v in state_dict.items()}
        if self.pruned:
            fitted = {k: v for k, v in fitted.items() if k in own}
        return dict(fitted, **{k: v for k, v in own.items() if not k.startswith('backbone.')})

    def _load_from_state_dict(self, state_dict: Dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        given = {k[len(prefix):]: state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
        state_dict.update({prefix + k: v for k, v in self.fit_state_dict(given).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- what is the backbone's own -----------------------------------------------------------------------------------

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone.forward_features(x)

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any):
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    def no_weight_decay(self) -> Set[str]:
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else ()
        return {f'backbone.{n}' for n in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layers for layer-wise learning rates: the backbone's own, then one for everything else."""
        return nested_group_matcher(self, 'backbone', coarse)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint of a plain, a multi-exit or a truncated network to a model; a filter as timm's loaders take.

    `timm.models.load_checkpoint(plain_model, path, filter_fn=checkpoint_filter_fn)` loads the backbone of a multi-exit
    checkpoint into the plain network. Wrapped models fit what they are given by themselves.

    Args:
        state_dict: Tensors by name.
        model: A timm model, `MultiExit` or `ExitNetwork`.
    """
    if isinstance(model, BackboneWrapper):
        return model.fit_state_dict(state_dict)
    if not any(k.startswith('exit_heads.') for k in state_dict):
        return state_dict
    return {k.removeprefix('backbone.'): v for k, v in state_dict.items() if k.startswith('backbone.')}
