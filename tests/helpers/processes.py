"""Training in several processes."""
import subprocess
import sys


def command(processes, script, *arguments, options=()):
    launcher = [sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', str(processes)]
    return [*launcher, *map(str, options), str(script), *map(str, arguments)]


def launch(processes, script, *arguments):
    return subprocess.run(command(processes, script, *arguments), capture_output=True, text=True, timeout=300)
