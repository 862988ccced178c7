"""A training run: what its steps share, its steps, and what it keeps of them."""
import inspect
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from safetensors import SafetensorError
from timm.data import Mixup
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import distribute_bn, random_seed

from ..config import TrainConfig
from ..costs import exit_costs
from ..data.image_data import ImageSplit
from ..data.loaders import Loaders, leave_out_unreadable, open_data
from ..data.unreadable import Unreadable, list_unreadable, write_unreadable
from ..data.workers import readable
from ..errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, Preempted, nearest, os_error_behind
from ..hub.networks import names_of_run, save_model
from ..metrics import evaluate_exits
from ..models.multi_exit import MultiExit, without_exits
from ..models.names import exit_names
from ..run_files import UNREADABLE, add_row, keep_rows
from .build import LOOKAHEAD, build_model, build_task, check_optimizer, check_slices
from .checkpoints import Checkpoints
from .cpu import keep_freed_memory, use_all_cores
from .folders import create_folder
from .loss_meter import TermMeter
from .records import TimeSheet
from .reporter import Reporter
from .signals import StopSignals
from .state import is_sharded, put_back, take, whole_weights
from .trackers import check_trackers

__all__ = ['Run']

# Steps between two looks at the loss on an accelerator, each of which waits for it.
_LOOK_EVERY = 50

# Seconds that the last checkpoint is at least old when the end of an epoch brings the next.
_CHECKPOINT_AGE = 60.

# What one process asks of all, as bits.
_STOP, _SAVE = 1, 2


def _summary_metrics(model: MultiExit, metrics: Dict[str, Dict[str, Any]]) -> 'OrderedDict[str, float]':
    """Flatten metrics into columns: timm's own for the deepest exit, then every exit's and the ensemble's."""
    deepest = metrics[exit_names(model)[model.num_exits - 1]]
    columns = OrderedDict((key, deepest[key]) for key in ('loss', 'top1', 'top5') if deepest[key] is not None)
    for name, values in metrics.items():
        columns.update(
            (f'{name}_{key}', values[key]) for key in ('top1', 'top5', 'loss', 'ece') if values[key] is not None)
    return columns


class Run:
    """One training run in this process; all processes call the same methods at the same time.

    Args:
        config: The settings.
        accelerator: Makes this process one of several.
        folder: The run's folder; created when all settings have been found to hold.
        reporter: Shows what happens; nobody when None.
        signals: Tells when to stop; never when None.

    Raises:
        ConfigError: A setting does not fit the model or the data.
        DataError: The data cannot be used.
    """

    def __init__(
            self,
            config: TrainConfig,
            accelerator: Accelerator,
            folder: Path,
            reporter: Optional[Reporter] = None,
            signals: Optional[StopSignals] = None,
    ):
        self.config = config
        self.accelerator = accelerator
        self.folder = folder
        self.reporter = reporter or Reporter(enabled=False, epochs=config.epochs)
        self.signals = signals or StopSignals()
        self.device = accelerator.device
        if self.device.type == 'cpu':
            use_all_cores()
            keep_freed_memory()
        check_trackers(config.report_to)
        set_seed(config.seed)
        self.data = open_data(config, accelerator, names_of_run(folder))
        if self.data.validation is None and self.data.test is None:
            option = '`streaming`' if config.streaming else f'`val_fraction={config.val_fraction:g}`'
            raise ConfigError(
                f'{option}: {self.data.name} has neither a validation nor a test part, so some of its training part '
                f'must be held out{", which takes data that are not streamed" if config.streaming else ""}.'
            )
        self.unreadable: List[Unreadable] = []
        if config.skip_unreadable and not config.streaming:
            self.unreadable = leave_out_unreadable(self.data, accelerator, folder)
        model, self.data_config = build_model(config, self.data)
        self.costs = exit_costs(model, self.data_config['input_size'])
        if config.grad_checkpointing:
            try:
                model.set_grad_checkpointing()
            except AssertionError as e:
                raise ConfigError(
                    f'`grad_checkpointing`: {config.model} has none; leave it out. `grad_accum_steps` saves memory too.'
                ) from e
        self.task = build_task(config, model, self.device, self.data_config, self.data).to(self.device)
        if config.channels_last and not is_sharded(accelerator):  # FSDP asks for contiguous parameters
            self.task.to(memory_format=torch.channels_last)
        slices = accelerator.num_processes * config.grad_accum_steps
        check_slices(self.task, self.data_config['input_size'], config.batch_size, slices)
        self.loaders = Loaders(config, self.data, self.data_config, accelerator)
        self.loader = self.loaders.train()
        self.steps_per_epoch = self.loader.batch_sampler.steps
        self.optimizer = self._create_optimizer()
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            decay_milestones=list(config.decay_milestones),
            decay_rate=config.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        self.mixup = self._create_mixup(model.num_classes)
        self._prepare()
        self.look_every = 1 if self.device.type == 'cpu' else _LOOK_EVERY
        self.checkpoints = Checkpoints(folder / 'checkpoints', config.checkpoint_hist)
        self.every_steps, self.every_seconds = config.checkpoint_interval()
        self.last_checkpoint = time.monotonic()
        self.checkpointed: Optional[int] = None
        self.wanted = 0
        # what a full disk has kept from being written
        self.unsaved = False
        self.unwritten: List[Tuple[int, Dict[str, float], Dict[str, float], float]] = []
        # where the run is: epochs that are complete, steps of the present one and of all; what the epochs have told
        self.epoch = self.step = self.steps = 0
        self.rate = config.lr
        self.best: Dict[str, Any] = {}
        self.meter = TermMeter(self.device, config.grad_accum_steps)
        self.times = TimeSheet(accelerator)
        create_folder(config, folder, accelerator)

    def _create_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        name = config.opt.removeprefix(LOOKAHEAD)
        if name not in list_optimizers():
            raise ConfigError(
                f'`opt={config.opt}`: timm has no such optimizer{nearest(config.opt, list_optimizers())}.')

        def create(module: nn.Module, **other: Any) -> torch.optim.Optimizer:
            options = inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
            # sharded parameters have no fused SGD (torch 2.15)
            fusable = 'fused' in options and self.device.type in ('cpu', 'cuda') and not is_sharded(self.accelerator)
            return create_optimizer_v2(
                module,
                opt=config.opt,
                lr=config.lr,
                weight_decay=config.weight_decay,
                filter_bias_and_bn=not config.decay_norms_and_biases,
                momentum=config.momentum,
                **(dict(fused=True) if fusable else {}),
                **other,
            )

        check_optimizer(create, config.opt, self.device)
        return create(self.task.trainable_module, layer_decay=config.layer_decay)

    def _create_mixup(self, num_classes: int) -> Optional[Mixup]:
        config, processes = self.config, self.accelerator.num_processes
        if config.mixup == config.cutmix == 0:
            return None
        if config.batch_size // (processes * config.grad_accum_steps) % 2:
            parts = f' and each of `grad_accum_steps={config.grad_accum_steps}`' if config.grad_accum_steps > 1 else ''
            raise ConfigError(
                f'`batch_size={config.batch_size}`: mixup and cutmix pair images and need an even number of them in '
                f'each of {processes} processes{parts}.'
            )
        return Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=num_classes)

    def _prepare(self) -> None:
        """Let accelerate wrap what is trained, for several processes or sharded over them."""
        config, accelerator, task = self.config, self.accelerator, self.task
        if is_sharded(accelerator):
            equilibrium = config.exit_weights == 'equilibrium'  # by hooks on parameters that FSDP replaces
            for option, given in (
                ('`model_ema`', config.model_ema), ('`compile`', config.compile),
                ('`exit_weights=equilibrium`', equilibrium),
            ):
                if given:
                    raise ConfigError(f'{option}: cannot be had together with FSDP.')
            if not accelerator.is_fsdp2:
                raise ConfigError('FSDP: version 2 is needed; pass --fsdp_version 2 to accelerate launch.')
        if config.model_ema:
            task.setup_ema(decay=config.model_ema_decay, use_warmup=True)
        if config.compile:
            task.compile()
        accelerator.gradient_accumulation_steps = config.grad_accum_steps
        task.trainable_module, self.optimizer = accelerator.prepare(task.trainable_module, self.optimizer)
        if is_sharded(accelerator):
            from torch.distributed.fsdp import register_fsdp_forward_method
            register_fsdp_forward_method(task.trainable_module, 'forward_exits')

    @property
    def model(self) -> MultiExit:
        """The network as it would be saved now: the moving average where there is one."""
        return self.task.get_eval_model(ema=self.task.has_ema())

    @property
    def network(self) -> nn.Module:
        """What is saved of the model: timm's plain network where the method has no auxiliary exits."""
        return self.model if self.config.has_exits else without_exits(self.model)

    def train_batch(self, images: torch.Tensor, target: torch.Tensor) -> bool:
        """Learn from a batch, (N, C, H, W) and (N,); return whether that made an optimizer step complete.

        Nothing here waits for the device but the look at the loss, every `look_every` batches.

        Raises:
            NonFiniteLossError: A term was not finite when it was looked at; the optimizer has not seen it then.
        """
        task, accelerator, config = self.task, self.accelerator, self.config
        part = self.meter.batches % config.grad_accum_steps
        # what dropout and mixup draw is a function of these, so that a run that goes on draws the same
        entropy = (config.seed, self.steps, part, accelerator.process_index)
        random_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]), rank=0)
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        # amid the step: never quite at the ends, where a weight of 0 would leave parameters unused
        task.set_progress((self.steps + 0.5) / (config.epochs * self.steps_per_epoch))
        with accelerator.accumulate(task.trainable_module):
            with accelerator.autocast():
                result = task(images, target)
            self.meter.update(result)
            if self.meter.batches % self.look_every == 0:
                self.wanted |= self.meter.check(accelerator, self.epoch, self._wishes())
                self.reporter.terms(self.meter)
            accelerator.backward(result['loss'])
            if config.clip_grad is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(task.get_clip_parameters(), config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if not accelerator.sync_gradients:
            return False
        self.step += 1
        self.steps += 1
        task.update_ema(step=self.steps)
        if self.scheduler is not None:
            self.scheduler.step_update(self.steps)
        return True

    def train_epoch(self) -> 'OrderedDict[str, float]':
        """Train to the end of the present epoch; return the means of the loss and its terms over it and all processes.

        Raises:
            NonFiniteLossError: A term is not finite.
            DataError: An image cannot be read, or a loader's worker died.
            Preempted: A signal asked to stop; a checkpoint has been written.
        """
        self.task.train()
        self.task.set_last_phase(self.epoch >= self.config.epochs - self.config.last_phase_epochs)
        if self.step == 0:
            self.rate = self.optimizer.param_groups[0]['lr']
        self.loader.batch_sampler.set_epoch(self.epoch, self.step)
        batches = self.reporter.steps(readable(self.loader), len(self.loader), self.epoch)
        self.times.lap()
        try:
            for images, target in batches:
                images = images.to(self.device, non_blocking=True)
                target = target.to(self.device, non_blocking=True)
                if self.config.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                if self.train_batch(images, target):
                    self.times.lap(steps=1)
                    self._after_step()
        except DataError as e:
            self._give_up(e)
        self.wanted |= self.meter.check(self.accelerator, self.epoch, self._wishes())
        self.times.lap(steps=0)  # the device has done them now
        self._after_step()
        return self.meter.means(self.accelerator)

    def _wishes(self) -> int:
        """Return what this process wants to be done after the step, as bits."""
        late = self.every_seconds and time.monotonic() - self.last_checkpoint > self.every_seconds
        return _STOP * bool(self.signals.received) | _SAVE * bool(late and self.accelerator.is_main_process)

    def _after_step(self) -> None:
        """Write a checkpoint where one is due, and stop where that is wanted.

        Raises:
            Preempted: It was.
        """
        if self.accelerator.num_processes == 1:  # several agree when they look at the loss together
            self.wanted |= self._wishes()
        if self.wanted or self.every_steps and self.steps % self.every_steps == 0:
            self.checkpoint()
        if self.wanted & _STOP:
            raise Preempted(
                f'Stopped by {self.signals.received or "a signal"} after step {self.steps}. {self.how_to_go_on()}')
        self.wanted = 0

    def _give_up(self, error: DataError) -> NoReturn:
        """Raise an error with what to do to go on, after writing a checkpoint where the state is whole.

        A single process is between two steps, unless it is amid accumulating; the others of several are amid one.
        """
        whole = self.accelerator.num_processes == 1 and self.meter.batches % self.config.grad_accum_steps == 0
        if whole and self.steps:
            self.checkpoint()
        raise type(error)(f'{str(error).rstrip(".")}. {self.how_to_go_on()}') from error

    def how_to_go_on(self) -> str:
        """Say in a sentence what to do to go on."""
        return f'The same command with `experiment={self.folder.name}` `resume=auto` goes on from the last checkpoint.'

    def checkpoint(self) -> None:
        """Write a checkpoint; of one that cannot be written a warning tells, and the run goes on.

        Raises:
            NonFiniteLossError: A term was not finite since the last look, or a weight is not; nothing is written then.
        """
        if self.steps == self.checkpointed:
            return
        if self.meter.batches:
            self.meter.check(self.accelerator, self.epoch)
        self.times.lap()
        state = dict(
            take(self.task, self.optimizer, self.accelerator),
            meter=self.meter.state(self.accelerator),
            at=dict(epoch=self.epoch, step=self.step, steps=self.steps, rate=self.rate, best=self.best),
            where=self._where(),
            sittings=self.times.sittings(),
        )
        # a gradient may be bad where no term of the loss is
        bad = [name for name, w in state['model'].items() if not w.isfinite().all()]
        bad, = broadcast_object_list([bad])
        if bad:
            names = ', '.join(bad[:3]) + (', ...' if len(bad) > 3 else '')
            raise NonFiniteLossError(f'Weights not finite after step {self.steps}: {names}.')
        if self.accelerator.is_main_process:
            try:
                self.checkpoints.write(state, self.steps)
            except CheckpointError as e:
                self.reporter.say(f'warning: {e} Training goes on.')
        self.last_checkpoint, self.checkpointed = time.monotonic(), self.steps
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
            put_back(state, self.task, self.optimizer, self.accelerator)
            self.meter.load_state(state['meter'], self.accelerator)
            for name, value in state['at'].items():
                setattr(self, name, value)
            self.checkpointed = self.steps
            self.times.go_on(state.get('sittings', []))
            say(f'resume  {newest}: epoch {self.epoch + 1}, {self.step} of {self.steps_per_epoch} steps done')
            for name, now in self._where().items():
                if state['where'][name] != now:
                    say(f'resume  {name}: {state["where"][name]} then, {now} now; the last digits will differ')
        if self.accelerator.is_main_process:
            keep_rows(self.folder / 'summary.csv', self.epoch)

    def list_unreadable(self) -> None:
        """Write down which images are left out, and tell of them; those of a stream are added where they are met."""
        if not self.config.skip_unreadable:
            return
        file = self.folder / UNREADABLE
        if self.accelerator.is_main_process and not (self.config.streaming and file.exists()):
            write_unreadable(file, self.unreadable)
            list_unreadable(self.unreadable, self.reporter.say, file)
        if self.config.streaming:
            for split in self.data.parts().values():
                split.skipped.file = file

    def evaluate(self, split: ImageSplit) -> 'OrderedDict[str, Dict[str, Any]]':
        """Measure every exit on a part of the data, each process its share."""
        accelerator = self.accelerator
        distributed = accelerator.num_processes > 1
        if distributed:  # each process has batch norm averages of its own slices until they are averaged
            distribute_bn(self.model, accelerator.num_processes, reduce=True)
        # sharded parameters come together in the outermost module alone
        model = self.task.trainable_module if is_sharded(accelerator) else self.model
        try:
            with accelerator.autocast():
                return evaluate_exits(model, readable(self.loaders.evaluation(split)), self.device, distributed)
        except DataError as e:
            self._give_up(e)

    def save(self, best: bool = False) -> None:
        """Replace the weights in the run's folder by the present ones, and the best ones too with `best`.

        Raises:
            CheckpointError: They cannot be written; those before are kept.
        """
        weights = None
        if is_sharded(self.accelerator):
            whole = whole_weights(self.task, self.accelerator)
            prefix = 'model.' if self.network is self.model else 'model.backbone.'
            weights = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
        if not self.accelerator.is_main_process:
            return
        for folder in (self.folder, self.folder / 'best')[:1 + best]:
            try:
                save_model(self.network, folder, self.data_config, self.data.label_names, weights)
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
            summary = self.folder / 'summary.csv'
            keep_rows(summary, self.unwritten[0][0])  # a line may have been cut short
            for epoch, terms, columns, rate in self.unwritten:
                row = {f'train_{k}': v for k, v in terms.items()} | {f'eval_{k}': v for k, v in columns.items()}
                add_row(summary, dict(epoch=epoch, **row, lr=rate))
        self.unwritten = []

    def end_epoch(self, terms: Dict[str, float], metrics: Dict[str, Dict[str, Any]]) -> None:
        """Keep what a complete epoch has brought: weights, a line in `summary.csv`, a checkpoint.

        Args:
            terms: Means of the loss and its terms.
            metrics: What `evaluate` returned, of the validation part if there is one.
        """
        columns = _summary_metrics(self.model, metrics)
        better = self.data.validation is not None and columns['top1'] > self.best.get('top1', -1.)
        self.unwritten.append((self.epoch, terms, columns, self.rate))
        self.unsaved = True
        try:
            self.save(better)
            self.unsaved = False
            self.write_rows()
        except (CheckpointError, OSError) as e:
            self.reporter.say(f'warning: {e} Training goes on.')
        if better and not self.unsaved:
            self.best = dict(top1=columns['top1'], epoch=self.epoch)
        row = {f'train/{k}': v for k, v in terms.items()} | {f'eval/{k}': v for k, v in columns.items()}
        self.accelerator.log(dict(row, lr=self.rate), step=self.epoch)
        self.epoch, self.step = self.epoch + 1, 0
        self.meter = TermMeter(self.device, self.config.grad_accum_steps)
        self.wanted, self.checkpointed = 0, None
        late = time.monotonic() - self.last_checkpoint > _CHECKPOINT_AGE
        late, = broadcast_object_list([late])
        if late or self.epoch == self.config.epochs:
            self.checkpoint()
