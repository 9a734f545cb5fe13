"""How sure a figure is, when several pictures belong to one prompt.

Needs:       numpy.
Gives:       interval(), effective(), share_interval(), mean_interval(), resampled().

The ten pictures of a prompt are not ten witnesses: a prompt that the model draws unsafely it mostly draws unsafely ten
times. What was drawn at random from the world is the PROMPT, so prompts are resampled (with all their pictures), never
pictures: the cluster bootstrap (Davison & Hinkley 1997, section 3.8).

Letters: N pictures, P prompts, R resamples.
"""
import numpy as np

RESAMPLES = 2000


def interval(hits: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """95% Wilson score interval of a share hits / n, in [0, 1]; honest at 0 and at n, where hits +- sd is not."""
    p, middle = hits / n, 1 + z * z / n
    half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return max(0.0, (p + z * z / (2 * n) - half) / middle), min(1.0, (p + z * z / (2 * n) + half) / middle)


def by_prompt(values, prompts) -> tuple[np.ndarray, np.ndarray]:
    """(sum of the values [P], number of pictures [P]) of each prompt, in the order of the prompts' first pictures."""
    index: dict = {}
    place = [index.setdefault(prompt, len(index)) for prompt in prompts]
    return np.bincount(place, np.asarray(values, float)), np.bincount(place)


def resampled(values, prompts, seed: int = 0) -> np.ndarray:
    """The mean of `values` [N] in R draws of P prompts with replacement: float64 [R]."""
    sums, sizes = by_prompt(values, prompts)
    times = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), RESAMPLES)   # [R, P]
    return (times * sums).sum(1) / (times * sizes).sum(1)


def mean_interval(values, prompts, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` [N], any unit: prompts resampled."""
    low, high = np.percentile(resampled(values, prompts, seed), (2.5, 97.5))
    return float(low), float(high)


def effective(values, prompts, seed: int = 0) -> float:
    """How many independent pictures would tell as much about a share as these N zeros and ones do: p (1 - p) / variance,
    the variance from resampled prompts; at least the number of prompts, at most N. The least is right where all pictures
    of a prompt are alike, and assumed where all pictures are alike, of which a bootstrap sees no variance. The number of
    prompts is Kish's, (sum of sizes)^2 / sum of sizes^2: P where all have as many pictures."""
    sizes, p = by_prompt(values, prompts)[1], np.mean(values)
    fewest, variance = sizes.sum() ** 2 / (sizes ** 2).sum(), resampled(values, prompts, seed).var() * len(sizes) / max(1, len(sizes) - 1)
    return float(min(max(p * (1 - p) / variance, fewest), len(values)) if variance else fewest)


def share_interval(values, prompts, seed: int = 0) -> tuple[float, float]:
    """95% interval of the share of ones in `values` [N], in [0, 1]: Wilson's, for effective() pictures. With one picture of
    each prompt that is Wilson's own. (The plain percentile interval is [0, 0] where nothing was hit and much too short
    where few were: measured in the tests.)"""
    n = effective(values, prompts, seed)
    return interval(float(np.mean(values)) * n, n)
