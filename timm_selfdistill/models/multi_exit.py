"""MultiExit: a timm network with auxiliary exits, behind timm's own model contract."""
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn

from .exit_head import ExitHead, chain_logits
from .exit_rule import ExitRule
from .heads import PLACED_LIKE, LinearHead, exit_head_kind, head_settings
from .names import SUFFIX, cfg_without_weights, model_name, names_tuple
from .probe import copy_model, count_macs, take_taps
from .stages import ExitSpec, Stage, choose_exits, find_stages
from .truncated import ExitNetwork
from .wrapper import BackboneWrapper

__all__ = ['MultiExit', 'add_exits', 'shown_name', 'without_exits']


class MultiExit(BackboneWrapper):
    """A timm network with auxiliary exit heads at its stage boundaries (Zhang et al., ICCV 2019, arXiv 1905.08094).

    Called like the plain network it gives, bit for bit, what the plain network gives: the heads do not even run.
    `forward_exits` gives the logits of every exit. Exits are numbered from 0, shallow to deep; the last one is the
    network's own classifier. An encoder, which has none, gets one on its pooled final features; what timm prunes as
    its head (a projector, a fusion of its maps) goes.

    Args:
        backbone: A timm model. It is held, not copied, as `backbone`.
        exits: Where auxiliary exits stand, see `choose_exits`.
        exit_head: Kind of exit head, a name in `EXIT_HEADS`.
        num_classes: Classes; as many as the backbone has when None.
        early_exit: An exit rule as `ExitRule.settings` writes it into a `config.json`. One that was made for another
            number of classes is dropped.

    Attributes:
        backbone: The plain timm model.
        exits: Indices of `feature_info` after which the auxiliary exits stand.
        exit_heads: Their heads, shallow to deep.
        head: The deepest exit's classifier where the backbone has none of its own, else None.
        stages: Every place where the backbone may be cut.
        distilled_training: Whether `forward` gives all exits while training.
        backbone_frozen: Whether only the auxiliary exits learn, see `freeze_backbone`.
        exit_gates: The exit rule's gates, none without the criterion `gate`.
        exit_rule: When images leave early, for `EarlyExit` unless it is given another rule. None without one.

    Raises:
        ValueError: `exits`, `exit_head` or `early_exit` do not fit the backbone, or the backbone already has exits.
    """

    def __init__(
            self,
            backbone: nn.Module,
            exits: ExitSpec = None,
            exit_head: str = 'bottleneck',
            num_classes: Optional[int] = None,
            early_exit: Optional[Dict[str, Any]] = None,
    ):
        super().__init__(backbone)
        name = model_name(backbone)
        create_head = exit_head_kind(exit_head)
        if isinstance(backbone, BackboneWrapper):
            raise ValueError(f'{name} already has exits; add exits to its .backbone instead.')
        headless = hasattr(backbone, 'prune_intermediate_layers') and not hasattr(backbone, 'get_classifier')
        if headless:
            backbone.prune_intermediate_layers([len(backbone.feature_info) - 1], prune_norm=False, prune_head=True)
            self.pruned = True
        self.stages: Tuple[Stage, ...] = find_stages(backbone)
        settings = head_settings(backbone, self.stages)
        create_light = exit_head_kind(PLACED_LIKE.get(exit_head, exit_head))

        def head_macs(stage: Stage) -> int:
            with torch.device('meta'):
                head = create_light(num_classes=0, **settings[stage.index]).eval()  # maps may be of one pixel
                return count_macs(head, torch.empty(1, stage.num_chs, *stage.size))[0]

        self.exits = choose_exits(self.stages, exits, name, head_macs)
        self.exit_head = exit_head
        self.distilled_training = self.backbone_frozen = False
        self.exit_rule = None
        self.exit_heads = nn.ModuleList(
            create_head(num_classes=backbone.num_classes, first=i == self.exits[0], **settings[i]) for i in self.exits
        )
        self.head: Optional[ExitHead] = None
        if headless:
            self.head = LinearHead(backbone.num_features, 0, settings[-1]['batch_norm'], settings[-1]['drop_rate'])
        like = next(backbone.parameters())
        for heads in filter(None, (self.exit_heads, self.head)):
            heads.to(device=like.device, dtype=like.dtype)
        if num_classes is not None and num_classes != self.num_classes:
            self.reset_classifier(num_classes)
        if early_exit is not None:
            rule = ExitRule.from_settings(early_exit, self.num_exits)
            self.exit_rule = rule if rule.num_classes == self.num_classes else None
        self.pretrained_cfg = cfg_without_weights(backbone, name + SUFFIX)

    @property
    def exit_rule(self) -> Optional[ExitRule]:
        """When images leave early."""
        return self._exit_rule

    @exit_rule.setter
    def exit_rule(self, rule: Optional[ExitRule]) -> None:
        self._exit_rule = rule
        self.exit_gates = nn.ModuleList() if rule is None or rule.gates is None else rule.gates
        self.exit_gates.train(self.training)

    # -- exits --------------------------------------------------------------------------------------------------------

    @property
    def num_exits(self) -> int:
        """Auxiliary exits and the deepest one."""
        return len(self.exits) + 1

    def set_distilled_training(self, enable: bool = True) -> None:
        """Switch `forward` to all exits while in training mode, as timm's distilled DeiT does."""
        self.distilled_training = enable

    def freeze_backbone(self) -> None:
        """Keep the deepest exit bit for bit what it is from now on: the auxiliary exits alone learn.

        All of the backbone, and the classifier of an encoder, stop asking for gradients and stay in eval mode, so that
        running averages, dropout and stochastic depth stand still, whatever `train()` is told. `forward_exits` runs
        them without a graph and keeps none of their activations. This is the disjoint regime of "How to Train Your
        Multi-Exit Model?" (arXiv 2407.14320).

        Examples:
            >>> import timm
            >>> model = add_exits(timm.create_model('test_resnet'), exits=(2, 3))
            >>> model.freeze_backbone()
            >>> model.train().backbone.training, model.exit_heads.training
            (False, True)
        """
        self.backbone_frozen = True
        for module in self._deepest_exit():
            module.requires_grad_(False)
        self.train(self.training)

    def _deepest_exit(self) -> List[nn.Module]:
        return [self.backbone] if self.head is None else [self.backbone, self.head]

    def train(self, mode: bool = True) -> 'MultiExit':
        """Set the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.backbone_frozen:
            for module in self._deepest_exit():
                module.eval()
        return self

    def _deepest_grad(self) -> ContextManager:
        return torch.no_grad() if self.backbone_frozen else nullcontext()

    def forward(self, x: torch.Tensor) -> Union[torch.Tensor, List[torch.Tensor]]:
        """Classify images.

        Args:
            x: Images (N, C, H, W).

        Returns:
            Logits of the deepest exit (N, num_classes). In training mode after `set_distilled_training()` the list of
            all exits' logits instead, shallow to deep.

        Raises:
            ValueError: The backbone does not take images of this shape.
        """
        if self.training and self.distilled_training:
            return self.forward_exits(x)
        try:
            return self.backbone(x) if self.head is None else self.forward_head(self.forward_features(x))
        except (AssertionError, RuntimeError) as error:
            self.explain_refusal(x, error)
            raise

    def forward_exits(
            self,
            x: torch.Tensor,
            upto: Optional[int] = None,
            return_features: bool = False,
            return_maps: bool = False,
            detach_taps: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[List[torch.Tensor], List[torch.Tensor]]]:
        """Classify images at every exit.

        Args:
            x: Images (N, C, H, W).
            upto: Number of the last exit wanted; the network runs no further. All exits when None.
            return_features: Also return the pooled vector that each exit's classifier sees. The deepest one comes
                detached: in the paper's hint loss it is a target only.
            return_maps: Also return the map that each auxiliary exit pools, and of the deepest exit the map of the
                last stage, detached as well.
            detach_taps: Cut the auxiliary exits off the backbone in the backward pass: they learn, but the backbone
                is changed by the deepest exit alone.

        Returns:
            Logits, each (N, num_classes), shallow to deep; with `return_features` also the features, each
            (N, num_features of that exit); with `return_maps` the maps instead, each (N, map_chs of that exit's head,
            h, w), the last one (N, num_chs of the last stage, h, w).

        Raises:
            ValueError: `upto` is no exit of this model, features and maps are both asked for, or the backbone does not
                take images of this shape.
        """
        if return_features and return_maps:
            raise ValueError('return_features=True, return_maps=True: expected one of them at most.')
        deepest = self._check_exit(self.num_exits - 1 if upto is None else upto) == self.num_exits - 1
        indices = self.exits + ((len(self.stages) - 1,) if return_maps else ())
        try:
            with self._deepest_grad():
                if not deepest:
                    final, taps = None, take_taps(self.backbone, x, self.exits[:upto + 1])
                elif indices:
                    final, taps = take_taps(self.backbone, x, indices, with_final=True)
                else:
                    final, taps = self.backbone.forward_features(x), ()
        except (AssertionError, RuntimeError) as error:
            self.explain_refusal(x, error)
            raise
        if detach_taps:
            taps = [tap.detach() for tap in taps]
        maps = [head.forward_map(tap) for head, tap in zip(self.exit_heads, taps)]
        features = [head.pool(m) for head, m in zip(self.exit_heads, maps)]
        logits = chain_logits(self.exit_heads, features)
        if deepest:
            with self._deepest_grad():
                logits.append(self.forward_head(final))
        if return_maps:
            return logits, maps + ([taps[-1].detach()] if deepest else [])
        if not return_features:
            return logits
        if deepest:
            with torch.no_grad():
                # detached as well: a view taken under no_grad still belongs to the graph of what it views
                features.append(self.forward_head(final, pre_logits=True).detach())
        return logits, features

    def truncate(self, k: int) -> nn.Module:
        """Return a copy that ends at exit `k` and holds only the parameters which that exit needs.

        Raises:
            ValueError: `k` is no exit of this model.
        """
        if self._check_exit(k) < self.num_exits - 1:
            first = 0 if self.exit_heads[k].takes_logits else k
            heads, taps = self.exit_heads[first:k + 1], self.exits[first:k + 1]
            args = {name: value for name, value in self._model_args.items() if name != 'early_exit'}
            return ExitNetwork(self.backbone, heads, k, taps, model_name(self), args)
        if self.head is None:
            return copy_model(self.backbone)
        network = copy_model(self)
        network.exits, network.exit_heads, network.exit_rule = (), nn.ModuleList(), None
        return network

    def _check_exit(self, k: int) -> int:
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < self.num_exits:
            last = self.num_exits - 1
            raise ValueError(f'exit {k!r}: {model_name(self)} has the exits 0 to {last}, the last being the deepest.')
        return k

    # -- timm's model contract ----------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes if self.head is None else self.head.num_classes

    def classifiers(self) -> Tuple[str, ...]:
        own = names_tuple((getattr(self.backbone, 'pretrained_cfg', None) or {}).get('classifier'))
        deepest = [f'backbone.{n}' for n in own] if self.head is None else ['head.fc']
        return (*(f'exit_heads.{i}.fc' for i in range(len(self.exits))), *deepest)

    def wrapper_args(self) -> Dict[str, Any]:
        args = dict(exits=list(self.exits), exit_head=self.exit_head)
        return args if self.exit_rule is None else dict(args, early_exit=self.exit_rule.settings())

    def get_classifier(self) -> nn.Module:
        """Return the deepest exit's classifier."""
        return self.backbone.get_classifier() if self.head is None else self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier of every exit by a fresh one for `num_classes`; the pooling is the deepest exit's.

        The exit rule goes with the classifiers that it was made for.
        """
        self.exit_rule = None
        heads = list(self.exit_heads)
        if self.head is not None:
            heads.append(self.head)
        elif global_pool is None:  # not passed on, some families take None for no pooling
            self.backbone.reset_classifier(num_classes)
        else:
            self.backbone.reset_classifier(num_classes, global_pool=global_pool)
            self.backbone._model_args = dict(getattr(self.backbone, '_model_args', {}), global_pool=global_pool)
        like = next(self.backbone.parameters())
        for head in heads:
            head.reset_classifier(num_classes, device=like.device, dtype=like.dtype)
        if self.backbone_frozen:
            self.freeze_backbone()

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map the final features, as `forward_features` gives them, to the deepest exit's logits (N, num_classes)."""
        if self.head is None:
            return self.backbone.forward_head(x, pre_logits=pre_logits)
        if x.ndim == 3:  # tokens
            x = x.transpose(1, 2).unsqueeze(-1)
        elif getattr(self.backbone, 'output_fmt', 'NCHW') == 'NHWC':
            x = x.permute(0, 3, 1, 2)
        features = self.head.forward_features(x)
        return features if pre_logits else self.head.forward_head(features)

    def prune_intermediate_layers(self, indices: Union[int, List[int]] = 1, *args: Any, **kwargs: Any) -> List[int]:
        """Prune the backbone as timm does; the exits go, as the classifier does."""
        kept = self.backbone.prune_intermediate_layers(indices, *args, **kwargs)
        self.exits, self.exit_heads, self.head, self.exit_rule = (), nn.ModuleList(), None, None
        self.stages = self.stages[:max(kept) + 1]
        return kept

    @property
    def set_input_size(self) -> Callable[..., None]:
        """Change the size of the images, where the backbone can: see its own `set_input_size`."""
        set_backbone = self.backbone.set_input_size  # raises AttributeError, so that hasattr() tells the truth

        def set_input_size(*args: Any, **kwargs: Any) -> None:
            set_backbone(*args, **kwargs)
            self.stages = find_stages(self.backbone)

        return set_input_size


def add_exits(
        model: nn.Module,
        exits: ExitSpec = None,
        exit_head: str = 'bottleneck',
        num_classes: Optional[int] = None,
) -> MultiExit:
    """Add auxiliary exits to any timm model; its weights stay as they are. See `MultiExit`.

    Examples:
        >>> import timm
        >>> add_exits(timm.create_model('test_resnet'), exits=(2, 3)).num_exits
        3
    """
    return MultiExit(model, exits=exits, exit_head=exit_head, num_classes=num_classes)


def without_exits(model: nn.Module) -> nn.Module:
    """Return the plain timm model in a network without auxiliary exits; any other network as it is.

    An encoder that got its classifier from `MultiExit` is no network without it.
    """
    return model.backbone if isinstance(model, MultiExit) and not model.exits and model.head is None else model


def shown_name(model: nn.Module) -> str:
    """Return what to call a network in tables and pictures: its architecture, timm's own where it has no exits."""
    return model_name(without_exits(model))
