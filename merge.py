"""Step 3 of 4: experts into one LoRA. `python merge.py experts/*` -> merged.safetensors

What it is:  Co-Merge, merging by solving, and the simpler rules beside them. All of them merge the
             weight CHANGES delta W_i = w_i s_i B_i A_i (w_i: --weights), never the factors:
             averaging A and B separately would leave cross terms B_i A_j.
Needs:       experts of train.py, or other LoRAs of one base model: ranks, alphas, spellings and
             adapted layers may differ (a layer that an expert does not adapt is one that it changes
             by zero). The first three rules also need the UNet and data/, to calibrate on.
Gives:       merged.safetensors, of rank = the sum of the experts' ranks, and exact, except by ties
             and dare, or after --rank; or, with --fuse MODEL, that whole model, aligned. Of one
             expert there is nothing to merge: it stays as it is.

    co-merge   row j of delta W is gamma times row j of the expert that is most active there
    regmean    does on each expert's inputs what that expert does, and nothing on safe ones
    solve      regmean, and every expert gets back the strength that this takes from it
    average    delta W = 1/n sum_i delta W_i
    sum        delta W = sum_i delta W_i                         (task arithmetic, 2212.04089)
    ties, dare, and any function of your own: see model/rivals/merging.py

Letters: n experts (of a layer: those that adapt it), r rank, R the sum of ranks, N rows that a
layer multiplies, I and O a layer's input and output width.
"""
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import lora
from lora import Factors
from model.data.pairs import Pairs, read_latents
from model.formats.checkpoint import encoder_files, unet_files
from model.formats.experts import Experts
from model.formats.fit import check_fuse, fuse, match_experts
from model.formats.lora_file import expand, save
from model.schedule import stratified_times
from model.stable_diffusion import Denoiser, at_once, load_denoiser, skeleton
from model.text import Prompt
from model.tools.command import (BadInput, Parser, finite_float, fraction, named, open_fraction,
                                 positive_int, run)
from model.tools.device import device_and_precision
from model.tools.files import check_folder, sha256
from model.tools.processes import in_threads, processes_for
from model.tools.training import generator

LARGEST_RANK = 128        # of ties and dare [ours: a usual LoRA's most]
CALIBRATION_PAIRS = 24    # of each expert [ours: more changed nothing]
PRESERVE = 0.1            # lambda [ours: 0.03 and 0.1 do not differ]
RIDGE = 1e-2              # of the mean diagonal of M: inputs need not span all dimensions [ours]
TOLD_APART = 2 / 3        # of their energy that experts keep where solving is worth it [ours]
GIVEN_BACK = 2.0          # times what least squares leaves of an expert, at most [ours: 2.5 is as
                          # good on seeds 100 to 103, with 3 plain images get accessories]


def parse_arguments(argv=None):
    parser = Parser("Merges LoRA experts into one LoRA.")
    add = parser.add_argument
    add("experts", nargs="+", type=Path, help="LoRA files, or a folder of them")
    add("--method", default="co-merge", help=f"one of {', '.join(RULES)} (the top of merge.py says "
        "what they do), or the dotted name of a rule such as model.rivals.merging.ties")
    add("--weights", type=finite_float, nargs="+", default=[1.0],
        help="one factor for each expert, or one for all (default: 1)")
    add("--rank", type=positive_int, help="re-compress each layer to this rank (default: the sum "
        f"of the experts' ranks, exact; by ties, dare and dotted names at most {LARGEST_RANK})")
    add("--density", type=open_fraction, help="share of entries that ties and dare keep of each "
        "delta W (default: ties 0.2, as published; dare 0.5)")
    add("--preserve", type=fraction, help="lambda of regmean and solve: how much safe inputs "
        f"weigh, where an expert's own inputs weigh 1; from 0 to 1 (default: {PRESERVE})")
    add("--data", type=Path, default=Path("data"), help="what make_data.py wrote, for co-merge, "
        "regmean and solve")
    add("--fuse", type=Path, metavar="MODEL", help="write a whole aligned checkpoint instead: a "
        "copy of this diffusers folder or single file, with the merged LoRA in its weights")
    add("--out", type=Path, help="LoRA file to write; with --fuse the folder, or "
        "of a single file a .safetensors file (default: merged.safetensors; with --fuse aligned)")
    return parser.parse_args(argv)


class Inputs(NamedTuple):
    """A batch of what the UNet is calibrated on."""
    own: bool        # what an expert was trained to change; else safe inputs
    weight: float    # its share of the expert's inputs; of safe ones, times lambda
    x_t: torch.Tensor
    t: torch.Tensor
    prompt: Prompt


def calibration(pairs: Pairs, concept: str, denoiser: Denoiser, preserve: float | None, seed: int):
    """Yields Inputs: what an expert was trained to change, its unsafe prompts, on the unsafe and on
    the safe image, where sampling starts out and where it should end. With preserve (lambda) also
    what it was trained to leave alone, the safe image under its safe prompt and under none. All
    noise levels come equally often."""
    few = slice(CALIBRATION_PAIRS)
    winner, loser, unsafe, safe = (
        field[few] for field in (pairs.winner, pairs.loser, pairs.unsafe, pairs.safe))
    empty = safe.replaced(torch.tensor([True]), pairs.empty)
    kinds = [("", 1.0, loser, unsafe.followed_by(unsafe))]
    if preserve:
        kinds.append(("safe ", preserve, winner, safe.followed_by(empty)))
    for kind, weight, second, prompt in kinds:
        x_0, rng = torch.cat([winner, second]), generator(seed, "calibration", kind + concept)
        t = stratified_times(len(x_0), denoiser.schedule.T, rng)
        x_t = denoiser.schedule.add_noise(x_0, torch.randn(x_0.shape, generator=rng), t)
        for some in torch.arange(len(t)).split(at_once(denoiser.reduction * x_0.shape[-1])):
            yield Inputs(not kind, weight * len(some) / len(t),
                         *(field[some].to(denoiser.device) for field in (x_t, t, prompt)))


def per_rank(values: torch.Tensor, parts: list[Factors]) -> torch.Tensor:
    """[n, ...] -> [R, ...]: of each expert as often as its rank says."""
    return values.repeat_interleave(torch.tensor([len(f.down) for f in parts]), 0)


class Statistic:
    """What calibration tells of a layer. E_i is the mean over the inputs x of i's category, and
    G_i = E_i x x^T [I, I].

    activity  {i: E_i |delta W_i x| [O]}, of the experts that adapt the layer
    products  {i: A_i G_i [r, I]}
    M [I, I]  sum_i (G_i + lambda G_i,safe), where regmean will solve; of ALL experts: one that does
              not adapt this layer wants nothing changed on its inputs. (Large for a convolution:
              530 MB for 3x3 of 1,280 channels.)
    """
    def __init__(self, solving: bool):
        self.solving, self.M, self.activity, self.products = solving, 0.0, {}, {}

    def add(self, x: torch.Tensor, weight: float, i: int, f: Factors | None):
        """x [N, I]: what the layer multiplies; f: of expert i, which was trained to change it."""
        weight /= len(x)
        if self.solving:
            self.M += weight * x.T @ x
        if f:
            narrow = x @ f.down.to(x.device).T                # [N, r]
            change = f.scale * narrow @ f.up.to(x.device).T   # [N, O]
            self.activity[i] = self.activity.get(i, 0) + weight * change.abs().sum(0)
            self.products[i] = self.products.get(i, 0) + weight * narrow.T @ x

    def wanted(self, parts: list[Factors]) -> Factors:
        """sum_i delta W_i G_i, as factors of scale 1: B = [s_1 B_1, ...], A = [A_1 G_1; ...]."""
        return add_changes([f._replace(down=product.cpu())
                            for f, product in zip(parts, self.products.values())])

    def overlaps(self, parts: list[Factors], f: Factors) -> torch.Tensor:
        """[n, n]: E_i <delta W_i x, delta W'_j x> of changes delta W'_j that are stacked to f as
        the parts are to their sum. In row i: how much each does of what expert i wants, on the
        inputs of i. It is <delta W_i G_i, delta W'_j>, and <B A, D C> is the sum of
        (B^T D) * (A C^T)."""
        wanted, whose = self.wanted(parts), per_rank(torch.eye(len(parts)), parts)    # [R, n]
        return whose.T @ ((wanted.up.T @ f.up) * (wanted.down @ f.down.T)) @ whose

    def energy(self, parts: list[Factors]) -> torch.Tensor:
        """[n]: E_i |delta W_i x|^2, what each expert does on its own inputs."""
        return self.overlaps(parts, add_changes(parts)).diagonal()


@torch.no_grad()
def measure(denoiser: Denoiser, statistics, i: int, expert: dict[str, Factors], inputs):
    """Tells {layer: its statistic} what the base UNet's layers meet on the inputs of expert i:
    nearly what the merged model's will meet, and known before anything is merged."""
    adaptable, hooks = lora.layers(denoiser.unet), []
    for name, statistic in statistics.items():
        hook = lambda layer, args, to=statistic, f=expert.get(name): to.add(
            lora.rows(layer, args[0]), now.weight, i, f if now.own else None)
        hooks.append(adaptable[name][1].register_forward_pre_hook(hook))
    for now in inputs:
        output = denoiser.predict(now.x_t, now.t, now.prompt)
        denoiser.finite(output, "what the UNet predicts for a calibration input")
    for hook in hooks:
        hook.remove()


def calibrate(experts: Experts, model: Path, data: Path, device: torch.device, precision: str,
              preserve: float | None, seed: int):
    """{layer: its statistic}, by ONE pass of the base UNet over the inputs of all experts; an
    expert's factors are in memory while its inputs pass. Raises BadInput if the experts are not for
    this model, or one has no pairs."""
    files = unet_files(model)
    processes_for(device, files)    # gives a small network one thread, as in training
    if experts.metadata.get("base_model_hash") not in (None, sha256(*files)):
        raise BadInput(f"{experts.files[0].path}: was trained on another base model than --model "
                       f"{model}; give that model")
    for file, concept in zip(experts.files, experts.concepts):
        if not (data / concept).is_dir():    # a merged LoRA, or another program's
            raise BadInput(f"{file.path}: {data} has no pairs of {concept!r}; give the folder of "
                           "all pairs as --data, or use --method average")
    denoiser, encoders_hash = load_denoiser(model, device, precision), sha256(*encoder_files(model))
    match_experts(denoiser.unet, experts)
    statistics = {name: Statistic(preserve is not None) for name in experts.names}
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
    masked = [f._replace(up=f.up * (owner == i)[:, None]) for i, f in enumerate(parts)]
    return add_changes(masked)


def co_merge(parts, layer):
    """Co-Merge [our reconstruction from the paper's captions]. Each output unit goes to the expert
    that is most active there on its own inputs; every other expert's row is dropped. That weakens
    all of them, for which one factor gamma makes up [ours; README, eq. 9]."""
    activity = torch.stack(list(layer.statistic.activity.values()))    # [n, O]
    merged = keep_rows(parts, activity.argmax(0).cpu())    # of equals the first
    energy = layer.statistic.energy(parts).sum()
    kept = layer.statistic.overlaps(parts, merged).sum()
    if kept <= 0:    # it works against its experts: more of it would do harm
        return merged
    # Rows dealt out among n experts with nothing in common need n; more would blow up noise.
    gamma = min((energy / kept).item(), len(parts))
    return merged._replace(up=gamma * merged.up)


def regmean(parts, layer):
    """Merging by solving (README, eq. 10): RegMean (2212.09849), with a term for safe inputs like
    UCE's (2308.14761) [ours]. The least squares problem

        delta W = argmin sum_i E_i |(delta W - delta W_i) x|^2 + lambda sum_i E_i,safe |delta W x|^2
                = (sum_i delta W_i G_i) M^-1,    M = sum_i (G_i + lambda G_i,safe)

    has a solution of rank R, since delta W_i G_i = s_i B_i (A_i G_i):

        A = [A_1 G_1; ...; A_n G_n] M^-1,    B = [s_1 B_1, ..., s_n B_n]
    """
    M, wanted = layer.statistic.M.cpu().double(), layer.statistic.wanted(parts)
    M.diagonal().add_(RIDGE * M.diagonal().mean() + 1e-30)    # of no input at all: 0
    return wanted._replace(down=torch.linalg.solve(M, wanted.down.double().T).T.float())


def solve(parts, layer):
    """regmean(), which weakens every expert; and their strength is given back [ours]. Expert j's
    part delta W_j G_j M^-1 gets the factor c_j (README, eq. 11), such that on its own inputs every
    expert finds all of its energy again.

    That is for layers where inputs tell the experts apart, as prompts do: in cross-attention's
    keys, values and output 0.7 to 0.9 of the energy is kept. Elsewhere the inputs are images, much
    the same in every category, on which experts ask for different things, and least squares gives
    little more than their mean: so the mean itself is taken, as often as c may be at most.
    """
    solved, energy = regmean(parts, layer), layer.statistic.energy(parts)
    overlaps = layer.statistic.overlaps(parts, solved)
    if overlaps.sum() < TOLD_APART * energy.sum():
        return lora.stack(parts, [GIVEN_BACK / layer.n] * len(parts))
    # torch's default driver was seen to give other bytes from call to call.
    c = torch.linalg.lstsq(overlaps, energy[:, None], driver="gelsd").solution[:, 0]
    return solved._replace(up=solved.up * per_rank(c.clamp(1, GIVEN_BACK), parts))


RULES = {"co-merge": co_merge, "regmean": regmean, "solve": solve, "average": average,
         "sum": add_changes, "ties": "model.rivals.merging.ties",
         "dare": "model.rivals.merging.dare"}
CALIBRATED = "co-merge", "regmean", "solve"
READ_BY = {"density": ("ties", "dare"), "preserve": ("regmean", "solve")}


def merge(experts: Experts, rule: Callable, statistics, rank: int | None, density: float | None,
          seed: int):
    """The merged LoRA, and the energy |delta W|^2 kept by and before re-compression, summed [2]."""
    def merged(layer: tuple):
        name, parts = layer
        layer = Layer(len(experts), density, generator(seed, name), statistics.get(name))
        # Of a single expert there is nothing to merge: not even its alpha is touched.
        f = rule(list(parts.values()), layer) if len(experts) > 1 else parts[0]
        if not (f.up.sum() + f.down.sum()).isfinite():    # asked before any SVD
            raise BadInput(f"{name} is not finite any more; use --weights or --density nearer to 1")
        total = sum(len(part.down) for part in parts.values())
        # The rules of this file are exact at that rank.
        most = rank or (total if rule in RULES.values() else min(LARGEST_RANK, total))
        return name, *(lora.compress(f, most) if most < len(f.down) else (f, 0.0, 0.0))

    rows = list(tqdm(in_threads(merged, experts.layers()), total=len(experts.names),
                     desc="merging"))
    energies = torch.tensor([row[2:] for row in rows], dtype=torch.float64)
    return {name: f for name, f, *_ in rows}, energies.sum(0)


def main(args):
    method, out = args.method, args.out or Path("aligned" if args.fuse else "merged.safetensors")
    check_folder(out.parent)
    if args.fuse:
        check_fuse(args.fuse, out)
    elif out.is_dir():
        raise BadInput(f"--out {out}: is a folder; give a file's name")
    for flag, methods in READ_BY.items():
        if getattr(args, flag) is not None and method in RULES and method not in methods:
            raise BadInput(f"--{flag}: --method {method} does not read it; leave it out, or use "
                           f"--method {' or '.join(methods)}")
    rule, density, preserve = named("--method", method, RULES), args.density, args.preserve
    if method in READ_BY["preserve"] and preserve is None:
        preserve = PRESERVE
    files = expand(args.experts)
    if out.resolve() in [file.resolve() for file in files]:
        raise BadInput(f"--out {out}: is one of the LoRAs that are merged; name another file")
    experts, statistics = Experts(files, args.weights), {}
    labels = ",".join(experts.labels)
    made_by = {"concept": labels, "weights": ",".join(f"{w:g}" for w in experts.weights),
               "method": method, "rank": args.rank, "density": density, "preserve": preserve,
               "seed": args.seed}
    if method in CALIBRATED and len(experts) > 1:
        device, precision = device_and_precision(args.device, args.precision)
        made_by["precision"] = precision
        statistics = calibrate(experts, args.model, args.data, device, precision, preserve,
                               args.seed)
    torch.set_num_threads(1)    # the same bytes from any number of cores
    merged, (kept, energy) = merge(experts, rule, statistics, args.rank, density, args.seed)
    if energy:
        print(f"re-compressed: the layers keep {kept / energy:.2%} of their energy |delta W|^2")
    if args.fuse:
        changed = fuse(args.fuse, skeleton(args.fuse), merged, labels, out)
        print(f"{out}: {args.fuse.name} with {changed} layers changed by {labels}")
        return
    made_by = {key: str(value) for key, value in made_by.items() if value is not None}
    save(out, merged, experts.metadata | made_by)
    print(f"{out}: {len(experts)} experts merged by {method}, rank "
          f"{max(len(f.down) for f in merged.values())}")


if __name__ == "__main__":
    run(main, parse_arguments())
