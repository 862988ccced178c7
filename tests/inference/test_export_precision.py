"""Networks in any mode and precision are exported in float32; levels of a staged session come as people have them."""
import numpy as np
import pytest
import timm
import torch

from timm_selfdistill import EarlyExit
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.inference.cuts import randomise
from timm_selfdistill.inference.export import export_network
from timm_selfdistill.inference.staged_session import StagedSession
from timm_selfdistill.models.exit_rule import ExitRule, follow_rule

SIZE = (3, 32, 32)


def create(name='test_resnet_sd', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, pretrained_cfg_overlay=dict(input_size=SIZE), **kwargs)
    randomise(model)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16, torch.double])
def test_a_network_in_another_precision_is_exported_in_float32(dtype, tmp_path):
    model = create(exits=(2, 3)).to(dtype)
    model.exit_rule = ExitRule(
        model.num_exits,
        num_classes=5, criterion='margin', thresholds=[0.3, 0.2], temperatures=[1., 2., 1.], ensemble=True)
    manifest = export_network(model, tmp_path / 'staged', staged=True)
    assert manifest['precision'] == dict(graphs='float32', network=str(dtype).removeprefix('torch.'))
    images = torch.randn(9, *SIZE)
    logits, exits = StagedSession(tmp_path / 'staged').run(images.numpy())
    with torch.no_grad():
        expected, expected_exits = follow_rule(EarlyExit(model).rule, model.float().forward_exits(images))
    assert exits.tolist() == expected_exits.tolist()
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('wrap', [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_network_in_training_mode_is_exported_and_stays_as_it_is(wrap, tmp_path):
    model = create(exits=(2, 3)).train()
    model.backbone.layer1.eval()
    modes, before = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    export_network(wrap(model), tmp_path / 'exit', 1, format='torch-export')
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    graph = torch.export.load(tmp_path / 'exit' / 'network.pt2').module()
    images = torch.randn(4, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(graph(images), model.eval().forward_exits(images)[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match='test_resnet has no exits'):
        export_network(wrap(model.backbone), tmp_path / 'none')


@pytest.mark.slow
def test_a_network_that_keeps_biases_is_exported_with_those_of_its_weights(tmp_path):
    model = create('efficientformerv2_s0_sd', img_size=32)
    images = torch.randn(2, *SIZE)
    model(images)  # whose biases are kept from now on, and belong to a graph
    for turn in range(2):
        export_network(model, tmp_path / str(turn), format='torch-export')
        graph = torch.export.load(tmp_path / str(turn) / 'network.pt2').module()
        with torch.no_grad():
            for found, expected in zip(graph(images), model.forward_exits(images)):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            [p.mul_(1.05) for p in model.parameters()]
        model.train().eval()


@pytest.fixture(scope='module')
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp('levels') / 'staged'
    export_network(create(exits=(2, 3)), folder, staged=True)
    return StagedSession(folder)


@pytest.mark.slow
def test_levels_are_numbers_of_any_kind(session):
    for levels, expected in (
        (np.array([0.5, 0.25]), (0.5, 0.25)),
        ([np.float32(0.5), None], (0.5, None)),
        ([np.array(0.5), np.int64(1)], (0.5, 1.)),
        ((np.float16(0.5), 1), (0.5, 1.)),
        ([float('inf'), np.array([0.5])[0]], (float('inf'), 0.5)),
    ):
        session.levels = levels
        assert session.levels == expected and all(type(v) in (float, type(None)) for v in session.levels)
        session.run(np.zeros((2, *SIZE), np.float32))
    for levels, message in (
        (np.array([0.5]), '1 given, expected 2'),
        (0.5, 'levels=0.5: expected 2 numbers or None'),
        ('ab', "levels='ab': expected 2 numbers"),
        ([np.float32('nan'), 0.5], 'nan.* is no level'),
        ([np.bool_(True), 0.5], 'True.* is no level'),
        ([np.array([0.5]), 0.5], r'array\(\[0.5\]\) is no level'),
        ([[0.5, [1]], 0.5], 'is no level'),
        ([10 ** 400, 0.5], 'is no level'),
    ):
        with pytest.raises(ValueError, match=message):
            session.levels = levels
    assert session.levels == (float('inf'), 0.5)
