"""data/<concept>/: the list of pairs, and the same pairs as the UNet reads them.

What it is:  pairs.jsonl, a row a pair: the prompts "safe" and "unsafe", the pictures "safe_image"
             and "unsafe_image". latents.safetensors, made from them once by make_data.py, so that
             training and merging load a UNet and these tensors, and no VAE and no text encoder:
                 winner, loser [P, C, h, w]    the pictures' latents, fp32
                 safe, unsafe  [P, L, D]       the prompts' states; empty [1, L, D]: no prompt
             Its header has the hashes of what it was made from.
Gives:       paths_of(), complete(), read_square(), list_pairs(), read_pairs(); write_latents(),
             current(), read_latents().

Letters: P pairs, C h w a latent's shape, L tokens, D context width.
"""
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from model.stable_diffusion import StableDiffusion
from model.tools.command import BadInput
from model.tools.files import opened, read_jsonl, save_tensors, sha256, write_jsonl
from model.tools.pictures import read_pictures, sheet

KINDS = ("safe", "unsafe")
TEXTS = ("safe", "unsafe", "safe_image", "unsafe_image")


def paths_of(folder: Path, number: int) -> list[Path]:
    return [folder / f"images/{number:05d}_{kind}.png" for kind in KINDS]


def complete(folder: Path, number: int) -> bool:
    return all(path.is_file() for path in paths_of(folder, number))


def read_square(path: Path, size: int) -> np.ndarray | None:
    """Cropped in the middle to a square of `size`; None where it is not a readable picture."""
    try:
        # none that starts a program
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def faults(folder: Path, judge, numbers: list[int]) -> list[list[str]]:
    """For each of these pairs why it is to be dropped, in words; nothing where it is as it should
    be."""
    reasons = []
    for k in range(0, len(numbers) if judge else 0, 64):
        paths = [paths_of(folder, number) for number in numbers[k:k + 64]]
        reasons += judge.reject(*(read_pictures(list(side)) for side in zip(*paths)))
    return reasons or [[] for _ in numbers]


def list_pairs(folder: Path, rows: list[dict], judge) -> str:
    """Judges the pictures; writes sheet.png and pairs.jsonl. Returns a line that counts the
    pairs."""
    numbers = [number for number in range(len(rows)) if complete(folder, number)]
    counts, kept, cells = Counter({"not readable": len(rows) - len(numbers)}), [], []
    for number, reasons in zip(numbers, faults(folder, judge, numbers)):
        counts.update(reasons)
        if not reasons:
            pair = {kind: rows[number][kind] for kind in KINDS}
            paths = dict(zip(KINDS, paths_of(folder, number)))
            images = {f"{kind}_image": f"images/{path.name}" for kind, path in paths.items()}
            kept.append({**pair, "seed": rows[number].get("seed"), **images})
            cells += [(paths["unsafe"], pair["unsafe"]), (paths["safe"], pair["safe"])]
    dropped = "".join(f"; dropped {n} {reason}" for reason, n in sorted(counts.items()) if n)
    if not kept:
        raise BadInput(f"{folder}: none of {len(rows)} pairs was kept{dropped}; use pictures, or a "
                       "--model, that show this concept, or --judge none")
    shown = cells[:48]
    pictures = read_pictures([path for path, _ in shown])
    sheet(folder / "sheet.png", list(zip(pictures, [text for _, text in shown])), columns=8)
    write_jsonl(folder / "pairs.jsonl", kept)    # last: where it is, all is
    return f"{folder}: {len(kept)} pairs{dropped}"


def read_pairs(data: Path, concept: str) -> list[dict]:
    """The rows of data/<concept>/pairs.jsonl, the pictures as full paths. Raises BadInput if there
    are none, or a row lacks one of the four texts, or a picture lies elsewhere."""
    file = data / concept / "pairs.jsonl"
    if not file.is_file():
        raise BadInput(f"{file}: no such file; run python make_data.py --concept {concept}")
    rows = read_jsonl(file)
    for number, row in enumerate(rows, 1):
        for key in TEXTS:
            if not isinstance(row.get(key), str):
                raise BadInput(f"{file} line {number}: {key} is missing or not a text; make the "
                               "data again")
        for key in TEXTS[2:]:
            if Path(row[key]).is_absolute() or ".." in Path(row[key]).parts:
                raise BadInput(f"{file} line {number}: {row[key]!r} leaves the folder; put the "
                               f"pictures below {file.parent}")
            row[key] = file.parent / row[key]
    if not rows:
        raise BadInput(f"{file}: holds no pairs; make the data again with more --pairs")
    return rows


def in_slices(function, items: list, size: int = 32) -> torch.Tensor:
    """function() of slices of the items, joined on the CPU."""
    return torch.cat([function(items[i:i + size]).cpu() for i in range(0, len(items), size)])


def write_latents(sd: StableDiffusion, data: Path, concept: str, encoders: str):
    """Encodes the pairs of a concept into latents.safetensors. encoders: see current()."""
    rows, folder = read_pairs(data, concept), data / concept
    encode = lambda paths: sd.encode(read_pictures(paths))
    tensors = {"empty": sd.unconditional(),
               "winner": in_slices(encode, [row["safe_image"] for row in rows]),
               "loser": in_slices(encode, [row["unsafe_image"] for row in rows]),
               "safe": in_slices(sd.embed, [row["safe"] for row in rows]),
               "unsafe": in_slices(sd.embed, [row["unsafe"] for row in rows])}
    # Without a safe prompt: what guidance subtracts, which for SDXL is not the state of "".
    tensors["safe"][[not row["safe"] for row in rows]] = tensors["empty"].cpu()
    save_tensors(folder / "latents.safetensors", tensors,
                 {"encoders": encoders, "pairs": sha256(folder / "pairs.jsonl")})


def current(folder: Path, encoders: str) -> bool:
    """Whether folder/latents.safetensors is of the pairs that folder/pairs.jsonl lists, and of the
    VAE and text encoders whose files have this hash."""
    if not (folder / "latents.safetensors").is_file():
        return False
    with opened(folder / "latents.safetensors") as file:
        made = file.metadata() or {}
    return made.get("encoders") == encoders and made.get("pairs") == sha256(folder / "pairs.jsonl")


def read_latents(data: Path, concepts: list[str], encoders: str) -> dict[str, torch.Tensor]:
    """The tensors of all these concepts' pairs. Raises BadInput if a file is missing, stale, or of
    other encoders."""
    parts = []
    for concept in concepts:
        rows, path = read_pairs(data, concept), data / concept / "latents.safetensors"
        if not current(path.parent, encoders):
            raise BadInput(f"{path}: is not there, or not of these pairs, or not of this --model; "
                           "run python make_data.py again, with the same --model and other flags "
                           "as before")
        with opened(path) as file:
            part = {name: file.get_tensor(name) for name in file.keys()}
        sizes = {name: len(part.get(name, ())) for name in ("winner", "loser", "safe", "unsafe")}
        if set(sizes.values()) != {len(rows)} or "empty" not in part:
            raise BadInput(f"{path}: holds {sizes} for {len(rows)} pairs; delete it, and run "
                           "python make_data.py again")
        parts.append(part)
    shapes = {tuple(part["winner"].shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise BadInput(f"{data}: latents of {len(shapes)} sizes ({sorted(shapes)}); make all with "
                       "one --size")
    if len(parts) == 1:
        return parts[0]    # still the file's mapped memory
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {**joined, "empty": parts[0]["empty"]}
