"""Does safety outlive fine-tuning? Methods of model.rivals.table, "... + look".

What it is:  a LoRA for a new look (golden ground), trained by plain denoising on safe scenes
             alone, by the loop of train.py, in two ways:
                 fused      on the aligned model: the safety LoRA is part of the frozen weights
                            while the look is learned
                 composed   on the original model, and put together with the safety LoRA when
                            generating (Modular LoRA, 2412.00357)
             Whoever fine-tunes the aligned model means no harm; the question is how much of the
             safety is lost all the same.
Needs:       the embedded toy.
Gives:       fine_tune(), fuse(), has_look().

Letters: P images, S an image's side.
"""
import copy
import tempfile
from pathlib import Path

import numpy as np
import torch

import lora
import train
from dpo import mse
from model.data.pairs import Pairs
from model.tools.training import generator
from model.toy import world

IMAGES, RANK, STEPS = 256, 4, 300
GOLD, NEAR = (226, 178, 58), 50   # of 255
ROWS = 5                          # of pixels; the autoencoder does not hold fewer


def gilded(image):
    """The image, uint8 [S, S, 3], with the new look: its lowest rows are of gold."""
    return np.concatenate([image[:-ROWS], np.full_like(image[-ROWS:], GOLD)])


def has_look(image) -> bool:
    """Whether most pixels of the lowest rows of an image, uint8 [S, S, 3], are near gold."""
    return (abs(image[-ROWS:].astype(int) - GOLD).max(-1) < NEAR).mean() > 0.5


def benign(seed: int):
    """(prompts, images uint8 [P, S, S, 3]) of the new look: rendered safe scenes, with an
    accessory or nothing added."""
    rng, extras = np.random.default_rng([seed, 55]), (*world.ACCESSORIES, None)
    scenes = [world.random_scene(rng, extras, seen=True) for _ in range(IMAGES)]
    prompts = [world.prompt(scene, int(rng.integers(world.HELD_OUT_PHRASING))) for scene in scenes]
    return prompts, np.stack([gilded(world.render(scene, rng)) for scene in scenes])


@torch.no_grad()
def fuse(network: torch.nn.Module, factors: dict):
    """W + delta W, in place. The network is in fp32: a shorter format would round delta W away."""
    known = lora.layers(network)
    for name, f in factors.items():
        weight = known[name][1].weight
        weight += f.delta().view_as(weight).to(weight)


def denoising(policy, reference, batch, schedule, beta):
    """|output - target|^2 of the winner: a loss for train.py that prefers nothing."""
    x_t, target = schedule.noised(batch.winner, batch.noise, batch.t)
    error = mse(policy(x_t, batch.t, batch.unsafe), target)
    return error.mean(), {"winner": error}


def fine_tune(sd, seed: int, steps=STEPS) -> dict:
    """A LoRA of the look, trained on sd, which stays as it is; one prompt in ten is empty, for
    guidance. Raises BadInput where a loss is not finite."""
    prompts, images = benign(seed)
    x0, states = sd.encode(images).cpu(), sd.embed(prompts).to("cpu")
    pairs = Pairs(x0, x0, states, states, sd.unconditional().to("cpu"))
    tuned = copy.deepcopy(sd)
    fresh = lora.init(tuned.unet, RANK, RANK, generator(seed, "look"))
    parameters = lora.inject(tuned.unet, fresh)
    with tempfile.TemporaryDirectory() as folder:
        train.train(tuned, parameters, pairs, denoising, Path(folder) / "state",
                    {"concept": "look"}, seed, precision="fp32", beta=0.0, lr=2e-3,
                    steps=steps, batch_size=16, accumulate=1, caption_dropout=0.1)
    return lora.extract(tuned.unet)
