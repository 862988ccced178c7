"""What each exit is worth and what it costs."""
import math
from collections import OrderedDict
from dataclasses import asdict
from typing import Any, Callable, Dict, Iterable, List, Literal, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.task import ClassificationEvaluator

from .costs import ExitCost
from .models.multi_exit import MultiExit
from .models.names import exit_names
from .models.probe import eval_mode

__all__ = [
    'ExitEvaluator', 'area_under_risk_coverage', 'collect_features', 'collect_logits', 'ensemble_logits',
    'evaluate_exits', 'exit_table', 'learn_ensemble',
]


def ensemble_logits(
        logits: Sequence[torch.Tensor],
        by: Literal['logits', 'probabilities'] = 'logits',
        weights: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Compute what all exits decide together.

    Args:
        logits: One tensor (N, num_classes) an exit.
        by: `logits` averages the logits, as the authors of Be Your Own Teacher do; `probabilities` the softmax scores.
        weights: (num_exits,), such as `learn_ensemble` returns: the logits are summed with these weights instead.

    Returns:
        Logits of the ensemble (N, num_classes); by probabilities they are the logarithms of the mean.

    Raises:
        ValueError: `by` is unknown, or the weights are not one an exit, or given together with probabilities.

    Examples:
        >>> ensemble_logits([torch.tensor([[1., 0.]]), torch.tensor([[3., 2.]])])
        tensor([[2., 1.]])
    """
    stacked = torch.stack(tuple(logits))
    if by not in ('logits', 'probabilities'):
        raise ValueError(f'by={by!r}: unknown, expected logits or probabilities.')
    if weights is not None:
        if by != 'logits':
            raise ValueError(f'by={by!r}: weights are for logits, and go with by=\'logits\' only.')
        if weights.shape != (len(stacked),):
            raise ValueError(
                f'weights of shape {tuple(weights.shape)}: expected {(len(stacked),)}, one weight an exit.')
        return torch.tensordot(weights.to(stacked), stacked, 1)
    if by == 'probabilities':
        return stacked.log_softmax(-1).logsumexp(0) - math.log(len(stacked))
    return stacked.mean(0)


def learn_ensemble(logits: Sequence[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Learn how much each exit counts in the ensemble, by minimising the negative log likelihood.

    The weights are a softmax of what is learned, so they are positive and their sum is 1: the best single exit and the
    mean of all are among what can be learned, but not a sharper or softer ensemble. Free weights would grow without
    bounds on images that are all classified correctly.

    Args:
        logits: One tensor (N, num_classes) an exit, of images that no exit was trained on and nothing is reported of.
        target: Labels (N,).

    Returns:
        Weights (num_exits,), float64, for `ensemble_logits`.
    """
    stacked = torch.stack(tuple(logits)).detach().double()
    free = torch.zeros(len(stacked), dtype=stacked.dtype, device=stacked.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [free], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn='strong_wolfe')

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(ensemble_logits(stacked, weights=free.softmax(0)), target)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return free.detach().softmax(0)


def area_under_risk_coverage(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Compute how often an exit errs on the images it is most confident of, on average over how many these are.

    AURC, the area under the curve of risk (errors among the images taken) and coverage (share of the images taken, the
    most confident first): Geifman and El-Yaniv, NeurIPS 2017, arXiv 1705.08500. What counts for early exit is that the
    confidence puts the images in the right order; that it is calibrated changes nothing there. Images of the same
    confidence are taken in every order, on average.

    Args:
        confidence: Confidence score of each image (N,).
        correct: Whether it is right (N,).

    Returns:
        The area, 0 to 1; the lower the better.

    Examples:
        >>> area_under_risk_coverage(torch.tensor([0.9, 0.8]), torch.tensor([True, False]))
        0.25
    """
    values, groups = confidence.unique(return_inverse=True)
    sizes = torch.bincount(groups, minlength=len(values)).double()
    wrong = torch.bincount(groups, weights=correct.logical_not().double(), minlength=len(values))
    order = groups.argsort(descending=True)
    errors = (wrong / sizes)[groups[order]].cumsum(0)
    return (errors / torch.arange(1, len(errors) + 1, device=errors.device)).mean().item()


class ExitEvaluator(ClassificationEvaluator):
    """timm's evaluator (loss, top-1, top-5 from integer counts) with the expected calibration error and the area
    under risk and coverage added, see `area_under_risk_coverage`.

    The calibration error (Guo et al., ICML 2017, arXiv 1706.04599) is the mean distance between confidence and
    accuracy over equal bins of confidence, weighted by the images in a bin; reported in percent like the accuracies.

    With 5 classes or fewer every label is among the top 5, so that no top-5 accuracy is given then.

    Args:
        device: Device of the running totals.
        bins: Number of confidence bins.
        num_classes: Classes of the logits; found out from the first batch when None.
    """

    metric_names = (*ClassificationEvaluator.metric_names, 'ece', 'aurc')

    def __init__(self, device: Optional[torch.device] = None, bins: int = 15, num_classes: Optional[int] = None):
        self.bins = bins
        self.num_classes = num_classes
        super().__init__(device)

    def reset(self) -> None:
        super().reset()
        # per bin: images, correct ones, sum of confidences
        self.calibration = torch.zeros((3, self.bins), dtype=self.loss_sum.dtype, device=self.device)
        self.judged: List[Tuple[torch.Tensor, torch.Tensor]] = []  # confidence of each image, and whether it is right

    @torch.no_grad()
    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: logits (N, num_classes) and labels (N,)."""
        super().update(output, target)
        self.num_classes = output.shape[-1]
        confidence, prediction = output.detach().float().softmax(-1).max(-1)
        self.judged.append((confidence, prediction.eq(target)))
        confidence = confidence.to(self.calibration.dtype)
        index = (confidence * self.bins).ceil().long().sub(1).clamp(0, self.bins - 1)
        ones = torch.ones_like(confidence)
        rows = torch.stack((ones, prediction.eq(target).to(ones), confidence))
        self.calibration.index_add_(1, index, rows)

    def compute(self, distributed: bool = False) -> Dict[str, Any]:
        """Return loss, top1, top5, ece and aurc, and the integer counts behind them, over all processes.

        What is of the top 5 is None with 5 classes or fewer.
        """
        totals, calibration = self.counts.clone(), self.calibration.clone()
        judged = [tuple(torch.cat(part).cpu() for part in zip(*self.judged))] if self.judged else []
        if distributed:
            of_all: List[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_all, judged)
            judged = [pair for of_process in of_all for pair in of_process]
            dist.all_reduce(totals)
            dist.all_reduce(calibration)
        _, correct, confidence = calibration
        metrics = super().compute(distributed)
        metrics['ece'] = 100 * ((correct - confidence).abs().sum() / calibration[0].sum().clamp(min=1)).item()
        metrics['aurc'] = 100 * area_under_risk_coverage(*map(torch.cat, zip(*judged))) if judged else 0.
        metrics.update(zip(('count', 'top1_count', 'top5_count'), totals.tolist()))
        if self.num_classes is not None and self.num_classes < 6:
            metrics.update(top5=None, top5_count=None)
        return metrics


@torch.no_grad()
def evaluate_exits(
        model: MultiExit,
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        device: Optional[torch.device] = None,
        distributed: bool = False,
        ensemble: Callable[[List[torch.Tensor]], torch.Tensor] = ensemble_logits,
        agreement: bool = False,
) -> 'OrderedDict[str, Dict[str, Any]]':
    """Measure every exit and the ensemble of all.

    Args:
        model: The network; evaluated in eval mode and left in the mode it was in.
        batches: Images (N, C, H, W) and labels (N,). Where several processes share the work, each gives its own
            share, no image twice.
        device: Where to compute.
        distributed: Sum the counts over all processes.
        ensemble: Makes the ensemble's logits (N, num_classes) of the list of all exits'.
        agreement: Take what the deepest exit answers for the labels; those given are not looked at.

    Returns:
        By exit name (see `exit_names`): loss (mean negative log likelihood), top1, top5, ece and aurc in percent,
        and the integer counts count, top1_count, top5_count; those of the top 5 are None with 5 classes or fewer. With
        `agreement` also `agreement`, True.
    """
    evaluators = OrderedDict(
        (name, ExitEvaluator(device, num_classes=model.num_classes)) for name in exit_names(model))
    with eval_mode(model):
        for images, target in batches:
            images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
            logits = model.forward_exits(images)
            if agreement:
                target = logits[-1].argmax(-1)
            for evaluator, output in zip(evaluators.values(), [*logits, ensemble(logits)]):
                evaluator.update(output, target)
    told = dict(agreement=True) if agreement else {}
    return OrderedDict((name, dict(evaluator.compute(distributed), **told)) for name, evaluator in evaluators.items())


@torch.no_grad()
def _collect(
        model: MultiExit,
        run: Callable[[torch.Tensor], List[torch.Tensor]],
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        device: Optional[torch.device],
) -> Tuple[List[torch.Tensor], torch.Tensor]:
    outputs, targets = [], []
    with eval_mode(model):
        for images, target in batches:
            outputs.append([output.float().cpu() for output in run(images.to(device, non_blocking=True))])
            targets.append(target.cpu())
    return [torch.cat(exit_outputs) for exit_outputs in zip(*outputs)], torch.cat(targets)


def collect_logits(
        model: MultiExit,
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        device: Optional[torch.device] = None,
) -> Tuple[List[torch.Tensor], torch.Tensor]:
    """Gather the logits of every exit over a split of the data.

    Args:
        model: The network, on `device`; run in eval mode and left in the mode it was in.
        batches: Images (N, C, H, W) and labels (N,).
        device: Where to compute.

    Returns:
        One float32 tensor (N, num_classes) an exit, shallow to deep, and the labels (N,), all on the CPU.
    """
    return _collect(model, model.forward_exits, batches, device)


def collect_features(
        model: MultiExit,
        batches: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        device: Optional[torch.device] = None,
) -> Tuple[List[torch.Tensor], torch.Tensor]:
    """Gather the pooled features that every exit's classifier sees, each (N, num_features of that exit).

    Takes and returns what `collect_logits` does.
    """
    return _collect(model, lambda images: model.forward_exits(images, return_features=True)[1], batches, device)


def exit_table(
        model: MultiExit,
        metrics: Dict[str, Dict[str, Any]],
        costs: Dict[str, ExitCost],
) -> List[Dict[str, Any]]:
    """Return what `exit_costs` and `evaluate_exits` return: one dict an exit, the ensemble last.

    Besides their fields a dict has `exit`, the exit's name, and `stage`, timm's name of the place it stands after.
    """
    stages = [model.stages[i].module for i in (*model.exits, -1)] + ['all exits']
    return [
        dict(exit=name, stage=stage, **asdict(costs[name]), **metrics[name])
        for name, stage in zip(exit_names(model), stages)
    ]
