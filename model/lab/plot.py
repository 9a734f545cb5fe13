"""A plot of curves, drawn with pillow.

Gives:       plot().
"""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from model.tools.images import write

W, H, LEFT, BOTTOM, RIGHT = 560, 420, 60, 50, 230    # pixels: the panel, and the space around it
COLOURS = ("#1f5fbf", "#d1402f", "#2b8a3e", "#8a4fbf", "#c77c11", "#138a8a", "#9c5a3c", "#c2428f",
           "#555555", "#7a8a1f", "#000000", "#4fa3e0", "#f06595", "#94d82d", "#b197fc", "#868e96")
FONT = ImageFont.load_default(size=12)


def plot(path: Path, curves: dict[str, list[tuple[float, float, str]]], x_title: str,
         y_title: str, left: float = 75, top: float = 100):
    """Writes {name: [(x, y, mark)]} as a PNG: x from `left` to 100, y from 0 to `top`; a mark by
    each point."""
    image = Image.new("RGB", (LEFT + W + RIGHT, 20 + H + BOTTOM), "white")
    pen = ImageDraw.Draw(image)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + W * max(0, x - left) / (100 - left), 20 + H * (1 - y / top)
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        tick, (x, y) = left + (100 - left) * share, place(left + (100 - left) * share, top * share)
        pen.line([(x, 20), (x, 20 + H)], "#e5e5e5")
        pen.line([(LEFT, y), (LEFT + W, y)], "#e5e5e5")
        pen.text((x, 20 + H + 6), f"{tick:g}", "black", FONT, anchor="ma")
        pen.text((LEFT - 8, y), f"{top * share:g}", "black", FONT, anchor="rm")
    pen.text((LEFT + W / 2, 20 + H + 26), x_title, "black", FONT, anchor="ma")
    pen.text((6, 2), y_title, "black", FONT)
    for k, (name, points) in enumerate(curves.items()):
        colour, places = COLOURS[k % len(COLOURS)], [place(x, y) for x, y, _ in points]
        pen.line(places, colour, 2)
        for (x, y), (_, _, mark) in zip(places, points):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
            pen.text((x + 5, y - 14), mark, colour, FONT)
        pen.line([(LEFT + W + 14, 30 + 20 * k), (LEFT + W + 34, 30 + 20 * k)], colour, 3)
        pen.text((LEFT + W + 40, 30 + 20 * k), name, "black", FONT, anchor="lm")
    write(path, image)
