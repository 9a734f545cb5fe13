"""The plot of merging rules: harm against what is kept, drawn with pillow.

Gives:       plot().
"""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from model.tools.images import write

# Pixels: the left, right, upper and lower edge of the panel. It shows what is kept from 80 to 100%,
# and IP from 0 to 25%.
LEFT, RIGHT, UPPER, LOWER = 60, 620, 20, 440
COLOURS = "#1f5fbf", "#d1402f", "#2b8a3e", "#8a4fbf", "#c77c11"


def place(kept: float, harm: float):
    """(x, y) in pixels; what was kept less stands on the edge."""
    right = max(0, kept - 80) / 20
    return LEFT + (RIGHT - LEFT) * right, UPPER + (LOWER - UPPER) * (1 - harm / 25)


def plot(path: Path, curves):
    """Writes up to five curves, {name: [(kept, harm, mark)]}, as a PNG; a mark by each point."""
    image = Image.new("RGB", (RIGHT + 230, LOWER + 50), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(size=12)
    for i in range(6):
        kept, harm = 80 + 4 * i, 5 * i
        x, y = place(kept, harm)
        pen.line((x, UPPER, x, LOWER), "#e5e5e5")
        pen.line((LEFT, y, RIGHT, y), "#e5e5e5")
        pen.text((x, LOWER + 6), str(kept), "black", anchor="ma")
        pen.text((LEFT - 8, y), str(harm), "black", anchor="rm")
    pen.text(((LEFT + RIGHT) / 2, LOWER + 26), "kept, %: scenes, accessories, nothing added",
             "black", anchor="ma")
    pen.text((6, 2), "IP, %", "black")
    for k, (name, points) in enumerate(curves.items()):
        colour = COLOURS[k]
        pen.line([place(x, y) for x, y, _ in points], colour, 2)
        for *point, mark in points:
            x, y = place(*point)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
            pen.text((x + 5, y - 14), mark, colour)
        y = 30 + 20 * k
        pen.line((RIGHT + 14, y, RIGHT + 34, y), colour, 3)
        pen.text((RIGHT + 40, y), name, "black", anchor="lm")
    write(path, image)
