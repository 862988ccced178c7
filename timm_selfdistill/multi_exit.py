"""MultiExit: a timm network with auxiliary exits, behind timm's own model contract."""
import copy
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.models import get_model_input_config, group_parameters

from .heads import create_exit_head
from .stages import ExitSpec, Stage, choose_exits, find_stages, take_taps

__all__ = ['SUFFIX', 'WEIGHT_KEYS', 'ExitNetwork', 'MultiExit', 'add_exits', 'nested_group_matcher']

SUFFIX = '_sd'

# Where weights of a pretrained cfg come from; a network that gained exits no longer is what lies there.
WEIGHT_KEYS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'custom_load')


def _as_tuple(names: Union[None, str, List[str], Tuple[str, ...]]) -> Tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


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


class MultiExit(nn.Module):
    """A timm network with auxiliary exit heads at its stage boundaries (Zhang et al., ICCV 2019, arXiv 1905.08094).

    Called like the plain network it gives, bit for bit, what the plain network gives: the heads do not even run.
    `forward_exits` gives the logits of every exit. Exits are numbered from 0, shallow to deep; the last one is the
    network's own classifier.

    Args:
        backbone: A timm model. It is held, not copied, as `backbone`.
        exits: Where auxiliary exits stand, see `choose_exits`.
        exit_head: Kind of exit head, a name in `EXIT_HEADS`.

    Attributes:
        backbone: The plain timm model.
        exits: Indices of `feature_info` after which the auxiliary exits stand.
        stages: Every place where the backbone may be cut.
        distilled_training: Whether `forward` gives all exits while training.

    Raises:
        ValueError: `exits` or `exit_head` do not fit the backbone, or the backbone already has exits.
    """

    def __init__(
            self,
            backbone: nn.Module,
            exits: ExitSpec = None,
            exit_head: str = 'bottleneck',
    ):
        super().__init__()
        if isinstance(backbone, MultiExit):
            raise ValueError('This model already has exits; add exits to its .backbone instead.')
        cfg = dict(getattr(backbone, 'pretrained_cfg', None) or {})
        name = cfg.get('architecture') or type(backbone).__name__
        self.stages: Tuple[Stage, ...] = find_stages(backbone)
        self.exits = choose_exits(self.stages, exits, name)
        self.exit_head = exit_head
        self.distilled_training = False
        self.backbone = backbone
        like = next(backbone.parameters())
        last_height = self.stages[-1].size[0]
        self.exit_heads = nn.ModuleList(
            create_exit_head(
                exit_head,
                in_chs=self.stages[i].num_chs,
                num_classes=backbone.num_classes,
                stride=max(1, self.stages[i].size[0] // last_height),
                drop_rate=getattr(backbone, 'drop_rate', 0.),
            ) for i in self.exits
        ).to(device=like.device, dtype=like.dtype)

        cfg.update(architecture=name + SUFFIX, first_conv=getattr(backbone, '_traits', {}).get('first_conv'))
        self.pretrained_cfg = {k: v for k, v in cfg.items() if k not in WEIGHT_KEYS}
        self.default_cfg = self.pretrained_cfg
        self._model_args = getattr(backbone, '_model_args', {})
        first_conv = tuple(f'backbone.{n}' for n in _as_tuple(cfg['first_conv']))
        self._traits = dict(getattr(backbone, '_traits', {}), first_conv=first_conv or None)

    # -- exits --------------------------------------------------------------------------------------------------------

    @property
    def num_exits(self) -> int:
        """Auxiliary exits and the deepest one."""
        return len(self.exits) + 1

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let `forward` give all exits while in training mode, as timm's distilled DeiT does."""
        self.distilled_training = enable

    def forward(self, x: torch.Tensor) -> Union[torch.Tensor, List[torch.Tensor]]:
        """Classify images.

        Args:
            x: Images (N, C, H, W).

        Returns:
            Logits of the deepest exit (N, num_classes). In training mode after `set_distilled_training()` the list of
            all exits' logits instead, shallow to deep.
        """
        if self.training and self.distilled_training:
            return self.forward_exits(x)
        return self.backbone(x)

    def forward_exits(
            self,
            x: torch.Tensor,
            upto: Optional[int] = None,
            return_features: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[List[torch.Tensor], List[torch.Tensor]]]:
        """Classify images at every exit.

        Args:
            x: Images (N, C, H, W).
            upto: Number of the last exit wanted; the network runs no further. All exits when None.
            return_features: Also return the pooled vector that each exit's classifier sees. The deepest one comes
                detached: in the paper's hint loss it is a target only.

        Returns:
            Logits, each (N, num_classes), shallow to deep; with `return_features` also the features, each
            (N, num_features of that exit).

        Raises:
            ValueError: `upto` is no exit of this model.
        """
        deepest = self._check_exit(self.num_exits - 1 if upto is None else upto) == self.num_exits - 1
        if not deepest:
            final, taps = None, take_taps(self.backbone, x, self.exits[:upto + 1])
        elif self.exits:
            # stop_early is said aloud because in some families it is the default
            final, taps = self.backbone.forward_intermediates(
                x, indices=list(self.exits), stop_early=False, output_fmt='NCHW')
        else:
            final, taps = self.backbone.forward_features(x), ()
        features = [head.forward_features(tap) for head, tap in zip(self.exit_heads, taps)]
        logits = [head.forward_head(f) for head, f in zip(self.exit_heads, features)]
        if deepest:
            logits.append(self.backbone.forward_head(final))
        if not return_features:
            return logits
        if deepest:
            with torch.no_grad():
                # detached as well: a view taken under no_grad still belongs to the graph of what it views
                features.append(self.backbone.forward_head(final, pre_logits=True).detach())
        return logits, features

    def truncate(self, k: int) -> nn.Module:
        """Return a copy that ends at exit `k` and holds only the parameters which that exit needs.

        Raises:
            ValueError: `k` is no exit of this model.
        """
        if self._check_exit(k) == self.num_exits - 1:
            return copy.deepcopy(self.backbone)
        return ExitNetwork(self.backbone, self.exits[k], self.exit_heads[k])

    def _check_exit(self, k: int) -> int:
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < self.num_exits:
            name = self.pretrained_cfg.get('architecture', 'this model')
            raise ValueError(f'exit {k!r}: {name} has the exits 0 to {self.num_exits - 1}, the last being the deepest.')
        return k

    # -- timm's model contract ----------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        return getattr(self.backbone, 'head_hidden_size', self.backbone.num_features)

    @property
    def in_chans(self) -> int:
        return get_model_input_config(self.backbone)['input_size'][0]

    @property
    def feature_info(self):
        return self.backbone.feature_info

    @property
    def pretrained_cfg(self) -> Dict[str, Any]:
        return self._pretrained_cfg

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: Dict[str, Any]) -> None:
        # Changed in place: timm's load_pretrained() goes on with the dict that its builder assigned here, and adapts
        # to other classes just those tensors which the cfg names.
        backbone_cfg = getattr(self.backbone, 'pretrained_cfg', None) or {}
        cfg['classifier'] = tuple(
            [f'exit_heads.{i}.fc' for i in range(len(self.exits))] +
            [f'backbone.{n}' for n in _as_tuple(backbone_cfg.get('classifier'))]
        )
        self._pretrained_cfg = cfg

    @property
    def _model_args(self) -> Dict[str, Any]:
        """What rebuilds this model by `timm.create_model(name, **_model_args)`."""
        args = {k: v for k, v in self._factory_args.items() if k != 'backbone_pretrained'}
        return dict(args, exits=list(self.exits), exit_head=self.exit_head)

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        self._factory_args = dict(args)

    def get_classifier(self) -> nn.Module:
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Give every exit a fresh classifier for `num_classes` classes."""
        # not passed on as None, which some families take for no pooling
        self.backbone.reset_classifier(num_classes, **({} if global_pool is None else dict(global_pool=global_pool)))
        for head in self.exit_heads:
            head.reset_classifier(num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone.forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(self, x: torch.Tensor, **kwargs):
        return self.backbone.forward_intermediates(x, **kwargs)

    def prune_intermediate_layers(self, indices: Union[int, List[int]] = 1, **kwargs) -> List[int]:
        """Prune the backbone as timm does; the exits go with what they stood on."""
        kept = self.backbone.prune_intermediate_layers(indices, **kwargs)
        self.exits, self.exit_heads = (), nn.ModuleList()
        return kept

    def no_weight_decay(self) -> Set[str]:
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else ()
        return {f'backbone.{n}' for n in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layers for layer-wise learning rates: the backbone's own, then one for all the exits' heads."""
        return nested_group_matcher(self, 'backbone', coarse)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)


class ExitNetwork(nn.Module):
    """A network that ends at one exit, with nothing of the rest left in it. Made by `MultiExit.truncate`.

    Args:
        backbone: A timm model; copied, then pruned.
        index: Index of `feature_info` after which it ends.
        head: The exit's head; copied.
    """

    def __init__(self, backbone: nn.Module, index: int, head: nn.Module):
        super().__init__()
        self.index = index
        self.num_classes = backbone.num_classes
        self.backbone = copy.deepcopy(backbone)
        self.backbone.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
        self.head = copy.deepcopy(head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        return self.head(take_taps(self.backbone, x, [self.index])[0])


def add_exits(model: nn.Module, exits: ExitSpec = None, exit_head: str = 'bottleneck') -> MultiExit:
    """Give any timm model auxiliary exits; its weights stay as they are. See `MultiExit`."""
    return MultiExit(model, exits=exits, exit_head=exit_head)
