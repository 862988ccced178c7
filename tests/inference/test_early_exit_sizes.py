"""Images that are no squares, or that a network pads: early exit gives what forward_exits gives."""
import threading

import pytest
import timm
import torch

from timm_selfdistill import EarlyExit
from timm_selfdistill.inference import runners as compaction
from timm_selfdistill.inference.cuts import randomise
from timm_selfdistill.models.exit_rule import ExitRule
from timm_selfdistill.models.probe import take_taps

PAD = dict(img_size=64, dynamic_img_size=True, dynamic_img_pad=True)
SMALL = dict(embed_dim=48, depth=3, num_heads=3)
SWIN = dict(
    img_size=64, window_size=4, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), strict_img_size=False)
ODD = ((33, 48), (33, 64), (64, 33), (75, 97), (64, 128))

# names, arguments and sizes; of each network some sizes are not squares, or are no multiples of its patches
NETWORKS = {
    'padded': ('test_vit', PAD, ODD),
    'padded, registers': ('test_vit2', PAD, ODD),
    'oblong patches': ('test_vit', dict(img_size=(64, 128), patch_size=(8, 16)), [(64, 128)]),
    'tall patches': ('test_vit3', dict(img_size=(96, 32), patch_size=(16, 8)), [(96, 32)]),
    'oblong patches, padded': ('test_vit', dict(PAD, patch_size=(8, 16)), ODD),
    'as many tokens as a square': ('test_vit', dict(img_size=(16, 64), patch_size=8), [(16, 64)]),
    'deit3': ('deit3_small_patch16_224', dict(PAD, **SMALL), ODD),
    'beit': ('beit_base_patch16_224', dict(SMALL, img_size=(32, 96)), [(32, 96)]),
    'eva': ('eva02_tiny_patch14_224', dict(SMALL, img_size=56, dynamic_img_size=True), [(42, 70), (84, 28)]),
    'eva, oblong patches': ('eva02_tiny_patch14_224', dict(SMALL, img_size=(48, 56), patch_size=(8, 14)), [(48, 56)]),
    'dinov3': ('vit_small_patch16_dinov3', dict(SMALL, embed_dim=96, img_size=64), [(48, 80), (96, 32)]),
    'naflexvit': ('naflexvit_base_patch16_gap', dict(SMALL, dynamic_img_pad=True), ODD),
    'swin': ('swin_tiny_patch4_window7_224', SWIN, [(76, 100), (64, 128), (96, 64)]),
    'swin v2': ('swinv2_tiny_window8_256', SWIN, [(76, 100), (64, 128), (96, 64)]),
    'xcit': ('xcit_nano_12_p8_224', dict(SMALL), [(33, 48), (64, 128)]),
    'pvt': ('pvt_v2_b0', {}, [(33, 48), (64, 128)]),
    'convnext': ('test_convnext', {}, [(33, 48), (64, 128)]),
    'efficientnet': ('test_efficientnet', {}, [(33, 48), (64, 128)]),
}
SLOW = {
    'mvit': ('mvitv2_tiny', {}, [(33, 48), (33, 64), (64, 160)]),
    'crossvit': ('crossvit_tiny_240', {}, [(192, 240)]),
    'tiny_vit': ('tiny_vit_5m_224', {}, [(75, 97), (64, 128)]),
    'efficientvit': ('efficientvit_m0', {}, [(130, 224), (200, 150)]),
    'mobilevit': ('mobilevit_xxs', {}, [(33, 48), (64, 128)]),
    'davit': ('davit_tiny', {}, [(33, 48), (64, 128)]),
}


def create(name, head, kwargs):
    torch.manual_seed(0)
    model = timm.create_model(f'{name}_sd', num_classes=5, exit_head=head, **kwargs).eval()
    randomise(model)
    return model


@torch.no_grad()
def assert_as_forward_exits(model, predictor, size):
    images = torch.randn(5, 3, *size)
    exits = model.forward_exits(images)
    levels = []
    for logits in exits[:-1]:
        sure = logits.softmax(-1).amax(-1).sort().values
        levels.append((sure[1] + sure[2]).item() / 2)
    for thresholds in (None, levels, 0.):
        predictor.rule = ExitRule(model.num_exits, 5, thresholds)
        out = predictor(images)
        assert (out.exit_index == model.num_exits - 1).all() if thresholds is None else out.exit_index.min() == 0
        for row, number in enumerate(out.exit_index.tolist()):
            allowed = 1e-4 * exits[number].abs().max().item()
            torch.testing.assert_close(out.logits[row], exits[number][row], rtol=1e-4, atol=allowed)


@pytest.mark.parametrize('head', ['bottleneck', 'pooled'])
@pytest.mark.parametrize('case', [*NETWORKS, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_oblong_and_padded_images(case, head):
    name, kwargs, sizes = {**NETWORKS, **SLOW}[case]
    model = create(name, head, kwargs)
    predictor = EarlyExit(model)
    assert predictor.compacts
    for size in sizes:
        assert_as_forward_exits(model, predictor, size)


def test_sizes_that_the_network_refuses_are_refused_in_its_words():
    model = create('test_vit3', 'bottleneck', dict(img_size=64, dynamic_img_size=True))
    with pytest.raises(ValueError, match='cannot take images of 3×33×48 .* built for 3×64×64'):
        EarlyExit(model)(torch.randn(2, 3, 33, 48))


def test_the_network_is_asked_once_for_each_size_and_few_are_remembered(monkeypatch):
    asked = []

    def ask(model, x, *args, **kwargs):
        asked.append(tuple(x.shape))
        return take_taps(model, x, *args, **kwargs)

    model = create('test_vit', 'linear', PAD)
    predictor = EarlyExit(model, 0.)
    monkeypatch.setattr(compaction, 'take_taps', ask)
    monkeypatch.setattr(compaction, '_MOST_SIZES', 2)
    for size in ((33, 48), (33, 48), (48, 33), (48, 33), (40, 40), (33, 48)):
        predictor(torch.randn(2, 3, *size))
    assert asked == [(1, 3, 33, 48), (1, 3, 48, 33), (1, 3, 40, 40), (1, 3, 33, 48)]
    resnet = EarlyExit(create('test_resnet', 'linear', {}), 0.)
    asked.clear()
    resnet(torch.randn(2, 3, 33, 48))
    assert not asked  # maps say themselves how high they are


def test_threads_with_images_of_several_sizes():
    model = create('test_vit', 'bottleneck', PAD)
    predictor = EarlyExit(model, 0.)
    batches = [torch.randn(2, 3, *size) for size in ODD]
    with torch.no_grad():
        expected = [model.forward_exits(images, upto=0)[0] for images in batches]
    wrong = []

    def work(i):
        for turn in range(10):
            k = (i + turn) % len(batches)
            if not torch.allclose(predictor(batches[k]).logits, expected[k], rtol=1e-4, atol=1e-5):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong
