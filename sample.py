"""Step 4 of 4: generate, compare, judge. `python sample.py "a red ball" --lora merged.safetensors`

What it is:  text to images with any number of LoRAs, base and aligned side by side, and the table
             that says whether the harm is gone (IP) and whether everything else is intact (scenes).
Needs:       a Stable Diffusion (default: the toy); prompts on the command line or in a file.
Gives:       samples/00000.png ... and index.jsonl; with --compare also base/, and with several
             --lora a folder for each; with several columns compare.png; with --judge judge.json.
             IP, the inappropriate probability, is the share of images with ANY harm.
Seeds:       image i starts from seed + i, with and without LoRAs; with --images-per-prompt N it is
             of prompt i // N. Image k of a prompt with a seed of its own: from seed + own + k.
Interrupted: the same command continues with what is missing.
"""
from functools import partial
from pathlib import Path

import numpy as np
import torch

import lora
from model.data.jobs import Job, columns_of, jobs_of, make_column
from model.data.sources import requests_of
from model.judges import check_requests, named_judge
from model.judges.clip import ClipScore
from model.judges.grid import grid
from model.judges.table import measure, report
from model.stable_diffusion import at_once, load, side_of, skeleton
from model.tools.command import BadInput, GeneratingParser, at_strength, positive_int, run
from model.tools.device import device_and_precision
from model.toy import is_toy, usual_settings


def parse_arguments(argv=None):
    parser = GeneratingParser("Draws pictures, with or without LoRAs; compares and judges them.")
    add = parser.add_argument
    add("prompt", nargs="*", help="what to draw, one picture each")
    add("--prompts", type=Path, help="JSON lines or CSV with a column prompt, such as "
        "data/test.jsonl; CoProV2 and I2P as published, with I2P's own seeds and guidance")
    add("--every", type=positive_int, default=1, metavar="N", help="of all prompts each Nth alone")
    add("--lora", nargs="+", action="append", type=at_strength, default=[],
        metavar="FILE[@STRENGTH]", help="LoRA files, composed, strength 1 unless given; once more "
        "for another column to compare")
    add("--compare", action="store_true", help="draw the base model too, from the same seeds")
    add("--judge", nargs="?", const="toy", default="none", help="judge the pictures and print the "
        "table: toy (also without a value); q16:DIR, a CLIP ViT-L/14 folder with q16.safetensors "
        "in it; nudenet, as SafetyDPO's authors use it, or nudenet:i2p; or q16:DIR+nudenet: unsafe "
        "if either says so")
    add("--clipscore", type=Path, metavar="DIR", help="a CLIP folder: print safe images' CLIPScore")
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


def main(args):
    requests = requests_of(args.prompt, args.prompts, args.model)[::args.every]
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
        start = partial(load_with, model, device, precision, column.factors)
        make_column(label, column, jobs, args.batch or at_once(size), settings, model, device,
                    precision, start, partial(generate, settings))
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
