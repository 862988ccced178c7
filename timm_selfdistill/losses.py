"""The terms of Be Your Own Teacher (Zhang et al., ICCV 2019, arXiv 1905.08094) as pure functions of tensors.

Every term is a mean over the images of a batch, so that its value depends neither on the batch size nor on how a batch
is split over processes. The teacher's side of every term is detached.
"""
from typing import Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

__all__ = ['distillation_loss', 'hint_loss', 'self_distillation_loss']


def distillation_loss(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        temperature: float = 3.0,
        square_temperature: bool = True,
) -> torch.Tensor:
    """Kullback-Leibler divergence KL(teacher ‖ student) of the softened class probabilities.

    Args:
        student_logits: (N, num_classes).
        teacher_logits: (N, num_classes), taken as constant.
        temperature: Softens both sides.
        square_temperature: Multiply by the squared temperature, which keeps the gradient's size the same for every
            temperature (Hinton et al., 2015, arXiv 1503.02531). The authors' SCAN code has the factor, their later code
            has not.

    Returns:
        Mean over the images, a scalar.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    # 'batchmean' and not 'mean', which would also divide by the number of classes
    loss = F.kl_div(student, teacher, reduction='batchmean', log_target=True)
    return loss * temperature ** 2 if square_temperature else loss


def hint_loss(student_features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    """Mean squared distance between feature vectors, the hint.

    The authors' code sums; its 5e-7 times the sum over 128 images of 512 features is 0.03 times this mean, which unlike
    a sum does not change with the batch size.

    Args:
        student_features: (N, num_features).
        teacher_features: (N, num_features), taken as constant.

    Returns:
        Mean over images and features, a scalar.
    """
    return F.mse_loss(student_features, teacher_features.detach())


def self_distillation_loss(
        logits: Sequence[torch.Tensor],
        target: torch.Tensor,
        hints: Optional[Sequence[torch.Tensor]] = None,
        hint_target: Optional[torch.Tensor] = None,
        alpha: float = 0.5,
        temperature: float = 3.0,
        square_temperature: bool = True,
        hint_weight: float = 0.03,
        criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
    """The whole loss of Be Your Own Teacher: the deepest exit teaches the shallow ones.

        Σ_i (1-α)·CE(z_i, y) + α·KL(z_C ‖ z_i; T) + λ·mean (F_i − F_C)²  over the auxiliary exits, plus CE(z_C, y)

    The deepest exit learns from the labels alone, with weight 1. A term whose weight is 0 is not computed; α = λ = 0 is
    deep supervision.

    Args:
        logits: One tensor (N, num_classes) an exit, shallow to deep.
        target: Labels (N,), or class probabilities (N, num_classes) if `criterion` takes them.
        hints: One tensor (N, num_features) an auxiliary exit; not needed where `hint_weight` is 0.
        hint_target: Features of the deepest exit (N, num_features).
        alpha: Share of the divergence against the cross entropy at auxiliary exits, 0 to 1.
        temperature: See `distillation_loss`.
        square_temperature: See `distillation_loss`.
        hint_weight: λ, the weight of the hint.
        criterion: Loss against the labels.

    Returns:
        The loss, a scalar, and its terms by name without their weights and detached: `ce<i>` for every exit, `kl<i>`
        and `hint<i>` for the auxiliary ones, numbered from 0.
    """
    terms: Dict[str, torch.Tensor] = {}
    deepest = len(logits) - 1
    loss = terms[f'ce{deepest}'] = criterion(logits[deepest], target)
    for i in range(deepest):
        if alpha < 1:
            terms[f'ce{i}'] = criterion(logits[i], target)
            loss = loss + (1 - alpha) * terms[f'ce{i}']
        if alpha > 0:
            terms[f'kl{i}'] = distillation_loss(logits[i], logits[deepest], temperature, square_temperature)
            loss = loss + alpha * terms[f'kl{i}']
        if hint_weight > 0:
            terms[f'hint{i}'] = hint_loss(hints[i], hint_target)
            loss = loss + hint_weight * terms[f'hint{i}']
    return loss, {name: terms[name].detach() for name in sorted(terms)}
