"""Work spread over processes: on a CPU, two small networks in two processes beat one in two threads.

Needs:       torch, tqdm.
Gives:       spread(), processes_for().
"""
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import torch
from tqdm import tqdm

_STATE = None  # what make() built in this worker process: each process builds its own, once


def processes_for(device: torch.device, weights: list[Path]) -> int:
    """How many processes to use: one a CPU core where the network is small enough to fit in its cache and
    memory many times over (under 64 MB: the toy), else one, with all of torch's threads."""
    if device.type != "cpu" or sum(file.stat().st_size for file in weights) > 64e6:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(make):
    global _STATE
    torch.set_num_threads(1)  # threads of several processes would fight for the same cores
    tqdm.set_lock(threading.RLock())  # its default lock is a semaphore, which leaks when an error ends the pool
    _STATE = make() if make else None


def _call(job):
    work, item = job
    return work(_STATE, item)


def slot() -> int:
    """This worker's number, from 0: the line on which its progress bar is drawn."""
    identity = multiprocessing.current_process()._identity
    return identity[0] - 1 if identity else 0


def spread(make, work, items: list, processes: int):
    """Yields work(make(), item) for each item, in the order of the items.

    make and work are picklable (functions of a module, or functools.partial of one); make may be None. An
    item's result depends on the item alone, never on which process took it: every worker has one thread.
    """
    if processes > 1 and len(items) > 1:
        # Ctrl-C reaches every process of the terminal: the workers, who inherit this, leave it to us, and we end them with
        # SIGTERM, which train.py's workers take as a sign to save their state.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        pool = multiprocessing.get_context("spawn").Pool(min(processes, len(items)), _start, (make,))
        signal.signal(signal.SIGINT, before)
        with pool:
            yield from pool.imap(_call, [(work, item) for item in items])
    else:
        if processes > 1:  # a small network and a single item: the same one thread, hence the same bytes
            torch.set_num_threads(1)
        state = make() if make else None
        yield from (work(state, item) for item in items)
