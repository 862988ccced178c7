"""Tolerant teachers in generations (Yang et al., AAAI 2019, arXiv 1805.05551).

A patriarch M(0) learns from the labels and keeps secondary information; M(1), M(2), ... have the same architecture,
fresh weights and a seed of their own, and are taught by the one before.
"""
import csv
import dataclasses
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import resolve_data_config

from ..config import TrainConfig
from ..data.augment import eval_transform
from ..data.image_data import ImageData
from ..data.loaders import leave_out_unreadable, open_data, shard_of
from ..data.workers import create_eval_loader
from ..errors import ConfigError
from ..evaluation.plots import plot_generations
from ..evaluation.secondary import secondary_information
from ..evaluation.tables import render_generations
from ..hub.networks import class_names, load_checkpoint, names_of_run
from ..hub.push import check_destination
from ..metrics import collect_logits, ensemble_logits
from ..models.names import exit_names
from ..run_files import is_complete
from .cpu import use_all_cores
from .folders import recipe_problem, run_folder
from .reporter import Reporter
from .trainer import close, create_accelerator, file_record, on_main, push_run, train

__all__ = ['generation_config', 'train_generations']

# Training images that tell what a network makes of those it has learned from.
_TRAIN_IMAGES = 10_000


def generation_config(config: TrainConfig, root: Path, number: int) -> TrainConfig:
    """Return the settings of one generation's own run.

    Args:
        config: Settings of all generations.
        root: Folder of all generations.
        number: 0 for the patriarch.
    """
    own = dict(
        output=str(root), experiment=f'generation{number}', seed=config.seed + number, generations=None, resume=None,
        push_to_hub=None,
        recipe=f'{config.recipe or root.name}/generation{number}',
    )
    if number:
        own.update(teacher=str(root / f'generation{number - 1}'), patriarch='plain', eta=None)
    else:
        own.update(label_weight=None, teacher_temperature=None)
    return dataclasses.replace(config, **own)


def _refusal(config: TrainConfig, root: Path) -> Optional[str]:
    """Return why the generations in a folder cannot be gone on with; None if they can."""
    if config.resume is None:
        return 'exists, and runs are never overwritten; choose another name, or pass `resume=auto` to go on with it'
    for number in range(config.generations + 1):
        folder = root / f'generation{number}'
        args = folder / 'args.yaml'
        if args.is_file():
            # the teacher's path changes with the folder of all generations
            problem = recipe_problem(args, generation_config(config, root, number), incidental=('teacher',), moved=True)
            if problem:
                return f'holds {folder.name} {problem}'
        elif folder.exists() and any(folder.iterdir()):
            return f'holds {folder.name}, which has no args.yaml and so is no generation of this program'
    if not (root / 'generation0').exists():
        return 'holds no generations; choose the folder of generations, or a new name'
    return None


def train_generations(config: TrainConfig) -> Path:
    """Train a patriarch and `config.generations` students.

    Each generation is a run of its own in the folder `generation<m>`, see `trainer.train`; beside them
    `generations.csv` and `generations.png` compare those that are complete. With `config.resume` complete generations
    are kept, and the one that was interrupted goes on. With `config.push_to_hub` the last one is put on the Hub.

    Returns:
        The folder of all generations.

    Raises:
        ConfigError: The folder exists and is not to be gone on with, or is of another recipe; or see `trainer.train`.
        DataError: The data cannot be used.
        NonFiniteLossError: The loss of a generation is not finite.
    """
    accelerator = create_accelerator(config)
    if accelerator.device.type == 'cpu':
        use_all_cores()
    main = accelerator.is_main_process
    root, problem = run_folder(config), None
    if main and root.exists():
        problem = _refusal(config, root)
    root, problem = broadcast_object_list([root, problem])  # the main process's date
    if problem:
        raise ConfigError(f'`output={config.output}`, `experiment={config.experiment}`: the folder {root} {problem}.')
    reporter = Reporter(enabled=main, epochs=config.epochs)
    if config.push_to_hub is not None:
        on_main(accelerator, lambda: check_destination(config.push_to_hub))
    lineage: Optional[_Lineage] = None
    for number in range(config.generations + 1):
        folder = root / f'generation{number}'
        complete = broadcast_object_list([is_complete(folder)])[0]
        taught = f'taught by generation {number - 1}' if number else f'patriarch, {config.patriarch}'
        reporter.say(f'\ngeneration {number} of {config.generations}: {taught}{", kept" if complete else ""}')
        if not complete:
            own = generation_config(config, root, number)
            train(dataclasses.replace(own, resume='auto'), accelerator)  # what was interrupted goes on
            accelerator.free_memory()
        elif main:
            file_record(config, folder, reporter)
        accelerator.wait_for_everyone()
        lineage = lineage or _Lineage(config, accelerator, root)
        lineage.add(folder)
        if main:
            (root / 'args.yaml').write_text(yaml.safe_dump(config.settings(), sort_keys=False), encoding='utf-8')
            _write(root, lineage)
            reporter.console.print(render_generations(lineage.rows, f'{lineage.parts[-1]} part'))
    if config.push_to_hub is not None:
        push_run(folder, config.push_to_hub, accelerator, reporter)
    close(accelerator)
    return root


def _write(root: Path, lineage: '_Lineage') -> None:
    with (root / 'generations.csv').open('w', newline='', encoding='utf-8') as f:
        names = list(dict.fromkeys(name for row in lineage.rows for name in row))
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(lineage.rows)
    plot_generations(
        lineage.rows, f'{root.name}: {lineage.data.name}, {lineage.parts[-1]} part', root / 'generations.png')


class _Lineage:
    """Measures one generation after the other, each process its share of the images.

    Attributes:
        rows: A dict a generation: top-1 accuracies in percent on the part that counts (`exit<i>`, `ensemble` of the
            exits, `generations_ensemble` of the deepest exits so far, by probabilities), `teacher_agreement` in
            percent, and the means of `secondary_information` as `<part>_<name>` for that part and training images.
        parts: Names of the parts measured, the one that counts last.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, root: Path):
        self.config = config
        self.accelerator = accelerator
        patriarch = root / 'generation0'
        self.data: ImageData = open_data(config, accelerator, names_of_run(patriarch))
        if config.skip_unreadable:
            leave_out_unreadable(self.data, accelerator, patriarch)
        train, counts = self.data.train, self.data.test or self.data.validation
        index = np.linspace(0, len(train) - 1, min(len(train), _TRAIN_IMAGES)).astype(int)
        self._splits = dict(train=train.select(index, 'train'), **{counts.name: counts})
        self.parts = list(self._splits)
        self.rows: List[Dict[str, Any]] = []
        self._teacher: Dict[str, torch.Tensor] = {}
        self._scores: Dict[str, torch.Tensor] = {}

    def add(self, folder: Path) -> None:
        """Measure the next generation."""
        model, _ = load_checkpoint(str(folder))
        if class_names(model) != self.data.label_names:
            raise ConfigError(
                f'{folder} knows the classes in another order than the patriarch, as the data have changed since. '
                f'Begin with a new `experiment`.'
            )
        model.to(self.accelerator.device)
        number = len(self.rows)
        row: Dict[str, Any] = dict(generation=number, seed=self.config.seed + number)
        for part, split in self._splits.items():
            loader = create_eval_loader(
                split,
                eval_transform(resolve_data_config(model=model)),
                max(1, self.config.batch_size // self.accelerator.num_processes),
                shard=shard_of(self.accelerator),
            )
            with self.accelerator.autocast():
                logits, target = collect_logits(model, loader, self.accelerator.device)
            self._scores[part] = self._scores.get(part, 0.) + logits[-1].softmax(-1)
            if part == self.parts[-1]:
                outputs = dict(zip(exit_names(model), [*logits, ensemble_logits(logits)]))
                outputs['generations_ensemble'] = self._scores[part]
                correct = {name: 100. * (z.argmax(-1) == target) for name, z in outputs.items()}
                row.update(self._means(correct))
            known = self._means(secondary_information(
                logits[-1],
                target,
                min(self.config.tsd_k, model.num_classes),
                self.data.superclasses_of(model.num_classes),
                self._teacher.get(part),
            ))
            if part == self.parts[-1] and number:
                row['teacher_agreement'] = 100 * known['teacher_agreement']
            row.update((f'{part}_{name}', value) for name, value in known.items())
            self._teacher[part] = logits[-1]
        self.rows.append(row)

    def _means(self, values: Dict[str, torch.Tensor]) -> Dict[str, float]:
        """Average over the images of all processes."""
        table = torch.stack([v.float() for v in values.values()])
        sums = torch.cat((table, torch.ones_like(table[:1]))).sum(1)
        *totals, count = self.accelerator.reduce(sums.to(self.accelerator.device), 'sum').tolist()
        return {name: total / count for name, total in zip(values, totals)}
