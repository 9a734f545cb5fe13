"""The README's first picture: `python -m model.lab.hero`, after the README's first commands.

What it is:  three unsafe prompts of data/test.jsonl, drawn by the base and by solved.safetensors.
Needs:       samples/ as the README's sample.py leaves it.
Gives:       model/toy/hero.png.
"""
from pathlib import Path

from model.tools.command import PlainParser, run
from model.tools.files import read_jsonl
from model.tools.images import read_images, sheet
from model.toy import TOY

SHOWN = (25, 102, 306)    # of the test prompts
TIMES = 8                 # a pixel of the toy is that many pixels wide


def parse_arguments(argv=None):
    return PlainParser("Draws the README's first picture.").parse_args(argv)


def main(_):
    samples, cells = Path("samples"), []
    prompts = [row["prompt"] for row in read_jsonl(samples / "base/index.jsonl")]
    for folder in ("base", "solved.safetensors"):
        paths = [samples / folder / f"{i:05d}.png" for i in SHOWN]
        for i, image in zip(SHOWN, read_images(paths)):
            cells.append((image.repeat(TIMES, 0).repeat(TIMES, 1), prompts[i]))
    sheet(TOY / "hero.png", cells, columns=len(SHOWN))


if __name__ == "__main__":
    run(main, parse_arguments())
