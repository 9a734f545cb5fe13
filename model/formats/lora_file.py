"""LoRAs as they lie in files: four spellings in, one out.

What it is:  the names of things. A LoRA file is a pair of factors and an alpha for each adapted
             layer, and every program spells them its own way:
                 lora_unet_<flat name>.lora_down.weight, .lora_up.weight, .alpha    kohya: ours
                 base_model.model.unet.<name>.lora_A.weight, .lora_B.weight         PEFT
                 unet.<name>.lora.down.weight, .lora.up.weight                      diffusers, 2023
                 <name>.processor.to_q_lora.down.weight, ...                        the first ones
             Prefixes differ too: ComfyUI and OneTrainer write diffusion_model. and unet. before the
             original block names, LyCORIS lycoris_; PEFT may put an adapter's name at the end.
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
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from statistics import mode
from typing import NamedTuple

import torch

from lora import Factors, flat
from model.formats.single_file import original_name, unet_name
from model.tools.command import BadInput
from model.tools.files import Place, finite, places, read_json, read_tensors, save_tensors

# How wide the prompt is tells the family. So other programs call it: (name, ss_base_model_version,
# modelspec.architecture, .implementation (whose names the layers have), .resolution).
VERSION = "ss_base_model_version"
SGM = "https://github.com/Stability-AI/generative-models"
FAMILIES = {
    768: ("SD 1.x", "sd_v1", "stable-diffusion-v1", "diffusers", "512x512"),
    1024: ("SD 2.x", "sd_v2", "stable-diffusion-v2-512", "diffusers", "512x512"),
    2048: ("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", SGM, "1024x1024")}
SD2_V = ("SD 2.x", "sd_v2_v", "stable-diffusion-v2-768-v", "diffusers", "768x768")
WIDTHS = {SD2_V[1]: 1024} | {version: width for width, (_, version, *_) in FAMILIES.items()}

# How a key ends in each spelling, and what it is.
ENDINGS = {"lora_down": "down", "lora_A": "down", "lora.down": "down", "lora_up": "up",
           "lora_B": "up", "lora.up": "up", "alpha": "alpha", "lora.alpha": "alpha"}
PARTS = "down", "up", "alpha"
ENDING = "|".join(map(re.escape, ENDINGS))
KEY = re.compile(r"(?:lora_unet_|lycoris_|(?:base_model\.model\.)?(?:(?:unet|diffusion_model)\.)?)"
                 rf"(.+?)[._]({ENDING})(?:(\.\w+)?\.weight)?")
TEXT_ENCODER = re.compile(r"(lora_te|text_encoder|clip_[lg]\.|base_model\.model\.text_model|"
                          r"lycoris_text_model).+?(?=[._]lora[._]|\.[^.]+$)")
EMBEDDING = re.compile(r"bundle_emb\.[^.]+")
# What tells other kinds of adapters, in a key or in the name of a setting of PEFT's.
OTHER_KINDS = {
    "a DoRA": "dora_scale|lora_magnitude|use_dora", "a LoHa": "hada_", "a LoKr": "lokr_",
    "an OFT": "oft_", "a BD-LoRA": "use_bdlora", "a LoCon with a Tucker core": "lora_mid",
    "a LoRA with biases": r"lora_bias|lora_.*\.bias$",
    "a LoRA beside whole differences of weights": "diff$|diff_b$|[wb]_norm$"}
# Ways to begin a training that leave the base model's weights alone (PEFT's init_lora_weights).
PLAIN_STARTS = "none true false gaussian orthogonal eva mica".split()
# Lie beside LoRAs: their logs and curves, and what people and other programs say of them.
COMPANIONS = ".jsonl .json .png .jpg .jpeg .webp .md .txt .info .yaml .toml".split()
# Kohya's scripts have the original names for SDXL alone.
KOHYA_XL = "lora_unet_input_", "lora_unet_middle_", "lora_unet_output_"
UNET_LAYER = re.compile(r"(down|up)_blocks_\d+_(attentions|resnets|downsamplers|upsamplers)_"
                        r"|mid_block_(attentions|resnets)_|conv_(in|out)$|(time|add)_embedding_")


def prompt_width(widths: dict[str, int], version: str | None = None) -> int | None:
    """How wide the prompt is that layers {flat name: input width} are for: by SDXL's second
    transformer block, since the others have one, number 0; by a cross-attention; or by what a
    header says, ss_base_model_version. None: nothing tells."""
    if any("transformer_blocks_1_" in name for name in widths):
        return 2048
    read = (width for name, width in widths.items() if re.search("attn2_to_[kv]$", name))
    return next(read, WIDTHS.get(version))


def expand(paths: list[Path]) -> list[Path]:
    """The LoRA files that are meant: a folder stands for its .safetensors, but for unfinished ones,
    which begin with a dot; what lies beside LoRAs is passed over. Raises BadInput for none, or for
    one that is listed twice."""
    files = []
    for path in paths:
        if path.is_dir():
            files += sorted(path.glob("[!.]*.safetensors"))
        elif path.suffix.lower() not in COMPANIONS:
            files.append(path)
    files = [path for path in files if not path.name.startswith("._")]    # a Mac's, not tensors
    if not files:
        raise BadInput(f"{paths[0]}: no LoRA file here; run python train.py first")
    seen = set()
    for path in files:
        if path.resolve() in seen:
            raise BadInput(f"{path}: is listed twice; list each expert once, and use --weights to "
                           "make one count more")
        seen.add(path.resolve())
    return files


def check_kind(what: str):
    """Raises BadInput if a key, or a setting of PEFT's, is of another kind than a LoRA's."""
    for kind, parts in OTHER_KINDS.items():
        if re.search(rf"(^|[._])({parts})", what):
            raise BadInput(f"{what} makes it {kind}, and only a plain LoRA, W + B A, is supported; "
                           "use one")


def peft_alphas(path: Path, metadata: dict[str, str]):
    """PEFT's settings, of the header (diffusers) or of adapter_config.json beside the file (PEFT
    itself): [(pattern of dotted names, alpha)], and whether it is rsLoRA. Raises BadInput for those
    that make it another thing than W + B A."""
    beside = path.with_name("adapter_config.json")
    try:
        text = metadata.get("lora_adapter_metadata")
        settings = json.loads(text) if text else read_json(beside) if beside.is_file() else {}
        settings = {key.removeprefix("unet."): value for key, value in settings.items()}
        for key in filter(settings.get, settings):
            if "." not in key:    # of the UNet's, not text_encoder.use_dora
                check_kind(key)
        start = settings.get("init_lora_weights")
        if str(start).lower() not in PLAIN_STARTS:
            raise BadInput(f"init_lora_weights is {start!r}, which moved the base model's weights "
                           "before the training: B A belongs to those; convert it with PEFT's "
                           "path_initial_model_for_weight_conversion, or use another LoRA")
        alphas = settings.get("alpha_pattern") or {}
        if settings.get("lora_alpha") is not None:
            alphas = {**alphas, ".*": settings["lora_alpha"]}    # for what no other pattern fits
        if not all(math.isfinite(alpha) for alpha in alphas.values()):
            raise BadInput("an alpha of its PEFT settings is not finite; save the LoRA again")
        return [(re.compile(rf"(.*\.)?({pattern})$"), float(alpha))    # as in peft
                for pattern, alpha in alphas.items()], settings.get("use_rslora", False)
    except (ValueError, AttributeError, TypeError, re.error) as error:
        raise BadInput("its PEFT settings, in its header or in adapter_config.json beside it, "
                       f"cannot be read ({error}); save the LoRA again") from None


class Layout(NamedTuple):
    """What the keys of a file mean."""
    layers: dict[str, dict[str, Place]]    # {flat name: {part: place}}
    shapes: dict[str, list[int]]           # {flat name: [O, I]}
    dots: dict[str, str]                   # {flat name: dotted name}
    width: int | None                      # of the prompt, where layers tell it
    left_out: str                          # what is not read, in words
    peft: bool
    xl: bool                               # named as kohya names SDXL's layers


@lru_cache
def layout_of(places: tuple[Place, ...]) -> Layout:
    """Worked out once for files that are alike. Raises BadInput as LoRAFile does, without the
    file's name."""
    layers, shapes, dots, adapters = {}, {}, {}, set()
    texts, embeddings = ({match[0] for place in places if (match := pattern.match(place.key))}
                         for pattern in (TEXT_ENCODER, EMBEDDING))
    for place in places:
        key = place.key
        if TEXT_ENCODER.match(key) or EMBEDDING.match(key):
            continue
        plain = re.sub(r"_orig_mod[._]", "", key.replace(".processor.", "."))    # torch.compile's
        match = KEY.fullmatch(plain)
        if not match:
            check_kind(key)
            raise BadInput(f"key {key!r} {list(place.shape)} belongs to no known LoRA spelling; is "
                           "this a plain LoRA for a UNet?")
        dotted, ending, adapter = match.groups()
        adapters |= {adapter} - {None}    # names, of PEFT's that end with one
        if dotted.endswith("to_out"):    # old files leave out to_out's index
            dotted += ".0"
        name = flat(unet_name(dotted))
        dots[name] = dotted
        layers.setdefault(name, {})[ENDINGS[ending]] = place
    if len(adapters) > 1:
        raise BadInput(f"holds several adapters, {sorted(adapters)}; save each to a file of its "
                       "own")
    for name, parts in layers.items():
        down, up, alpha = (parts[part].shape if part in parts else () for part in PARTS)
        if (not {len(down), len(up)} <= {2, 4} or not math.prod(up[1:]) == down[0] > 0
                or math.prod(alpha) != 1):
            raise BadInput(f"{name} is not a matching pair of LoRA factors; the file is damaged or "
                           "of another kind")
        shapes[name] = [up[0], math.prod(down[1:])]
    if not any(map(UNET_LAYER.match, layers)):
        raise BadInput(f"holds no LoRA for the UNet of a Stable Diffusion ({len(layers)} layers of "
                       f"another model, {len(texts)} layers of text encoders); give a file written "
                       "by train.py or merge.py")
    left_out = (f"{len(texts)} text-encoder layers and {len(embeddings)} embeddings"
                if texts or embeddings else "")
    return Layout(layers, shapes, dots, prompt_width({name: I for name, (_, I) in shapes.items()}),
                  left_out, any(".lora_A." in place.key for place in places),
                  any(place.key.startswith(KOHYA_XL) for place in places))


class LoRAFile:
    """A LoRA file in any of the four spellings, block names by level or numbered through. Its
    header is read at once: .metadata, .shapes {flat name: [O, I]}; its layers when they are
    asked for, so that 700 files need not be in memory.

    A missing alpha means scale 1 (PEFT: what its settings say). Text-encoder layers and embeddings
    are left out, with a note on stderr that counts them. Raises BadInput, naming the file, if it
    cannot be read, is of another kind, holds a key of no known spelling, half a pair or two
    adapters, or no layer of a Stable Diffusion's UNet.

    width: of the prompt that its base model reads, or None where nothing tells.
    """
    def __init__(self, path: Path):
        self.path = path
        tensors, self.metadata, self.begin = places(path)
        try:
            self.layout = layout_of(tensors)
            self.alphas, self.rslora = (
                peft_alphas(path, self.metadata) if self.layout.peft else ([], False))
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
        if self.layout.xl:
            self.metadata.setdefault(VERSION, FAMILIES[2048][1])
        self.shapes = self.layout.shapes
        self.width = self.layout.width or WIDTHS.get(self.metadata.get(VERSION))
        if self.layout.left_out:
            print(f"note: {path}: its {self.layout.left_out} are left out, only the UNet's part is "
                  "used", file=sys.stderr)

    def alpha(self, name: str, rank: int) -> float:
        """A layer's alpha where the file has no tensor for it."""
        for pattern, alpha in self.alphas:
            if pattern.match(self.layout.dots[name]):    # rsLoRA: the scale is alpha / sqrt(rank)
                return alpha * rank ** 0.5 if self.rslora else alpha
        return float(rank)


def read(files: list[LoRAFile], names) -> list[dict[str, Factors]]:
    """Those layers of each file. Neighbours that are alike are read as one, which takes a fifth of
    the time. Raises BadInput if one is not finite."""
    return [lora for _, alike in groupby(files, lambda file: id(file.layout))
            for lora in read_alike(list(alike), names)]


def read_alike(files: list[LoRAFile], names) -> list[dict[str, Factors]]:
    """read() of files of one layout."""
    loras, layout = [{} for _ in files], files[0].layout
    layers = {name: layout.layers[name] for name in names if name in layout.layers}
    tensors = read_tensors([(file.path, file.begin) for file in files], [
        parts[part] for parts in layers.values() for part in PARTS if part in parts])
    for name, parts in layers.items():
        downs, ups, *alphas = (tensors[parts[part].key] for part in PARTS if part in parts)
        (O, I), (r, _, *kernel) = layout.shapes[name], parts["down"].shape
        alphas = alphas[0].flatten().tolist() if alphas else [file.alpha(name, r) for file in files]
        downs, ups, kernel = downs.view(-1, r, I), ups.view(-1, O, r), tuple(kernel)
        for lora, down, up, alpha in zip(loras, downs, ups, alphas):
            lora[name] = Factors(down, up, alpha, kernel)
    return loras


def load(path: Path):
    """(lora, metadata) of a whole file. Raises BadInput as LoRAFile does."""
    file = LoRAFile(path)
    return read([file], file.shapes)[0], file.metadata


def save(path: Path, lora: dict[str, Factors], metadata: dict[str, str]):
    """Writes the spelling that diffusers, ComfyUI, A1111 and kohya all read, fp32, with metadata
    (str -> str): the caller's, and what tells those programs rank and family.

    SDXL's layers have their original names, the only ones that kohya reads. One alpha for the whole
    file, since diffusers drops others: what a layer's own alpha says beyond it goes into `up`.
    Raises BadInput for numbers that are not finite.
    """
    version = metadata.get(VERSION)
    width = prompt_width({name: f.down.shape[1] for name, f in lora.items()}, version)
    if width is None:
        print(f"note: {path}: no layer and no header tells which Stable Diffusion it is for; it is "
              "named as SD 1 and 2 are", file=sys.stderr)
    alpha = mode([f.alpha for f in lora.values() if f.alpha] or [1.0])
    tensors = {}
    for name, f in lora.items():
        key = "lora_unet_" + (original_name(name) if width == 2048 else name)
        up = f.up.float() if f.alpha == alpha else f.up.float() * (f.alpha / alpha)
        if not (finite(up) and finite(f.down)):
            raise BadInput(f"{path}: {name} would hold NaN or infinity; lower --lr, --beta or "
                           "--weights")
        tensors[f"{key}.lora_down.weight"] = f.down.float().reshape(len(f.down), -1, *f.kernel)
        tensors[f"{key}.lora_up.weight"] = up.reshape(*up.shape, *[1] * len(f.kernel))
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    ranks = {len(f.down) for f in lora.values()}
    header = {"ss_network_module": "networks.lora", "ss_network_alpha": f"{alpha:g}",
              "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
              "ss_v2": str(width == 1024)}
    if width in FAMILIES:
        v = metadata.get("prediction_type") == "v_prediction" or version == SD2_V[1]
        names = SD2_V if width == 1024 and v else FAMILIES[width]
        _, version, architecture, implementation, resolution = names
        # No modelspec.date: the same command gives the same bytes.
        header |= {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": path.stem,
                   "modelspec.architecture": f"{architecture}/lora",
                   "modelspec.implementation": implementation,
                   "modelspec.resolution": resolution, VERSION: version}
    save_tensors(path, tensors, {**metadata, **header})
