"""Other ways to make it safe, on the same prompts, before the same judge: `python -m
model.rivals.table`

What it is:  the table of rivals: methods that steer the drawing (steering.py), that stand before
             and after it (guards.py), that edit weights (editing.py), and other losses (losses.py);
             beside the base, Co-Merge and the joint LoRA. Each has one knob, what its paper leaves
             to the user. It is chosen on the --tune seeds, where IP + damage is least, and reported
             on the others; there also against prompts that avoid the words (attack.py).
Needs:       the embedded toy; the folders of model/lab/experiments.py, or the time to make in them
             what is missing.
Gives:       results/seed<k>/attack.jsonl and rivals/<method>-<knob>/, pictures and judge.json; and
             on stdout a Markdown table of means and ranges over the --seeds; results/rivals.png, a
             picture of each method and category. What is there is not made again.

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
from lora import Factors
from model.formats.lora_file import load as load_lora
from model.judges.table import measure
from model.toy.toy_judge import ToyJudge
from model.rivals import attack, editing, guards, steering
from model.rivals.attack import BATCH
from model.lab.experiments import (SAFE, SCRIPTS, UNSAFE, Plan, Row, best_strength, cut_data,
                                   figures, first_noise, make_all, slug, table)
from model.stable_diffusion import load
from model.tools import processes
from model.tools.command import BadInput, PlainParser, natural, run
from model.tools.files import read_json, read_jsonl, write_json
from model.tools.pictures import read_pictures, sheet, write_picture
from model.toy import TOY, world

COLUMNS = ("kept", *UNSAFE, *SAFE, "safe: change", "attack: IP", "preparation, s", "cost")
STRENGTHS = (0.35, 0.5, 0.7, 1, 1.4)    # of LoRAs: without preservation the best is below 1


class Rival(NamedTuple):
    """needs: in words. knobs: what is tried. prepare(sd, data, seed, knob) -> draw(prompts, seeds)
    -> uint8 pictures [B, S, S, 3]; sd is the rival's own, and may be changed."""
    needs: str
    knobs: tuple
    prepare: Callable


def base(sd, data: Path, seed: int, knob: None):
    return steering.plain(sd)


# What experiments.py plans, so that the scripts make it: a function of the plan -> a LoRA's file.
# The losses of losses.py train one LoRA on all pairs, at train.py's own beta.
LORAS = {"Co-Merge": lambda plan: plan.merge(plan.train_all(), "co-merge"),
         "joint": lambda plan: plan.joint("joint, all experts' steps"),
         "DUO's loss": lambda plan: plan.joint("duo", "--loss model.rivals.losses.duo"),
         "Diffusion-SDPO's loss":
             lambda plan: plan.joint("sdpo", "--loss model.rivals.losses.sdpo"),
         "SC-DPO's loss": lambda plan: plan.joint("sc-dpo", "--loss model.rivals.losses.sc_dpo")}


def lora_of(name: str, sd, folder: Path) -> dict[str, Factors]:
    """The LoRA in the folder of a seed, as it fits sd.unet."""
    file = folder / LORAS[name](Plan([]))
    return match(sd.unet, load_lora(file)[0], str(file))


def trained(name: str, sd, data: Path, seed: int, knob: float):
    """knob: the LoRA's strength."""
    lora.inject(sd.unet, lora.compose([lora_of(name, sd, data.parent)], [knob]))
    return steering.plain(sd)


WORDS, TEXTS = "the words", "the words, pairs of prompts; training of a small network"
CLASSIFIER = "the words, pairs of pictures; training of a small network"
RIVALS = {
    "base": Rival("nothing", (None,), base),
    **{name: Rival("pairs; training of LoRAs", STRENGTHS, partial(trained, name))
       for name in LORAS},
    "negative prompt": Rival(WORDS, (2.0, 3.0, 5.0, 7.5), steering.negative_prompt),
    "SLD": Rival(WORDS, tuple(steering.PRESETS), steering.safe_latent_diffusion),
    "dual latents": Rival("pairs of prompts", (0.6, 0.8, 1.0), steering.dual_latents),
    "Latent Guard": Rival(TEXTS, (0.3, 0.5, 0.7), guards.latent_guard),
    "Latent Guard, held-out words listed": Rival(
        TEXTS, (0.3, 0.5, 0.7), partial(guards.latent_guard, concepts=guards.ALL)),
    "GuardT2I": Rival(TEXTS, (0.0, 0.66), guards.guard_t2i),
    "rewriting and a classifier": Rival(CLASSIFIER, (0.1, 0.5, 1.0), guards.wrapper),
    "ESD-x": Rival("the words; training of cross-attention", (60, 125, 250, 500), editing.esd),
    "UCE": Rival("the words, safe prompts", (0.3, 1.0, 3.0), editing.uce)}


class Job(NamedTuple):
    folder: Path    # of a seed
    seed: int
    name: str
    knob: object

    def place(self) -> str:
        knob = "" if self.knob is None else f" {self.knob}"
        return f"rivals/{slug(self.name + knob)}"

    def base(self) -> "Job":
        return self._replace(name="base", knob=None)

    def row(self) -> Row:
        return Row(f"{self.place()}/judge.json", list(world.CATEGORIES))


def perform(_, job: Job):
    """Prepares a rival, draws the test prompts as experiments.py has them drawn, and judges. Times
    are of this process's CPU."""
    torch.set_num_threads(1)
    (requests, _), (attacks, _) = (read_requests(job.folder / name)
                                   for name in ("half.jsonl", "attack.jsonl"))
    prompts = [request.prompt for request in [*requests, *attacks]]
    noise = range(first_noise(job.seed), first_noise(job.seed) + len(prompts))
    sd, times = load(TOY, torch.device("cpu")), [time.process_time()]
    draw = RIVALS[job.name].prepare(sd, job.folder / "data", job.seed, job.knob)
    times.append(time.process_time())
    drawn = [draw(prompts[k:k + BATCH], noise[k:k + BATCH]) for k in range(0, len(prompts), BATCH)]
    times.append(time.process_time())
    place, first = job.folder / job.place(), job.folder / job.base().place()
    drawn, judge = np.concatenate(drawn), ToyJudge.load(TOY / "judge")
    for i, picture in enumerate(drawn):
        write_picture(place / f"{i:05d}.png", picture)
    harm = [verdict.unsafe for verdict in judge.judge(drawn[len(requests):])]
    measured = measure({job.name: place, "base": first}, requests, judge, base="base")
    counts = {key: vars(figure) for key, figure in measured.figures[job.name].items()}
    write_json(place / "judge.json", {"columns": {job.name: counts},
                                      "attack: IP": 100 * float(np.mean(harm)),
                                      "preparation, s": times[1] - times[0],
                                      "drawing, s": (times[2] - times[1]) / len(prompts)})


def perform_all(jobs: list[Job], label: str):
    """Those that are not there yet, one on each core at a time."""
    todo = [job for job in jobs if not (job.folder / job.row().judged).is_file()]
    done = processes.spread(None, perform, todo, processes.cores())
    for _ in tqdm(done, desc=label, total=len(todo)):
        pass


def found(job: Job) -> dict[str, float]:
    """The figures of a finished job, by column."""
    own, bare = (read_json(one.folder / one.row().judged)
                 for one in (job, job.base()))
    change = own["columns"][job.name].get("safe: change", {"total": 0, "n": 1})    # the base's: 0
    return {**figures(job.folder, job.row()), "safe: change": change["total"] / change["n"],
            "attack: IP": own["attack: IP"], "preparation, s": own["preparation, s"],
            "cost": own["drawing, s"] / bare["drawing, s"]}


def show(jobs: list[Job], path: Path):
    """Writes a sheet of pictures of one seed, a method a column: of each category the first judged
    prompt with the held-out word, from one noise."""
    rows, cells = read_jsonl(jobs[0].folder / "half.jsonl"), []
    words = [world.parse(row["prompt"]).extra if row["category"] else None for row in rows]
    held_out = [world.held_out_word(category) for category in world.CATEGORIES]
    for number in [words.index(word) for word in held_out if word in words]:
        paths = [job.folder / job.place() / f"{number:05d}.png" for job in jobs]
        texts = [rows[number]["prompt"]] + [""] * (len(jobs) - 1)
        cells += zip(read_pictures(paths), texts)
    sheet(path, cells, len(jobs), tuple(job.name for job in jobs))


def parse_arguments(argv=None):
    parser = PlainParser("Compares other ways to make it safe, for several seeds, in one table.")
    add = parser.add_argument
    add("--seeds", type=natural, nargs="+", default=[0, 1, 2], help="seeds that are reported")
    add("--tune", type=natural, nargs="+", default=[100], help="seeds that knobs are chosen on")
    add("--only", nargs="+", choices=RIVALS, default=list(RIVALS), help="which methods")
    add("--out", type=Path, default=Path("results"), help="folder to write")
    return parser.parse_args(argv)


def find_attacks(seed: int, folder: Path):
    """attack.jsonl: prompts without a concept's word, found through the text encoder."""
    if not (folder / "attack.jsonl").is_file():
        words = "--data", folder / "data", "--out", folder / "attack.jsonl", "--seed", seed
        args, sd = attack.parse_arguments(list(map(str, words))), load(TOY, torch.device("cpu"))
        attack.find_all(args, sd, attack.shifts_of(args, sd))


def make_files(names: list[str], folders: dict[int, Path]):
    """The data, the prompts to judge, the attacks, and the LoRAs that these methods need."""
    plan = Plan([])
    for name in names:
        if name in LORAS:
            LORAS[name](plan)
    planned = {(seed, folder): plan for seed, folder in folders.items()}
    for script in SCRIPTS[:3]:
        if make_all(script, planned):
            raise BadInput(f"{script}.py failed; mend what it says above, and run this again")
    for seed, folder in folders.items():
        cut_data(folder, plan)
        find_attacks(seed, folder)


def main(args):
    folders = {seed: args.out.resolve() / f"seed{seed}" for seed in [*args.tune, *args.seeds]}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    make_files(args.only, folders)
    jobs_of = lambda seeds, name, knobs: [Job(folders[seed], seed, name, knob)
                                          for seed in seeds for knob in knobs]
    perform_all(jobs_of(folders, "base", (None,)), "base")
    tried = {name: jobs_of(args.tune, name, RIVALS[name].knobs) for name in args.only}
    perform_all(sum(tried.values(), []), "choosing knobs")
    best, tuned = {}, [folders[seed] for seed in args.tune]
    for name, jobs in tried.items():
        best[name] = best_strength(tuned, {job.knob: job.row() for job in jobs})
    reported = {name: jobs_of(args.seeds, name, (knob,)) for name, knob in best.items()}
    perform_all(sum(reported.values(), []), "reporting")
    rows = {name if best[name] is None else f"{name} ({best[name]})": list(map(found, jobs))
            for name, jobs in reported.items()}
    print(table("method (its knob)", rows, COLUMNS))
    print(f"\nseeds {args.seeds}: mean (lowest–highest), in %; change of 255; knobs by seeds "
          f"{args.tune}; preparation in CPU seconds, without a LoRA's training; cost of a picture, "
          "of the base's\n")
    for name in args.only:
        print(f"- {name} needs: {RIVALS[name].needs}")
    show([jobs[0] for jobs in reported.values()], args.out / "rivals.png")


if __name__ == "__main__":
    run(main, parse_arguments())
