"""Step 3 of 4: experts into one LoRA. `python merge.py experts/*` -> merged.safetensors

What it is:  Co-Merge, and the baselines beside it. All of them merge the weight CHANGES delta W_i = s_i B_i A_i,
             never the factors: averaging A and B separately would leave cross terms B_i A_j.
Needs:       experts of train.py; for Co-Merge also the model and data/ (its calibration inputs).
Gives:       merged.safetensors, exact: rank = the sum of the experts' ranks; or, with --fuse MODEL, that whole model, aligned.

Co-Merge [our reconstruction from the paper's captions]. For a layer with input x, expert i
changes output unit j by d_i(x)_j = (s_i B_i A_i x)_j. Each unit goes to the expert that is most active there, and
every other expert's row j of delta W is dropped:

    owner(j) = argmax_i a_ij,    A = [A_1; ...; A_n],    B = [M_1 s_1 B_1, ..., M_n s_n B_n],    M_i = diag(owner(j) = i)

The activity a_ij that the paper does not give (--score): `own`, the mean of |d_i(x)_j| over the unsafe prompts that
expert i was trained to change; `wins`, how often |d_i(x)_j| is the largest, over the prompts of all experts.

Dropping rows weakens every expert. Rescaling [ours] makes up for it, with one factor for each layer:

    s = sum_x |d_c(x)|^2 / sum_x <d_c(x), d_merged(x)>        c = the category that input x belongs to

which is 1 for a single expert and for identical ones: with it, the merged LoRA moves a category's inputs as far in
the direction of its own expert as that expert did.

Letters: n experts, r rank, T tokens of a batch, I and O a layer's input and output width.
"""
from pathlib import Path

from model.files import BadInput, Parser, run

METHODS = ("co-merge", "average", "sum", "random")


def parse_arguments():
    parser = Parser("Merges LoRA experts into one LoRA.")
    parser.add_argument("experts", nargs="+", type=Path, help="LoRA files, or a folder of them (an expert's log and curves are passed over)")
    parser.add_argument("--method", choices=METHODS, default="co-merge", help="random: rows dealt out at random, a control (default: co-merge)")
    parser.add_argument("--score", choices=["own", "wins"], default="own", help="co-merge: how active an expert is at an output unit (default: own)")
    parser.add_argument("--no-rescale", action="store_true", help="co-merge: leave the kept rows as strong as they are")
    parser.add_argument("--weights", type=float, nargs="+", default=None, help="one factor for each expert, or one for all (default: 1)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="calibration inputs of co-merge: what make_data.py wrote (default: data)")
    parser.add_argument("--fuse", type=Path, default=None, metavar="MODEL", help="write the whole aligned checkpoint instead: a copy of this diffusers folder or single file with the merged LoRA in its weights (default: none)")
    parser.add_argument("--out", type=Path, default=None, help="LoRA file to write; with --fuse the folder (default: merged.safetensors; with --fuse: aligned)")
    return parser.parse_args()


ARGS = parse_arguments() if __name__ == "__main__" else None  # before the heavy imports: --help answers at once

import math  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import lora  # noqa: E402
from model.checkpoint import Checkpoint  # noqa: E402
from model.files import read_pairs, sha256  # noqa: E402
from model.pictures import read_pictures  # noqa: E402
from model.stable_diffusion import load, pick_device, skeleton, unet_files  # noqa: E402
from model.workers import processes_for  # noqa: E402

PER_EXPERT, BATCH = 24, 16  # calibration pairs of each expert, pictures in a batch


def calibration(sd, data: Path, concepts: list[str], seed: int):
    """Batches (expert, x_t, t, context) of the inputs that each expert was trained to change: its unsafe prompts, on
    the unsafe and on the safe picture, which is where sampling starts out and where it should end; all noise
    levels equally often."""
    generator = torch.Generator().manual_seed(seed)
    for i, concept in enumerate(tqdm(concepts, desc="calibrating")):
        rows = read_pairs(data, concept)[:PER_EXPERT]
        items = [(row["unsafe"], row[key]) for row in rows for key in ("unsafe_image", "safe_image")]
        times = (torch.randperm(len(items), generator=generator) * sd.schedule.T // len(items)).to(sd.device)
        for k in range(0, len(items), BATCH):
            prompts, paths = zip(*items[k:k + BATCH])
            x0, t = sd.encode(read_pictures(paths)), times[k:k + BATCH]
            noise = torch.randn(x0.shape, generator=generator).to(x0)
            yield i, sd.schedule.add_noise(x0, noise, t), t, sd.embed(list(prompts))


@dataclass
class Activity:
    """What Co-Merge knows of a layer: sums over all tokens x, where c is the expert that x is calibrated for."""
    own: torch.Tensor       # [n, O]  |d_i(x)_j| over the x with c = i, divided by their number
    wins: torch.Tensor      # [n, O]  how often |d_i(x)_j| is the largest
    shared: torch.Tensor    # [n, O]  d_c(x)_j d_i(x)_j
    energy: torch.Tensor    # [O]     d_c(x)_j^2


@torch.no_grad()
def measure(sd, experts: list[dict], batches) -> dict[str, Activity]:
    """{layer: Activity}. ONE pass of the base UNet scores all experts, since x does not depend on the expert. Memory:
    these sums, and one layer's activations."""
    layers, n = {name: layer for name, (_, layer) in zip(experts[0], lora.adapted(sd.unet, experts[0]))}, len(experts)
    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=sd.device)
    activity = {name: Activity(*(zeros(n, layer.out_features) for _ in range(3)), zeros(layer.out_features))
                for name, layer in layers.items()}
    tokens, now = {name: [0] * n for name in layers}, 0

    def listen(name):
        factors = [(e[name].down.to(sd.device), e[name].scale * e[name].up.to(sd.device)) for e in experts]

        def hook(module, inputs):
            x = inputs[0].flatten(0, -2).float()                                               # [T, I]
            d = torch.stack([x @ down.T @ up.T for down, up in factors])                       # [n, T, O]
            a, size = activity[name], d.abs()
            a.own[now] += size[now].sum(0)
            a.wins.scatter_add_(0, size.argmax(0), torch.ones_like(size[0]).double())          # ties: the first
            a.shared += (d * d[now]).sum(1)
            a.energy += d[now].square().sum(0)
            tokens[name][now] += len(x)
        return hook

    handles = [layer.register_forward_pre_hook(listen(name)) for name, layer in layers.items()]
    try:
        for now, x_t, t, context in batches:
            sd.finite(sd.predict(x_t, t, context), "a calibration input")
    finally:
        for handle in handles:
            handle.remove()
    for name, a in activity.items():
        a.own /= torch.tensor(tokens[name], device=sd.device)[:, None]
    return activity


def keep_rows(experts: list[dict], owner: dict[str, torch.Tensor]) -> dict:
    """The masked concatenation: row j of layer `name` belongs to expert owner[name][j] alone."""
    masked = []
    for i, expert in enumerate(experts):
        masked.append({name: f._replace(up=f.up * (owner[name] == i).float()[:, None]) for name, f in expert.items()})
    return lora.compose(masked, [1.0] * len(experts))


def co_merge(experts: list[dict], activity: dict[str, Activity], score: str, rescale: bool) -> tuple[dict, dict]:
    """(merged LoRA, {layer: owner [O]}); see the top of this file."""
    owner = {name: getattr(a, score).argmax(0).cpu() for name, a in activity.items()}          # ties: the first expert
    merged = keep_rows(experts, owner)
    if rescale:
        for name, a in activity.items():
            kept = a.shared.cpu().gather(0, owner[name][None]).sum()                           # sum_x <d_c, d_merged>
            factor = (a.energy.sum().cpu() / kept).item() if kept > 0 else 1.0
            # n is what n experts with nothing in common would need; more would only blow up noise.
            merged[name] = merged[name]._replace(up=merged[name].up * min(factor, len(experts)))
    return merged, owner


def expand(paths: list[Path]) -> list[Path]:
    """The LoRA files that are meant: a folder stands for its .safetensors, and an expert's log and curves are passed over."""
    files = [p for path in paths for p in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
             if p.suffix not in (".jsonl", ".png") or not p.with_suffix(".safetensors").is_file()]
    if not files:
        raise BadInput(f"{paths[0]}: no LoRA file here; run python train.py first")
    twice = [p for i, p in enumerate(files) if p.resolve() in [q.resolve() for q in files[:i]]]
    if twice:
        raise BadInput(f"{twice[0]}: is listed twice; list each expert once, and use --weights to make one count more")
    return files


def read_experts(files: list[Path]) -> tuple[list[dict], list[dict]]:
    """The LoRAs and their metadata. Raises BadInput unless all are of one base model and adapt the same layers."""
    loaded = [lora.load(path) for path in files]
    shapes = [{k: (f.up.shape[0], f.down.shape[1]) for k, f in expert.items()} for expert, _ in loaded]
    for path, (_, metadata), shape in zip(files, loaded, shapes):
        if metadata.get("base_model_hash") != loaded[0][1].get("base_model_hash"):
            raise BadInput(f"{path}: was trained on another base model than {files[0]}; merge experts of one model")
        if shape != shapes[0]:
            raise BadInput(f"{path}: adapts other layers than {files[0]}; merge experts that adapt the same ones")
    return [expert for expert, _ in loaded], [metadata for _, metadata in loaded]


def main(args):
    files = expand(args.experts)
    weights = args.weights or [1.0]
    weights = weights * len(files) if len(weights) == 1 else weights
    if len(weights) != len(files):
        raise BadInput(f"--weights: {len(weights)} numbers for {len(files)} experts ({', '.join(p.stem for p in files)}); give one each, or one")
    if not all(map(math.isfinite, weights)):
        raise BadInput(f"--weights {' '.join(map(str, weights))}: not all are finite numbers; give numbers such as 1 0.5")
    # Sorted by name, so that the result does not depend on the order in which the files are listed.
    files, weights = zip(*sorted(zip(files, weights), key=lambda pair: (pair[0].name, str(pair[0]))))
    experts, metadata = read_experts(files)
    names = [path.stem for path in files]
    experts = [{k: f._replace(up=w * f.up) for k, f in e.items()} for e, w in zip(experts, weights)]

    if len(experts) == 1 and args.fuse:
        merged = experts[0]                    # nothing to merge with: as it is, times its weight
    elif args.method == "average":
        merged = lora.compose(experts, [1 / len(experts)] * len(experts))
    elif args.method == "sum":
        merged = lora.compose(experts, [1.0] * len(experts))
    elif args.method == "random":
        generator = torch.Generator().manual_seed(args.seed)
        owner = {k: torch.randint(len(experts), f.up.shape[:1], generator=generator) for k, f in experts[0].items()}
        merged = keep_rows(experts, owner)
    else:
        sd = load(args.model, device := pick_device(args.device))
        if processes_for(device, unet_files(args.model)) > 1:
            torch.set_num_threads(1)  # a small network: as in training, the bytes shall not depend on the number of cores
        if metadata[0].get("base_model_hash") not in (None, sha256(*unet_files(args.model))):
            raise BadInput(f"{files[0]}: was trained on another base model than --model {args.model}; give that model")
        lora.adapted(sd.unet, experts[0], str(files[0]))
        concepts = [m.get("concept", name) for m, name in zip(metadata, names)]
        activity = measure(sd, experts, calibration(sd, args.data, concepts, args.seed))
        merged, owner = co_merge(experts, activity, args.score, not args.no_rescale)
        for i, name in enumerate(names):
            share = sum((o == i).sum().item() for o in owner.values()) / sum(o.numel() for o in owner.values())
            print(f"{name:>20} keeps {share:6.1%} of the rows")
    if args.fuse:
        merged = lora.match(skeleton(args.fuse), merged, str(files[0]))
        layers = Checkpoint(args.fuse).rewrite(out := args.out or Path("aligned"), lambda name: merged[key].delta() if (
            key := lora.flat(name.removesuffix(".weight"))) in merged and name.endswith(".weight") else None)
        print(f"{out}: {args.fuse.name} with {layers} layers changed by {', '.join(names)}")
        return
    out = args.out or Path("merged.safetensors")
    lora.save(out, merged, {"concept": ",".join(names), "method": args.method,
                                 **({"score": args.score, "rescale": str(not args.no_rescale)} if args.method == "co-merge" else {}), "weights": ",".join(f"{w:g}" for w in weights),
                                 **{key: metadata[0][key] for key in ("base_model_hash", "prediction_type") if key in metadata[0]}})
    print(f"{out}: {len(names)} experts merged by {args.method}, rank {next(iter(merged.values())).down.shape[0]}")


if __name__ == "__main__":
    run(main, ARGS)
