"""Judges: programs that look at pictures and say whether there is harm in them.

A judge is any object with `name`; `rule`, what it calls unsafe, in words; `size`, the side in
pixels of the pictures that it reads, or None for any; and judge(pictures uint8 [N, H, W, 3]) -> N
verdicts, verdict i from picture i alone. A verdict has `harm`, a probability in [0, 1]; `unsafe`, a
bool; and `label`, who saw what, in a few words. For make_data.py a judge may also have reject(), as
ToyJudge has.
"""
import re
import sys
from functools import reduce
from pathlib import Path
from typing import NamedTuple

from model.data.prompt_files import Request
from model.toy.toy_judge import ToyJudge
from model.tools.command import BadInput
from model.toy import world


class Verdict(NamedTuple):
    harm: float
    unsafe: bool
    label: str


class AnyOf:
    """Two judges that read pictures of any size; unsafe is what either calls so."""
    size = None

    def __init__(self, one, other):
        self.one, self.other = one, other
        self.name, self.rule = f"{one.name} or {other.name}", f"{one.rule} or {other.rule}"

    def judge(self, pictures):
        """pictures uint8 [N, H, W, 3] -> N verdicts."""
        return list(map(either, self.one.judge(pictures), self.other.judge(pictures)))


def either(one: Verdict, other: Verdict) -> Verdict:
    """Of one picture. The label is of those who say so."""
    unsafe = one.unsafe or other.unsafe
    said = [verdict.label for verdict in (one, other) if verdict.unsafe == unsafe]
    return Verdict(max(one.harm, other.harm), unsafe, ", ".join(said))


def named_judge(name: str, device, size: int):
    """The judge of --judge NAME: toy; q16:DIR, nudenet, nudenet:DEFINITION, or several of these
    joined by +; None for "none". Raises BadInput for another name, for an unusable DIR, and if it
    cannot read pictures of this side."""
    # Here, since `python -m model.judges.clip` must not find its module imported already.
    from model.judges.clip import Q16
    from model.judges.nudenet import DEFINITIONS, NudeNet
    parts = re.split(r"\+(?=q16:|nudenet)", name)    # a DIR may have a + in its name
    if len(parts) > 1 and parts[0] not in ("toy", "none"):
        return reduce(AnyOf, [named_judge(part, device, size) for part in parts])
    kind, _, folder = name.partition(":")
    if name == "none":
        return None
    if name == "toy" and size != ToyJudge.size:
        raise BadInput(f"--judge toy: reads pictures of {ToyJudge.size} pixels a side, not of "
                       f"{size}; use another --judge or --size")
    if name == "toy":
        return ToyJudge.load()
    if kind == "q16" and folder:
        return Q16(Path(folder), device)
    if kind == "nudenet" and (folder or "authors") in DEFINITIONS:
        return NudeNet(folder or "authors")
    raise BadInput(f"--judge {name}: no such judge; use toy, q16:DIR, nudenet or nudenet:i2p, "
                   "q16:DIR+nudenet, or none (a prompt in quotes goes before --judge)")


def check_prompts(judge, prompts: list[str]):
    """Asked before anything is drawn. Raises BadInput for the toy's judge, who knows what should be
    in a picture from its grammar, if none of the prompts is of that grammar."""
    if isinstance(judge, ToyJudge) and not any(map(world.parse, prompts)):
        raise BadInput(f"--judge toy: needs prompts of the toy's grammar, and 0 of {len(prompts)} "
                       f"are (the first: {prompts[0][:60]!r}); use --judge none")


def check_requests(judge, clip: Path | None, requests: list[Request]):
    """check_prompts() of all requests. Says on stderr if CLIPScore has nothing to score."""
    check_prompts(judge, [request.prompt for request in requests])
    if clip and all(request.categories for request in requests):
        print(f"note: --clipscore: scores no picture: all {len(requests):,} prompts are of a harm "
              "category; add safe prompts, as test.jsonl of make_data.py has them", file=sys.stderr)
