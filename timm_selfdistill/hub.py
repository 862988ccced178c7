"""Saves, loads and describes multi-exit networks in the format of timm and the Hugging Face Hub."""
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from .config import ConfigError
from .multi_exit import MultiExit

__all__ = ['CARD_TEMPLATE', 'load_checkpoint', 'load_network', 'save_model', 'write_card']

CARD_TEMPLATE = Path(__file__).parent / 'templates' / 'card.md'

_METHODS = {
    'byot': 'self-distillation (the deepest exit teaches the others)',
    'deep-supervision': 'deep supervision (labels alone at every exit)',
    'kd': 'distillation from another network',
    'plain': 'plain training',
}


def _describe_method(settings: Dict[str, Any]) -> str:
    """Say in words how a run trained."""
    words = _METHODS[settings['method']]
    if settings.get('teacher'):
        return f'{words}, taught by {settings["teacher"]}'
    if settings.get('patriarch', 'plain') != 'plain':
        return f'{words}, as a tolerant patriarch ({settings["patriarch"]})'
    return words


def save_model(
        model: nn.Module,
        folder: Union[str, Path],
        data_config: Optional[Dict[str, Any]] = None,
        label_names: Optional[Sequence[str]] = None,
        weights: Optional[Dict[str, torch.Tensor]] = None,
) -> None:
    """Write `model.safetensors` and `config.json`, from which timm loads the folder as `local-dir:<folder>`.

    Files already there are replaced only once the new ones are complete.

    Args:
        model: A timm model or `MultiExit`.
        folder: Where to; created if needed.
        data_config: Preprocessing that the weights expect, see `timm.data.resolve_data_config`.
        label_names: Names of the classes.
        weights: The model's state; its own when None.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model_config = dict(label_names=list(label_names)) if label_names else None
    tensors: Dict[str, torch.Tensor] = {}
    storages = set()
    for key, tensor in (model.state_dict() if weights is None else weights).items():
        # a layer used in several places (CoaT) has several names, under each of which it is loaded again
        shared = tensor.untyped_storage().data_ptr() in storages
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor.clone() if shared else tensor.contiguous()
    with tempfile.TemporaryDirectory(dir=folder, prefix='.saving-') as beside:
        save_file(tensors, Path(beside, 'model.safetensors'))
        save_config_for_hf(model, Path(beside, 'config.json'), model_config=model_config, data_config=data_config)
        for name in ('model.safetensors', 'config.json'):
            os.replace(Path(beside, name), folder / name)


def load_network(checkpoint: str) -> Tuple[nn.Module, Optional[Path]]:
    """Load a network with its weights, one with exits or any other of timm.

    Args:
        checkpoint: Folder of a run, or a name that timm knows: `hf-hub:org/name`, `local-dir:folder`, `name.tag`.

    Returns:
        The network in eval mode, and the folder if it is a local one.

    Raises:
        FileNotFoundError: The folder lacks config or weights.
        RuntimeError: timm does not know the name, or has no weights for it.
    """
    source, _, rest = checkpoint.partition(':')
    path = Path(rest if source == 'local-dir' else checkpoint)
    local = source == 'local-dir' or (source != 'hf-hub' and (path.exists() or '/' in checkpoint))
    if local:
        for name in ('config.json', 'model.safetensors'):
            if not (path / name).is_file():
                raise FileNotFoundError(
                    f'there is no {name} in {path}. Expected the folder of a run, or a name of the form '
                    f'hf-hub:org/name.'
                )
    model = timm.create_model(f'local-dir:{path}' if local else checkpoint, pretrained=True)
    return model.eval(), path if local else None


def load_checkpoint(checkpoint: str) -> Tuple[MultiExit, Optional[Path]]:
    """Load a multi-exit network, see `load_network`.

    Raises:
        FileNotFoundError: The folder lacks config or weights.
        ConfigError: What was loaded has no exits.
    """
    try:
        model, path = load_network(checkpoint)
    except FileNotFoundError as e:
        raise FileNotFoundError(f'--checkpoint {checkpoint}: {e}') from e
    if not isinstance(model, MultiExit):
        raise ConfigError(f'--checkpoint {checkpoint}: {type(model).__name__} is a network without exits.')
    return model, path


def write_card(
        folder: Union[str, Path],
        model: MultiExit,
        rows: List[Dict[str, Any]],
        split: str,
        dataset: str,
        settings: Dict[str, Any],
        source: str,
        input_size: Tuple[int, int, int],
) -> None:
    """Write `README.md`, the model card, beside the weights.

    Args:
        folder: Where the weights are.
        model: The network.
        rows: What `metrics.exit_table` returned.
        split: Part of the data that was measured.
        dataset: Name of the data set.
        settings: The run's configuration, as in `args.yaml`.
        source: What `timm.create_model` takes to load the network.
        input_size: Channels, height and width of an image.
    """
    architecture = model.pretrained_cfg['architecture']
    results = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type='accuracy',
            metric_name=f'top-1 of {row["exit"]}',
            metric_value=round(row['top1'] / 100, 6),
        ) for row in rows
    ]
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license='apache-2.0',
        tags=['image-classification', 'timm', 'multi-exit', 'early-exit', 'self-distillation'],
        metrics=['accuracy'],
        model_name=architecture,
        eval_results=results,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        title=f'{architecture} on {dataset}',
        architecture=architecture,
        base=architecture.removesuffix('_sd'),
        method=_describe_method(settings),
        dataset=dataset,
        split=split,
        rows=rows,
        config=settings,
        settings=yaml.safe_dump({k: v for k, v in settings.items() if v is not None}, sort_keys=False),
        source=source,
        input_size=input_size,
    )
    card.save(Path(folder) / 'README.md')
