"""LoRAs as they lie in files: four spellings in, one out.

What it is:  the names of things. A LoRA file is a pair of factors and an alpha for each adapted
             layer, and every program spells them its own way:
                 lora_unet_<flat name>.lora_down.weight, .lora_up.weight, .alpha    kohya: ours
                 base_model.model.unet.<name>.lora_A.weight, .lora_B.weight         PEFT
                 unet.<name>.lora.down.weight, .lora.up.weight                      diffusers, 2023
                 <name>.processor.to_q_lora.down.weight, ...                        the first ones
Needs:       torch, safetensors.
Gives:       load() and save(), of {flat name: lora.Factors}; LoRAFile, which reads layer by layer;
             expand(), the files that a folder stands for.

Module names are FLAT here: dots become underscores, as kohya files spell them. Every other spelling
flattens to the same name, so no model is needed to read a file.

Letters: r rank, I and O a layer's input and output width, k k a kernel's sides.
"""
import json
import math
import re
import sys
from pathlib import Path
from statistics import mode

import torch

from lora import Factors, flat
from model.formats.single_file import original_name, unet_name
from model.tools.command import BadInput
from model.tools.files import opened, read_json, save_tensors

# How wide the prompt is tells the family. So other programs call it: (name, ss_base_model_version,
# modelspec.architecture, .implementation (whose names the layers have), .resolution).
SGM = "https://github.com/Stability-AI/generative-models"
FAMILIES = {
    768: ("SD 1.x", "sd_v1", "stable-diffusion-v1", "diffusers", "512x512"),
    1024: ("SD 2.x", "sd_v2", "stable-diffusion-v2-512", "diffusers", "512x512"),
    2048: ("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", SGM, "1024x1024")}
SD2_V = ("SD 2.x", "sd_v2_v", "stable-diffusion-v2-768-v", "diffusers", "768x768")

# How a key ends in each spelling, and what it is.
ENDINGS = {"lora_down": "down", "lora_A": "down", "lora.down": "down", "lora_up": "up",
           "lora_B": "up", "lora.up": "up", "alpha": "alpha", "lora.alpha": "alpha"}
ENDING = "|".join(map(re.escape, ENDINGS))
KEY = re.compile(rf"(?:lora_unet_|(?:base_model\.model\.)?(?:unet\.)?)(.+?)[._]({ENDING})"
                 r"(?:\.default)?(?:\.weight)?")
TEXT_ENCODER = re.compile(r"(lora_te|text_encoder|base_model\.model\.text_model)"
                          r".+?(?=[._]lora[._]|\.alpha)")
UNET_LAYER = re.compile(r"(down|up)_blocks_\d+_(attentions|resnets|downsamplers|upsamplers)_"
                        r"|mid_block_(attentions|resnets)_|conv_(in|out)$|(time|add)_embedding_")


def prompt_width(shapes: dict[str, int]) -> int | None:
    """Input width of the first cross-attention's to_k, out of {flat name: input width}."""
    return next((width for name, width in shapes.items() if name.endswith("attn2_to_k")), None)


def expand(paths: list[Path]) -> list[Path]:
    """The LoRA files that are meant: a folder stands for its .safetensors, and an expert's log and
    curves are passed over. Raises BadInput for none, or for one that is listed twice."""
    files = []
    for path in paths:
        if path.is_dir():
            files += sorted(path.glob("*.safetensors"))
        elif path.suffix not in (".jsonl", ".png"):
            files.append(path)
    if not files:
        raise BadInput(f"{paths[0]}: no LoRA file here; run python train.py first")
    resolved = [path.resolve() for path in files]
    for path in files:
        if resolved.count(path.resolve()) > 1:
            raise BadInput(f"{path}: is listed twice; list each expert once, and use --weights to "
                           "make one count more")
    return files


def peft_alphas(path: Path, metadata: dict[str, str]) -> tuple[list, bool]:
    """PEFT's settings, of the header (diffusers) or of adapter_config.json beside the file (PEFT
    itself): [(pattern of dotted names, alpha)], and whether it is rsLoRA."""
    beside = path.with_name("adapter_config.json")
    try:
        text = metadata.get("lora_adapter_metadata")
        settings = json.loads(text) if text else read_json(beside) if beside.is_file() else {}
        settings = {key.removeprefix("unet."): value for key, value in settings.items()}
        alphas = settings.get("alpha_pattern") or {}
        if settings.get("lora_alpha") is not None:
            alphas = {**alphas, ".*": settings["lora_alpha"]}    # for what no other pattern fits
        return [(re.compile(rf"(.*\.)?({pattern})$"), float(alpha))    # as in peft
                for pattern, alpha in alphas.items()], settings.get("use_rslora", False)
    except (ValueError, AttributeError, TypeError, re.error) as error:
        raise BadInput(f"{path}: its PEFT settings, in its header or in adapter_config.json beside "
                       f"it, cannot be read ({error}); save the LoRA again") from None


class LoRAFile:
    """A LoRA file in any of the four spellings, block names by level or numbered through. Its
    header is read at once: .metadata, .shapes {flat name: (r, O, I)}; its layers when they are
    asked for, so that 700 files need not be in memory.

    A missing alpha means scale 1 (PEFT: what its settings say). Text-encoder layers are left out,
    with a note on stderr that counts them. Raises BadInput, naming the file, if it cannot be read,
    holds a key of no known spelling or half a pair, or no layer of a Stable Diffusion's UNet.
    """
    def __init__(self, path: Path):
        self.path, self.keys, self.shapes = path, {}, {}    # keys: {flat name: {part: key}}
        with opened(path) as file:
            self.metadata = file.metadata() or {}
            sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        peft = any(".lora_A." in key for key in sizes)
        self.alphas, self.rslora = peft_alphas(path, self.metadata) if peft else ([], False)
        texts = {match[0] for match in map(TEXT_ENCODER.match, sizes) if match}
        for key, size in sizes.items():
            if not TEXT_ENCODER.match(key):
                self._put(key, size)
        for name, keys in self.keys.items():
            down, up = sizes.get(keys.get("down"), []), sizes.get(keys.get("up"), [])
            if not {len(down), len(up)} <= {2, 4} or math.prod(up[1:]) != down[0]:
                raise BadInput(f"{path}: {name} is not a matching pair of LoRA factors; the file "
                               "is damaged or of another kind")
            self.shapes[name] = (down[0], up[0], math.prod(down[1:]))
        if not any(map(UNET_LAYER.match, self.keys)):
            raise BadInput(f"{path}: holds no LoRA for the UNet of a Stable Diffusion "
                           f"({len(self.keys)} layers of another model, {len(texts)} layers of "
                           "text encoders); give a file written by train.py or merge.py")
        if texts:
            print(f"note: {path}: its {len(texts)} text-encoder layers are left out, only the "
                  "UNet's part is used", file=sys.stderr)

    def _put(self, key: str, size: list[int]):
        match = KEY.fullmatch(key.replace(".processor.", "."))
        if not match:
            raise BadInput(f"{self.path}: key {key!r} {size} belongs to no known LoRA spelling; is "
                           "this a plain LoRA for a UNet?")
        dotted, ending = match.groups()
        if dotted.endswith("to_out"):    # old files leave out to_out's index
            dotted += ".0"
        keys = self.keys.setdefault(flat(unet_name(dotted)), {"dotted": dotted})
        keys[ENDINGS[ending]] = key

    def _alpha(self, dotted: str, rank: int) -> float:
        """A layer's alpha where the file has no tensor for it."""
        for pattern, alpha in self.alphas:
            if pattern.match(dotted):    # rsLoRA: the scale is alpha / sqrt(rank)
                return alpha * rank ** 0.5 if self.rslora else alpha
        return float(rank)

    def read(self, names) -> dict[str, Factors]:
        """Those of its layers. Raises BadInput if one is not finite."""
        lora = {}
        with opened(self.path) as file:
            for name in filter(self.keys.get, names):
                keys = self.keys[name]
                # Copies, so that the file does not stay mapped.
                down, up = (file.get_tensor(keys[part]).clone() for part in ("down", "up"))
                alpha = self._alpha(keys["dotted"], len(down))
                if "alpha" in keys:
                    alpha = file.get_tensor(keys["alpha"]).flatten()[0].item()
                if not (math.isfinite(alpha) and down.isfinite().all() and up.isfinite().all()):
                    raise BadInput(f"{self.path}: {name} holds NaN or infinity; train this expert "
                                   "again")
                lora[name] = Factors(down.float().flatten(1), up.float().flatten(1), alpha,
                                     tuple(down.shape[2:]))
        return lora


def load(path: Path) -> tuple[dict[str, Factors], dict[str, str]]:
    """(lora, metadata) of a whole file. Raises BadInput as LoRAFile does."""
    file = LoRAFile(path)
    return file.read(file.shapes), file.metadata


def save(path: Path, lora: dict[str, Factors], metadata: dict[str, str]):
    """Writes the spelling that diffusers, ComfyUI, A1111 and kohya all read, fp32, with metadata
    (str -> str): the caller's, and what tells those programs rank and family.

    SDXL's layers have their original names, the only ones that kohya reads. One alpha for the whole
    file, since diffusers drops others: what a layer's own alpha says beyond it goes into `up`.
    Raises BadInput for numbers that are not finite.
    """
    xl = any("transformer_blocks_1_" in name for name in lora)    # SD 1 and 2 have one, number 0
    width = 2048 if xl else prompt_width({name: f.down.shape[1] for name, f in lora.items()})
    alpha = mode([f.alpha for f in lora.values() if f.alpha] or [1.0])
    tensors = {}
    for name, f in lora.items():
        key = "lora_unet_" + (original_name(name) if width == 2048 else name)
        up = f.up.float() * (f.alpha / alpha)
        if not (up.isfinite().all() and f.down.isfinite().all()):
            raise BadInput(f"{path}: {name} would hold NaN or infinity; lower --lr, --beta or "
                           "--weights")
        tensors[f"{key}.lora_down.weight"] = f.down.float().reshape(len(f.down), -1, *f.kernel)
        tensors[f"{key}.lora_up.weight"] = up.reshape(*up.shape, *[1] * len(f.kernel))
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    ranks = {f.down.shape[0] for f in lora.values()}
    header = {"ss_network_module": "networks.lora", "ss_network_alpha": f"{alpha:g}",
              "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
              "ss_v2": str(width == 1024)}
    if width in FAMILIES:
        v = width == 1024 and metadata.get("prediction_type") == "v_prediction"
        _, version, architecture, implementation, resolution = SD2_V if v else FAMILIES[width]
        # No modelspec.date: the same command gives the same bytes.
        header |= {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": path.stem,
                   "modelspec.architecture": f"{architecture}/lora",
                   "modelspec.implementation": implementation,
                   "modelspec.resolution": resolution, "ss_base_model_version": version}
    save_tensors(path, tensors, {**header, **metadata})
