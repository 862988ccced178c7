"""Checkpoints: what a run resumes from to the bit.

`take` gathers the state of networks, optimizer and gradient scaler, whole even where parameters are sharded over
processes, and `put_back` restores it. `Checkpoints` keeps such states on disk. One is complete or not there at all:
it is written beside and renamed. A checksum tells a file that was damaged afterwards.
"""
import hashlib
import json
import os
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..errors import CheckpointError, os_error_behind

__all__ = ['Checkpoints', 'fingerprint', 'is_sharded', 'put_back', 'take', 'whole_weights']

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
        """Return what is wrong with a checkpoint, None if nothing is."""
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


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether the parameters are sharded over the processes, by FSDP."""
    return accelerator.distributed_type == DistributedType.FSDP


def _modules(task: TrainingTask) -> List[nn.Module]:
    """Return what is trained and, where there is one, its moving average, without wrappers."""
    return [unwrap_model(task.get_trainable_module(ema=ema)) for ema in (False, True)[:1 + task.has_ema()]]


def whole_weights(module: nn.Module, accelerator: Accelerator) -> Dict[str, torch.Tensor]:
    """Return the state of a module; all processes must ask, and sharded ones leave it to the main process."""
    if not is_sharded(accelerator):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


def fingerprint(weights: Dict[str, torch.Tensor]) -> str:
    """Return a checksum of tensors and their names: equal ones are equal bit for bit.

    Examples:
        >>> fingerprint({'a': torch.zeros(2)}) == fingerprint({'a': torch.tensor([0., -0.])})
        False
    """
    sha = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        sha.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def take(task: TrainingTask, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Dict[str, Any]:
    """Return the states of networks, optimizer and gradient scaler, whole, for `put_back`; all processes must call it.

    Generators of random numbers are not in it, as the trainer makes what is drawn a function of seed and step.
    """
    if is_sharded(accelerator):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer_state = get_optimizer_state_dict(task.trainable_module, optimizer.optimizer, options=options)
    else:
        optimizer_state = optimizer.state_dict()
    trained, *average = _modules(task)
    # between two evaluations each process has batch norm averages of its own
    buffers = [[
        {name: b.cpu() for name, b in m.named_buffers() if not m.is_frozen(name)} for m in (trained, *average)]]
    scaler = accelerator.scaler
    return dict(
        model=whole_weights(task.trainable_module if is_sharded(accelerator) else trained, accelerator),
        optimizer=optimizer_state,
        average=average[0].state_dict() if average else None,
        buffers=gather_object(buffers),
        scaler=scaler.state_dict() if scaler is not None else None,
    )


def put_back(
        state: Dict[str, Any],
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
) -> None:
    """Put back what `take` returned, in every process."""
    if is_sharded(accelerator):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
        set_state_dict(
            task.trainable_module,
            optimizer.optimizer,
            model_state_dict=state['model'],
            optim_state_dict=state['optimizer'],
            options=StateDictOptions(full_state_dict=True, strict=False),  # it holds nothing of a frozen backbone
        )
    else:
        optimizer.load_state_dict(state['optimizer'])
        for module, saved in zip(_modules(task), (state['model'], state['average'])):
            module.load_state_dict(saved)
    if len(state['buffers']) == accelerator.num_processes:
        own = state['buffers'][accelerator.process_index]
        for module, buffers in zip(_modules(task), own):
            for name, buffer in module.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
    if accelerator.scaler is not None and state['scaler']:
        accelerator.scaler.load_state_dict(state['scaler'])
