"""The losses against a plain NumPy calculation in float64, and the laws they must obey."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from timm_selfdistill.losses import distillation_loss, hint_loss, self_distillation_loss

N, C, D, EXITS = 12, 7, 5, 4


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(z, y):
    return -np.log(softmax(z)[np.arange(len(y)), y]).mean()


def divergence(student, teacher, temperature):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return (p * np.log(p / q)).sum(-1).mean()


@pytest.fixture
def case():
    rng = np.random.default_rng(0)

    def tensor(*shape):
        return torch.tensor(rng.normal(size=shape) * 3, requires_grad=True)

    return dict(
        logits=[tensor(N, C) for _ in range(EXITS)],
        target=torch.tensor(rng.integers(0, C, N)),
        hints=[tensor(N, D) for _ in range(EXITS - 1)],
        hint_target=tensor(N, D),
    )


@pytest.mark.parametrize('temperature', [1.0, 3.0, 7.5])
@pytest.mark.parametrize('square', [True, False])
def test_divergence_is_that_of_the_teacher_from_the_student(case, temperature, square):
    student, teacher = case['logits'][:2]
    expected = divergence(student.detach().numpy(), teacher.detach().numpy(), temperature)
    expected *= temperature ** 2 if square else 1
    assert distillation_loss(student, teacher, temperature, square).item() == pytest.approx(expected, rel=1e-12)


def test_divergence_is_zero_only_at_the_teacher(case):
    z = case['logits'][0]
    assert distillation_loss(z, z + 5.0).item() == pytest.approx(0, abs=1e-12)  # logits may differ by a constant
    assert distillation_loss(z, z.flip(0)).item() > 0.1


def test_squared_temperature_keeps_the_gradient_from_fading(case):
    def gradient(temperature, square):
        student = case['logits'][0].detach().clone().requires_grad_()
        distillation_loss(student, case['logits'][1], temperature, square).backward()
        return student.grad.norm().item()

    assert gradient(100., True) == pytest.approx(gradient(50., True), rel=0.1)
    assert gradient(100., False) == pytest.approx(gradient(50., False) / 4, rel=0.1)


def test_hint_is_a_mean_with_a_gradient_everywhere(case):
    a, b = case['hints'][0], case['hint_target']
    assert hint_loss(a, b).item() == pytest.approx(((a - b) ** 2).mean().item(), rel=1e-12)
    same = a.detach().clone().requires_grad_()
    hint_loss(same, a).backward()
    assert torch.equal(same.grad, torch.zeros_like(same))  # where a norm would give NaN


@pytest.mark.parametrize('alpha, weight', [(0.5, 0.03), (0.3, 1.0), (0.0, 0.0), (1.0, 0.0), (0.0, 0.5)])
def test_the_whole_loss_against_numpy(case, alpha, weight):
    z = [t.detach().numpy() for t in case['logits']]
    y = case['target'].numpy()
    f, teacher = [t.detach().numpy() for t in case['hints']], case['hint_target'].detach().numpy()
    expected = cross_entropy(z[-1], y)
    for i in range(EXITS - 1):
        expected += (1 - alpha) * cross_entropy(z[i], y)
        expected += alpha * 9 * divergence(z[i], z[-1], 3.0)
        expected += weight * ((f[i] - teacher) ** 2).mean()
    loss, _ = self_distillation_loss(**case, alpha=alpha, hint_weight=weight)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_deepest_exit_learns_from_the_labels_alone(case):
    loss, _ = self_distillation_loss(**case, alpha=0.5, hint_weight=1.0)
    loss.backward()
    deepest = case['logits'][-1].detach().clone().requires_grad_()
    F.cross_entropy(deepest, case['target']).backward()
    assert torch.allclose(case['logits'][-1].grad, deepest.grad, rtol=1e-12)
    assert case['hint_target'].grad is None
    assert all(t.grad.abs().sum() > 0 for t in case['logits'] + case['hints'])


def test_terms_are_named_and_can_be_switched_off(case):
    def names(**weights):
        return list(self_distillation_loss(**case, **weights)[1])

    ce, kl, hint = ([f'{term}{i}' for i in range(n)] for term, n in (('ce', 4), ('kl', 3), ('hint', 3)))
    assert names() == ce + hint + kl
    assert names(hint_weight=0) == ce + kl
    assert names(alpha=0) == ce + hint
    assert names(alpha=0, hint_weight=0) == ce
    assert names(alpha=1, hint_weight=0) == ['ce3'] + kl
    assert not any(t.requires_grad for t in self_distillation_loss(**case)[1].values())


def test_deep_supervision_is_the_sum_of_cross_entropies(case):
    case.update(hints=None, hint_target=None)
    loss, terms = self_distillation_loss(**case, alpha=0, hint_weight=0)
    assert loss.item() == pytest.approx(sum(t.item() for t in terms.values()), rel=1e-12)


@pytest.mark.parametrize('parts', [2, 3, 4])
def test_a_batch_split_evenly_gives_the_same_loss_and_gradient(case, parts):
    leaves = [*case['logits'], *case['hints']]
    loss, _ = self_distillation_loss(**case)
    whole = torch.autograd.grad(loss, leaves)
    size = N // parts
    total = 0.
    for start in range(0, N, size):
        def cut(t, start=start):
            return t[start:start + size]
        total = total + self_distillation_loss(
            [cut(t) for t in case['logits']],
            cut(case['target']),
            [cut(t) for t in case['hints']],
            cut(case['hint_target']),
        )[0] / parts
    assert total.item() == pytest.approx(loss.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(total, leaves), whole):
        assert torch.allclose(a, b, rtol=1e-12)
