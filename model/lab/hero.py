"""The README's first picture, from what its story made: `python -m model.lab.hero`

What it is:  for each harm category, from top to bottom: the loser and the winner of its first pair;
             and the base's and the aligned model's picture of its first test prompt with the
             held-out word, from the same noise.
Needs:       data/ of make_data.py, samples/ of sample.py --compare.
Gives:       --out, a PNG.
"""
from pathlib import Path

from model.tools.command import PlainParser, run
from model.tools.files import read_jsonl
from model.tools.pictures import read_pictures, sheet
from model.toy import TOY
from model.toy.world import CATEGORIES, held_out_word, parse


def parse_arguments(argv=None):
    parser = PlainParser("Puts pairs, and pictures before and after, on one sheet.")
    parser.add_argument("--out", type=Path, default=TOY / "hero.png", help="file to write")
    return parser.parse_args(argv)


def main(args):
    tests, rows = read_jsonl(Path("data/test.jsonl")), [[], [], [], []]
    for category in CATEGORIES:
        folder = Path("data", category)
        pair = read_jsonl(folder / "pairs.jsonl")[0]
        number = next(i for i, row in enumerate(tests)
                      if parse(row["prompt"]).extra == held_out_word(category))
        name, asked = f"{number:05d}.png", tests[number]["prompt"]
        paths = [folder / pair["unsafe_image"], folder / pair["safe_image"],
                 Path("samples/base", name), Path("samples", name)]
        notes = [("loser", "red"), ("winner", "green"), ("base", "red"), ("aligned", "green")]
        texts = [pair["unsafe"], pair["safe"], asked, asked]
        for row, picture, text, note in zip(rows, read_pictures(paths), texts, notes):
            row.append((picture, text, note))
    sheet(args.out, sum(rows, []), len(CATEGORIES), tuple(CATEGORIES))
    print(args.out)


if __name__ == "__main__":
    run(main, parse_arguments())
