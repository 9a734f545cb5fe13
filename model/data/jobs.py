"""What sample.py generates: a job an image, and a column of images a model.

Gives:       Job, jobs_of(); Column, columns_of(), make_column().
"""
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from lora import compose
from model.data.prompt_files import Request
from model.formats.checkpoint import model_files, unet_files
from model.formats.fit import match
from model.formats.lora_file import load
from model.tools.files import file_name, prepare, sha256, short_hash, tensors_hash, write_jsonl
from model.tools.images import parameters_of, write_image
from model.tools.processes import chunks, processes_for, spread


class Job(NamedTuple):
    """One image."""
    prompt: str
    seed: int
    guidance: float


def jobs_of(requests: list[Request], images_per_prompt: int, seed: int, guidance: float | None,
            usual_guidance: float) -> list[Job]:
    """One for each image; `requests` names each that often. The user's guidance comes before the
    file's, which comes before the usual one."""
    jobs = []
    for i, request in enumerate(requests):
        own = i if request.seed is None else request.seed + i % images_per_prompt
        wishes = (guidance, request.guidance, usual_guidance)
        wish = next(wish for wish in wishes if wish is not None)
        jobs.append(Job(request.prompt, seed + own, wish))
    return jobs


def batches_of(jobs: list[Job], size: int) -> list[list[int]]:
    """The jobs' numbers in batches: a batch has one guidance."""
    groups = {}
    for i, job in enumerate(jobs):
        groups.setdefault(job.guidance, []).append(i)
    return [batch for group in groups.values() for batch in chunks(group, size)]


class Column(NamedTuple):
    """One model to generate with: the base, or the base with LoRAs."""
    folder: Path
    factors: dict    # the LoRAs' sum
    made_of: list    # (name, strength, the file's hash, A1111's short hash) of each LoRA


def columns_of(loras: list[list[tuple[Path, float]]], network: nn.Module, out: Path,
               compare: bool) -> dict[str, Column]:
    """By label, in the order of the grid: LoRA files at their strengths. One --lora,
    or none, goes into `out` itself; several into a folder each. Raises BadInput as fitting()
    does."""
    columns = {"base": Column(out / "base", {}, [])} if compare else {}
    for files in loras or [[]]:
        names = [f"{path.name}@{strength:g}".removesuffix("@1") for path, strength in files]
        label = " + ".join(names) or "base"
        while label in columns:    # two files of one name
            label += " (again)"
        parts = [match(network, load(path)[0], str(path)) for path, _ in files]
        columns[label] = Column(
            out / file_name(label) if len(loras) > 1 else out,
            compose(parts, [strength for _, strength in files]),
            [(path.stem, strength, sha256(path), tensors_hash(path)) for path, strength in files])
    return columns


def make_column(label: str, column: Column, jobs: list[Job], batch: int, settings: dict,
                model: Path, device: torch.device, precision: str, start, work):
    """Writes each image that is not there yet, and index.jsonl. start() and work(start(), jobs of
    one guidance) -> uint8 [N, S, S, 3] are run in worker processes."""
    batches, weights = batches_of(jobs, batch), unet_files(model)
    several = len(batches) > 1    # a single one is made anew, and large weights are not hashed
    prepare(column.folder, {
        **settings, "jobs": jobs, "device": device.type, "precision": precision,
        "model": sha256(*model_files(model)) if several else None, "loras": column.made_of},
        ("[0-9]" * 5 + "*.png",))
    paths = [column.folder / f"{i:05d}.png" for i in range(len(jobs))]
    todo = [numbers for numbers in batches
            if not several or not all(paths[i].is_file() for i in numbers)]
    made = spread(start, work, [[jobs[i] for i in numbers] for numbers in todo],
                  processes_for(device, weights))
    for numbers, images in zip(tqdm(todo, desc=label, unit="batch"), made):
        for i, image in zip(numbers, images):
            write_image(paths[i], image, parameters_of(
                image, column.made_of, short_hash(weights[0]), **settings, **jobs[i]._asdict()))
    write_jsonl(column.folder / "index.jsonl", [
        {"file": path.name, **job._asdict(), **settings, "lora": column.made_of}
        for path, job in zip(paths, jobs)])
