"""What each exit is worth and what it costs."""
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.models import get_model_input_config
from timm.task import ClassificationEvaluator

from .multi_exit import MultiExit
from .stages import count_macs, meta_copy

__all__ = ['ExitCost', 'ExitEvaluator', 'ensemble_logits', 'evaluate_exits', 'exit_costs', 'exit_names', 'exit_table']


def ensemble_logits(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Average the logits of all exits, as the authors of Be Your Own Teacher do: (N, num_classes)."""
    return torch.stack(tuple(logits)).mean(0)


class ExitEvaluator(ClassificationEvaluator):
    """timm's evaluator (loss, top-1, top-5 from integer counts) with the expected calibration error added.

    The calibration error (Guo et al., ICML 2017, arXiv 1706.04599) is the mean distance between confidence and
    accuracy over equal bins of confidence, weighted by the images in a bin; reported in percent like the accuracies.

    Args:
        device: Device of the running totals.
        bins: Number of confidence bins.
    """

    metric_names = (*ClassificationEvaluator.metric_names, 'ece')

    def __init__(self, device: Optional[torch.device] = None, bins: int = 15):
        self.bins = bins
        super().__init__(device)

    def reset(self) -> None:
        super().reset()
        # per bin: images, correct ones, sum of confidences
        self.calibration = torch.zeros((3, self.bins), dtype=self.loss_sum.dtype, device=self.device)

    @torch.no_grad()
    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: logits (N, num_classes) and labels (N,)."""
        super().update(output, target)
        confidence, prediction = output.detach().float().softmax(-1).max(-1)
        confidence = confidence.to(self.calibration.dtype)
        index = (confidence * self.bins).ceil().long().sub(1).clamp(0, self.bins - 1)
        ones = torch.ones_like(confidence)
        rows = torch.stack((ones, prediction.eq(target).to(ones), confidence))
        self.calibration.index_add_(1, index, rows)

    def compute(self, distributed: bool = False) -> Dict[str, Any]:
        """Return loss, top1, top5 and ece, and the integer counts behind them, over all processes."""
        totals, calibration = self.counts.clone(), self.calibration.clone()
        if distributed:
            dist.all_reduce(totals)
            dist.all_reduce(calibration)
        _, correct, confidence = calibration
        metrics = super().compute(distributed)
        metrics['ece'] = 100 * ((correct - confidence).abs().sum() / calibration[0].sum().clamp(min=1)).item()
        metrics.update(zip(('count', 'top1_count', 'top5_count'), totals.tolist()))
        return metrics


def exit_names(model: MultiExit) -> List[str]:
    """Name the exits for tables and columns, shallow to deep, the ensemble last."""
    return [f'exit{i}' for i in range(model.num_exits)] + ['ensemble']


@torch.no_grad()
def evaluate_exits(
        model: MultiExit,
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        device: Optional[torch.device] = None,
        distributed: bool = False,
) -> 'OrderedDict[str, Dict[str, Any]]':
    """Measure every exit and the ensemble of all.

    Args:
        model: The network; evaluated in eval mode and left in the mode it was in.
        batches: Images (N, C, H, W) and labels (N,). Where several processes share the work, each gives its own
            part, no image twice.
        device: Where to compute.
        distributed: Sum the counts over all processes.

    Returns:
        By exit name (see `exit_names`): loss (mean negative log likelihood), top1, top5, ece in percent, and the
        integer counts count, top1_count, top5_count.
    """
    was_training = model.training
    model.eval()
    evaluators = OrderedDict((name, ExitEvaluator(device)) for name in exit_names(model))
    for images, target in batches:
        images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
        logits = model.forward_exits(images)
        for evaluator, output in zip(evaluators.values(), [*logits, ensemble_logits(logits)]):
            evaluator.update(output, target)
    model.train(was_training)
    return OrderedDict((name, evaluator.compute(distributed)) for name, evaluator in evaluators.items())


@dataclass(frozen=True)
class ExitCost:
    """What leaving at an exit costs.

    Attributes:
        params: Parameters of the network truncated there.
        macs: Its multiply-adds for one image.
        share: Its multiply-adds over those of the plain network.
    """
    params: int
    macs: int
    share: float


def exit_costs(
        model: MultiExit,
        input_size: Optional[Tuple[int, int, int]] = None,
) -> 'OrderedDict[str, ExitCost]':
    """Count what each exit costs on its own, and what all of them together cost the ensemble.

    Args:
        model: The network.
        input_size: Channels, height and width of an image; what the model was built for when None.
    """
    probe = meta_copy(model)
    x = torch.empty((1, *(input_size or get_model_input_config(model)['input_size'])), device='meta')
    full, _ = count_macs(probe, x)
    costs = OrderedDict()
    networks: List[Tuple[nn.Module, Any]] = [(net, net) for net in map(probe.truncate, range(model.num_exits))]
    for name, (net, forward) in zip(exit_names(model), [*networks, (probe, probe.forward_exits)]):
        macs, _ = count_macs(forward, x)
        costs[name] = ExitCost(sum(p.numel() for p in net.parameters()), macs, macs / max(full, 1))
    return costs


def exit_table(
        model: MultiExit,
        metrics: Dict[str, Dict[str, Any]],
        input_size: Optional[Tuple[int, int, int]] = None,
) -> List[Dict[str, Any]]:
    """Join what `exit_costs` and `evaluate_exits` return: one dict an exit, the ensemble last.

    Besides their fields a dict has `exit`, the exit's name, and `stage`, timm's name of the place it stands after.
    """
    stages = [model.stages[i].module for i in (*model.exits, -1)] + ['all exits']
    costs = exit_costs(model, input_size)
    return [
        dict(exit=name, stage=stage, **asdict(costs[name]), **metrics[name])
        for name, stage in zip(exit_names(model), stages)
    ]
