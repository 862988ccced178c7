"""The one decoder: what comes out of every mode, what is refused and in what words, damaged files of all kinds."""
import collections
import io
import os
import signal
import warnings
import zipfile
from contextlib import contextmanager

import datasets
import numpy as np
import pytest
from helpers.images import noise_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, ExifTags, Image

from timm_selfdistill.data.augment import eval_transform
from timm_selfdistill.data.device_loader import decode_split
from timm_selfdistill.data.image_data import ImageSplit, load_image_data
from timm_selfdistill.data.images import decode_image
from timm_selfdistill.data.source import DataSource
from timm_selfdistill.data.streamed_loader import create_streamed_eval_loader
from timm_selfdistill.data.streaming import load_streamed_data
from timm_selfdistill.data.unreadable import SkippedImages, find_unreadable
from timm_selfdistill.data.workers import create_eval_loader, readable
from timm_selfdistill.errors import DataError, UnreadableImageError

CONFIG = dict(
    input_size=(3, 16, 16), interpolation='bilinear', mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, crop_mode='center')
RAMP = np.linspace(0, 65535, 4096).round().astype(np.uint16).reshape(64, 64)


def encode(image, kind='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data, mode='RGB'):
    return decode_image(dict(bytes=data, path=None), mode, 'in row 3 of the train split')


def refusal(data):
    with pytest.raises(UnreadableImageError) as e:
        decode(data)
    message = str(e.value)
    assert message.startswith('Cannot read the image in row 3 of the train split: ')
    assert message.endswith('. Repair it, or leave it out by starting anew with `skip_unreadable`.')
    assert len(message.splitlines()) == 1 and '0x' not in message
    return e.value.reason


# -- nothing changes for ordinary images -------------------------------------------------------------------------------


def ordinary():
    colour = noise_images(1, 40)[0]
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    palette = colour.quantize(200)
    return dict(
        rgb=encode(colour), grey=encode(colour.convert('L')), two=encode(colour.convert('1')), palette=encode(palette),
        clear_palette=encode(palette, transparency=3), many_clear=encode(palette, transparency=bytes(range(200))),
        alpha=encode(Image.merge('RGBA', [*colour.split(), colour.getchannel(0)])),
        grey_alpha=encode(Image.merge('LA', colour.split()[:2])), clear_colour=encode(colour, transparency=(1, 2, 3)),
        jpeg=encode(colour, 'JPEG'), cmyk=encode(colour.convert('CMYK'), 'JPEG'),
        ycbcr=encode(colour.convert('YCbCr'), 'TIFF'), lab=encode(colour.convert('LAB'), 'TIFF'),
        turned=encode(colour, 'JPEG', exif=turned),
        animated=encode(palette, 'GIF', save_all=True, append_images=[palette.rotate(90)]),
        webp=encode(colour, 'WEBP'), tiff=encode(colour, 'TIFF', compression='tiff_lzw'), bmp=encode(colour, 'BMP'),
        deep=encode(colour, 'JPEG2000'), text=encode(colour.convert('L'), 'PPM'),
    )


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', ordinary())
def test_ordinary_images_are_what_pillow_makes_of_them(name):
    data = ordinary()[name]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Pillow's of palettes with transparency
        try:
            theirs = datasets.Image().decode_example(dict(bytes=data, path=None))
        except OSError as error:  # Pillow 12.3 and TIFF in YCbCr
            pytest.skip(f'this Pillow cannot read what it has written: {error}')
        expected = {mode: theirs.convert(mode) for mode in ('RGB', 'L') if (name, mode) != ('lab', 'L')}
    for mode, image in expected.items():
        ours = decode(data, mode)
        assert (ours.mode, ours.size) == (mode, theirs.size)
        assert np.array_equal(ours, image)
    assert decode(data, 'L').mode == 'L'


def test_a_file_and_one_in_an_archive_are_what_their_bytes_are(tmp_path):
    image = noise_images(1)[0]
    image.save(tmp_path / 'a.png')
    with zipfile.ZipFile(tmp_path / 'all.zip', 'w') as archive:
        archive.write(tmp_path / 'a.png', 'inside/a.png')
    for path in (tmp_path / 'a.png', f'zip://inside/a.png::{tmp_path / "all.zip"}'):
        assert np.array_equal(decode_image(dict(bytes=None, path=str(path)), 'RGB', ''), image)


# -- more than 8 bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('pixels, kind, options', [
    (RAMP, 'PNG', {}),
    (RAMP, 'TIFF', {}),
    (RAMP, 'TIFF', dict(compression='tiff_lzw')),
    (RAMP.astype('>u2'), 'TIFF', {}),
    (RAMP, 'PPM', {}),
    (RAMP, 'JPEG2000', {}),
    ((RAMP / 65535).astype(np.float32), 'TIFF', {}),
    ((RAMP / 65535).astype(np.float32), 'PPM', {}),
    (RAMP.astype(np.int32) // 257, 'TIFF', {}),
])
def test_a_ramp_of_more_than_8_bits_stays_one(pixels, kind, options):
    data = encode(Image.fromarray(pixels), kind, **options)
    grey = np.asarray(decode(data, 'L'))
    exact = RAMP / 257
    assert np.abs(grey - exact).max() <= (1 if pixels.dtype == np.int32 else 0.501)
    assert np.array_equal(np.asarray(decode(data))[:, :, 1], grey)


@given(st.integers(0, 65535), st.integers(0, 65535), st.sampled_from(['PNG', 'TIFF']))
def test_16_bits_are_scaled_by_their_range_whatever_an_image_shows(low, high, kind):
    data = encode(Image.fromarray(np.array([[low, high]], dtype=np.uint16)), kind)
    assert np.asarray(decode(data, 'L')).tolist() == [[round(low / 257), round(high / 257)]]


def test_colours_of_16_bits_keep_their_upper_8():
    import zlib
    pixels = np.stack([RAMP, RAMP[::-1], RAMP.T], -1).astype('>u2')

    def chunk(name, content):
        return len(content).to_bytes(4, 'big') + name + content + zlib.crc32(name + content).to_bytes(4, 'big')

    rows = b''.join(b'\0' + row.tobytes() for row in pixels)
    header = (64).to_bytes(4, 'big') * 2 + bytes([16, 2, 0, 0, 0])
    data = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    assert np.array_equal(decode(data), pixels >> 8)


def with_nan():
    pixels = np.full((4, 4), 0.5, dtype=np.float32)
    pixels[1, 2] = np.nan
    return pixels


@pytest.mark.parametrize('pixels, found', [
    (RAMP.astype(np.int32), 'integers from 0 to 65535, where 0 .black. to 255'),
    (np.arange(-5, 4).reshape(3, 3).astype(np.int32), 'integers from -5 to 3'),
    (RAMP.astype(np.float32) / 257, 'floating point numbers from 0 to 255, where 0 .black. to 1'),
    (np.array([[-0.5, 0.5]], dtype=np.float32), 'numbers from -0.5 to 0.5'),
    (with_nan(), 'numbers from nan to nan'),
])
def test_what_does_not_say_where_white_is_is_refused_by_name(pixels, found):
    with pytest.raises(UnreadableImageError, match=found):
        decode(encode(Image.fromarray(pixels), 'TIFF'))


def test_every_loader_scales_16_bits_alike(tmp_path):
    for name, pixels in (('ant', RAMP), ('bee', RAMP.T), ('cat', RAMP[::-1] // 7)):
        folder = tmp_path / 'set' / 'train' / name
        folder.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.ascontiguousarray(np.roll(pixels, i, 1))).save(folder / f'{i}.png')
    split = load_image_data(DataSource(data_dir=str(tmp_path / 'set'), val_fraction=0.)).train
    pixels = decode_split(split, CONFIG).permute(0, 3, 1, 2) / 255
    (images, labels), = create_eval_loader(split, eval_transform(CONFIG), 6)
    assert (images / 2 + 0.5 - pixels).abs().max() < 1e-6
    assert pixels.unique().numel() > 100 and (pixels == 1).float().mean() < 0.05
    stream = load_streamed_data(DataSource(data_dir=str(tmp_path / 'set'))).train
    (streamed, streamed_labels), = create_streamed_eval_loader(stream, eval_transform(CONFIG), 6)
    assert sorted(streamed.sum((1, 2, 3)).tolist()) == pytest.approx(sorted(images.sum((1, 2, 3)).tolist()))


# -- transparency ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('ink, ground', [((0, 0, 0), 255), ((255, 255, 255), 0), ((0, 0, 90), 255), ((250, 240, 0), 0)])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_a_picture_drawn_by_transparency_alone_is_laid_on_a_ground(ink, ground, mode):
    drawn = Image.new('L', (8, 8))
    drawn.paste(255, (2, 2, 6, 6))
    image = Image.new('RGBA', (8, 8), ink)
    image.putalpha(drawn)
    out = np.asarray(decode(encode(image), mode)).reshape(8, 8, -1)
    assert (out[0, 0] == ground).all()
    assert np.array_equal(out[4, 4], np.asarray(Image.new('RGB', (1, 1), ink).convert(mode)).reshape(-1))


def test_any_other_transparency_is_dropped():
    image = noise_images(1, 8)[0]
    for alpha in (0, 100):
        clear = image.copy()
        clear.putalpha(alpha)
        assert np.array_equal(decode(encode(clear)), image)
    plain = Image.new('RGBA', (8, 8), (10, 20, 30, 0))
    assert np.array_equal(decode(encode(plain)), plain.convert('RGB'))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_too_large_an_image_is_told_its_size_and_the_limit(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    for kind in ('PNG', 'JPEG', 'AVIF', 'WEBP'):
        data = encode(Image.new('RGB', (60, 50)), kind)
        assert refusal(data).startswith(
            'it has 3,000 pixels; more than 2,000, twice PIL.Image.MAX_IMAGE_PIXELS, are taken for an attack')


@pytest.mark.filterwarnings('error')
def test_a_large_image_is_read_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    for kind in ('PNG', 'TIFF'):
        assert decode(encode(Image.new('RGB', (50, 30)), kind)).size == (50, 30)


@pytest.mark.parametrize('data, reason', [
    (b'', 'the file is empty'),
    (b'no image', 'it is in no image format that Pillow knows'),
    (b'%PDF-1.7 ...', 'it is PDF, which is not opened'),
    (b'\n<svg xmlns="http://www.w3.org/2000/svg"/>', 'it is SVG, which is not opened'),
    (b'<!DOCTYPE html><html>404</html>', 'it is HTML, which is not opened'),
])
def test_what_is_no_image_is_called_what_it_is(data, reason):
    assert refusal(data) == reason


@pytest.mark.parametrize('head', [b'', b'\xc5\xd0\xd3\xc6' + (32).to_bytes(4, 'little')])
def test_eps_is_never_run(monkeypatch, head):
    def run(*_, **__):
        raise AssertionError('Ghostscript runs')

    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', run)
    data = encode(noise_images(1)[0], 'EPS')
    assert refusal(head + data) == 'it is EPS, which is not opened'


def write_folder(root, files):
    for i, data in enumerate(files):
        folder = root / 'train' / ('ant', 'bee')[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{i:04d}.png').write_bytes(data)
    return str(root)


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_in_a_folder_is_named_by_its_path(tmp_path, workers):
    whole = encode(noise_images(1)[0])
    folder = write_folder(tmp_path / 'a set', [whole] * 5 + [whole[:-100]] + [whole] * 2)
    split = load_image_data(DataSource(data_dir=folder, val_fraction=0.)).train
    bad = tmp_path / 'a set' / 'train' / 'bee' / '0005.png'
    with pytest.raises(UnreadableImageError) as e:
        list(readable(create_eval_loader(split, eval_transform(CONFIG), 2, workers=workers)))
    row = next(i for i, image in enumerate(split.images) if image['image']['path'] == str(bad))
    assert str(e.value).startswith(f'Cannot read the image {bad} (row {row} of the train split): image file is trunc')
    assert str(e.value).endswith('`skip_unreadable`.')
    with pytest.raises(UnreadableImageError, match=f'Cannot read the image {bad} '):
        decode_split(split, CONFIG)
    bad.unlink()
    with pytest.raises(UnreadableImageError, match=f'Cannot read the image {bad} .*: No such file or directory'):
        decode_split(split, CONFIG)
    os.mkfifo(bad)
    with pytest.raises(UnreadableImageError, match=f'Cannot read the image {bad} .*: it is no file'):
        decode_split(split, CONFIG)


def test_odd_names_stay_on_one_line(tmp_path):
    path = str(tmp_path / 'two\nlines\u2028.png')
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
    table = datasets.Dataset.from_dict(dict(image=[dict(bytes=b'x', path=path)], label=[0]), features=features)
    with pytest.raises(UnreadableImageError, match=r'two\\nlines\\u2028.png \(row 0') as e:
        ImageSplit(table, 'train', 'image', 'label').image(0)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('error', [
    RuntimeError('no\nframe'), KeyError('x'), EOFError(), TypeError('a'), OverflowError('b'), AssertionError()])
def test_whatever_a_decoder_raises_is_a_sentence(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, 'open', fail)
    reason = refusal(b'x')
    assert reason.startswith(f'the decoder failed ({type(error).__name__}')


@pytest.mark.parametrize('error', [MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_image_passes(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, 'open', fail)
    with pytest.raises(error):
        decode(b'x')


# -- fuzz --------------------------------------------------------------------------------------------------------------


def samples():
    """Return an encoded image of every format that this Pillow writes, of the common ones in several guises."""
    Image.preinit()
    Image.init()
    y, x = np.mgrid[:30, :40]
    noise = np.random.default_rng(0).integers(20, size=(30, 40, 3))
    colour = Image.fromarray((np.stack([6 * x, 8 * y, 3 * (x + y)], -1) + noise).astype(np.uint8))
    other = colour.rotate(90)
    wanted = [(kind, colour.convert(mode), {}) for kind in sorted(Image.SAVE) for mode in ('RGB', 'L', 'P', '1')]
    wanted += [
        ('TIFF', colour, dict(compression=c))
        for c in ('tiff_lzw', 'tiff_adobe_deflate', 'packbits', 'jpeg', 'zstd', 'lzma')
    ]
    wanted += [(kind, colour, dict(save_all=True, append_images=[other])) for kind in ('GIF', 'WEBP', 'AVIF', 'MPO')]
    wanted += [('TIFF', colour.convert('1'), dict(compression='group4')), ('JPEG', colour, dict(progressive=True))]
    wanted += [('TGA', colour, dict(compression='tga_rle')), ('DDS', colour, dict(pixel_format='DXT1'))]
    wanted += [('JPEG2000', colour, dict(no_jp2=True)), ('WEBP', colour, dict(lossless=True))]
    wanted += [(kind, Image.fromarray(RAMP), {}) for kind in ('PNG', 'TIFF', 'PPM', 'JPEG2000')]
    wanted += [('TIFF', Image.fromarray((RAMP / 65535).astype(np.float32)), {})]
    found = {}
    for i, (kind, image, options) in enumerate(wanted):
        try:
            found[f'{kind} {image.mode} {i}'] = encode(image, kind, **options)
        except (OSError, ValueError, RuntimeError, KeyError):  # not that mode, or without an encoder in this build
            pass
    return found


def damages(data, others, rng):
    """Yield what may become of a file."""
    size = len(data)
    yield from (data[:int(size * share)] for share in (0., 0.02, 0.3, 0.7, 0.95))
    yield data[:-1]
    for count in (1, 3, 30):
        flipped = bytearray(data)
        for i in rng.integers(size, size=count):
            flipped[i] ^= int(rng.integers(1, 256))
        yield bytes(flipped)
    for _ in range(3):  # the header, where sizes and kinds stand
        headless = bytearray(data)
        for i in rng.integers(min(size, 80), size=2):
            headless[i] = int(rng.integers(256))
        yield bytes(headless)
        huge = bytearray(data)
        i = int(rng.integers(min(size, 160)))
        huge[i:i + 4] = (b'\xff\xff\xff\x7f', b'\x7f\xff\xff\xff')[int(rng.integers(2))]
        yield bytes(huge)
    blank = bytearray(data)
    i = int(rng.integers(size))
    blank[i:i + size // 8] = bytes(len(blank[i:i + size // 8]))
    yield bytes(blank)
    yield data[:16][::-1] + data[16:]
    yield data[:size // 2] + data
    other = others[int(rng.integers(len(others)))]
    yield data[:size // 2] + other[len(other) // 2:]
    yield data[:64] + other


class Hangs(BaseException):
    """Passes every `except Exception`."""


@contextmanager
def limit(seconds):
    def hang(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def damaged(each=None):
    """Return damaged files of every format by the name of what they were."""
    whole = samples()
    found = {}
    for name, data in whole.items():
        rng = np.random.default_rng(len(name) + len(data))
        found[name] = list(damages(data, list(whole.values()), rng))[:each]
    return found


@pytest.mark.slow
def test_no_damage_brings_anything_but_the_packages_own_error():
    tally = collections.Counter()
    for name, files in damaged().items():
        for i, data in enumerate(files):
            with limit(20):
                try:
                    assert decode(data).mode == 'RGB', (name, i)
                    tally['read'] += 1
                except UnreadableImageError as e:
                    assert len(str(e).splitlines()) == 1 and len(str(e)) < 500, (name, i)
                    tally['refused'] += 1
    print(dict(tally))
    assert tally['refused'] > 500 and tally['read'] > 100


@pytest.mark.slow
def test_a_file_that_was_cut_short_never_comes_back_in_part():
    for name, data in samples().items():
        try:
            whole = decode(data)
        except UnreadableImageError:  # EPS, or a format that Pillow only writes
            continue
        for end in range(0, len(data), 1 if name.startswith(('JPEG2000', 'PCX P')) else 1 + len(data) // 12):
            try:
                assert np.array_equal(decode(data[:end]), whole), (name, end)
            except UnreadableImageError:
                pass


@pytest.mark.slow
def test_damaged_files_in_every_loader(tmp_path):
    good = encode(noise_images(1)[0])
    files = [good, good, *(data for files in damaged(each=9).values() for data in files)]
    folder = write_folder(tmp_path / 'set', files)
    split = load_image_data(DataSource(data_dir=folder, val_fraction=0.)).train
    assert len(split) == len(files) > 500
    refused = set()
    for row in range(len(split)):  # one image at a time, in the training process
        with limit(20):
            one, wrong = split.select(np.array([row]), 'one'), []
            for load in (
                lambda one=one: decode_split(one, CONFIG),
                lambda one=one: list(create_eval_loader(one, eval_transform(CONFIG), 4)),
            ):
                try:
                    load()
                except UnreadableImageError as e:
                    wrong.append(str(e))
            assert len(wrong) in (0, 2) and len(set(wrong)) <= 1
            if wrong:
                refused.add(row)
    assert 200 < len(refused) < len(files)
    with limit(300):
        found = find_unreadable(split)
    assert {int(image.place.removeprefix('row ')) for image in found} == refused
    for row in sorted(refused)[::90]:  # a worker process each
        with limit(60), pytest.raises(DataError, match='Cannot read the image') as e:
            list(readable(create_eval_loader(
                split.select(np.array([row]), 'one'), eval_transform(CONFIG), 4, workers=1)))
        assert len(str(e.value).splitlines()) == 1
    stream = load_streamed_data(DataSource(data_dir=folder, skip_unreadable=True)).train
    stream.skipped = SkippedImages()
    with limit(300):
        count = sum(len(labels) for _, labels in create_streamed_eval_loader(stream, eval_transform(CONFIG), 32))
    assert count == len(files) - len(refused)
    assert len(stream.skipped._known) == len(refused)
