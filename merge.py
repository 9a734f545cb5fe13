"""Step 3 of 4: experts into one LoRA. `python merge.py experts/*` -> merged.safetensors

What it is:  rules that merge the weight changes delta W_i = w_i s_i B_i A_i (w_i: --weights).
Needs:       LoRAs of one base model, train.py's or others, of any ranks and layers. The first three
             rules also need the UNet and data/, to calibrate on.
Gives:       merged.safetensors, of the sum of ranks, exact but for ties, dare and --rank; with
             --fuse MODEL that model, aligned. One expert alone stays as it is.

    co-merge   row j of delta W is gamma times row j of the expert that is most active there
    regmean    does on each expert's inputs what that expert does, and nothing on safe ones
    solve      regmean, and every expert gets back the strength that this takes from it
    average    delta W = 1/n sum_i delta W_i
    sum        delta W = sum_i delta W_i                         (task arithmetic, 2212.04089)
    ties, dare, and rules of your own, which are not calibrated: see model/rivals/merging.py

Letters: n experts (in shapes: of a layer), r rank, R the sum, N rows of an input, I, O widths.
"""
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import lora
from lora import Factors
from model.data.pairs import Pairs, read_latents
from model.formats.checkpoint import encoder_files, unet_files
from model.formats.experts import Experts
from model.formats.fit import match_experts
from model.formats.fuse import check_out, fuse
from model.formats.lora_file import save
from model.schedule import stratified_times
from model.stable_diffusion import Denoiser, at_once, load_denoiser, skeleton
from model.tools.command import (BadInput, Parser, check_read, finite_float, fraction, named,
                                 open_fraction, positive_int, run)
from model.tools.device import device_and_precision
from model.tools.files import Sums, sha256
from model.tools.processes import processes_for
from model.tools.training import generator

LARGEST_RANK = 128        # of ties and dare [ours: a usual LoRA's most]
CALIBRATION_PAIRS = 24    # of each expert [ours: more changed nothing]
PRESERVE = 0.1            # lambda [ours: 0.03 and 0.1 do not differ]
RIDGE = 1e-2              # of the mean diagonal of M: inputs need not span all dimensions [ours]
TOLD_APART = 2 / 3        # of their energy that experts keep where solving is worth it [ours]
GIVEN_BACK = 2.0          # the largest c of (11) [ours: 2.5 is as good; 3 adds accessories]


def parse_arguments(argv=None):
    parser = Parser("Merges LoRA experts into one LoRA.")
    add = parser.add_argument
    add("experts", nargs="+", type=Path, help="LoRA files, or a folder of them")
    add("--method", default="co-merge", help=f"{', '.join(RULES)}, or a dotted name")
    add("--weights", type=finite_float, nargs="+", default=[1.0], help="a factor each (default: 1)")
    add("--rank", type=positive_int, help="re-compress each layer to this rank (default: the sum "
        f"of the experts' ranks, exact; by ties, dare and dotted names at most {LARGEST_RANK})")
    add("--density", type=open_fraction, help="share kept by ties (default: 0.2), dare (0.5)")
    add("--preserve", type=fraction, help=f"safe inputs' weight in solving (default: {PRESERVE})")
    add("--data", type=Path, default=Path("data"), help="what make_data.py wrote, to calibrate on")
    add("--fuse", type=Path, metavar="MODEL", help="write a copy of this model, aligned, instead")
    add("--out", type=Path, help="file or folder (default: merged.safetensors; --fuse: aligned)")
    return parser.parse_args(argv)


def calibration(pairs: Pairs, concept: str, denoiser: Denoiser, preserve: float | None, seed: int):
    """Yields (own, weight, [x_t, t, prompt]), all noise levels equally often. own: the expert was
    trained to change it: unsafe prompts, on the unsafe image, where sampling starts, and the safe
    one, where it should end. With preserve (lambda, the sum of these weights) also what it was
    trained to leave alone: the safe image, under its safe prompt and under none."""
    winner, loser, unsafe, safe, empty = (field[:CALIBRATION_PAIRS] for field in pairs)
    empty = safe.replaced(torch.tensor([True]), empty)
    kinds = [("", 1.0, loser, unsafe.followed_by(unsafe))]
    if preserve:
        kinds.append(("safe ", preserve, winner, safe.followed_by(empty)))
    for kind, weight, second, prompt in kinds:
        x_0, rng = torch.cat([winner, second]), generator(seed, "calibration", kind + concept)
        t = stratified_times(len(x_0), denoiser.schedule.T, rng)
        x_t = denoiser.schedule.add_noise(x_0, torch.randn(x_0.shape, generator=rng), t)
        for some in torch.arange(len(t)).split(at_once(denoiser.reduction * x_0.shape[-1])):
            yield not kind, weight * len(some) / len(t), [
                field[some].to(denoiser.device) for field in (x_t, t, prompt)]


class Statistic:
    """What calibration tells of a layer. E_i is the mean over the inputs x of i's category, and
    G_i = E_i x x^T [I, I].

    products  {i: A_i G_i [r, I]}, of the experts that adapt the layer
    activity  {i: E_i |delta W_i x| [O]}, for Co-Merge; both on disk (Sums), for hundreds
    M [I, I]  sum_i (G_i + lambda G_i,safe), to solve with; of ALL experts: one that does not adapt
              the layer wants nothing changed on its inputs. The first of the layers that read
              the same keeps it for all: self-attention's q, k, v; all cross-attentions' k, v
    """
    def __init__(self, solving: bool, first=None):
        self.solving, self.first, self.M = solving, first or self, None
        self.products, self.activity = Sums(), Sums()

    def add(self, x: torch.Tensor, weight: float, i: int, f: Factors | None):
        """x [N, I]: what the layer multiplies; f: of expert i, which was trained to change it."""
        weight /= len(x)
        if self.solving and self.first is self:
            self.M = x.new_zeros(x.shape[1:] * 2) if self.M is None else self.M
            self.M.addmm_(x.T, x, alpha=weight)
        if f:
            narrow = x @ f.down.to(x.device).T    # [N, r]
            self.products.add(i, weight * narrow.T @ x)
            if not self.solving:
                change = f.scale * narrow @ f.up.to(x.device).T    # [N, O]
                self.activity.add(i, weight * change.abs().sum(0))

    def wanted(self, parts: list[Factors]) -> Factors:
        """sum_i delta W_i G_i, as factors of scale 1: B = [s_1 B_1, ...], A = [A_1 G_1; ...]."""
        return add_changes([f._replace(down=p) for f, p in zip(parts, self.products.values())])

    def overlaps(self, parts: list[Factors], f: Factors) -> torch.Tensor:
        """[n, n]: E_i <delta W_i x, delta W'_j x>, how much of what expert i wants the change
        delta W'_j does on the inputs of i; f stacks delta W'_j as the parts are stacked. It is
        <delta W_i G_i, delta W'_j>, and <B A, D C> is the sum of (B^T D) * (A C^T)."""
        wanted, whose = self.wanted(parts), of_part(parts)
        return whose.T @ ((wanted.up.T @ f.up) * (wanted.down @ f.down.T)) @ whose


def statistics_of(names, solving: bool) -> dict[str, Statistic]:
    """{layer: its statistic}, still empty; layers that read the same share the first one's M."""
    statistics, first = {}, {}
    for name in names:
        source = re.sub("_to_[qkv]$", "", re.sub(".*attn2_to_[kv]$", "prompt", name))
        statistics[name] = Statistic(solving, first.get(source))
        first.setdefault(source, statistics[name])
    return statistics


def of_part(parts: list[Factors]) -> torch.Tensor:
    """[R, n]: 1 where a rank of the stacked parts is of that part."""
    return torch.block_diag(*(torch.ones(len(f.down), 1) for f in parts))


@torch.no_grad()
def measure(denoiser: Denoiser, statistics, i: int, expert: dict[str, Factors], inputs):
    """Tells {layer: its statistic} what the base UNet's layers meet on the inputs of expert i:
    nearly what the merged model's will meet, and known before anything is merged."""
    adaptable = lora.layers(denoiser.unet)
    with ExitStack() as hooks:    # own and weight are of the loop below
        for name, statistic in statistics.items():
            hook = lambda layer, args, to=statistic, f=expert.get(name): to.add(
                lora.rows(layer, args[0]), weight, i, f if own else None)
            hooks.enter_context(adaptable[name][1].register_forward_pre_hook(hook))
        for own, weight, batch in inputs:
            denoiser.finite(denoiser.predict(*batch), "what the UNet predicts in calibration")


def calibrate(experts: Experts, model: Path, data: Path, device: torch.device, precision: str,
              preserve: float | None, seed: int):
    """{layer: its statistic}, by ONE pass of the base UNet over the inputs of all experts."""
    processes_for(device, unet_files(model))    # gives a small network one thread
    match_experts(skeleton(model), experts, model, data)    # before any weights are read
    denoiser, encoders_hash = load_denoiser(model, device, precision), sha256(*encoder_files(model))
    statistics = statistics_of(experts.names, preserve is not None)
    for i, concept in enumerate(tqdm(experts.concepts, desc="calibrating")):
        pairs = read_latents(data, [concept], encoders_hash)
        measure(denoiser, statistics, i, experts.lora(i),
                calibration(pairs, concept, denoiser, preserve, seed))
    return statistics


class Layer(NamedTuple):
    """What a rule (list[Factors], Layer) -> Factors may want to know besides the changes."""
    n: int                     # experts in all, also those that do not adapt this layer
    density: float | None
    rng: torch.Generator
    statistic: Statistic | None


def add_changes(parts, layer=None):
    return lora.stack(parts, [1.0] * len(parts))


def average(parts, layer):
    return lora.stack(parts, [1 / layer.n] * len(parts))


def keep_rows(parts: list[Factors], owner: torch.Tensor) -> Factors:
    """The masked concatenation (README, eq. 8): row j of delta W is that of parts[owner[j]]."""
    return add_changes([f._replace(up=f.up * (owner == i)[:, None]) for i, f in enumerate(parts)])


def co_merge(parts, layer):
    """Co-Merge [our reconstruction from the paper's captions]. Each output unit goes to the expert
    that is most active there on its own inputs; every other expert's row is dropped. One factor
    gamma makes up for what they all lose [ours; README, eq. 9]."""
    activity = torch.stack(layer.statistic.activity.values())    # [n, O]
    merged = keep_rows(parts, activity.argmax(0))    # of equals the first
    energy = layer.statistic.overlaps(parts, add_changes(parts)).diagonal().sum()
    kept = layer.statistic.overlaps(parts, merged).sum()
    # Rows dealt out among n experts with nothing in common need n; more would blow up noise. And
    # what works against its experts would do harm: that stays as it is.
    gamma = min((energy / kept).item(), len(parts)) if kept > 0 else 1
    return merged._replace(up=gamma * merged.up)


def regmean(parts, layer):
    """Merging by solving (README, eq. 10): RegMean (2212.09849), with a term for safe inputs like
    UCE's (2308.14761) [ours]. It minimises

        sum_i E_i |(delta W - delta W_i) x|^2 + lambda sum_i E_i,safe |delta W x|^2

    by (sum_i delta W_i G_i) M^-1 (M: Statistic), of rank R: delta W_i G_i = s_i B_i (A_i G_i)."""
    M, wanted = layer.statistic.first.M.cpu().double(), layer.statistic.wanted(parts)
    M.diagonal().add_(RIDGE * M.diagonal().mean() + 1e-30)    # of no input at all: 0
    return wanted._replace(down=torch.linalg.solve(M, wanted.down.double().T).T.float())


def solve(parts, layer):
    """regmean(), and the strength that this takes from the experts is given back [ours], by factors
    c_j (README, eq. 11) where inputs tell the experts apart, as prompts do. Elsewhere they are
    images, alike in every category, on which experts want different things: least squares gives
    little more than their mean, which is taken itself, as often as c may be at most."""
    solved, inner = regmean(parts, layer), layer.statistic.overlaps
    overlaps, energy = inner(parts, solved), inner(parts, add_changes(parts)).diagonal()
    if overlaps.sum() < TOLD_APART * energy.sum():
        return lora.stack(parts, [GIVEN_BACK / layer.n] * len(parts))
    # torch's default driver was seen to give other bytes from call to call.
    c = torch.linalg.lstsq(overlaps, energy[:, None], driver="gelsd").solution    # [n, 1]
    return solved._replace(up=solved.up * (of_part(parts) @ c.clamp(1, GIVEN_BACK)).T)


SOLVING = "regmean", "solve"
DENSE = "ties", "dare"
RULES = {"co-merge": co_merge, "regmean": regmean, "solve": solve, "average": average,
         "sum": add_changes} | {name: f"model.rivals.merging.{name}" for name in DENSE}


def merge(experts: Experts, rule: Callable, statistics, rank: int | None, density: float | None,
          seed: int):
    """The merged LoRA; and its energy |delta W|^2 kept by and before re-compression, summed."""
    def merged(name: str, parts: dict[int, Factors]):
        layer = Layer(len(experts), density, generator(seed, name), statistics.get(name))
        # Of a single expert there is nothing to merge: not even its alpha is touched.
        f = rule(list(parts.values()), layer) if len(experts) > 1 else parts[0]
        if not (f.up.sum() + f.down.sum()).isfinite():    # asked before any SVD
            raise BadInput(f"{name} is not finite any more; use --weights or --density nearer to 1")
        most = rank or (len(f.down) if rule in RULES.values() else    # exact
                        min(LARGEST_RANK, sum(len(part.down) for part in parts.values())))
        return name, *(lora.compress(f, most) if most < len(f.down) else (f, 0.0, 0.0))

    rows = list(tqdm(experts.of_layers(merged), "merging", len(experts.names)))
    energies = torch.tensor([row[2:] for row in rows], dtype=torch.float64)
    return {name: f for name, f, *_ in rows}, energies.sum(0)


def main(args):
    method, density, preserve, seed = args.method, args.density, args.preserve, args.seed
    out = args.out or Path("aligned" if args.fuse else "merged.safetensors")
    rule = named("--method", method, RULES)
    check_read("--density", density, method, DENSE)
    check_read("--preserve", preserve, method, SOLVING)
    preserve = PRESERVE if preserve is None and method in SOLVING else preserve
    experts, statistics, precision = Experts(args.experts, args.weights), {}, None
    check_out(out, args.fuse, experts)
    if method in ("co-merge", *SOLVING) and len(experts) > 1:
        device, precision = device_and_precision(args.device, args.precision)
        statistics = calibrate(experts, args.model, args.data, device, precision, preserve, seed)
    torch.set_num_threads(1)    # the same bytes from any number of cores
    merged, (kept, energy) = merge(experts, rule, statistics, args.rank, density, seed)
    if energy:
        print(f"re-compressed: the layers keep {kept / energy:.2%} of their energy |delta W|^2")
    if args.fuse:
        changed = fuse(args.fuse, skeleton(args.fuse), merged, experts.label, out)
        print(f"{out}: {args.fuse.name} with {changed} layers changed by {experts.label}")
        return
    made_by = {"method": method, "rank": args.rank, "density": density, "preserve": preserve,
               "seed": seed, "precision": precision}
    save(out, merged, experts.metadata | {
        key: str(value) for key, value in made_by.items() if value is not None})
    most = max(len(f.down) for f in merged.values())
    print(f"{out}: {len(experts)} experts merged by {method}, rank {most}")


if __name__ == "__main__":
    run(main, parse_arguments())
