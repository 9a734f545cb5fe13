"""Memory that tensors leave, kept for those that follow.

Needs:       nothing.
Gives:       keep_memory().
"""
from ctypes import CDLL

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3    # as malloc.h numbers them
KEPT = 2 ** 26    # bytes: what a layer leaves; the VAE's images are larger, and are given back


def keep_memory():
    """Of itself glibc gives memory back to the system after every layer, and the next one fetches
    it again, page by page: a tenth to a fifth of a UNet's time on a CPU (model/lab/results.md).
    After this call a process's main thread keeps it. Call it before there are others. Elsewhere
    (macOS, Windows, musl) nothing is changed."""
    try:
        mallopt = CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return
    # Up to glibc 2.34 half of it is the most. Without it, not to trim would do harm.
    if mallopt(MMAP_THRESHOLD, KEPT) or mallopt(MMAP_THRESHOLD, KEPT // 2):
        mallopt(TRIM_THRESHOLD, -1)    # never
