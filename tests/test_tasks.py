import math

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from timm_selfdistill.tasks import SelfDistillationTask


@pytest.fixture
def batch():
    return torch.randn(6, 3, 64, 64), torch.tensor([0, 1, 2, 3, 4, 0])


def make_task(model, **kwargs):
    return SelfDistillationTask(model, verbose=False, **kwargs).train()


def test_a_step_names_its_terms_and_reaches_every_parameter(tiny, batch):
    task = make_task(tiny)
    result = task(*batch)
    assert list(result) == [
        'loss', 'output', 'ce0', 'ce1', 'ce2', 'hint0', 'hint1', 'kl0', 'kl1']
    assert result['output'].shape == (6, 5)
    expected = result['ce2'] + sum(
        0.5 * result[f'ce{i}'] + 0.5 * result[f'kl{i}'] + 0.03 * result[f'hint{i}'] for i in (0, 1))
    assert torch.allclose(result['loss'], expected)
    result['loss'].backward()
    assert [n for n, p in task.named_parameters() if p.grad is None] == []


def test_the_teachers_side_gets_no_gradient(tiny, batch):
    """Without labels nothing may reach the deepest exit's own parameters."""
    task = make_task(tiny, alpha=1.0, hint_weight=1.0)
    result = task(*batch)
    (result['loss'] - torch.nn.functional.cross_entropy(result['output'], batch[1])).backward()
    grads = {n: p.grad for n, p in tiny.named_parameters() if n.startswith(('backbone.layer4', 'backbone.fc'))}
    assert grads
    # the two cross entropies cancel up to rounding
    assert all(g is None or g.abs().max() < 1e-6 for g in grads.values())
    assert tiny.exit_heads[0].fc.weight.grad.abs().max() > 1e-4


def test_projections_stay_out_of_the_model(tiny):
    before = set(tiny.state_dict())
    task = make_task(tiny)
    assert set(task.get_eval_model().state_dict()) == before
    assert task.get_eval_model() is tiny
    assert len(task.get_task_state()['projections']) == 4
    assert len(make_task(tiny, hint_weight=0).trainable_module.projections) == 0


def test_the_optimizer_gets_the_projections(tiny):
    task = make_task(tiny)
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=0.1, weight_decay=0.1, layer_decay=0.9)
    grouped = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert grouped == {id(p) for p in task.parameters()}


def test_the_moving_average_is_a_model_of_its_own(tiny, batch):
    task = make_task(tiny)
    task.setup_ema(decay=0.5)
    with torch.no_grad():
        for p in tiny.parameters():
            p.add_(1.0)
    task.update_ema()
    average = task.get_eval_model(ema=True)
    assert average is not tiny
    assert torch.allclose(average.exit_heads[0].fc.weight + 0.5, tiny.exit_heads[0].fc.weight)
    assert not average.training


def test_checkpoint_state_brings_model_and_projections_back(tiny, batch):
    task = make_task(tiny)
    state = task.get_checkpoint_state()
    other = make_task(timm.create_model('test_resnet_sd', num_classes=5, exits=(2, 3)))
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    task.eval(), other.eval()
    for name, value in task(*batch).items():
        assert torch.equal(value, other(*batch)[name]), name


def test_deep_supervision_and_plain_training_are_settings(tiny, batch):
    result = make_task(tiny, alpha=0., hint_weight=0.)(*batch)
    assert torch.allclose(result['loss'], result['ce0'] + result['ce1'] + result['ce2'])
    plain = make_task(timm.create_model('test_resnet_sd', num_classes=5, exits=()))
    result = plain(*batch)
    assert list(result) == ['loss', 'output', 'ce0']
    assert torch.equal(result['loss'], result['ce0'])


def test_soft_targets(tiny, batch):
    task = make_task(tiny, criterion_kwargs=dict(soft_targets=True)).eval()
    hard = make_task(tiny).eval()
    one_hot = torch.nn.functional.one_hot(batch[1], 5).float()
    assert torch.allclose(task(batch[0], one_hot)['ce0'], hard(*batch)['ce0'])


@pytest.mark.parametrize('setting, message', [
    (dict(alpha=1.5), 'alpha=1.5: expected a number from 0 to 1'),
    (dict(alpha=math.nan), 'alpha=nan'),
    (dict(temperature=0), 'temperature=0: expected a number greater than 0'),
    (dict(hint_weight=-1), 'hint_weight=-1: expected 0 or more'),
])
def test_settings_out_of_range_are_refused(tiny, setting, message):
    with pytest.raises(ValueError, match=message):
        make_task(tiny, **setting)
