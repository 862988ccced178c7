"""The trunk that all networks for 32×32 images share: a stem, stages of blocks, a head."""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import (
    BatchNormAct2d,
    ClassifierHead,
    ConvNormAct,
    DropPath,
    calculate_drop_path_rates,
    get_device_dtype,
)
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP

__all__ = ['CifarNet', 'feature_places']


def feature_places(blocks: int, middle: bool = True) -> Tuple[int, ...]:
    """Return how many blocks of a stage have run at the places where its features may be taken.

    Args:
        blocks: Blocks of the stage.
        middle: Take them in the middle too, after the larger half, where there is one.
    """
    return ((blocks + 1) // 2, blocks) if middle and blocks > 1 else (blocks,)


class CifarNet(nn.Module):
    """A convolutional network for small images: 3×3 stem of stride 1, stages that halve the resolution, linear head.

    `feature_info` has the end of every stage and, unless `middles` is off, its middle. In a pre-activation network
    these maps are the raw sums (or concatenations), not normalised, as in timm's ResNetV2; `norm=True` applies the
    final norm to the last of them alone, the only one it is made for.

    Args:
        block: Makes a block from its input channels, its output channels and its stride.
        widths: Output channels of every block, by stage. The first block of every stage but the first has stride 2.
        stem_width: Channels of the stem.
        pre_activation: Blocks normalise their own input, so that no activation follows the stem and a norm and an
            activation follow the last block.
        stem_norm: Normalise what the stem gives.
        middles: Whether features can be taken in the middle of a stage.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier, as timm names them.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this at the last.
        device: Device of the weights.
        dtype: Type of the weights.

    Raises:
        ValueError: `drop_path_rate` where the blocks have no residual branch to drop.
    """

    def __init__(
            self,
            block: Callable[..., nn.Module],
            widths: Sequence[Sequence[int]],
            stem_width: int,
            pre_activation: bool = False,
            stem_norm: bool = True,
            middles: bool = True,
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.stem = ConvNormAct(
            in_chans, stem_width, kernel_size=3, apply_norm=stem_norm, apply_act=not pre_activation, **dd)
        self.stages = nn.Sequential()
        self.feature_info: List[Dict[str, Any]] = []
        self.feature_ends: List[int] = []  # blocks that have run at each of these places, counted from the stem on
        chs, count = stem_width, 0
        for s, stage_widths in enumerate(widths):
            stage = nn.Sequential()
            for i, width in enumerate(stage_widths):
                stage.append(block(chs, width, stride=2 if s and not i else 1, **dd))
                chs = width
            for place in feature_places(len(stage), middles):
                module = f'stages.{s}' if place == len(stage) else f'stages.{s}.{place - 1}'
                self.feature_info.append(dict(num_chs=stage_widths[place - 1], reduction=2 ** s, module=module))
                self.feature_ends.append(count + place)
            self.stages.append(stage)
            count += len(stage)
        self.norm = BatchNormAct2d(chs, **dd) if pre_activation else nn.Identity()

        self.num_features = chs
        self.head = ClassifierHead(chs, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features

        if drop_path_rate:
            self._set_drop_path(drop_path_rate)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    def _blocks(self) -> List[nn.Module]:
        return [block for stage in self.stages for block in stage]

    def _set_drop_path(self, rate: float) -> None:
        blocks = self._blocks()
        if not all(hasattr(block, 'drop_path') for block in blocks):
            raise ValueError(f'drop_path_rate={rate}: this network has no residual branches to drop, it takes only 0.')
        for block, drop in zip(blocks, calculate_drop_path_rates(rate, len(blocks))):
            if drop:
                block.drop_path = DropPath(drop)

    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Layers for layer-wise learning rates: the stem, every block (`coarse`: every stage), the head."""
        blocks = r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)'
        return dict(stem=r'^stem', blocks=[(blocks, None), (r'^norm', MATCH_PREV_GROUP)])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for the backward pass and compute the rest again."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier by a fresh one; 0 classes leave it out, the pooling stays where None is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def _run(self, x: torch.Tensor, blocks: List[nn.Module]) -> torch.Tensor:
        if self.grad_checkpointing:
            return checkpoint_seq(blocks, x)
        for block in blocks:
            x = block(x)
        return x

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Run the network and keep feature maps on the way.

        Args:
            x: Images (N, C, H, W).
            indices: Indices of `feature_info`, the last so many if an int, all if None.
            norm: Apply the final norm to the last map of `feature_info`, where the network has one.
            stop_early: Run no further than the last map wanted.
            output_fmt: 'NCHW'.
            intermediates_only: Return the maps alone.

        Returns:
            The final features (N, num_features, H', W'), as `forward_head` takes them, and the maps, each
            (N, num_chs, H', W'), in network order. With `stop_early` the final features are what was computed last.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.feature_ends), indices)
        last, blocks = len(self.feature_ends) - 1, self._blocks()
        intermediates = []
        x = self.stem(x)
        start, stop = 0, max_index if stop_early else last
        for i, end in enumerate(self.feature_ends[:stop + 1]):
            x = self._run(x, blocks[start:end])
            start = end
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        return self.norm(x) if stop == last else x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Drop what the given feature maps do not need; `feature_info` then ends at the last of them.

        Args:
            indices: Indices of `feature_info`, or the last so many if an int.
            prune_norm: Drop the final norm; it goes in any case if blocks do.
            prune_head: Drop the classifier and its pooling; they go in any case if blocks do.

        Returns:
            The indices that were kept.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_ends), indices)
        prune_end = max_index < len(self.feature_ends) - 1
        if prune_end:
            blocks = self.feature_ends[max_index]
            stages = nn.Sequential()
            for stage in self.stages:
                if blocks > 0:
                    stages.append(stage[:blocks])
                blocks -= len(stage)
            self.stages = stages
            self.feature_info = self.feature_info[:max_index + 1]
            self.feature_ends = self.feature_ends[:max_index + 1]
            self.num_features = self.feature_info[-1]['num_chs']
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, C, H, W) to the final features (N, num_features, H', W')."""
        return self.norm(self._run(self.stem(x), self._blocks()))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map the final features to logits (N, num_classes), or to what the classifier sees (N, head_hidden_size)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))
