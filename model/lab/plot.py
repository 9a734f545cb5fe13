"""A plot of curves, drawn with pillow.

Gives:       plot().
"""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from model.tools.images import write

# Pixels: the left, right, upper and lower edge of the panel.
LEFT, RIGHT, UPPER, LOWER = 60, 620, 20, 440
COLOURS = ("#1f5fbf", "#d1402f", "#2b8a3e", "#8a4fbf", "#c77c11", "#138a8a", "#9c5a3c", "#c2428f")


def plot(path: Path, curves: dict[str, list[tuple[float, float, str]]], x_title: str,
         y_title: str, left: float, top: float):
    """Writes up to eight curves, {name: [(x, y, mark)]}, as a PNG: x from `left` to 100, y from 0
    to `top`; a mark by each point."""
    image = Image.new("RGB", (RIGHT + 230, LOWER + 50), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(size=12)

    def place(x: float, y: float) -> tuple[float, float]:
        right = max(0, x - left) / (100 - left)
        return LEFT + (RIGHT - LEFT) * right, UPPER + (LOWER - UPPER) * (1 - y / top)
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        tick_x, tick_y = left + (100 - left) * share, top * share
        x, y = place(tick_x, tick_y)
        pen.line((x, UPPER, x, LOWER), "#e5e5e5")
        pen.line((LEFT, y, RIGHT, y), "#e5e5e5")
        pen.text((x, LOWER + 6), f"{tick_x:g}", "black", anchor="ma")
        pen.text((LEFT - 8, y), f"{tick_y:g}", "black", anchor="rm")
    pen.text(((LEFT + RIGHT) / 2, LOWER + 26), x_title, "black", anchor="ma")
    pen.text((6, 2), y_title, "black")
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
