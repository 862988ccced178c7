"""What a run needs to go on to the bit, on disk: complete or not there at all, and known for damaged when it is."""
import json
import os
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch

from ..errors import CheckpointError, os_error_behind

__all__ = ['Checkpoints']

_STATE, _ABOUT = 'state.pt', 'about.json'


def _checksum(path: Path) -> int:
    value = 0
    with path.open('rb') as f:
        while block := f.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


class Checkpoints:
    """The checkpoints of one run, a folder each, named by the optimizer step.

    A checkpoint is written beside, flushed to the disk and renamed into place, so a process that dies leaves the ones
    before as they were. Its `about.json` holds the size and a checksum of `state.pt`: one that was cut short or altered
    afterwards is told from a good one. States are read with `weights_only`: nothing is unpickled but tensors and plain
    containers.

    Args:
        folder: Where they are; created by the first one.
        keep: How many to keep, the newest.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder)
        self.keep = keep

    def _complete(self) -> List[Path]:
        """Return the folders of checkpoints, newest first."""
        found = [p for p in self.folder.glob('step*') if p.name[4:].isdigit()] if self.folder.is_dir() else []
        return sorted(found, key=lambda p: int(p.name[4:]), reverse=True)

    def clean(self) -> None:
        """Remove what a process that died amid writing or removing has left."""
        for rest in self.folder.glob('.*-*') if self.folder.is_dir() else ():
            shutil.rmtree(rest, ignore_errors=True)

    def write(self, state: Dict[str, Any], step: int) -> Path:
        """Write the state after an optimizer step, and remove the oldest of more than `keep` checkpoints.

        Raises:
            CheckpointError: It cannot be written; those before are untouched.
        """
        target = self.folder / f'step{step}'
        beside = self.folder / f'.writing-{uuid.uuid4().hex}'
        try:
            beside.mkdir(parents=True)
            with (beside / _STATE).open('wb') as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            about = dict(step=step, size=(beside / _STATE).stat().st_size, crc32=_checksum(beside / _STATE))
            with (beside / _ABOUT).open('w') as f:
                json.dump(about, f)
                f.flush()
                os.fsync(f.fileno())
            if target.exists():  # written again after going on from an older one; the old one may be damaged
                self._remove(target)
            os.rename(beside, target)
        except (OSError, RuntimeError) as e:
            shutil.rmtree(beside, ignore_errors=True)
            reason = os_error_behind(e) or e
            if isinstance(reason, RuntimeError):  # not of the disk, so not to be explained by it
                raise
            raise CheckpointError(
                f'Cannot write the checkpoint {target}: {reason.strerror}. Those before it are kept.') from e
        for old in self._complete()[self.keep:]:
            self._remove(old)
        return target

    def _remove(self, folder: Path) -> None:
        away = self.folder / f'.removing-{uuid.uuid4().hex}'  # a half-removed one must not look like one
        os.rename(folder, away)
        shutil.rmtree(away, ignore_errors=True)

    def newest(self, warn: Callable[[str], None]) -> Optional[Path]:
        """Return the folder of the newest checkpoint that is whole, None if there is none.

        Args:
            warn: Is told of every damaged one.
        """
        for folder in self._complete():
            problem = self._damage(folder)
            if problem is None:
                return folder
            warn(f'The checkpoint {folder} is damaged and left out: {problem}.')
        return None

    @staticmethod
    def read(folder: Path) -> Dict[str, Any]:
        """Return the state in the folder of a checkpoint."""
        return torch.load(folder / _STATE, map_location='cpu', weights_only=True)

    @staticmethod
    def _damage(folder: Path) -> Optional[str]:
        """Say what is wrong with a checkpoint, None if nothing is."""
        try:
            about = json.loads((folder / _ABOUT).read_text())
            expected, checksum = about['size'], about['crc32']
            size = (folder / _STATE).stat().st_size
            if size != expected:
                return f'{_STATE} has {size:,} bytes of {expected:,}'
            if _checksum(folder / _STATE) != checksum:
                return f'the contents of {_STATE} have changed since it was written'
        except OSError as e:
            return f'{Path(e.filename).name} cannot be read: {e.strerror}'
        except (KeyError, TypeError, ValueError):
            return f'{_ABOUT} cannot be read'
        return None
