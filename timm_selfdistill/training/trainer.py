"""Training from beginning to end on Accelerate: one process or many, CPU or GPU."""
import json
import math
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import PrecisionType, broadcast_object_list

from ..config import TrainConfig
from ..costs import write_latency
from ..data.image_data import ImageSplit
from ..errors import ConfigError, HubError, NonFiniteLossError, Preempted
from ..evaluation.plots import plot_accuracy_against_compute
from ..hub.card import write_card
from ..hub.push import check_destination, push_to_hub
from ..metrics import exit_table
from ..models.names import model_name
from ..publishing import public_settings
from ..run_files import RECORD, RESULTS, is_complete, write_json
from .checkpoints import is_sharded
from .folders import choose_folder
from .records import append_record, make_record
from .reporter import Reporter
from .run import Run
from .signals import StopSignals
from .trackers import start_trackers

__all__ = ['close', 'create_accelerator', 'file_record', 'on_main', 'push_run', 'train']


def create_accelerator(config: TrainConfig) -> Accelerator:
    """Return what makes this process one of those that the launcher has started.

    Every parameter is used in every step, and in the same way, which DistributedDataParallel is told; but its static
    graph and gradients that are summed up before they are exchanged exclude each other (torch 2.15).

    Raises:
        ConfigError: What the launcher or the environment asks for cannot be had.
    """
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # or else accelerate makes no group of processes on CPUs
            kwargs_handlers=[DistributedDataParallelKwargs(static_graph=config.grad_accum_steps == 1)])
        if accelerator.mixed_precision not in PrecisionType.list():  # accelerate would take it for none
            raise ValueError(
                f'mixed precision {accelerator.mixed_precision} is unknown, expected one of '
                f'{", ".join(map(str, PrecisionType.list()))}')
        return accelerator
    except (ImportError, KeyError, RuntimeError, ValueError) as e:
        names = ('ACCELERATE_MIXED_', 'ACCELERATE_USE_', 'CUDA_VISIBLE_', 'LOCAL_RANK', 'MASTER_', 'RANK', 'WORLD_SIZE')
        given = ', '.join(f'{name}={value}' for name, value in sorted(os.environ.items()) if name.startswith(names))
        raise ConfigError(
            f'accelerate cannot start: {str(e).rstrip(".") or type(e).__name__}. Check the options of accelerate '
            f'launch, what accelerate config has written, and these environment variables: {given or "none is set"}.'
        ) from e


def close(accelerator: Accelerator) -> None:
    """End all processes at once.

    torch takes a process group down with Python's lock held and joins its threads; one of them that still has a tensor
    of the last collective to give back to Python waits for the lock for ever (seen with torch 2.8 on CPUs). The pause
    leaves the lock to them; without it one teardown in about fifty hung, with it none in 3,900.
    """
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        time.sleep(0.1)
    accelerator.end_training()


def train(config: TrainConfig, accelerator: Optional[Accelerator] = None) -> Path:
    """Train, evaluate and save a multi-exit network, or generations of them, see `generations.train_generations`.

    The run's folder holds at every time the weights of the last complete epoch (before the first one, the initial
    weights): `model.safetensors` and `config.json`, which `timm.create_model('local-dir:…', pretrained=True)` loads;
    `best/`, the same of the best epoch by the validation split; `checkpoints/`, from which `config.resume` goes on to
    the bit; `args.yaml`, `summary.csv` with a line an epoch, and in the end `README.md` (the model card),
    `accuracy_vs_compute.png`, `record.json` (the line for `config.results`) and, last of all, `results.json`.

    Args:
        config: The settings.
        accelerator: What several runs in a row share, which `close` then ends; a run's own when None.

    Returns:
        The run's folder.

    Raises:
        CheckpointError: The final weights cannot be written.
        ConfigError: A setting does not fit the model or the data.
        DataError: The data cannot be used.
        HubError: The Hub cannot be used, which is found out before training, or has refused the complete run.
        NonFiniteLossError: The loss is not finite; the folder keeps the last good weights.
        Preempted: A signal asked to stop; a checkpoint has been written.
    """
    config.check()
    if config.generations is not None:
        from .generations import train_generations  # trains each generation by this function
        return train_generations(config)
    shared = accelerator is not None
    accelerator = accelerator or create_accelerator(config)
    main = accelerator.is_main_process
    reporter = Reporter(enabled=main, epochs=config.epochs)
    folder = choose_folder(config, accelerator)
    if config.push_to_hub is not None:
        on_main(accelerator, lambda: check_destination(config.push_to_hub))
    if broadcast_object_list([is_complete(folder)])[0]:
        reporter.say(f'The run in {folder} is complete; there is nothing to go on with.')
    else:
        signals = StopSignals()
        run = Run(config, accelerator, folder, reporter, signals)
        try:
            with signals:
                _train(run)
        except KeyboardInterrupt as e:
            raise Preempted(
                f'Stopped by a second {str(e) or "SIGINT"}, amid a step. {run.keeper.how_to_resume()}') from None
    if main:
        file_record(config, folder, reporter)
    if config.push_to_hub is not None:
        push_run(folder, config.push_to_hub, accelerator, reporter)
    if not shared:
        close(accelerator)
    return folder


def on_main(accelerator: Accelerator, function: Callable[[], Any]) -> None:
    """Call a function in the main process; where it fails with a sentence for the user, all processes do."""
    problem: Optional[Exception] = None
    if accelerator.is_main_process:
        try:
            function()
        except (ConfigError, HubError) as e:
            problem = e
    problem, = broadcast_object_list([problem])
    if problem is not None:
        raise problem


def push_run(folder: Path, repo: str, accelerator: Accelerator, reporter: Reporter) -> None:
    """Put a complete run on the Hub, see `push.push_to_hub`.

    Raises:
        HubError: The Hub refuses, or cannot be reached; the message says how to push later.
    """
    def push() -> None:
        try:
            at, commit = push_to_hub(folder, repo)
        except HubError as e:
            raise HubError(
                f'{e} The run in {folder} is complete; python recipes/publish.py --checkpoint {folder} --repo {repo} '
                f'pushes it.'
            ) from e
        reporter.say(f'pushed  hf-hub:{at}, commit {commit[:12]}')

    on_main(accelerator, push)


def file_record(config: TrainConfig, folder: Path, reporter: Reporter) -> None:
    """Append a complete run to `config.results` if it is not there yet; of failing to a warning tells."""
    if config.results is None:
        return
    try:
        append_record(folder, Path(config.results))
    except OSError as e:
        reporter.say(
            f'warning: `results={config.results}`: {e.filename}: {e.strerror}. The run is complete; the same command '
            f'with `experiment={folder.name}` `resume=auto` tries to append it again.'
        )


def _train(run: Run) -> None:
    setup, keeper, loop, reporter = run.setup, run.keeper, run.loop, run.reporter
    config, accelerator, progress = setup.config, setup.accelerator, keeper.progress
    watched = setup.data.validation or setup.data.test
    architecture = model_name(run.setup.network)
    reporter.start(run.folder, setup.data, setup.notes, setup.costs, architecture, accelerator)
    if config.resume is not None:
        keeper.resume()
    if accelerator.is_main_process:  # first of all: by it a killed run is known for one
        settings = dict(config.settings(), resume=None)
        (run.folder / 'args.yaml').write_text(yaml.safe_dump(settings, sort_keys=False), encoding='utf-8')
    keeper.list_unreadable()
    if progress.steps == 0:
        keeper.save()
    if config.report_to:
        start_trackers(accelerator, config.report_to, run.folder, public_settings(config.settings()), progress.epoch)
    metrics = None
    try:
        steps = config.epochs * setup.steps_per_epoch
        with reporter.watching(min(steps, config.max_steps or steps), progress.steps):
            while not keeper.done:
                epoch, started = progress.epoch, time.perf_counter()
                terms = loop.train_epoch()
                metrics = loop.evaluate(watched)
                bad = [name for name, values in metrics.items() if not math.isfinite(values['loss'])]
                if bad:
                    raise NonFiniteLossError(
                        f'Loss not finite after epoch {epoch}, on the {watched.name} split: {", ".join(bad)}.')
                keeper.end_epoch(terms, metrics)
                reporter.epoch(epoch, terms, metrics, watched.name, time.perf_counter() - started)
    except NonFiniteLossError as e:
        kept = f'the end of epoch {progress.epoch - 1}' if progress.epoch else 'before training'
        raise NonFiniteLossError(
            f'{e} {run.folder} keeps the weights from {kept}. '
            f'A lower `lr`, `clip_grad=1` or a longer `warmup_epochs` may help.'
        ) from e
    if metrics is None or keeper.unsaved:
        keeper.save()
    keeper.write_rows()
    _finish(run, watched, metrics or loop.evaluate(watched))
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []


def _finish(run: Run, watched: ImageSplit, metrics: Dict[str, Dict[str, Any]]) -> None:
    """Write what describes the last epoch's weights; those have been measured on the watched split already."""
    setup, keeper, results = run.setup, run.keeper, OrderedDict()
    keeper.check_frozen()
    architecture = model_name(setup.network)
    for name, split in setup.data.splits().items():
        if name != 'train':
            measured = metrics if split is watched else run.loop.evaluate(split)
            results[name] = exit_table(setup.model, measured, setup.costs)
    if setup.accelerator.is_main_process:
        split, rows = list(results.items())[-1]
        title = f'{architecture} on {setup.data.name}, {split} split'
        plot_accuracy_against_compute(rows, title, run.folder / 'accuracy_vs_compute.png')
        if not is_sharded(setup.accelerator):  # else no process has the whole network; it can be measured later
            write_latency(run.folder, setup.model, setup.data_config['input_size'], setup.accelerator.device)
        keeper.times.lap()
        record = make_record(
            setup.config, run.folder.name, architecture, setup.data.name, split, rows, keeper.times.sittings(),
            keeper.progress.steps)
        (run.folder / RECORD).write_text(json.dumps(record, ensure_ascii=False) + '\n', encoding='utf-8')
        write_card(run.folder, results=results)
        write_json(run.folder / RESULTS, results)  # last: it says that the run is complete
        run.reporter.finish(run.folder, rows, split)
