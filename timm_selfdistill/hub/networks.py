"""Saves and loads networks in the format of timm and the Hugging Face Hub."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf

from ..errors import ConfigError, WeightsError
from ..models.exit_rule import ExitRule
from ..models.multi_exit import MultiExit, add_exits
from ..models.names import model_name
from ..models.wrapper import GATES, BackboneWrapper
from ..run_files import CONFIG_NAME, WEIGHTS_NAME, replaced
from .sources import fetch_weights, read_source

__all__ = ['class_names', 'load_checkpoint', 'load_network', 'names_of_run', 'save_model', 'write_exit_rule']


def save_model(
        model: nn.Module,
        folder: Union[str, Path],
        data_config: Optional[Dict[str, Any]] = None,
        label_names: Optional[Sequence[str]] = None,
        weights: Optional[Dict[str, torch.Tensor]] = None,
) -> None:
    """Write `model.safetensors` and `config.json`, from which timm loads the folder as `local-dir:<folder>`.

    The classes stand in `num_classes` alone. timm would repeat them in `model_args`, which transformers' wrapper passes
    on beside them.

    Files already there are replaced only once the new ones are complete.

    Args:
        model: A timm model or `MultiExit`.
        folder: Where to; created if needed.
        data_config: Preprocessing that the weights expect, see `timm.data.resolve_data_config`.
        label_names: Names of the classes.
        weights: The model's state; its own when None.

    Examples:
        >>> import tempfile, timm, timm_selfdistill
        >>> folder = tempfile.mkdtemp()
        >>> save_model(timm.create_model('test_resnet_sd', num_classes=5, exits=(2, 3)), folder)
        >>> timm.create_model(f'local-dir:{folder}', pretrained=True).exits
        (2, 3)
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
    with replaced(folder / CONFIG_NAME) as config_file, replaced(folder / WEIGHTS_NAME) as weights_file:
        save_file(tensors, weights_file)
        save_config_for_hf(model, config_file, model_config=model_config, data_config=data_config)
        config = json.loads(config_file.read_text(encoding='utf-8'))
        config.get('model_args', {}).pop('num_classes', None)
        config_file.write_text(json.dumps(config, indent=2), encoding='utf-8')


def load_network(checkpoint: str) -> Tuple[nn.Module, Optional[Path]]:
    """Load a network with its weights, one with exits or any other of timm; nothing that comes along is executed.

    Args:
        checkpoint: Folder of a run, or a name that timm knows: `hf-hub:org/name`, `local-dir:folder`, `name.tag`.

    Returns:
        The network in eval mode, and the folder if it is a local one.

    Raises:
        FileNotFoundError: The folder lacks config or weights.
        RuntimeError: timm does not know the name, or has no weights for it.
        WeightsError: Config or weights cannot be used.
    """
    source, _, rest = checkpoint.partition(':')
    path = Path(rest if source == 'local-dir' else checkpoint)
    local = source == 'local-dir' or (source != 'hf-hub' and (path.exists() or '/' in checkpoint))
    if local:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (path / name).is_file():
                raise FileNotFoundError(
                    f'there is no {name} in {path}. Expected the folder of a run, or a name of the form '
                    f'hf-hub:org/name.'
                )
        checkpoint = f'local-dir:{path}'
    if local or source == 'hf-hub':
        try:
            fetch_weights(read_source(checkpoint)[0], checkpoint)
        except RepositoryNotFoundError as e:
            raise WeightsError(
                f'{checkpoint}: the Hub has no such repository, or it is private and your token does not open it.'
            ) from e
    return timm.create_model(checkpoint, pretrained=True).eval(), path if local else None


def load_checkpoint(checkpoint: str) -> Tuple[MultiExit, Optional[Path]]:
    """Load a network for a recipe, see `load_network`; a plain one becomes a network of a single exit.

    Raises:
        ConfigError: It cannot be loaded, or is one that was cut off at an exit.
    """
    try:
        model, path = load_network(checkpoint)
        if not isinstance(model, BackboneWrapper):
            model = add_exits(model, exits=()).eval()
    except (HTTPError, OSError, RuntimeError, ValueError) as e:
        raise ConfigError(f'`checkpoint={checkpoint}`: {e}') from e
    if not isinstance(model, MultiExit):
        raise ConfigError(
            f'`checkpoint={checkpoint}`: {model_name(model)} was cut off at an exit; expected a whole network.')
    return model, path


def class_names(model: nn.Module) -> Optional[List[str]]:
    """Return the names of a network's classes in their order, None where it has none."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    return list(names) if isinstance(names, (list, tuple)) else None


def names_of_run(folder: Path) -> Optional[List[str]]:
    """Return the names of the classes in the `config.json` of a run, None where there is none yet."""
    try:
        return json.loads((folder / CONFIG_NAME).read_text(encoding='utf-8')).get('label_names')
    except (OSError, ValueError):
        return None


def write_exit_rule(folder: Path, rule: ExitRule) -> None:
    """Write an exit rule into the `config.json` of a folder, from which timm builds the network; all else in it stays.

    Its gates, if it has any, are put into the weights, from which those of another rule are taken out.

    Raises:
        OSError: The files cannot be read or written.
    """
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    content = json.loads(config.read_text(encoding='utf-8'))
    content.setdefault('model_args', {})['early_exit'] = rule.settings()
    with replaced(config) as beside:
        beside.write_text(json.dumps(content, indent=2), encoding='utf-8')
        tensors = load_file(weights)
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(GATES)}
        if rule.gates is not None or len(kept) < len(tensors):
            if rule.gates is not None:
                kept.update((GATES + name, tensor.contiguous()) for name, tensor in rule.gates.state_dict().items())
            with replaced(weights) as weights_beside:
                save_file(kept, weights_beside)
