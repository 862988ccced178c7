import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from timm_selfdistill.costs import exit_costs
from timm_selfdistill.models.multi_exit import add_exits
from timm_selfdistill.models.probe import count_macs, meta_copy, meta_probe, take_taps
from timm_selfdistill.models.stages import Stage, choose_exits, find_stages


def make_stages(shares, sizes=None):
    sizes = sizes or [8] * len(shares)
    return [
        Stage(i, f's{i}', 8, 4, (size, size), share, round(share * 1e6))
        for i, (share, size) in enumerate(zip(shares, sizes))
    ]


def test_stages_of_resnet18_match_a_hand_count():
    stages = find_stages(timm.create_model('resnet18'))
    stem = 64 * 3 * 7 * 7 * 112 * 112
    layer1 = stem + 4 * 64 * 64 * 9 * 56 * 56
    layer2 = layer1 + (64 * 128 * 9 + 3 * 128 * 128 * 9 + 64 * 128) * 28 * 28
    layer3 = layer2 + (128 * 256 * 9 + 3 * 256 * 256 * 9 + 128 * 256) * 14 * 14
    layer4 = layer3 + (256 * 512 * 9 + 3 * 512 * 512 * 9 + 256 * 512) * 7 * 7
    total = layer4 + 512 * 1000
    assert [s.share for s in stages] == pytest.approx([m / total for m in (stem, layer1, layer2, layer3, layer4)])
    assert [s.macs for s in stages] == [stem, layer1, layer2, layer3, layer4]
    assert [s.num_chs for s in stages] == [64, 64, 128, 256, 512]
    assert [s.reduction for s in stages] == [2, 4, 8, 16, 32]
    assert [s.size for s in stages] == [(n, n) for n in (112, 56, 28, 14, 7)]


@pytest.mark.parametrize('name, expected', [
    ('resnet18', (1, 2, 3)),  # layer1, layer2, layer3, as in the paper
    ('resnet50', (1, 2, 3)),
    ('resnet152', (1, 2, 3)),
    ('wide_resnet50_2', (1, 2, 3)),
    ('vgg16', (1, 2, 3)),  # six resolutions, 4 saves nothing: the last three that are left
    ('vit_tiny_patch16_224', (2, 5, 8)),  # quarters of twelve blocks
    ('convnext_atto', (0, 1, 2)),
    ('swin_tiny_patch4_window7_224', (0, 1, 2)),
    ('nasnetalarge', (2, 3)),  # its first two places are stems
    ('volo_d1_224', (0, 1, 2)),  # one change of resolution, then most of the compute
    ('hrnet_w18_small', (3,)),  # all its maps come into being together, half of the compute before the end
    ('crossvit_tiny_240', (3, 4)),  # two branches side by side
    ('coat_tiny', (0,)),  # the rest is parallel
])
def test_default_exits_stand_at_stage_boundaries(name, expected):
    with torch.device('meta'):
        assert timm.create_model(f'{name}_sd').exits == expected


def test_default_exits_leave_out_stems_and_exits_that_save_nothing():
    stages = make_stages([0.02, 0.3, 0.6, 0.97, 1.0], sizes=[64, 32, 16, 8, 4])
    assert choose_exits(stages) == (1, 2)


def test_default_exits_count_their_heads():
    stages = make_stages([0.2, 0.4, 0.6, 1.0], sizes=[32, 16, 8, 4])
    assert choose_exits(stages) == (0, 1, 2)
    # the first one would cost 0.2 + 0.2, as much as the second
    assert choose_exits(stages, head_macs=lambda s: 200_000 if s.index == 0 else 0) == (1, 2)
    # the last one would cost 0.6 + 0.36, which saves next to nothing
    assert choose_exits(stages, head_macs=lambda s: 360_000 if s.index == 2 else 0) == (0, 1)


def test_a_network_that_cannot_be_left_early_says_so(caplog):
    stages = make_stages([0.01, 0.96, 0.97, 1.0], sizes=[32, 16, 8, 4])
    assert choose_exits(stages, name='net') == ()
    assert 'net gets no auxiliary exits' in caplog.text
    assert choose_exits(stages, (0, 2)) == (0, 2)
    assert choose_exits(stages, 2) == (0, 1)


@given(
    st.lists(st.tuples(st.floats(0.001, 1), st.integers(1, 64)), min_size=1, max_size=40),
    st.integers(0, 300_000),
)
def test_default_exits_are_few_and_each_saves_something(steps, head):
    total = sum(step for step, _ in steps)
    shares = [sum(step for step, _ in steps[:i + 1]) / total for i in range(len(steps))]
    stages = make_stages(shares, sizes=[size for _, size in steps])
    exits = choose_exits(stages, head_macs=lambda s: head)
    costs = [stages[i].share + head / 1e6 for i in exits]
    assert len(exits) <= 3
    assert all(a < b for a, b in zip(exits, exits[1:]))
    assert all(stages[i].share >= 0.04 for i in exits)
    assert all(cost <= 0.9501 for cost in costs)
    assert all(a < b for a, b in zip(costs, costs[1:]))


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=40), st.data())
def test_a_number_of_exits_gives_as_many_increasing_ones_before_the_end(steps, data):
    total = sum(steps)
    stages = make_stages([sum(steps[:i + 1]) / total for i in range(len(steps))])
    count = data.draw(st.integers(0, len(stages) - 1))
    exits = choose_exits(stages, count)
    assert len(exits) == count
    assert all(a < b for a, b in zip(exits, exits[1:]))
    assert all(0 <= i < len(stages) - 1 for i in exits)


def test_even_steps_get_even_exits():
    stages = make_stages([(i + 1) / 12 for i in range(12)])
    assert choose_exits(stages, 1) == (5,)
    assert choose_exits(stages, 2) == (3, 7)
    assert choose_exits(stages, 3) == choose_exits(stages) == (2, 5, 8)


@pytest.mark.parametrize('exits, message', [
    ((0, 4), r'exits=\(0, 4\): out of range for net.*0 \(s0\), 1 \(s1\), 2 \(s2\), 3 \(s3\)'),
    ((-1,), 'out of range'),
    ((2, 1), 'must increase'),
    ((1, 1), 'must increase'),
    ((1.0,), 'whole numbers'),
    ((True,), 'whole numbers'),
    (5, 'exits=5: net has 5 stages, so 0 to 4'),
    (-1, '0 to 4'),
    ('12', 'expected None'),
    (True, 'expected None'),
])
def test_wrong_exits_are_refused(exits, message):
    with pytest.raises(ValueError, match=message):
        choose_exits(make_stages([0.2, 0.4, 0.6, 0.8, 1.0]), exits, 'net')


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'hrnet_w18_small', 'ghostnet_050'])
def test_a_stages_share_is_what_a_run_that_ends_there_costs(name):
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    x = torch.empty(1, *model.pretrained_cfg['input_size'], device='meta')
    total, _ = count_macs(model, x)
    for stage in find_stages(model):
        macs, (tap,) = count_macs(take_taps, model, x, [stage.index])
        assert stage.macs == macs
        assert stage.share == macs / total
        assert tap.shape[1:] == (stage.num_chs, *stage.size)


def test_a_network_whose_grid_depends_on_values_is_probed_all_the_same():
    with torch.device('meta'):
        model = timm.create_model('gemma4_vit_167m')
    stages = find_stages(model)
    assert {s.size for s in stages} == {(48, 48)}
    assert [s.share for s in stages] == sorted(s.share for s in stages)
    steps = [b.macs - a.macs for a, b in zip(stages, stages[1:])]
    assert len(stages) == 16
    assert len(set(steps)) == 1, 'sixteen equal blocks'


def test_probing_leaves_the_model_alone():
    model = timm.create_model('test_resnet').train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_stages(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.device.type == 'cpu' for p in model.parameters())


def test_meta_copy_takes_no_memory_and_counts_like_the_model():
    model = timm.create_model('test_resnet').eval()
    probe = meta_copy(model)
    assert all(t.device.type == 'meta' for t in probe.state_dict().values())
    size = model.pretrained_cfg['input_size']
    assert count_macs(probe, torch.empty(1, *size, device='meta'))[0] == count_macs(model, torch.zeros(1, *size))[0]


def test_attention_is_counted():
    model = timm.create_model('test_vit', img_size=96)
    tokens, width, hidden = 37, 64, 192  # 6×6 patches and a class token
    block = tokens * width * (3 * width + width + 2 * hidden) + 2 * tokens ** 2 * width
    total = 36 * 3 * 16 ** 2 * width + 6 * block + width * 1000
    assert len(model.blocks) == 6
    assert count_macs(meta_copy(model), torch.empty(1, 3, 96, 96, device='meta'))[0] == total
    shares = [s.share for s in find_stages(model)]
    assert shares == pytest.approx([(36 * 768 * width + (i + 1) * block) / total for i in range(6)])


def test_a_module_that_is_no_timm_model_is_refused():
    with pytest.raises(ValueError, match='Linear cannot be given exits'):
        find_stages(torch.nn.Linear(2, 2))


def test_a_network_of_another_type_of_numbers_is_probed_in_it():
    model = add_exits(timm.create_model('test_vit', num_classes=5).bfloat16()).eval()
    logits = model.forward_exits(torch.randn(1, 3, 160, 160, dtype=torch.bfloat16))
    assert [z.dtype for z in logits] == [torch.bfloat16] * model.num_exits
    assert list(exit_costs(model)) == [*(f'exit{i}' for i in range(model.num_exits)), 'ensemble']


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext'])
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_macs_are_those_of_torchs_counter_in_any_mode(name, mode):
    model = timm.create_model(name).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        meta_copy(model)(torch.empty(1, 3, 160, 160, device='meta'))
    with mode():
        assert count_macs(*meta_probe(model, (3, 160, 160)))[0] == theirs.get_total_flops() // 2 > 0


@pytest.mark.parametrize('kwargs', [dict(), dict(bidirectional=True), dict(num_layers=2, bias=False)])
def test_lstms_on_the_meta_device_cost_what_they_cost(kwargs):
    lstm, x = torch.nn.LSTM(6, 5, batch_first=True, **kwargs), torch.randn(3, 7, 6)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        lstm.to('meta')(x.to('meta'))
    macs, (out, _) = count_macs(lstm, x.to('meta'))
    assert macs == theirs.get_total_flops() // 2 > 0
    assert out.shape == (3, 7, 5 * (1 + kwargs.get('bidirectional', False)))
