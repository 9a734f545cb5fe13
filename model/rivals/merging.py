"""Two more rules of merge.py: `python merge.py experts/* --method ties`

What it is:  TIES (2306.01708) and DARE (2311.03099). Both choose among the ENTRIES of each delta W,
             which therefore is made dense; merge.py re-compresses what comes out.
Gives:       ties(), dare(): rules as merge.py calls them, (list[Factors], Layer) -> Factors.

Letters: n experts, O and I a layer's output and input width.
"""
import torch

from lora import Factors


def dense(delta: torch.Tensor, kernel: tuple[int, ...]) -> Factors:
    """Any delta W [O, I] as factors: B = 1, A = delta W."""
    return Factors(delta, torch.eye(len(delta)), float(len(delta)), kernel)


def ties(parts, layer):
    """Trim each delta W_i of this layer to its largest entries by magnitude; elect for each entry
    the sign of the trimmed sum; average the entries that have that sign."""
    deltas = torch.stack([f.delta() for f in parts])    # [n, O, I]
    size, density = deltas.abs().flatten(1), layer.density or 0.2    # the published share
    smallest = size.shape[1] - max(1, int(density * size.shape[1])) + 1
    trimmed = deltas * (deltas.abs() >= size.kthvalue(smallest).values[:, None, None])
    elected = trimmed * (trimmed * trimmed.sum(0) > 0)
    return dense(elected.sum(0) / elected.count_nonzero(0).clamp(min=1), parts[0].kernel)


def dare(parts, layer):
    """Drop entries of each delta W_i at random; rescale the rest by 1/density, so that the mean
    over all draws is delta W_i; and sum."""
    deltas, density = torch.stack([f.delta() for f in parts]), layer.density or 0.5
    kept = torch.rand(deltas.shape, generator=layer.rng) < density
    return dense((deltas * kept / density).sum(0), parts[0].kernel)
