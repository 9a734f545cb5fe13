"""Images from and to files: one by one, and on a labelled sheet; curves.

Needs:       pillow, numpy.
Gives:       as_seen(), read_images(), write_image(), parameters_of(), sheet(), blurred(),
             curves(); blank(), write().
"""
import json
import re
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from model.tools.command import BadInput
from model.tools.files import replacing

# Pixels: an image's side on the sheet (twice that from 256 on), the space around it, a text line.
CELL, GAP, LINE = 128, 6, 13
WIDTH, HEIGHT = 480, 120    # of a panel of curves
FONT = ImageFont.load_default(size=11)
A1111_SAMPLERS = {"dpm++": "DPM++ 2M", "ddim": "DDIM"}    # what A1111 calls ours


def as_seen(image: Image.Image) -> Image.Image:
    """The image in RGB as its writer saw it: turned as its EXIF says, 16-bit greys by their upper 8
    bits. Raises ValueError where a part is transparent: on what it was seen, no file says."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError("a part of it is transparent")
    if image.mode.startswith("I"):    # Pillow would make all that is above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def read_images(paths: list[Path]):
    """uint8 [N, H, W, 3]. Raises BadInput naming the file that is not an image, or not of the
    first one's size."""
    images = []
    for path in paths:
        try:
            images.append(as_seen(Image.open(path)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = f"{path}: not a readable image ({error}); make the data again"
            raise BadInput(reason) from None
        size, expected = ("{}x{}".format(*image.size) for image in (images[-1], images[0]))
        if size != expected:
            raise BadInput(f"{path}: {size} pixels where {paths[0]} has {expected}; make the data "
                           "again")
    return np.stack([np.asarray(image) for image in images])


def as_tensor(images, device="cpu"):
    """uint8 [N, H, W, 3] -> [N, 3, H, W] in [-1, 1], as VAE and judge read them."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def write_image(path: Path, image, parameters=""):
    """Writes uint8 [H, W, 3] as a PNG, whole or not at all. parameters: how it was made."""
    write(path, Image.fromarray(image), parameters)


def write(path: Path, image: Image.Image, parameters=""):
    notes = PngInfo()
    if parameters:
        notes.add_text("parameters", parameters)
    with replacing(path) as temporary:
        image.save(temporary, "png", pnginfo=notes)


def parameters_of(image, loras: list[tuple], model_hash: str, prompt: str,
                  negative: str, steps: int, sampler: str, guidance: float, seed: int, **_) -> str:
    """How an image (uint8 [H, W, 3]) was made, as A1111 writes it and its readers expect it.
    loras: (name, strength, hash, short hash)."""
    height, width, _ = image.shape
    names = [re.sub("[:,]", "", name) for name, *_ in loras]    # as A1111 does
    tags = [f" <lora:{name}:{strength:g}>" for name, (_, strength, *_) in zip(names, loras)]
    hashes = [f"{name}: {short}" for name, (*_, short) in zip(names, loras)]
    made = {"Steps": steps, "Sampler": A1111_SAMPLERS[sampler], "CFG scale": f"{guidance:g}",
            "Seed": seed, "Size": f"{width}x{height}", "Model hash": model_hash}
    if loras:
        made["Lora hashes"] = json.dumps(", ".join(hashes))
    prompt = "".join([prompt, *tags])
    lines = [prompt, f"Negative prompt: {negative}"] if negative else [prompt]
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in made.items())])


def blank(width: int, height: int):
    image = Image.new("RGB", (width, height), "white")
    return image, ImageDraw.Draw(image)


def sheet(path: Path, cells: list[tuple], columns: int, titles: tuple[str, ...] = (), row=0):
    """Writes cells (uint8 [S, S, 3], caption) row by row as a PNG, with optional column titles on
    top. A cell may have a third part, (note, colour), which stands above its caption. row: of a
    sheet that grows by such rows, the one that the cells are; those above it stay, those below go.

    Small images are enlarged by whole pixels, to show what the model made.
    """
    side = 2 * CELL if cells and len(cells[0][0]) >= 2 * CELL else CELL
    heads = [wrapped(side, (title, "black")) for title in titles]
    captions = [wrapped(side, *notes, (text, "black")) for _, text, *notes in cells]
    top = GAP + LINE * max(map(len, heads), default=0)
    step_x = side + GAP
    step_y = step_x + LINE * max(map(len, captions), default=0) + 2
    rows = -(-len(cells) // columns)
    canvas, pen = blank(columns * step_x + GAP, top + rows * step_y)
    texts = [(GAP + column * step_x, 3, head) for column, head in enumerate(heads)]
    for i, ((image, *_), caption) in enumerate(zip(cells, captions)):
        x, y = GAP + i % columns * step_x, top + i // columns * step_y
        scale = Image.Resampling.NEAREST if len(image) < CELL else Image.Resampling.LANCZOS
        canvas.paste(Image.fromarray(image).resize((side, side), scale), (x, y))
        texts.append((x, y + side + 1, caption))
    for x, y, lines in texts:
        for n, (line, colour) in enumerate(lines):
            pen.text((x, y + n * LINE), line, colour, FONT)
    if row and path.is_file():
        above = read_images([path])[0, :row * canvas.height]
        canvas = Image.fromarray(np.concatenate([above, canvas]))
    write(path, canvas)


def wrapped(width: int, *texts: tuple[str, str]):
    """(text, colour) in at most four lines of some `width` pixels each, one after the other."""
    return [(line, colour) for text, colour in texts
            for line in textwrap.wrap(text, width // 6)[:4]]    # a letter takes 6 pixels


def blurred(image):
    """The image (uint8 [S, S, 3]) out of focus: one sees something, and not what."""
    blur = ImageFilter.GaussianBlur(len(image) / 10)
    return np.asarray(Image.fromarray(image).filter(blur))


def curves(path: Path, series):
    """Writes one panel a series (name: a value a step) as a PNG: the smallest and largest value at
    the left, in as many digits as tell them apart. A point is the mean of several steps: one step's
    few pairs are mostly noise."""
    panel = HEIGHT + 3 * GAP + LINE
    image, pen = blank(WIDTH + 70, panel * len(series))
    for i, (name, values) in enumerate(series.items()):
        top, columns = i * panel + LINE + GAP, min(len(values), WIDTH // 4)
        means = np.array([part.mean() for part in np.array_split(np.array(values), columns)])
        low, high = means.min(), means.max()
        pen.text((60, top - LINE - 2), f"{name}, {len(values)} steps", "black", FONT)
        pen.rectangle((60, top, 60 + WIDTH, top + HEIGHT), outline="lightgray")
        labels = [(f"{high:.{digits}g}", f"{low:.{digits}g}") for digits in range(3, 8)]
        above, below = next((pair for pair in labels if pair[0] != pair[1]), labels[0])
        pen.text((GAP, top), above, "black", FONT)
        pen.text((GAP, top + HEIGHT - LINE), below, "black", FONT)
        x = 60 + WIDTH * (np.arange(columns) + 0.5) / columns
        flat = np.full(columns, 0.5)    # in the middle: at the edge it would not be seen
        y = top + HEIGHT * ((high - means) / (high - low) if high > low else flat)
        points = list(zip(x, y))
        pen.line(points if columns > 1 else points * 2, "black", 2)
    write(path, image)
