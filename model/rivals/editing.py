"""Rivals that edit the weights of cross-attention: each a function prepare(sd, data, seed, knob) ->
draw(prompts, seeds) -> uint8 images [B, S, S, 3].

What it is:  uce    Unified Concept Editing (Gandikota et al. 2023, 2308.14761), in closed form
             esd    Erased Stable Diffusion, ESD-x (Gandikota et al. 2023, 2303.07345), by training
Needs:       the unwanted concepts' words, and no image; the UNet, which is changed in place. UCE
             also a safe word for them, and safe prompts that are to stay. Generating then costs
             what it did.
Gives:       those; edited(), erase_target().

Letters: B batch, C H W a latent's shape, n m token states, I O a layer's input and output width,
L tokens, D context width.
"""
import copy
from pathlib import Path

import torch
import torch.nn.functional as F

from model.rivals.guards import SEEN
from model.rivals.steering import STEPS, all_pairs, plain
from model.schedule import SAMPLERS
from model.tools.training import generator

PRESERVE, RIDGE = 0.1, 0.1          # UCE's, in its first release
GUIDE, KEPT = "a flower", 128
ETA, START_GUIDANCE = 1.0, 3.0
RATE, BATCH = 3e-4, 4               # ESD's for SD 1.4: 1e-5, 1


# ---- UCE

def edited(W, old, new, kept, erase: float, preserve: float, ridge: float) -> torch.Tensor:
    """The weight that answers to states `old` [n, I] as W [O, I] does to `new` [n, I], and to
    `kept` [m, I] as before: the least squares solution, with v* = W c_new,

        W' = (ridge W + erase sum v* c^T + preserve sum W c_j c_j^T)
             (ridge 1 + erase sum c c^T  + preserve sum c_j c_j^T)^-1
    """
    W64, old, new, kept = (x.double() for x in (W, old, new, kept))
    both = ridge * torch.eye(len(W.T)).to(W64) + preserve * kept.T @ kept
    right = both + erase * old.T @ old
    left = W64 @ (both + erase * new.T @ old)
    return torch.linalg.solve(right, left.T).T.to(W.dtype)    # right is symmetric


def last_words(sd, texts: list[str]) -> list[torch.Tensor]:
    """The states of each text's last word, and of all that comes after it, [k, D]."""
    ids, states = sd.text.tokenize(texts), sd.embed(texts).context.float()
    end = (ids == sd.text.tokenizers[0].eos_token_id).int().argmax(1)
    return [state[last - 1:] for state, last in zip(states, end)]


@torch.no_grad()
def uce(sd, data: Path, seed: int, knob: float):
    """Each seen word, by itself, becomes GUIDE: which word, the paper leaves to the user. Safe
    prompts of the pairs are kept. knob: the erase scale (published: 1)."""
    prompts, rng = [pair["safe"] for pair in all_pairs(data)], generator(seed, "uce")
    chosen = [prompts[i] for i in torch.randperm(len(prompts), generator=rng)[:KEPT]]
    kept = sd.embed(chosen).context.float().flatten(0, 1)
    guide, = last_words(sd, [GUIDE])
    words = [states[:len(guide)] for states in last_words(sd, SEEN)]
    old, new = torch.cat(words), torch.cat([guide[:len(states)] for states in words])
    for name, layer in sd.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layer.weight.copy_(edited(layer.weight, old, new, kept, knob, PRESERVE, RIDGE))
    return plain(sd)


# ---- ESD

def erase_target(concept: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """eps(x_t) - eta (eps(x_t, c) - eps(x_t)), of the frozen UNet, [B, C, H, W]: away from c."""
    return without - ETA * (concept - without)


@torch.no_grad()
def on_the_way(sd, prompt, seeds: list[int], rng) -> tuple[torch.Tensor, int]:
    """(x_t, t): the concept's own images, half drawn by the model that is edited, up to a step
    drawn at random; t anywhere from that step's noise level down to the next one's. prompt: of
    embed_guided()."""
    pairs, step = SAMPLERS["ddim"]
    pairs, x, memory = pairs(sd.schedule, STEPS), sd.start_noise(seeds, sd.size).to(sd.device), None
    stop = int(torch.randint(len(pairs), (), generator=rng))
    for t, s in pairs[:stop]:
        x, memory = step(sd.schedule, x, sd.guide(prompt, START_GUIDANCE, x, t), t, s, memory)
    t, s = pairs[stop]
    return x, int(torch.randint(max(s, 0), t + 1, (), generator=rng))


def esd(sd, data: Path, seed: int, knob: int):
    """All weights of cross-attention, by Adam; a step has BATCH random seen words. knob: steps."""
    frozen = copy.deepcopy(sd)
    parameters = [p for name, p in sd.unet.named_parameters() if ".attn2." in name]
    for p in parameters:
        p.requires_grad_(True)
    optimizer, states = torch.optim.Adam(parameters, RATE), sd.embed_guided(SEEN)
    for step in range(knob):
        rng = generator(seed, "esd", step)
        words = torch.randint(len(SEEN), (BATCH,), generator=rng)
        concept = states.map(lambda both: both[len(SEEN) + words])
        guided = states.map(lambda both: both[:BATCH]).followed_by(concept)    # without, and with
        starts = torch.randint(1 << 31, (BATCH,), generator=rng).tolist()
        x_t, t = on_the_way(sd, guided, starts, rng)
        times = torch.full((2 * BATCH,), t, device=sd.device)
        with torch.no_grad():
            without, asked = frozen.predict(x_t.repeat(2, 1, 1, 1), times, guided).chunk(2)
        loss = F.mse_loss(sd.predict(x_t, times[:BATCH], concept), erase_target(asked, without))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sd.unet.requires_grad_(False)
    return plain(sd)
