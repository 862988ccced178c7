import numpy as np
import pytest
import timm
import torch

from timm_selfdistill.metrics import ExitEvaluator, ensemble_logits, evaluate_exits, exit_costs, exit_table


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


def test_a_perfectly_calibrated_exit_has_no_calibration_error():
    logits = torch.tensor([[np.log(3.), 0.]]).repeat(4, 1).double()  # 75 % sure
    evaluator = ExitEvaluator()
    evaluator.update(logits, torch.tensor([0, 0, 0, 1]))
    assert evaluator.compute()['ece'] == pytest.approx(0, abs=1e-5)


def test_ensemble_averages_the_logits_of_all_exits():
    logits = [torch.randn(3, 4) for _ in range(5)]
    assert torch.allclose(ensemble_logits(logits), sum(logits) / 5)


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
    rows = exit_table(tiny, metrics, (3, 64, 64))
    assert [(r['exit'], r['stage']) for r in rows] == [
        ('exit0', 'layer2'), ('exit1', 'layer3'), ('exit2', 'layer4'), ('ensemble', 'all exits')]
    assert all({'params', 'macs', 'share', 'top1', 'top5', 'loss', 'ece', 'count'} <= set(r) for r in rows)
