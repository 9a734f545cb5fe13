"""Step 3 of 4: experts into one LoRA. `python merge.py experts/*` -> merged.safetensors

What it is:  Co-Merge, and the methods beside it. All of them merge the weight CHANGES delta W_i = w_i s_i B_i A_i (w_i:
             --weights), never the factors: averaging A and B separately would leave cross terms B_i A_j.
Needs:       experts of train.py, or other LoRAs of one base model: ranks, alphas, key styles and adapted layers may differ
             (a layer that an expert does not adapt is one that it changes by zero). For Co-Merge also the model and
             data/, or --prompts (its calibration inputs).
Gives:       merged.safetensors, of rank = the sum of the experts' ranks, and exact, except by ties and dare, or after
             --rank; or, with --fuse MODEL, that whole model, aligned. Of one expert there is nothing to merge: it stays as it is.

    sum        delta W = sum_i delta W_i                            (task arithmetic, Ilharco et al. 2022, 2212.04089)
    average    delta W = 1/n sum_i delta W_i
    ties       trim, elect, average: see ties()                     (Yadav et al. 2023, 2306.01708)
    dare       delta W = sum_i drop(delta W_i) / density: see dare()    (Yu et al. 2023, 2311.03099)
    random     row j of delta W is row j of delta W_owner(j), owner(j) drawn at random: a control
    co-merge   the same, with owner(j) = the most active expert

Co-Merge [our reconstruction from the paper's captions]. For a layer with input x, expert i
changes output unit j by d_i(x)_j = (s_i B_i A_i x)_j. Each unit goes to the expert that is most active there, and
every other expert's row j of delta W is dropped:

    owner(j) = argmax_i a_ij,    A = [A_1; ...; A_n],    B = [M_1 s_1 B_1, ..., M_n s_n B_n],    M_i = diag(owner(j) = i)

The activity a_ij that the paper does not give (--score): `own`, the mean of |d_i(x)_j| over the unsafe prompts that
expert i was trained to change; `wins`, how often |d_i(x)_j| is the largest, over the prompts of all experts. Nor does it
say how many experts keep a row (--top-k).

Dropping rows weakens every expert. Rescaling [ours] makes up for it, with one factor for each layer:

    s = sum_x |d_c(x)|^2 / sum_x <d_c(x), d_merged(x)>        c = the category that input x belongs to

over the x of all categories; 1 for a single expert and for identical ones; at most n. With it, the merged LoRA moves all
inputs together as far in the direction of their own experts as those did.

Letters: n experts (of a layer: those that adapt it), r rank, K owners of a unit, T tokens of a batch, I and O a layer's
input and output width.
"""
from pathlib import Path

from model.files import BadInput, Parser, run

METHODS = ("co-merge", "average", "sum", "ties", "dare", "random")


def parse_arguments():
    parser = Parser("Merges LoRA experts into one LoRA.")
    parser.add_argument("experts", nargs="+", type=Path, help="LoRA files, or a folder of them (an expert's log and curves are passed over)")
    parser.add_argument("--method", choices=METHODS, default="co-merge", help="random: rows dealt out at random, a control (default: co-merge)")
    parser.add_argument("--weights", type=float, nargs="+", default=None, help="one factor for each expert, or one for all (default: 1)")
    parser.add_argument("--rank", type=int, default=None, metavar="R", help="re-compress each layer to this rank, and say how much energy |delta W|^2 that keeps (default: the sum of the experts' ranks, exact; ties and dare: that, but at most 128)")
    parser.add_argument("--density", type=float, default=None, metavar="P", help="share of entries, above 0 to 1, that ties and dare keep of each delta W (default: ties 0.2, as published; dare 0.5)")
    parser.add_argument("--score", choices=["own", "wins"], default="own", help="co-merge: how active an expert is at an output unit (default: own)")
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="co-merge: average the rows of a unit's K most active experts (default: 1)")
    parser.add_argument("--no-rescale", action="store_true", help="co-merge: leave the kept rows as strong as they are")
    parser.add_argument("--data", type=Path, default=Path("data"), help="calibration inputs of co-merge: what make_data.py wrote (default: data)")
    parser.add_argument("--prompts", type=Path, default=None, metavar="FILE", help="calibrate on these prompts instead, on pictures that the model draws for them: text, one a line, for every expert; or JSON lines with \"prompt\" and, if it is for one expert, \"category\" (default: none)")
    parser.add_argument("--report", type=Path, default=None, metavar="FILE.png", help="co-merge, random: picture of the share of rows that each expert keeps in each layer (default: none)")
    parser.add_argument("--fuse", type=Path, default=None, metavar="MODEL", help="write the whole aligned checkpoint instead: a copy of this diffusers folder or single file with the merged LoRA in its weights (default: none)")
    parser.add_argument("--out", type=Path, default=None, help="LoRA file to write; with --fuse the folder (default: merged.safetensors; with --fuse: aligned)")
    return parser.parse_args()


ARGS = parse_arguments() if __name__ == "__main__" else None  # before the heavy imports: --help answers at once

import math  # noqa: E402
import sys  # noqa: E402
import zlib  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import lora  # noqa: E402
from lora import Factors  # noqa: E402
from model.calibration import from_pairs, from_prompts  # noqa: E402
from model.checkpoint import Checkpoint  # noqa: E402
from model.files import check_folder, sha256  # noqa: E402
from model.pictures import heat_map  # noqa: E402
from model.stable_diffusion import load, pick_device, skeleton, unet_files  # noqa: E402
from model.workers import processes_for  # noqa: E402

MOST = 128    # rank that ties and dare write unless --rank says another
DENSITY = {"ties": 0.2, "dare": 0.5}
READ_BY = {"density": (None, DENSITY), "score": ("own", ["co-merge"]), "top_k": (1, ["co-merge"]), "no_rescale": (False, ["co-merge"]),
           "prompts": (None, ["co-merge"])}          # {flag: (where it is not given, the methods that read it)}


# ------------------------------------------------------------------- the methods, one layer at a time
def dense(delta: torch.Tensor, like: Factors) -> Factors:
    """Any delta W [O, I] as factors: B = 1, A = delta W."""
    return Factors(delta, torch.eye(len(delta)), float(len(delta)), like.kernel)


def ties(parts: list[Factors], density: float) -> Factors:
    """TIES. Trim each delta W_i to its largest entries by magnitude (this share of all); elect for each entry the sign of
    the trimmed sum; average the entries that have that sign. Sums are kept of either sign, so that memory holds one
    expert's delta W and these sums, whatever n is. An expert's weight counts in the election too."""
    shape = len(parts[0].up), parts[0].down.shape[1]
    above, below, n_above, n_below = (torch.zeros(shape) for _ in range(4))
    for f in parts:
        delta = f.delta()
        size, last = delta.abs(), delta.numel() - max(1, int(density * delta.numel()))
        delta *= size >= np.partition(size.flatten().numpy(), last)[last].item()           # three times faster than kthvalue()
        above += delta.clamp(min=0)
        below += delta.clamp(max=0)
        n_above += delta > 0
        n_below += delta < 0
    return dense(torch.where(above + below >= 0, above / n_above.clamp(min=1), below / n_below.clamp(min=1)), parts[0])


def dare(parts: list[Factors], density: float, generator: torch.Generator) -> Factors:
    """DARE. Drop entries of each delta W_i at random, this share stays; rescale by 1/density, so that the mean over all
    draws is delta W_i; and sum."""
    total = torch.zeros(len(parts[0].up), parts[0].down.shape[1])
    for f in parts:
        total += f.delta() * (torch.rand(total.shape, generator=generator) < density) / density
    return dense(total, parts[0])


def keep_rows(parts: list[Factors], owner: torch.Tensor) -> Factors:
    """The masked concatenation (README, eq. 8): row j of delta W is the mean of row j of the K experts owner[:, j], a place
    in parts. owner [K, O]."""
    share = torch.zeros(len(parts), owner.shape[1]).scatter_(0, owner, 1 / len(owner))     # [n, O]
    return lora.stack([f._replace(up=f.up * m[:, None]) for f, m in zip(parts, share)], [1.0] * len(parts))


# ------------------------------------------------------------------------------------------- Co-Merge
@dataclass
class Activity:
    """What Co-Merge knows of a layer: sums over all tokens x. Rows are the experts that adapt it. c: each expert that x is
    calibrated for (one, or all of them)."""
    own: torch.Tensor       # [n, O]  |d_i(x)_j| over the x with c = i, divided by their number
    wins: torch.Tensor      # [n, O]  how often |d_i(x)_j| is the largest
    shared: torch.Tensor    # [n, O]  sum_c d_c(x)_j d_i(x)_j
    energy: torch.Tensor    # [O]     sum_c d_c(x)_j^2


@torch.no_grad()
def measure(sd, layers, batches, wins: bool = True) -> dict[str, Activity]:
    """{layer: Activity}. ONE pass of the base UNet scores all experts, since x does not depend on the expert. Memory:
    the experts, these sums, and one expert's change of one layer's activations.

    layers: (name, {expert: Factors}) as by_layer() yields them. wins: leave those out where nobody asks, they cost most.
    """
    network, handles, activity, tokens, current = lora.layers(sd.unet), [], {}, {}, []

    def listen(name, parts: dict[int, Factors]):
        factors = {i: (f.down.to(sd.device), f.scale * f.up.to(sd.device)) for i, f in parts.items()}
        place = {i: k for k, i in enumerate(factors)}
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=sd.device)
        n, O = len(factors), len(next(iter(parts.values())).up)
        a = activity[name] = Activity(zeros(n, O), zeros(n, O), zeros(n, O), zeros(O))
        count = tokens[name] = [0] * n

        def hook(module, inputs):
            mine = [i for i in current if i in factors]
            if not mine and not (wins and current):            # not when from_prompts() draws a picture with this UNet
                return
            x, total = inputs[0].flatten(0, -2).float(), 0                                 # [T, I]
            for i in mine:
                down, up = factors[i]
                d = x @ down.T @ up.T                                                      # [T, O], d_c
                a.own[place[i]] += d.abs().sum(0)
                a.energy += d.square().sum(0)
                total = total + d
                count[place[i]] += len(x)
            best, winner = torch.full((), -1.0, device=x.device), torch.zeros((), dtype=torch.long, device=x.device)
            for k, (down, up) in enumerate(factors.values()):
                d = x @ down.T @ up.T
                if mine:
                    a.shared[k] += (d * total).sum(0)
                if wins:
                    size = d.abs()
                    best, winner = torch.where(size > best, size, best), torch.where(size > best, k, winner)   # ties: the first
            if wins:
                a.wins.scatter_add_(0, winner, torch.ones_like(best).double())
        return hook

    try:
        for name, parts in layers:
            handles.append(network[name][1].register_forward_pre_hook(listen(name, parts)))
        for current, x_t, t, context in batches:
            sd.finite(sd.predict(x_t, t, context), "a calibration input")
            current = []
    finally:
        for handle in handles:
            handle.remove()
    for name, a in activity.items():
        a.own /= torch.tensor(tokens[name], device=sd.device)[:, None].clamp(min=1)
    return activity


def co_merge(parts: list[Factors], a: Activity, score: str = "own", rescale: bool = True, top_k: int = 1) -> tuple[Factors, torch.Tensor]:
    """(merged layer, owner [K, O]), rescaled (README, eq. 9); see the top of this file."""
    owner = getattr(a, score).argsort(dim=0, descending=True, stable=True)[:top_k].cpu()   # ties: the first expert
    merged = keep_rows(parts, owner)
    if rescale:
        kept = a.shared.cpu().gather(0, owner).sum() / len(owner)                          # sum_x <d_c, d_merged>
        factor = (a.energy.sum().cpu() / kept).item() if kept > 0 else 1.0
        # n is what n experts with nothing in common would need; more would only blow up noise.
        merged = merged._replace(up=merged.up * min(factor, len(parts)))
    return merged, owner


# ----------------------------------------------------------------------------------------------- files
def open_experts(files: list[Path]) -> list[lora.LoRAFile]:
    """The files, open for reading. Raises BadInput unless all are of one base model (and were trained on top of the same
    LoRAs), each shares a layer with the first, and a layer's shape is the same in all."""
    experts, shapes = [lora.LoRAFile(path) for path in files], {}
    for e in experts:
        for key, what in (("base_model_hash", "on another base model than"), ("on_top_of", "on top of other LoRAs than")):
            if e.metadata.get(key) != experts[0].metadata.get(key):
                raise BadInput(f"{e.path}: was trained {what} {files[0]}; merge experts that start from one model")
        for name, (_, *shape) in e.shapes.items():
            path, known = shapes.setdefault(name, (e.path, shape))
            if shape != known:
                raise BadInput(f"{e.path}: {name} is for a layer of shape {shape}, in {path} of {known}; merge experts of one model")
        if not e.shapes.keys() & experts[0].shapes.keys():
            raise BadInput(f"{e.path}: adapts other layers than {files[0]}, not one is shared; merge experts of one model")
    return experts


def by_layer(experts: list[lora.LoRAFile], weights, names: list[str], at_once: int = 8):
    """Yields (name, {expert: Factors, times its weight}) of the experts that adapt the layer. Memory holds 8 layers of all experts."""
    for k in range(0, len(names), at_once):
        read = [e.read(names[k:k + at_once]) for e in experts]
        for name in names[k:k + at_once]:
            yield name, {i: r[name]._replace(up=w * r[name].up) for i, (r, w) in enumerate(zip(read, weights)) if name in r}


def checked(args, files: list[Path], experts: list[lora.LoRAFile]) -> list[float]:
    """The weights, one for each file. Raises BadInput for a flag that does not suit these experts."""
    weights = args.weights or [1.0]
    weights = weights * len(files) if len(weights) == 1 else weights
    if len(weights) != len(files):
        raise BadInput(f"--weights: {len(weights)} numbers for {len(files)} experts ({', '.join(p.stem for p in files)}); give one each, or one")
    if not all(map(math.isfinite, weights)):
        raise BadInput(f"--weights {' '.join(map(str, weights))}: not all are finite numbers; give numbers such as 1 0.5")
    if args.density is not None and not 0 < args.density <= 1:
        raise BadInput(f"--density {args.density:g} is not a share; use more than 0 and at most 1")
    for flag, (unset, readers) in READ_BY.items():
        if getattr(args, flag) != unset and args.method not in readers:
            raise BadInput(f"--{flag.replace('_', '-')}: --method {args.method} does not read it; leave it out, or use --method {' or '.join(readers)}")
    if not 1 <= args.top_k <= len(files):
        raise BadInput(f"--top-k {args.top_k}: there are {len(files)} experts; use 1 to {len(files)}")
    if args.report and (args.method not in ("co-merge", "random") or len(files) == 1):
        raise BadInput(f"--report: {len(files)} experts by {args.method}, so no row has an owner; use it with two or more by co-merge or random")
    ranks = {}                                     # of each layer: the most that the merged one can have
    for name, (r, O, I) in ((item for e in experts for item in e.shapes.items())):
        ranks[name] = min(O, I) if args.method in ("ties", "dare") and len(experts) > 1 else min(O, I, ranks.get(name, 0) + r)
    if args.rank is not None and not 1 <= args.rank <= max(ranks.values()):
        raise BadInput(f"--rank {args.rank}: by {args.method} these {len(experts)} experts give rank {max(ranks.values())}; use 1 to {max(ranks.values())}")
    return weights


def calibrate(args, experts, weights, names: list[str], labels: list[str]) -> dict[str, Activity]:
    """Loads the model and measures Co-Merge's activities. Raises BadInput if the experts are not for this model."""
    sd, metadata = load(args.model, device := pick_device(args.device)), experts[0].metadata
    if processes_for(device, unet_files(args.model)) > 1:
        torch.set_num_threads(1)  # a small network: as in training, the bytes shall not depend on the number of cores
    if metadata.get("base_model_hash") not in (None, sha256(*unet_files(args.model))):
        raise BadInput(f"{experts[0].path}: was trained on another base model than --model {args.model}; give that model")
    for e in experts:
        blank = {n: Factors(torch.empty(r, I, device="meta"), torch.empty(O, r, device="meta"), 1.0) for n, (r, O, I) in e.shapes.items()}
        lora.adapted(sd.unet, blank, str(e.path))
    if "on_top_of" in metadata:
        print(f"note: these experts were trained on top of {metadata['on_top_of']}; they are calibrated without it", file=sys.stderr)
    concepts = [e.metadata.get("concept", label) for e, label in zip(experts, labels)]
    batches = from_prompts(sd, args.prompts, concepts, args.seed) if args.prompts else from_pairs(sd, args.data, concepts, args.seed)
    return measure(sd, by_layer(experts, weights, names), batches, args.score == "wins")


def main(args):
    check_folder((args.out or Path()).parent)
    files = lora.expand(args.experts)
    experts = open_experts(files)
    weights = checked(args, files, experts)
    # Sorted by name, so that the result does not depend on the order in which the files are listed.
    experts, weights = zip(*sorted(zip(experts, weights), key=lambda pair: (pair[0].path.name, str(pair[0].path))))
    labels, n = [e.path.stem for e in experts], len(experts)
    names = list(dict.fromkeys(name for e in experts for name in e.shapes))
    some = {name: count for name in names if (count := sum(name in e.shapes for e in experts)) < n}
    if some:
        print(f"{len(some)} of {len(names)} layers are adapted by only {min(some.values())} to {max(some.values())} of the {n} experts: "
              "the others change nothing there")
    method = args.method if n > 1 else "sum"                                               # nothing to merge with
    density = args.density or DENSITY.get(method)
    activity = calibrate(args, experts, weights, names, labels) if method == "co-merge" else None
    torch.set_num_threads(1)                       # the same bytes from any number of cores
    generator = torch.Generator().manual_seed(args.seed)
    merged, energies, kept_rows = {}, [], {}
    for name, holders in tqdm(by_layer(experts, weights, names), total=len(names), desc="merging"):
        parts = list(holders.values())
        if n == 1:
            f = parts[0]                           # not even its alpha is touched
        elif method == "sum":
            f = lora.stack(parts, [1.0] * len(parts))
        elif method == "average":
            f = lora.stack(parts, [1 / n] * len(parts))          # of all n: who does not adapt it, changes it by 0
        elif method == "ties":
            f = ties(parts, density)
        elif method == "dare":
            f = dare(parts, density, torch.Generator().manual_seed(zlib.crc32(f"{args.seed} {name}".encode())))
        elif method == "random":
            owner = torch.randint(len(parts), parts[0].up.shape[:1], generator=generator)[None]
            f = keep_rows(parts, owner)
        else:
            f, owner = co_merge(parts, activity[name], args.score, not args.no_rescale, min(args.top_k, len(parts)))
        if method in ("random", "co-merge"):
            kept_rows[name] = torch.zeros(n).index_add_(0, torch.tensor(list(holders))[owner.flatten()], torch.ones(owner.numel()))
        if not (f.down.isfinite().all() and f.up.isfinite().all()):
            raise BadInput(f"{name} is not finite any more in the merged LoRA; use --weights nearer to 1")
        total = sum(len(p.down) for p in parts)
        rank = args.rank or (min(total, MOST, *f.up.shape, f.down.shape[1]) if method in ("ties", "dare") else None)
        if rank and rank < len(f.down):
            f, *energy = lora.compress(f, rank)
            energies.append(energy)
        merged[name] = f
    report(args, labels, kept_rows, energies)
    write(args, experts, labels, weights, merged)


def report(args, labels: list[str], kept_rows: dict[str, torch.Tensor], energies: list[list[float]]):
    """Prints who kept what, and what was lost by a lower rank; and draws --report."""
    shares = {name: rows / rows.sum() for name, rows in kept_rows.items()}
    if args.method == "co-merge" and shares:
        rows = torch.stack(list(kept_rows.values())).sum(0)
        for label, share in zip(labels, (rows / rows.sum()).tolist()):
            print(f"{label:>20} keeps {share:6.1%} of the rows")
    if args.report:
        heat_map(args.report, torch.stack(list(shares.values())).numpy(), list(shares), labels, "share of a layer's rows that each expert keeps")
        print(f"{args.report}: {len(shares)} layers, {len(labels)} experts")
    if energies:
        kept, whole = map(sum, zip(*energies))
        print(f"re-compressed {len(energies)} layers, which keep {kept / (whole or 1):.2%} of the energy |delta W|^2, "
              f"the least of them {min(k / (w or 1) for k, w in energies):.2%}")


def write(args, experts, labels: list[str], weights, merged: dict[str, Factors]):
    """merged.safetensors, or with --fuse the whole checkpoint."""
    if args.fuse:
        merged = lora.match(skeleton(args.fuse), merged, str(experts[0].path))
        layers = Checkpoint(args.fuse).rewrite(out := args.out or Path("aligned"), lambda name: merged[key].delta() if (
            key := lora.flat(name.removesuffix(".weight"))) in merged and name.endswith(".weight") else None)
        print(f"{out}: {args.fuse.name} with {layers} layers changed by {', '.join(labels)}")
        return
    how = {"rank": args.rank} if args.rank else {}
    how |= {"density": args.density or DENSITY[args.method]} if args.method in DENSITY else {}
    how |= {"seed": args.seed} if args.method in ("dare", "random") else {}
    how |= {"score": args.score, "rescale": not args.no_rescale, **({"top_k": args.top_k} if args.top_k > 1 else {})} if args.method == "co-merge" else {}
    lora.save(out := args.out or Path("merged.safetensors"), merged, {
        "concept": ",".join(labels), "method": args.method, **{key: str(value) for key, value in how.items()}, "weights": ",".join(f"{w:g}" for w in weights),
        **{key: experts[0].metadata[key] for key in ("base_model_hash", "prediction_type", "on_top_of") if key in experts[0].metadata}})
    ranks = sorted({len(f.down) for f in merged.values()})
    print(f"{out}: {len(labels)} experts merged by {args.method}, rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else ""))


if __name__ == "__main__":
    run(main, ARGS)
