"""Losses count in float32 at least, whatever comes in and whatever autocast would have."""
import pytest
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy

from timm_selfdistill.losses import (
    HINT_FORMS,
    TOLERANCES,
    confidence_penalty,
    distillation_loss,
    exit_teachers,
    hint_loss,
    self_distillation_loss,
    supervision_terms,
    top_score_difference,
    uniform_divergence,
)
from timm_selfdistill.tasks import DistillationConfig, SelfDistillationTask

N, C = 16, 50
LABELS = torch.arange(N) * 3
ONE_HOT = F.one_hot(LABELS, C).double()
SMOOTHING = LabelSmoothingCrossEntropy(0.1)


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def divergence(z, teacher, temperature):
    p, log_q = (teacher / temperature).softmax(-1), (z / temperature).log_softmax(-1)
    return (p * (p.log() - log_q)).sum(-1).mean()


def cross_entropy(z, target):
    return -(target * (z - z.logsumexp(-1, keepdim=True))).sum(-1).mean()


def top_difference(z):
    ranked = z.softmax(-1).sort(-1, descending=True).values
    return (ranked[:, 0] - ranked[:, 1:5].sum(-1) / 4).mean()


# Each loss of logits or features z, those of a teacher t and class probabilities p, (N, C); and the same written out.
LOSSES = {
    'divergence': (lambda z, t, p: distillation_loss(z, t), lambda z, t, p: 9 * divergence(z, t, 3.0)),
    'divergence without temperature': (
        lambda z, t, p: distillation_loss(z, t, 1.0, False), lambda z, t, p: divergence(z, t, 1.0)),
    'top score difference': (
        lambda z, t, p: top_score_difference(z, 5).mean(), lambda z, t, p: top_difference(z)),
    'uniform divergence': (
        lambda z, t, p: uniform_divergence(z).mean(), lambda z, t, p: cross_entropy(z, torch.full_like(z, 1 / C))),
    'confidence penalty': (
        lambda z, t, p: confidence_penalty(z).mean(),
        lambda z, t, p: (z.softmax(-1) * z.softmax(-1).log()).sum(-1).mean()),
    'labels': (lambda z, t, p: supervision_terms(z, LABELS)['ce'][1], lambda z, t, p: cross_entropy(z, ONE_HOT)),
    'probabilities': (lambda z, t, p: supervision_terms(z, p)['ce'][1], lambda z, t, p: cross_entropy(z, p)),
    'label smoothing': (
        lambda z, t, p: supervision_terms(z, LABELS, criterion=SMOOTHING)['ce'][1],
        lambda z, t, p: cross_entropy(z, 0.9 * ONE_HOT + 0.1 / C)),
    'hint, mean': (lambda z, t, p: hint_loss(z, t), lambda z, t, p: ((z - t) ** 2).mean()),
    'hint, sum': (lambda z, t, p: hint_loss(z, t, 'sum'), lambda z, t, p: ((z - t) ** 2).sum() / N),
    'hint, norm': (lambda z, t, p: hint_loss(z, t, 'norm'), lambda z, t, p: (((z - t) ** 2).sum() / N).sqrt()),
    'all of it': (
        lambda z, t, p: self_distillation_loss([z, t], LABELS, hint_weight=0., exit_teacher='ensemble')[0],
        lambda z, t, p: 0.5 * cross_entropy(z, ONE_HOT) + 4.5 * divergence(z, ((z + t) / 2).detach(), 3.0)),
}


def both(loss, dtype, autocast):
    """Return the loss and its gradient, to logits of a dtype, and what the gradient should be."""
    ours, reference = LOSSES[loss]
    z, *others = (tensor(N, C).to(dtype), tensor(N, C, seed=1).to(dtype), tensor(N, C, seed=2).softmax(-1).to(dtype))
    exact = z.double().requires_grad_()
    reference(exact, *(t.double() for t in others)).backward()
    z.requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        value = ours(z, *others)
    value.backward()
    return value, z.grad, exact.grad


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('dtype, ulp', [(torch.bfloat16, 2 ** -8), (torch.float16, 2 ** -11)])
@pytest.mark.parametrize('loss', LOSSES)
def test_half_precision_costs_no_more_than_the_rounding_of_the_gradient(loss, dtype, ulp, autocast):
    value, gradient, expected = both(loss, dtype, autocast)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    # a last step in float32 cancels probabilities against each other, hence the second bound
    assert ((gradient.double() - expected).abs() <= 1.01 * ulp * expected.abs() + 2e-7).all()


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('loss', LOSSES)
def test_full_and_double_precision_stay_what_they_are(loss, autocast):
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        value, gradient, expected = both(loss, dtype, autocast)
        assert value.dtype == gradient.dtype == dtype
        assert (gradient.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize('form', HINT_FORMS)
def test_sides_of_different_precision_meet_in_the_higher_one(form):
    student, teacher = tensor(N, C).bfloat16(), tensor(N, C, seed=1)
    for one, other in ((student, teacher.float()), (student.float(), teacher.bfloat16())):
        assert hint_loss(one, other, form).dtype == distillation_loss(one, other).dtype == torch.float32
        assert hint_loss(one, other, form).item() == pytest.approx(
            hint_loss(one.double(), other.double(), form).item(), rel=1e-5)
        assert distillation_loss(one, other).item() == pytest.approx(
            distillation_loss(one.double(), other.double()).item(), rel=1e-5)


def test_an_ensemble_of_half_precision_is_not_rounded():
    logits = [tensor(N, C, seed=i).bfloat16() for i in range(3)]
    ensemble = exit_teachers(logits, 'ensemble')[0][0]
    torch.testing.assert_close(ensemble.double(), sum(z.double() for z in logits) / 3, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_compiled_as_one_graph_under_autocast():
    torch._dynamo.reset()
    compiled = torch.compile(self_distillation_loss, fullgraph=True, backend='aot_eager')
    values, gradients = [], []
    for loss in (self_distillation_loss, compiled):
        for form, tolerance in zip(HINT_FORMS, TOLERANCES, strict=True):
            logits = [tensor(N, C, seed=i).bfloat16().requires_grad_() for i in range(3)]
            hints = [tensor(N, 8).bfloat16().requires_grad_(), None]
            with torch.autocast('cpu', torch.bfloat16):
                value, terms = loss(
                    logits, LABELS, hints, tensor(N, 8).bfloat16(), hint_form=form, patriarch=tolerance, eta=0.5,
                    teacher_logits=tensor(N, C, seed=9).bfloat16(), label_weight=0.5)
            value.backward()
            assert {t.dtype for t in (value, *terms.values())} == {torch.float32}
            assert terms['hint0'] == 0 and 'hint1' not in terms
            assert not hints[0].grad.any()  # finite where the distance is zero
            values.append(value.detach())
            gradients.append(torch.stack([z.grad for z in logits]))
    for i in range(len(HINT_FORMS)):
        torch.testing.assert_close(values[i], values[i + len(HINT_FORMS)], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients[i], gradients[i + len(HINT_FORMS)], rtol=2 ** -7, atol=1e-6)


def test_a_task_counts_in_float32_under_autocast(tiny):
    task = SelfDistillationTask(tiny, DistillationConfig(patriarch='tsd', eta=0.5), verbose=False).train()
    with torch.autocast('cpu', torch.bfloat16):
        result = task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    assert result['output'].dtype == torch.bfloat16
    assert {v.dtype for k, v in result.items() if k != 'output'} == {torch.float32}
