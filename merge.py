"""Step 3 of 4: experts into one LoRA. `python merge.py experts/*` -> merged.safetensors

What it is:  Co-Merge, and the rules beside it. All of them merge the weight CHANGES
             delta W_i = w_i s_i B_i A_i (w_i: --weights), never the factors: averaging A and B
             separately would leave cross terms B_i A_j.
Needs:       experts of train.py, or other LoRAs of one base model: ranks, alphas, spellings and
             adapted layers may differ (a layer that an expert does not adapt is one that it changes
             by zero). For Co-Merge and scaled-sum also the UNet and data/, calibration inputs.
Gives:       merged.safetensors, of rank = the sum of the experts' ranks, and exact, except by ties
             and dare, or after --rank; or, with --fuse MODEL, that whole model, aligned. Of one
             expert there is nothing to merge: it stays as it is.

    sum        delta W = sum_i delta W_i                         (task arithmetic, 2212.04089)
    average    delta W = 1/n sum_i delta W_i
    ties       trim, elect, average: see ties()                  (2306.01708)
    dare       delta W = sum_i drop(delta W_i) / density         (2311.03099)
    scaled-sum delta W = gamma sum_i delta W_i                   gamma: see below
    random     row j of delta W is row j of delta W_owner(j), owner(j) drawn at random: a control
    co-merge   gamma times the same, with owner(j) = the most active expert

Co-Merge [our reconstruction from the paper's captions]. For a layer with input x, expert i changes
output unit j by d_i(x)_j = (s_i B_i A_i x)_j. Each unit goes to the expert that is most active
there on the prompts that it was trained to change, and every other expert's row j of delta W is
dropped:

    owner(j) = argmax_i mean |d_i(x)_j| over the x of i's own category
    A = [A_1; ...; A_n],    B = [M_1 s_1 B_1, ..., M_n s_n B_n],    M_i = diag(owner(j) = i)

Dropping rows weakens every expert, and a sum makes what they share too strong. Rescaling [ours]
makes up for both, with one factor for each layer:

    gamma = sum_x |d_c(x)|^2 / sum_x <d_c(x), d_merged(x)>        c = the category of input x

over the x of all categories; at most n, and 1 where the merged change works against its experts.
Otherwise the merged LoRA moves all inputs together as far in the direction of their own experts as
those did. Of n identical experts gamma is 1 (co-merge) or 1 / n (scaled-sum).

Letters: n experts (of a layer: those that adapt it), r rank, N rows that a layer multiplies, I and
O a layer's input and output width.
"""
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import lora
from lora import Factors, layers
from model.data.pairs import read_latents
from model.formats.checkpoint import encoder_files, unet_files
from model.formats.experts import Experts
from model.formats.fit import check_fuse, fuse, match_experts
from model.formats.lora_file import expand, save
from model.schedule import stratified_times
from model.stable_diffusion import Denoiser, at_once, load_denoiser
from model.tools.command import BadInput, Parser, number, portion, positive, run
from model.tools.device import device_and_precision
from model.tools.files import check_folder, sha256
from model.tools.processes import processes_for
from model.tools.training import generator

DENSITY = {"ties": 0.2, "dare": 0.5}    # where the user does not say; TIES' is the published one
LARGEST_RANK = 128                      # of ties and dare, likewise
CALIBRATION_PAIRS = 24                  # of each expert
CALIBRATED = "co-merge", "scaled-sum"


def parse_arguments(argv=None):
    parser = Parser("Merges LoRA experts into one LoRA.")
    add = parser.add_argument
    add("experts", nargs="+", type=Path, help="LoRA files, or a folder of them")
    add("--method", choices=RULES, default="co-merge", help="random deals rows out, a control")
    add("--weights", type=number, nargs="+", default=[1.0],
        help="one factor for each expert, or one for all (default: 1)")
    add("--rank", type=positive, help="re-compress each layer to this rank (default: the sum of "
        f"the experts' ranks, exact; ties and dare: that, but at most {LARGEST_RANK})")
    add("--density", type=portion, help="share of entries that ties and dare keep of each delta W "
        "(default: ties 0.2, as published; dare 0.5)")
    add("--data", type=Path, default=Path("data"), help="what make_data.py wrote, for co-merge and "
        "scaled-sum")
    add("--fuse", type=Path, metavar="MODEL", help="write a whole aligned checkpoint instead: a "
        "copy of this diffusers folder or single file, with the merged LoRA in its weights")
    add("--out", type=Path, help="LoRA file to write; with --fuse the folder "
        "(default: merged.safetensors; with --fuse aligned)")
    return parser.parse_args(argv)


class Activity(NamedTuple):
    """What calibration tells of a layer: sums over the rows x of its inputs. c: the expert of x."""
    experts: torch.Tensor   # [n]     which of all experts these are
    own: torch.Tensor       # [n, O]  mean |d_i(x)_j| over the x with c = i
    moment: torch.Tensor    # [O, R]  sum over all x of d_c(x) (A x)^T; A [R, I]: all A_i stacked
    energy: torch.Tensor    # []      sum over all x of |d_c(x)|^2

    @property
    def owner(self) -> torch.Tensor:
        return self.own.argmax(0)    # [O]; of equals the first


class Layer(NamedTuple):
    """What a rule may want to know besides the changes."""
    n: int                     # experts in all, also those that do not adapt this layer
    density: float | None
    random: torch.Generator
    activity: Activity | None


def add_changes(parts: list[Factors], layer: Layer) -> Factors:
    return lora.stack(parts, [1.0] * len(parts))


def average(parts: list[Factors], layer: Layer) -> Factors:
    return lora.stack(parts, [1 / layer.n] * len(parts))


def dense(delta: torch.Tensor, kernel: tuple) -> Factors:
    """Any delta W [O, I] as factors: B = 1, A = delta W."""
    return Factors(delta, torch.eye(len(delta)), float(len(delta)), kernel)


def ties(parts: list[Factors], layer: Layer) -> Factors:
    """TIES. Trim each delta W_i of this layer to its largest entries by magnitude; elect for each
    entry the sign of the trimmed sum; average the entries that have that sign."""
    deltas = torch.stack([f.delta() for f in parts])    # [n, O, I]
    size = deltas.abs().flatten(1)
    smallest = size.shape[1] - max(1, int(layer.density * size.shape[1])) + 1
    trimmed = deltas * (deltas.abs() >= size.kthvalue(smallest).values[:, None, None])
    elected = trimmed * (trimmed * trimmed.sum(0) > 0)
    return dense(elected.sum(0) / elected.count_nonzero(0).clamp(min=1), parts[0].kernel)


def dare(parts: list[Factors], layer: Layer) -> Factors:
    """DARE. Drop entries of each delta W_i at random; rescale the rest by 1/density, so that the
    mean over all draws is delta W_i; and sum."""
    deltas = torch.stack([f.delta() for f in parts])
    kept = torch.rand(deltas.shape, generator=layer.random) < layer.density
    return dense((deltas * kept / layer.density).sum(0), parts[0].kernel)


def keep_rows(parts: list[Factors], owner: torch.Tensor) -> Factors:
    """The masked concatenation (README, eq. 8): row j of delta W is that of parts[owner[j]]."""
    masked = [f._replace(up=f.up * (owner == i)[:, None]) for i, f in enumerate(parts)]
    return lora.stack(masked, [1.0] * len(parts))


def random_rows(parts: list[Factors], layer: Layer) -> Factors:
    return keep_rows(parts, torch.randint(len(parts), (len(parts[0].up),), generator=layer.random))


def rescaled(merged: Factors, layer: Layer) -> Factors:
    """gamma times merged (README, eq. 9), whose A is all A_i stacked: <d_c(x), B A x>, summed over
    x, is <B, moment>."""
    kept = (merged.up * layer.activity.moment).sum()
    if kept <= 0:    # it works against its experts: more of it would do harm
        return merged
    # Rows dealt out among n experts with nothing in common need n; more would blow up noise.
    gamma = min((layer.activity.energy / kept).item(), len(layer.activity.own))
    return merged._replace(up=merged.up * gamma)


def co_merge(parts: list[Factors], layer: Layer) -> Factors:
    return rescaled(keep_rows(parts, layer.activity.owner), layer)


def scaled_sum(parts: list[Factors], layer: Layer) -> Factors:
    return rescaled(add_changes(parts, layer), layer)


RULES = {"co-merge": co_merge, "scaled-sum": scaled_sum, "average": average, "sum": add_changes,
         "ties": ties, "dare": dare, "random": random_rows}


class Meter:
    """Listens to the inputs of one layer, and sums up what each expert would change there."""

    def __init__(self, parts: dict[int, Factors], device: torch.device):
        self.place = {expert: k for k, expert in enumerate(parts)}
        ranks = [len(f.down) for f in parts.values()]
        stacked = add_changes(list(parts.values()), None)
        self.down, up = stacked.down.to(device), stacked.up.to(device)    # [R, I], [O, R]
        self.ups, self.ranks = up.split(ranks, 1), ranks
        self.own = torch.zeros(len(parts), len(up), device=device)
        self.moment, self.energy = torch.zeros_like(up), torch.zeros((), device=device)
        self.heard = [1e-9] * len(parts)
        self.expert = None    # whose input comes next

    def listen(self, layer: torch.nn.Module, inputs):
        if self.expert not in self.place:
            return
        x, c = lora.rows(layer, inputs[0]), self.place[self.expert]
        narrow = x @ self.down.T                                         # [N, R]
        own = narrow.split(self.ranks, 1)[c] @ self.ups[c].T             # d_c(x) [N, O]
        self.own[c] += own.abs().sum(0)
        self.energy += own.square().sum()
        self.heard[c] += len(x)
        self.moment += own.T @ narrow

    def activity(self) -> Activity:
        mean = self.own.cpu() / torch.tensor(self.heard)[:, None]
        return Activity(torch.tensor(list(self.place)), mean, self.moment.cpu(), self.energy.cpu())


@torch.no_grad()
def measure(denoiser: Denoiser, parts, inputs) -> dict[str, Activity]:
    """{layer: Activity}. ONE pass of the base UNet scores all experts, since x does not depend on
    the expert: it is what the base UNet meets, an approximation of what the merged one will meet.

    parts: (layer, {expert: Factors}) as of Experts.layers(). inputs: as of calibration()."""
    known, device = layers(denoiser.unet), denoiser.device
    meters = {name: Meter(of_layer, device) for name, of_layer in parts}
    for name, meter in meters.items():
        known[name][1].register_forward_pre_hook(meter.listen)
    for expert, *batch in tqdm(inputs, desc="calibrating"):
        for meter in meters.values():
            meter.expert = expert
        output = denoiser.predict(*batch)
        denoiser.finite(output, "the answer to a calibration input")
    return {name: meter.activity() for name, meter in meters.items()}


def calibration(args, concepts: list[str], encoders: str, denoiser: Denoiser):
    """Yields (expert, x_t, t, context), the inputs that each expert was trained to change: its
    unsafe prompts, on the unsafe and on the safe picture, which is where sampling starts out and
    where it should end; all noise levels equally often."""
    for expert, concept in enumerate(concepts):
        pairs = read_latents(args.data, [concept], encoders)
        x0 = torch.cat([x[:CALIBRATION_PAIRS] for x in (pairs.winner, pairs.loser)])
        unsafe = pairs.unsafe.map(lambda states: states[:CALIBRATION_PAIRS])
        prompt = unsafe.followed_by(unsafe)
        random = generator(args.seed, "calibration", concept)
        t = stratified_times(len(x0), denoiser.schedule.T, random)
        x_t = denoiser.schedule.add_noise(x0, torch.randn(x0.shape, generator=random), t)
        size = at_once(denoiser.reduction * x0.shape[-1])
        for k in range(0, len(x0), size):
            cut = lambda tensor: tensor[k:k + size].to(denoiser.device)
            yield expert, cut(x_t), cut(t), prompt.map(cut)


def calibrate(args, experts: Experts) -> dict[str, Activity]:
    """Loads the UNet and measures. Raises BadInput if the experts are not for this model."""
    device, args.precision = device_and_precision(args.device, args.precision)
    files = unet_files(args.model)
    processes_for(device, files)    # gives a small network one thread, as in training
    if experts.metadata.get("base_model_hash") not in (None, sha256(*files)):
        raise BadInput(f"{experts.files[0].path}: was trained on another base model than --model "
                       f"{args.model}; give that model")
    denoiser = load_denoiser(args.model, device, args.precision)
    match_experts(denoiser.unet, experts)
    concepts = [file.metadata.get("concept", file.path.stem) for file in experts.files]
    inputs = calibration(args, concepts, sha256(*encoder_files(args.model)), denoiser)
    return measure(denoiser, experts.layers(), inputs)


def merge(args, experts: Experts, activity: dict[str, Activity]):
    """The merged LoRA, and the energy |delta W|^2 kept by and before re-compression, summed."""
    merged, energy = {}, torch.zeros(2, dtype=torch.float64)
    for name, parts in tqdm(experts.layers(), total=len(experts.names), desc="merging"):
        layer = Layer(len(experts), args.density, generator(args.seed, name), activity.get(name))
        # Of a single expert there is nothing to merge: not even its alpha is touched.
        f = RULES[args.method](list(parts.values()), layer) if len(experts) > 1 else parts[0]
        if not (f.up.sum() + f.down.sum()).isfinite():    # asked before any SVD
            raise BadInput(f"{name} is not finite any more; use --weights or --density nearer to 1")
        rank = args.rank or min(LARGEST_RANK, sum(len(part.down) for part in parts.values()))
        if (args.rank or args.method in DENSITY) and rank < len(f.down):
            f, *kept = lora.compress(f, rank)
            energy += torch.stack(kept)    # by compression, and before
        merged[name] = f
    return merged, energy


def print_rows(labels: list[str], activity: dict[str, Activity]):
    """Which share of a layer's rows each expert keeps, on average."""
    shares = torch.zeros(len(labels))
    for a in activity.values():
        shares += a.experts[a.owner].bincount(minlength=len(labels)) / len(a.owner)
    for label, total in zip(labels, shares.tolist()):
        print(f"{label:>20} keeps {total / len(activity):6.1%} of a layer's rows")


def main(args):
    out = args.out or Path("aligned" if args.fuse else "merged.safetensors")
    check_folder(out.parent)
    if args.fuse:
        check_fuse(args.fuse, out)
    if args.density and args.method not in DENSITY:
        raise BadInput(f"--density: --method {args.method} does not read it; leave it out, or use "
                       f"--method {' or '.join(DENSITY)}")
    args.density = args.density or DENSITY.get(args.method)
    experts = Experts(expand(args.experts), args.weights)
    activity = {}
    if args.method in CALIBRATED and len(experts) > 1:
        activity = calibrate(args, experts)
        if args.method == "co-merge":
            print_rows(experts.labels, activity)
    torch.set_num_threads(1)    # the same bytes from any number of cores
    merged, (kept, energy) = merge(args, experts, activity)
    if energy:
        print(f"re-compressed: the layers keep {kept / energy:.2%} of their energy |delta W|^2")
    labels = ",".join(experts.labels)
    if args.fuse:
        changed = fuse(args.fuse, merged, labels, out)
        print(f"{out}: {args.fuse.name} with {changed} layers changed by {labels}")
        return
    inherited = "base_model_hash", "prediction_type"
    metadata = {key: experts.metadata[key] for key in inherited if key in experts.metadata}
    metadata |= {"concept": labels, "weights": ",".join(f"{w:g}" for w in experts.weights)}
    for key in ("method", "rank", "density", "seed") + ("precision",) * bool(activity):
        metadata[key] = str(getattr(args, key))
    save(out, merged, metadata)
    print(f"{out}: {len(experts)} experts merged by {args.method}, rank "
          f"{max(len(f.down) for f in merged.values())}")


if __name__ == "__main__":
    run(main, parse_arguments())
