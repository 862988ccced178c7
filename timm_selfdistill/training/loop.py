"""The steps of a run: batches in, optimizer steps out, and the look at every exit after an epoch."""
import time
from collections import OrderedDict
from typing import Any, Dict, Iterable, NoReturn, Optional

import numpy as np
import torch
from timm.utils import distribute_bn, random_seed

from ..data.image_data import ImageSplit
from ..data.workers import readable
from ..errors import DataError, Preempted
from ..metrics import evaluate_exits
from .checkpoints import is_sharded
from .keeper import Keeper
from .setup import Setup
from .signals import StopSignals

__all__ = ['Loop']

# Steps between two looks at the loss on an accelerator, each of which waits for it.
_LOOK_EVERY = 50

# What one process asks of all, as bits.
_STOP, _SAVE = 1, 2


def _length(loader: Iterable) -> Optional[int]:
    """Return the number of a loader's batches, None where a stream does not know it."""
    try:
        return len(loader)
    except TypeError:
        return None


class Loop:
    """Trains and measures; all processes call the same methods at the same time.

    Args:
        setup: What the run is made of.
        keeper: Keeps what it brings, and knows where it is.
        signals: Say when to stop.
    """

    def __init__(self, setup: Setup, keeper: Keeper, signals: StopSignals):
        self.setup, self.keeper, self.signals = setup, keeper, signals
        self.accelerator = setup.accelerator
        self.device = setup.accelerator.device
        self.look_every = 1 if self.device.type == 'cpu' else _LOOK_EVERY
        self.every_steps, self.every_seconds = setup.config.checkpoint_interval()
        self.wanted = 0

    def train_batch(self, images: torch.Tensor, target: torch.Tensor) -> bool:
        """Learn from a batch, (N, C, H, W) and (N,); return whether that made an optimizer step complete.

        Nothing here waits for the device but the look at the loss, every `look_every` batches.

        Raises:
            NonFiniteLossError: A term was not finite when it was looked at; the optimizer has not seen it then.
        """
        setup, meter, progress = self.setup, self.keeper.meter, self.keeper.progress
        task, accelerator, config = setup.task, self.accelerator, setup.config
        part = meter.batches % config.grad_accum_steps
        # what dropout and mixup draw is a function of these, so that a resumed run draws the same
        entropy = (config.seed, progress.steps, part, accelerator.process_index)
        random_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]), rank=0)
        if setup.mixup is not None:
            images, target = setup.mixup(images, target)
        # amid the step: never quite at the ends, where a weight of 0 would leave parameters unused
        task.set_progress((progress.steps + 0.5) / (config.epochs * setup.steps_per_epoch))
        with accelerator.accumulate(task.trainable_module):
            with accelerator.autocast():
                result = task(images, None if config.unlabelled else target)
            meter.update(result)
            if meter.batches % self.look_every == 0:
                self.wanted |= meter.check(accelerator, progress.epoch, self._wishes())
                self.keeper.reporter.terms(meter)
            accelerator.backward(result['loss'])
            if config.clip_grad is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(task.get_clip_parameters(), config.clip_grad)
            setup.optimizer.step()
            setup.optimizer.zero_grad()
        if not accelerator.sync_gradients:
            return False
        progress.step += 1
        progress.steps += 1
        task.update_ema(step=progress.steps)
        if setup.scheduler is not None:
            setup.scheduler.step_update(progress.steps)
        return True

    def train_epoch(self) -> 'OrderedDict[str, float]':
        """Train to the end of the present epoch; return the means of the loss and its terms over it and all processes.

        Raises:
            NonFiniteLossError: A term is not finite.
            DataError: An image cannot be read, or a loader's worker died.
            Preempted: A signal asked to stop; a checkpoint has been written.
        """
        setup, progress = self.setup, self.keeper.progress
        setup.wrap_for(alone=progress.epoch < setup.config.epochs_alone)
        setup.task.train()
        setup.task.set_last_phase(progress.epoch >= setup.config.epochs - setup.config.last_phase_epochs)
        if progress.step == 0:
            progress.rate = setup.optimizer.param_groups[0]['lr']
        setup.loader.batch_sampler.set_epoch(progress.epoch, progress.step)
        self.keeper.times.lap()
        try:
            for images, target in readable(setup.loader):
                images = images.to(self.device, non_blocking=True)
                target = target.to(self.device, non_blocking=True)
                if setup.config.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                if self.train_batch(images, target):
                    self.keeper.times.lap(steps=1)
                    rate = setup.optimizer.param_groups[0]['lr']
                    self.keeper.reporter.step(setup.config.batch_size, progress.epoch, rate)
                    self._after_step()
                    if progress.steps == setup.config.max_steps:
                        break
        except DataError as e:
            self._give_up(e)
        self.wanted |= self.keeper.meter.check(self.accelerator, progress.epoch, self._wishes())
        self.keeper.times.lap(steps=0)  # the device has done them now
        self._after_step()
        return self.keeper.meter.means(self.accelerator)

    def _wishes(self) -> int:
        """Return what this process wants to be done after the step, as bits."""
        late = self.every_seconds and time.monotonic() - self.keeper.last_checkpoint > self.every_seconds
        return _STOP * bool(self.signals.received) | _SAVE * bool(late and self.accelerator.is_main_process)

    def _after_step(self) -> None:
        """Write a checkpoint where one is due, and stop where that is wanted.

        Raises:
            Preempted: It was.
        """
        if self.accelerator.num_processes == 1:  # several agree when they look at the loss together
            self.wanted |= self._wishes()
        if self.wanted or self.every_steps and self.keeper.progress.steps % self.every_steps == 0:
            self.keeper.checkpoint()
        if self.wanted & _STOP:
            by, step = self.signals.received or 'a signal', self.keeper.progress.steps
            raise Preempted(f'Stopped by {by} after step {step}. {self.keeper.how_to_resume()}')
        self.wanted = 0

    def _give_up(self, error: DataError) -> NoReturn:
        """Raise an error with what to do to go on, after writing a checkpoint where the state is whole.

        A single process is between two steps, unless it is amid accumulating; the others of several are amid one.
        """
        amid = self.keeper.meter.batches % self.setup.config.grad_accum_steps
        if self.accelerator.num_processes == 1 and not amid and self.keeper.progress.steps:
            self.keeper.checkpoint()
        raise type(error)(f'{str(error).rstrip(".")}. {self.keeper.how_to_resume()}') from error

    def evaluate(self, split: ImageSplit) -> 'OrderedDict[str, Dict[str, Any]]':
        """Measure every exit on a split of the data, each process its share."""
        accelerator = self.accelerator
        distributed = accelerator.num_processes > 1
        if distributed:  # each process has batch norm averages of its own slices until they are averaged
            learning = self.setup.model.exit_heads if self.setup.frozen else self.setup.model
            distribute_bn(learning, accelerator.num_processes, reduce=True)
        # sharded parameters come together in the outermost module alone
        model = self.setup.task.trainable_module if is_sharded(accelerator) else self.setup.model
        try:
            with accelerator.autocast():
                loader = self.setup.loaders.evaluation(split)
                batches = self.keeper.reporter.evaluation(readable(loader), split.name, _length(loader))
                return evaluate_exits(
                    model, batches, self.device, distributed, agreement=self.setup.config.unlabelled)
        except DataError as e:
            self._give_up(e)
