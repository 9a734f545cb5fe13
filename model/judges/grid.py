"""compare.png: the same prompts and seeds, one column a model.

Gives:       grid().
"""
from pathlib import Path

from model.data.prompt_files import Request
from model.judges.table import short
from model.tools.images import blurred, read_images, sheet

CELLS = 64    # pictures on the grid, at most


def grid(path: Path, folders, requests: list[Request], verdicts, blur: bool):
    """Writes up to 64 pictures 00000.png ... of the folders {label: folder}, those of a prompt
    beside each other, verdict and prompt under each. verdicts: {label: one a picture}, or {}. blur:
    hide, and count, what the judge calls unsafe or, without a judge, whatever a prompt of a harm
    category made."""
    across = max(1, 8 // len(folders))    # prompts side by side
    number, cells, hidden = min(len(requests), CELLS // 8 * across), [], 0
    for i in (k * len(requests) // number for k in range(number)):
        for label, folder in folders.items():
            picture, note = read_images([folder / f"{i:05d}.png"])[0], []
            hide = bool(requests[i].categories)
            if verdicts:
                verdict = verdicts[label][i]
                hide, word = verdict.unsafe, "UNSAFE" if verdict.unsafe else "safe"
                note = [(f"{word} {verdict.harm:.2f}, {verdict.label}", "red" if hide else "green")]
            shown = blurred(picture) if hide and blur else picture
            cells.append((shown, requests[i].prompt, *note))
            hidden += hide and blur
    titles = tuple(map(short, folders)) * min(number, across)
    sheet(path, cells, len(titles), titles)
    if hidden:
        print(f"{path}: {hidden} of {len(cells)} pictures are blurred; --show-unsafe shows them")
