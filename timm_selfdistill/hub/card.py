"""Model cards: what a run's folder says, written for those who find its weights on the Hub."""
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import split_model_name_tag

from ..config import TrainConfig
from ..models.names import SUFFIX
from ..models.rule_notes import Promise
from ..publishing import data_name, place_name, public_settings
from ..run_files import LATENCY_NAME, RECORD

__all__ = ['CARD_TEMPLATE', 'describe_run', 'write_card', 'write_eval_results']

CARD_TEMPLATE = Path(__file__).parent / 'templates' / 'card.md'
LICENSE = 'apache-2.0'

_METHODS = {
    'byot': 'self-distillation (the deepest exit teaches the others)',
    'deep-supervision': 'deep supervision (labels alone at every exit)',
    'kd': 'distillation from another network',
    'plain': 'plain training',
}
_TAGS = {'byot': ('multi-exit', 'early-exit', 'self-distillation'), 'kd': ('distillation',), 'plain': ()}
# What early exit was calibrated for, with the value in braces.
_AIMS = {
    'budget': 'to take {:.3g} of the plain network\'s MACs on average',
    'accuracy_drop': 'to lose no more than {:.3g} percentage points of top-1 accuracy',
    'latency': 'to take {:.3g} ms on average',
    'risk': 'to keep a guarantee',
}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else None


def _describe_method(settings: Dict[str, Any]) -> str:
    """Return in words how a run trained."""
    words = _METHODS.get(settings['method'], settings['method'])
    if settings['regime'] == 'disjoint':
        words += ', with the network itself frozen'
    elif settings['regime'] == 'mixed':
        words += ', after the network itself had been trained alone'
    if settings['teacher']:
        return f'{words}, taught by {settings["teacher"]}'
    if settings['patriarch'] != 'plain':
        return f'{words}, as a tolerant patriarch ({settings["patriarch"]})'
    return words


def describe_run(folder: Path, results: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """Gather what the files of a run say.

    Args:
        folder: The run's.
        results: Tables by split of the data; those of `results.json` when None.

    Returns:
        `config` (timm's), `architecture`, `settings`, `dataset` (its name), `dataset_id` (on the Hub, None where the
        run read a local copy), `results`, and, None where they are missing, `latency`, `early_exit` and `record`.

    Raises:
        OSError: A file is missing.
    """
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    trained = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
    settings = public_settings({**TrainConfig().settings(), **trained})
    dataset = settings['dataset']
    return dict(
        config=config,
        architecture=config['architecture'],
        settings=settings,
        dataset=data_name(dataset, settings['data_dir']),
        dataset_id=dataset if dataset and '/' in dataset and '://' not in dataset else None,
        results=results or json.loads((folder / 'results.json').read_text(encoding='utf-8')),
        latency=_read(folder / LATENCY_NAME),
        early_exit=_read(folder / 'early_exit.json'),
        record=_read(folder / RECORD),
    )


def _is_name(model: str) -> bool:
    """Return whether `--model` was a name of timm, not a network with weights of its own."""
    return timm.is_model(split_model_name_tag(model)[0].removesuffix(SUFFIX))


def _repository(start: Optional[str]) -> Optional[str]:
    """Return the repository of the Hub that training began with, None where it did not begin with one."""
    return start.removeprefix('hf-hub:').partition('@')[0] if start and start.startswith('hf-hub:') else None


def _rows(run: Dict[str, Any], split: str) -> List[Dict[str, Any]]:
    """Return the table of a split; of a network that ends at an exit, the row of this exit.

    Older versions measured an ensemble of a single exit, and the top 5 of five classes and fewer.
    """
    number = run['config'].get('model_args', {}).get('truncate')
    rows = [row for row in run['results'][split] if number is None or row['exit'] == f'exit{number}']
    if len(rows) == 2 and rows[1]['exit'] == 'ensemble':
        del rows[1]
    few = run['config']['num_classes'] < 6
    return [dict(row, top5=None) for row in rows] if few else rows


def _shown_settings(settings: Dict[str, Any]) -> str:
    """Write what is not the default, and what everybody asks for, as YAML."""
    defaults = TrainConfig().settings()
    asked = {field.name for field in dataclasses.fields(TrainConfig) if field.metadata.get('shown')}
    shown = {key: value for key, value in settings.items() if key in asked or value != defaults[key]}
    return yaml.safe_dump(shown, sort_keys=False)


def write_card(
        folder: Union[str, Path],
        source: Optional[str] = None,
        dataset_id: Optional[str] = None,
        results: Optional[Dict[str, Any]] = None,
) -> None:
    """Write `README.md`, the model card, from the other files of a run.

    Args:
        folder: The run's; for a network cut off at an exit, one with the files of the whole run and its own config.
        source: What `timm.create_model` takes to load the network; the folder's name when None.
        dataset_id: Id of the data set on the Hub; the one that the run has read from when None.
        results: See `describe_run`.

    Raises:
        OSError: A file is missing.
    """
    folder = Path(folder)
    run = describe_run(folder, results)
    config, settings, architecture = run['config'], run['settings'], run['architecture']
    split = list(run['results'])[-1]
    rows, dataset_id = _rows(run, split), dataset_id or run['dataset_id']
    base, origin = architecture.removesuffix(SUFFIX), None
    if settings['backbone_pretrained']:
        origin = timm.get_pretrained_cfg(settings['model'].replace(SUFFIX, '', 1))
    start = settings['initial_checkpoint'] or (None if _is_name(settings['model']) else settings['model'])
    number, early_exit = config.get('model_args', {}).get('truncate'), run['early_exit']
    if number is not None:
        early_exit = None
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=origin.license if origin is not None and origin.license else LICENSE,
        tags=['image-classification', 'timm', *_TAGS.get(settings['method'], ('multi-exit', 'early-exit'))],
        datasets=[dataset_id] if dataset_id else None,
        base_model=origin.hf_hub_id if origin is not None else _repository(start),
        metrics=None if settings['unlabelled'] else ['accuracy'],
        model_name=architecture if number is None else f'{architecture}, exit {number}',
        eval_results=None if settings['unlabelled'] else [
            EvalResult(
                task_type='image-classification',
                task_name='Image Classification',
                dataset_type=dataset_id or run['dataset'],
                dataset_name=run['dataset'],
                dataset_split=split,
                metric_type='accuracy',
                metric_name=f'top-1 of {row["exit"]}',
                metric_value=_accuracy(row),
            ) for row in rows
        ],
    )
    if early_exit is not None:
        (aim, value), = early_exit['aim'].items()
        early_exit = dict(
            early_exit, dataset=place_name(early_exit['dataset'], hub_id=True), aim=_AIMS[aim].format(value),
            rule=config['model_args']['early_exit'])
        promise = early_exit['rule'].get('promise')
        early_exit['promise'] = promise and str(Promise(**promise))
    source = source or f'local-dir:{folder.resolve().name}'
    repository, _, revision = source.partition(':')[2].partition('@')
    card = ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        title=f'{architecture} on {run["dataset"]}' if number is None
        else f'Exit {number} of {architecture} on {run["dataset"]}',
        architecture=architecture,
        base=base,
        registers=not timm.model_entrypoint(architecture).__module__.startswith('timm.'),
        number=number,
        method=_describe_method(settings),
        dataset=run['dataset'],
        data_classes=config['num_classes'],
        label_names=config.get('label_names'),
        split=split,
        rows=rows,
        latency=run['latency'],
        record=run['record'],
        early_exit=early_exit,
        pictures=sorted(path.name for path in folder.glob('*.png')),
        config=settings,
        origin=origin,
        start=start,
        license=data.license,
        settings=_shown_settings(settings),
        source=source,
        repository=repository,
        revision=revision,
        input_size=config['pretrained_cfg']['input_size'],
    )
    card.save(folder / 'README.md')


def write_eval_results(folder: Path, dataset_id: str, task_id: str) -> None:
    """Write `.eval_results/<data set>.yaml`, the Hub's form of results on a benchmark, for the network's own answer.

    Args:
        folder: See `write_card`.
        dataset_id: Id of the benchmark, a data set of the Hub that lists its tasks in `eval.yaml`.
        task_id: Which of its tasks.
    """
    run = describe_run(folder)
    if run['settings']['unlabelled']:
        return
    own = [row for row in _rows(run, list(run['results'])[-1]) if row['exit'] != 'ensemble'][-1]
    entry = dict(dataset=dict(id=dataset_id, task_id=task_id), value=_accuracy(own))
    path = folder / '.eval_results' / f'{re.sub(r"[^A-Za-z0-9._-]", "-", dataset_id)}.yaml'
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump([entry], sort_keys=False), encoding='utf-8')


def _accuracy(row: Dict[str, Any]) -> float:
    """Return the top-1 accuracy as metadata hold it, 0 to 1."""
    return round(row['top1'] / 100, 6)
