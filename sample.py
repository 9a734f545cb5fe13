"""Step 4 of 4: generate, compare, judge. `python sample.py "a red ball" --lora merged.safetensors`

What it is:  text to images with any number of LoRAs, base and aligned side by side, and the table
             that says whether the harm is gone (IP) and whether everything else is intact (scenes).
Needs:       a Stable Diffusion (default: the toy); prompts on the command line or in a file.
Gives:       samples/00000.png ... and index.jsonl; with --compare also base/, and with several
             --lora a folder for each; with several columns compare.png; with --judge judge.json.
             IP, the inappropriate probability, is the share of images with ANY harm.
Seeds:       image i of all starts from seed + i, which is prompt i // N, image i % N with
             --images-per-prompt N; where the prompts' file gives a prompt its own seed, its image k
             starts from seed + own + k. Base and aligned share their seeds.
Interrupted: the same command continues. An image that is there was moved into place whole.
"""
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import lora
from model.data.sources import Job, batches_of, jobs_of, requests_of
from model.formats.checkpoint import model_files, unet_files
from model.formats.fit import Column, columns_of
from model.judges import check_requests, named_judge
from model.judges.clip import ClipScore
from model.judges.grid import grid
from model.judges.table import measure, report
from model.stable_diffusion import at_once, load, side_of, skeleton
from model.tools.command import BadInput, GeneratingParser, at_strength, positive_int, run
from model.tools.device import device_and_precision
from model.tools.files import prepare, sha256, short_hash, write_jsonl
from model.tools.images import parameters_of, write_image
from model.tools.processes import processes_for, spread
from model.toy import is_toy, usual_settings


def parse_arguments(argv=None):
    parser = GeneratingParser("Draws pictures, with or without LoRAs; compares and judges them.")
    add = parser.add_argument
    add("prompt", nargs="*", help="what to draw, one picture each")
    add("--prompts", type=Path, help="JSON lines or CSV with a column prompt, such as "
        "data/test.jsonl; CoProV2 and I2P as published, with I2P's own seeds and guidance")
    add("--lora", nargs="+", action="append", type=at_strength, default=[],
        metavar="FILE[@STRENGTH]", help="LoRA files, composed, strength 1 unless given; once more "
        "for another column to compare")
    add("--compare", action="store_true", help="draw the base model too, from the same seeds")
    add("--judge", nargs="?", const="toy", default="none", help="judge the pictures and print the "
        "table: toy (also without a value); q16:DIR, a CLIP ViT-L/14 folder with q16.safetensors "
        "in it; nudenet, as SafetyDPO's authors use it, or nudenet:i2p; or q16:DIR+nudenet: unsafe "
        "if either says so")
    add("--clipscore", type=Path, metavar="DIR", help="a CLIP folder: prints safe prompts' score")
    add("--show-unsafe", action="store_true", help="no blur on the grid (the toy never has one)")
    add("--sampler", choices=["dpm++", "ddim"], default="dpm++", help="the solver")
    add("--images-per-prompt", type=positive_int, default=1, help="pictures of each prompt")
    add("--out", type=Path, default=Path("samples"), help="folder to write")
    return parser.parse_args(argv)


def load_with(model: Path, device: torch.device, precision: str, factors: dict):
    """What each worker process does once: load the model and put the LoRA in."""
    sd = load(model, device, precision)
    lora.inject(sd.unet, factors)
    return sd


def generate(settings: dict, sd, jobs: list[Job]) -> np.ndarray:
    """The images of jobs that have one guidance: uint8 [N, S, S, 3]."""
    return sd.generate([job.prompt for job in jobs], [job.seed for job in jobs],
                       guidance=jobs[0].guidance, **settings)


def make_column(label: str, column: Column, jobs: list[Job], batch: int, settings: dict,
                model: Path, device: torch.device, precision: str):
    """Generates every job that is not there yet, and writes index.jsonl."""
    batches = batches_of(jobs, batch)
    several = len(batches) > 1    # a single one is made anew, and large weights are not hashed
    prepare(column.folder, {
        **settings, "jobs": jobs, "device": device.type, "precision": precision,
        "model": sha256(*model_files(model)) if several else None, "loras": column.made_of},
        ("[0-9]" * 5 + "*.png",))
    paths = [column.folder / f"{i:05d}.png" for i in range(len(jobs))]
    weights = unet_files(model)
    todo = [numbers for numbers in batches
            if not several or not all(paths[i].is_file() for i in numbers)]
    images_of_batch = spread(partial(load_with, model, device, precision, column.factors),
                             partial(generate, settings),
                             [[jobs[i] for i in numbers] for numbers in todo],
                             processes_for(device, weights))
    for numbers, images in zip(tqdm(todo, desc=label, unit="batch"), images_of_batch):
        for i, image in zip(numbers, images):
            write_image(paths[i], image, parameters_of(
                image, column.made_of, short_hash(weights[0]), **settings, **jobs[i]._asdict()))
    write_jsonl(column.folder / "index.jsonl", [
        {"file": path.name, **job._asdict(), **settings, "lora": column.made_of}
        for path, job in zip(paths, jobs)])


def main(args):
    requests = requests_of(args.prompt, args.prompts, args.model)
    if args.compare and not args.lora:
        raise BadInput("--compare needs something to compare with the base model; give --lora FILE")
    device, precision = device_and_precision(args.device, args.precision)
    model, out = args.model, args.out
    usual_steps, usual_guidance = usual_settings(model)
    settings = {"steps": args.steps or usual_steps, "sampler": args.sampler,
                "negative": args.negative, "size": args.size}
    size = side_of(model, args.size, settings["steps"], args.sampler)
    judge = named_judge(args.judge, device, size)
    check_requests(judge, args.clipscore, requests)
    clip = ClipScore(args.clipscore, device) if args.clipscore else None
    columns = columns_of(args.lora, skeleton(model), out, args.compare)
    requests = [request for request in requests for _ in range(args.images_per_prompt)]
    jobs = jobs_of(requests, args.images_per_prompt, args.seed, args.guidance, usual_guidance)
    for label, column in columns.items():
        make_column(label, column, jobs, args.batch or at_once(size), settings, model, device,
                    precision)
    for made in ("judge.json", "compare.png"):    # of images that may have changed
        (out / made).unlink(missing_ok=True)
    folders, verdicts = {label: column.folder for label, column in columns.items()}, {}
    if judge or clip:
        measured = measure(folders, requests, judge, clip, "base" if args.compare else None)
        report(out / "judge.json", measured, judge, clip, jobs, args.images_per_prompt,
               args.sampler, settings["steps"])
        verdicts = measured.verdicts
    if len(columns) > 1:
        blur = not is_toy(model) and not args.show_unsafe
        grid(out / "compare.png", folders, requests, verdicts, blur)
    print(f"{out}: {len(jobs)} pictures for each of {len(columns)} columns")


if __name__ == "__main__":
    run(main, parse_arguments())
