"""What every exit head is: features of a stage in, logits out."""
from typing import Any, Dict, Iterable, List, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d, SelectAdaptivePool2d

__all__ = ['ExitHead', 'chain_logits']


class ExitHead(nn.Module):
    """Base of the exit heads: a map, its pooled vector, then dropout and a linear classifier.

    A kind of head says in `forward_map` what it makes of the feature map that it is given. Its constructor ends with
    `reset_classifier`.

    Args:
        width: Length of the pooled vector.
        drop_rate: Dropout before the classifier.
        map_chs: Channels of the map before the pooling; `width` when None.

    Attributes:
        num_features: Length of the pooled vector.
        map_chs: Channels of the map before the pooling.
        takes_logits: Whether the classifier also takes the logits of the exit before.
    """

    takes_logits = False

    def __init__(self, width: int, drop_rate: float = 0., map_chs: Optional[int] = None):
        super().__init__()
        self.num_features = width
        self.map_chs = width if map_chs is None else map_chs
        self.drop_rate = drop_rate
        self.pool = SelectAdaptivePool2d(pool_type='avg', flatten=True)

    def reset_classifier(
            self,
            num_classes: int,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        """Replace the classifier by a fresh one; 0 classes leave it out."""
        self.num_classes = num_classes
        self.fc = nn.Identity()
        if num_classes > 0:
            width = self.num_features + (num_classes if self.takes_logits else 0)
            self.fc = nn.Linear(width, num_classes, device=device, dtype=dtype)

    def forward_map(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to the map before the pooling (N, map_chs, h, w)."""
        raise NotImplementedError

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to the pooled vector (N, num_features)."""
        return self.pool(self.forward_map(x))

    def forward_head(self, features: torch.Tensor, previous: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Map the pooled vector to logits.

        Args:
            features: Pooled vector (N, num_features).
            previous: Logits of the exit before (N, num_classes); only a head that `takes_logits` looks at them.

        Returns:
            Logits (N, num_classes).
        """
        features = F.dropout(features, self.drop_rate, self.training)
        if self.takes_logits and self.num_classes > 0:
            previous = previous.detach()
            features = torch.cat((features, F.layer_norm(previous, previous.shape[-1:])), dim=1)
        return self.fc(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _norm_act(batch_norm: bool) -> Dict[str, Any]:
    return dict(
        norm_layer=nn.BatchNorm2d if batch_norm else LayerNorm2d,
        act_layer=nn.ReLU if batch_norm else nn.GELU,
    )


def _init_convs(module: nn.Module, mode: str = 'fan_out') -> None:
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode=mode, nonlinearity='relu')


def chain_logits(heads: Iterable[ExitHead], features: Iterable[torch.Tensor]) -> List[torch.Tensor]:
    """Classify at successive exits, each of which is given the logits of the one before.

    Args:
        heads: Heads of all exits from the first on.
        features: Their pooled vectors, each (N, num_features).

    Returns:
        Logits of every exit, each (N, num_classes).
    """
    logits: List[torch.Tensor] = []
    for head, vector in zip(heads, features):
        logits.append(head.forward_head(vector, logits[-1] if logits else None))
    return logits
