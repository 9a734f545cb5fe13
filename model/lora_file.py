"""LoRAs as they lie in files: four spellings in, one out.

What it is:  the names of things. A LoRA file is pairs of factors and an alpha for each adapted layer, and every program
             spells them its own way:
                 lora_unet_<flat name>.lora_down.weight, .lora_up.weight, .alpha        kohya: what we write
                 base_model.model.unet.<name>.lora_A.weight, .lora_B.weight             PEFT; alpha in the header or beside
                 unet.<name>.lora.down.weight, .lora.up.weight                          diffusers, 2023
                 <name>.processor.to_q_lora.down.weight, ...                            diffusers, the first ones
Needs:       safetensors.
Gives:       load() and save(); LoRAFile reads layer by layer; expand() a folder of them. A LoRA in memory is a dict {flat name: Factors}.

Module names are FLAT here: dots become underscores ("mid_block_attentions_0_..._to_q"), which is how
kohya files spell them. Every other style flattens to the same name, so no model is needed to read a file.

Letters: r rank, I and O a layer's input and output width, k k a kernel's sides.
"""
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from .files import BadInput, opened, save_tensors
from .single_file import unet_name

# How wide the prompt is tells the family; so the ecosystem calls it: (name, modelspec.architecture, ss_base_model_version).
FAMILIES = {768: ("SD 1.x", "stable-diffusion-v1", "sd_v1"), 1024: ("SD 2.x", "stable-diffusion-v2-512", "sd_v2"),
            2048: ("SDXL", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0")}


class Factors(NamedTuple):
    """One adapted layer: delta W = (alpha / rank) * up @ down."""
    down: torch.Tensor              # A [r, I], of a convolution [r, I*k*k]
    up: torch.Tensor                # B [O, r]
    alpha: float
    kernel: tuple[int, ...] = ()    # (k, k) where a file keeps the factors as convolutions; written so again

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]

    def delta(self) -> torch.Tensor:
        """Dense delta W [O, I(*k*k)]. For tests and fusing; methods that can, avoid it."""
        return self.scale * (self.up @ self.down)


def flat(name: str) -> str:
    return name.replace(".", "_")


def prompt_width(shapes: dict[str, int]) -> int | None:
    """Input width of the first cross-attention's to_k, out of {flat name: input width}: the family's mark."""
    return next((width for name, width in shapes.items() if name.endswith("attn2_to_k")), None)


# Each style: (key pattern, part). The module's name is the groups, joined by a dot. TEXT_ENCODER is asked first.
UNET = r"(?:base_model\.model\.)?(?:unet\.)?"
STYLES = [(re.compile(pattern), part) for pattern, part in (
    (r"lora_unet_(.+)\.lora_down\.weight", "down"), (r"lora_unet_(.+)\.lora_up\.weight", "up"),        # kohya
    (r"lora_unet_(.+)\.alpha", "alpha"),
    (UNET + r"(.+)\.lora_A(?:\.default)?\.weight", "down"), (UNET + r"(.+)\.lora_B(?:\.default)?\.weight", "up"),   # PEFT
    (r"(?:unet\.)?(.+)\.lora\.down\.weight", "down"), (r"(?:unet\.)?(.+)\.lora\.up\.weight", "up"),    # diffusers, mid-era
    (r"(?:unet\.)?(.+)\.processor\.(to_.+)_lora\.down\.weight", "down"),                               # diffusers, old
    (r"(?:unet\.)?(.+)\.processor\.(to_.+)_lora\.up\.weight", "up"),
    (r"(?:unet\.)?(.+)\.processor\.(to_.+)_lora\.alpha", "alpha"), (r"(?:unet\.)?(.+)\.lora\.alpha", "alpha"),
    (UNET + r"(.+)\.alpha", "alpha"),
)]
TEXT_ENCODER = re.compile(r"(lora_te\d?_.+?|text_encoder.+?|base_model\.model\.text_model.+?)(\.lora.*|_lora\..*|\.alpha)")


def peft_alpha(path: Path, metadata: dict[str, str]):
    """PEFT keeps alpha outside the tensors: in the header (diffusers) or in adapter_config.json beside the file (peft
    itself). Returns alpha(flat name, rank), for layers that have no alpha of their own: what is said there, or rank."""
    try:
        beside = Path(path).with_name("adapter_config.json")
        said = json.loads(metadata.get("lora_adapter_metadata") or (beside.read_text() if beside.is_file() else "{}"))
        said = {key.removeprefix("unet."): value for key, value in said.items()}
        alphas = {flat(name): float(alpha) for name, alpha in (said.get("alpha_pattern") or {}).items()}
        default, rs = said.get("lora_alpha"), said.get("use_rslora")          # rsLoRA: scale = alpha / sqrt(rank)
    except (ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"{path}: its PEFT settings (in its header, or adapter_config.json beside it) cannot be read ({error}); save the LoRA again") from None

    def alpha(name, rank):
        own = next((a for pattern, a in alphas.items() if name.endswith(pattern)), default)
        return float(rank if own is None else own * rank ** 0.5 if rs else own)
    return alpha


def expand(paths: list[Path]) -> list[Path]:
    """The LoRA files that are meant: a folder stands for its .safetensors, and an expert's log and curves are passed over."""
    files = [p for path in paths for p in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
             if p.suffix not in (".jsonl", ".png") or not p.with_suffix(".safetensors").is_file()]
    if not files:
        raise BadInput(f"{paths[0]}: no LoRA file here; run python train.py first")
    seen = set()
    for p in files:
        if p.resolve() in seen:
            raise BadInput(f"{p}: is listed twice; list each expert once, and use --weights to make one count more")
        seen.add(p.resolve())
    return files


class LoRAFile:
    """A LoRA file of any of the four styles, block names by level or numbered through. Its header is read at once:
    .metadata and .shapes {name: (r, O, I)}; its layers when they are asked for, so that 700 files need not be in memory.

    A missing alpha means scale 1 (PEFT: what its settings say). Text-encoder layers are left out, with a note on stderr
    that counts them. Raises BadInput, naming the file, if it cannot be read, holds no UNet LoRA, holds keys of no known
    style or has half a pair.
    """

    def __init__(self, path: Path):
        self.path, self.keys, self.shapes, sizes = path, {}, {}, {}
        text_layers, peft = set(), False
        with opened(path) as file:
            self.metadata = file.metadata() or {}
            for key in file.keys():
                if hit := TEXT_ENCODER.fullmatch(key):
                    text_layers.add(hit[1])
                    continue
                sizes[key] = file.get_slice(key).get_shape()
                hits = ((pattern.fullmatch(key), part) for pattern, part in STYLES)
                hit, part = next(((h, part) for h, part in hits if h), (None, None))
                if hit is None:
                    raise BadInput(f"{path}: key {key!r} {sizes[key]} belongs to no known LoRA style; is this a plain LoRA for a UNet?")
                peft = peft or ".lora_A." in key
                name = flat(unet_name(".".join(hit.groups())))
                name += "_0" if name.endswith("to_out") else ""      # old files leave out to_out's index
                self.keys.setdefault(name, {})[part] = key
        self.alpha_of = peft_alpha(path, self.metadata) if peft else lambda name, rank: float(rank)
        for name, key in self.keys.items():
            down, up = sizes.get(key.get("down"), []), sizes.get(key.get("up"), [])
            if not {len(down), len(up)} <= {2, 4} or math.prod(up[1:]) != down[0]:
                raise BadInput(f"{path}: {name} is not a matching pair of LoRA factors; the file is damaged or of another kind")
            self.shapes[name] = (down[0], up[0], math.prod(down[1:]))
        if not self.keys:
            raise BadInput(f"{path}: holds no LoRA for a UNet ({len(text_layers)} layers of text encoders); "
                           "give a file written by train.py or merge.py")
        if text_layers:
            print(f"note: {path}: its {len(text_layers)} text-encoder layers are left out, only the UNet's part is used", file=sys.stderr)

    def read(self, names) -> dict[str, Factors]:
        """Those of its layers. Raises BadInput if one is not finite."""
        lora = {}
        with opened(self.path) as file:
            for name in (name for name in names if name in self.keys):
                p = {part: file.get_tensor(key).clone() for part, key in self.keys[name].items()}   # so that no file stays mapped
                alpha = p["alpha"].flatten()[0].item() if "alpha" in p else self.alpha_of(name, len(p["down"]))
                if not (math.isfinite(alpha) and p["down"].isfinite().all() and p["up"].isfinite().all()):
                    raise BadInput(f"{self.path}: {name} holds NaN or infinity; train this expert again")
                lora[name] = Factors(p["down"].float().flatten(1), p["up"].float().flatten(1), alpha, tuple(p["down"].shape[2:]))
        return lora


def load(path: Path) -> tuple[dict[str, Factors], dict[str, str]]:
    """(lora, metadata) of a whole file. Raises BadInput as LoRAFile does."""
    file = LoRAFile(path)
    return file.read(file.shapes), file.metadata


def save(path: Path, lora: dict[str, Factors], metadata: dict[str, str]):
    """Writes kohya style, which diffusers, ComfyUI, A1111 and kohya all read, fp32, with metadata (str -> str): the
    caller's, and what tells those programs which rank and which family of models this is."""
    tensors = {}
    for name, f in lora.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = f.down.float().reshape(len(f.down), -1, *f.kernel).contiguous()
        tensors[f"lora_unet_{name}.lora_up.weight"] = f.up.float().reshape(*f.up.shape, *[1] * len(f.kernel)).contiguous()
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(f.alpha)
    ranks = sorted({f.down.shape[0] for f in lora.values()})
    alphas = sorted({f.alpha for f in lora.values()})
    one = lambda values: f"{values[0]:g}" if len(values) == 1 else "Dynamic"
    header = {"ss_network_module": "networks.lora", "ss_network_dim": one(ranks), "ss_network_alpha": one(alphas),
              "modelspec.sai_model_spec": "1.0.1", "modelspec.title": Path(path).stem}
    family = FAMILIES.get(prompt_width({name: f.down.shape[1] for name, f in lora.items()}))
    if family:
        v = family[2] == "sd_v2" and metadata.get("prediction_type") == "v_prediction"
        header |= {"modelspec.architecture": ("stable-diffusion-v2-768-v" if v else family[1]) + "/lora",
                   "ss_base_model_version": family[2] + "_v" * v, **({"ss_v2": "True"} if family[2] == "sd_v2" else {})}
    save_tensors(path, tensors, {**header, **metadata})
