"""The losses against a plain NumPy calculation in float64, and the laws they must obey."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.loss import LabelSmoothingCrossEntropy

from timm_selfdistill.losses import (
    EXIT_TEACHERS,
    TOLERANCES,
    confidence_penalty,
    distillation_loss,
    eta_for_top_score,
    exit_teachers,
    hint_loss,
    self_distillation_loss,
    supervision_terms,
    top_score_difference,
    uniform_divergence,
    weigh_exits,
)

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


# -- the tolerant teacher ---------------------------------------------------------------------------------------------


def loss_of(z, **supervision):
    """Return one image's loss, the label being class 0."""
    return sum(weight * value for weight, value in supervision_terms(z, torch.tensor([0]), **supervision).values())


def scores_of(label_score, sharing, classes=10):
    """Return log scores (1, classes) where the label has one, `sharing` others the rest in equal parts, and no more."""
    scores = torch.full((1, classes), 1e-13, dtype=torch.float64)
    scores[0, 0], scores[0, 1:1 + sharing] = label_score, (1 - label_score) / sharing
    return scores.log()


def assert_minimum(z, **supervision):
    """Check that the gradient is zero there, and that no random step leads lower while the label stays on top."""
    z.requires_grad_()
    loss = loss_of(z, **supervision)
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-6
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.1, 1., 5.):
        for _ in range(20):
            moved = z.detach() + scale * torch.randn(z.shape, generator=generator, dtype=z.dtype)
            if moved.argmax() == 0:
                assert loss_of(moved, **supervision) >= loss.detach() - 1e-9


@pytest.mark.parametrize('eta, label_score', [(0.3, 0.343), (0.4, 0.533), (0.5, 0.80), (0.55, 0.978)])
def test_the_top_score_difference_caps_the_labels_score(eta, label_score):
    """The law: f_y = η(K−1) / ((1−η)K), here K = 5; no mass is left beyond rank K."""
    law = eta * 4 / ((1 - eta) * 5)
    assert law == pytest.approx(label_score, abs=5e-4)
    assert_minimum(scores_of(law, sharing=4), patriarch='tsd', eta=eta, tsd_k=5)


@pytest.mark.parametrize('supervision', [dict(patriarch='tsd', eta=0.6, tsd_k=5), dict()])
def test_beyond_the_last_cap_the_label_takes_all(supervision):
    for score in (0.3, 0.6, 0.9, 0.99, 0.9999):
        z = scores_of(score, sharing=4).requires_grad_()
        assert torch.autograd.grad(loss_of(z, **supervision), z)[0][0, 0] < 0


@pytest.mark.parametrize('kind', TOLERANCES)
@pytest.mark.parametrize('score', [0.4, 0.8, 0.95])
def test_patriarchs_of_equal_softness(kind, score):
    eta = eta_for_top_score(kind, score, num_classes=10, k=5)
    assert_minimum(scores_of(score, sharing=4 if kind == 'tsd' else 9), patriarch=kind, eta=eta, tsd_k=5)


def test_only_the_top_score_difference_leaves_the_runners_up_their_differences():
    scores = np.array([[0.6, 0.1, 0.1, 0.1, 0.1], [0.6, 0.25, 0.1, 0.04, 0.01]])
    z = torch.tensor(np.log(scores))
    a, b = top_score_difference(z, 5).tolist()
    assert a == pytest.approx(b, abs=1e-12) == pytest.approx(0.5, abs=1e-12)
    assert uniform_divergence(z)[1] - uniform_divergence(z)[0] > 0.1
    assert confidence_penalty(z)[1] - confidence_penalty(z)[0] > 0.1


@pytest.mark.parametrize('k', [2, 3, C])
def test_tolerances_against_numpy(case, k):
    z = case['logits'][0].detach()
    f = softmax(z.numpy())
    ranked = np.sort(f, axis=-1)[:, ::-1]
    expected = ranked[:, 0] - ranked[:, 1:k].sum(-1) / (k - 1)
    assert np.allclose(top_score_difference(z, k).numpy(), expected, rtol=1e-12)
    assert np.allclose(uniform_divergence(z).numpy(), (np.log(1 / C / f) / C).sum(-1), rtol=1e-12)
    assert np.allclose(confidence_penalty(z).numpy(), (f * np.log(f)).sum(-1), rtol=1e-12)


def test_label_smoothing_is_timms(case):
    z, y = case['logits'][0], case['target']
    terms = supervision_terms(z, y, patriarch='label-smoothing', eta=0.9)
    loss = sum(weight * value for weight, value in terms.values())
    assert loss.item() == pytest.approx((LabelSmoothingCrossEntropy(0.1)(z, y) - 0.1 * np.log(C)).item(), rel=1e-12)


@pytest.mark.parametrize('label_weight, temperature', [(0.6, 1.0), (0.1, 4.0), (0.0, 1.0)])
def test_a_students_loss_against_numpy(case, label_weight, temperature):
    student, teacher = case['logits'][:2]
    loss = sum(weight * value for weight, value in supervision_terms(
        student, case['target'], teacher_logits=teacher, label_weight=label_weight, teacher_temperature=temperature,
    ).values())
    z, t = student.detach().numpy(), teacher.detach().numpy()
    expected = label_weight * cross_entropy(z, case['target'].numpy())
    expected += (1 - label_weight) * temperature ** 2 * divergence(z, t, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert teacher.grad is None


def test_a_student_that_agrees_with_its_teacher_learns_from_labels_alone(case):
    z = case['logits'][0]
    terms = supervision_terms(z, case['target'], teacher_logits=z.detach())
    assert list(terms) == ['ce']
    terms = supervision_terms(z, case['target'], teacher_logits=z.detach(), label_weight=0.5)
    assert terms['teacher'][1].item() == pytest.approx(0, abs=1e-12)
    assert (terms['ce'][0], terms['teacher'][0]) == (0.5, 0.5)


@pytest.mark.parametrize('k', [1, 0, C + 1])
def test_k_out_of_range_is_refused(case, k):
    with pytest.raises(ValueError, match=f'k={k}: expected a number from 2 to {C}, the number of classes'):
        top_score_difference(case['logits'][0], k)


@pytest.mark.parametrize('kind, score, message', [
    ('tsd', 0.2, 'top_score=0.2: expected more than 0.2 and less than 1'),
    ('label-smoothing', 1.0, 'top_score=1.0: expected more than 0.1 and less than 1'),
    ('tolerant', 0.5, "'tolerant': unknown, expected one of tsd, label-smoothing, confidence-penalty"),
])
def test_a_softness_that_cannot_be_is_refused(kind, score, message):
    with pytest.raises(ValueError, match=message):
        eta_for_top_score(kind, score, num_classes=10)


# -- teachers and weights of the exits --------------------------------------------------------------------------------


def test_who_teaches_whom(case):
    z = case['logits']
    assert [[t is z[-1] for t in teachers] for teachers in exit_teachers(z, 'deepest')] == [[True]] * 3
    of_next = exit_teachers(z, 'next')
    assert [len(t) for t in of_next] == [1, 1, 1]
    assert all(teachers[0] is z[i + 1] for i, teachers in enumerate(of_next))
    of_all = exit_teachers(z, 'all')
    assert all(a is b for i, teachers in enumerate(of_all) for a, b in zip(teachers, z[i + 1:], strict=True))
    assert all(torch.equal(t[0], sum(z) / 4) for t in exit_teachers(z, 'ensemble'))


@pytest.mark.parametrize('kind', EXIT_TEACHERS)
def test_teachers_learn_nothing_from_their_pupils(case, kind):
    case.update(hints=None, hint_target=None)
    loss, _ = self_distillation_loss(**case, alpha=1.0, hint_weight=0, exit_teacher=kind)
    loss.backward()
    deepest = case['logits'][-1].detach().clone().requires_grad_()
    F.cross_entropy(deepest, case['target']).backward()
    assert torch.allclose(case['logits'][-1].grad, deepest.grad, rtol=1e-12)
    for i, teachers in enumerate(exit_teachers([z.detach() for z in case['logits']], kind)):
        z = case['logits'][i].detach().clone().requires_grad_()
        sum(distillation_loss(z, t) for t in teachers).div(len(teachers)).backward()
        assert torch.allclose(case['logits'][i].grad, z.grad, rtol=1e-12)


def test_weights_of_exits_sum_as_documented():
    shares = [0.2, 0.45, 0.8]
    assert weigh_exits('equal', shares) == weigh_exits('equilibrium', shares) == [1, 1, 1]
    by_cost = weigh_exits('cost', shares)
    assert sum(by_cost) == pytest.approx(3)
    assert by_cost[2] / by_cost[0] == pytest.approx(4)
    assert weigh_exits('ramp', shares, 0.) == pytest.approx([0.01] * 3)
    assert weigh_exits('ramp', shares, 1.) == pytest.approx(shares)
    assert sum(weigh_exits('ramp', shares, 0.5)) == pytest.approx(0.5 * (0.03 + sum(shares)))
    assert weigh_exits('cost', []) == []


def test_a_weight_counts_everything_at_its_exit(case):
    parts = [self_distillation_loss(**case, weights=[float(i == j) for j in range(3)])[0].item() for i in range(3)]
    deepest = self_distillation_loss(**case, weights=[0, 0, 0])[0].item()
    whole = self_distillation_loss(**case, weights=[2., 3., 5.])[0].item()
    assert whole == pytest.approx(deepest + sum(w * (p - deepest) for w, p in zip((2, 3, 5), parts)), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    exit_teacher=st.sampled_from(EXIT_TEACHERS),
    patriarch=st.sampled_from(['plain', *TOLERANCES]),
    alpha=st.floats(0, 1),
    eta=st.floats(0, 1),
    label_weight=st.floats(0, 1),
    taught=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_loss_is_a_mean_over_images(exit_teacher, patriarch, alpha, eta, label_weight, taught, seed):
    """A batch split in two gives the same loss and gradients, whatever the settings."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    logits, hints = [tensor(N, C) for _ in range(3)], [tensor(N, D, 2, 2) for _ in range(2)]
    hint_target = tensor(N, D, 2, 2)
    teacher = tensor(N, C) if taught else None
    target = torch.randint(C, (N,), generator=generator)

    def loss(rows):
        return self_distillation_loss(
            [z[rows] for z in logits], target[rows], [h[rows] for h in hints], hint_target[rows], alpha=alpha,
            exit_teacher=exit_teacher, weights=[0.5, 2.0], patriarch=patriarch, eta=eta, tsd_k=3,
            teacher_logits=None if teacher is None else teacher[rows], label_weight=label_weight,
        )[0]

    whole, halves = loss(slice(None)), (loss(slice(N // 2)) + loss(slice(N // 2, None))) / 2
    assert whole.item() == pytest.approx(halves.item(), rel=1e-10)
    leaves = [*logits, *hints]
    a, b = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (whole, halves))
    for x, y in zip(a, b):
        assert (x is None) == (y is None)
        assert x is None or torch.allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('call', [
    lambda z: exit_teachers(z, 'first'),
    lambda z: weigh_exits('first', [0.5]),
])
def test_kinds_that_do_not_exist_are_refused(case, call):
    with pytest.raises(ValueError, match="'first': unknown, expected one of"):
        call(case['logits'])
