"""Batches that worker processes, or none, make of a data set, and what becomes of workers that fail."""
import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Callable, Iterable, Iterator

from torch.utils.data import DataLoader

from ..errors import DataError, WorkerDiedError
from .epoch_order import EpochBatches
from .image_data import ImageSplit
from .source import Shard

__all__ = ['create_eval_loader', 'create_train_loader', 'keep_worker_alive', 'readable', 'starting_workers']


def create_train_loader(
        split: ImageSplit,
        transform: Callable,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        shard: Shard = Shard(),
        accumulate: int = 1,
        pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of shuffled, augmented batches; call `batch_sampler.set_epoch` before each epoch."""
    split.transform, split.seed = transform, seed
    return DataLoader(
        split,
        batch_sampler=EpochBatches(len(split), batch_size, seed, shard, accumulate),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=keep_worker_alive,
    )


def create_eval_loader(
        split: ImageSplit,
        transform: Callable,
        batch_size: int,
        workers: int = 0,
        shard: Shard = Shard(),
        pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of one process's share of a split: every row exactly once over all processes, none padded."""
    split.transform = transform
    return DataLoader(
        split,
        batch_size=batch_size,
        sampler=shard.rows(len(split)),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=keep_worker_alive,
    )


def _let_loader_notice() -> None:
    """Take back torch's SIGCHLD handler, which raises as soon as a loader's worker has died, be it amid a step.

    Without it the loader notices by itself where it waits for a batch, between two steps, within 5 seconds.
    """
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except (AttributeError, ValueError):  # Windows has none; only the main thread has handlers
        pass


def readable(batches: Iterable) -> Iterator:
    """Pass batches on; raise what went wrong in a worker as it would have been raised here.

    Raises:
        DataError: An image or a label cannot be used.
        WorkerDiedError: A worker process was killed.
    """
    try:
        with starting_workers():
            iterator = iter(batches)
        for batch in iterator:
            _let_loader_notice()  # torch sets its handler when it starts workers
            yield batch
    except DataError as e:
        text = str(e)
        if text.startswith('Caught '):  # torch puts the worker's whole traceback there; its last line is the message
            raise type(e)(text.rstrip().splitlines()[-1].partition(': ')[2]) from None
        raise
    except RuntimeError as e:
        if 'DataLoader worker' not in str(e):
            raise
        raise WorkerDiedError(
            f'A loader process died: {str(e).rstrip(". ")}. Often the memory was full, or the shared memory: '
            f'fewer `workers` need less of it.'
        ) from e


def keep_worker_alive(worker: int) -> None:
    """Keep a loader's worker alive as long as its trainer, for `worker_init_fn`.

    Schedulers and terminals signal all processes at once, and without its workers the trainer could not finish the step
    after which it writes its checkpoint. So a worker ignores Ctrl-C, and SIGTERM unless the trainer itself has sent it,
    by which Python ends its children; that one, and the trainer's death, end it wherever it is. Where the system does
    not tell who sent a signal (macOS, Windows), every SIGTERM ends it, and so it may in a worker that was not
    started within `starting_workers`.
    """
    trainer = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if trainer is None or not hasattr(signal, 'sigtimedwait'):
        return
    # threads that start from here on inherit it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_end, args=(trainer, os.getppid()), daemon=True).start()


@contextmanager
def starting_workers() -> Iterator[None]:
    """Block SIGTERM and SIGINT in worker processes that start here, in all of their threads.

    Before `keep_worker_alive` is called in them either would end them. And in those that are not forked from this
    process (by default from Python 3.14 on) libraries have started threads by then, any of which may take a signal.
    """
    if not hasattr(signal, 'sigtimedwait'):
        yield
        return
    if multiprocessing.get_start_method() != 'fork':
        resource_tracker.ensure_running()  # when it starts, it unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _await_end(trainer: multiprocessing.Process, system_parent: int) -> None:
    """End this process when its trainer wants that or is gone; a fork server may be what the system calls its parent.

    The trainer's sentinel alone would not do: a pipe stays open as long as a worker forked later has inherited it.
    """
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.)
        if received is not None and received.si_pid == trainer.pid:
            break
        if os.getppid() != system_parent or not trainer.is_alive():
            break
    os._exit(0)  # an orphan's threads may wait for ever to hand over a batch
