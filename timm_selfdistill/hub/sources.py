"""Where multi-exit weights come from: registered names, an organisation on the Hub, any repository, a folder."""
import os
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import timm
import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from timm.models import PretrainedCfg
from timm.models._hub import load_model_config_from_path

from ..errors import WeightsError
from ..models.names import SUFFIX
from ..run_files import CONFIG_NAME, WEIGHTS_NAME
from .checks import build_skeleton, check_config, check_memory, check_weights, read_config

__all__ = [
    'ORGANISATION', 'SOURCES', 'VARIABLE', 'fetch_weights', 'given_organisation', 'no_weights', 'organisation',
    'read_source', 'resolve_weights',
]

# Owner of the project's repositories on the Hub, which are asked for every name with a tag that has no registered
# weights: <owner>/resnet50_sd.byot_cifar100. Where the environment variable names another owner, that one's are, and
# for names without a tag as well.
ORGANISATION = 'timm-selfdistill'
VARIABLE = 'TIMM_SELFDISTILL_ORG'

# Kinds of sources, and the field of timm's pretrained cfg that says where in it.
SOURCES = {'hf-hub': 'hf_hub_id', 'local-dir': 'file'}


def given_organisation() -> Optional[str]:
    """Return the owner that the environment variable names, None without."""
    return os.environ.get(VARIABLE) or None


def organisation() -> str:
    """Return the owner of the repositories that weights are looked for in by name."""
    return given_organisation() or ORGANISATION


def no_weights(name: str, where: str = '') -> RuntimeError:
    """Return the error that says what to do where there are no weights; `where` says where they were looked for."""
    return RuntimeError(
        f'No multi-exit weights are published for {name}{where}. Use backbone_pretrained=True for timm\'s own weights '
        f'in the backbone and new exits; "hf-hub:<org>/<name>" or "local-dir:<folder>" as the name of the model, '
        f'timm_selfdistill.register_pretrained() or the environment variable {VARIABLE}=<org> for weights of your own, '
        f'which recipes/publish.py puts on the Hub; or pretrained=False for random init.'
    )


def resolve_weights(
        base: str,
        pretrained: bool,
        kwargs: Dict[str, Any],
        build: Callable[..., nn.Module],
) -> Dict[str, Any]:
    """Find the `config.json` and the weights of a multi-exit network, and check both.

    What the config says of the network (exits, heads, classes, thresholds) becomes the default of what the caller
    asks for. The weights are those of the same commit as the config, are compared with the checksum that the Hub gave,
    and have to fit the network that the config describes, tensor by tensor, before anything of either takes memory.

    Args:
        base: Name of the timm model.
        pretrained: Whether weights are asked for.
        kwargs: What timm's factory was given for `<base>_sd`.
        build: Builds it: takes `base`, `pretrained` and such arguments.

    Returns:
        The arguments to build it with.

    Raises:
        RuntimeError: There are no weights of this name.
        WeightsError: Config or weights cannot be used.
    """
    given, overlay = kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay') or {}
    cache_dir, name = kwargs.get('cache_dir'), base + SUFFIX
    if isinstance(given, dict) and given.get('source') in SOURCES:
        cfg, saved = dict(given), kwargs.get('pretrained_model_args') or {}  # timm has read the config
        where = f'{cfg["source"]}:{cfg[SOURCES[cfg["source"]]]}'
        check_config(cfg, saved, where)
    elif pretrained and (given is None or isinstance(given, str)) and not {'file', 'state_dict', 'url'} & set(overlay):
        where = _location(name, given)
        if where is None:
            return kwargs
        try:
            cfg, architecture, saved = read_source(where, cache_dir)
        except RepositoryNotFoundError as e:
            raise no_weights(name, f' at {where}, or they are private and your token does not open them') from e
        except LocalEntryNotFoundError as e:
            problem = f' that can be had now: {where} is not in the cache, and the Hub was not asked or not reached'
            raise no_weights(name, problem) from e
        if architecture != name:
            raise WeightsError(f'{where}: {CONFIG_NAME} is of {architecture}: expected {name}.')
        cfg['tag'] = given
    else:
        return kwargs
    path = fetch_weights(cfg, where, cache_dir) if pretrained else None
    _check_fit(base, path, cfg, saved, lambda **args: build(base, False, pretrained_cfg=cfg, **args), where)
    return {**saved, **kwargs, 'pretrained_cfg': cfg, 'pretrained_model_args': saved}


def _location(name: str, tag: Optional[str]) -> Optional[str]:
    """Return where the weights of a name are, as `hf-hub:...` or `local-dir:...`, None if there are none."""
    full = f'{name}.{tag}' if tag else name
    try:
        cfg = timm.get_pretrained_cfg(full)
    except RuntimeError:  # no such tag
        cfg = None
    if cfg is not None and cfg.source in SOURCES:
        return f'{cfg.source}:{getattr(cfg, SOURCES[cfg.source])}'
    if (given_organisation() or tag) and not (cfg is not None and cfg.has_weights):
        return f'hf-hub:{organisation()}/{full}'
    return None


def read_source(where: str, cache_dir: Optional[str] = None) -> Tuple[Dict[str, Any], str, Dict[str, Any]]:
    """Read the config at a place as timm does, and check it.

    Args:
        where: `hf-hub:<org>/<name>`, with `@<revision>` if wanted, or `local-dir:<folder>`.
        cache_dir: The Hub's cache, if not the usual one.

    Returns:
        timm's pretrained cfg, the name of the network, and its arguments.

    Raises:
        FileNotFoundError: The folder has no config, or the Hub cannot be asked and the cache does not know.
        RepositoryNotFoundError: There is no such repository, or it is private.
        WeightsError: The config cannot be used or was damaged on its way, or the repository has none.
    """
    source, _, place = where.partition(':')
    folder = Path(place)
    if source == 'hf-hub':
        repo, _, revision = place.partition('@')
        try:
            config = Path(hf_hub_download(repo, CONFIG_NAME, revision=revision or None, cache_dir=cache_dir))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as e:
            raise WeightsError(f'{where}: there is no {CONFIG_NAME}.') from e
        except RevisionNotFoundError as e:
            raise WeightsError(f'{where}: the repository has no branch, tag or commit {revision}.') from e
        _check_sum(config, where)
        folder = config.parent
    elif not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f'{where}: there is no {CONFIG_NAME}.')
    read_config(folder / CONFIG_NAME, where)
    cfg, architecture, saved = load_model_config_from_path(folder)
    check_config(cfg, saved, where)  # what timm made of it, which may be an older format of its own
    if source == 'hf-hub':
        cfg.update(source=source, hf_hub_id=place, file=None)
    return cfg, architecture, saved


def fetch_weights(cfg: Dict[str, Any], where: str, cache_dir: Optional[str] = None) -> Path:
    """Return the weights that belong to a config, and let the cfg say where exactly they are.

    Args:
        cfg: See `read_source`; the commit of what comes from the Hub is put into it.
        where: Likewise.
        cache_dir: Likewise.

    Raises:
        WeightsError: There are none as safetensors, or they were damaged on their way.
    """
    missing = (
        f'{where}: there is no {WEIGHTS_NAME}. Other files of weights are not read, as they may hold code; timm writes '
        f'this one with save_for_hf(model, folder, safe_serialization=True).'
    )
    if cfg['source'] == 'local-dir':
        path = Path(cfg['file'], WEIGHTS_NAME)
        if not path.is_file():
            raise WeightsError(missing)
        return path
    repo, _, revision = cfg['hf_hub_id'].partition('@')
    config = try_to_load_from_cache(repo, CONFIG_NAME, cache_dir=cache_dir, revision=revision or None)
    revision = revision or None
    if isinstance(config, str):
        _check_sum(Path(config), where)  # timm may have read it, which does not look
        # of the config's commit, whatever becomes of the branch meanwhile; the cache keeps each in a folder so named
        revision = Path(config).parent.name
    try:
        path = Path(hf_hub_download(repo, WEIGHTS_NAME, revision=revision, cache_dir=cache_dir))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as e:
        raise WeightsError(missing) from e
    _check_sum(path, where)
    cfg.update(hf_hub_id=f'{repo}@{revision}', hf_hub_filename=WEIGHTS_NAME)
    return path


def _check_sum(path: Path, where: str) -> None:
    """Compare a file in the Hub's cache with its checksum, which is the name that the cache keeps it under.

    Where the cache has no links (some Windows systems) it keeps no checksum either, and nothing is compared.
    """
    blob = path.resolve()
    with blob.open('rb') as f:
        found = {64: lambda: sha_fileobj(f).hex(), 40: lambda: git_hash(f.read())}.get(len(blob.name), lambda: None)()
    if found is not None and found != blob.name:
        for file in (blob, path):
            file.unlink(missing_ok=True)  # another process may have found it out as well
        raise WeightsError(
            f'{where}: {path.name} was damaged on its way, its checksum is {found[:12]}... where {blob.name[:12]}... '
            f'was announced. It is out of the cache again; try once more.'
        )


def _check_fit(
        base: str,
        path: Optional[Path],
        cfg: Dict[str, Any],
        saved: Dict[str, Any],
        build: Callable[..., nn.Module],
        where: str,
) -> None:
    """Check that the network that a config describes can be built, and that the weights, if asked for, are its own."""
    with torch.device('meta'):
        usual = timm.create_model(base)
    # of the tensors that are made on the way: some layers are made twice, and exits come on top
    most = 4 * len(list(usual.parameters())) + 1000
    skeleton = build_skeleton(lambda: build(**saved), where, most)
    # timm would drop classifiers of other sizes, and put random ones in their place
    classes = cfg.get('num_classes', PretrainedCfg.num_classes)
    if classes != skeleton.num_classes or cfg.get('label_offset'):
        raise WeightsError(
            f'{where}: {CONFIG_NAME} has num_classes = {classes:,}, label_offset = {cfg.get("label_offset")}: expected '
            f'the {skeleton.num_classes:,} classes of the network that it describes, and no offset.'
        )
    if path is not None:
        check_weights(path, skeleton, where)
    if saved.get('truncate') is not None:
        # it is cut out of a whole network, of whose size the weights say nothing
        skeleton = build_skeleton(lambda: build(**dict(saved, truncate=None)), where, most)
    check_memory(skeleton, usual, path, where)
