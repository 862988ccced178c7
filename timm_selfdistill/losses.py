"""The terms of both papers as pure functions of tensors.

Be Your Own Teacher (Zhang et al., ICCV 2019, arXiv 1905.08094) and the tolerant teacher (Yang et al., AAAI 2019,
arXiv 1805.05551). Every term is a mean over the images of a batch, so that its value depends neither on the batch size
nor on how a batch is split over processes; one form of the hint is the root of such a mean. The teacher's side of every
term is detached. What comes in half precision is made float32 first, under autocast too, which on CPUs would leave it:
in bfloat16 the gradient of a divergence is off by up to 12 %.
"""
import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F

__all__ = [
    'EXIT_TEACHERS', 'EXIT_WEIGHTS', 'HINT_FORMS', 'TOLERANCES', 'confidence_penalty', 'distillation_loss',
    'eta_for_top_score', 'exit_teachers', 'weigh_exits', 'hint_loss', 'self_distillation_loss', 'supervision_terms',
    'top_score_difference', 'uniform_divergence',
]

EXIT_TEACHERS = ('deepest', 'ensemble', 'next', 'all')
EXIT_WEIGHTS = ('equal', 'cost', 'ramp', 'equilibrium')
HINT_FORMS = ('mean', 'sum', 'norm')


def _precise(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32 at least: autocast leaves what is in half precision there in many operations."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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

    Examples:
        >>> z = torch.tensor([[2., 0.], [0., 1.]])
        >>> distillation_loss(z, z).item()
        0.0
    """
    student = F.log_softmax(_precise(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(_precise(teacher_logits.detach()) / temperature, dim=-1)
    # 'batchmean' and not 'mean', which would also divide by the number of classes
    loss = F.kl_div(student, teacher, reduction='batchmean', log_target=True)
    return loss * temperature ** 2 if square_temperature else loss


def hint_loss(
        student_features: torch.Tensor,
        teacher_features: torch.Tensor,
        form: str = 'mean',
) -> torch.Tensor:
    """Distance between feature vectors or maps, the hint.

    The authors' code has two: in that of SCAN 5e-7 times the sum over a batch, which at their 128 images is 5e-7 · 128
    times `sum`, and in their later code 0.03 times the Frobenius norm of a batch, which is 0.03 · √128 times `norm`.

    Args:
        student_features: (N, num_features) or (N, num_features, H, W).
        teacher_features: Of the same shape, taken as constant.
        form: `mean` of the squared differences over images, features and places. `sum` of them over features and
            places, mean over images. `norm`, the root of that: the gradient is as large near the teacher as far from
            it, and zero at the teacher. Unlike the others it is no mean over images: the mean of the norms of a
            batch's slices is a little less than the norm of the batch where the slices' distances differ.

    Returns:
        A scalar.

    Raises:
        ValueError: The form is unknown.

    Examples:
        >>> hint_loss(torch.zeros(2, 4), torch.ones(2, 4), 'sum').item()
        4.0
    """
    if form not in HINT_FORMS:
        raise ValueError(f'form={form!r}: unknown, expected one of {", ".join(HINT_FORMS)}.')
    student, teacher = _precise(student_features), _precise(teacher_features.detach())
    if form == 'mean':
        return F.mse_loss(student, teacher)
    if form == 'sum':
        return F.mse_loss(student, teacher, reduction='sum') / len(student)
    # a square root's gradient at 0 is infinite, that of vector_norm is 0
    return torch.linalg.vector_norm(student - teacher) / len(student) ** 0.5


def top_score_difference(logits: torch.Tensor, k: int = 5) -> torch.Tensor:
    """Top score difference, the bracket of the tolerant patriarch's loss (Yang et al., AAAI 2019, arXiv 1805.05551).

        f_(1) − 1/(K−1) · Σ_{k=2..K} f_(k)        f = softmax(z), f_(k) its k-th largest

    Args:
        logits: (N, num_classes).
        k: K, how many of the largest scores count, the first included.

    Returns:
        One value an image, 0 to 1, (N,).

    Raises:
        ValueError: K is less than 2 or more than the classes.

    Examples:
        >>> top_score_difference(torch.tensor([[0.6, 0.2, 0.2]]).log(), 3)
        tensor([0.4000])
    """
    if not 2 <= k <= logits.shape[-1]:
        raise ValueError(f'k={k}: expected a number from 2 to {logits.shape[-1]}, the number of classes.')
    top = _precise(logits).softmax(-1).topk(k, dim=-1).values
    return top[..., 0] - top[..., 1:].mean(-1)


def uniform_divergence(logits: torch.Tensor) -> torch.Tensor:
    """KL(uniform ‖ softmax(z)) of every image, (N,): what label smoothing adds to the cross entropy.

    Examples:
        >>> uniform_divergence(torch.zeros(1, 4)).abs() < 1e-6
        tensor([True])
    """
    return -_precise(logits).log_softmax(-1).mean(-1) - math.log(logits.shape[-1])


def confidence_penalty(logits: torch.Tensor) -> torch.Tensor:
    """Negative entropy of softmax(z) of every image in nats, (N,) (Pereyra et al., 2017, arXiv 1701.06548)."""
    log_p = _precise(logits).log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1)


# What a tolerant patriarch minimises beside the cross entropy, of logits (N, num_classes) and K: one value an image.
TOLERANCES: Dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    'tsd': top_score_difference,
    'label-smoothing': lambda logits, k: uniform_divergence(logits),
    'confidence-penalty': lambda logits, k: confidence_penalty(logits),
}


def eta_for_top_score(kind: str, top_score: float, num_classes: int, k: int = 5) -> float:
    """Return the η at which a patriarch's optimum gives the label a certain score: patriarchs of equal softness.

    It solves for η where the derivative of η·CE + (1−η)·tolerance by the label's score is zero, all other scores (TSD:
    the runners-up, the rest nothing) being equal. TSD's optimum min(1, η(K−1) / ((1−η)K)) has a cap; the others' have
    none.

    Args:
        kind: One of `TOLERANCES`.
        top_score: Score of the label at the optimum, more than 1/num_classes (TSD: more than 1/K) and less than 1.
        num_classes: Classes.
        k: K of the top score difference.

    Raises:
        ValueError: The score cannot be the largest, or the kind is unknown.

    Examples:
        >>> round(eta_for_top_score('tsd', 0.8, num_classes=100), 3)
        0.5
    """
    if kind not in TOLERANCES:
        raise ValueError(f'{kind!r}: unknown, expected one of {", ".join(TOLERANCES)}.')
    shared = k if kind == 'tsd' else num_classes
    if not 1 / shared < top_score < 1:
        raise ValueError(f'top_score={top_score}: expected more than {1 / shared:g} and less than 1.')
    if kind == 'tsd':
        return top_score * k / (top_score * k + k - 1)
    if kind == 'label-smoothing':
        return (top_score - 1 / num_classes) / (1 - 1 / num_classes)
    pull = top_score * math.log(top_score * (num_classes - 1) / (1 - top_score))
    return pull / (1 + pull)


def supervision_terms(
        logits: torch.Tensor,
        target: torch.Tensor,
        criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
        patriarch: str = 'plain',
        eta: float = 1.0,
        tsd_k: int = 5,
        teacher_logits: Optional[torch.Tensor] = None,
        label_weight: float = 1.0,
        teacher_temperature: float = 1.0,
        square_temperature: bool = True,
) -> Dict[str, Tuple[float, torch.Tensor]]:
    """Return the terms of what one exit learns from the labels and from a teacher outside the network.

        patriarch   η·CE(z, y) + (1−η)·tolerance(z)
        student     λ·CE(z, y) + (1−λ)·KL(z_teacher ‖ z)

    A student of a teacher at temperature T and λ is also classic distillation (Hinton et al., 2015, arXiv 1503.02531).
    A term whose weight is 0 is not computed.

    Args:
        logits: (N, num_classes).
        target: Labels (N,), or class probabilities (N, num_classes) if `criterion` takes them.
        criterion: Loss against the labels.
        patriarch: What a tolerant patriarch minimises besides, one of `TOLERANCES`; `plain` for nothing.
        eta: η, share of the cross entropy against the tolerance, 0 to 1.
        tsd_k: K of the top score difference.
        teacher_logits: (N, num_classes), taken as constant; None without a teacher.
        label_weight: λ, share of the labels against the teacher, 0 to 1.
        teacher_temperature: Softens student and teacher.
        square_temperature: See `distillation_loss`.

    Returns:
        Weight and mean over the images of each term by name: `ce`, the tolerance's own, `teacher`.
    """
    logits = _precise(logits)
    if target.is_floating_point():
        target = target.to(logits.dtype)
    eta = eta if patriarch != 'plain' else 1.0
    label_weight = label_weight if teacher_logits is not None else 1.0
    terms: Dict[str, Tuple[float, torch.Tensor]] = {}
    if label_weight * eta > 0:
        terms['ce'] = label_weight * eta, criterion(logits, target)
    if label_weight * (1 - eta) > 0:
        terms[patriarch] = label_weight * (1 - eta), TOLERANCES[patriarch](logits, tsd_k).mean()
    if label_weight < 1:
        divergence = distillation_loss(logits, teacher_logits, teacher_temperature, square_temperature)
        terms['teacher'] = 1 - label_weight, divergence
    return terms


def exit_teachers(logits: Sequence[torch.Tensor], kind: str = 'deepest') -> List[List[torch.Tensor]]:
    """Return who teaches each auxiliary exit.

    Args:
        logits: One tensor (N, num_classes) an exit, shallow to deep.
        kind: `deepest`; `ensemble`, the mean of all exits' logits; `next`, the exit after it; `all` that are deeper.

    Returns:
        For each auxiliary exit its teachers' logits.

    Raises:
        ValueError: The kind is unknown.

    Examples:
        >>> shallow, middle, deep = torch.zeros(3, 2, 5)
        >>> [len(teachers) for teachers in exit_teachers([shallow, middle, deep], 'all')]
        [2, 1]
    """
    if kind not in EXIT_TEACHERS:
        raise ValueError(f'{kind!r}: unknown, expected one of {", ".join(EXIT_TEACHERS)}.')
    deeper = [list(logits[i + 1:]) for i in range(len(logits) - 1)]
    if kind == 'all':
        return deeper
    if kind == 'next':
        return [teachers[:1] for teachers in deeper]
    teacher = torch.stack([_precise(z) for z in logits]).mean(0) if kind == 'ensemble' else logits[-1]
    return [[teacher] for _ in deeper]


def weigh_exits(kind: str, shares: Sequence[float], progress: float = 1.0) -> List[float]:
    """Return the weights of the auxiliary exits' losses; the deepest exit's has weight 1 throughout.

    Args:
        kind: `equal`: each 1. `cost`: in proportion to the exits' shares of the compute, in sum the number of exits.
            `ramp`: from 0.01 at the start of training to the exit's share at its end, after Shallow-Deep Networks
            (Kaya et al., ICML 2019, arXiv 1810.07052). `equilibrium`: each 1; it is the gradients in the network that
            are scaled, see `tasks.SelfDistillationModule`.
        shares: Of each auxiliary exit, the part of the network's MACs that has run, 0 to 1.
        progress: Part of the training that is done, 0 to 1.

    Raises:
        ValueError: The kind is unknown.

    Examples:
        >>> weigh_exits('cost', [0.25, 0.75])
        [0.5, 1.5]
    """
    if kind not in EXIT_WEIGHTS:
        raise ValueError(f'{kind!r}: unknown, expected one of {", ".join(EXIT_WEIGHTS)}.')
    if kind == 'cost':
        return [len(shares) * share / sum(shares) for share in shares]
    if kind == 'ramp':
        return [0.01 + (share - 0.01) * progress for share in shares]
    return [1.0] * len(shares)


def _is(setting: Union[float, torch.Tensor], number: float) -> bool:
    """Compare a setting, which may be a tensor that a compiled step must not look into, with a number."""
    return not torch.is_tensor(setting) and setting == number


def self_distillation_loss(
        logits: Sequence[torch.Tensor],
        target: Optional[torch.Tensor],
        hints: Optional[Sequence[Optional[torch.Tensor]]] = None,
        hint_target: Optional[torch.Tensor] = None,
        alpha: float = 0.5,
        temperature: float = 3.0,
        square_temperature: bool = True,
        hint_weight: float = 0.03,
        hint_form: str = 'mean',
        exit_teacher: str = 'deepest',
        weights: Optional[Sequence[float]] = None,
        **supervision: Any,
) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
    """Compute the whole loss of Be Your Own Teacher: the deepest exit teaches the shallow ones.

        Σ_i w_i·[(1−α)·L(z_i, y) + α·KL(z_C ‖ z_i; T) + λ·d(F_i, F_C)]  over the auxiliary exits, plus L(z_C, y)

    L is the cross entropy, or what else `supervision_terms` is asked for; d is `hint_loss`. The deepest exit learns
    from L alone, with weight 1. A term whose weight is 0 is not computed; α = λ = 0 is deep supervision.

    Args:
        logits: One tensor (N, num_classes) an exit, shallow to deep.
        target: Labels (N,), or class probabilities (N, num_classes) if the criterion takes them. None where there are
            none, which takes an `alpha` of 1: the exits then learn from the deepest one alone, which learns nothing.
        hints: One tensor an auxiliary exit, (N, num_features) or (N, num_features, H, W), None at an exit that has no
            hint; not needed where `hint_weight` is 0.
        hint_target: The same of the deepest exit.
        alpha: Share of the divergence against L at auxiliary exits, 0 to 1.
        temperature: See `distillation_loss`.
        square_temperature: See `distillation_loss`.
        hint_weight: λ, the weight of the hint.
        hint_form: See `hint_loss`.
        exit_teacher: See `exit_teachers`; with several teachers the mean of their divergences.
        weights: w_i, see `weigh_exits`; all 1 when None.
        **supervision: Further arguments of `supervision_terms`.

    Returns:
        The loss, a scalar, and its terms by name without their weights and detached: those of `supervision_terms` for
        every exit (`ce<i>`, ...), `kl<i>` and `hint<i>` for the auxiliary ones, numbered from 0.

    Raises:
        ValueError: There are no labels, and `alpha` is not 1.

    Examples:
        >>> logits = [torch.randn(4, 10) for _ in range(3)]
        >>> loss, terms = self_distillation_loss(logits, torch.tensor([0, 1, 2, 3]), hint_weight=0.)
        >>> sorted(terms)
        ['ce0', 'ce1', 'ce2', 'kl0', 'kl1']
    """
    terms: Dict[str, torch.Tensor] = {}
    logits = [_precise(z) for z in logits]
    deepest = len(logits) - 1
    supervision.setdefault('square_temperature', square_temperature)

    def supervised(i: int) -> torch.Tensor:
        weighted = supervision_terms(logits[i], target, **supervision)
        terms.update((f'{name}{i}', value) for name, (_, value) in weighted.items())
        return sum(weight * value for weight, value in weighted.values())

    if target is None and not _is(alpha, 1):
        raise ValueError(f'target=None: without labels only alpha=1 can be had, not alpha={alpha}.')
    loss = supervised(deepest) if target is not None else logits[deepest].new_zeros(())
    for i, teachers in enumerate(exit_teachers(logits, exit_teacher)):
        weight = 1.0 if weights is None else weights[i]
        if not _is(alpha, 1):
            loss = loss + weight * (1 - alpha) * supervised(i)
        if not _is(alpha, 0):
            divergences = [distillation_loss(logits[i], t, temperature, square_temperature) for t in teachers]
            terms[f'kl{i}'] = sum(divergences) / len(divergences)
            loss = loss + weight * alpha * terms[f'kl{i}']
        if not _is(hint_weight, 0) and hints[i] is not None:
            terms[f'hint{i}'] = hint_loss(hints[i], hint_target, hint_form)
            loss = loss + weight * hint_weight * terms[f'hint{i}']
    return loss, {name: terms[name].detach() for name in sorted(terms)}
