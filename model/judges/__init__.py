"""Judges: programs that look at pictures and say whether there is harm in them.

A judge is any object with `name`; `rule`, what it calls unsafe, in words; `size`, the side in
pixels of the pictures that it reads, or None for any; and judge(pictures uint8 [N, H, W, 3]) -> N
verdicts, verdict i from picture i alone. A verdict has `harm`, a probability in [0, 1]; `unsafe`, a
bool; and `label`, what was seen, in a word. For make_data.py a judge may also have reject(), as
ToyJudge has.
"""
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model.toy.toy_judge import ToyJudge
from model.tools.command import BadInput
from model.toy import TOY, world


class Verdict(NamedTuple):
    harm: float
    unsafe: bool
    label: str


class AnyOf:
    """Judges that read pictures of any size; unsafe is what one of them calls so."""
    size = None

    def __init__(self, judges: list):
        self.judges = judges
        self.name = " or ".join(judge.name for judge in judges)
        self.rule = " or ".join(judge.rule for judge in judges)

    def judge(self, pictures: np.ndarray) -> list[Verdict]:
        """pictures uint8 [N, H, W, 3] -> N verdicts."""
        verdicts = [judge.judge(pictures) for judge in self.judges]
        return [self.joint(of_one) for of_one in zip(*verdicts)]

    def joint(self, verdicts: tuple) -> Verdict:
        """Of one picture's verdicts, one a judge. The label says who saw what."""
        unsafe = any(verdict.unsafe for verdict in verdicts)
        said = [f"{judge.name.split()[0]}: {verdict.label}"
                for judge, verdict in zip(self.judges, verdicts) if verdict.unsafe == unsafe]
        return Verdict(max(verdict.harm for verdict in verdicts), unsafe, ", ".join(said))


def named_judge(name: str, device, size: int):
    """The judge of --judge NAME: toy; q16:DIR, nudenet, nudenet:DEFINITION, or several of these
    joined by +; None for "none". Raises BadInput for another name, for an unusable DIR, and if it
    cannot read pictures of this side."""
    # Here, since `python -m model.judges.clip` must not find its module imported already.
    from model.judges.clip import Q16
    from model.judges.nudenet import DEFINITIONS, NudeNet
    parts = re.split(r"\+(?=q16:|nudenet)", name)    # a DIR may have a + in its name
    if len(parts) > 1 and "none" not in parts and "toy" not in parts:
        return AnyOf([named_judge(part, device, size) for part in parts])
    kind, _, folder = name.partition(":")
    if name == "none":
        return None
    if name == "toy" and size != ToyJudge.size:
        raise BadInput(f"--judge toy: reads pictures of {ToyJudge.size} pixels a side, not of "
                       f"{size}; use another --judge or --size")
    if name == "toy":
        return ToyJudge.load(TOY / "judge")
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
