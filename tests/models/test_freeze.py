"""A frozen backbone: the auxiliary exits learn, the deepest exit stays bit for bit what it is."""
import copy

import pytest
import timm
import torch
from torch.nn.parallel import DistributedDataParallel

import timm_selfdistill
from timm_selfdistill.tasks import DistillationConfig, SelfDistillationTask

NAMES = ['test_resnet', 'test_vit', 'test_efficientnet']


def frozen(name='test_resnet', **more):
    model = timm.create_model(f'{name}_sd', num_classes=5, exits=(1, 2), **more)
    model.freeze_backbone()
    return model


def images(model, count=4):
    return torch.randn(count, *model.pretrained_cfg['input_size'])


def learn(task, x, steps=3):
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        task.train()
        task(x, torch.arange(len(x)) % 5)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize('name', NAMES)
def test_only_the_auxiliary_exits_change(name):
    model = frozen(name, drop_path_rate=0.5, drop_rate=0.5)
    before = copy.deepcopy(model.state_dict())
    x = images(model)
    expected = model.eval()(x)
    learn(SelfDistillationTask(model, verbose=False), x)
    names = changed(model, before)
    assert names and all(n.startswith('exit_heads.') for n in names)
    assert {n for n, _ in model.exit_heads.named_parameters('exit_heads')} <= names
    # in training mode too: dropout and stochastic depth of the frozen part are off, running averages stand
    assert torch.equal(model.train()(x), expected) and torch.equal(model.forward_exits(x)[-1], expected)


@pytest.mark.parametrize('name', NAMES)
def test_an_unfrozen_one_changes_everywhere(name):
    """Without freezing the same steps change the deepest exit, so that the test above can fail."""
    model = timm.create_model(f'{name}_sd', num_classes=5, exits=(1, 2))
    before = copy.deepcopy(model.state_dict())
    learn(SelfDistillationTask(model, verbose=False), images(model))
    assert any(n.startswith('backbone.') for n in changed(model, before))


def test_the_mode_of_the_frozen_part_stays():
    model = frozen()
    assert not any(m.training for m in model.backbone.modules())
    outer = torch.nn.Sequential(torch.nn.ModuleList([model]))
    for mode in (True, False, True):
        outer.train(mode)
        assert model.exit_heads.training == model.training == mode
        assert not any(m.training for m in model.backbone.modules())


def test_an_encoders_classifier_is_frozen_too():
    model = timm_selfdistill.add_exits(timm.create_model('mobilenetv5_300m_enc', device='meta'), num_classes=6)
    model.freeze_backbone()
    assert model.head is not None and not model.train().head.training
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.startswith('exit_heads.'))


def test_no_graph_reaches_the_frozen_part():
    model = frozen().train()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        logits = model.forward_exits(images(model))
    assert not logits[-1].requires_grad and all(z.requires_grad for z in logits[:-1])
    kept = len(saved)
    saved.clear()
    plain = timm.create_model('test_resnet_sd', num_classes=5, exits=(1, 2)).train()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        plain.forward_exits(images(model))
    assert 0 < kept < 0.5 * len(saved)


def test_state_optimizer_and_average_hold_what_is_trained():
    model = frozen()
    task = SelfDistillationTask(model, verbose=False)
    ema = task.setup_ema(decay=0.5)
    state = task.trainable_module.state_dict()
    assert state and not any(n.startswith('model.') and 'exit_heads' not in n for n in state)
    average = task.get_eval_model(ema=True)
    assert average.backbone is model.backbone and average.exit_heads is not model.exit_heads
    before, x = copy.deepcopy(model.state_dict()), images(model)
    learn(task, x)
    ema.update(task.trainable_module)
    assert all(n.startswith('exit_heads.') for n in changed(model, before))
    assert not all(torch.equal(a, b) for a, b in zip(average.exit_heads.parameters(), model.exit_heads.parameters()))
    assert torch.equal(average.eval()(x), model.eval()(x))
    other = SelfDistillationTask(copy.deepcopy(model), verbose=False)
    other.load_state_dict(task.state_dict(), strict=False)
    result = other.trainable_module.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    with pytest.raises(RuntimeError, match='Missing key'):
        other.trainable_module.load_state_dict({n: t for n, t in state.items() if not n.endswith('fc.weight')})
    assert {*model.state_dict()} == {*before}, 'the network itself is saved whole'


def test_compiled_it_gives_the_same():
    model = frozen()
    task, compiled = (SelfDistillationTask(copy.deepcopy(model), verbose=False).train() for _ in range(2))
    compiled.load_state_dict(task.state_dict())  # the projections of the hint as well
    compiled.compile(backend='aot_eager')
    x, y = images(model), torch.arange(4)
    plain, fast = task(x, y), compiled(x, y)
    assert {*plain} == {*fast} and all(torch.allclose(plain[n], fast[n], atol=1e-5) for n in plain)
    fast['loss'].backward()
    assert all(p.grad is None for p in compiled.get_eval_model().backbone.parameters())
    assert not any(m.training for m in compiled.get_eval_model().backbone.modules())


def test_distributed_data_parallel_sees_every_parameter_used(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = frozen()
        task = SelfDistillationTask(model, verbose=False)
        task.trainable_module = DistributedDataParallel(task.trainable_module, static_graph=True)
        before = copy.deepcopy(model.state_dict())
        learn(task, images(model))
        assert all(n.startswith('exit_heads.') for n in changed(model, before))
    finally:
        torch.distributed.destroy_process_group()


def test_a_new_classifier_is_frozen_as_well():
    model = frozen()
    model.reset_classifier(7)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for p in model.exit_heads.parameters())


def test_gradients_of_a_frozen_backbone_cannot_be_scaled():
    with pytest.raises(ValueError, match='exit_weights=equilibrium'):
        SelfDistillationTask(frozen(), DistillationConfig(exit_weights='equilibrium'), verbose=False)


def test_without_labels_the_deepest_exit_alone_teaches():
    model = frozen()
    task = SelfDistillationTask(model, DistillationConfig(alpha=1.), verbose=False).train()
    x = images(model)
    result = task(x)
    assert {name[:-1] for name in result if name[-1].isdigit()} == {'kl', 'hint'}
    assert result['loss'].item() == pytest.approx(task(x, torch.arange(4))['loss'].item() - task(
        x, torch.arange(4))['ce2'].item(), rel=1e-5)
    with pytest.raises(ValueError, match='alpha=0.5'):
        SelfDistillationTask(model, verbose=False)(x)


def test_adding_exits_and_freezing_works_on_any_network():
    backbone = timm.create_model('test_convnext', num_classes=3)
    model = timm_selfdistill.add_exits(backbone, exits=(1,))
    model.freeze_backbone()
    assert sum(p.requires_grad for p in model.parameters()) == len(list(model.exit_heads.parameters()))
