"""What has come of a run, in one line: what was trained, how good every exit is, how long it took and on what."""
import json
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, List, Optional

import accelerate
import timm
import torch
from accelerate import Accelerator
from filelock import FileLock

from ..config import TrainConfig
from ..models.names import SUFFIX
from ..publishing import place_name, public_settings, public_text
from ..run_files import RECORD
from ..version import __version__

__all__ = ['TimeSheet', 'append_record', 'exit_figures', 'make_record']


def _commit() -> Optional[str]:
    """Return the commit of the checkout that this package lies in, with -dirty if files differ; None without one."""
    package = Path(__file__).parents[1]

    def git(*words: str) -> str:
        command = ['git', '-C', str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        git('ls-files', '--error-unmatch', '__init__.py')  # an installed copy may lie in somebody's checkout
        return git('rev-parse', 'HEAD') + ('-dirty' if git('status', '--porcelain', '-uno', '.') else '')
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware(accelerator: Accelerator) -> str:
    device = accelerator.device
    if device.type == 'cpu':
        return f'{accelerator.num_processes} × CPU ({platform.machine()}, {torch.get_num_threads()} threads)'
    name = getattr(torch.get_device_module(device), 'get_device_name', lambda: device.type)
    return f'{accelerator.num_processes} × {name()}'


class TimeSheet:
    """The time that a run has taken, over all sittings at it; what a killed process did after its checkpoint is lost.

    Args:
        accelerator: Knows what this sitting runs on.
    """

    def __init__(self, accelerator: Accelerator):
        self._before: List[Dict[str, Any]] = []
        precision = accelerator.mixed_precision
        self._now = dict(
            hardware=_hardware(accelerator),
            precision='fp32' if precision == 'no' else precision,
            torch=str(torch.__version__),  # of a class that checkpoints do not take
            timm=timm.__version__,
            accelerate=accelerate.__version__,
            timm_selfdistill=__version__,
            commit=_commit(),
            steps=0,
            training=0.,
            seconds=0.,
        )
        self._last = time.monotonic()

    def lap(self, steps: Optional[int] = None) -> None:
        """Count the time since the last call; with `steps`, as that of so many optimizer steps."""
        before, self._last = self._last, time.monotonic()
        seconds = self._last - before
        self._now['seconds'] += seconds
        if steps is not None:
            self._now['steps'] += steps
            self._now['training'] += seconds

    def sittings(self) -> List[Dict[str, Any]]:
        """Return a dict a sitting: what it ran on, its `steps`, its `seconds` and those of `training`."""
        return [*self._before, dict(self._now)]

    def go_on(self, sittings: List[Dict[str, Any]]) -> None:
        """Begin another sitting behind those that `sittings` returned."""
        self._before = sittings


def exit_figures(rows: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Return the figures of a record: those of every exit and of the ensemble.

    Args:
        rows: What `metrics.exit_table` returned.

    Returns:
        Of every exit, shallow to deep, `shares` (of the plain network's MACs), `top1`, `ece` and `aurc` (percent), and
        `ensemble_top1` and `ensemble_ece`, None for a network of one exit.
    """
    exits = [row for row in rows if row['exit'] != 'ensemble']
    ensemble = rows[-1]
    return dict(
        shares=[round(row['share'], 4) for row in exits],
        top1=[round(row['top1'], 4) for row in exits],
        ensemble_top1=round(ensemble['top1'], 4) if len(exits) > 1 else None,
        ece=[round(row['ece'], 4) for row in exits],
        ensemble_ece=round(ensemble['ece'], 4) if len(exits) > 1 else None,
        # runs of older versions lack it
        **(dict(aurc=[round(row['aurc'], 4) for row in exits]) if 'aurc' in rows[0] else {}),
    )


def make_record(
        config: TrainConfig,
        name: str,
        network: str,
        dataset: str,
        part: str,
        rows: List[Dict[str, Any]],
        sittings: List[Dict[str, Any]],
        steps: int,
) -> Dict[str, Any]:
    """Gather what a complete run is filed by.

    Args:
        config: The settings.
        name: Of the recipe, where the settings have none.
        network: Its architecture.
        dataset: Name of the data set.
        part: Split of the data that was measured.
        rows: What `metrics.exit_table` returned for it.
        sittings: See `TimeSheet.sittings`.
        steps: Optimizer steps of the run.

    Returns:
        `recipe`, `network`, `dataset`, `part`, `method`, `seed`, `epochs`; lists over the exits, shallow to deep:
        `shares` of the MACs, `top1` and `ece` in percent; `ensemble_top1` and `ensemble_ece`, None with a
        single exit; `hours` from the first step to the last evaluation and training's `images_per_second`, None where
        sittings are not known; `hardware`, `precision`, versions and `commit`, of all sittings where they differ;
        `finished`, the date (UTC); `settings`, see `publishing.public_settings`. Nothing in it names user, machine or
        folders.
    """
    known = sum(s['steps'] for s in sittings) == steps
    seconds, training = (sum(s[key] for s in sittings) for key in ('seconds', 'training'))
    settings = public_settings(config.settings())
    where = ('hardware', 'precision', 'torch', 'timm', 'accelerate', 'timm_selfdistill', 'commit')
    return dict(
        recipe=public_text(config.recipe or name, nested=False),
        network=network.removesuffix(SUFFIX),
        dataset=place_name(dataset),
        part=part,
        **{key: settings[key] for key in ('method', 'seed', 'epochs')},
        **exit_figures(rows),
        hours=round(seconds / 3600, 4) if known else None,
        images_per_second=round(steps * config.batch_size / training, 1) if known and training else None,
        **{key: ', then '.join(dict.fromkeys(str(s[key]) for s in sittings)) for key in where},
        finished=datetime.now(timezone.utc).date().isoformat(),
        settings=settings,
    )


def append_record(folder: Path, results: Path) -> None:
    """Append the record of a complete run to a file of JSON lines, unless it is there already.

    Args:
        folder: The run's folder.
        results: The file; created where it is not there yet.

    Raises:
        OSError: The record cannot be read, or the file not be written.
    """
    line = (folder / RECORD).read_bytes()
    results.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(results.with_name(f'.{results.name}.lock'))  # several runs may end at the same moment
    with lock, results.open('a+b') as f:
        f.seek(0)
        lines = f.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b'\n'):
            try:
                json.loads(lines[-1])
                line = b'\n' + line
            except ValueError:  # what a process that died has left of its line
                f.truncate(sum(map(len, lines[:-1])))
        if line.strip() not in map(bytes.strip, lines):
            f.write(line)
            f.flush()
            os.fsync(f.fileno())
