"""Images made on the spot."""
import datasets
import numpy as np
from PIL import Image


def noise_images(count, size=32, seed=0):
    """Return PIL images of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def write_two_colours(folder, train=160, test=80):
    """Write a data set of eight classes in four superclasses: images of one colour each, its shade the class."""
    rng = np.random.default_rng(0)
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    features = datasets.Features(
        image=datasets.Image(),
        fine=datasets.ClassLabel(names=[f'{shade} {colour}' for colour in 'rgby' for shade in ('dark', 'light')]),
        coarse=datasets.ClassLabel(names=list('rgby')),
    )
    for part, count in (('train', train), ('test', test)):
        labels = np.arange(count) % 8
        shades = np.where(labels % 2, 220, 120)[:, None] * colours[labels // 2]
        pixels = (shades[:, None, None] + rng.integers(0, 30, (count, 32, 32, 3))).astype(np.uint8)
        table = dict(image=[Image.fromarray(p) for p in pixels], fine=labels.tolist(), coarse=(labels // 2).tolist())
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f'{part}.parquet')
    return folder
