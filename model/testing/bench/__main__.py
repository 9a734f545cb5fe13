"""Speed and memory, beside diffusers' and PEFT's. `python -m model.testing.bench image`

    image     an image with guidance: SD 1.5 at 256 and 512 px (2 steps), SDXL at 512 and 1024 (1)
    train     a DPO step on SD 1.5: 256 px, one pair, a LoRA of rank 4, in fp32 and bf16
    merge     random experts of SD 1.5's 128 attention layers; of rules that calibrate, first
              calibration on a pair each, beyond its forward; then the merge
    gpu       on CUDA, SD 1.5 at 512 px and SDXL at 1024 px, in bf16: an image of 25 steps with
              guidance; a DPO step of 1, 4 and 16 pairs, the frozen weights and the peer's second
              UNet in bf16 too

Models are full-size, their weights random; all but gpu runs on the CPU. Printed are seconds until
ready, from the start of Python; of the first and of the last round of work; and peak memory: each
the median of --rounds, in which the jobs take turns, and in brackets the ratio to the first row of
the table, lowest and highest of the rounds. inf: ran out of a GPU's memory.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from model.formats.lora_file import save
from model.stable_diffusion import skeleton
from model.testing.checkpoints import full_size, random_lora
from model.tools.command import BadInput, PlainParser, positive_int, run
from model.tools.device import PRECISIONS

HEADS = "ready, s", "first, s", "last, s", "peak, GiB"
MERGES = "sum", "ties --rank 28", "dare --density 0.2 --rank 28"
CALIBRATED = "co-merge", "regmean", "solve"


def parse_arguments(argv=None):
    parser = PlainParser("Measures speed and memory on random full-size models.")
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--rounds", type=positive_int, default=1, help="how often each job runs")
    parser.add_argument("--experts", type=positive_int, nargs="+", default=[7, 70],
                        help="merge: of how many")
    return parser.parse_args(argv)


def measured(job: str) -> list[float]:
    """[seconds until ready, of the first and of the last round, GiB] of a job, "module function
    word ...", in a process of its own."""
    module, *words = job.split()
    command = [sys.executable, "-m", "model.testing.bench.clock", str(time.time()),
               f"model.testing.bench.{module}", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    ready, first, *_, peak = figures = json.loads(done.stdout.splitlines()[-1])
    return [ready, first, figures[-2], peak]


def compare(rounds: int, jobs):
    """Runs these jobs, by their labels, and prints their table."""
    figures = {label: [] for label in jobs}
    for _ in range(rounds):
        for label, job in jobs.items():
            figures[label].append(measured(job))
    print(f"\n{'':32}" + "".join(f"{head:>20}" for head in HEADS))
    bases = torch.tensor(next(iter(figures.values())))    # [rounds, 4]
    for label, rows in figures.items():
        line, rows = f"{label:32}", torch.tensor(rows)
        for values, ratios in zip(rows.T.tolist(), (rows / bases).T.tolist()):
            median = statistics.median(values)
            line += f"{median:7.2f} ({min(ratios):4.2f}-{max(ratios):4.2f})".rjust(20)
        print(line, flush=True)


# A bench yields the jobs of a table, whose first row the others are compared with.

def image(folder: Path, experts):
    for family, steps, sides in (("SD 1", 2, (256, 512)), ("SDXL", 1, (512, 1024))):
        for dtype in ("fp32", "bf16")[family == "SDXL":]:    # SDXL in fp32: 10 GB
            model = full_size(family, folder / f"{steps}-{dtype}", PRECISIONS[dtype])
            for side in sides:
                title, job = f"{family} {dtype} {side}", f"image {model} {dtype} {side} {steps}"
                yield {f"diffusers, {title}": f"peers {job} cpu",
                       f"ours, {title}": f"ours {job} cpu"}


def train(folder: Path, experts):
    model = full_size("SD 1", folder / "model")
    ours, peer = f"ours step {model} 256 --device cpu --batch 1", f"peers step {model} 256 1 cpu"
    yield {
        "one forward": f"ours forward {model}", "ours": ours,
        "ours, --checkpointing": f"{ours} --checkpointing",
        "ours, --precision bf16": f"{ours} --precision bf16",
        "diffusers + PEFT": f"{peer} fp32", "diffusers + PEFT, bf16": f"{peer} bf16"}


def merge(folder: Path, experts: list[int]):
    model = full_size("SD 1", folder / "model")
    unet = skeleton(model)
    for n in experts:
        files = folder / str(n)
        for i in range(n):
            save(files / f"{i:03}.safetensors", random_lora(unet, i), {})
        yield ({"one forward": f"ours forward {model}"}
               | {f"{n}: {rule}": f"ours combine {files} --method {rule}" for rule in MERGES}
               | {f"{n}: {rule}": f"ours calibrated {model} {files} {rule}" for rule in CALIBRATED})


def gpu(folder: Path, experts):
    if not torch.cuda.is_available():
        raise BadInput("gpu: torch finds no CUDA device here; use a machine with one")
    print(torch.cuda.get_device_name())
    for family, side in (("SD 1", 512), ("SDXL", 1024)):
        model = full_size(family, folder / str(side), torch.bfloat16)
        job = f"image {model} bf16 {side} 25 cuda"
        yield {f"{family}: diffusers": f"peers {job}", "ours": f"ours {job}"}
        for pairs in (1, 4, 16):
            ours = f"ours step {model} {side} --device cuda --precision bf16 --batch {pairs}"
            peer = f"peers step {model} {side} {pairs} cuda bf16"
            yield {
                f"{pairs} pairs: diffusers + PEFT": peer,
                "the same, checkpointing": f"{peer} checkpointing",
                "ours": ours, "ours, --checkpointing": f"{ours} --checkpointing"}


BENCHES = {"image": image, "train": train, "merge": merge, "gpu": gpu}


def main(args):
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for jobs in BENCHES[args.what](Path(folder), args.experts):
            compare(args.rounds, jobs)


if __name__ == "__main__":
    run(main, parse_arguments())
