"""ExitNetwork: a multi-exit network cut off at one of its exits."""
import copy
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .exit_head import ExitHead, chain_logits
from .names import cfg_without_weights
from .probe import copy_model, feature_dicts, take_taps
from .wrapper import BackboneWrapper

__all__ = ['ExitNetwork']


class ExitNetwork(BackboneWrapper):
    """A network that ends at one exit, with nothing of the rest left in it. Made by `MultiExit.truncate`.

    It is a timm model: `timm.create_model(name, exits=..., truncate=number)` rebuilds it, and so does `local-dir:` from
    the folder that timm's `save_for_hf` writes.

    Args:
        backbone: A timm model; copied, then pruned.
        heads: The exit's head, after those of all earlier exits if it takes their logits; copied.
        number: Number of the exit.
        taps: Indices of `feature_info` after which these heads stand.
        architecture: Name of the multi-exit network.
        args: Arguments that rebuild the multi-exit network.

    Attributes:
        head: The exit's head.
        exit_heads: Heads of the earlier exits, for a head that takes their logits. No gradient reaches them from here.
    """

    pruned = True
    output_fmt = 'NCHW'
    feature_dim = 1

    def __init__(
            self,
            backbone: nn.Module,
            heads: Sequence[ExitHead],
            number: int,
            taps: Sequence[int],
            architecture: str,
            args: Dict[str, Any],
    ):
        # first a copy of the structure alone, so that what is pruned is never copied
        backbone = copy_model(backbone, {id(t): t for t in (*backbone.parameters(), *backbone.buffers())})
        backbone.prune_intermediate_layers(list(taps), prune_norm=True, prune_head=True)
        super().__init__(copy.deepcopy(backbone))
        *earlier, self.head = copy.deepcopy(list(heads))
        self.exit_heads = nn.ModuleList(earlier)
        self.number = number
        self.taps = tuple(taps)
        self._args = dict(args, truncate=number)
        self.pretrained_cfg = cfg_without_weights(backbone, architecture)

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    @property
    def num_features(self) -> int:
        return self.head.num_features

    head_hidden_size = num_features

    @property
    def feature_info(self) -> List[Dict[str, Any]]:
        return list(feature_dicts(self.backbone))[:self.taps[-1] + 1]

    def classifiers(self) -> Tuple[str, ...]:
        return (*(f'exit_heads.{i}.fc' for i in range(len(self.exit_heads))), 'head.fc')

    def wrapper_args(self) -> Dict[str, Any]:
        return self._args

    def fit_state_dict(self, state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Return a checkpoint in this model's keys; of a whole network, plain or multi-exit, the part that is here."""
        head = f'exit_heads.{self.number}.'
        if not any(k.startswith(head) for k in state_dict):
            return super().fit_state_dict(state_dict)
        own = self.state_dict().keys()
        renamed = {k.replace(head, 'head.', 1): v for k, v in state_dict.items()}
        return {k: v for k, v in renamed.items() if k in own}

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the exit's classifier. Its pooling is the head's own and stays; `global_pool` is not used."""
        like = next(self.backbone.parameters())
        for head in (*self.exit_heads, self.head):
            head.reset_classifier(num_classes, device=like.device, dtype=like.dtype)

    def forward_features(self, x: torch.Tensor) -> Union[torch.Tensor, List[torch.Tensor]]:
        """Map images (N, C, H, W) to the feature map that the exit's head takes (N, C, H, W).

        Where there are `exit_heads`, it is the list of the maps that all the heads take, shallow to deep.

        Raises:
            ValueError: The backbone does not take images of this shape.
        """
        try:
            maps = take_taps(self.backbone, x, self.taps)
        except (AssertionError, RuntimeError) as error:
            self.explain_refusal(x, error)
            raise
        return maps if len(self.exit_heads) else maps[0]

    def forward_head(self, x: Union[torch.Tensor, List[torch.Tensor]], pre_logits: bool = False) -> torch.Tensor:
        """Map what `forward_features` gives to logits (N, num_classes), or to the pooled vector (N, num_features)."""
        maps = x if len(self.exit_heads) else [x]
        if pre_logits:
            return self.head.forward_features(maps[-1])
        heads = (*self.exit_heads, self.head)
        return chain_logits(heads, [head.forward_features(m) for head, m in zip(heads, maps)])[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))
