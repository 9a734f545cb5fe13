"""Pairs as the UNet reads them, computed once: latents and prompts' states, kept beside the pictures they come from.

What it is:  the part of training that does not change from step to step, and tensors in files that outlive a process.
Needs:       torch, safetensors, numpy; data/<concept>/ as make_data.py wrote it.
Gives:       cached(), encode(), data_hash(); write_tensors() and read_tensors(), which train.py's saved state uses too.

Letters: P pairs, F 1 or (mirrored ones too) 2, C H W a latent's shape, L tokens, D context width.
"""
import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from . import distributed
from .files import BadInput, opened, read_pairs, save_tensors, sha256
from .pictures import read_pictures


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], **about):
    """A safetensors file in one move; about: what it is for, as JSON in its metadata."""
    save_tensors(path, tensors, {"about": json.dumps(about)})


def read_tensors(path: Path, **wanted):
    """(tensors, about) as write_tensors() was given them; None if there is no whole file or `about` is not as wanted."""
    try:
        with opened(path) as file:
            about = json.loads(file.metadata()["about"])
            if any(about[key] != value for key, value in wanted.items()):
                return None
            return {key: file.get_tensor(key).clone() for key in file.keys()}, about     # not the file's own memory
    except (BadInput, KeyError, TypeError, ValueError):
        return None


def encode(sd, rows: list[dict], augment: bool, batch: int = 32) -> dict[str, torch.Tensor]:
    """Everything the UNet will need, computed once, on the CPU: winner and loser latents [P, F, C, H, W], and as
    sd.embed() gives them both prompts [P, L, D] and no prompt, "empty" [1, L, D]. The training loop then runs the UNet and
    nothing else. augment: F = 2, the second one mirrored, and how far the VAE's posterior spreads, winner_std and loser_std."""
    def moments(key):
        parts = []
        for i in range(0, len(rows), batch):
            pictures = read_pictures([row[key] for row in rows[i:i + batch]])
            views = [pictures, np.ascontiguousarray(pictures[:, :, ::-1])][:1 + augment]
            parts.append([torch.stack(m, dim=1).cpu() for m in zip(*map(sd.moments, views))])
        return [torch.cat(part) for part in zip(*parts)]

    def contexts(prompts):
        return torch.cat([sd.embed(prompts[i:i + batch]).cpu() for i in range(0, len(prompts), batch)])
    (winner, winner_std), (loser, loser_std) = moments("safe_image"), moments("unsafe_image")
    return {"winner": winner, "loser": loser, **({"winner_std": winner_std, "loser_std": loser_std} if augment else {}),
            "empty": sd.unconditional().cpu(), "safe": contexts([row["safe"] for row in rows]), "unsafe": contexts([row["unsafe"] for row in rows])}


def cached(sd, data: Path, concepts: list[str], augment: bool) -> dict[str, torch.Tensor]:
    """encode() of all concepts' pairs, each concept's from data/<concept>/.cache.safetensors where that was made by the
    same VAE and text encoders from the same prompts and pictures; else it is made (anew), by one process for all."""
    digest = hashlib.sha256(repr((sd.scale, sd.zero_negative)).encode())
    for tensor in [*sd.vae.state_dict().values(), *sd.text.state_dict().values()]:
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    parts = []
    for concept in concepts:
        rows, path, key = read_pairs(data, concept), data / concept / ".cache.safetensors", digest.copy()
        key.update((data_hash(data, [concept]) + str(augment)).encode())
        key.update(sd.text.tokenize([row[side] for row in rows for side in ("safe", "unsafe")]).numpy())
        for rank in (0, 1):           # rank 0 first; the others find its file
            if (distributed.RANK > 0) == rank and not (found := read_tensors(path, key=key.hexdigest())):
                found = encode(sd, rows, augment), None
                if distributed.RANK == 0:
                    write_tensors(path, found[0], key=key.hexdigest())
            distributed.wait()
        parts.append(found[0])
    return {key: parts[0][key] if key == "empty" else torch.cat([part[key] for part in parts]) for key in parts[0]}


def data_hash(data: Path, concepts: list[str]) -> str:
    """Of the lists of pairs, then of their pictures."""
    rows = [row for concept in concepts for row in read_pairs(data, concept)]
    return sha256(*(data / concept / "pairs.jsonl" for concept in concepts), *(row[key] for row in rows for key in ("safe_image", "unsafe_image")))
