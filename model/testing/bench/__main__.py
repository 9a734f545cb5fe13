"""Speed and memory beside diffusers and PEFT. `python -m model.testing.bench picture`

    picture   pictures with guidance: SD 1.5 at 256 and 512 px (2 steps), SDXL at 512 and 1024 (1)
    train     a DPO step on SD 1.5: 256 px, one pair, a LoRA of rank 4, in fp32 and bf16
    merge     random experts of SD 1.5's 128 attention layers; and Co-Merge's pass beside a forward
    gpu       on CUDA, SD 1.5 at 512 px and SDXL at 1024 px, in bf16 (fp16 where it is emulated):
              a picture of 25 steps with guidance; a DPO step of 1 pair and of 4, the frozen weights
              and the peer's second UNet in half precision too; the most pairs that a step can have
              in 8, 16 and 24 GB; and merge.py with Co-Merge on 7 random experts

Models are full-size, their weights random; all but gpu runs on the CPU. Printed are seconds until
ready, from the start of Python; of the first and of the last round of work; and peak memory: each
the median of --rounds, in which the jobs take turns, and in brackets the ratio to the first row of
the table, lowest and highest of the rounds. inf: was stopped after LIMIT seconds, or ran out of a
GPU's memory.
"""
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from model.formats.lora_file import save
from model.formats.single_file import CONFIGS
from model.testing.checkpoints import full_size, random_lora
from model.stable_diffusion import skeleton
from model.tools.device import precision
from model.tools.command import BadInput, PlainParser, positive, run
from model.unet import UNet

LIMIT = 1800
# (title, our flags, PEFT's rule, its rank)
MERGES = [("sum", ["--method", "sum"], "cat", 4),
          ("average", ["--method", "average"], None, None),
          ("sum, to rank 4", ["--method", "sum", "--rank", "4"], "svd", 4),
          ("ties, to rank 28", ["--method", "ties", "--rank", "28"], "ties_svd", 28),
          ("dare, to rank 28", ["--method", "dare", "--density", "0.2", "--rank", "28"],
           "dare_linear_svd", 28)]


def parse_arguments(argv=None):
    parser = PlainParser("Measures speed and memory on random full-size models.")
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--rounds", type=positive, default=1, help="how often each job runs")
    parser.add_argument("--experts", type=positive, nargs="+", default=[7, 50, 700],
                        help="merge: of how many")
    return parser.parse_args(argv)


def measured(module: str, *words) -> list[float]:
    """[seconds until ready, of the first and of the last round, GiB] of one job."""
    command = [sys.executable, "-m", "model.testing.bench.clock", time.time(),
               f"model.testing.bench.{module}", *words]
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                              timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return [math.inf] * 4
    if done.returncode:
        sys.exit(done.stderr)
    ready, first, *_, peak = figures = json.loads(done.stdout.splitlines()[-1])
    return [ready, first, figures[-2], peak]


def compare(jobs: dict[str, tuple], rounds: int):
    """Runs these jobs {label: (module, function, words ...)} and prints their table."""
    figures = {label: [] for label in jobs}
    for _ in range(rounds):
        for label, job in jobs.items():
            figures[label].append(measured(*job))
    heads = "ready, s", "first, s", "last, s", "peak, GiB"
    print(f"{'':32}" + "".join(f"{head:>20}" for head in heads))
    first = next(iter(figures.values()))
    for label, rows in figures.items():
        cells = []
        for column, bases in zip(zip(*rows), zip(*first)):
            ratios = [value / base for value, base in zip(column, bases)]
            cells.append(f"{statistics.median(column):7.2f} "
                         f"({min(ratios):4.2f}-{max(ratios):4.2f})")
        print(f"{label:32}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


def picture(args, folder: Path):
    for family, steps, sides in (("SD 1", 2, (256, 512)), ("SDXL", 1, (512, 1024))):
        for dtype in ("float32", "bfloat16")[family == "SDXL":]:    # SDXL in fp32: 10 GB
            model = full_size(family, folder / family / dtype, getattr(torch, dtype))
            for side in sides:
                name = f"{family} {dtype} {side}"
                compare({f"diffusers, {name}": ("with_diffusers", "picture", model, dtype, side,
                                                steps),
                         f"ours, {name}": ("ours", "picture", model, "cpu", dtype, side, steps)},
                        args.rounds)


def train(args, folder: Path):
    model = full_size("SD 1", folder)
    ours = "ours", "step", model, 256, "--batch", 1, "--device", "cpu"
    compare({"one forward": ("ours", "forward", model), "ours": ours,
             "ours, --checkpointing": (*ours, "--checkpointing"),
             "ours, --precision bf16": (*ours, "--precision", "bf16"),
             "diffusers + PEFT": ("with_peft", "step", model, 256),
             "diffusers + PEFT, bf16": ("with_peft", "step", model, 256, 1, "cpu", "bf16")},
            args.rounds)


def merge(args, folder: Path):
    with torch.device("meta"):
        unet = UNet(CONFIGS["SD 1"]["unet"])
    model = full_size("SD 1", folder / "model")
    for n in args.experts:
        experts = folder / str(n)
        for i in range(n):
            save(experts / f"{i:03}.safetensors", random_lora(unet, i), {})
        for title, flags, rule, rank in MERGES:
            jobs = {f"ours, {n}: {title}": ("ours", "combine", experts, *flags)}
            if rule and n <= 100:    # PEFT would need 180,000 modules for 700
                jobs[f"PEFT, {n}: {rule}"] = ("with_peft", "combine", experts, rule, rank)
            compare(jobs, args.rounds)
        compare({"one forward": ("ours", "forward", model),
                 f"scoring {n} experts": ("ours", "score", model, experts)}, args.rounds)


def most(gb: int, module: str, *words) -> int:
    """Pairs in a step of that memory (largest.py)."""
    command = [sys.executable, "-m", "model.testing.bench.largest", gb,
               f"model.testing.bench.{module}", *words]
    return int(subprocess.check_output([str(word) for word in command]).split()[-1])


def gpu(args, folder: Path):
    if not torch.cuda.is_available():
        raise BadInput("gpu: torch finds no CUDA device here; use a machine with one")
    whole = torch.cuda.get_device_properties(0).total_memory
    half = str(precision(torch.device("cuda"))).removeprefix("torch.")
    print(f"{torch.cuda.get_device_name()}, {whole / 1e9:.1f} GB, {half}")
    for family, side in (("SD 1", 512), ("SDXL", 1024)):
        model, experts = folder / family, folder / f"{family} experts"
        full_size(family, model, getattr(torch, half))
        unet = skeleton(model)
        for i in range(7):
            save(experts / f"{i}.safetensors", random_lora(unet, i), {})
        print(f"\n{family}, a picture, and Co-Merge of 7")
        compare({"diffusers": ("with_diffusers", "picture", model, half, side, 25, "cuda"),
                 "ours": ("ours", "picture", model, "cuda", half, side, 25)}, args.rounds)
        compare({"Co-Merge": ("ours", "co_merge", model, experts, side, "cuda")}, args.rounds)
        ours = "ours", "step", model, side, "--device", "cuda", "--batch", "{}"
        peer = "with_peft", "step", model, side, "{}", "cuda", "auto"
        jobs = {"diffusers + PEFT": peer, "the same, checkpointing": (*peer, "checkpointing"),
                "ours": ours, "ours, --checkpointing": (*ours, "--checkpointing")}
        for pairs in (1, 4):
            print(f"\n{family}, a step; pairs: {pairs}")
            compare({label: [str(word).format(pairs) for word in job]
                     for label, job in jobs.items()}, args.rounds)
        for gb in (8, 16, 24):
            for label, (module, _, *words) in jobs.items():
                if gb * 1e9 <= whole:
                    print(f"{label:28}most pairs in {gb} GB: {most(gb, module, *words)}")


BENCHES = {"picture": picture, "train": train, "merge": merge, "gpu": gpu}


def main(args):
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        BENCHES[args.what](args, Path(folder))


if __name__ == "__main__":
    run(main, parse_arguments())
