"""What every training loop here does alike.

What it is:  random numbers without state; the state from which an interrupted training continues;
             the beta that suits some pairs; and what a person reads of a training.
Needs:       torch.
Gives:       generator(); finished(), save_state(), load_state(), forget();
             auto_beta(); write_log(), summary().
"""
import json
import zlib
from pathlib import Path

import torch

from model.tools.command import BadInput
from model.tools.files import opened, save_tensors, write_jsonl
from model.tools.images import curves
from model.tools.processes import say

ASKED = 64    # pairs that auto_beta() looks at


def generator(*what) -> torch.Generator:
    """A CPU generator for these words: generator(seed, "hate", step). What is drawn depends on them
    alone, so that continuing at a step needs no saved state."""
    return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, what)).encode()))


def descend(loss, steps: int, optimizer, rate=None):
    """loss(step), a number [], by so many steps of the optimizer; rate: its schedule."""
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        if rate:
            rate.step()


def save_state(path: Path, recipe: dict, log: list[dict], parameters, optimizer, scaler):
    """What continuing needs: the parameters, Adam's moments, and the log, a row a step."""
    tensors = {f"parameter.{i}": p for i, p in enumerate(parameters)}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{key}.{i}": value for key, value in moments.items()}
    state = {"recipe": recipe, "log": log, "scaler": scaler.state_dict()}
    save_tensors(path, tensors, {"state": json.dumps(state)})


@torch.no_grad()
def load_state(path: Path, recipe: dict, parameters, optimizer, scaler) -> list[dict]:
    """Puts back what save_state() wrote for the same recipe. Returns the log; [] where there is
    none, or one of another recipe, which it says. Raises BadInput for a file of another program."""
    if not path.is_file():
        return []
    try:
        with opened(path) as file:
            state = json.loads(file.metadata()["state"])
            if state["recipe"] != recipe:
                changed = [key for key in recipe if state["recipe"].get(key) != recipe[key]]
                say(f"{path}: is not continued, since this changed: {', '.join(changed)}")
                return []
            # Clones, since the file is going to be replaced.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        moments = {}
        for i, p in enumerate(parameters):
            p.copy_(tensors[f"parameter.{i}"])
            moments[i] = {key: tensors[f"{key}.{i}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    except (BadInput, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{path}: not a state to continue from; delete it ({error})") from None
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    scaler.load_state_dict(state["scaler"])
    return state["log"]


def finished(path: Path, recipe: dict) -> bool:
    """Whether the expert at this path was made by this recipe. Of another one it says what changed.
    """
    if not path.is_file():
        return False
    with opened(path) as file:
        made_by = file.metadata() or {}
    if "data_hash" not in made_by:
        raise BadInput(f"{path}: not an expert of train.py; move it away, or give another --out")
    changed = [key for key in recipe if made_by.get(key) != recipe[key]]
    if changed:
        say(f"{path}: will be replaced, since this changed: {', '.join(changed)}")
    return not changed


def forget(path: Path):
    """Removes a state, and the unfinished LoRA, log and curves beside it."""
    for suffix in (".resume", ".safetensors", ".jsonl", ".png"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def auto_beta(reference, pairs, schedule, device: torch.device, name: str) -> float:
    """2 / delta (dpo.py) of ASKED pairs or all, each at its own noise level, to three digits: a
    GPU's last bits may change. Raises BadInput where the reference does not predict losers better.
    """
    rng = generator(name, "beta")
    chosen, delta = torch.randperm(len(pairs.winner), generator=rng)[:ASKED].split(1), 0
    for i, pair in enumerate(chosen):    # one by one: as much memory as a batch of two
        t = torch.tensor([(2 * i + 1) * schedule.T // (2 * len(chosen))], device=device)
        x_0 = torch.cat([pairs.winner[pair], pairs.loser[pair]]).to(device)
        noise = torch.randn(x_0[:1].shape, generator=rng).to(device).expand_as(x_0)
        x_t, target = schedule.noised(x_0, noise, t.repeat(2))
        output = reference(x_t, t.repeat(2), pairs.unsafe[pair.repeat(2)].to(device))
        winner, loser = (output - target).square().flatten(1).mean(1).tolist()
        delta += (winner - loser) / len(chosen)
    if not delta > 0:
        raise BadInput(f"--beta auto: {name}: the base model predicts unsafe pictures no better "
                       f"than safe ones (delta {delta:.2g}); look at the data's sheet.png, or give "
                       "a number")
    say(f"{name}: beta {2 / delta:.3g}, 2/delta of {len(chosen)} pairs")
    return float(f"{2 / delta:.3g}")


def ratios(row):
    """{what: the errors in a row of the log as shares of the reference's}"""
    return {f"{key}'s error / reference's": row[key] / row[f"{key}_ref"]
            for key in row if f"{key}_ref" in row}


def write_log(path: Path, log: list[dict]):
    """The log as JSON lines beside `path`, and its curves as a PNG."""
    write_jsonl(path.with_suffix(".jsonl"), log)
    rows = [{"preference": row.get("preference", row["loss"]), **ratios(row)} for row in log]
    of_key = lambda key: [row[key] for row in rows]
    curves(path.with_suffix(".png"), {key: of_key(key) for key in rows[0]})


def mean_row(rows: list[dict]):
    mean = lambda key: sum(row.get(key, 0) for row in rows) / len(rows)
    return {key: mean(key) for key in rows[0]}


def summary(log: list[dict]) -> str:
    """The means of the last tenth of the steps, in words; and over all steps delta, how much better
    the reference predicts the loser, and 2 / delta, near which beta should be."""
    last, whole = mean_row(log[-max(1, len(log) // 10):]), mean_row(log)
    values = {key: last[key] for key in ("loss", "accuracy") if key in last} | ratios(last)
    delta = whole.get("winner_ref", 0) - whole.get("loser_ref", 0)
    if delta > 0:
        values |= {"delta": delta, "2/delta": 2 / delta}
    skipped = sum("skipped" in row for row in log)
    return f"{len(log)} steps{f', {skipped} skipped' if skipped else ''}; at the end " + ", ".join(
        f"{key} {value:.3f}" for key, value in values.items())
