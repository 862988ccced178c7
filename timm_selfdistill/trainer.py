"""The training loop on Accelerate: one process or many, CPU or GPU."""
import json
import math
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import distribute_bn, update_summary

from .augment import eval_transform, train_transform
from .build import build_model, build_task, resolve_model_name
from .config import ConfigError, TrainConfig, nearest
from .data import ImageSplit, create_eval_loader, create_train_loader, load_image_data
from .hub import save_model, write_card
from .metrics import evaluate_exits, exit_names, exit_table
from .multi_exit import MultiExit
from .plots import plot_accuracy_against_compute
from .report import Reporter

__all__ = ['NonFiniteLossError', 'close', 'run_folder', 'train', 'use_all_cores']


class NonFiniteLossError(FloatingPointError):
    """The loss or one of its terms became infinite or not a number."""


class _TermMeter:
    """Running sums of the loss and its terms, kept on the device so that a step need not wait for them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.names: List[str] = []
        self.steps = 0

    def update(self, result: Dict[str, torch.Tensor]) -> None:
        if not self.names:
            self.names = [name for name in result if name != 'output']
            self.sums = torch.zeros(len(self.names), device=self.device)
            self.first_bad = torch.full((len(self.names),), -1, dtype=torch.long, device=self.device)
        values = torch.stack([result[name].detach().float() for name in self.names])
        bad = ~values.isfinite() & (self.first_bad < 0)
        self.first_bad.masked_fill_(bad, self.steps)
        self.sums += values
        self.steps += 1

    def check(self, accelerator: Accelerator, epoch: int) -> None:
        """Raise NonFiniteLossError, in every process alike, if a term was not finite in one of them."""
        first_bad = accelerator.gather(self.first_bad).view(-1, len(self.names))
        if (first_bad < 0).all():
            return
        step = int(first_bad[first_bad >= 0].min())
        names = [name for name, bad in zip(self.names, (first_bad == step).any(0).tolist()) if bad]
        # the loss is bad because a term is: name the term
        names = [name for name in names if name != 'loss'] or names
        raise NonFiniteLossError(f'Loss not finite in epoch {epoch}, step {step}: {", ".join(names)}.')

    def means(self, accelerator: Accelerator) -> 'OrderedDict[str, float]':
        sums = accelerator.reduce(self.sums, 'sum') / (self.steps * accelerator.num_processes)
        return OrderedDict(zip(self.names, sums.tolist()))


def use_all_cores() -> None:
    """Undo the launcher's OMP_NUM_THREADS=1: on a CPU the processes of this machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def run_folder(config: TrainConfig) -> Path:
    """Return the folder that `--output` and `--experiment` name, the latter date and model when None."""
    name, _ = resolve_model_name(config.model)
    return Path(config.output) / (config.experiment or f'{time.strftime("%Y%m%d-%H%M%S")}-{name}')


def _create_folder(config: TrainConfig, accelerator: Accelerator) -> Path:
    """Create the run's folder; an existing one is left alone.

    Raises:
        ConfigError: It exists.
    """
    folder, problem = run_folder(config), None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            problem = f'the folder {folder} exists, and runs are never overwritten; choose another name'
        except OSError as e:
            problem = f'the folder {folder} cannot be created: {e.strerror}'
    folder, problem = broadcast_object_list([folder, problem])
    if problem:
        raise ConfigError(f'--output {config.output}, --experiment {config.experiment}: {problem}.')
    return folder


class _Run:
    """What the steps of one training run share."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config = config
        self.accelerator = accelerator
        self.device = accelerator.device
        if self.device.type == 'cpu':
            use_all_cores()
        set_seed(config.seed)
        with accelerator.main_process_first():
            self.data = load_image_data(
                config.dataset, config.data_dir, config.image_column, config.label_column, config.val_fraction,
                config.in_chans, config.superclass_column,
            )
        if self.data.validation is None and self.data.test is None:
            raise ConfigError(
                f'--val-fraction {config.val_fraction:g}: {self.data.name} has neither a validation nor a test part, '
                f'so some of its training part must be held out.'
            )
        model, self.data_config = build_model(config, self.data)
        self.task = build_task(config, model, self.device, self.data_config).to(self.device)
        self.loader = self._train_loader()
        if config.opt not in list_optimizers():
            raise ConfigError(
                f'--opt {config.opt}: timm has no such optimizer{nearest(config.opt, list_optimizers())}.')
        self.optimizer = create_optimizer_v2(
            self.task.trainable_module,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
        )
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
            updates_per_epoch=len(self.loader),
        )
        if config.model_ema:
            self.task.setup_ema(decay=config.model_ema_decay, use_warmup=True)
        self.task.trainable_module = accelerator.prepare(self.task.trainable_module)
        self.optimizer = accelerator.prepare(self.optimizer)
        self.mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            if config.batch_size // accelerator.num_processes % 2:
                raise ConfigError(
                    f'--batch-size {config.batch_size}: mixup and cutmix pair images and need an even number of them '
                    f'in each of {accelerator.num_processes} processes.'
                )
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=model.num_classes)
        set_seed(config.seed + accelerator.process_index)  # from here on, dropout and mixup may differ by process
        self.steps = 0
        self.folder = _create_folder(config, accelerator)

    def _shared(self) -> Dict[str, Any]:
        workers = self.config.workers
        return dict(
            workers=workers if workers is not None else 0 if self.device.type == 'cpu' else 4,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            pin_memory=self.device.type == 'cuda',
        )

    def _train_loader(self):
        config, data = self.config, self.data
        small = max(data.image_size) <= self.data_config['input_size'][-1]
        transform = train_transform(
            self.data_config,
            crop=config.crop or ('pad' if small else 'rrc'),
            hflip=config.hflip if config.hflip is not None else 0.5 if data.mirrored else 0.,
            scale=config.scale,
            color_jitter=config.color_jitter,
            auto_augment=config.aa,
            re_prob=config.reprob,
            cutout=config.cutout,
        )
        return create_train_loader(data.train, transform, config.batch_size, config.seed, **self._shared())

    @property
    def model(self) -> MultiExit:
        """The network as it would be saved now: the moving average where there is one."""
        return self.task.get_eval_model(ema=self.task.has_ema())

    def train_epoch(self, epoch: int, reporter: Reporter) -> 'OrderedDict[str, float]':
        """Train for one epoch; return the means of the loss and its terms over it and all processes.

        Raises:
            NonFiniteLossError: A term is not finite; the optimizer has not seen it if training on a CPU.
        """
        task, accelerator, config = self.task, self.accelerator, self.config
        task.train()
        task.set_last_phase(epoch >= config.epochs - config.last_phase_epochs)
        self.loader.batch_sampler.set_epoch(epoch)
        meter = _TermMeter(self.device)
        look_every = 1 if self.device.type == 'cpu' else config.log_interval
        for step, (images, target) in enumerate(reporter.steps(self.loader, epoch)):
            images = images.to(self.device, non_blocking=True)
            target = target.to(self.device, non_blocking=True)
            if self.mixup is not None:
                images, target = self.mixup(images, target)
            # amid the step: never quite at the ends, where a weight of 0 would leave parameters unused
            task.set_progress((self.steps + 0.5) / (config.epochs * len(self.loader)))
            with accelerator.autocast():
                result = task(images, target)
            meter.update(result)
            if step % look_every == 0:
                meter.check(accelerator, epoch)
                reporter.terms(meter.names, meter.sums / meter.steps)
            accelerator.backward(result['loss'])
            if config.clip_grad is not None:
                accelerator.clip_grad_norm_(task.get_clip_parameters(), config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
            task.update_ema(step=self.steps)
            if self.scheduler is not None:
                self.scheduler.step_update(self.steps)
        meter.check(accelerator, epoch)
        return meter.means(accelerator)

    def evaluate(self, split: ImageSplit) -> 'OrderedDict[str, Dict[str, Any]]':
        """Measure every exit on a part of the data, each process its share."""
        accelerator = self.accelerator
        distributed = accelerator.num_processes > 1
        if distributed:  # each process has batch norm averages of its own slices until they are averaged
            distribute_bn(self.model, accelerator.num_processes, reduce=True)
        batch_size = max(1, self.config.batch_size // accelerator.num_processes)
        loader = create_eval_loader(split, eval_transform(self.data_config), batch_size, **self._shared())
        with accelerator.autocast():
            return evaluate_exits(self.model, loader, self.device, distributed)

    def save(self) -> None:
        """Replace the weights in the run's folder by the present ones."""
        if self.accelerator.is_main_process:
            save_model(self.model, self.folder, self.data_config, self.data.label_names)


def close(accelerator: Accelerator) -> None:
    """Let the processes part, all at once.

    torch takes a process group down with Python's lock held and joins its threads; one of them that still has a tensor
    of the last collective to give back to Python waits for the lock for ever (seen with torch 2.8 on CPUs). The pause
    leaves the lock to them; without it one teardown in about fifty hung, with it none in 3,900.
    """
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        time.sleep(0.1)
    accelerator.end_training()


def _summary_metrics(model: MultiExit, metrics: Dict[str, Dict[str, Any]]) -> 'OrderedDict[str, float]':
    """Flatten metrics into columns: timm's own for the deepest exit, then every exit's and the ensemble's."""
    *_, deepest, _ = exit_names(model)
    columns = OrderedDict((key, metrics[deepest][key]) for key in ('loss', 'top1', 'top5'))
    for name, values in metrics.items():
        columns.update((f'{name}_{key}', values[key]) for key in ('top1', 'top5', 'loss', 'ece'))
    return columns


def train(config: TrainConfig, accelerator: Optional[Accelerator] = None) -> Path:
    """Train, evaluate and save a multi-exit network.

    The run's folder holds at every time the weights of the last complete epoch (before the first one, the initial
    weights): `model.safetensors` and `config.json`, which `timm.create_model('local-dir:…', pretrained=True)` loads;
    `args.yaml`, `summary.csv` with a line an epoch, and in the end `README.md` (the model card),
    `accuracy_vs_compute.png` and, last of all, `results.json`.

    Args:
        config: The settings.
        accelerator: What several runs in a row share, which `close` then ends; a run's own when None.

    Returns:
        The run's folder.

    Raises:
        ConfigError: A setting does not fit the model or the data.
        DataError: The data cannot be used.
        NonFiniteLossError: The loss is not finite; the folder keeps the last good weights.
    """
    run = _Run(config, accelerator or Accelerator())
    main = run.accelerator.is_main_process
    reporter = Reporter(enabled=main, epochs=config.epochs)
    watched = run.data.validation or run.data.test
    if main:
        (run.folder / 'args.yaml').write_text(
            yaml.safe_dump(config.settings(), sort_keys=False), encoding='utf-8')
    run.save()
    reporter.start(run.folder, run.data, run.data_config, run.model, run.accelerator)
    try:
        for epoch in range(config.epochs):
            started = time.perf_counter()
            rate = run.optimizer.param_groups[0]['lr']
            terms = run.train_epoch(epoch, reporter)
            metrics = run.evaluate(watched)
            bad = [name for name, values in metrics.items() if not math.isfinite(values['loss'])]
            if bad:
                raise NonFiniteLossError(
                    f'Loss not finite after epoch {epoch}, on the {watched.name} part: {", ".join(bad)}.')
            run.save()
            if main:
                update_summary(
                    epoch, terms, _summary_metrics(run.model, metrics), run.folder / 'summary.csv', lr=rate)
            reporter.epoch(epoch, terms, metrics, watched.name, time.perf_counter() - started)
    except NonFiniteLossError as e:
        kept = f'the end of epoch {epoch - 1}' if epoch else 'before training'
        raise NonFiniteLossError(
            f'{e} {run.folder} keeps the weights from {kept}. '
            f'A lower --lr, --clip-grad 1 or a longer --warmup-epochs may help.'
        ) from e
    _finish(run, reporter, watched, metrics)
    if accelerator is None:
        close(run.accelerator)
    return run.folder


def _finish(run: _Run, reporter: Reporter, watched: ImageSplit, metrics: Dict[str, Dict[str, Any]]) -> None:
    """Write what describes the last epoch's weights; those have been measured on the watched part already."""
    results = OrderedDict()
    for name, split in run.data.parts().items():
        if name != 'train':
            measured = metrics if split is watched else run.evaluate(split)
            results[name] = exit_table(run.model, measured, run.data_config['input_size'])
    if run.accelerator.is_main_process:
        split, rows = list(results.items())[-1]
        title = f'{run.model.pretrained_cfg["architecture"]} on {run.data.name}, {split} part'
        plot_accuracy_against_compute(rows, title, run.folder / 'accuracy_vs_compute.png')
        write_card(
            run.folder, run.model, rows, split, run.data.name, run.config.settings(),
            source=f'local-dir:{run.folder.name}', input_size=run.data_config['input_size'],
        )
        (run.folder / 'results.json').write_text(json.dumps(results, indent=2), encoding='utf-8')
        reporter.finish(run.folder, rows, split)
