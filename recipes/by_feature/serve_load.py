#!/usr/bin/env python
"""What early exit is worth to a server under load.

    pip install litserve httpx
    python recipes/by_feature/serve_load.py local-dir:RUN --exit 1 --rates 50 100 200

Three servers are started one after the other on loopback (see `serve.py`): early exit, the same network run to its
end, and the network truncated at an auxiliary exit. Each is offered images at random times, a Poisson process, whether
earlier ones have been answered or not. Times are counted from when a request was due. Goodput is the number of answers
a second that came within the deadline.
"""
import argparse
import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import timm
from timm.data import resolve_data_config

import timm_selfdistill  # noqa: F401, registers the names

JSON = {'Content-Type': 'application/json'}


@contextlib.contextmanager
def serving(checkpoint, kind, body, *options, seconds=180):
    """Run a server in a process of its own; yield its address once it answers."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name('serve.py')
    process = subprocess.Popen(
        [sys.executable, str(script), checkpoint, '--kind', kind, '--port', str(port), *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    url = f'http://127.0.0.1:{port}/predict'
    try:
        end = time.time() + seconds
        while True:
            if process.poll() is not None or time.time() > end:
                raise RuntimeError(f'{kind}: the server did not start.')
            with contextlib.suppress(httpx.HTTPError):
                if httpx.post(url, content=body, headers=JSON, timeout=30).is_success:
                    break
            time.sleep(0.2)
        yield url
    finally:
        for number, patience in ((signal.SIGINT, 5), (signal.SIGKILL, None)):  # its workers with it
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(patience)


async def offer(url, bodies, rate, seconds, timeout, seed=0):
    """Send requests at random times; return how long each took in seconds, None where it failed, and the answers."""
    starts = np.random.default_rng(seed).exponential(1 / rate, max(1, round(rate * seconds))).cumsum()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=timeout, limits=limits) as client:
        begin = time.perf_counter()

        async def send(number, at):
            await asyncio.sleep(max(0., at - (time.perf_counter() - begin)))
            try:
                answer = await client.post(url, content=bodies[number % len(bodies)], headers=JSON)
                answer.raise_for_status()
            except httpx.HTTPError:
                return None, None
            return time.perf_counter() - begin - at, answer.json()

        return await asyncio.gather(*(send(number, at) for number, at in enumerate(starts)))


def summarize(answers, seconds, deadline):
    """Return goodput, and median and 99th percentile of the milliseconds that answers took."""
    taken = [t for t, _ in answers if t is not None]
    p50, p99 = 1000 * np.percentile(taken, (50, 99)) if taken else (np.nan, np.nan)
    return dict(
        requests=len(answers), failed=len(answers) - len(taken), goodput=sum(t <= deadline for t in taken) / seconds,
        p50_ms=float(p50), p99_ms=float(p99))


def read_images(folder, size, count):
    """Return images below a folder as bodies of requests; noise without a folder."""
    from PIL import Image

    height, width = size[1:]
    if folder is None:
        pixels = np.random.default_rng(0).integers(256, size=(count, height, width, size[0]), dtype=np.uint8)
    else:
        paths = sorted(p for p in Path(folder).rglob('*') if p.suffix.lower() in ('.png', '.jpg', '.jpeg'))[:count]
        mode = 'L' if size[0] == 1 else 'RGB'
        pixels = [np.asarray(Image.open(path).convert(mode).resize((width, height))) for path in paths]
    return [json.dumps(dict(pixels=base64.b64encode(image.tobytes()).decode())).encode() for image in pixels]


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument('checkpoint')
    parser.add_argument('--exit', type=int, default=0, help='where the smaller network is truncated')
    parser.add_argument('--rates', type=float, nargs='+', default=[50., 100., 200.], help='requests a second')
    parser.add_argument('--seconds', type=float, default=20., help='time for each rate')
    parser.add_argument('--deadline', type=float, default=0.1, help='seconds within which an answer counts')
    parser.add_argument('--images', help='folder of images; noise when left out')
    parser.add_argument('--count', type=int, default=1000, help='images at most')
    args = parser.parse_args(argv)
    size = resolve_data_config(model=timm.create_model(args.checkpoint, pretrained=True))['input_size']
    bodies = read_images(args.images, size, args.count)
    rows = []
    for kind in ('whole', f'exit{args.exit}', 'early'):
        with serving(args.checkpoint, kind, bodies[0]) as url:
            asyncio.run(offer(url, bodies, min(args.rates), min(3., args.seconds), 30))  # warm up
            for rate in args.rates:
                answers = asyncio.run(offer(url, bodies, rate, args.seconds, 30))
                rows.append(dict(server=kind, rate=rate, **summarize(answers, args.seconds, args.deadline)))
    print('| server | offered a second | goodput | p50 | p99 | failed |\n|---|---|---|---|---|---|')
    for row in rows:
        print(f'| {row["server"]} | {row["rate"]:g} | {row["goodput"]:.1f} | {row["p50_ms"]:.1f} ms | '
              f'{row["p99_ms"]:.1f} ms | {row["failed"]} |')
    return rows


if __name__ == '__main__':
    main()
