"""What a LoRA draws while it is trained: a sheet that grows by a row every few steps.

Gives:       previewer() for train.py.

A row shows the unsafe and the safe prompts of the first pairs, from the pairs' own seeds: row 0, of
step 0, is what the base model draws. Nothing is blurred, as on the data's sheet.png.
"""
from collections.abc import Callable
from pathlib import Path

from model.data.pairs import read_pairs
from model.stable_diffusion import Denoiser
from model.tools import processes
from model.tools.images import sheet
from model.toy import usual_settings

PAIRS = 2    # of which both prompts are drawn


def previewer(path: Path, model: Denoiser, data: Path, concept: str, side: int,
              every: int | None) -> Callable:
    """show(bar) yields the bar's steps, and before every so many of them, and after the last, draws
    a row of the sheet `path` with the LoRA as it is then; rows below it, of a training that was
    interrupted, go. Random numbers are those of the seeds alone: training stays the same. One
    process draws, and needs a StableDiffusion; where `every` is None none does, and a sheet of an
    expert before goes. side: of a latent."""
    if every is None:
        path.unlink(missing_ok=True)
    if every is None or processes.RANK > 0:
        return iter
    rows = read_pairs(data, concept)[:PAIRS]
    prompts = [row[kind] for kind in ("unsafe", "safe") for row in rows]
    seeds = [row.get("seed") or 0 for row in 2 * rows]

    def draw(step: int):
        images = model.generate(prompts, seeds, *usual_settings(model.path),
                                size=side * model.reduction)
        cells = [(*cell, (f"step {step}", "gray")) for cell in zip(images, prompts)]
        sheet(path, cells, len(cells), row=-(-step // every))

    def show(bar):
        for step in bar:
            if step % every == 0:
                draw(step)
            yield step
        draw(bar.total)
    return show
