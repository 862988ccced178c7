"""Puts complete runs on the Hugging Face Hub, whole or cut off at an exit."""
import json
import re
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Optional, Tuple, TypeVar, Union

import torch
import yaml
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id
from timm.data import resolve_data_config

from ..costs import write_latency
from ..errors import ConfigError, HubError
from ..publishing import place_name, public_settings, public_text
from ..run_files import CONFIG_NAME, LATENCY_NAME, RECORD, WEIGHTS_NAME, is_complete
from .card import describe_run, write_card, write_eval_results
from .networks import load_checkpoint, save_model
from .sources import given_organisation

__all__ = ['AUTO', 'check_destination', 'push_to_hub', 'stage']

# In place of a repository: <organisation or user>/<network>.<method>_<data set>.
AUTO = 'auto'

# Seconds before each further attempt at what failed for a reason that passes.
_PAUSES = (1., 2., 4., 8., 16.)
# Request timeout, conflict and failed precondition (somebody else has pushed meanwhile), too many requests.
_PASSING = (408, 409, 412, 429)

# What a run's folder holds besides the weights that is published as it is, and, of a whole network only, the rule of
# early exit; not the picture that shows images of the data.
_FIGURES = ('results.json', LATENCY_NAME, RECORD, 'summary.csv', 'accuracy_vs_compute.png')
_RULE_FIGURES = ('early_exit.json', 'early_exit.csv', 'early_exit.png')

_T = TypeVar('_T')


def _status(error: BaseException) -> Optional[int]:
    """Return the status that the Hub answered with, of the error or of what it came from."""
    while error is not None:
        response = getattr(error, 'response', None)
        if response is not None:
            return response.status_code
        error = error.__cause__
    return None


def _passes(error: Exception) -> bool:
    status = _status(error)
    if status is not None and (status in _PASSING or status >= 500):
        return True
    # the client's word for an upload of a large file that failed, whatever the reason: a broken line, a wrong checksum
    failed_upload = isinstance(error, RuntimeError) and status not in (401, 403, 404)
    return failed_upload or (status is None and isinstance(error, HTTPError))


def _persistently(attempt: Callable[[], _T]) -> _T:
    """Call a function again and again while it fails for reasons that pass. Each call has to begin anew."""
    for pause in (*_PAUSES, None):
        try:
            return attempt()
        except (HTTPError, RuntimeError) as e:
            if pause is None or not _passes(e):
                raise
            response = getattr(e, 'response', None)
            asked = response.headers.get('Retry-After', '') if response is not None else ''
            time.sleep(max(pause, min(float(asked), 60.) if asked.isdigit() else 0.))
    raise AssertionError


def _explain(error: Exception, what: str) -> HubError:
    """Return a sentence that says why something did not work and what to do."""
    status = _status(error)
    said = ' '.join(str(error).split())
    reasons = {
        401: 'it does not know you: log in with `hf auth login`, or set HF_TOKEN to a token that may write',
        403: 'your token may not do that: use one that may write, or a namespace of your own',
        404: 'there is no such repository, organisation or revision, or your token does not open it',
        429: 'it has had too many requests: try again later',
    }
    if isinstance(error, (LocalTokenNotFoundError, UnicodeError)):  # the latter of a token that is none
        reason = reasons[401]
    elif status is None:
        reason = f'it cannot be reached at {constants.ENDPOINT}'
    else:
        reason = reasons.get(status, 'it failed: try again later' if status >= 500 else 'it refuses')
    return HubError(f'{what}: the Hub was asked and {reason}. ({said})')


def _account() -> str:
    """Return the owner of repositories that are named `auto`: the organisation that is set, or the user.

    Raises:
        HubError: The Hub does not know the user, or cannot be reached.
    """
    try:
        user = _persistently(HfApi().whoami)['name']
    except (HTTPError, OSError, RuntimeError, ValueError) as e:
        raise _explain(e, 'Nothing can be pushed') from e
    return given_organisation() or user


def _check_repository(repo: str) -> None:
    """Raise ConfigError unless a name has the form <owner>/<name>."""
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise ConfigError(f'`repo={repo}`: {e}') from e
    if repo.count('/') != 1:
        raise ConfigError(f'`repo={repo}`: expected <organisation or user>/<name>.')


def check_destination(repo: str) -> None:
    """Check, before hours of training, that what they bring can be pushed.

    Args:
        repo: `<owner>/<name>`, or `auto`.

    Raises:
        ConfigError: It is no name of a repository.
        HubError: The Hub does not know the user, or cannot be reached.
    """
    if repo != AUTO:
        _check_repository(repo)
    _account()


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Look at the files of a run, and make a ConfigError of whatever damaged ones lead to."""
    if not is_complete(folder):
        raise ConfigError(
            f'`checkpoint={folder}`: expected the folder of a run that has come to its end, with a results.json.')
    for name in ('args.yaml', CONFIG_NAME, 'results.json', LATENCY_NAME, RECORD, 'early_exit.json'):
        if not (folder / name).is_file():
            continue
        try:
            text = (folder / name).read_text(encoding='utf-8')
            content = yaml.safe_load(text) if name == 'args.yaml' else json.loads(text)
        except (OSError, ValueError, yaml.YAMLError) as e:
            raise ConfigError(f'`checkpoint={folder}`: {name} cannot be read: {" ".join(str(e).split())}') from e
        if not isinstance(content, dict) or not content:
            raise ConfigError(f'`checkpoint={folder}`: {name} holds nothing: expected what a run writes.')
    try:
        yield
    except (ConfigError, HubError):
        raise
    except OSError as e:
        raise ConfigError(f'`checkpoint={folder}`: {e}') from e
    except Exception as e:  # of files that can be read, but are not what a run writes
        raise ConfigError(
            f'`checkpoint={folder}`: its files are not those of a complete run: {type(e).__name__}: {e}') from e


def _automatic_name(folder: Path) -> str:
    with _reading(folder):
        run = describe_run(folder)
        words = f'{run["settings"]["method"]}_{run["dataset"].rpartition("/")[2]}'
        return f'{_account()}/{run["architecture"]}.{re.sub("[^A-Za-z0-9_]", "_", words)}'


def _reduce_places(path: Path) -> None:
    """Take places on this machine out of a file that an older version or another program may have written there."""
    if path.name not in (RECORD, 'early_exit.json'):
        return
    content = json.loads(path.read_text(encoding='utf-8'))
    public = dict(content)
    if 'dataset' in content:
        public['dataset'] = place_name(content['dataset'], hub_id=True)
    if path.name == RECORD:
        public.update(
            recipe=public_text(content['recipe'], nested=False),
            network=public_text(content['network']),
            settings=public_settings(content['settings']),
        )
    if public != content:
        path.write_text(json.dumps(public, ensure_ascii=False) + '\n', encoding='utf-8')


def stage(
        folder: Union[str, Path],
        destination: Union[str, Path],
        source: str,
        exit: Optional[int] = None,
        dataset_id: Optional[str] = None,
) -> None:
    """Gather in a folder what is published of a run: weights, config, card, pictures, figures and settings.

    Args:
        folder: The run's.
        destination: Where to; it exists and is empty.
        source: What `timm.create_model` will take to load the network, for the card.
        exit: Number of the exit that the network is cut off at; the whole network when None.
        dataset_id: Id of the data set on the Hub, where the run has read a local copy.

    Raises:
        ConfigError: The run is not complete, its weights cannot be used, or it has no such exit.
    """
    folder, destination = Path(folder), Path(destination)
    if dataset_id is not None and place_name(dataset_id, hub_id=True) != dataset_id:
        raise ConfigError(f'`dataset={dataset_id}`: expected the id of a data set on the Hub, as in uoft-cs/cifar100.')
    with _reading(folder):
        model, _ = load_checkpoint(str(folder))  # what cannot be loaded is not published
        if exit is None:
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                shutil.copyfile(folder / name, destination / name)
        else:
            run = describe_run(folder)
            try:
                cut = model.truncate(exit)
            except (IndexError, ValueError) as e:
                raise ConfigError(f'`exit={exit}`: {e}') from e
            save_model(cut, destination, resolve_data_config(model=model), run['config'].get('label_names'))
        if not (folder / LATENCY_NAME).is_file():  # kept, so that the next push is the same
            write_latency(folder, model, resolve_data_config(model=model)['input_size'], torch.device('cpu'))
        for name in (*_FIGURES, *(_RULE_FIGURES if exit is None else ())):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, destination / name)
                _reduce_places(destination / name)
        settings = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
        text = yaml.safe_dump(public_settings(settings), sort_keys=False)
        (destination / 'args.yaml').write_text(text, encoding='utf-8')
        write_card(destination, source, dataset_id)
        dataset_id = dataset_id or describe_run(folder)['dataset_id']
        task_id = _benchmark_task(dataset_id) if dataset_id else None
        if task_id is not None:
            write_eval_results(destination, dataset_id, task_id)


def _benchmark_task(dataset_id: str) -> Optional[str]:
    """Return the task of a data set that is a benchmark of the Hub with a single one; None of any other.

    The Hub takes results for benchmarks alone, which list their tasks in `eval.yaml`.
    """
    try:
        path = hf_hub_download(dataset_id, 'eval.yaml', repo_type='dataset')
        tasks = yaml.safe_load(Path(path).read_text(encoding='utf-8'))['tasks']
        return tasks[0]['id'] if len(tasks) == 1 else None
    except (HTTPError, OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None


def _validate_card(path: Path) -> None:
    """Ask the Hub whether it takes a card; before huggingface_hub 2 `ModelCard.validate` asks none but huggingface.co.

    Raises:
        HubError: It does not.
    """
    body = dict(repoType='model', content=path.read_text(encoding='utf-8'))
    response = get_session().post(f'{constants.ENDPOINT}/api/validate-yaml', json=body)
    if response.status_code == 400:
        raise HubError(f'{path.name} is not what the Hub takes for a model card, nothing was sent: {response.text}')
    hf_raise_for_status(response)


def _send(staged: Path, repo: str, public: bool, revision: Optional[str]) -> str:
    api = HfApi()
    _validate_card(staged / 'README.md')
    api.create_repo(repo, private=not public, exist_ok=True)  # of one that exists, who may see it stays as it is
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    head = api.model_info(repo, revision=revision).sha
    words = Path(repo).name
    # one commit or none: what is on the Hub is at no time half of this, nor half of another run that was there
    return api.upload_folder(
        repo_id=repo, folder_path=staged, revision=revision, parent_commit=head, commit_message=f'Weights of {words}',
        delete_patterns=[*_FIGURES, *_RULE_FIGURES],
    ).oid


def push_to_hub(
        folder: Union[str, Path],
        repo: str,
        exit: Optional[int] = None,
        public: bool = False,
        revision: Optional[str] = None,
        dataset_id: Optional[str] = None,
) -> Tuple[str, str]:
    """Put a complete run on the Hub: weights, config, card, pictures, figures and settings, all in one commit.

    What is there already is not sent again; if nothing is new there is no commit. Figures of an earlier run
    that this one does not have go from the repository; other files stay.

    Args:
        folder: The run's.
        repo: `<owner>/<name>`; created if needed. `auto` for a name made of network, method and data set.
        exit: See `stage`.
        public: Let everybody see a repository that has to be created.
        revision: Branch, created if needed; `main` when None.
        dataset_id: See `stage`.

    Returns:
        The repository, and the commit that holds all this.

    Raises:
        ConfigError: The run or one of the other arguments cannot be used; nothing has been sent.
        HubError: The Hub refuses, or cannot be reached.
    """
    if repo == AUTO:
        repo = _automatic_name(Path(folder)) + ('' if exit is None else f'_exit{exit}')
    _check_repository(repo)
    with tempfile.TemporaryDirectory(prefix='timm_selfdistill-') as staged:
        stage(folder, staged, f'hf-hub:{repo}' + (f'@{revision}' if revision else ''), exit, dataset_id)
        try:
            return repo, _persistently(lambda: _send(Path(staged), repo, public, revision))
        except HubError:
            raise
        except (HTTPError, OSError, RuntimeError, ValueError) as e:
            raise _explain(e, f'{Path(folder).name} was not pushed to {repo}') from e
