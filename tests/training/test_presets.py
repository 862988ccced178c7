"""What the authors' two code bases do, written out: their heads, their hints, their optimizer."""
import dataclasses

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers.images import write_two_colours
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.config import TrainConfig
from timm_selfdistill.losses import HINT_FORMS, hint_loss, self_distillation_loss
from timm_selfdistill.models.heads import exit_head_kind
from timm_selfdistill.models.probe import count_macs
from timm_selfdistill.tasks import DistillationConfig, SelfDistillationModule, SelfDistillationTask
from timm_selfdistill.training.presets import PRESETS
from timm_selfdistill.training.run import Run
from timm_selfdistill.training.trainer import train

# -- heads ------------------------------------------------------------------------------------------------------------


def norm(x, state, name):
    return F.batch_norm(x, *(state[f'{name}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')))


def bottleneck_attention(x, s, stride):
    def conv(y, name, **kwargs):
        return F.relu(norm(F.conv2d(y, s[f'{name}.conv.weight'], s[f'{name}.conv.bias'], **kwargs), s, f'{name}.bn'))

    gate = conv(x, 'attend.0', stride=2, padding=1)
    gate = F.conv_transpose2d(gate, s['attend.1.weight'], s['attend.1.bias'], stride=2, padding=1)
    x = x * norm(gate, s, 'attend.2').sigmoid()
    return conv(conv(conv(x, 'reduce'), 'down', stride=stride), 'widen')


def separable_double(x, s, stride):
    def conv(y, name, stride):
        y = F.conv2d(y, s[f'{name}.conv_dw.weight'], stride=stride, padding=1, groups=y.shape[1])
        return F.relu(norm(F.conv2d(y, s[f'{name}.conv_pw.weight']), s, f'{name}.bn'))

    gate = F.relu(norm(conv(conv(x, 'attend.0', 2), 'attend.1', 1), s, 'attend.2'))
    x = x * F.interpolate(gate, scale_factor=2, mode='bilinear').sigmoid()
    for i in range({8: 3, 4: 2, 2: 1}[stride]):
        x = conv(conv(x, f'down.{i}.0', 2), f'down.{i}.1', 1)
    return x


WRITTEN_OUT = {'bottleneck-attention': bottleneck_attention, 'separable-double': separable_double}


@pytest.mark.parametrize('kind', WRITTEN_OUT)
@pytest.mark.parametrize('stride', [2, 4, 8])
def test_heads_are_those_of_the_authors_code(kind, stride):
    head = exit_head_kind(kind)(in_chs=6, num_classes=5, stride=stride, width=10, deep_features=24, deep_chs=48).eval()
    for m in head.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean, m.running_var):
                torch.nn.init.uniform_(t, 0.5, 1.5)
    x = torch.randn(3, 6, 16, 24)
    with torch.no_grad():
        expected = WRITTEN_OUT[kind](x, head.state_dict(), stride)
        torch.testing.assert_close(head.forward_map(x), expected)
        torch.testing.assert_close(head(x), head.fc(expected.mean((2, 3))))
    assert head.num_features == (24 if kind == 'bottleneck-attention' else 6 * stride)


@pytest.mark.parametrize('kind, macs, shapes, count', [
    ('bottleneck-attention', (52.48, 35.70, 30.46), dict(
        attend=[(64, 64, 3, 3), 64, 64, 64, (64, 64, 4, 4), 64, 64, 64], reduce=[(128, 64, 1, 1), 128, 128, 128],
        down=[(128, 128, 8, 8), 128, 128, 128], widen=[(512, 128, 1, 1), 512, 512, 512], fc=[(100, 512), 100],
    ), 15_164_240),
    ('separable-double', (12.40, 8.81, 5.44), dict(
        attend=[*[(64, 1, 3, 3), (64, 64, 1, 1), 64, 64] * 2, 64, 64],
        down=[
            *[(64, 1, 3, 3), (64, 64, 1, 1), 64, 64, (64, 1, 3, 3), (128, 64, 1, 1), 128, 128],
            *[(128, 1, 3, 3), (128, 128, 1, 1), 128, 128, (128, 1, 3, 3), (256, 128, 1, 1), 256, 256],
            *[(256, 1, 3, 3), (256, 256, 1, 1), 256, 256, (256, 1, 3, 3), (512, 256, 1, 1), 512, 512],
        ], fc=[(100, 512), 100],
    ), 12_283_344),
])
def test_heads_cost_on_resnet18_what_the_authors_do(kind, macs, shapes, count):
    with torch.device('meta'):
        model = timm.create_model('resnet18_cifar_sd', num_classes=100, exit_head=kind)
    assert sum(p.numel() for p in model.parameters()) == count
    first = {name: [tuple(p.shape) for p in getattr(model.exit_heads[0], name).parameters()] for name in shapes}
    assert first == {name: [s if isinstance(s, tuple) else (s,) for s in sizes] for name, sizes in shapes.items()}
    for i, head, expected in zip(model.exits, model.exit_heads, macs, strict=True):
        stage = model.stages[i]
        counted, _ = count_macs(head, torch.empty(1, stage.num_chs, *stage.size, device='meta'))
        assert counted / 1e6 == pytest.approx(expected, abs=0.006)


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(sorted(WRITTEN_OUT)), height=st.integers(1, 19), width=st.integers(1, 19),
    stride=st.integers(1, 12), batch_norm=st.booleans(),
)
def test_heads_take_maps_of_any_size(kind, height, width, stride, batch_norm):
    head = exit_head_kind(kind)(in_chs=4, num_classes=3, stride=stride, width=4, batch_norm=batch_norm).eval()
    assert head(torch.randn(2, 4, height, width)).shape == (2, 3)


@pytest.mark.parametrize('network, exits', [
    ('resnet18', (1, 3, 5)), ('resnet50', (1, 3, 5)), ('resnet152', (1, 3, 5)), ('vgg19_bn', (1, 2, 3))])
def test_dear_heads_stand_where_the_lighter_ones_do(network, exits):
    for kind in WRITTEN_OUT:
        with torch.device('meta'):
            assert timm.create_model(f'{network}_cifar_sd', exit_head=kind).exits == exits


# -- hints ------------------------------------------------------------------------------------------------------------


def features(n, *shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=(n, *shape)))


@pytest.mark.parametrize('shape', [(7,), (40,), (5, 2, 3)])
def test_forms_of_the_hint_against_numpy(shape):
    a, b = features(128, *shape), features(128, *shape, seed=1)
    squares = (a.numpy() - b.numpy()) ** 2
    assert hint_loss(a, b).item() == pytest.approx(squares.mean(), rel=1e-12)
    # the authors' own, at their batch of 128, whatever the width
    assert 5e-7 * 128 * hint_loss(a, b, 'sum').item() == pytest.approx(5e-7 * squares.sum(), rel=1e-12)
    assert 0.03 * 128 ** 0.5 * hint_loss(a, b, 'norm').item() == pytest.approx(0.03 * squares.sum() ** 0.5, rel=1e-12)


def gradient(a, b, form):
    a = a.clone().requires_grad_()
    hint_loss(a, b, form).backward()
    return a.grad


@pytest.mark.parametrize('form', HINT_FORMS)
@pytest.mark.parametrize('times', [2, 5])
def test_hints_do_not_grow_with_the_batch(form, times):
    a, b = features(6, 9), features(6, 9, seed=1)
    more = [t.repeat(times, 1) for t in (a, b)]
    assert hint_loss(*more, form).item() == pytest.approx(hint_loss(a, b, form).item(), rel=1e-12)
    # every image pulls with the weight that it has in the batch
    assert torch.allclose(gradient(*more, form)[:6] * times, gradient(a, b, form), rtol=1e-12)


@pytest.mark.parametrize('form', HINT_FORMS)
@pytest.mark.parametrize('slices', [2, 8])
def test_hints_of_slices(form, slices):
    a, b = features(128, 64), features(128, 64, seed=1)
    whole = hint_loss(a, b, form).item()
    parts = np.mean([hint_loss(x, y, form).item() for x, y in zip(a.chunk(slices), b.chunk(slices))])
    if form == 'norm':  # a mean of roots is no larger than the root of the mean
        assert 0.99 * whole < parts <= whole
        equal = (a - b) / (a - b).norm(dim=1, keepdim=True)  # and as large where the distances are alike
        parts = [hint_loss(x, 0 * x, form).item() for x in equal.chunk(slices)]
        assert np.mean(parts) == pytest.approx(hint_loss(equal, 0 * equal, form).item(), rel=1e-12)
    else:
        assert parts == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize('form', HINT_FORMS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_hints_gradient_is_finite_at_and_near_the_teacher(form, dtype):
    b = features(4, 3).to(dtype)
    assert not gradient(b, b, form).any()
    for tiny in (1e-30, 1e-20, 1e-4):
        assert gradient(torch.full_like(b, tiny), 0 * b, form).isfinite().all()


def test_the_gradient_of_a_norm_does_not_fade_near_the_teacher():
    a, b = features(8, 5).requires_grad_(), features(8, 5, seed=1)
    sizes = [gradient(b + far * (a.detach() - b), b, 'norm').norm().item() for far in (1, 1e-3, 1e-9)]
    assert sizes == pytest.approx([8 ** -0.5] * 3, rel=1e-6)


def test_an_unknown_form_is_refused():
    for form in ('mse', 'Norm'):
        with pytest.raises(ValueError, match=f"form='{form}': unknown, expected one of mean, sum, norm"):
            hint_loss(features(2, 3), features(2, 3), form)


def test_a_linear_layer_stands_in_front_of_every_hint_if_asked():
    model = timm.create_model('test_resnet_sd', num_classes=5, exits=(2, 3), exit_head='bottleneck-attention')

    def projections(**kwargs):
        return [type(p).__name__ for p in SelfDistillationModule(model, DistillationConfig(**kwargs)).projections]

    assert projections() == ['Identity'] * 2
    assert projections(hint_linear=True) == ['Linear'] * 2
    assert projections(hint_linear=True, hint_on='maps') == ['Conv2d'] * 2
    assert projections(hint_linear=True, hint_exits='all-but-last') == ['Linear']
    assert projections(hint_weight=0., hint_linear=True) == []


@pytest.mark.parametrize('hint_on', ['features', 'maps'])
@pytest.mark.parametrize('form', HINT_FORMS)
def test_the_last_auxiliary_exit_may_go_without_a_hint(tiny, hint_on, form):
    config = DistillationConfig(
        hint_on=hint_on, hint_form=form, hint_exits='all-but-last', hint_linear=True, hint_weight=0.7)
    task = SelfDistillationTask(tiny, config, verbose=False).train()
    images, target = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    result = task(images, target)
    assert [name for name in result if name.startswith('hint')] == ['hint0']
    rest = sum(0.5 * result[f'{term}{i}'] for term in ('ce', 'kl') for i in (0, 1)) + result['ce2']
    assert torch.allclose(result['loss'], rest + 0.7 * result['hint0'])
    result['loss'].backward()
    assert [n for n, p in task.trainable_module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('setting, message', [
    (dict(hint_form='max'), "hint_form='max': unknown, expected one of mean, sum, norm"),
    (dict(hint_exits='first'), "hint_exits='first': unknown, expected one of all, all-but-last"),
])
def test_unknown_hints_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**setting)


# -- the presets as a whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, theirs', [
    ('byot-scan', lambda d: 5e-7 * (d ** 2).sum()),
    ('byot-tpami', lambda d: 0.03 * (d ** 2).sum().sqrt()),
])
@pytest.mark.parametrize('width', [8, 64])
def test_the_loss_of_a_batch_of_128_is_the_authors(name, theirs, width):
    """Soft cross entropies as they have them, whose gradients are the divergence's."""
    config = parse_train_config(['--preset', name])
    rng = torch.Generator().manual_seed(0)
    logits, hints = (
        [torch.randn(128, n, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(4)]
        for n in (10, width))
    y = torch.randint(10, (128,), generator=rng)
    last = 2 if name == 'byot-tpami' else 3  # their later code leaves the hint of the exit before the deepest out
    loss, _ = self_distillation_loss(
        logits, y, [*hints[:last], *[None] * (3 - last)], hints[3], alpha=config.alpha, temperature=config.temperature,
        square_temperature=config.square_temperature, hint_weight=config.hint_weight, hint_form=config.hint_form)
    teacher = logits[3].detach()
    expected = F.cross_entropy(logits[3], y)
    for i in range(3):
        soft = -((teacher / 3).softmax(1) * (logits[i] / 3).log_softmax(1)).sum(1).mean()
        alpha, factor = (0.5, 9) if name == 'byot-scan' else (0.3, 1)
        expected = expected + (1 - alpha) * F.cross_entropy(logits[i], y) + alpha * factor * soft
    if name == 'byot-scan':
        expected = expected + sum(theirs(hints[3].detach() - h) for h in hints[:3])
    else:
        expected = expected + sum(theirs(hints[3].detach() - h) for h in hints[:2])
    leaves = [*logits, *hints[:last]]
    for ours, their in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-5, atol=1e-12)
    constant = sum((teacher / 3).softmax(1).mul((teacher / 3).log_softmax(1)).sum(1).mean() for _ in range(3))
    assert loss.item() == pytest.approx((expected + alpha * factor * constant).item(), rel=1e-5)


def decays(optimizer):
    return {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}


@pytest.mark.slow
@pytest.mark.parametrize('layer_decay', [None, 0.9])
def test_weight_decay_acts_on_norms_and_biases_where_asked(tmp_path, layer_decay):
    for everywhere in (False, True):
        config = TrainConfig(
            model='test_resnet', exits=(2, 3), batch_size=16, data_dir=str(write_two_colours(tmp_path)),
            label_column='fine', weight_decay=0.25, decay_norms_and_biases=everywhere, layer_decay=layer_decay)
        run = Run(config, Accelerator(cpu=True), tmp_path / f'run{everywhere}')
        parameters = dict(run.setup.task.trainable_module.named_parameters())
        of = decays(run.setup.optimizer)
        assert of.keys() == {id(p) for p in parameters.values()}
        small = {name for name, p in parameters.items() if p.ndim <= 1}
        assert {of[id(parameters[name])] for name in small} == ({0.25} if everywhere else {0.})
        assert {of[id(p)] for name, p in parameters.items() if name not in small} == {0.25}
        assert any('projections' in name for name in small)


@pytest.mark.slow
@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_trains(name, tmp_path):
    config = parse_train_config([
        '--preset', name, '--model', 'test_resnet', '--exits', '2', '3', '--epochs', '1', '--batch-size', '64',
        '--data-dir', str(write_two_colours(tmp_path)), '--label-column', 'fine', '--output', str(tmp_path / 'runs')])
    folder = train(config)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert model.exit_head == PRESETS[name]['exit_head'] and model.num_exits == 3
    summary = (folder / 'summary.csv').read_text()
    assert 'hint0' in summary and ('hint1' in summary) == (name == 'byot-scan')


def test_defaults_are_what_they_were():
    fields = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    # without a network that brings its own, the kind of exit head is a bottleneck
    assert (fields['exit_head'], fields['hint_weight'], fields['hint_form']) == (None, 0.03, 'mean')
    assert (fields['hint_exits'], fields['hint_linear'], fields['decay_norms_and_biases']) == ('all', False, False)
