"""`EarlyExit(model, compile=True)`: the same decisions, for every number of images, from few compiled sizes."""
import pytest
import timm
import torch

from timm_selfdistill import EarlyExit
from timm_selfdistill.errors import SplitError
from timm_selfdistill.inference import runners


@pytest.fixture
def compiled(monkeypatch):
    """Note what is compiled; the compiler itself is left out, which takes minutes."""
    seen = []
    monkeypatch.setattr(torch, 'compile', lambda module, **options: seen.append(options) or module)
    return seen


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model(
        'test_resnet_sd', num_classes=5, exits=(1, 2, 3), pretrained_cfg_overlay=dict(input_size=(3, 64, 64))).eval()


@pytest.mark.slow
def test_every_number_of_images_is_decided_as_without_and_few_sizes_are_compiled(model, compiled):
    x = torch.randn(19, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.forward_exits(x)
    levels = [z.softmax(-1).amax(-1).median().item() + 1e-4 for z in logits[:-1]]
    plain, predictor = EarlyExit(model, levels), EarlyExit(model, levels, compile=True)
    assert 'between compiled graphs made for images of 3×64×64' in repr(predictor)
    for count in range(1, 20):
        a, b = plain(x[:count]), predictor(x[:count])
        assert torch.equal(a.exit_index, b.exit_index)
        torch.testing.assert_close(a.logits, b.logits)
    assert len(a.exit_index.unique()) > 2
    assert len(compiled) <= 4 * 6 and all(options == dict(dynamic=False, fullgraph=True) for options in compiled)
    assert {size for _, size in predictor.runner._compiled} <= {1, 2, 4, 8, 16, 32}


@pytest.mark.slow
def test_weights_that_change_are_seen(model, compiled):
    predictor, x = EarlyExit(model, compile=True), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        model.get_classifier().bias += 1
    torch.testing.assert_close(predictor(x).logits, model(x), rtol=1e-4, atol=1e-5)
    model.double()  # other tensors: graphs are made anew
    torch.testing.assert_close(predictor(x.double()).logits, model(x.double()))


def test_what_cannot_be_compiled_is_refused(model, monkeypatch, compiled):
    def refuse(*args):
        raise SplitError('test_resnet_sd cannot be exported: it is too fond of this process')

    monkeypatch.setattr('timm_selfdistill.inference.graphs.split_network', refuse)
    with pytest.raises(ValueError, match='too fond of this process'):
        EarlyExit(model, compile=True)
    EarlyExit(model)


def test_images_are_padded_by_the_first():
    x = torch.arange(3.)[:, None]
    assert runners._pad(x, 5).flatten().tolist() == [0, 1, 2, 0, 0]


@pytest.mark.slow
def test_the_compiler_itself(model):
    predictor, x = EarlyExit(model, compile=True), torch.randn(5, 3, 64, 64)
    for count in (1, 3, 5):
        torch.testing.assert_close(predictor(x[:count]).logits, model(x[:count]), rtol=1e-4, atol=1e-5)
