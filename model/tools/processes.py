"""Several processes at one task.

What it is:  spread(): on a CPU, two small networks in two processes beat one in two threads.
             torchrun: who is who, and data parallelism by hand. Every process (a rank) holds the
             whole model and takes its share; gradients are summed over ranks, so that all take the
             same step. A LoRA's gradients are a few MB: one sum a step costs nothing beside the
             UNet.
Needs:       torch, tqdm; for torchrun the variables that it sets (RANK, WORLD_SIZE, LOCAL_RANK).
Gives:       spread(), in_threads(), processes_for(), cores(), chunks(); start(), RANK, WORLD,
             sum_over_all(), say(), wait().
"""
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from model.tools.command import BadInput
from model.tools.memory import keep_memory

RANK, WORLD = 0, 1    # this process's number, and how many there are, once start() was called
STATE = None          # what make() gave to this worker process
# Workers are forked from a process that has imported what takes seconds, and done no more. (Forks
# of this process could hang: threads do not fork.)
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


def cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)    # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processes_for(device: torch.device, weights: list[Path]) -> int:
    """How many processes to use: one a CPU core where the network is small (under 64 MB: the toy),
    else one, with all of torch's threads; and one under torchrun. For a small network this process
    has one thread from here on, as its workers do: bytes do not depend on the number of cores."""
    if device.type != "cpu" or sum(file.stat().st_size for file in weights) > 64e6:
        return 1
    torch.set_num_threads(1)
    return cores() if WORLD == 1 else 1


def chunks(items, size: int) -> list:
    """The items in order, so many together, and what is left of them."""
    return [items[k:k + size] for k in range(0, len(items), size)]


def begin_worker(make):
    global STATE
    keep_memory()
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)    # threads of several processes would fight for the same cores
    tqdm.set_lock(threading.RLock())    # its own lock leaks a semaphore when an error ends the pool
    STATE = make() if make else None


def end_with_parent():
    """A killed command cannot end its workers: they notice that it is gone."""
    multiprocessing.parent_process().join()
    os._exit(1)


def call_worker(work, item):
    return work(STATE, item)


def spread(make, work, items: list, processes: int):
    """Yields work(make(), item) for each item, in the order of the items.

    make and work are picklable (functions of a module, or functools.partial of one); make may be
    None. A result depends on the item alone, never on the process: every worker has one thread.
    Raises what work() raises, and BadInput if the system killed a worker; the other workers are
    ended first.
    """
    if processes == 1 or len(items) < 2:
        state = make() if make and items else None
        yield from (work(state, item) for item in items)
        return
    # For a command's first workers, and all that follow: text encoders, where make() loads a model
    # to draw with; else what an optimizer imports.
    CONTEXT.set_forkserver_preload([
        "transformers.models.clip.modeling_clip" if make else "torch._dynamo"])
    # Ctrl-C reaches all processes of a terminal. The workers inherit that they leave it to us.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(min(processes, len(items)), CONTEXT, begin_worker, (make,))
    futures = [pool.submit(call_worker, work, item) for item in items]
    signal.signal(signal.SIGINT, before)
    try:
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        raise BadInput("a worker process was killed, perhaps because memory ran out; run the same "
                       "command again, with less beside it") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        pool.shutdown()


def in_threads(work, items):
    """Yields work(item) for each item, in order, of which memory holds few: as many threads as
    there are cores, eight at most, work ahead. For large tensors: torch works outside of Python's
    lock. With one thread in each of torch's operations, as after set_num_threads(1), a result
    depends on the item alone."""
    ahead, threads = deque(), min(cores(), 8)
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        for future in ahead:
            yield future.result()


def start(device: torch.device):
    """Under torchrun: meets the other processes, over NCCL on CUDA and gloo elsewhere, and sets
    RANK and WORLD. Without it: nothing. Raises BadInput if the variables contradict each other."""
    global RANK, WORLD
    given = [os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")]
    if not all(text.isdecimal() for text in given) or int(given[0]) >= int(given[1]):
        raise BadInput(f"RANK={given[0]} WORLD_SIZE={given[1]}: RANK counts from 0 to WORLD_SIZE - "
                       "1; let torchrun set both, or unset them")
    RANK, WORLD = map(int, given)
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)    # as in workers: with more threads the last bits differ
        # Hours: ranks wait for the slowest one's images or prompts.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=12))


def local_device(name: str) -> str:
    """--device, where "auto" and "cuda" mean the GPU that torchrun gives to this process."""
    local = os.environ.get("LOCAL_RANK", "")
    given = local and name in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{local}" if given else name


def sum_over_all(tensors):
    """Each tensor becomes its sum over all processes, in place: one message for them all."""
    if WORLD == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(total.view_as(tensor))


def say(text: str):
    """Prints a line, beside progress bars; of several ranks the first one alone."""
    if RANK == 0:
        tqdm.write(text)


def wait():
    """Returns when every process has come here."""
    if WORLD > 1:
        dist.barrier()
