"""How the recipes start and how they fail: as many processes as were asked for, errors as one plain sentence."""
import argparse
import os
import sys
from typing import Callable, Optional

import psutil

from .checkpoints import CheckpointError
from .config import ConfigError
from .data import DataError
from .meters import NonFiniteLossError
from .push import HubError
from .signals import Preempted

__all__ = ['PREEMPTED', 'relaunch_on_cpu', 'run_command']

# Exit status after a signal: sysexits.h's EX_TEMPFAIL, "try again later".
PREEMPTED = 75

# Any of these says that somebody has started the processes already.
_STARTED = ('RANK', 'LOCAL_RANK', 'PMI_SIZE', 'OMPI_COMM_WORLD_SIZE', 'MV2_COMM_WORLD_SIZE')


def run_command(main: Callable[[], None]) -> None:
    """Run a recipe; report what its user can mend as a sentence on stderr and exit with status 2.

    After a signal the status is `PREEMPTED`; torch's and accelerate's launchers make 1 of it. Of several processes the
    first one speaks, as the others know the same, unless the error is marked `local`.
    """
    try:
        main()
    except (CheckpointError, ConfigError, DataError, FileNotFoundError, HubError, NonFiniteLossError, Preempted) as e:
        if os.environ.get('RANK', '0') == '0' or getattr(e, 'local', False):
            print(e if isinstance(e, Preempted) else f'error: {e}', file=sys.stderr)
        sys.exit(PREEMPTED if isinstance(e, Preempted) else 2)


def _launcher_arguments() -> Optional[argparse.Namespace]:
    """Return the arguments of the `accelerate launch` that started this process, None if none did."""
    from accelerate.commands.launch import launch_command_parser

    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    for i, word in enumerate(words):
        if word == 'launch' and i and 'accelerate' in words[i - 1] or 'accelerate-launch' in word \
                or word == 'accelerate.commands.launch' or word.endswith('accelerate/commands/launch.py'):
            return launch_command_parser().parse_args(words[i + 1:])
    return None


def relaunch_on_cpu() -> None:
    """Start the processes that `accelerate launch --cpu --num_processes N` asks for.

    On CPUs accelerate's launcher starts one process whatever N is and leaves the others to mpirun. Here torch's own
    launcher, which needs nothing installed, takes this process's place and starts them. Does nothing in any other case.
    """
    env = os.environ
    if env.get('ACCELERATE_USE_CPU', '').lower() != 'true' or any(name in env for name in _STARTED):
        return
    args = _launcher_arguments()
    if args is None or (args.num_processes or 1) < 2:
        return
    machines = args.num_machines or 1
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={args.num_processes // machines}']
    if machines == 1:
        command.append('--standalone')
    else:
        command += [
            f'--nnodes={machines}',
            f'--node_rank={args.machine_rank or 0}',
            f'--master_addr={args.main_process_ip}',
            f'--master_port={args.main_process_port}',
        ]
    os.execv(sys.executable, [*command, *sys.argv])
