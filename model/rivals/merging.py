"""Two more rules of merge.py: `python merge.py experts/* --method ties`

What it is:  TIES (2306.01708) and DARE (2311.03099). Both choose among the ENTRIES of each delta W,
             which therefore is made dense; merge.py re-compresses what comes out.
Gives:       ties(), dare(): rules as merge.py calls them, (list[Factors], Layer) -> Factors.

Letters: n experts, O and I a layer's output and input width.
"""
import numpy as np
import torch
import torch.nn.functional as F

from lora import Factors


def dense(delta, kernel: tuple[int, ...]) -> Factors:
    """Any delta W [O, I] as factors: B = 1, A = delta W."""
    return Factors(delta, torch.eye(len(delta)), float(len(delta)), kernel)


def bound(delta, density: float) -> float:
    """Above it lie, by magnitude, the largest entries of delta W [O, I], this share of them, and
    what equals the least of those. Exact, by numpy's selection: torch's kthvalue takes seven times
    as long."""
    size = delta.abs().flatten().numpy()
    kept = max(1, int(density * len(size)))
    return np.nextafter(np.partition(size, -kept)[-kept], np.float32(-1)).item()


def ties(parts, layer):
    """Trim each delta W_i of this layer to its largest entries by magnitude; elect for each entry
    the sign of the trimmed sum; average the entries that have that sign. Memory holds one delta W_i
    at a time, and masks are fp32: on a CPU bool ones take five times as long."""
    bounds, total = [], 0.0
    for f in parts:
        delta = f.delta()
        bounds.append(bound(delta, layer.density or 0.2))    # the published share
        total += F.hardshrink(delta, bounds[-1])
    sign = total.sign()
    elected, voters = torch.zeros_like(sign), torch.zeros_like(sign)
    for f, least in zip(parts, bounds):
        agreeing = F.hardshrink(f.delta(), least).mul_(sign).clamp_(min=0)    # magnitudes
        elected += agreeing
        voters += agreeing.sign_()
    return dense(sign * elected / voters.clamp_(min=1), parts[0].kernel)


def dare(parts, layer):
    """Drop entries of each delta W_i at random; rescale the rest by 1/density, so that the mean
    over all draws is delta W_i; and sum."""
    density = layer.density or 0.5
    total = torch.zeros(len(parts[0].up), parts[0].down.shape[1])
    for f in parts:
        kept = torch.rand(total.shape, generator=layer.rng).lt_(density)    # 1, 0
        total.addcmul_(kept, f.delta())
    return dense(total / density, parts[0].kernel)
