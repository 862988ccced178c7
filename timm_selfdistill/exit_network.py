"""ExitNetwork: a multi-exit network cut off at one of its exits."""
import copy
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from .heads import ExitHead
from .stages import copy_model, feature_dicts, take_taps
from .wrapper import BackboneWrapper, cfg_without_weights

__all__ = ['ExitNetwork']


class ExitNetwork(BackboneWrapper):
    """A network that ends at one exit, with nothing of the rest left in it. Made by `MultiExit.truncate`.

    It is a timm model: `timm.create_model(name, exits=..., truncate=number)` rebuilds it, and so does `local-dir:` from
    the folder that timm's `save_for_hf` writes.

    Args:
        backbone: A timm model; copied, then pruned.
        head: The exit's head; copied.
        number: Number of the exit.
        stage: Index of `feature_info` after which the exit stands.
        architecture: Name of the multi-exit network.
        args: Arguments that rebuild the multi-exit network.
    """

    pruned = True
    output_fmt = 'NCHW'
    feature_dim = 1

    def __init__(
            self,
            backbone: nn.Module,
            head: ExitHead,
            number: int,
            stage: int,
            architecture: str,
            args: Dict[str, Any],
    ):
        # first a copy of the structure alone, so that what is pruned is never copied
        backbone = copy_model(backbone, {id(t): t for t in (*backbone.parameters(), *backbone.buffers())})
        backbone.prune_intermediate_layers([stage], prune_norm=True, prune_head=True)
        super().__init__(copy.deepcopy(backbone))
        self.head = copy.deepcopy(head)
        self.number = number
        self.stage = stage
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
        return list(feature_dicts(self.backbone))[:self.stage + 1]

    def classifiers(self) -> Tuple[str, ...]:
        return ('head.fc',)

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
        """Give the exit a fresh classifier. Its pooling is the head's own and stays; `global_pool` is not used."""
        like = next(self.backbone.parameters())
        self.head.reset_classifier(num_classes, device=like.device, dtype=like.dtype)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, C, H, W) to the feature map that the exit's head takes (N, C, H, W).

        Raises:
            ValueError: The backbone does not take images of this shape.
        """
        try:
            return take_taps(self.backbone, x, [self.stage])[0]
        except (AssertionError, RuntimeError) as error:
            self.explain_refusal(x, error)
            raise

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map the feature map to logits (N, num_classes), or to what the classifier sees (N, num_features)."""
        features = self.head.forward_features(x)
        return features if pre_logits else self.head.forward_head(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))
