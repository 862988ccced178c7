"""Training in several processes."""
import subprocess
import sys


def command(processes, script, *arguments, options=('--standalone',)):
    """Return the command that starts processes on CPUs; `options` are torchrun's."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', *map(str, options), f'--nproc_per_node={processes}']
    return [*launcher, str(script), *map(str, arguments)]


def launch(processes, script, *arguments):
    """Run a script in several processes to its end."""
    return subprocess.run(command(processes, script, *arguments), capture_output=True, text=True, timeout=300)
