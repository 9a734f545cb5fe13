"""Plots, drawn with pillow. `python -m model.lab.plot` draws results.md's merging at scale.

Gives:       plot().
"""
import math
import re
from collections import defaultdict
from pathlib import Path

from PIL import ImageFont

from model.tools.images import blank, write

LEFT, RIGHT, UPPER, LOWER = 60, 620, 20, 440    # pixels: the panel's edges
COLOURS = "#1f5fbf #d1402f #2b8a3e #8a4fbf #c77c11 #138a8a #9c5a3c #c2428f #777777".split()


def share(value: float, ticks, scale) -> float:
    """Where a value stands between the first and the last tick; what is less stands at the end."""
    low, at, high = map(scale, (ticks[0], value, ticks[-1]))
    return max(0, at - low) / (high - low)


def plot(path: Path, curves, titles: tuple[str, str], ticks: tuple, scale=float):
    """Writes up to nine curves, {name: [(x, y, mark)]}, as a PNG; a mark by each point. titles,
    ticks: of x and of y."""
    image, pen = blank(RIGHT + 230, LOWER + 50)
    pen.font = ImageFont.load_default(size=12)

    def place(x: float, y: float):
        return (LEFT + (RIGHT - LEFT) * share(x, ticks[0], scale),
                LOWER - (LOWER - UPPER) * share(y, ticks[1], scale))
    for x, y in zip(*ticks):
        right, up = place(x, y)
        pen.line((right, UPPER, right, LOWER), "#e5e5e5")
        pen.line((LEFT, up, RIGHT, up), "#e5e5e5")
        pen.text((right, LOWER + 6), str(x), "black", anchor="ma")
        pen.text((LEFT - 8, up), str(y), "black", anchor="rm")
    pen.text(((LEFT + RIGHT) / 2, LOWER + 26), titles[0], "black", anchor="ma")
    pen.text((6, 2), titles[1], "black")
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


if __name__ == "__main__":
    folder, curves = Path(__file__).parent, defaultdict(list)
    row = r"^(\S.*?) +(\d+) experts +([\d.]+) s"
    for rule, n, seconds in re.findall(row, (folder / "results.md").read_text(), re.M):
        curves[rule].append((float(n), float(seconds), ""))
    plot(folder / "scale.png", curves, ("experts", "s"),
         ((7, 22, 70, 221, 700), (0.1, 1, 10, 100, 1000)), math.log10)
