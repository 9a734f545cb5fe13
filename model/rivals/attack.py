"""Ring-A-Bell (Tsai et al. 2023, 2310.10012): prompts that avoid a concept's words and still reach
it. model.rivals.table counts the harm that they generate, by each method.

What it is:      c = mean over pairs of E(unsafe) - E(safe)           E: the text encoder's output
                 p* = argmin over K tokens of |E(p) + ETA c - E(p*)|^2           p: a safe prompt
             by a genetic search. It sees the text encoder alone: no UNet, no gradient, neither the
             base nor the aligned model.
Needs:       data/<category>/pairs.jsonl for c.
Gives:       find_all(), a file of attack prompts.

The concept words are forbidden: a word filter in front of the model would stop them. What is
measured is whether OTHER tokens reach the concept: the grammar's, which are all that this text
encoder has learnt. An attack is a text, so a candidate is judged by what its text reads as. Rates
and population are the paper's. Its public code also mutates parents, and makes two children of a
pair.

Letters: N candidates, K tokens of a candidate, L tokens of a prompt with its ends and padding, D
context width, M tokens that are allowed.
"""
from functools import partial
from pathlib import Path

import numpy as np
import torch

from model.data.pairs import read_pairs
from model.rivals.steering import embedded
from model.stable_diffusion import load
from model.tools import processes
from model.tools.files import write_jsonl
from model.tools.training import generator
from model.toy import TOY, world

ETA, POPULATION, CROSSOVER, MUTATION = 3.0, 200, 0.5, 0.25
TOKENS = 14    # as many as the toy reads; the paper's: 16
GENERATIONS, ATTACKS = 60, 4    # of the search; on each category


def says(text: str) -> bool:
    """Whether a word filter stops it: a concept word, also inside another ("war" in "towards")."""
    return any(word in text.lower() for word in world.CATEGORY_OF)


def ids_of(sd, words):
    """The tokens [K] of words that are one token each."""
    tokenizer = sd.text.tokenizers[0]
    return torch.tensor(tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in words]))


def alphabet(sd):
    """Ids [M] of the tokens that a candidate may consist of: the grammar's harmless words."""
    return ids_of(sd, [word for word in world.vocabulary() if not says(word)]).sort().values


def target_of(sd, pairs: list[dict], prompt: str):
    """E(p) + ETA c [L, D]; c of pairs of prompts, "unsafe" and "safe"."""
    unsafe, safe = embedded(sd, pairs)
    return sd.embed([prompt]).context[0] + ETA * (unsafe.context - safe.context).mean(0)


def distances(sd, texts: list[str], target):
    """|target - E(text)|^2 [N], target [L, D]."""
    return (sd.embed(texts).context - target).square().sum((1, 2))


def children(parents, n: int, allowed, rng):
    """n crossed and mutated candidates [n, K] of parents [N, K]."""
    rand, randint = (partial(random, generator=rng) for random in (torch.rand, torch.randint))
    places = torch.arange(parents.shape[1])
    mother, father = parents[randint(len(parents), (2, n))]
    # The mother's tokens up to here, then the father's; of those that are not crossed, all.
    cut = randint(1, len(places), (n, 1)).where(rand(n, 1) < CROSSOVER, len(places))
    child = mother.where(places < cut, father)
    mutant = (places == randint(len(places), (n, 1))) & (rand(n, 1) < MUTATION)    # one token
    return allowed[randint(len(allowed), child.shape)].where(mutant, child)


@torch.no_grad()
def search(sd, target, rng: torch.Generator) -> str:
    """The prompt that is nearest to target [L, D], of POPULATION + GENERATIONS * POPULATION / 2
    candidates."""
    allowed, decode = alphabet(sd), sd.text.tokenizers[0].batch_decode
    tokens = allowed[torch.randint(len(allowed), (POPULATION, TOKENS), generator=rng)]
    costs = distances(sd, decode(tokens), target)    # [N]; tokens [N, K]
    for _ in range(GENERATIONS):
        best = costs.argsort(stable=True)[:POPULATION // 2]
        born = children(tokens[best], POPULATION - len(best), allowed, rng)
        tokens = torch.cat([tokens[best], born])
        costs = torch.cat([costs[best], distances(sd, decode(born), target)])
    return decode(tokens)[costs.argmin()]


def find(data: Path, seed: int, sd, category: str) -> list[dict]:
    """ATTACKS rows of a prompts' file: each starts from a safe prompt that no preference data
    shows."""
    pairs, rng = read_pairs(data, category), np.random.default_rng([seed, 77])
    return [{"prompt": search(sd, target_of(sd, pairs, start),
                              generator(seed, "attack", category, start)),
             "category": category, "start": start}
            for start in world.held_out_prompts(rng, (None,), ATTACKS)]


def find_all(data: Path, out: Path, seed: int):
    """Writes the attacks on every category to `out`, a file that sample.py --prompts reads."""
    torch.set_num_threads(1)    # the encoder's last digit, and so what is found, depend on it
    rows = processes.spread(partial(load, TOY, torch.device("cpu")), partial(find, data, seed),
                            list(world.CATEGORIES), processes.cores())
    write_jsonl(out, sum(rows, []))
