"""One job in a process of its own, so that peak memory is its own.

    python -m model.testing.bench.clock STARTED MODULE JOB WORD ...

A job is a generator: it yields when it is ready, and after each round of its work. Prints a JSON
list: the seconds of each of these stretches, the first one since STARTED, and the peak memory in
GiB, of the GPU if the job used it; all infinite if its memory was too small.
"""
import importlib
import json
import math
import sys
import time
from pathlib import Path

import torch

_, started, module, job, *words = sys.argv
times = [float(started)]
try:
    for _ in getattr(importlib.import_module(module), job)(*words):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()    # what was asked of a GPU may not be done yet
        times.append(time.time())
except torch.OutOfMemoryError:
    print(json.dumps([math.inf] * 3))
    sys.exit()
peak = torch.cuda.max_memory_allocated()
if not peak:    # resident pages, mapped files included; ru_maxrss would start with the parent's
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps([after - before for before, after in zip(times, times[1:])] + [peak / 2 ** 30]))
