"""The inputs that Co-Merge measures experts on: noised pictures with prompts, in batches.

What it is:  what the UNet meets while it samples the prompts that experts were trained to change.
Needs:       torch; data/<concept>/ as make_data.py wrote it, or a file of prompts.
Gives:       from_pairs(), from_prompts(): batches ([experts], x_t [B, C, h, w], t [B], context [B, L, D]).

Letters: B batch, C h w a latent's shape, L tokens, D context width.
"""
from pathlib import Path

import torch
from tqdm import tqdm

from .files import BadInput, read_jsonl, read_pairs
from .pictures import read_pictures
from .stable_diffusion import at_once, usual

PER_EXPERT = 24  # pairs of each expert
EVERY = None     # the category of a prompt that has none: it is one of every expert


def from_pairs(sd, data: Path, concepts: list[str], seed: int):
    """Batches ([expert], x_t, t, context) of the inputs that each expert was trained to change: its unsafe prompts, on
    the unsafe and on the safe picture, which is where sampling starts out and where it should end; all noise
    levels equally often."""
    generator = torch.Generator().manual_seed(seed)
    for i, concept in enumerate(tqdm(concepts, desc="calibrating")):
        rows = read_pairs(data, concept)[:PER_EXPERT]
        items = [(row["unsafe"], row[key]) for row in rows for key in ("unsafe_image", "safe_image")]
        yield from noised(sd, [i], [prompt for prompt, _ in items], lambda at: read_pictures([path for _, path in items[at]]), generator)


def from_prompts(sd, file: Path, concepts: list[str], seed: int):
    """The same from prompts alone, ([experts], x_t, t, context): the base model draws a picture for each, and that
    is noised. A prompt without a category is one of every expert."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    rows = read_jsonl(file) if file.suffix == ".jsonl" and lines else [{"prompt": line.strip()} for line in lines if line.strip()]
    wrong = next((n for n, row in enumerate(rows, 1) if not isinstance(row.get("prompt"), str)), None)
    if wrong or not rows:
        raise BadInput(f"--prompts {file}: " + (f"line {wrong} has no \"prompt\" text; add one" if wrong else "no such file, or no prompts in it"))
    prompts = {c: [row["prompt"] for row in rows if row.get("category", EVERY) == c] for c in (EVERY, *concepts)}
    without = [c for c in concepts if not prompts[c] + prompts[EVERY]]
    if without:
        raise BadInput(f"--prompts {file}: none of its {len(rows)} prompts has the category {without[0]}; add some, or leave out the categories")
    generator = torch.Generator().manual_seed(seed)
    for c, texts in tqdm(prompts.items(), desc="calibrating"):
        pictures = lambda at: sd.draw(texts[at], range(seed, seed + len(texts))[at], *usual(sd.path))
        yield from noised(sd, [i for i, concept in enumerate(concepts) if c in (EVERY, concept)], texts, pictures, generator)


def noised(sd, experts: list[int], prompts: list[str], pictures, generator):
    """Batches for these experts; pictures(slice): those of these prompts."""
    times = (torch.randperm(len(prompts), generator=generator) * sd.schedule.T // len(prompts)).to(sd.device)
    for k in range(0, len(prompts), batch := at_once(sd.size)):
        at = slice(k, k + batch)
        x0, t = sd.encode(pictures(at)), times[at]
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        yield experts, sd.schedule.add_noise(x0, noise, t), t, sd.embed(prompts[at])
