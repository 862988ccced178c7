"""Threads and memory of a process that computes on a CPU."""
import ctypes
import os
import platform

import torch

__all__ = ['keep_freed_memory', 'share_of_cores', 'use_all_cores']

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

# Either of these says that torchrun or accelerate's launcher has started this process.
_LAUNCHED = ('TORCHELASTIC_RUN_ID', 'ACCELERATE_DYNAMO_BACKEND')


def share_of_cores(processes: int) -> int:
    """Return how many of the cores that this process may use fall to each of several processes, one at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, cores // processes)


def use_all_cores() -> None:
    """Set the threads of this process to its share of the machine's cores.

    Launchers set OMP_NUM_THREADS to 1 where it is not set, which wastes the cores of a CPU. So a 1 under a launcher is
    taken for the launcher's, and any other number, or a 1 without a launcher, for the user's choice, which stays.
    """
    given = os.environ.get('OMP_NUM_THREADS')
    if given is None or given == '1' and any(name in os.environ for name in _LAUNCHED):
        torch.set_num_threads(share_of_cores(int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def keep_freed_memory() -> None:
    """Have glibc keep the memory of tensors that are gone for those of the next step.

    By default what is larger than 32 MiB, such as a map of the first head for 64 images, goes back to the system each
    time and comes again page by page, filled with zeros: that took 8 % of a step of `resnet18_cifar` with its exits.
    """
    if platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 ** 31 - 1)
