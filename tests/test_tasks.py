import dataclasses
import math
from copy import deepcopy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from timm_selfdistill.losses import distillation_loss
from timm_selfdistill.models.heads import EXIT_HEADS
from timm_selfdistill.tasks import DistillationConfig, Linear, SelfDistillationTask


@pytest.fixture
def batch():
    return torch.randn(6, 3, 64, 64), torch.tensor([0, 1, 2, 3, 4, 0])


def make_task(model, **kwargs):
    """Create a task of settings and, by the same names as theirs, other arguments of the task."""
    names = {field.name for field in dataclasses.fields(DistillationConfig)}
    config = DistillationConfig(**{name: kwargs.pop(name) for name in names & set(kwargs)})
    return SelfDistillationTask(model, config, verbose=False, **kwargs).train()


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
    widths = [head.num_features for head in tiny.exit_heads]
    assert (widths, tiny.head_hidden_size) == ([96, 128], 96)
    assert list(task.get_task_state()['projections']) == ['1.weight', '1.bias']  # where the widths differ
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


# -- teachers ---------------------------------------------------------------------------------------------------------


def make_teacher(**kwargs):
    return timm.create_model('test_resnet', num_classes=5, **kwargs)


def test_a_teacher_is_frozen_and_stays_in_eval_mode(tiny, batch):
    teacher = make_teacher().train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    task = make_task(tiny, teacher=teacher, label_weight=0.5)
    result = task(*batch)
    result['loss'].backward()
    assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())  # batch norm's averages too
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert [n for n, p in task.trainable_module.named_parameters() if p.grad is None] == []
    assert {f'teacher{i}' for i in range(3)} <= set(result)
    own = {id(p) for p in task.trainable_module.parameters()}
    assert not any(id(p) in own for p in teacher.parameters())


def test_a_teacher_sees_the_same_images_as_it_expects_them(tiny):
    """Classic distillation of images normalised for the student, by a teacher with a normalisation of its own."""
    pixels = torch.rand(6, 3, 64, 64)
    teacher = make_teacher(pretrained_cfg_overlay=dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    their_mean, their_std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    task = make_task(tiny, teacher=teacher, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), label_weight=0., alpha=0.)
    result = task((pixels - mean) / std, torch.zeros(6, dtype=torch.long))
    with torch.no_grad():
        expected = distillation_loss(result['output'], teacher((pixels - their_mean) / their_std), 1.0)
    assert result['teacher2'].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_teacher_of_other_classes_is_refused(tiny):
    teacher = timm.create_model('test_resnet', num_classes=7)
    with pytest.raises(ValueError, match='teacher test_resnet has 7 classes, the student test_resnet_sd 5'):
        make_task(tiny, teacher=teacher)


def test_an_average_of_the_weights_is_not_taught_by_a_copy_of_the_teacher(tiny):
    task = make_task(tiny, teacher=make_teacher())
    task.setup_ema(decay=0.5)
    assert not any('teacher' in name for name in task.trainable_module_ema.state_dict())
    assert not any('teacher' in name for name in task.get_checkpoint_state()['state_dict'])


# -- what changes in the course of training ---------------------------------------------------------------------------


def test_schedules_run_from_start_to_end(tiny):
    task = make_task(tiny, alpha=Linear(0., 0.8), temperature=Linear(4., 2.), exit_weights='ramp')
    shares = [tiny.stages[i].share for i in tiny.exits]
    for progress, alpha, temperature in ((0., 0., 4.), (0.5, 0.4, 3.), (1., 0.8, 2.)):
        task.set_progress(progress)
        assert [task.loss_args[name] for name in ('alpha', 'temperature')] == pytest.approx([alpha, temperature])
        assert task.loss_args['weights'] == pytest.approx([0.01 + (s - 0.01) * progress for s in shares])


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_in_gradient_equilibrium_a_section_learns_from_the_mean_of_the_exits_behind_it(tiny, batch):
    images, target = batch[0].double(), batch[1]
    tiny.double().eval()
    of_exit = []
    for i in range(3):
        tiny.zero_grad()
        torch.nn.functional.cross_entropy(tiny.forward_exits(images)[i], target).backward()
        of_exit.append(gradients(tiny))
    tiny.zero_grad()
    task = make_task(tiny, alpha=0., hint_weight=0., exit_weights='equilibrium').eval()
    task(images, target)['loss'].backward()
    seen = set()
    for name, gradient in gradients(tiny).items():
        behind = [g[name] for g in of_exit if name in g]
        scale = len(behind) if name.startswith('backbone') else 1
        seen.add(scale)
        assert torch.allclose(gradient, sum(behind) / scale, rtol=1e-9, atol=1e-14), name
    assert seen == {1, 2, 3}


@pytest.mark.parametrize('weighting', ['equal', 'equilibrium'])
def test_in_the_last_phase_the_backbone_learns_from_the_deepest_exit_alone(tiny, batch, weighting):
    images, target = batch[0].double(), batch[1]
    tiny.double().eval()
    torch.nn.functional.cross_entropy(tiny(images), target).backward()
    plain = gradients(tiny)
    tiny.zero_grad()
    task = make_task(tiny, exit_weights=weighting).eval()
    task.set_last_phase()
    task(images, target)['loss'].backward()
    for name, p in tiny.backbone.named_parameters():
        assert torch.allclose(p.grad, plain[f'backbone.{name}'], rtol=1e-9, atol=1e-14), name
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tiny.exit_heads.parameters())
    tiny.zero_grad()
    task.set_last_phase(False)
    task(images, target)['loss'].backward()
    assert not torch.allclose(tiny.backbone.conv1[0].weight.grad, plain['backbone.conv1.0.weight'])


# -- hints and heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('exit_head', EXIT_HEADS)
@pytest.mark.parametrize('hint_on', ['features', 'maps'])
def test_hints_of_every_kind_of_head(exit_head, hint_on, batch):
    model = timm.create_model('test_resnet_sd', num_classes=5, exits=(2, 3), exit_head=exit_head)
    task = make_task(model, hint_on=hint_on)
    images = batch[0][..., :52, :60]  # sizes that no stride divides
    result = task(images, batch[1])
    result['loss'].backward()
    assert result['hint0'] > 0
    assert [n for n, p in task.named_parameters() if p.grad is None] == []
    if exit_head == 'bottleneck-wide':  # as long as the deepest exit's features, so nothing is projected
        assert hint_on == 'maps' or not list(task.trainable_module.projections.parameters())


@pytest.mark.parametrize('setting, message', [
    (dict(alpha=1.5), 'alpha=1.5: expected a number from 0 to 1'),
    (dict(alpha=math.nan), 'alpha=nan'),
    (dict(temperature=0), 'temperature=0: expected a number greater than 0'),
    (dict(hint_weight=-1), 'hint_weight=-1: expected a number of 0 or more'),
    (dict(alpha=Linear(0.5, -0.1)), r'alpha=Linear\(start=0.5, end=-0.1\): expected a number from 0 to 1'),
    (dict(temperature=Linear(3., 0)), r'temperature=Linear\(.*end=0\): expected a number greater than 0'),
    (dict(teacher_temperature=-1), 'teacher_temperature=-1: expected a number greater than 0'),
    (dict(eta=1.2), 'eta=1.2: expected a number from 0 to 1'),
    (dict(label_weight=-0.5), 'label_weight=-0.5: expected a number from 0 to 1'),
    (dict(patriarch='tsd', tsd_k=6), 'tsd_k=6: expected a number from 2 to 5, the number of classes'),
    (dict(patriarch='lax'), "patriarch='lax': unknown, expected one of plain, tsd, label-smoothing, conf"),
    (dict(exit_teacher='first'), "exit_teacher='first': unknown, expected one of deepest, ensemble, next, all"),
    (dict(exit_weights='heavy'), "exit_weights='heavy': unknown, expected one of equal, cost, ramp, equilibrium"),
    (dict(hint_on='logits'), "hint_on='logits': unknown, expected one of features, maps"),
])
def test_settings_out_of_range_are_refused(tiny, setting, message):
    with pytest.raises(ValueError, match=message):
        make_task(tiny, **setting)


@pytest.mark.slow
@pytest.mark.parametrize('weighting', ['ramp', 'equilibrium'])
def test_a_compiled_task_is_the_same_task_without_graph_breaks_or_endless_recompiling(tiny, weighting):
    torch._dynamo.reset()
    tasks = [
        make_task(
            deepcopy(tiny), exit_weights=weighting, alpha=Linear(0.5, 0.9), temperature=Linear(3., 1.),
            exit_teacher='ensemble', teacher=timm.create_model('test_resnet', num_classes=5),
        ) for _ in range(2)
    ]
    tasks[1].load_state_dict(tasks[0].state_dict())
    tasks[1].compile(backend='aot_eager')
    torch._dynamo.utils.counters.clear()
    x, y = torch.randn(4, 3, 32, 32), torch.randint(5, (4,))
    for step in range(8):
        for task in tasks:
            task.train()
            task.zero_grad()
            task.set_progress((step + 0.5) / 8)
            result = task(x, y)
            result['loss'].backward()
        graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
        if step == 4:  # after a few steps torch takes such numbers for inputs
            settled = graphs
    assert graphs == settled, 'numbers that follow a schedule are compiled in'
    assert not torch._dynamo.utils.counters['graph_break']
    one, other = ([p.grad for p in task.trainable_module.parameters()] for task in tasks)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item()) for a, b in zip(one, other))
