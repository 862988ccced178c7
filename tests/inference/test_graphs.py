"""A network cut into graphs computes what it computes whole, whichever images are left out on the way."""
import pytest
import timm
import torch
import torch.nn as nn

from timm_selfdistill.errors import SplitError
from timm_selfdistill.inference.graphs import split_network

# windows of 4 on maps of 16, 8, 4 and 2: images are laid side by side in batches of windows
SMALL_SWIN = dict(img_size=64, window_size=4, embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 4))

NETWORKS = {
    'test_resnet_sd': {},
    'test_convnext_sd': {},
    'test_efficientnet_sd': {},
    'test_vit_sd': dict(img_size=64),
    'swin_tiny_patch4_window7_224_sd': SMALL_SWIN,
}


def cut(name, **kwargs):
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    return model, split_network(model, torch.randn(3, 3, 64, 64))


def run_chain(parts, x, dropped=0):
    """Run parts one after the other, the first `dropped` images less at each; return rows and logits of each exit."""
    rows, passed, found = torch.arange(len(x)), [x], []
    for part in parts:
        logits, *passed = part(*passed)
        found.append((rows, logits))
        rows, passed = rows[dropped:], [tensor[dropped:] for tensor in passed]
    return found


def assert_as_a_whole(model, parts, x, dropped=0):
    whole = model.forward_exits(x)
    found = run_chain(parts, x, dropped)
    assert len(found) == len(whole) == model.num_exits
    for logits, (rows, of_part) in zip(whole, found):
        torch.testing.assert_close(of_part, logits[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('name', NETWORKS)
def test_parts_run_one_after_the_other_are_the_whole(name):
    model, parts = cut(name, **NETWORKS[name])
    assert_as_a_whole(model, parts, torch.randn(5, 3, 64, 64))
    assert_as_a_whole(model, parts, torch.randn(9, 3, 64, 64), dropped=2)  # of up to four exits
    assert_as_a_whole(model, parts, torch.randn(1, 3, 64, 64))


@pytest.mark.slow
@torch.no_grad()
def test_a_head_that_takes_the_logits_of_the_exit_before_gets_them():
    model, parts = cut('test_resnet_sd', exits=(1, 2, 3), exit_head='cascade')
    assert_as_a_whole(model, parts, torch.randn(5, 3, 64, 64), dropped=1)


def test_parameters_are_shared_and_each_is_in_the_parts_that_use_it(tiny):
    parts = split_network(tiny.eval(), torch.randn(3, 3, 64, 64))
    own = {p.data_ptr(): name for name, p in tiny.named_parameters()}
    found = [{own[p.data_ptr()] for p in part.parameters()} for part in parts]
    assert set.union(*found) == set(own.values())
    assert sum(map(len, found)) == len(own)  # no layer runs twice here
    assert 'exit_heads.1.fc.weight' in found[1]


class Take(nn.Module):
    """Subtracts the mean of what comes by, and keeps it."""

    def forward(self, x):
        self.mean = [x.mean()]
        return x - self.mean[0]


class Subtract(nn.Module):
    def __init__(self, take=None):
        super().__init__()
        self.take = [take]  # a list hides it from the module tree

    def forward(self, x):
        return x - (x.mean() if self.take[0] is None else self.take[0].mean[0])


def test_a_network_that_carries_a_mean_over_images_across_a_cut_cannot_be_split(tiny):
    take = Take()
    tiny.backbone.layer2 = nn.Sequential(tiny.backbone.layer2, take)
    tiny.backbone.layer3 = nn.Sequential(tiny.backbone.layer3, Subtract(take))
    with pytest.raises(SplitError, match='no dimension counts the images'):
        split_network(tiny.eval(), torch.randn(3, 3, 64, 64))


@pytest.mark.slow
@torch.no_grad()
def test_a_network_that_mixes_images_behind_a_cut_is_noticed_by_leaving_some_out(tiny):
    tiny.backbone.layer4 = nn.Sequential(tiny.backbone.layer4, Subtract())
    parts = split_network(tiny.eval(), torch.randn(3, 3, 64, 64))
    assert_as_a_whole(tiny, parts, torch.randn(5, 3, 64, 64))
    with pytest.raises(AssertionError):
        assert_as_a_whole(tiny, parts, torch.randn(5, 3, 64, 64), dropped=1)


def test_a_network_tied_to_a_number_of_images_cannot_be_split(tiny):
    class Three(nn.Module):
        def forward(self, x):
            assert len(x) == 3
            return x

    tiny.backbone.layer2 = nn.Sequential(tiny.backbone.layer2, Three())
    with pytest.raises(SplitError, match='test_resnet_sd cannot be exported'):
        split_network(tiny.eval(), torch.randn(3, 3, 64, 64))
