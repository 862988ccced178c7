"""Keeps what a run brings: checkpoints to resume from, weights, and rows of figures."""
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from ..data.unreadable import list_unreadable, write_unreadable
from ..errors import CheckpointError, ConfigError, NonFiniteLossError, os_error_behind
from ..hub.networks import save_model
from ..models.multi_exit import MultiExit
from ..models.names import exit_names
from ..run_files import SUMMARY, UNREADABLE, add_row, keep_rows
from .checkpoints import Checkpoints, fingerprint, is_sharded, put_back, take, whole_weights
from .loss_meter import TermMeter
from .records import TimeSheet
from .reporter import Reporter
from .setup import Setup

__all__ = ['Keeper', 'Progress']

# Seconds that the last checkpoint is at least old when the end of an epoch brings the next.
_CHECKPOINT_AGE = 60.


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        epoch: Epochs that are complete.
        step: Optimizer steps of the present epoch.
        steps: Optimizer steps of all epochs.
        rate: Learning rate at the beginning of the epoch.
        best: Accuracy and number of the best epoch by the validation split, {} before the first.
    """
    epoch: int = 0
    step: int = 0
    steps: int = 0
    rate: float = 0.
    best: Dict[str, Any] = field(default_factory=dict)


def _summary_metrics(model: MultiExit, metrics: Dict[str, Dict[str, Any]]) -> 'OrderedDict[str, float]':
    """Flatten metrics into columns: timm's own for the deepest exit, then every exit's and the ensemble's."""
    deepest = metrics[exit_names(model)[model.num_exits - 1]]
    columns = OrderedDict((key, deepest[key]) for key in ('loss', 'top1', 'top5') if deepest[key] is not None)
    for name, values in metrics.items():
        columns.update(
            (f'{name}_{key}', values[key]) for key in ('top1', 'top5', 'loss', 'ece') if values[key] is not None)
    return columns


class Keeper:
    """Keeps what a run brings, in its folder; all processes call the same methods at the same time.

    Args:
        setup: What the run is made of.
        folder: The run's folder.
        reporter: Shows what happens.

    Attributes:
        progress: Where the run is.
        meter: Sums up the loss of the present epoch.
        times: What the run has taken.
        last_checkpoint: Time of the last checkpoint, as `time.monotonic` tells it.
        unsaved: Whether the weights of the last epoch are still to be written, because a disk was full.
    """

    def __init__(self, setup: Setup, folder: Path, reporter: Reporter):
        self.setup, self.folder, self.reporter = setup, folder, reporter
        self.accelerator = setup.accelerator
        self.progress = Progress(rate=setup.config.lr)
        self.meter = self._new_meter()
        self.times = TimeSheet(setup.accelerator)
        self.checkpoints = Checkpoints(folder / 'checkpoints', setup.config.checkpoint_hist)
        self.last_checkpoint = time.monotonic()
        self.checkpointed: Optional[int] = None
        self.unsaved = False
        self.unwritten: List[Tuple[int, Dict[str, float], Dict[str, float], float]] = []
        self.frozen = self._deepest_exit() if setup.frozen else None

    def _deepest_exit(self) -> str:
        """Return a checksum of the deepest exit's weights, the same in every process."""
        weights = whole_weights(self.setup.model, self.accelerator)
        own = {name: tensor for name, tensor in weights.items() if not name.startswith('exit_heads.')}
        return broadcast_object_list([fingerprint(own) if self.accelerator.is_main_process else None])[0]

    def check_frozen(self) -> None:
        """Check that a frozen network is bit for bit what the run began with, and say so.

        Raises:
            RuntimeError: It is not.
        """
        if self.frozen is None:
            return
        if self._deepest_exit() != self.frozen:
            raise RuntimeError('The deepest exit has changed in a run with regime=disjoint.')
        self.reporter.say(
            f'frozen  the deepest exit is bit for bit the one that the run started from (sha256 {self.frozen[:12]})')

    def _new_meter(self) -> TermMeter:
        return TermMeter(self.accelerator.device, self.setup.config.grad_accum_steps)

    @property
    def done(self) -> bool:
        """Whether all epochs are complete, or as many steps as the run is to have."""
        config, progress = self.setup.config, self.progress
        return progress.epoch == config.epochs or progress.steps == config.max_steps

    def how_to_resume(self) -> str:
        """Return a sentence that says how to resume the run."""
        return f'The same command with `experiment={self.folder.name}` `resume=auto` goes on from the last checkpoint.'

    def checkpoint(self) -> None:
        """Write a checkpoint; of one that cannot be written a warning tells, and the run goes on.

        Raises:
            NonFiniteLossError: A term was not finite since the last look, or a weight is not; nothing is written then.
        """
        if self.progress.steps == self.checkpointed:
            return
        if self.meter.batches:
            self.meter.check(self.accelerator, self.progress.epoch)
        self.times.lap()
        state = dict(
            take(self.setup.task, self.setup.optimizer, self.accelerator),
            meter=self.meter.state(self.accelerator),
            at=dict(vars(self.progress)),
            where=self._where(),
            frozen=self.frozen,
            sittings=self.times.sittings(),
        )
        # a gradient may be bad where no term of the loss is
        bad = [name for name, w in state['model'].items() if not w.isfinite().all()]
        bad, = broadcast_object_list([bad])
        if bad:
            names = ', '.join(bad[:3]) + (', ...' if len(bad) > 3 else '')
            raise NonFiniteLossError(f'Weights not finite after step {self.progress.steps}: {names}.')
        if self.accelerator.is_main_process:
            try:
                self.checkpoints.write(state, self.progress.steps)
            except CheckpointError as e:
                self.reporter.say(f'warning: {e} Training goes on.')
        self.last_checkpoint, self.checkpointed = time.monotonic(), self.progress.steps
        self.times.lap()

    def _where(self) -> Dict[str, Any]:
        """Return what the last digits depend on beside the settings."""
        return dict(processes=self.accelerator.num_processes, precision=self.accelerator.mixed_precision)

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole, or begin where there is none."""
        say, newest = self.reporter.say, None
        if self.accelerator.is_main_process:
            self.checkpoints.clean()
            newest = self.checkpoints.newest(say)
        newest, = broadcast_object_list([newest])
        if newest is not None:
            state = self.checkpoints.read(newest)
            if state.get('frozen') != self.frozen:
                raise ConfigError(
                    f'`model={self.setup.config.model}`: these are not the weights that the run in {self.folder} has '
                    f'begun with. Put those back, or begin anew with another `experiment`.'
                )
            put_back(state, self.setup.task, self.setup.optimizer, self.accelerator)
            self.meter.load_state(state['meter'], self.accelerator)
            for name, value in state['at'].items():
                setattr(self.progress, name, value)
            self.checkpointed = self.progress.steps
            self.times.go_on(state.get('sittings', []))
            done = f'{self.progress.step} of {self.setup.steps_per_epoch} steps done'
            say(f'resume  {newest}: epoch {self.progress.epoch + 1}, {done}')
            for name, now in self._where().items():
                if state['where'][name] != now:
                    say(f'resume  {name}: {state["where"][name]} then, {now} now; the last digits will differ')
        if self.accelerator.is_main_process:
            keep_rows(self.folder / SUMMARY, self.progress.epoch)

    def list_unreadable(self) -> None:
        """Write down which images are left out, and tell of them; those of a stream are added where they are met."""
        if not self.setup.config.skip_unreadable:
            return
        file = self.folder / UNREADABLE
        if self.accelerator.is_main_process and not (self.setup.config.streaming and file.exists()):
            write_unreadable(file, self.setup.unreadable)
            list_unreadable(self.setup.unreadable, self.reporter.say, file)
        if self.setup.config.streaming:
            for split in self.setup.data.splits().values():
                split.skipped.file = file

    def save(self, best: bool = False) -> None:
        """Replace the weights in the run's folder by the present ones, and the best ones too with `best`.

        Raises:
            CheckpointError: They cannot be written; those before are kept.
        """
        weights = None
        if is_sharded(self.accelerator):
            weights = whole_weights(self.setup.network, self.accelerator)
        if not self.accelerator.is_main_process:
            return
        for folder in (self.folder, self.folder / 'best')[:1 + best]:
            try:
                save_model(self.setup.network, folder, self.setup.data_config, self.setup.data.label_names, weights)
            except (OSError, SafetensorError) as e:
                reason = os_error_behind(e)
                raise CheckpointError(
                    f'Cannot write the weights to {folder}: {reason.strerror if reason else e}. Those before are kept.'
                ) from e

    def write_rows(self) -> None:
        """Write the lines of `summary.csv` that have not been yet.

        Raises:
            OSError: They cannot be written.
        """
        if self.accelerator.is_main_process and self.unwritten:
            summary = self.folder / SUMMARY
            keep_rows(summary, self.unwritten[0][0])  # a line may have been cut short
            for epoch, terms, columns, rate in self.unwritten:
                row = {f'train_{k}': v for k, v in terms.items()} | {f'eval_{k}': v for k, v in columns.items()}
                add_row(summary, dict(epoch=epoch, **row, lr=rate))
        self.unwritten = []

    def _merit(self, metrics: Dict[str, Dict[str, Any]]) -> Optional[float]:
        """Return what the best epoch is chosen by: accuracy on the validation split, None where it is not to be chosen.

        It is that of the deepest exit, or the mean of the auxiliary exits where those alone learn.
        """
        if self.setup.data.validation is None or self.progress.epoch < self.setup.config.epochs_alone:
            return None
        accuracies = [values['top1'] for name, values in metrics.items() if name != 'ensemble']
        return sum(accuracies[:-1]) / len(accuracies[:-1]) if self.setup.frozen else accuracies[-1]

    def end_epoch(self, terms: Dict[str, float], metrics: Dict[str, Dict[str, Any]]) -> None:
        """Keep what a complete epoch has brought: weights, a line in `summary.csv`, a checkpoint.

        Args:
            terms: Means of the loss and its terms.
            metrics: What `evaluate` returned, of the validation split if there is one.
        """
        columns = _summary_metrics(self.setup.model, metrics)
        merit = self._merit(metrics)
        better = merit is not None and merit > self.progress.best.get('top1', -1.)
        self.unwritten.append((self.progress.epoch, terms, columns, self.progress.rate))
        self.unsaved = True
        try:
            self.save(better)
            self.unsaved = False
            self.write_rows()
        except (CheckpointError, OSError) as e:
            self.reporter.say(f'warning: {e} Training goes on.')
        if better and not self.unsaved:
            self.progress.best = dict(top1=merit, epoch=self.progress.epoch)
        row = {f'train/{k}': v for k, v in terms.items()} | {f'eval/{k}': v for k, v in columns.items()}
        self.accelerator.log(dict(row, lr=self.progress.rate), step=self.progress.epoch)
        self.progress.epoch, self.progress.step = self.progress.epoch + 1, 0
        self.meter, self.checkpointed = self._new_meter(), None
        late = time.monotonic() - self.last_checkpoint > _CHECKPOINT_AGE
        late, = broadcast_object_list([late])
        if late or self.done:
            self.checkpoint()
