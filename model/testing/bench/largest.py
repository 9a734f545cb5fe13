"""Prints the most pairs whose training step fits into so many GB (10^9 bytes) of a GPU.

    python -m model.testing.bench.largest GB MODULE WORD ...

WORD: of MODULE's step(), with {} for the pairs. Counted is what torch allocates and caches; CUDA
itself takes some hundred MB more.
"""
import gc
import importlib
import sys
from itertools import islice

import torch


def largest(fits) -> int:
    """The largest n >= 1 with fits(n), which is true up to there and false beyond; 0: none is."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main(gb: str, module: str, *words: str) -> int:
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(float(gb) * 1e9 / whole)
    step = importlib.import_module(module).step

    def fits(pairs: int) -> bool:
        gc.collect()    # what the try before has left
        torch.cuda.empty_cache()
        try:
            list(islice(step(*(word.format(pairs) for word in words)), 2))    # ready; a step
        except torch.OutOfMemoryError:
            return False
        return True

    return largest(fits)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
