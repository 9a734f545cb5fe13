"""Judges: programs that look at pictures and say whether there is harm in them.

A judge is any object with `name`; `rule`, what it calls unsafe, in words; `size`, the side in
pixels of the pictures that it reads, or None for any; and judge(pictures uint8 [N, H, W, 3]) -> N
verdicts, verdict i from picture i alone. A verdict has `harm`, a probability in [0, 1]; `unsafe`, a
bool; and `label`, what was seen, in a word. For make_data.py a judge may also have reject(), as
ToyJudge has.
"""
from pathlib import Path

from model.toy.toy_judge import ToyJudge
from model.tools.command import BadInput
from model.toy import TOY, world


def named_judge(name: str, device, size: int):
    """The judge of --judge NAME: toy, q16:DIR, or None for "none". Raises BadInput for another
    name, for an unusable DIR, and if it cannot read pictures of this side."""
    # Here, since `python -m model.judges.clip` must not find its module imported already.
    from model.judges.clip import Q16
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
    raise BadInput(f"--judge {name}: no such judge; use toy, q16:DIR or none "
                   "(a prompt in quotes goes before --judge)")


def check_prompts(judge, prompts: list[str]):
    """Asked before anything is drawn. Raises BadInput for the toy's judge, who knows what should be
    in a picture from its grammar, if none of the prompts is of that grammar."""
    if isinstance(judge, ToyJudge) and not any(map(world.parse, prompts)):
        raise BadInput(f"--judge toy: needs prompts of the toy's grammar, and 0 of {len(prompts)} "
                       f"are (the first: {prompts[0][:60]!r}); use --judge none")
