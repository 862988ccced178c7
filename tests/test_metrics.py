import itertools

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from timm_selfdistill.costs import exit_costs
from timm_selfdistill.metrics import (
    ExitEvaluator,
    area_under_risk_coverage,
    collect_features,
    collect_logits,
    ensemble_logits,
    evaluate_exits,
    exit_table,
    learn_ensemble,
)
from timm_selfdistill.models.probe import eval_mode


def test_counts_loss_and_calibration_against_numpy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(1000, 10)) * 2, rng.integers(0, 10, 1000)
    evaluator = ExitEvaluator(bins=15)
    for start in range(0, 1000, 300):  # the last batch is ragged
        evaluator.update(torch.tensor(logits[start:start + 300]), torch.tensor(labels[start:start + 300]))
    out = evaluator.compute()

    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rank = (p > p[np.arange(1000), labels][:, None]).sum(-1)
    assert (out['count'], out['top1_count'], out['top5_count']) == (1000, (rank == 0).sum(), (rank < 5).sum())
    assert out['top1'] == pytest.approx((rank == 0).mean() * 100)
    assert out['loss'] == pytest.approx(-np.log(p[np.arange(1000), labels]).mean(), rel=1e-5)
    confidence, correct = p.max(-1), rank == 0
    error = 0.
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert out['ece'] == pytest.approx(100 * error, rel=1e-4)
    wrong = ~correct[np.argsort(-confidence)]
    assert out['aurc'] == pytest.approx(100 * np.mean(np.cumsum(wrong) / np.arange(1, 1001)), rel=1e-6)


@pytest.mark.parametrize('seed', range(20))
def test_the_area_under_risk_and_coverage_is_a_mean_over_all_orders_of_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 7, (1,), generator=generator))
    confidence = torch.randint(3, (count,), generator=generator) / 2
    correct = torch.rand(count, generator=generator) < 0.5
    areas = []
    for order in itertools.permutations(range(count)):
        if all(confidence[a] >= confidence[b] for a, b in zip(order, order[1:])):
            wrong = (~correct[list(order)]).double()
            areas.append((wrong.cumsum(0) / torch.arange(1, count + 1)).mean().item())
    found = area_under_risk_coverage(confidence, correct)
    assert found == pytest.approx(sum(areas) / len(areas))
    assert area_under_risk_coverage(confidence ** 2 * 5, correct) == pytest.approx(found)  # the order alone counts


def test_a_perfectly_calibrated_exit_has_no_calibration_error():
    logits = torch.tensor([[np.log(3.), 0.]]).repeat(4, 1).double()  # 75 % sure
    evaluator = ExitEvaluator()
    evaluator.update(logits, torch.tensor([0, 0, 0, 1]))
    assert evaluator.compute()['ece'] == pytest.approx(0, abs=1e-5)


def test_ensemble_averages_the_logits_of_all_exits():
    logits = [torch.randn(3, 4) for _ in range(5)]
    assert torch.allclose(ensemble_logits(logits), sum(logits) / 5)


def test_the_ensemble_by_probabilities_is_the_logarithm_of_the_mean_softmax():
    logits = [10 * torch.randn(3, 4, dtype=torch.float64) for _ in range(5)]
    out = ensemble_logits(logits, by='probabilities')
    assert torch.allclose(out.exp(), sum(z.softmax(-1) for z in logits) / 5)
    assert torch.allclose(out.exp().sum(-1), torch.ones(3, dtype=torch.float64))


def test_the_weighted_ensemble_sums_the_logits_with_its_weights():
    logits = [torch.randn(3, 4) for _ in range(3)]
    assert torch.allclose(ensemble_logits(logits, weights=torch.full((3,), 1 / 3)), ensemble_logits(logits))
    weights = torch.tensor([2., 0., -1.])
    assert torch.allclose(ensemble_logits(logits, weights=weights), 2 * logits[0] - logits[2])


@pytest.mark.parametrize('arguments, message', [
    (dict(by='votes'), "by='votes': unknown, expected logits or probabilities"),
    (dict(weights=torch.ones(2)), r'weights of shape \(2,\): expected \(3,\)'),
    (dict(weights=torch.ones(3), by='probabilities'), "by='logits' only"),
])
def test_an_ensemble_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ensemble_logits([torch.zeros(1, 2)] * 3, **arguments)


def test_the_learned_ensemble_is_no_worse_than_the_mean_and_every_single_exit_where_it_was_learned():
    target = torch.randint(0, 6, (400,))
    label = F.one_hot(target, 6).float()
    # exits of different skill, each with errors of its own, so that every one of them is of use
    logits = [skill * label + torch.randn(400, 6) for skill in (0.5, 1., 2.)]
    weights = learn_ensemble(logits, target)
    assert weights.shape == (3,)
    assert weights.sum().item() == pytest.approx(1)
    assert 0 < weights[0] < weights[1] < weights[2]
    loss = F.cross_entropy(ensemble_logits(logits, weights=weights), target)
    assert all(loss < F.cross_entropy(other, target) for other in [ensemble_logits(logits), *logits])
    for i in range(3):  # no step towards an exit helps
        nudged = 0.98 * weights + 0.02 * F.one_hot(torch.tensor(i), 3)
        assert F.cross_entropy(ensemble_logits(logits, weights=nudged), target) >= loss - 1e-7
    assert torch.equal(weights, learn_ensemble(logits, target))


def test_the_learned_ensemble_drops_exits_that_only_guess_and_stays_finite_on_a_perfect_one():
    target = torch.randint(0, 6, (200,))
    with torch.no_grad():
        weights = learn_ensemble([5 * torch.randn(200, 6), 9 * F.one_hot(target, 6).float()], target)
    assert weights[1] > 0.999 and weights.isfinite().all()


def test_another_ensemble_can_be_measured(tiny):
    batches = [(torch.randn(8, 3, 64, 64), torch.randint(0, 5, (8,)))]
    metrics = evaluate_exits(tiny, batches, ensemble=lambda logits: logits[1])
    assert metrics['ensemble'] == metrics['exit1'] != metrics['exit2']


def test_logits_and_features_are_gathered_in_order(tiny):
    images, labels = torch.randn(20, 3, 64, 64), torch.randint(0, 5, (20,))
    batches = [(images[i:i + 8], labels[i:i + 8]) for i in range(0, 20, 8)]
    logits, target = collect_logits(tiny.train(), batches)
    features, _ = collect_features(tiny, batches)
    assert tiny.training
    expected = tiny.eval().forward_exits(images, return_features=True)
    assert torch.equal(target, labels)
    for got, wanted in zip((logits, features), expected):
        assert len(got) == 3 and not any(g.requires_grad for g in got)
        assert all(torch.allclose(g, w, atol=1e-5) for g, w in zip(got, wanted))


def test_eval_mode_gives_every_module_its_mode_back_whatever_happens(tiny):
    tiny.train()
    tiny.backbone.layer1.eval()  # a frozen part
    before = [m.training for m in tiny.modules()]
    with pytest.raises(RuntimeError, match='half way'), eval_mode(tiny):
        assert not any(m.training for m in tiny.modules())
        raise RuntimeError('half way')
    assert [m.training for m in tiny.modules()] == before


def test_every_exit_is_measured_and_the_model_left_as_it_was(tiny):
    images, labels = torch.randn(20, 3, 64, 64), torch.randint(0, 5, (20,))
    batches = [(images[i:i + 8], labels[i:i + 8]) for i in range(0, 20, 8)]
    tiny.train()
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    metrics = evaluate_exits(tiny, batches)
    assert tiny.training
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    logits = tiny.eval().forward_exits(images)
    expected = [(z.argmax(1) == labels).sum().item() for z in [*logits, ensemble_logits(logits)]]
    assert list(metrics) == ['exit0', 'exit1', 'exit2', 'ensemble']
    assert [m['top1_count'] for m in metrics.values()] == expected
    assert all(m['count'] == 20 for m in metrics.values())


def test_costs_match_a_hand_count():
    model = timm.create_model('resnet18_sd', num_classes=10)
    costs = exit_costs(model, (3, 32, 32))
    # up to layer1 at 32×32 (a 16×16 map after the stem, 8×8 after the pool) and the head
    stem_params, block = 64 * 3 * 49 + 128, 2 * (64 * 64 * 9 + 128)
    head_params = (64 * 128 + 256) + (128 * 128 * 64 + 256) + (128 * 10 + 10)
    assert costs['exit0'].params == stem_params + 2 * block + head_params
    macs = 64 * 3 * 49 * 256 + 4 * 64 * 64 * 9 * 64
    macs += 64 * 128 * 64 + 128 * 128 * 64 + 128 * 10
    assert costs['exit0'].macs == macs
    plain = timm.create_model('resnet18', num_classes=10)
    assert costs['exit3'].params == sum(p.numel() for p in plain.parameters())
    assert costs['exit3'].share == 1.0
    assert costs['ensemble'].params == sum(p.numel() for p in model.parameters())
    assert costs['ensemble'].macs > costs['exit3'].macs > costs['exit2'].macs > costs['exit1'].macs > macs


def test_table_joins_costs_and_measurements(tiny):
    metrics = evaluate_exits(tiny, [(torch.randn(4, 3, 64, 64), torch.arange(4))])
    rows = exit_table(tiny, metrics, exit_costs(tiny, (3, 64, 64)))
    assert [(r['exit'], r['stage']) for r in rows] == [
        ('exit0', 'layer2'), ('exit1', 'layer3'), ('exit2', 'layer4'), ('ensemble', 'all exits')]
    assert all({'params', 'macs', 'share', 'top1', 'top5', 'loss', 'ece', 'count'} <= set(r) for r in rows)
