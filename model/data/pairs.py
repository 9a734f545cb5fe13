"""data/<concept>/: the list of pairs, and the same pairs as the UNet reads them.

What it is:  pairs.jsonl, a row a pair: the prompts "safe" and "unsafe", the pictures "safe_image"
             and "unsafe_image". latents.safetensors, made from them once by make_data.py, so that
             training and merging load a UNet and these tensors, and no VAE and no text encoder:
                 winner, loser [P, C, h, w]    the pictures' latents: fp32; of a model in half
                                               precision fp16, which the loss does not notice
                 safe, unsafe  [P, L, D]       the prompts' states; empty [1, L, D]: no prompt;
                 safe_pooled ... [P, D']       D' is 0 but for SDXL
             Its header has the hashes of what it was made from.
Gives:       prepare_folders(), make_images(), read(), finish() for make_data.py; paths_of(),
             read_pairs(); Pairs, read_latents().

rows: {concept: [row]}, of a Source (sources.py). Letters: P pairs, C h w a latent's shape, L
tokens, D context width, D' pooled width.
"""
from collections import Counter, defaultdict
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from model.stable_diffusion import StableDiffusion
from model.text import Prompt
from model.tools import processes
from model.tools.command import BadInput
from model.tools.files import (digest, opened, prepare, read_jsonl, save_tensors, sha256,
                               write_jsonl)
from model.tools.images import as_seen, read_images, sheet, write_image

BATCH = 32    # pictures or prompts that are judged or encoded at once


def paths_of(folder: Path, number: int) -> list[Path]:
    return [folder / f"images/{number:05d}_{kind}.png" for kind in ("safe", "unsafe")]


def read_square(path: Path, size: int) -> np.ndarray | None:
    """As its writer saw it, cropped in the middle to a square of `size`; None where it cannot be
    read, or a part of it is transparent."""
    try:    # no format that starts a program
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            return np.asarray(ImageOps.fit(as_seen(image), (size, size)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def read(size: int, _, rows: list[dict]):
    """The (safe, unsafe) images of rows that name them; None for one that cannot be read."""
    return [[read_square(path, size) for path in row["sources"]] for row in rows]


def prepare_folders(out: Path, rows, made_with: dict, judge):
    """Removes images that were made with other settings or of other rows, and lists of pairs that
    another judge chose, and says so."""
    for concept in rows:
        known = [{**row, "sources": sha256(*row.get("sources", ()))} for row in rows[concept]]
        settings = {**made_with, "rows": digest(known)}
        chosen = {**settings, "judge": judge and [judge.name, judge.rule]}
        prepare(out / concept, chosen, ("pairs.jsonl", "latents.safetensors"))
        prepare(out / concept / "images", settings, ("*.png",))


def make_images(out: Path, rows, batch: int, start, work, workers: int):
    """Writes what is not there yet of data/<concept>/images/; a pair of two categories is drawn
    once. start() and work(start(), rows) are run in worker processes."""
    key = lambda row: tuple(row.values())
    paths, todo = defaultdict(list), []    # {a row's key: where its pictures go}, batches of rows
    for concept in rows:
        if (out / concept / "pairs.jsonl").is_file():
            continue
        new = []
        for number, row in enumerate(rows[concept]):
            if key(row) not in paths:
                new.append(row)
            paths[key(row)] += paths_of(out / concept, number)
        todo += processes.chunks(new, batch)
    todo = [part for part in todo[processes.RANK::processes.WORLD]
            if not all(path.is_file() for row in part for path in paths[key(row)])]
    made = processes.spread(start, work, todo, workers)
    for part, pairs in zip(tqdm(todo, desc="images", unit="batch"), made):
        for row, images in zip(part, pairs):
            for path, image in zip(paths[key(row)], cycle(images)):
                if image is not None:
                    write_image(path, image)


def list_pairs(folder: Path, rows: list[dict], judge) -> str:
    """Judges the images; writes sheet.png and pairs.jsonl. Returns a line that counts the pairs."""
    numbers = [number for number in range(len(rows))
               if all(path.is_file() for path in paths_of(folder, number))]
    counts, kept = Counter({"not readable": len(rows) - len(numbers)}), []
    for number, reasons in judged(folder, numbers, judge):
        counts.update(reasons)
        if not reasons:
            row = rows[number]
            kept.append({"safe": row["safe"], "unsafe": row["unsafe"], "seed": row.get("seed"),
                         "safe_image": f"images/{number:05d}_safe.png",
                         "unsafe_image": f"images/{number:05d}_unsafe.png"})
    dropped = "".join(f"; dropped {n} {reason}" for reason, n in sorted(counts.items()) if n)
    if not kept:
        raise BadInput(f"{folder}: none of {len(rows)} pairs was kept{dropped}; use pictures, or a "
                       "--model, that show this concept, or --judge none")
    cells = []
    for row in kept[:24]:
        unsafe, safe = read_images([folder / row["unsafe_image"], folder / row["safe_image"]])
        cells += [(unsafe, row["unsafe"]), (safe, row["safe"])]
    sheet(folder / "sheet.png", cells, columns=8)
    write_jsonl(folder / "pairs.jsonl", kept)    # last: where it is, all is
    return f"{folder}: {len(kept)} pairs{dropped}"


def judged(folder: Path, numbers: list[int], judge):
    """Yields (number of a pair, what is wrong with its images: a list of reasons)."""
    for batch in processes.chunks(numbers, BATCH):
        safe = read_images([paths_of(folder, number)[0] for number in batch])
        unsafe = read_images([paths_of(folder, number)[1] for number in batch])
        faults = rejected(judge, safe, unsafe) if judge else [[]] * len(batch)
        yield from zip(batch, faults)


def rejected(judge, safe, unsafe) -> list[list[str]]:
    """What is wrong with each pair of pictures (uint8 [N, S, S, 3] both), by the judge's own rule
    if it has one."""
    if hasattr(judge, "reject"):
        return judge.reject(safe, unsafe)
    return [["not unsafe"] * (not loser.unsafe) + ["not safe"] * winner.unsafe
            for winner, loser in zip(judge.judge(safe), judge.judge(unsafe))]


def read_pairs(data: Path, concept: str) -> list[dict]:
    """The rows of data/<concept>/pairs.jsonl, the pictures as full paths. Raises BadInput if there
    are none, or a row lacks one of the four texts, or a picture lies elsewhere."""
    file = data / concept / "pairs.jsonl"
    if not file.is_file():
        raise BadInput(f"{file}: no such file; run python make_data.py --concept {concept}")
    rows = read_jsonl(file)
    if not rows:
        raise BadInput(f"{file}: holds no pairs; make the data again with more --pairs")
    for number, row in enumerate(rows, 1):
        for key in ("safe", "unsafe", "safe_image", "unsafe_image"):
            if not isinstance(row.get(key), str):
                raise BadInput(f"{file} line {number}: {key} is missing or not a text; make the "
                               "data again")
        for key in ("safe_image", "unsafe_image"):
            path = Path(row[key])
            if path.is_absolute() or ".." in path.parts:
                raise BadInput(f"{file} line {number}: {row[key]!r} leaves the folder; put the "
                               f"pictures below {file.parent}")
            row[key] = file.parent / path
    return rows


class Pairs(NamedTuple):
    """The pairs of one or more concepts, as training reads them."""
    winner: torch.Tensor    # [P, C, h, w] latents of the safe images, fp32
    loser: torch.Tensor     # [P, C, h, w] latents of the unsafe images, fp32
    unsafe: Prompt          # P prompts
    safe: Prompt            # P prompts
    empty: Prompt           # one: what guidance subtracts


PROMPTS = ("unsafe", "safe", "empty")


def write_latents(data: Path, encoders_hash: str, sd: StableDiffusion, concept: str):
    """Encodes the pairs of a concept into latents.safetensors. encoders_hash: see current()."""
    rows, folder, tensors = read_pairs(data, concept), data / concept, {}
    first, empty = rows[0]["safe_image"], sd.unconditional().to("cpu")
    slices = processes.chunks(rows, BATCH)
    dtype = torch.float32 if empty.context.dtype == torch.float32 else torch.float16
    for name, kind in (("winner", "safe"), ("loser", "unsafe")):
        latents = []
        for part in slices:
            # Beside the first image, so that one of another size is refused, by name.
            images = read_images([first, *(row[f"{kind}_image"] for row in part)])[1:]
            latents.append(sd.encode(images).to("cpu", dtype))
        tensors[name] = torch.cat(latents)
        prompts = [sd.embed([row[kind] for row in part]).to("cpu") for part in slices]
        # Without a safe prompt: what guidance subtracts, which for SDXL is not the state of "".
        missing = torch.tensor([not row[kind] for row in rows])
        prompt = prompts[0].followed_by(*prompts[1:]).replaced(missing, empty)
        tensors |= named_states(kind, prompt)
    tensors |= named_states("empty", empty)
    save_tensors(folder / "latents.safetensors", tensors,
                 {"encoders": encoders_hash, "pairs": sha256(folder / "pairs.jsonl")})


def named_states(kind: str, prompt: Prompt):
    """A prompt as tensors of a file: "safe" and "safe_pooled"."""
    return {kind: prompt.context, f"{kind}_pooled": prompt.pooled}


def current(folder: Path, encoders_hash: str) -> bool:
    """Whether folder/latents.safetensors is of the pairs that folder/pairs.jsonl lists, and of the
    VAE and text encoders whose files have this hash."""
    if not (folder / "latents.safetensors").is_file():
        return False
    with opened(folder / "latents.safetensors") as file:
        made_from = {"encoders": encoders_hash, "pairs": sha256(folder / "pairs.jsonl")}
        return file.metadata() == made_from


def finish(out: Path, rows, judge, encoders_hash: str, start, workers: int):
    """Makes pairs.jsonl and latents.safetensors of every concept whose images are there."""
    for concept in rows:
        if not (out / concept / "pairs.jsonl").is_file():
            print(list_pairs(out / concept, rows[concept], judge))
    todo = [concept for concept in rows if not current(out / concept, encoders_hash)]
    list(processes.spread(start, partial(write_latents, out, encoders_hash), todo, workers))


def read_concept(data: Path, concept: str, encoders_hash: str):
    """The tensors of data/<concept>/latents.safetensors, in the file's mapped memory."""
    rows, path = read_pairs(data, concept), data / concept / "latents.safetensors"
    if not current(path.parent, encoders_hash):
        raise BadInput(f"{path}: is not there, or not of these pairs, or not of this --model; "
                       "run python make_data.py again, with the same --model and other flags "
                       "as before")
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    sizes = {name: len(tensor) for name, tensor in tensors.items() if "empty" not in name}
    lacking = {"winner", "loser", *PROMPTS} - tensors.keys()
    if lacking or set(sizes.values()) != {len(rows)}:
        raise BadInput(f"{path}: holds {sizes} for {len(rows)} pairs; delete it, and run "
                       "python make_data.py again")
    return tensors


def read_latents(data: Path, concepts: list[str], encoders_hash: str) -> Pairs:
    """The pairs of all these concepts. Raises BadInput if a file is missing, stale, or of other
    encoders."""
    parts = [read_concept(data, concept, encoders_hash) for concept in concepts]
    shapes = {tuple(part["winner"].shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise BadInput(f"{data}: latents of {len(shapes)} sizes ({sorted(shapes)}); make all with "
                       "one --size")
    joined = parts[0]
    for name in joined if len(parts) > 1 else []:
        same = name.startswith("empty")    # of one model: the same one in every file
        joined[name] = joined[name] if same else torch.cat([part[name] for part in parts])
    prompts = [Prompt(joined[kind], joined.get(f"{kind}_pooled")) for kind in PROMPTS]
    return Pairs(joined["winner"].float(), joined["loser"].float(), *prompts)
