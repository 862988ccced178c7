"""The one decoder of images: every way to a network, training or evaluation, decodes here."""
import io
import os
import re
import warnings
from typing import Any, Dict, Optional

import datasets
import numpy as np
import pyarrow as pa
from datasets.utils.file_utils import is_local_path
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UnreadableImageError

__all__ = ['decode_image', 'printable']

# Formats that are not opened. Pillow hands EPS to Ghostscript, which would run what the data say, and what lies in an
# IPTC file to whatever format that is, EPS included.
_CLOSED = ('EPS', 'IPTC')

# How files begin that people take for images, in small letters, and what to call them.
_FOREIGN = {b'%!ps': 'EPS', b'\xc5\xd0\xd3\xc6': 'EPS', b'%pdf': 'PDF', b'<svg': 'SVG', b'<?xml': 'XML', b'<': 'HTML'}

_TRANSPARENT = ('LA', 'PA', 'RGBA', 'RGBa')


_REMEDY = 'Repair it, or leave it out by starting anew with `skip_unreadable`.'


class _Unreadable(ValueError):
    """What is wrong with an image, in words that need no others."""


def decode_image(stored: Optional[Dict[str, Any]], mode: str, place: str) -> Image.Image:
    """Decode an image, the first of an animated file, and turn it upright as its EXIF data say.

    Grey images of more than 8 bits are scaled by the range of their file, never by what they show: white is 65535 where
    there are 16 bits, 1 in floating point numbers. 32-bit integers have no such range and are taken as they are. What
    lies outside, of the latter outside 0 to 255, is an error. Colours of 16 bits keep their upper 8, as Pillow does.

    Transparency is dropped, as `PIL.Image.convert` does. Where it alone draws the picture, as in black ink on nothing,
    that would leave one colour: such an image is laid on white, or on black where its colour is a light one.

    Args:
        stored: What the `datasets` library keeps of an image that it does not decode: `bytes`, `path`, or both.
        mode: PIL mode of the result, `RGB` or `L`.
        place: Where the image is, for messages, such as `in row 17 of the train split`.

    Raises:
        UnreadableImageError: It cannot be decoded, or only a part of it; the message says where it is and why.
    """
    stored = stored or {}
    path, data = stored.get('path'), stored.get('bytes')
    name = None if path is None else printable(path)
    if path is None and data is None:
        raise UnreadableImageError(f'There is no image {place}. {_REMEDY}', reason='there is none')
    try:
        return _convert(_read(path) if data is None else data, mode)
    except MemoryError:
        raise
    except Exception as e:  # Pillow's plugins raise anything on damaged data
        reason = _reason(e)
        raise UnreadableImageError(f'Cannot read the image {place}: {reason}. {_REMEDY}', name, reason) from e


def printable(path: str) -> str:
    """Return a path for a message of one line."""
    return path if path.isprintable() else repr(path)[1:-1]


def _read(path: str) -> bytes:
    """Read a file, an archive's or a remote one too."""
    if not is_local_path(path):
        column = pa.array([dict(bytes=None, path=path)], type=datasets.Image.pa_type)
        return datasets.Image().embed_storage(column)[0].as_py()['bytes']
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for ever
        raise _Unreadable('it is no file')
    with open(path, 'rb') as file:
        return file.read()


def _convert(data: bytes, mode: str) -> Image.Image:
    if not data:
        raise _Unreadable('the file is empty')
    Image.preinit()
    Image.init()
    with warnings.catch_warnings():
        # Pillow warns from half of the size on that it refuses
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=[name for name in Image.ID if name not in _CLOSED])
        except UnidentifiedImageError as e:
            begin = data[:64].lstrip().lower()
            kind = next((kind for magic, kind in _FOREIGN.items() if begin.startswith(magic)), None)
            found = f'it is {kind}, which is not opened' if kind else 'it is in no image format that Pillow knows'
            raise _Unreadable(found) from e
        scale = _full_scale(image)
        image.load()
        if _cut_short(image, data):
            raise _Unreadable('the file is cut short')
        ImageOps.exif_transpose(image, in_place=True)
        return (_flatten(image, mode) if scale is None else _to_eight_bits(image, scale)).convert(mode)


def _cut_short(image: Image.Image, data: bytes) -> bool:
    """Return whether the end is missing, of formats whose decoders pass over that."""
    if image.format == 'JPEG2000':  # a marker that no other bytes of the stream look like
        return b'\xff\xd9' not in data
    # 256 colours stand at the end behind a 12; without them the numbers of the colours would be taken for greys
    return image.format == 'PCX' and image.mode == 'L' and data[-769:-768] != b'\x0c'


def _full_scale(image: Image.Image) -> Optional[int]:
    """Return the value of white in an image of more than 8 bits, not loaded yet; None for any other."""
    if image.mode == 'F':
        return 1
    if image.mode != 'I' and not image.mode.startswith('I;16'):
        return None
    raw = image.tile[0][3] if image.tile else ''
    raw = raw if isinstance(raw, str) else str(raw[0])
    if raw == 'I;12':
        return 4095
    if image.mode != 'I' or image.format == 'PPM':  # of the latter Pillow makes 16 bits
        return 65535
    if raw.startswith('I;16'):
        return 32767 if raw.endswith('S') else 65535
    return 255


def _to_eight_bits(image: Image.Image, scale: int) -> Image.Image:
    pixels = np.asarray(image).astype(np.float32)
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= scale):  # neither holds for nan
        kind = 'floating point numbers' if image.mode == 'F' else 'integers'
        raise _Unreadable(
            f'its pixels are {kind} from {low:g} to {high:g}, where 0 (black) to {scale} (white) is expected; store '
            f'them so, or with 8 or 16 bits'
        )
    return Image.fromarray(np.rint(pixels * (255 / scale)).astype(np.uint8))


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """Return an image of 8 bits in a mode that converts to the wanted one and has what is worth keeping."""
    if image.mode == 'La':
        image = image.convert('LA')
    elif image.mode == 'LAB' and mode == 'L':
        image = image.convert('RGB')
    if image.mode in _TRANSPARENT or 'transparency' in image.info:
        layers = image.convert('RGBA')
        image.info.pop('transparency', None)  # Pillow would warn of dropping it
        *colours, (clearest, densest) = layers.getextrema()
        if clearest < densest and all(low == high for low, high in colours):
            light = layers.convert('L').getextrema()[0] > 127
            return Image.alpha_composite(Image.new('RGBA', layers.size, 'black' if light else 'white'), layers)
    return image


def _reason(error: Exception) -> str:
    """Return half a sentence, without a full stop, on what a decoder found wrong."""
    if isinstance(error, Image.DecompressionBombError):
        found = re.findall(r'\d+', str(error))
        if len(found) == 2:
            pixels, limit = map(int, found)
            return (
                f'it has {pixels:,} pixels; more than {limit:,}, twice PIL.Image.MAX_IMAGE_PIXELS, are taken for an '
                f'attack on the memory, so store it smaller'
            )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = ' '.join(str(error).split()).rstrip('.')
    if isinstance(error, (OSError, SyntaxError, ValueError)) and text:
        return text
    return f'the decoder failed ({type(error).__name__}{": " if text else ""}{text})'
