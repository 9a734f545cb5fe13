"""Step 3 of 4: experts into one LoRA. `python merge.py experts/*` -> merged.safetensors

What it is:  Co-Merge, merging by solving (regmean), and the simpler rules beside them. All of them
             merge the weight CHANGES delta W_i = w_i s_i B_i A_i (w_i: --weights), never the
             factors: averaging A and B separately would leave cross terms B_i A_j.
Needs:       experts of train.py, or other LoRAs of one base model: ranks, alphas, spellings and
             adapted layers may differ (a layer that an expert does not adapt is one that it changes
             by zero). For co-merge and regmean also the UNet and data/, for inputs to calibrate on.
Gives:       merged.safetensors, of rank = the sum of the experts' ranks, and exact, except by ties
             and dare, or after --rank; or, with --fuse MODEL, that whole model, aligned. Of one
             expert there is nothing to merge: it stays as it is.

    sum        delta W = sum_i delta W_i                         (task arithmetic, 2212.04089)
    average    delta W = 1/n sum_i delta W_i
    ties       trim, elect, average: see ties()                  (2306.01708)
    dare       delta W = sum_i drop(delta W_i) / density         (2311.03099)
    co-merge   row j of delta W is gamma times row j of the expert that is most active there
    regmean    the delta W that does on each expert's inputs what that expert does, and nothing on
               safe ones, in the sense of least squares          (2212.09849, and a term [ours])

Co-Merge [our reconstruction from the paper's captions] is in Activity and co_merge(), regmean in
Moments and regmean().

Letters: n experts (of a layer: those that adapt it), r rank, R the sum of ranks, N rows that a
layer multiplies, I and O a layer's input and output width; c the expert that an input is from.
"""
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import lora
from lora import Factors
from model.data.pairs import Pairs, read_latents
from model.formats.checkpoint import Checkpoint, encoder_files, unet_files
from model.formats.experts import Experts
from model.formats.fit import match, match_experts
from model.formats.lora_file import expand, save
from model.schedule import stratified_times
from model.stable_diffusion import Denoiser, at_once, load_denoiser, skeleton
from model.text import Prompt
from model.tools.command import BadInput, Parser, number, portion, positive, run
from model.tools.device import device_and_precision
from model.tools.files import check_folder, sha256
from model.tools.processes import processes_for
from model.tools.training import generator

DENSITY = {"ties": 0.2, "dare": 0.5}    # where the user does not say; TIES' is the published one
LARGEST_RANK = 128                      # of ties and dare, likewise [ours: a usual LoRA's most]
CALIBRATION_PAIRS = 24                  # of each expert [ours: more changed nothing]
RIDGE = 1e-4                            # of the mean diagonal: M may be singular [ours]


def parse_arguments(argv=None):
    parser = Parser("Merges LoRA experts into one LoRA.")
    add = parser.add_argument
    add("experts", nargs="+", type=Path, help="LoRA files, or a folder of them")
    add("--method", choices=RULES, default="co-merge", help="see the top of merge.py")
    add("--weights", type=number, nargs="+", default=[1.0],
        help="one factor for each expert, or one for all (default: 1)")
    add("--rank", type=positive, help="re-compress each layer to this rank (default: the sum of "
        f"the experts' ranks, exact; ties and dare: that, but at most {LARGEST_RANK})")
    add("--density", type=portion, help="share of entries that ties and dare keep of each delta W "
        "(default: ties 0.2, as published; dare 0.5)")
    add("--preserve", type=number, help="how much safe inputs weigh in regmean, where an expert's "
        "own inputs weigh 1 (default: 0.1)")
    add("--data", type=Path, default=Path("data"), help="what make_data.py wrote, for co-merge and "
        "regmean")
    add("--fuse", type=Path, metavar="MODEL", help="write a whole aligned checkpoint instead: a "
        "copy of this diffusers folder or single file, with the merged LoRA in its weights")
    add("--out", type=Path, help="LoRA file to write; with --fuse the folder "
        "(default: merged.safetensors; with --fuse aligned)")
    return parser.parse_args(argv)


class Inputs(NamedTuple):
    """A batch of what the UNet is calibrated on."""
    expert: int        # whose category it is of
    safe: bool         # under safe prompts
    share: float       # of this expert's inputs of this kind
    x_t: torch.Tensor
    t: torch.Tensor
    prompt: Prompt


def calibration(expert: int, pairs: Pairs, denoiser: Denoiser, safe: bool,
                rng: torch.Generator) -> Iterator[Inputs]:
    """The inputs that an expert was trained to change: its unsafe prompts, on the unsafe and on the
    safe image, which is where sampling starts out and where it should end. safe: those that it was
    trained to leave alone: the safe image under its safe prompt and without one. All noise levels
    come equally often."""
    first = lambda tensor: tensor[:CALIBRATION_PAIRS]
    winner, loser = first(pairs.winner), first(pairs.loser)
    if safe:
        nothing = pairs.empty.map(lambda states: states.expand(len(winner), *states.shape[1:]))
        x_0, prompt = torch.cat([winner, winner]), pairs.safe.map(first).followed_by(nothing)
    else:
        unsafe = pairs.unsafe.map(first)
        x_0, prompt = torch.cat([winner, loser]), unsafe.followed_by(unsafe)
    t = stratified_times(len(x_0), denoiser.schedule.T, rng)
    x_t = denoiser.schedule.add_noise(x_0, torch.randn(x_0.shape, generator=rng), t)
    size = at_once(denoiser.reduction * x_0.shape[-1])
    for k in range(0, len(x_0), size):
        cut = lambda tensor: tensor[k:k + size].to(denoiser.device)
        part = cut(x_t)
        yield Inputs(expert, safe, len(part) / len(x_0), part, cut(t), prompt.map(cut))


class Activity:
    """What Co-Merge wants to know of a layer. Expert i changes output unit j of an input x by

        d_i(x)_j = (s_i B_i A_i x)_j

    own [n, O]     mean |d_i(x)_j| over the x of i's own category
    moment [O, R]  sum over all x of d_c(x) (A x)^T;  A [R, I]: all A_i stacked
    energy []      sum over all x of |d_c(x)|^2
    """
    safe_inputs = False

    def __init__(self, parts: dict[int, Factors], device: torch.device):
        self.place = {expert: k for k, expert in enumerate(parts)}
        self.ranks = [len(f.down) for f in parts.values()]
        stacked = lora.stack(list(parts.values()), [1.0] * len(parts))
        self.down, up = stacked.down.to(device), stacked.up.to(device)    # [R, I], [O, R]
        self.ups = up.split(self.ranks, 1)
        self.own = torch.zeros(len(parts), len(up), device=device)
        self.moment, self.energy = torch.zeros_like(up), torch.zeros((), device=device)

    def add(self, x: torch.Tensor, inputs: Inputs):
        """Takes in what the layer multiplies, x [N, I]."""
        if inputs.expert not in self.place:    # one that does not change this layer
            return
        c = self.place[inputs.expert]
        narrow = x @ self.down.T                                          # [N, R]
        d = narrow.split(self.ranks, 1)[c] @ self.ups[c].T                # d_c(x) [N, O]
        self.own[c] += inputs.share * d.abs().mean(0)
        self.moment += d.T @ narrow
        self.energy += d.square().sum()

    @property
    def owner(self) -> torch.Tensor:
        """[O]: the place of the most active expert; of equals the first."""
        return self.own.argmax(0).cpu()


class Moments:
    """What regmean wants to know of a layer, G_i = E x x^T over the x of i's category [I, I]:

    M [I, I]         sum_i ( G_i + lambda G_i,safe )        also of experts that leave it as it is
    products [R, I]  A_i G_i, one below the other
    So memory does not grow with the inputs, and with n by [r, I] alone.
    """
    safe_inputs = True

    def __init__(self, parts: dict[int, Factors], device: torch.device):
        self.downs = {expert: f.down.to(device) for expert, f in parts.items()}
        self.products = {expert: torch.zeros_like(down) for expert, down in self.downs.items()}
        width = next(iter(self.downs.values())).shape[1]
        self.own, self.safe = torch.zeros(2, width, width, device=device)

    def add(self, x: torch.Tensor, inputs: Inputs):
        """Takes in what the layer multiplies, x [N, I]."""
        gram = inputs.share / len(x) * x.T @ x
        if inputs.safe:
            self.safe += gram
            return
        self.own += gram
        if inputs.expert in self.downs:
            self.products[inputs.expert] += self.downs[inputs.expert] @ gram


@torch.no_grad()
def measure(denoiser: Denoiser, statistics: dict[str, Activity | Moments], inputs):
    """Fills the statistics {layer: ...} in ONE pass of the base UNet for all experts, since x does
    not depend on the expert: it is what the base UNet's layer meets, an approximation of what the
    merged one's will meet."""
    adaptable, hooks, now = lora.layers(denoiser.unet), [], None

    def hook_of(statistic):
        return lambda layer, args: statistic.add(lora.rows(layer, args[0]), now)
    for name, statistic in statistics.items():
        hooks.append(adaptable[name][1].register_forward_pre_hook(hook_of(statistic)))
    for now in tqdm(inputs, desc="calibrating"):
        output = denoiser.predict(now.x_t, now.t, now.prompt)
        denoiser.finite(output, "what the UNet predicts for a calibration input")
    for hook in hooks:
        hook.remove()


def calibrate(experts: Experts, method: str, model: Path, data: Path, device: torch.device,
              precision: str, seed: int) -> dict[str, Activity | Moments]:
    """Loads the UNet and measures. Raises BadInput if the experts are not for this model."""
    files = unet_files(model)
    processes_for(device, files)    # gives a small network one thread, as in training
    if experts.metadata.get("base_model_hash") not in (None, sha256(*files)):
        raise BadInput(f"{experts.files[0].path}: was trained on another base model than --model "
                       f"{model}; give that model")
    denoiser = load_denoiser(model, device, precision)
    match_experts(denoiser.unet, experts)
    kind = STATISTICS[method]
    statistics = {name: kind(parts, device) for name, parts in experts.layers()}

    def inputs():
        encoders_hash = sha256(*encoder_files(model))
        for expert, file in enumerate(experts.files):
            concept = file.metadata.get("concept", file.path.stem)
            pairs = read_latents(data, [concept], encoders_hash)
            for safe in (False, True) if kind.safe_inputs else (False,):
                rng = generator(seed, "calibration", *["safe"] * safe, concept)
                yield from calibration(expert, pairs, denoiser, safe, rng)
    measure(denoiser, statistics, inputs())
    return statistics


class Layer(NamedTuple):
    """What a rule may want to know besides the changes."""
    n: int                     # experts in all, also those that do not adapt this layer
    density: float | None
    preserve: float
    rng: torch.Generator
    statistic: Activity | Moments | None


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
    kept = torch.rand(deltas.shape, generator=layer.rng) < layer.density
    return dense((deltas * kept / layer.density).sum(0), parts[0].kernel)


def keep_rows(parts: list[Factors], owner: torch.Tensor) -> Factors:
    """The masked concatenation (README, eq. 8): row j of delta W is that of parts[owner[j]].

        A = [A_1; ...; A_n],    B = [M_1 s_1 B_1, ..., M_n s_n B_n],    M_i = diag(owner(j) = i)
    """
    masked = [f._replace(up=f.up * (owner == i)[:, None]) for i, f in enumerate(parts)]
    return lora.stack(masked, [1.0] * len(parts))


def rescaled(merged: Factors, activity: Activity) -> Factors:
    """gamma times merged [ours; README, eq. 9]. Dropping rows weakens every expert, and a sum makes
    what they share too strong. One factor for the layer makes up for both:

        gamma = sum_x |d_c(x)|^2 / sum_x <d_c(x), d_merged(x)>

    over the x of all categories. All together they then move as far in the direction of their own
    experts as those did. Since merged has all A_i for its A, the lower sum is <B, moment>.
    """
    kept = (merged.up * activity.moment.cpu()).sum()
    if kept <= 0:    # it works against its experts: more of it would do harm
        return merged
    # Rows dealt out among n experts with nothing in common need n; more would blow up noise.
    gamma = min((activity.energy.cpu() / kept).item(), len(activity.own))
    return merged._replace(up=merged.up * gamma)


def co_merge(parts: list[Factors], layer: Layer) -> Factors:
    """Each output unit goes to the expert that is most active there on its own inputs; every other
    expert's row is dropped; and gamma rescales what is left."""
    return rescaled(keep_rows(parts, layer.statistic.owner), layer.statistic)


def regmean(parts: list[Factors], layer: Layer) -> Factors:
    """Merging by solving (README, eq. 10): RegMean (2212.09849) with a term for safe inputs, like
    that of UCE (2308.14761) [ours]. The least squares problem of this layer

        delta W = argmin  sum_i E_i |(delta W - delta W_i) x|^2 + lambda sum_i E_i,safe |delta W x|^2
                = (sum_i delta W_i G_i) M^-1

    has a solution of rank sum_i r_i, since delta W_i G_i = s_i B_i (A_i G_i):

        A = [A_1 G_1; ...; A_n G_n] M^-1,    B = [s_1 B_1, ..., s_n B_n]
    """
    moments = layer.statistic
    M = (moments.own + layer.preserve * moments.safe).cpu().double()
    M.diagonal().add_(RIDGE * M.diagonal().mean())
    products = torch.cat(list(moments.products.values())).cpu().double()
    downs = torch.linalg.solve(M, products.T).T.float().split([len(f.down) for f in parts])
    return lora.stack([f._replace(down=down) for f, down in zip(parts, downs)], [1.0] * len(parts))


RULES = {"co-merge": co_merge, "regmean": regmean, "average": average, "sum": add_changes,
         "ties": ties, "dare": dare}
STATISTICS = {"co-merge": Activity, "regmean": Moments}    # the methods that calibrate


def merge(experts: Experts, method: str, statistics: dict, rank: int | None = None,
          density: float | None = None, preserve: float = 0.1, seed: int = 0):
    """The merged LoRA, and the energy |delta W|^2 kept by and before re-compression, summed."""
    merged, energy = {}, torch.zeros(2, dtype=torch.float64)
    for name, parts in tqdm(experts.layers(), total=len(experts.names), desc="merging"):
        layer = Layer(len(experts), density, preserve, generator(seed, name), statistics.get(name))
        # Of a single expert there is nothing to merge: not even its alpha is touched.
        f = RULES[method](list(parts.values()), layer) if len(experts) > 1 else parts[0]
        if not (f.up.sum() + f.down.sum()).isfinite():    # asked before any SVD
            raise BadInput(f"{name} is not finite any more; use --weights or --density nearer to 1")
        most = rank or min(LARGEST_RANK, sum(len(part.down) for part in parts.values()))
        if (rank or method in DENSITY) and most < len(f.down):
            f, *kept = lora.compress(f, most)
            energy += torch.stack(kept)    # by compression, and before
        merged[name] = f
    return merged, energy


def print_rows(labels: list[str], statistics: dict[str, Activity]):
    """Which share of a layer's rows each expert keeps, on average."""
    shares = torch.zeros(len(labels))
    for activity in statistics.values():
        owner = torch.tensor(list(activity.place))[activity.owner]
        shares += owner.bincount(minlength=len(labels)) / len(owner)
    for label, total in zip(labels, shares.tolist()):
        print(f"{label:>20} keeps {total / len(statistics):6.1%} of a layer's rows")


def fuse(model: Path, merged: dict[str, Factors], labels: str, out: Path) -> int:
    """Copies a checkpoint to the folder `out`, with W + delta W, added in fp32, in its layers.
    Returns how many changed. Raises BadInput if the LoRA is for another model."""
    network = skeleton(model)
    fused, adaptable = match(network, merged, labels), lora.layers(network)
    factors = {f"{adaptable[key][0]}.weight": f for key, f in fused.items()}
    return Checkpoint(model).rewrite(
        out, lambda name: factors[name].delta() if name in factors else None)


def check(method: str, density: float | None, preserve: float | None, fuse: Path | None, out: Path):
    """Raises BadInput for what cannot work: now, and not after hours of work."""
    check_folder(out.parent)
    if fuse and not fuse.exists():
        raise BadInput(f"--fuse {fuse}: no such file or folder; give a Stable Diffusion")
    if fuse and out.is_dir() and any(out.iterdir()):
        raise BadInput(f"--out {out}: is not empty; name a new folder")
    if density and method not in DENSITY:
        raise BadInput(f"--density: --method {method} does not read it; leave it out, or use "
                       f"--method {' or '.join(DENSITY)}")
    if preserve is not None and (method != "regmean" or preserve < 0):
        raise BadInput(f"--preserve {preserve:g}: needs --method regmean and a number from 0 on; "
                       "give both, or leave it out")


def main(args):
    method, out = args.method, args.out or Path("aligned" if args.fuse else "merged.safetensors")
    check(method, args.density, args.preserve, args.fuse, out)
    density = args.density or DENSITY.get(method)
    preserve = 0.1 if args.preserve is None else args.preserve
    experts, statistics, how = Experts(expand(args.experts), args.weights), {}, {}
    if method in STATISTICS and len(experts) > 1:
        device, precision = device_and_precision(args.device, args.precision)
        how["precision"] = precision
        statistics = calibrate(experts, method, args.model, args.data, device, precision, args.seed)
        if method == "co-merge":
            print_rows(experts.labels, statistics)
    torch.set_num_threads(1)    # the same bytes from any number of cores
    merged, (kept, energy) = merge(experts, method, statistics, args.rank, density, preserve,
                                   args.seed)
    if energy:
        print(f"re-compressed: the layers keep {kept / energy:.2%} of their energy |delta W|^2")
    labels = ",".join(experts.labels)
    if args.fuse:
        changed = fuse(args.fuse, merged, labels, out)
        print(f"{out}: {args.fuse.name} with {changed} layers changed by {labels}")
        return
    inherited = "base_model_hash", "prediction_type"
    metadata = {key: experts.metadata[key] for key in inherited if key in experts.metadata}
    metadata |= {"concept": labels, "weights": ",".join(f"{w:g}" for w in experts.weights), **how,
                 "method": method, "rank": str(args.rank), "density": str(density),
                 "seed": str(args.seed)}
    if method == "regmean":
        metadata["preserve"] = str(preserve)
    save(out, merged, metadata)
    print(f"{out}: {len(experts)} experts merged by {method}, rank "
          f"{max(len(f.down) for f in merged.values())}")


if __name__ == "__main__":
    run(main, parse_arguments())
