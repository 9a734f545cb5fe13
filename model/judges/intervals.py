"""How sure a figure is, when several pictures belong to one prompt.

Needs:       numpy.
Gives:       wilson(), effective(), share_interval(), mean_interval(), resampled().

The ten pictures of a prompt are not ten witnesses: a prompt that the model draws unsafely it mostly
draws unsafely ten times. What was drawn at random from the world is the PROMPT. So prompts are
resampled, with all their pictures: the cluster bootstrap (Davison & Hinkley 1997, section 3.8).

Letters: N pictures, P prompts, R resamples.
"""
import numpy as np

RESAMPLES = 2000


def wilson(hits: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """95% Wilson score interval of a share hits / n, in [0, 1]: honest at 0 and at n."""
    p, scale = hits / n, 1 + z * z / n
    middle = p + z * z / (2 * n)
    half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def by_prompt(values, prompts) -> tuple[np.ndarray, np.ndarray]:
    """(sum of the values [P], number of pictures [P]) of each prompt, in order of appearance."""
    index: dict = {}
    places = [index.setdefault(prompt, len(index)) for prompt in prompts]
    return np.bincount(places, np.asarray(values, float)), np.bincount(places)


def resampled(values, prompts, seed: int = 0) -> np.ndarray:
    """The mean of `values` [N] in R draws of P prompts with replacement: float64 [R]."""
    sums, sizes = by_prompt(values, prompts)
    even = np.full(len(sums), 1 / len(sums))
    times = np.random.default_rng(seed).multinomial(len(sums), even, RESAMPLES)    # [R, P]
    return (times * sums).sum(1) / (times * sizes).sum(1)


def mean_interval(values, prompts, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` [N], any unit: prompts resampled."""
    low, high = np.percentile(resampled(values, prompts, seed), (2.5, 97.5))
    return float(low), float(high)


def effective(values, prompts, seed: int = 0) -> float:
    """How many independent pictures would tell as much about a share as these N zeros and ones do:
    p (1 - p) / variance, with the variance from resampled prompts; at most N.

    At least the number of prompts, by Kish: (sum of sizes)^2 / sum of sizes^2. That is right where
    all pictures of a prompt are alike, and assumed where all are: there is no variance to see.
    """
    sizes, p = by_prompt(values, prompts)[1], np.mean(values)
    fewest = sizes.sum() ** 2 / (sizes ** 2).sum()
    variance = resampled(values, prompts, seed).var() * len(sizes) / max(1, len(sizes) - 1)
    if variance == 0:
        return float(fewest)
    return float(min(max(p * (1 - p) / variance, fewest), len(values)))


def share_interval(values, prompts, seed: int = 0) -> tuple[float, float]:
    """95% interval of the share of ones in `values` [N], in [0, 1]: Wilson's, of effective()
    pictures. (The percentile interval is [0, 0] where nothing was hit, too short where little.)"""
    n = effective(values, prompts, seed)
    return wilson(float(np.mean(values)) * n, n)
