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

BATCH = 32    # pictures or prompts that are judged or encoded at once


def paths_of(folder: Path, number: int) -> list[Path]:
    return [folder / f"images/{number:05d}_{kind}.png" for kind in ("safe", "unsafe")]


def complete(folder: Path, number: int) -> bool:
    return all(path.is_file() for path in paths_of(folder, number))


def read_square(path: Path, size: int) -> np.ndarray | None:
    """Cropped in the middle to a square of `size`; None where it is not a readable picture."""
    try:    # no format that starts a program
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def list_pairs(folder: Path, rows: list[dict], judge) -> str:
    """Judges the pictures; writes sheet.png and pairs.jsonl. Returns a line that counts the
    pairs."""
    numbers = [number for number in range(len(rows)) if complete(folder, number)]
    counts, kept, cells = Counter({"not readable": len(rows) - len(numbers)}), [], []
    for k in range(0, len(numbers), BATCH):
        batch = numbers[k:k + BATCH]
        sides = zip(*(paths_of(folder, number) for number in batch))
        faults = judge.reject(*map(read_pictures, sides)) if judge else [()] * len(batch)
        for number, reasons in zip(batch, faults):
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
    for row in kept[:24]:
        pictures = read_pictures([folder / row["unsafe_image"], folder / row["safe_image"]])
        cells += zip(pictures, (row["unsafe"], row["safe"]))
    sheet(folder / "sheet.png", cells, columns=8)
    write_jsonl(folder / "pairs.jsonl", kept)    # last: where it is, all is
    return f"{folder}: {len(kept)} pairs{dropped}"


def read_pairs(data: Path, concept: str) -> list[dict]:
    """The rows of data/<concept>/pairs.jsonl, the pictures as full paths. Raises BadInput if there
    are none, or a row lacks one of the four texts, or a picture lies elsewhere."""
    file = data / concept / "pairs.jsonl"
    if not file.is_file():
        raise BadInput(f"{file}: no such file; run python make_data.py --concept {concept} "
                       "(without it, merge.py --method average merges LoRAs all the same)")
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


def in_slices(function, items: list) -> torch.Tensor:
    """function() of slices of the items, joined on the CPU."""
    return torch.cat([function(items[k:k + BATCH]).cpu() for k in range(0, len(items), BATCH)])


def write_latents(sd: StableDiffusion, data: Path, concept: str, encoders: str):
    """Encodes the pairs of a concept into latents.safetensors. encoders: see current()."""
    rows, folder, tensors = read_pairs(data, concept), data / concept, {}
    for name, kind in (("winner", "safe"), ("loser", "unsafe")):
        paths = [row[f"{kind}_image"] for row in rows]
        # Beside the first picture, so that one of another size is refused, by name.
        encode = lambda part: sd.encode(read_pictures([rows[0]["safe_image"], *part])[1:])
        tensors[name] = in_slices(encode, paths)
        tensors[kind] = in_slices(sd.embed, [row[kind] for row in rows])
    tensors["empty"] = sd.unconditional().cpu()
    # Without a safe prompt: what guidance subtracts, which for SDXL is not the state of "".
    tensors["safe"][[not row["safe"] for row in rows]] = tensors["empty"]
    save_tensors(folder / "latents.safetensors", tensors,
                 {"encoders": encoders, "pairs": sha256(folder / "pairs.jsonl")})


def current(folder: Path, encoders: str) -> bool:
    """Whether folder/latents.safetensors is of the pairs that folder/pairs.jsonl lists, and of the
    VAE and text encoders whose files have this hash."""
    if not (folder / "latents.safetensors").is_file():
        return False
    with opened(folder / "latents.safetensors") as file:
        return file.metadata() == {"encoders": encoders, "pairs": sha256(folder / "pairs.jsonl")}


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
        sizes = {name: len(tensor) for name, tensor in part.items() if name != "empty"}
        if set(sizes.values()) != {len(rows)}:
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
