"""Work spread over processes: on a CPU, two small networks in two processes beat one in two threads.

Needs:       torch, tqdm.
Gives:       spread(), processes_for(), cores(); Chunk and digest(), work that survives interruption.
"""
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .files import BadInput, replacing, sha256

_STATE = None  # what make() built in this worker process: each process builds its own, once


def processes_for(device: torch.device, weights: list[Path]) -> int:
    """How many processes to use: one a CPU core where the network is small enough to fit in its cache and
    memory many times over (under 64 MB: the toy), else one, with all of torch's threads."""
    if device.type != "cpu" or sum(file.stat().st_size for file in weights) > 64e6:
        return 1
    return cores()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(make):
    global _STATE
    torch.set_num_threads(1)  # threads of several processes would fight for the same cores
    tqdm.set_lock(threading.RLock())  # its default lock is a semaphore, which leaks when an error ends the pool
    _STATE = make() if make else None


def _call(work, item):
    return work(_STATE, item)


def slot() -> int:
    """This worker's number, from 0: the line on which its progress bar is drawn. 0 where stderr is a file: there the
    signs that move between lines would only stand in front of an error."""
    identity = multiprocessing.current_process()._identity
    return identity[0] - 1 if identity and sys.stderr.isatty() else 0


def spread(make, work, items: list, processes: int):
    """Yields work(make(), item) for each item, in the order of the items.

    make and work are picklable (functions of a module, or functools.partial of one); make may be None. An
    item's result depends on the item alone, never on which process took it: every worker has one thread.
    Raises what work() raises, and BadInput if the system killed a worker; the other workers are ended first.
    """
    if processes > 1 and len(items) > 1:
        # Ctrl-C reaches every process of the terminal: the workers, who inherit this, leave it to us, and we end them with
        # SIGTERM, which train.py's workers take as a sign to save their state.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        pool = ProcessPoolExecutor(min(processes, len(items)), multiprocessing.get_context("spawn"), _start, (make,))
        futures = [pool.submit(_call, work, item) for item in items]
        signal.signal(signal.SIGINT, before)
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise BadInput("a worker process was killed, perhaps because memory ran out; run the same command again, with less beside it") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)      # nothing new begins
            for worker in multiprocessing.active_children():
                worker.terminate()
            pool.shutdown()
    else:
        if processes > 1:  # a small network and a single item: the same one thread, hence the same bytes
            torch.set_num_threads(1)
        state = make() if make else None
        yield from (work(state, item) for item in items)


@dataclass
class Chunk:
    """A unit of work that leaves `record`, a JSON file, when it is done. `plan`: a digest() of all that its result depends
    on, so that the record of another seed, model or prompt counts as none. items: what is to be made. folder: where its
    pictures are, if not in images/ beside the record's folder."""
    record: Path
    plan: str
    items: list
    folder: Path | None = None

    def done(self) -> dict | None:
        """The record, if it is of this plan and the pictures it lists (name -> SHA-256) are there and whole."""
        try:
            record = json.loads(self.record.read_text())
            images = self.folder or self.record.parent.parent / "images"
            whole = record["plan"] == self.plan and all(sha256(images / name) == value for name, value in record.get("pictures", {}).items())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if whole else None

    def write(self, record: dict):
        with replacing(self.record) as temporary:
            temporary.write_text(json.dumps({"plan": self.plan, **record}, indent=0) + "\n")

    def wait(self, alone: bool) -> dict:
        """The record, once whichever process has this chunk has written it."""
        while (record := self.done()) is None:
            if alone:
                raise BadInput(f"{self.record}: changed while it was being written; is another make_data.py writing to this folder?")
            time.sleep(0.5)
        return record


def digest(*parts) -> str:
    """Hex digest of anything that JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
