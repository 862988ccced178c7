"""Threads and memory of a process that computes on a CPU."""
import argparse
import ctypes
import os
import platform
from typing import Optional

import psutil
import torch

__all__ = ['keep_freed_memory', 'launcher_arguments', 'share_of_cores', 'threads_are_chosen', 'use_all_cores']

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

_THREADS = 'OMP_NUM_THREADS'


def launcher_arguments() -> Optional[argparse.Namespace]:
    """Return the arguments of the `accelerate launch` that started this process, None if none did."""
    parent = psutil.Process().parent()
    try:
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:  # it has ended meanwhile, or is somebody else's
        return None
    for i, word in enumerate(words):
        if word == 'launch' and i and 'accelerate' in words[i - 1] or 'accelerate-launch' in word \
                or word == 'accelerate.commands.launch' or word.endswith('accelerate/commands/launch.py'):
            from accelerate.commands.launch import launch_command_parser
            return launch_command_parser().parse_args(words[i + 1:])
    return None


def threads_are_chosen() -> bool:
    """Tell whether the user has set OMP_NUM_THREADS, and not a launcher, as accelerate's and torch's do by default.

    They leave a number alone that they find in their own environment.
    """
    if _THREADS not in os.environ:
        return False
    arguments = launcher_arguments()
    if arguments is None and 'TORCHELASTIC_RUN_ID' not in os.environ:
        return True
    if getattr(arguments, 'num_cpu_threads_per_process', None) is not None:
        return True
    try:
        return _THREADS in psutil.Process().parent().environ()
    except (psutil.Error, AttributeError):  # the launcher has ended, or is somebody else's
        return False


def share_of_cores(processes: int) -> int:
    """Return how many of the cores that this process may use fall to each of several processes, one at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, cores // processes)


def use_all_cores() -> None:
    """Undo the launcher's OMP_NUM_THREADS=1: on a CPU the processes of this machine share its cores.

    A number that the user has set stays.
    """
    if threads_are_chosen():
        return
    torch.set_num_threads(share_of_cores(int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def keep_freed_memory() -> None:
    """Let glibc keep the memory of tensors that are gone for those of the next step.

    By default what is larger than 32 MiB, such as a map of the first head for 64 images, goes back to the system each
    time and comes again page by page, filled with zeros: that took 8 % of a step of `resnet18_cifar` with its exits.
    """
    if platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 ** 31 - 1)
