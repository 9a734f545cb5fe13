"""Rivals that steer the sampling and change no weight: each a function
prepare(sd, data, seed, knob) -> generate(prompts, seeds) -> uint8 images [B, S, S, 3].

What it is:  negative_prompt           what guidance subtracts
             safe_latent_diffusion     SLD (Schramowski et al. 2022, 2211.05105)
             dual_latents              two streams of latents, one of them safe (Vice et al. 2024,
                                       2411.13982)
Needs:       the unwanted concepts' words; dual_latents also pairs of prompts, unsafe and safe. No
             training. Time at each step: none more for a negative prompt, a half more for SLD (a
             third prediction of the UNet), twice for two streams.

generate_safely() and two_streams() work with any StableDiffusion (model/formats/README.md). Their
defaults are the toy's: its steps and guidance, and as safety text the first two seen words of each
category, 14 tokens, all that it can read.

Letters: B images of a batch, C H W a latent's shape, S an image's side, L tokens, D context
width, t a timestep.
"""
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model.data.pairs import read_pairs
from model.schedule import SAMPLERS, sample
from model.text import Prompt
from model.toy import world
from model.toy.toy_judge import ToyJudge

STEPS, GUIDANCE, SAMPLER, BATCH = 10, 3.0, "dpm++", 16    # how sample.py generates the toy's images
SAFETY = " ".join(word for category in world.CATEGORIES
                  for word in world.seen_words(category)[:2])
APART = 0.2    # of dual_latents: the share of the first steps in which the streams do not meet
RIDGE = 0.1


def plain(sd):
    """As sample.py generates the toy's images."""
    return partial(sd.generate, steps=STEPS, guidance=GUIDANCE, sampler=SAMPLER)


def ip(images) -> float:
    """The share in % of the images (uint8 [B, S, S, 3]) in which the judge sees any harm."""
    verdicts = ToyJudge.load().judge(images)
    return 100 * float(np.mean([verdict.unsafe for verdict in verdicts]))


def in_batches(generate, prompts: list[str], seeds):
    """The images of many prompts, uint8 [N, S, S, 3]. generate: as plain() gives it."""
    return np.concatenate([generate(prompts[k:k + BATCH], seeds[k:k + BATCH])
                           for k in range(0, len(prompts), BATCH)])


def all_pairs(data: Path) -> list[dict]:
    return [pair for category in world.CATEGORIES for pair in read_pairs(data, category)]


def texts_of(pairs: list[dict]):
    """The pairs' unsafe prompts, and their safe ones."""
    return [pair["unsafe"] for pair in pairs], [pair["safe"] for pair in pairs]


def embedded(sd, pairs: list[dict]) -> list[Prompt]:
    return [sd.embed(texts) for texts in texts_of(pairs)]


def negative_prompt(sd, data, seed, knob):
    """eps = eps(negative) + guidance (eps(prompt) - eps(negative)).    knob: guidance"""
    return partial(plain(sd), guidance=knob, negative=SAFETY)


class Preset(NamedTuple):
    """Of SLD, as published. warm_up: in steps of 50."""
    warm_up: int
    scale: float        # s_S
    threshold: float    # lambda
    momentum: float     # s_m
    memory: float       # beta_m


PRESETS = {"weak": Preset(15, 20, 0.0, 0.0, 0.0), "medium": Preset(10, 1000, 0.01, 0.3, 0.4),
           "strong": Preset(7, 2000, 0.025, 0.5, 0.7), "max": Preset(0, 5000, 1.0, 0.5, 0.7)}


def safety_guidance(preset: Preset, prompt, without, safety, momentum):
    """(gamma, the next momentum nu), all [B, C, H, W]: what SLD takes from the guidance, of the
    UNet's predictions for the prompt (eps_p), to none (eps_0) and to the safety text (eps_S).

        mu = min(1, s_S |eps_p - eps_S|) where eps_p - eps_S < lambda, else 0
        gamma = mu (eps_S - eps_0) + s_m nu,        nu <- beta_m nu + (1 - beta_m) gamma
    """
    apart = prompt - safety
    mu = (preset.scale * apart.abs()).clamp(max=1) * (apart < preset.threshold)
    gamma = mu * (safety - without) + preset.momentum * momentum
    return gamma, preset.memory * momentum + (1 - preset.memory) * gamma


@torch.no_grad()
def sampled(sd, predict, seeds, steps=STEPS):
    """The images uint8 [B, S, S, 3] that predict(x_t, t) leads to."""
    noise = sd.start_noise(seeds, sd.size)
    return sd.decode(sample(predict, noise, sd.schedule, steps, SAMPLER))


@torch.no_grad()
def generate_safely(sd, prompts, seeds, preset: Preset, safety=SAFETY, steps=STEPS,
                    guidance=GUIDANCE):
    """SLD's images of prompts, uint8 [B, S, S, 3]: of eps_0 + s_g (eps_p - eps_0 - gamma), gamma
    from the end of the warm-up on. safety: what is unwanted, in words."""
    states = sd.embed_guided(prompts).followed_by(sd.embed([safety] * len(prompts)))    # 3B
    momentum, step = 0.0, 0

    def predict(x_t, t: int):
        nonlocal momentum, step
        times = torch.full((3 * len(x_t),), t, device=sd.device)
        output = sd.predict(x_t.repeat(3, 1, 1, 1), times, states).float()
        without, prompt, unwanted = output.chunk(3)
        gamma, momentum = safety_guidance(preset, prompt, without, unwanted, momentum)
        warm = step >= preset.warm_up * steps / 50
        step += 1
        return without + guidance * (prompt - without - gamma * warm)
    return sampled(sd, predict, seeds, steps)


def safe_latent_diffusion(sd, data, seed, knob):
    """knob: a published preset."""
    return partial(generate_safely, sd, preset=PRESETS[knob])


@torch.no_grad()
def two_streams(sd, prompts: Prompt, seeds, weight: float, steps=STEPS, guidance=GUIDANCE):
    """Images uint8 [B, S, S, 3] of both_prompts(), from the same noise. guidance: not 1.

        z <- (1 - weight) z + weight z_safe         after each step, once the layout stands
    """
    pairs, step = SAMPLERS[SAMPLER]
    both, memory = sd.start_noise(seeds, sd.size).repeat(2, 1, 1, 1), None
    for i, (t, s) in enumerate(pairs(sd.schedule, steps)):
        output = sd.guide(prompts, guidance, both, t)
        both, memory = step(sd.schedule, both, output, t, s, memory)
        z, z_safe = both.chunk(2)
        if i >= APART * steps:
            both = torch.cat([z + weight * (z_safe - z), z_safe])
    return sd.decode(both[:len(seeds)])


def safe_map(unsafe, safe):
    """The closest affine maps [L, D+1, D] of states [P, L, D], one for each place, that take the
    unsafe ones to their safe ones, and leave the safe ones as they are. Without places, of
    [P, D], it is one."""
    unsafe, safe = unsafe.double(), safe.double()
    x = with_one(torch.cat([unsafe, safe])).movedim(0, -2)      # [L, 2P, D+1]
    y = torch.cat([safe, safe]).movedim(0, -2)                  # [L, 2P, D]
    ridge = RIDGE * torch.eye(x.shape[-1], device=x.device).double()
    return torch.linalg.solve(x.mT @ x + ridge, x.mT @ y)


def with_one(states):
    return F.pad(states, (0, 1), value=1.0)


def mapped(states, maps):
    """States [B, L, D] or [B, D] through their safe_map()."""
    return (with_one(states.double()).movedim(0, -2) @ maps).movedim(-2, 0).to(states.dtype)


def both_prompts(sd, prompts, maps: Prompt) -> Prompt:
    """What guidance reads for the two streams of B prompts, 4B: no prompt for either, the prompts,
    and the prompts through the maps."""
    guided, B = sd.embed_guided(prompts), len(prompts)
    return guided[:B].followed_by(guided, guided[B:].map(mapped, maps))


def safe_maps(sd, pairs: list[dict]) -> Prompt:
    """safe_map() of the pairs' contexts, and for SDXL of their pooled vectors."""
    unsafe, safe = embedded(sd, pairs)
    return unsafe.map(safe_map, safe)


def dual_latents(sd, data, seed, knob):
    """[a reconstruction: of the paper we can read that there are two streams, of the prompt and of
    a safe embedding, a tunable weighted sum, and a threshold for the global context]
    knob: the weight. The safe stream reads the prompt's states through safe_maps()."""
    maps = safe_maps(sd, all_pairs(data))
    return lambda prompts, seeds: two_streams(sd, both_prompts(sd, prompts, maps), seeds, knob)
