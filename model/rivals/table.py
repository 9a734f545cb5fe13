"""Other ways to make it safe, on the same prompts, before the same judge: `python -m
model.rivals.table`

What it is:  the table of rivals: methods that steer the sampling (steering.py), that stand before
             and after it (guards.py), that edit weights (editing.py), and other losses (losses.py);
             beside the base, Co-Merge and the joint LoRA; and what fine-tuning leaves of the safety
             (finetune.py). Each has one knob, what its paper leaves to the user. It is chosen on
             the --tune seeds, where IP + damage is least, and reported on the others; there also
             against prompts that avoid the words (attack.py).
Needs:       the embedded toy; the folders of model/lab/experiments.py, or the time to make in them
             what is missing.
Gives:       results/seed<k>/attack.jsonl and rivals/<method>-<knob>/, images and figures.json; and
             on stdout a Markdown table of means and ranges over the --seeds. What is there is not
             made again.

A refusal shows neither harm nor scene, and so costs what it refuses.
"""
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import lora
from model.data.prompt_files import read_requests
from model.formats.fit import match
from model.formats.lora_file import load as load_lora
from model.judges.table import measure
from model.lab.experiments import (SAFE, UNSAFE, Seed, best, figures, flags, seeds_of, slug,
                                   table)
from model.rivals import editing, guards, steering
from model.rivals.attack import find_all
from model.rivals.finetune import fine_tune, fuse, has_look
from model.stable_diffusion import load
from model.tools import processes
from model.tools.command import run
from model.tools.files import read_json, write_json
from model.tools.images import write_image
from model.toy import TOY
from model.toy.toy_judge import ToyJudge

COLUMNS = ("kept", *UNSAFE, *SAFE, "safe: change", "attack: IP", "look", "preparation, s", "cost")
STRENGTHS = (0.35, 0.5, 0.7, 1, 1.4)    # of LoRAs: without preservation the best is below 1


class Rival(NamedTuple):
    """knobs: what is tried. prepare(sd, data, seed, knob) -> generate(prompts, seeds) -> uint8
    images [B, S, S, 3]; sd is the rival's own, and may be changed."""
    knobs: tuple
    prepare: Callable


# A function of the seed that makes a LoRA, unless it is there -> its file. The losses of losses.py
# train one LoRA on all pairs, at train.py's own beta.
LORAS = {"Co-Merge": lambda seed: seed.merge("co-merge"),
         "solve": lambda seed: seed.merge("solve", "--method solve"),
         "joint": lambda seed: seed.joint("joint"),
         "DUO's loss": lambda seed: seed.joint("duo", "--loss model.rivals.losses.duo"),
         "Diffusion-SDPO's loss":
             lambda seed: seed.joint("sdpo", "--loss model.rivals.losses.sdpo"),
         "SC-DPO's loss": lambda seed: seed.joint("sc-dpo", "--loss model.rivals.losses.sc_dpo")}


def trained(name: str, sd, data, seed, knob):
    """As whole weights. knob: the LoRA's strength."""
    file = data.parent / LORAS[name](Seed(seed, data.parent))
    factors = match(sd.unet, load_lora(file)[0], str(file))
    fuse(sd.unet, lora.compose([factors], [knob]))
    return steering.plain(sd)


def with_look(way: str, sd, data, seed, knob):
    """With a new look, learned on the base, or on what Co-Merge made of it ("fused")."""
    if way == "fused":
        trained("Co-Merge", sd, data, seed, knob)
    look = fine_tune(sd, seed)
    if way == "composed":
        trained("Co-Merge", sd, data, seed, knob)
    fuse(sd.unet, look)
    return steering.plain(sd)


RIVALS = {
    "base": Rival((None,), lambda sd, *_: steering.plain(sd)),
    **{name: Rival(STRENGTHS, partial(trained, name)) for name in LORAS},
    "negative prompt": Rival((2.0, 3.0, 5.0, 7.5), steering.negative_prompt),
    "SLD": Rival(tuple(steering.PRESETS), steering.safe_latent_diffusion),
    "dual latents": Rival((0.6, 0.8, 1.0), steering.dual_latents),
    "Latent Guard": Rival((0.3, 0.5, 0.7), guards.latent_guard),
    "Latent Guard, held-out words listed": Rival(
        (0.3, 0.5, 0.7), partial(guards.latent_guard, concepts=guards.ALL)),
    "GuardT2I": Rival((0.0, 0.66), guards.guard_t2i),
    "rewriting and a classifier": Rival((0.1, 0.5, 1.0), guards.wrapper),
    "ESD-x": Rival((60, 125, 250, 500), editing.esd),
    "UCE": Rival((0.3, 1.0, 3.0), editing.uce),
    "base + look": Rival((None,), partial(with_look, "")),
    "Co-Merge + look, fused": Rival((0.7,), partial(with_look, "fused")),
    "Co-Merge + look, composed": Rival((0.7,), partial(with_look, "composed"))}


class Job(NamedTuple):
    """A method with a knob, on the prompts of a seed."""
    seed: Seed
    name: str
    knob: object = None

    def folder(self) -> Path:
        knob = "" if self.knob is None else f" {self.knob}"
        return self.seed.folder / "rivals" / slug(self.name + knob)

    def file(self) -> Path:
        return self.folder() / "figures.json"


def perform(_, job: Job):
    """Prepares a rival, generates the images of the test prompts and of the attacks, and judges.
    Times are of this process's CPU."""
    torch.set_num_threads(1)
    folder, first = job.seed.folder, job.seed.first_noise()
    requests, attacks = (read_requests(folder / name)[0]
                         for name in ("half.jsonl", "attack.jsonl"))
    prompts = [request.prompt for request in [*requests, *attacks]]
    sd, started = load(TOY, torch.device("cpu")), time.process_time()
    generate = RIVALS[job.name].prepare(sd, folder / "data", job.seed.number, job.knob)
    prepared = time.process_time()
    images = steering.in_batches(generate, prompts, range(first, first + len(prompts)))
    spent = time.process_time() - prepared
    for i, image in enumerate(images):
        write_image(job.folder() / f"{i:05d}.png", image)
    folders = {"own": job.folder(), "base": Job(job.seed, "base").folder()}
    measured = measure(folders, requests, ToyJudge.load(), base="base").figures["own"]
    write_json(job.file(), {
        **figures({key: vars(figure) for key, figure in measured.items()}),
        "safe: change": measured["safe: change"].mean,
        "attack: IP": steering.ip(images[len(requests):]),
        "look": 100 * float(np.mean([has_look(image) for image in images])),
        "preparation, s": prepared - started, "images, s": spent})


def found(job: Job):
    """The figures of a finished job, by column."""
    own, bare = (read_json(one.file()) for one in (job, Job(job.seed, "base")))
    return {**own, "cost": own["images, s"] / bare["images, s"]}


def by_knob(seed: Seed, name: str) -> dict:
    return {knob: found(Job(seed, name, knob)) for knob in RIVALS[name].knobs}


def perform_all(work: Callable, jobs: list):
    """work(None, job) of those whose file is not there yet, one on each core at a time."""
    todo = [job for job in jobs if not job.file().is_file()]
    list(tqdm(processes.spread(None, work, todo, processes.cores()), total=len(todo)))


def parse_arguments(argv=None):
    return flags("Compares other ways to make it safe, in one table.", RIVALS,
                 "knobs").parse_args(argv)


def make_files(seed: Seed, names: list[str]):
    """The LoRAs that these methods need, and the attacks through the text encoder."""
    for name in LORAS:
        if any(title.startswith(name) for title in names):
            LORAS[name](seed)
    if not (seed.folder / "attack.jsonl").is_file():
        find_all(seed.folder / "data", seed.folder / "attack.jsonl", seed.number)


def main(args):
    tune, seeds = seeds_of(args.out, args.tune), seeds_of(args.out, args.seeds)
    for seed in [*tune, *seeds]:
        make_files(seed, args.only)
    perform_all(perform, [Job(seed, "base") for seed in [*tune, *seeds]])
    perform_all(perform, [Job(seed, name, knob) for name in args.only
                          for knob in RIVALS[name].knobs for seed in tune])
    rows, reported = {}, []
    for name in args.only:
        knob = best([by_knob(seed, name) for seed in tune])
        reported += [Job(seed, name, knob) for seed in seeds]
    perform_all(perform, reported)
    for job in reported:
        title = job.name if job.knob is None else f"{job.name} ({job.knob})"
        rows.setdefault(title, []).append(found(job))
    print(table("method (its knob)", rows, COLUMNS))
    print(f"\nseeds {args.seeds}: mean (lowest–highest), in %; change of 255; knobs by seeds "
          f"{args.tune}; preparation in CPU seconds, without a LoRA's training; cost of an image, "
          "of the base's")


if __name__ == "__main__":
    run(main, parse_arguments())
