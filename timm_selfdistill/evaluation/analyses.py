"""The analyses of Be Your Own Teacher (Zhang et al., ICCV 2019, arXiv 1905.08094), and a linear probe of features.

The paper explains by them why self-distillation helps: flatter minima, larger gradients in early layers, classes that
lie further apart at deeper exits. Batches are iterables of images (N, C, H, W) and labels (N,), such as a `DataLoader`.
"""
import statistics
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..metrics import evaluate_exits
from ..models.multi_exit import MultiExit
from ..models.probe import copy_model, eval_mode

__all__ = ['all_exits_loss', 'deepest_loss', 'gradient_sizes', 'linear_probe', 'scatter_ratios', 'weight_noise']

Batches = Iterable[Tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def weight_noise(
        model: MultiExit,
        batches: Batches,
        sigmas: Sequence[float],
        seed: int = 0,
        repeats: int = 5,
        device: Optional[torch.device] = None,
) -> List[Dict[str, Any]]:
    """Measure every exit while Gaussian noise of rising strength lies on all weights: in flat minima little is lost.

    Sigma is the noise's standard deviation on every parameter (weights, biases, those of norms), absolute as in the
    paper's wording; the running averages of batch norms stay. Networks compare only where their weights are of the same
    size, as after the same recipe: rescaling the layers before a batch norm changes the curve and not the network.
    Within a repeat all sigmas scale the same draw.

    Args:
        model: The network, on `device`. A copy gets the noise, the network itself is not touched.
        batches: Images and labels; gone through once for every sigma and repeat.
        sigmas: Standard deviations, 0 or more; 0 measures the network as it is.
        seed: Seed of the draws.
        repeats: Draws to average over.
        device: Where to compute.

    Returns:
        A dict for each sigma and exit, in the order of `sigmas` and shallow to deep, the ensemble last: `sigma`,
        `exit`, `loss` (mean negative log likelihood) and `top1` (percent), both averaged over the repeats, and their
        standard deviations over the repeats `loss_std` and `top1_std`.

    Raises:
        ValueError: A sigma is negative, `repeats` is less than 1, or the batches can be gone through only once.
    """
    wrong = next((sigma for sigma in sigmas if not sigma >= 0), None)
    if wrong is not None:
        raise ValueError(f'sigmas: {wrong} among them, expected numbers of 0 or more.')
    if repeats < 1:
        raise ValueError(f'repeats={repeats}: expected 1 or more.')
    if iter(batches) is batches:
        raise ValueError(f'batches: a {type(batches).__name__} is used up after one pass; pass a list or a DataLoader.')
    noisy = copy_model(model)
    measured: Dict[Tuple[float, str], List[Dict[str, Any]]] = OrderedDict()
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(seed + repeat)  # on the CPU: the same draw for every device
        draws = [torch.randn(p.shape, generator=generator).to(p) for p in model.parameters()]
        for sigma in sigmas:
            for p, weight, draw in zip(noisy.parameters(), model.parameters(), draws):
                p.copy_(weight + sigma * draw)
            for name, values in evaluate_exits(noisy, batches, device).items():
                measured.setdefault((sigma, name), []).append(values)
    rows = []
    for (sigma, name), values in measured.items():
        row = dict(sigma=sigma, exit=name)
        for key in ('loss', 'top1'):
            row[key] = statistics.fmean(v[key] for v in values)
            row[f'{key}_std'] = float(np.std([v[key] for v in values]))
        rows.append(row)
    return rows


def deepest_loss(model: MultiExit, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the deepest exit, as in plain training: a scalar."""
    return F.cross_entropy(model(images), target)


def all_exits_loss(model: MultiExit, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of all exits, as in deep supervision: a scalar."""
    return torch.stack([F.cross_entropy(logits, target) for logits in model.forward_exits(images)]).sum()


@torch.enable_grad()
def gradient_sizes(
        model: MultiExit,
        batches: Batches,
        loss: Callable[[MultiExit, torch.Tensor, torch.Tensor], torch.Tensor] = deepest_loss,
        device: Optional[torch.device] = None,
) -> 'OrderedDict[str, float]':
    """Measure how much of the gradient reaches every layer of the backbone.

    Args:
        model: The network, on `device`. A copy in eval mode is differentiated, the network itself is not touched.
        batches: Images and labels. Every batch counts the same; a gradient's size depends on the size of its batch.
        loss: Called with the copy, images and labels, returns the scalar to differentiate: `deepest_loss`,
            `all_exits_loss` or one's own.
        device: Where to compute.

    Returns:
        Mean absolute gradient over the weights of a layer, averaged over the batches, by the layer's name: the
        convolutions and linear layers of the backbone in its own order. 0 where the loss does not depend on a layer.

    Raises:
        ValueError: There are no batches.
    """
    probe = copy_model(model).eval().requires_grad_(True)
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    weights = OrderedDict((n, m.weight) for n, m in probe.backbone.named_modules() if isinstance(m, kinds))
    sums, count = torch.zeros(len(weights), dtype=torch.float64), 0
    for images, target in batches:
        value = loss(probe, images.to(device), target.to(device))
        gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        sums += torch.tensor([0. if g is None else g.abs().mean().item() for g in gradients], dtype=torch.float64)
        count += 1
    if not count:
        raise ValueError('batches: there are none.')
    return OrderedDict(zip(weights, (sums / count).tolist()))


class _Scatter:
    """Sums of squared distances within and between classes, of features that come in batches.

    Means and squared distances of batches are merged (Chan, Golub and LeVeque, 1983) instead of summing squares, which
    would cancel where features lie far from 0.

    Args:
        num_classes: Classes.
        width: Length of a feature vector.
    """

    def __init__(self, num_classes: int, width: int):
        self.counts = torch.zeros(num_classes, dtype=torch.float64)
        self.means = torch.zeros((num_classes, width), dtype=torch.float64)
        self.within = 0.

    def update(self, features: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: features (N, width) in float64 and labels (N,)."""
        counts = torch.zeros_like(self.counts).index_add_(0, target, torch.ones(len(target), dtype=torch.float64))
        present = counts.clamp(min=1)[:, None]
        means = torch.zeros_like(self.means).index_add_(0, target, features) / present
        shift = (means - self.means).square().sum(1)
        total = self.counts + counts
        merged = counts / total.clamp(min=1)
        self.within += (features - means[target]).square().sum().item() + (shift * self.counts * merged).sum().item()
        self.means += (means - self.means) * merged[:, None]
        self.counts = total

    def between(self) -> float:
        mean = (self.counts[:, None] * self.means).sum(0) / self.counts.sum()
        return (self.counts * (self.means - mean).square().sum(1)).sum().item()


@torch.no_grad()
def scatter_ratios(model: MultiExit, batches: Batches, device: Optional[torch.device] = None) -> List[float]:
    """Measure how tightly the classes lie in every exit's features: SSE/SSB, lower is better.

    SSE is the sum over all images of the squared distance between an image's pooled features and the mean of its class;
    SSB the sum over all images of the squared distance between the mean of its class and the mean of all.

    Args:
        model: The network, on `device`; run in eval mode and left in the mode it was in.
        batches: Images and labels, gone through once; sums are kept in float64, the features are not kept.
        device: Where to compute.

    Returns:
        The ratio at every exit, shallow to deep.

    Raises:
        ValueError: There are fewer than two classes in the batches, or at an exit one of the sums is 0, as with one
            image a class or features that are the same for all images.
    """
    scatters: List[_Scatter] = []
    with eval_mode(model):
        for images, target in batches:
            _, features = model.forward_exits(images.to(device), return_features=True)
            if not scatters:
                scatters = [_Scatter(model.num_classes, f.shape[1]) for f in features]
            for scatter, exit_features in zip(scatters, features):
                scatter.update(exit_features.cpu().double(), target.cpu())
    classes = int((scatters[0].counts > 0).sum()) if scatters else 0
    if classes < 2:
        raise ValueError(f'The batches hold {classes} classes; scatter between classes needs 2 or more.')
    ratios = []
    for number, scatter in enumerate(scatters):
        within, between = scatter.within, scatter.between()
        if not (within > 0 and between > 0):
            raise ValueError(
                f'exit {number}: the scatter within classes is {within:g}, between classes {between:g}; '
                f'expected both greater than 0.'
            )
        ratios.append(within / between)
    return ratios


def linear_probe(
        train: Tuple[np.ndarray, np.ndarray],
        validation: Tuple[np.ndarray, np.ndarray],
        test: Tuple[np.ndarray, np.ndarray],
        strengths: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1., 10.),
) -> Dict[str, float]:
    """Measure what a linear classifier makes of frozen features.

    Logistic regression on standardised features. Its C is the one that is best on the validation split, the smaller of
    equals; with it the classifier learns anew from training and validation split together, and is measured on the test
    part once.

    Args:
        train: Features (N, num_features) and labels (N,).
        validation: As well.
        test: As well.
        strengths: The values of C to choose from, small ones regularise more.

    Returns:
        `c`, the C chosen; `validation_top1` with it, of the classifier that has not seen the validation split; and
        `test_top1`, both in percent.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(c: float, features: np.ndarray, labels: np.ndarray):
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(features, labels)

    scores = {c: fit(c, *train).score(*validation) for c in sorted(strengths)}
    best = max(scores, key=scores.get)
    both = [np.concatenate(pair) for pair in zip(train, validation)]
    return dict(c=best, validation_top1=100 * scores[best], test_top1=100 * fit(best, *both).score(*test))
