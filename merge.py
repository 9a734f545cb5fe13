"""Step 3 of 4: experts into one LoRA. `python merge.py experts/*` -> merged.safetensors

What it is:  Co-Merge, and the baselines beside it. All of them merge the weight CHANGES delta W_i = s_i B_i A_i,
             never the factors: averaging A and B separately would leave cross terms B_i A_j.
Needs:       experts of train.py; for Co-Merge also the model and data/ (its calibration inputs).
Gives:       merged.safetensors, exact: rank = the sum of the experts' ranks; or, with --fuse MODEL, that whole model, aligned.

Co-Merge [our reconstruction from the paper's captions; method.md section 3]. For a layer with input x,
expert i changes output unit j by d_i(x)_j = (s_i B_i A_i x)_j. The unit is won by the expert with the largest
|d_i(x)_j|; over all calibration inputs, the expert that wins unit j most often keeps row j of its delta W_i,
and every other expert's row j is dropped:

    A = [A_1; ...; A_n],    B = [M_1 s_1 B_1, ..., M_n s_n B_n],    M_i = diag(unit j belongs to expert i)

Letters: n experts, r rank, T tokens of a batch, I and O a layer's input and output width.
"""
from pathlib import Path

from model.files import BadInput, Parser, run

METHODS = ("co-merge", "average", "sum", "random")


def parse_arguments():
    parser = Parser("Merges LoRA experts into one LoRA.")
    parser.add_argument("experts", nargs="+", type=Path, help="LoRA files (others in a folder, such as .jsonl logs, are passed over)")
    parser.add_argument("--method", choices=METHODS, default="co-merge", help="random: rows dealt out at random, a control (default: co-merge)")
    parser.add_argument("--weights", type=float, nargs="+", default=None, help="one factor for each expert, or one for all (default: 1)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="calibration inputs of co-merge: what make_data.py wrote (default: data)")
    parser.add_argument("--fuse", type=Path, default=None, metavar="MODEL", help="write the whole aligned checkpoint instead: a copy of this diffusers folder or single file with the merged LoRA in its weights (default: none)")
    parser.add_argument("--out", type=Path, default=None, help="LoRA file to write; with --fuse the folder (default: merged.safetensors; with --fuse: aligned)")
    return parser.parse_args()


ARGS = parse_arguments() if __name__ == "__main__" else None  # before the heavy imports: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

import lora  # noqa: E402
from model.checkpoint import Checkpoint  # noqa: E402
from model.files import read_jsonl, sha256  # noqa: E402
from model.stable_diffusion import load, pick_device, skeleton, unet_files  # noqa: E402

PER_CONCEPT, BATCH = 32, 16  # calibration pairs of each concept, pictures in a batch


def calibration(sd, data: Path, seed: int):
    """Batches (x_t, t, context) from every concept under data/: unsafe and safe prompts with their own
    pictures, each at its own timestep, all noise levels equally often."""
    files = sorted(data.glob("*/pairs.jsonl"))
    if not files:
        raise BadInput(f"{data}: no concept has pairs to calibrate with; run python make_data.py, or use --method average")
    items = [(row[kind], file.parent / row[f"{kind}_image"]) for file in files
             for row in read_jsonl(file)[:PER_CONCEPT] for kind in ("unsafe", "safe")]
    generator = torch.Generator().manual_seed(seed)
    times = (torch.randperm(len(items), generator=generator) * sd.schedule.T // len(items)).to(sd.device)
    for i in tqdm(range(0, len(items), BATCH), desc="calibrating"):
        prompts, paths = zip(*items[i:i + BATCH])
        x0 = sd.encode(np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]))
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        t = times[i:i + BATCH]
        yield sd.schedule.add_noise(x0, noise, t), t, sd.embed(list(prompts))


@torch.no_grad()
def count_wins(sd, experts: list[dict], batches) -> dict[str, torch.Tensor]:
    """{layer: wins [n, O]}: how often each expert's |d_i(x)_j| is the largest, over all tokens of all batches.

    ONE pass of the base UNet scores all experts, since x does not depend on the expert. Memory: counts, and
    one layer's activations.
    """
    layers = lora.targets(sd.unet)
    wins = {name: torch.zeros(len(experts), layer.out_features, device=sd.device) for name, layer in layers.items()}

    def listen(name):
        down = torch.stack([e[name].down for e in experts]).to(sd.device)                      # [n, r, I]
        up = torch.stack([e[name].scale * e[name].up for e in experts]).to(sd.device)          # [n, O, r]

        def hook(module, inputs):
            x = inputs[0].flatten(0, -2).float()                                               # [T, I]
            d = torch.einsum("ti,nri,nor->nto", x, down, up)                                   # [n, T, O]
            winner = d.abs().argmax(0)                                                         # [T, O], ties: the first
            for i in range(len(experts)):
                wins[name][i] += (winner == i).sum(0)
        return hook

    handles = [layer.register_forward_pre_hook(listen(name)) for name, layer in layers.items()]
    for x_t, t, context in batches:
        sd.finite(sd.predict(x_t, t, context), "a calibration input")
    for handle in handles:
        handle.remove()
    return wins


def keep_rows(experts: list[dict], owner: dict[str, torch.Tensor]) -> dict:
    """The masked concatenation: row j of layer `name` belongs to expert owner[name][j] alone."""
    masked = []
    for i, expert in enumerate(experts):
        masked.append({name: f._replace(up=f.up * (owner[name] == i).float()[:, None]) for name, f in expert.items()})
    return lora.compose(masked, [1.0] * len(experts))


def read_experts(paths: list[Path]) -> tuple[list[dict], list[dict], list[str]]:
    """The LoRAs, their metadata and their names, sorted by name: the order of the files does not matter."""
    files = sorted({p.resolve(): p for path in paths for p in (sorted(path.iterdir()) if path.is_dir() else [path])
                    if p.suffix != ".jsonl"}.values(), key=lambda p: p.name)
    if not files:
        raise BadInput(f"{paths[0]}: no LoRA file here; run python train.py first")
    loaded = [lora.load(path) for path in files]
    first = loaded[0][0]
    for path, (expert, metadata) in zip(files, loaded):
        if metadata.get("base_model_hash") != loaded[0][1].get("base_model_hash"):
            raise BadInput(f"{path}: was trained on another base model than {files[0]}; merge experts of one model")
        if {k: (f.up.shape, f.down.shape) for k, f in expert.items()} != {k: (f.up.shape, f.down.shape) for k, f in first.items()}:
            raise BadInput(f"{path}: adapts other layers, or has another rank, than {files[0]}; train both with the same settings")
    return [l for l, _ in loaded], [m for _, m in loaded], [path.stem for path in files]


def main(args):
    experts, metadata, names = read_experts(args.experts)
    weights = args.weights or [1.0]
    weights = weights * len(experts) if len(weights) == 1 else weights
    if len(weights) != len(experts):
        raise BadInput(f"--weights: {len(weights)} numbers for {len(experts)} experts ({', '.join(names)}); give one each, or one")
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
        sd = load(args.model, pick_device(args.device))
        if metadata[0].get("base_model_hash") not in (None, sha256(*unet_files(args.model))):
            raise BadInput(f"{args.experts[0]}: was trained on another base model than --model {args.model}; give that model")
        wins = count_wins(sd, experts, calibration(sd, args.data, args.seed))
        owner = {name: count.argmax(0).cpu() for name, count in wins.items()}                  # ties: the first expert
        for i, name in enumerate(names):
            share = sum((o == i).sum().item() for o in owner.values()) / sum(o.numel() for o in owner.values())
            print(f"{name:>20} keeps {share:6.1%} of the rows")
        merged = keep_rows(experts, owner)
    if args.fuse:
        merged = lora.match(skeleton(args.fuse), merged, str(args.experts[0]))
        layers = Checkpoint(args.fuse).rewrite(out := args.out or Path("aligned"), lambda name: merged[key].delta() if (
            key := lora.flat(name.removesuffix(".weight"))) in merged and name.endswith(".weight") else None)
        print(f"{out}: {args.fuse.name} with {layers} layers changed by {', '.join(names)}")
        return
    out = args.out or Path("merged.safetensors")
    lora.save(out, merged, {"concept": ",".join(names), "method": args.method, "weights": ",".join(f"{w:g}" for w in weights),
                                 **{key: metadata[0][key] for key in ("base_model_hash", "prediction_type") if key in metadata[0]}})
    print(f"{out}: {len(names)} experts merged by {args.method}, rank {next(iter(merged.values())).down.shape[0]}")


if __name__ == "__main__":
    run(main, ARGS)
