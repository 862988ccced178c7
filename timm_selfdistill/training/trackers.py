"""Experiment trackers, through accelerate."""
import uuid
from pathlib import Path
from typing import Any, Dict, Sequence

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..errors import ConfigError, nearest, reason_of

__all__ = ['check_trackers', 'start_trackers']

_PROJECT = 'timm_selfdistill'


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for the first tracker that accelerate does not know or that is not installed."""
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name != 'all' and name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            raise ConfigError(
                f'`report_to={name}`: unknown, expected all or some of {", ".join(known)}{nearest(name, known)}.')
        if name != 'all' and name not in installed:
            raise ConfigError(f'`report_to={name}`: is not installed; pip install {name.replace("_", "-")} does it.')


def start_trackers(
        accelerator: Accelerator,
        names: Sequence[str],
        folder: Path,
        settings: Dict[str, Any],
        first_epoch: int,
) -> None:
    """Start the trackers of a run, or let them go on with it.

    None of them needs a network: tensorboard and trackio write to this machine, and wandb does with
    `WANDB_MODE=offline`.

    Args:
        accelerator: Logs to them from then on.
        names: Which ones, checked by `check_trackers`.
        folder: The run's folder; its name is the run's.
        settings: The settings of the run.
        first_epoch: Epoch to go on with; what was logged of it and later ones is taken back where a tracker can.

    Raises:
        ConfigError: One of them cannot be started.
    """
    same_run = dict(name=folder.name, resume='allow')
    run_id = uuid.uuid5(uuid.NAMESPACE_URL, str(folder.resolve())).hex
    accelerator.project_configuration.logging_dir = str(folder / 'trackers')
    accelerator.log_with = [str(t) for t in get_available_trackers()] if 'all' in names else list(dict.fromkeys(names))
    try:
        accelerator.init_trackers(
            _PROJECT,
            config={k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()},
            init_kwargs=dict(
                tensorboard=dict(purge_step=first_epoch),
                trackio=same_run,
                wandb=dict(same_run, id=run_id, dir=str(folder)),
            ),
        )
    except Exception as e:  # each tracker has errors of its own: no account, no connection, no folder to write to
        raise ConfigError(
            f'`report_to={" ".join(names)}`: cannot be started: {reason_of(e)}. Mend that, or leave the tracker out.'
        ) from e
