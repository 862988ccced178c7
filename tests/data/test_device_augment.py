"""The operations against PIL's, the draws against those of the worker processes' transform."""
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.transforms import InterpolationMode, autoaugment

from timm_selfdistill.data import device_augment
from timm_selfdistill.data.augment import train_transform
from timm_selfdistill.data.device_augment import BatchAugment, supports
from timm_selfdistill.data.pil_ops import as_step

CPU = torch.device('cpu')
CONFIG = dict(
    input_size=(3, 24, 16), interpolation='bicubic', mean=(0.5, 0.47, 0.43), std=(0.25, 0.24, 0.26), crop_pct=1.0,
    crop_mode='center',
)
RAND = 'rand-m8-mstd0.5-inc1'  # timm's rand-m10-inc1 posterizes to 0 bits, which Pillow 13 refuses


def noise(count, channels=3, seed=0):
    """Images of noise (count, 24, 16, channels); some of little contrast, of one colour, of two."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 24, 16, channels), dtype=np.uint8)
    pixels[::4] = pixels[::4] // 4 + 40
    pixels[1::8] = 7
    pixels[2::8] = np.where(pixels[2::8] < 128, 3, 200)
    return pixels


def pil(pixels):
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def follow(augment, pixels, steps):
    return augment._follow(torch.from_numpy(pixels.copy()), steps).numpy()


def spread(low, high, count=24):
    return np.random.default_rng(1).uniform(low, high, count).tolist()


OPERATIONS = dict(
    auto_contrast=[()] * 32,
    equalize=[()] * 32,
    invert=[()] * 16,
    posterize=[(bits,) for bits in range(1, 9)] * 3,
    solarize=[(threshold,) for threshold in [*range(0, 257, 16), 1, 255, 20.4]],
    solarize_add=[(add,) for add in range(0, 129, 8)],
    **{name: [(v,) for v in [0., 1., *spread(0.1, 2.2)]] for name in ('brightness', 'color', 'contrast', 'sharpness')},
)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', OPERATIONS)
def test_colour_operations_are_exactly_those_of_pil(name, channels):
    augment = BatchAugment(CONFIG, CPU, auto_augment=RAND)
    arguments = OPERATIONS[name]
    pixels = noise(len(arguments), channels)
    expected = [
        np.asarray(auto_augment.__dict__[name](pil(p), *a)).reshape(p.shape) for p, a in zip(pixels, arguments)]
    steps = [[as_step(name, *(a or (0,)), augment.size)] for a in arguments]
    assert np.array_equal(follow(augment, pixels, steps), expected)


@pytest.mark.parametrize('interpolation', ['nearest', 'bilinear', 'bicubic'])
@pytest.mark.parametrize(('name', 'values'), [
    ('rotate', [0., 90., -90., 180., *spread(-40, 40)]),
    ('shear_x', spread(-0.4, 0.4)),
    ('shear_y', spread(-0.4, 0.4)),
    ('translate_x_rel', [0.5, -0.25, *spread(-1.1, 1.1)]),
    ('translate_y_rel', [0.5, -0.25, *spread(-1.1, 1.1)]),
    ('translate_x_abs', [*range(-17, 18, 5), 2.5]),
    ('translate_y_abs', [*range(-25, 26, 5), 2.5]),
])
def test_geometric_operations_are_those_of_pil(name, values, interpolation):
    augment = BatchAugment(dict(CONFIG, interpolation=interpolation), CPU, auto_augment=RAND)
    settings = dict(
        fillcolor=tuple(augment.fill.tolist()), resample=getattr(Image.Resampling, interpolation.upper()))
    pixels = noise(len(values))
    expected = np.stack([
        np.asarray(auto_augment.__dict__[name](pil(p), v, **settings)) for p, v in zip(pixels, values)])
    found = follow(augment, pixels, [[as_step(name, v, augment.size)] for v in values])
    differs = found != expected
    if interpolation == 'nearest':
        assert not differs.any()
    # sums of products may lie on either side of a whole number, and PIL cuts off
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert differs.mean() < 1e-3


@pytest.mark.parametrize('policy', ['cifar10', 'svhn'])
def test_operations_of_torchvisions_policies_are_those_of_torchvision(policy):
    augment = BatchAugment(CONFIG, CPU, auto_augment=policy)
    theirs = autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(policy))
    space = theirs._augmentation_space(10, augment.size)
    expected, steps, pixels = [], [], noise(100)
    for image, ours, sub_policy in zip(pixels, augment.policy.policies * 2, theirs.policies * 2):
        sign = len(steps) // 25 % 2
        steps.append([both[sign] for _, both in ours])
        image = pil(image)
        for (name, prob, magnitude_id), (our_prob, _) in zip(sub_policy, ours):
            assert our_prob == prob
            magnitudes, signed = space[name]
            magnitude = 0. if magnitude_id is None else float(magnitudes[magnitude_id])
            if signed and not sign:
                magnitude = -magnitude
            image = autoaugment._apply_op(image, name, magnitude, InterpolationMode.NEAREST, fill=None)
        expected.append(np.asarray(image))
    assert np.array_equal(follow(augment, pixels[:50], steps), expected)


def test_steps_of_an_image_are_taken_in_order():
    augment = BatchAugment(CONFIG, CPU, auto_augment=RAND)
    pixels = noise(3)
    chains = [
        [('solarize', 100), ('posterize', 3), ('invert', 0)], [('invert', 0), ('solarize', 100)], [('sharpness', 1.9)]]
    steps = [[as_step(*step, augment.size) for step in chain] for chain in chains]
    for image, chain, found in zip(pixels, chains, follow(augment, pixels, steps)):
        image = pil(image)
        for name, value in chain:
            image = auto_augment.__dict__[name](image, *(() if name == 'invert' else (value,)))
        assert np.array_equal(found, np.asarray(image))


def run(augment, pixels, seed=0, epoch=0):
    """Augment every image once, in the order in which they stand."""
    geometry = torch.from_numpy(augment.draw_geometry(seed, epoch, len(pixels)))
    steps = augment.draw_policy(seed, epoch, slice(0, len(pixels)))
    return augment(augment.pad(torch.from_numpy(pixels)), torch.arange(len(pixels)), geometry, steps)


def test_crop_flip_and_normalisation_are_the_transforms_for_every_offset():
    pixels = np.repeat(noise(4)[3:], 4000, 0)
    ours = run(BatchAugment(CONFIG, CPU), pixels)
    transform = train_transform(CONFIG, crop='pad')
    image = pil(pixels[0])
    theirs = torch.stack([transform(image) for _ in range(2000)])
    ours_by_key, our_counts = np.unique(ours.flatten(1).numpy(), axis=0, return_counts=True)
    theirs_by_key, their_counts = np.unique(theirs.flatten(1).numpy(), axis=0, return_counts=True)
    assert len(ours_by_key) == 7 * 5 * 2  # offsets 0..6, 0..4, mirrored or not
    assert np.array_equal(ours_by_key, theirs_by_key)
    for counts in (our_counts, their_counts):  # uniform: chi square with 69 degrees of freedom, 0.1 % on either side
        expected = counts.sum() / 70
        assert 37 < ((counts - expected) ** 2 / expected).sum() < 112
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_probability_of_mirroring():
    for hflip in (0., 0.2, 1.):
        flips = BatchAugment(CONFIG, CPU, hflip=hflip).draw_geometry(0, 0, 10000)[:, 2]
        assert abs(flips.mean() - hflip) <= 4 * np.sqrt(hflip * (1 - hflip) / 10000)


def erased(ours, settings, count=4000):
    """Whether each pixel is erased, ours or by the transform (count, H, W); images are white."""
    white = np.full((count, 24, 16, 3), 255, dtype=np.uint8)
    config = dict(CONFIG, mean=(0.,) * 3, std=(1.,) * 3)
    if ours:
        augment = BatchAugment(config, CPU, hflip=0., **settings)
        augment.pad = lambda pixels: torch.nn.functional.pad(pixels, (0, 0, 2, 2, 3, 3), value=255)
        images = run(augment, white)
    else:
        _, _, final, *blot = train_transform(config, crop='pad', hflip=0., **settings).transforms
        transform = transforms.Compose([*final.transforms[2:], *blot])  # what follows on the normalisation
        images = torch.stack([transform(torch.ones(3, 24, 16)) for _ in range(count)])
    assert (images.amin(1) == images.amax(1)).all()
    return images[:, 0] == 0


@pytest.mark.parametrize('settings', [dict(re_prob=0.6), dict(cutout=7), dict(cutout=8), dict(re_prob=0.3, cutout=4)])
def test_blots_lie_where_those_of_the_transform_lie(settings):
    random.seed(0)
    ours, theirs = (erased(whose, settings).double() for whose in (True, False))
    for statistic in (
            lambda blots: blots,  # each pixel's share
            lambda blots: blots.mean((1, 2))[:, None],  # the area
            lambda blots: blots.mean((1, 2))[:, None] ** 2,
            lambda blots: blots.any(1).double().sum(1)[:, None] / 16,  # the width
            lambda blots: blots.any(1).double().any(1).double()[:, None],  # whether there is one
    ):
        a, b = statistic(ours), statistic(theirs)
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= 4.5 * error + 1e-12).all()


def test_erased_rectangles_are_within_timms_bounds():
    augment = BatchAugment(CONFIG, CPU, re_prob=1.)
    top, bottom, left, right = augment.draw_geometry(0, 0, 5000)[:, 3:].T
    assert (top >= 0).all() and (bottom <= 24).all() and (left >= 0).all() and (right <= 16).all()
    height, width = bottom - top, right - left
    limits = RandomErasing(1., device='cpu')
    assert (height < 24).all() and (width < 16).all() and (height > 0).all()
    assert abs((height * width / 384).mean() - (limits.min_area + limits.max_area) / 2) < 0.03
    assert bottom.max() == 24 and right.max() == 16 and top.min() == 0 and left.min() == 0


def test_where_no_rectangle_fits_none_is_erased():
    augment = BatchAugment(dict(CONFIG, input_size=(3, 40, 2)), CPU, re_prob=1.)
    top, bottom, left, right = augment.draw_geometry(0, 0, 2000)[:, 3:].T
    assert (right - left <= 1).all()
    random.seed(0)
    theirs = RandomErasing(1., device='cpu')
    share = np.mean([bool(theirs(torch.ones(1, 40, 2)).all()) for _ in range(2000)])
    assert 0.1 < share < 0.9
    assert abs((right == left).mean() - share) < 4 * np.sqrt(2 * share * (1 - share) / 2000)


POLICIES = [RAND, 'rand-m5-n3-p0.7', 'rand-m7-mstd101-tweights', 'original-mstd0.5', 'v0r', 'cifar10', 'svhn']


def presence(drawn, depth, name):
    """Whether an operation is an image's step of that number, and its arguments (images, 7); 0 where it is not."""
    out = np.zeros((len(drawn), 7))
    for row, steps in zip(out, drawn):
        if len(steps) > depth and steps[depth][0] == name:
            row[:1 + len(steps[depth][1])] = 1, *steps[depth][1]
    return out


def drawn_by_torchvision(policy):
    """Steps of one image as `torchvision.transforms.AutoAugment` decides them."""
    chosen, probs, signs = autoaugment.AutoAugment.get_params(len(policy.policies))
    return [
        both[int(sign)] for (prob, both), p, sign in zip(policy.policies[chosen], probs.tolist(), signs.tolist())
        if p <= prob
    ]


@pytest.mark.parametrize('policy', POLICIES)
def test_operations_and_arguments_are_drawn_as_by_the_transform(policy):
    """Frequencies of operations at either place, and mean and variance of what they are given."""
    augment = BatchAugment(CONFIG, CPU, auto_augment=policy)
    ours = augment.draw_policy(0, 0, slice(0, 6400))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    if policy in device_augment.TORCHVISION_POLICIES:
        theirs = [drawn_by_torchvision(augment.policy) for _ in range(6400)]
    else:
        theirs = [augment.policy.policy([]) for _ in range(6400)]
    names = {step[0] for image in (*ours, *theirs) for step in image}
    assert np.isclose(np.mean([len(i) for i in ours]), np.mean([len(i) for i in theirs]), atol=0.05)
    for depth in range(3):
        for name in sorted(names):
            a, b = (presence(drawn, depth, name) for drawn in (ours, theirs))
            for x, y in ((a, b), (a ** 2, b ** 2)):
                error = np.sqrt(x.var(0) / len(x) + y.var(0) / len(y))
                assert (np.abs(x.mean(0) - y.mean(0)) <= 4.5 * error + 1e-9).all(), (policy, name, depth)


@pytest.mark.parametrize('policy', [p for p in POLICIES if p not in device_augment.TORCHVISION_POLICIES])
def test_timms_policies_do_to_an_image_what_they_do_in_the_transform(policy):
    augment = BatchAugment(CONFIG, CPU, auto_augment=policy)
    _, theirs, *_ = train_transform(CONFIG, crop='pad', auto_augment=policy).transforms
    pixels, expected, steps = noise(100), [], []
    for seed, image in enumerate(pixels):
        for drawn, decide in ((expected, lambda: np.asarray(theirs(pil(image)))),  # noqa: B023
                              (steps, lambda: augment.policy.policy([]))):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            drawn.append(decide())
    found = follow(augment, pixels, steps)
    assert (found != pixels).any((1, 2, 3)).mean() > 0.5
    assert (found != expected).mean() < 1e-3


@pytest.mark.parametrize('policy', [RAND, 'cifar10'])
def test_images_have_the_mean_and_variance_of_the_transforms(policy):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    settings = dict(auto_augment=policy, re_prob=0.25, cutout=6)
    pixels = noise(8)[[0, 3]]
    for image in pixels:
        ours = run(BatchAugment(CONFIG, CPU, **settings), np.repeat(image[None], 3000, 0)).double()
        transform = train_transform(CONFIG, crop='pad', **settings)
        theirs = torch.stack([transform(pil(image)) for _ in range(1500)]).double()
        for a, b in ((ours, theirs), (ours ** 2, theirs ** 2)):
            error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
            away = (a.mean(0) - b.mean(0)) / error
            assert away.abs().max() < 5  # 1152 values, each a standard normal
            assert 0.5 < away.std() < 1.5


def test_draws_are_a_function_of_seed_epoch_and_place():
    augment = BatchAugment(CONFIG, CPU, auto_augment=RAND, re_prob=0.5, cutout=4)
    whole = augment.draw_policy(3, 2, slice(0, 500))
    geometry = augment.draw_geometry(3, 2, 500)
    torch.rand(1), np.random.random(), augment.draw_policy(1, 1, slice(5, 90))  # noqa: NPY002
    for places in (slice(0, 1), slice(63, 65), slice(100, 164), slice(128, 192), slice(499, 500)):
        assert augment.draw_policy(3, 2, places) == whole[places]
    assert np.array_equal(augment.draw_geometry(3, 2, 500), geometry)
    for seed, epoch in ((3, 3), (4, 2)):
        assert augment.draw_policy(seed, epoch, slice(0, 64)) != whole[:64]
        assert (augment.draw_geometry(seed, epoch, 500) != geometry).mean() > 0.3
    assert whole[:64] != whole[64:128]


def test_draws_leave_the_generators_as_they_were():
    augment = BatchAugment(CONFIG, CPU, auto_augment=RAND)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(1).item(), np.random.random()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    augment.draw_policy(0, 0, slice(0, 9))
    augment.draw_geometry(0, 0, 9)
    assert (torch.rand(1).item(), np.random.random()) == expected  # noqa: NPY002


class NoSync(TorchDispatchMode):
    """Refuses what waits for a device."""

    waiting = {'_local_scalar_dense', 'nonzero', 'is_nonzero', 'masked_select', 'equal', '_unique2'}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split('::')[1].split('.')[0]
        if name in self.waiting:
            raise AssertionError(name)
        if name in ('index', 'index_put', 'index_put_', '_index_put_impl_'):
            assert all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('policy', [None, *POLICIES])
def test_a_batch_never_waits_for_the_device(policy):
    augment = BatchAugment(CONFIG, CPU, auto_augment=policy, re_prob=0.5, cutout=4)
    pixels = augment.pad(torch.from_numpy(noise(256)))
    geometry = torch.from_numpy(augment.draw_geometry(0, 0, 256))
    steps = augment.draw_policy(0, 0, slice(0, 256))
    with NoSync():
        augment(pixels, torch.arange(256), geometry, steps)
    with pytest.raises(AssertionError, match='index'), NoSync():
        pixels[pixels[:, 0, 0, 0] > 3]


def test_images_and_pixels_are_left_alone():
    augment = BatchAugment(CONFIG, CPU, auto_augment=RAND, re_prob=1., cutout=4)
    pixels = torch.from_numpy(noise(64))
    padded = augment.pad(pixels)
    before = padded.clone()
    augment(padded, torch.arange(64), torch.from_numpy(augment.draw_geometry(0, 0, 64)),
            augment.draw_policy(0, 0, slice(0, 64)))
    assert torch.equal(padded, before)


def test_grey_images():
    config = dict(CONFIG, input_size=(1, 24, 16), mean=(0.5,), std=(0.25,))
    for policy in (RAND, 'cifar10'):
        images = run(BatchAugment(config, CPU, auto_augment=policy), noise(64, channels=1))
        assert images.shape == (64, 1, 24, 16)


@pytest.mark.parametrize(('arguments', 'supported'), [
    (('pad',), True),
    (('rrc',), False),
    (('pad', 0.4), False),
    (('pad', 0., 'cifar10'), True),
    (('pad', 0., RAND), True),
    (('pad', 0., 'rand-m9-tweights'), True),
    (('pad', 0., 'original'), True),
    (('pad', 0., 'augmix-m3'), False),
    (('pad', 0., '3a'), False),
    (('pad', 0., 'rand-m9-t3aw'), False),
])
def test_what_is_supported(arguments, supported):
    assert supports(*arguments) is supported


def test_what_is_not_supported_is_named():
    with pytest.raises(ValueError, match='augmix-m3'):
        BatchAugment(CONFIG, CPU, auto_augment='augmix-m3')
    with pytest.raises(ValueError, match='lanczos.*bicubic'):
        BatchAugment(dict(CONFIG, interpolation='lanczos'), CPU, auto_augment=RAND)
