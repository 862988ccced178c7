"""Copies of a network to look at it: on the meta device, in eval mode, with its MACs counted."""
import copy
from contextlib import contextmanager
from functools import cache
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import get_model_input_config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = [
    'MacCounter', 'ShortLSTMs', 'copy_model', 'count_macs', 'eval_mode', 'eval_view', 'feature_dicts',
    'find_caches', 'forget_caches', 'meta_copy', 'meta_probe', 'take_taps',
]

# Classes found to read the grid of their maps from values, which tensors on the meta device lack.
_GRID_FROM_VALUES: Set[type] = set()


def copy_model(model: nn.Module, instead: Optional[Dict[int, Any]] = None) -> nn.Module:
    """Copy a model without what it has computed from its weights and keeps.

    Args:
        model: Any module.
        instead: What stands in the copy for parameters, buffers and others, by the id of the original.
    """
    memo: Dict[int, Any] = dict(instead or {})
    for module in model.modules():
        for name, value in vars(module).items():
            # In eval mode attention in LeViT and its kin keeps biases made from its weights, by device. While they
            # belong to a graph torch refuses to copy them.
            if isinstance(value, dict) and name not in ('_parameters', '_buffers') and any(
                    isinstance(t, torch.Tensor) and not t.is_leaf for t in value.values()):
                memo[id(value)] = {}
    return copy.deepcopy(model, memo)


class _Forgetful(dict):
    """A dict that says of every key that it is new, so that what depends on weights is made of them anew."""

    def __contains__(self, key: Any) -> bool:
        return False


def eval_view(model: nn.Module) -> nn.Module:
    """Copy the modules of a model in eval mode; the copy has the very parameters and buffers of the original.

    Whatever becomes of these (training, `to`, `half`, `load_state_dict`) is seen in the view, and neither is put into
    another mode by the other. The view is not compiled, and is not to be changed. Of what else is set in the original
    later, such as other modules or hooks, it knows nothing.

    Args:
        model: Any module.
    """
    instead: Dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ('_parameters', '_buffers'):
                instead[id(value)] = value
            elif name.endswith('_hooks'):
                instead[id(value)] = copy.copy(value)  # what is called stays what it is, a recorder for one
    for module in reversed(list(model.modules())):  # what lies within comes first
        if hasattr(module, '_orig_mod'):
            instead[id(module)] = copy_model(module._orig_mod, instead)
    view = copy_model(model, instead)
    for module in view.modules():
        module.training = False  # eval() would tell the modules, and some then write to their weights
    return view


def find_caches(ran: nn.Module) -> List[Tuple[str, str]]:
    """Return the modules that keep tensors which they compute from weights, and the attribute that holds these.

    Args:
        ran: A network that was run, by which it shows.
    """
    return [
        (name, attribute) for name, module in ran.named_modules() for attribute, value in vars(module).items()
        if isinstance(value, dict) and attribute not in ('_parameters', '_buffers')
        and any(isinstance(tensor, torch.Tensor) for tensor in value.values())
    ]


def forget_caches(view: nn.Module, caches: Sequence[Tuple[str, str]]) -> None:
    """Stop a view from keeping tensors that it computes from weights, which may change.

    Args:
        view: What `eval_view` gave.
        caches: See `find_caches`.
    """
    for name, attribute in caches:
        setattr(view.get_submodule(name), attribute, _Forgetful())


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model in eval mode onto the meta device: its shapes without its memory, the original untouched."""
    tensors: Dict[int, torch.Tensor] = {}
    for p in model.parameters():
        tensors[id(p)] = nn.Parameter(torch.empty_like(p, device='meta'), requires_grad=False)
    for b in model.buffers():
        tensors[id(b)] = torch.empty_like(b, device='meta')
    return copy_model(model, tensors).to('meta').eval()


def meta_probe(
        model: nn.Module,
        input_size: Optional[Tuple[int, int, int]] = None,
) -> Tuple[nn.Module, torch.Tensor]:
    """Return a copy of a model and an image (1, C, H, W) for it, both on the meta device.

    Args:
        model: A timm model.
        input_size: Channels, height and width of the image; what the model was built for when None.
    """
    probe = meta_copy(model)
    size = input_size or get_model_input_config(model)['input_size']
    return probe, torch.empty((1, *size), device='meta', dtype=next(probe.parameters()).dtype)


def _meta_layer_norm(x: torch.Tensor, shape: Sequence[int], *args: Any) -> Tuple[torch.Tensor, ...]:
    statistics = x.new_empty((*x.shape[:x.ndim - len(shape)], *(1 for _ in shape)))
    return torch.empty_like(x, memory_format=torch.contiguous_format), statistics, statistics


def _meta_batch_norm(x: torch.Tensor, *args: Any) -> Tuple[torch.Tensor, ...]:
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


_aten = torch.ops.aten

# Operations whose shapes torch derives on the meta device by a slow chain of others.
_META_SHORTCUTS: Dict[Any, Callable[..., Any]] = {
    _aten.addmm.default: lambda bias, x, weight, **_: x.new_empty((x.shape[0], weight.shape[1])),
    _aten.native_batch_norm.default: _meta_batch_norm,
    _aten.native_layer_norm.default: _meta_layer_norm,
    _aten.upsample_bicubic2d.default: lambda x, size, *_: x.new_empty((*x.shape[:2], *size)),
    _aten.upsample_bilinear2d.default: lambda x, size, *_: x.new_empty((*x.shape[:2], *size)),
    **dict.fromkeys((
        _aten._safe_softmax.default, _aten.clamp.default, _aten.clamp_min.default, _aten.gelu.default,
        _aten.hardsigmoid.default, _aten.hardswish.default, _aten.relu.default, _aten.sigmoid.default,
        _aten.silu.default,
    ), lambda x, *_, **__: torch.empty_like(x)),
    **dict.fromkeys(
        (_aten.hardswish_.default, _aten.hardsigmoid_.default, _aten.relu_.default, _aten.silu_.default), lambda x: x),
}


@cache
def _is_composite(func: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), 'CompositeImplicitAutograd')


class ShortLSTMs(TorchFunctionMode):
    """Runs LSTMs on the meta device without their loop over time: as products of the same sizes, so of as many MACs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch._C._VariableFunctions.lstm or not args[0].is_meta or isinstance(args[3], (tuple, list)):
            return func(*args, **kwargs)  # anything else, or a packed sequence
        x, state, weights, has_biases, layers, _, _, bidirectional, _ = args
        step = 4 if has_biases else 2
        directions = 2 if bidirectional else 1
        if len(weights) != layers * directions * step:  # projected
            return func(*args, **kwargs)
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                first = (layer * directions + direction) * step
                from_input, from_hidden = weights[first:first + 2]
                hidden = from_hidden.shape[1]
                gates = F.linear(x, from_input)
                outputs.append((gates + F.linear(gates[..., :hidden], from_hidden))[..., :hidden])
            x = torch.cat(outputs, -1)
        return x, *state


class MacCounter(TorchDispatchMode):
    """Counts the MACs of convolutions, matrix products and attention, by the formulas of `torch.utils.flop_counter`.

    torch's own `FlopCounterMode` also attributes them to modules and takes apart what it has no formula for, which
    takes several times as long. Both counts are equal.

    Attributes:
        flops: Floating point operations so far, two for each MAC.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0

    @property
    def macs(self) -> int:
        """MACs so far."""
        return self.flops // 2

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_composite(func):  # in inference mode torch does not take them apart before they come here
            with self:
                return func.decompose(*args, **kwargs)
        shortcut = _META_SHORTCUTS.get(func) if args and getattr(args[0], 'is_meta', False) else None
        out = func(*args, **kwargs) if shortcut is None else shortcut(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def count_macs(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Tuple[int, Any]:
    """Call `fn`; return the MACs of the convolutions and matrix products it executed, and its result.

    Examples:
        >>> layer = nn.Linear(4, 3)
        >>> count_macs(layer, torch.randn(2, 4))[0]
        24
    """
    with torch.no_grad(), ShortLSTMs(), MacCounter() as counter:
        result = fn(*args, **kwargs)
    return counter.macs, result


def feature_dicts(model: nn.Module) -> Sequence[Dict[str, Any]]:
    """Return timm's `feature_info` of a model as dicts, whichever of its two forms it has."""
    info = model.feature_info
    return info if isinstance(info, (list, tuple)) else info.get_dicts()


def take_taps(
        model: nn.Module,
        x: torch.Tensor,
        indices: Sequence[int],
        with_final: bool = False,
) -> Union[List[torch.Tensor], Tuple[Any, List[torch.Tensor]]]:
    """Run a timm model no further than the last of `indices`, or to its end.

    Args:
        model: A timm model.
        x: Images (N, C, H, W).
        indices: Indices of `feature_info`, increasing.
        with_final: Run to the end.

    Returns:
        The feature maps at `indices`, each (N, C, H, W); with `with_final` the final features, as `forward_head` takes
        them, and the maps.
    """
    # stop_early is said aloud because in some families it is the default
    kwargs = dict(indices=list(indices), stop_early=not with_final, intermediates_only=not with_final)
    if not (x.is_meta and type(model) in _GRID_FROM_VALUES):
        return model.forward_intermediates(x, output_fmt='NCHW', **kwargs)
    # its tokens and their declared reduction say as much
    out = model.forward_intermediates(x, output_fmt='NLC', **kwargs)
    final, taps = out if with_final else (None, out)
    reductions = [feature_dicts(model)[i]['reduction'] for i in indices]
    taps = [
        tap.transpose(1, 2).unflatten(2, (x.shape[-2] // r, x.shape[-1] // r)) for tap, r in zip(taps, reductions)
    ]
    return (final, taps) if with_final else taps


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and afterwards each of its modules back into the mode it was in.

    Other threads must not run the model meanwhile. Where all of it is in eval mode already nothing is touched.
    """
    modes = {module: module.training for module in model.modules()}
    if not any(modes.values()):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])  # some modules drop what they keep for evaluation when they are told, so tell them
        for module, training in modes.items():
            module.training = training
