"""Pictures from and to files: one by one, and as labelled grids; curves; and heat maps.

Needs:       pillow, numpy.
Gives:       read_pictures(), sheet(), blurred(), curves(), heat_map().
"""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .files import BadInput, replacing

CELL, GAP, LINE = 128, 6, 13  # pixels: a picture's side on the sheet (twice that from 256 on), the space around it, a line of caption


def read_pictures(paths: list[Path]) -> np.ndarray:
    """uint8 [N, H, W, 3]. Raises BadInput naming the file that is not a picture, or not of the first one's size."""
    pictures = []
    for path in paths:
        try:
            pictures.append(np.asarray(Image.open(path).convert("RGB")))
        except (OSError, Image.DecompressionBombError) as error:
            raise BadInput(f"{path}: not a readable picture ({error}); make the data again") from None
        if pictures[-1].shape != pictures[0].shape:
            raise BadInput(f"{path}: {pictures[-1].shape[1]}x{pictures[-1].shape[0]} pixels where {paths[0]} has "
                           f"{pictures[0].shape[1]}x{pictures[0].shape[0]}; make the data again")
    return np.stack(pictures)


def sheet(path: Path, cells: list[tuple], columns: int, titles: tuple[str, ...] = ()):
    """Writes cells (uint8 [S, S, 3], caption) row by row as a PNG, with optional column titles on top. A cell may have a
    third part, (note, colour), a line that stands above its caption.

    Small pictures are enlarged by whole pixels, so that what the model drew is what one sees.
    """
    side = 2 * CELL if cells and cells[0][0].shape[0] >= 2 * CELL else CELL
    font = ImageFont.load_default(size=11)
    captions = [[(line, colour) for words, colour in (*notes, (text, "black")) for line in wrapped(words, font, side)]
                for _, text, *notes in cells]
    heads = [wrapped(title, font, side) for title in titles]
    lines, top = max(map(len, captions), default=0), GAP + LINE * max(map(len, heads), default=0)
    step_x, step_y = side + GAP, side + GAP + LINE * lines + 2
    image = Image.new("RGB", (columns * step_x + GAP, top + -(-len(cells) // columns) * step_y), "white")
    pen = ImageDraw.Draw(image)
    for column, head in enumerate(heads):
        for n, text in enumerate(head):
            pen.text((GAP + column * step_x, 3 + n * LINE), text, "black", font)
    for i, ((picture, *_), caption) in enumerate(zip(cells, captions)):
        x, y = GAP + i % columns * step_x, top + i // columns * step_y
        scale = Image.Resampling.NEAREST if picture.shape[0] < CELL else Image.Resampling.LANCZOS
        image.paste(Image.fromarray(picture).resize((side, side), scale), (x, y))
        for n, (text, colour) in enumerate(caption):
            pen.text((x, y + side + 1 + n * LINE), text, colour, font)
    with replacing(path) as temporary:
        image.save(temporary, "png")


def wrapped(text: str, font, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, at most four; a word that is wider than a line is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
        while font.getlength(lines[-1]) > width:
            fits = max(n for n in range(1, len(lines[-1])) if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines[:4] if text else []


def blurred(picture: np.ndarray) -> np.ndarray:
    """The picture (uint8 [S, S, 3]) out of focus: one sees that there is something, and not what."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(picture.shape[0] / 10)))


def curves(path: Path, series: dict[str, list[float]], width: int = 480, height: int = 120):
    """Writes one panel a series (name: a value a step) as a PNG: the smallest and largest value at the left, and each
    pixel's column the mean of its steps, since one step's few pairs are mostly noise."""
    font = ImageFont.load_default(size=11)
    image = Image.new("RGB", (width + 70, (height + 3 * GAP + LINE) * len(series)), "white")
    pen = ImageDraw.Draw(image)
    for i, (name, values) in enumerate(series.items()):
        top, columns = i * (height + 3 * GAP + LINE) + LINE + GAP, min(len(values), width // 4)
        means = [part.mean() for part in np.array_split(np.array(values), columns)]
        low, high = min(means), max(means)
        pen.text((60, top - LINE - 2), f"{name}, {len(values)} steps", "black", font)
        pen.rectangle((60, top, 60 + width, top + height), outline="lightgray")
        for value, y in ((high, top), (low, top + height - LINE)):
            pen.text((GAP, y), f"{value:.3g}", "black", font)
        points = [(60 + width * (n + 0.5) / columns, top + height * (1 - (m - low) / ((high - low) or 1))) for n, m in enumerate(means)]
        pen.line(points if columns > 1 else points * 2, "black", 2)
    with replacing(path) as temporary:
        image.save(temporary, "png")


def heat_map(path: Path, values: np.ndarray, rows: list[str], columns: list[str], title: str):
    """Writes values [R, C], all >= 0, as a PNG: white is 0, black the largest. A label beside each row, one above each
    column, read from below, and under the title what black stands for."""
    font, most = ImageFont.load_default(size=11), values.max() or 1.0
    width = lambda texts: max(int(font.getlength(text)) for text in texts) + 2 * GAP
    left, top = width(rows), width(columns) + 3 * LINE
    notes = (title, f"white 0, black {most:.3g}")
    image = Image.new("RGB", (max(left + len(columns) * LINE, width(notes)) + GAP, top + len(rows) * LINE + GAP), "white")
    pen = ImageDraw.Draw(image)
    for line, text in enumerate(notes):
        pen.text((GAP, line * LINE + 2), text, "black", font)
    for c, text in enumerate(columns):
        label = Image.new("RGB", (top - 3 * LINE, LINE), "white")
        ImageDraw.Draw(label).text((GAP, 0), text, "black", font)
        image.paste(label.rotate(90, expand=True), (left + c * LINE, 3 * LINE))
    for r, text in enumerate(rows):
        pen.text((GAP, top + r * LINE), text, "black", font)
        for c, value in enumerate(values[r]):
            gray = round(255 * (1 - value / most))
            pen.rectangle((left + c * LINE, top + r * LINE, left + (c + 1) * LINE - 1, top + (r + 1) * LINE - 1), (gray, gray, gray), "lightgray")
    with replacing(path) as temporary:
        image.save(temporary, "png")
