"""The law of early exit: `run` gives each image what `simulate` gives it from `forward_exits`' logits."""
import copy
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

from timm_selfdistill import EarlyExit
from timm_selfdistill.inference.cuts import randomise
from timm_selfdistill.models.exit_rule import CRITERIA, ExitRule

NETWORKS = {
    'test_resnet_sd': {}, 'test_vit_sd': dict(img_size=64), 'test_convnext_sd': {}, 'test_efficientnet_sd': {},
    'resnet20_cifar_sd': {}, 'test_mambaout_sd': {}, 'test_efficientnet_gn_sd': {},
}
# what rounding may change, by the size of a batch, as a share of the largest logit
NOISE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.003}
CALLS = 12


@pytest.fixture(scope='module', params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=6, **NETWORKS[request.param]).eval()
    randomise(model, torch.Generator().manual_seed(3))
    side = 32 if 'cifar' in request.param else 64
    x = torch.randn(32, 3, side, side, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for number, name in enumerate(model.classifiers()):  # exits that are sure of some images, not of others
            logits = model.forward_exits(x, upto=number)[-1]
            fc = model.get_submodule(name)
            scale = 1.5 / logits.std(0).clamp_min(1e-3)
            fc.weight *= scale[:, None]
            fc.bias.copy_((fc.bias - logits.mean(0)) * scale)
    return model.float(), x


def draw_rule(model, logits, rng, noise):
    """A random rule whose thresholds no image comes close to, as rounding would decide there."""
    criterion = rng.choice(CRITERIA)
    rule = ExitRule(
        model.num_exits, model.num_classes, criterion=criterion, ensemble=rng.random() < 0.3,
        temperatures=[rng.uniform(0.5, 3) for _ in range(model.num_exits)])
    thresholds, memory = [], {}
    for number, z in enumerate(logits[:-1]):
        _, sure, memory = rule.judge(number, z, memory)
        if rng.random() < 0.15:
            thresholds.append(None)
        elif criterion == 'patience':
            thresholds.append(float(rng.randint(1, model.num_exits - 1)))
        else:
            ordered = sure.sort().values
            gaps = ordered.diff()
            place = int((gaps + torch.rand(len(gaps)) * gaps.mean()).argmax())
            level = (ordered[place] + ordered[place + 1]).item() / 2
            close = gaps[place] < 2 * noise * max(1., z.abs().max().item())
            thresholds.append(None if close else -level if criterion == 'entropy' else level)
    return dict(thresholds=thresholds, criterion=criterion, temperatures=rule.temperatures, ensemble=rule.ensemble)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', NOISE, ids=lambda dtype: str(dtype).removeprefix('torch.'))
def test_run_gives_every_image_what_simulate_gives_it(network, dtype):
    model, pool_of_images = network
    model = copy.deepcopy(model).to(dtype)
    rng = random.Random(repr((model.pretrained_cfg['architecture'], dtype)))
    jobs = []
    left: set = set()
    for _ in range(CALLS):
        count = rng.choice([1, 1, 2, 3, 5, 8, 13])
        x = pool_of_images[rng.sample(range(32), count + 1)].to(dtype)
        with torch.no_grad():
            logits = [z.float() for z in model.forward_exits(x)]
        predictor = EarlyExit(model, **draw_rule(model, logits, rng, NOISE[dtype]))
        expected = predictor.simulate(logits)
        jobs.append((predictor, x, expected, max(z.abs().max().item() for z in logits)))
        left |= set(expected.exit_index.tolist())
    assert len(left) > 1

    def run(job):
        predictor, x, expected, largest = job
        out = predictor(x)
        assert torch.equal(out.exit_index, expected.exit_index)
        torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=NOISE[dtype] * max(1., largest))
        assert torch.equal(out.temperatures, expected.temperatures)

    for job in jobs:
        run(job)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, jobs * 2))
