"""A checkpoint on disk: a diffusers folder, or one .safetensors file of the first code's layout.

What it is:  where each tensor and each config lies in either layout, and reading them without a
             second copy.
Needs:       torch, safetensors; single_file.py for what single files call things.
Gives:       Checkpoint; unet_files(), encoder_files(), model_files().

A folder carries everything. A single file carries tensors alone; beside it lie, in the folders that
every diffusers checkpoint has:
    tokenizer/               needed. SD 1, SD 2 and SDXL share one vocabulary: any CLIP's will do;
    scheduler/               optional: says noise or v. Without it SD 1 and SDXL predict noise, and
                             an SD 2 is asked;
    unet/config.json, ...    optional, for networks that are not the published ones;
    vae/                     needed, as in a diffusers folder, where the file lacks a VAE's tensors.
"""
import re
from pathlib import Path
from typing import Callable

import torch
from torch import nn

from model.formats import single_file
from model.tools.command import BadInput
from model.tools.files import opened, read_json

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
         "text_encoder": "model", "text_encoder_2": "model"}
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
TEXT = "text_model."    # a level of names that transformers dropped in part: not in our names

# Settings that some single files of SDXL carry as keys, without a value that matters; and what
# trainers write to the header.
NOTES = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
PREDICTION, PREDICTIONS = "modelspec.prediction_type", {"v": "v_prediction", "epsilon": "epsilon"}
READ = """config.json scheduler_config.json vocab.json merges.txt tokenizer.json
    tokenizer_config.json special_tokens_map.json added_tokens.json""".split()    # beside weights
# What else a single file may be, by the start of a key.
OTHERS = ((r"(model\.diffusion_model\.)?(joint_blocks|context_embedder)\.", "Stable Diffusion 3"),
          (r"(model\.diffusion_model\.)?(double_blocks|single_blocks)\.", "Flux or a relative"),
          (r"conditioner\.embedders\.0\.model\.", "the SDXL refiner"),
          (r"control_model\.", "a ControlNet"),
          (r".*[._]lora([._](down|up)|_[AB])\.", "a LoRA, which goes with --lora"),
          (r"(down_blocks|mid_block|conv_in|encoder|decoder|text_model)\.",
           "one part of a diffusers folder (give the folder above it)"))


def refuse(path: Path, reason: str):
    raise BadInput(f"{path}: {reason}; only Stable Diffusion 1.x, 2.x and XL base for text to "
                   "image are supported")


def other_model(keys: str) -> str:
    """What a single file with these keys, a line each, is instead."""
    for pattern, kind in OTHERS:
        if re.search("^" + pattern, keys, re.MULTILINE):
            return f"this is {kind}"
    return "lacks the UNet or the text encoder of a Stable Diffusion"


def part_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of one part of a diffusers folder: one, or the shards that an index
    lists; or else the fp16 ones."""
    if not (folder / part).is_dir():
        refuse(folder, f"has no {part} folder; a checkpoint has unet, vae, text_encoder, tokenizer "
                       "and scheduler side by side (Stable Diffusion 3 or Flux, and the SDXL "
                       "refiner, have others)")
    for variant in ("", ".fp16"):
        file = folder / part / f"{PARTS[part]}{variant}.safetensors"
        if file.is_file():
            return [file]
        index = folder / part / f"{PARTS[part]}.safetensors.index{variant}.json"
        if not index.is_file():
            continue
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise BadInput(f"{index}: has no weight_map; copy the checkpoint again")
        files = sorted({index.parent / Path(str(name)).name for name in shards.values()})
        for file in files:
            if not file.is_file():
                raise BadInput(f"{index}: lists {file.name}, which is not there; copy the "
                               "checkpoint again")
        return files
    raise BadInput(f"{folder / part}: no {PARTS[part]}.safetensors; pickled weights (.bin) are "
                   "never opened, so get the checkpoint in safetensors form")


def unet_files(model: Path) -> list[Path]:
    """The files that hold the UNet: sha256() of them says which base model this is."""
    if not model.exists():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(model))    # a name on Hugging Face?
        load = f"; to download it: hf download {model} --local-dir {model.name}" if hub else ""
        raise BadInput(f"--model {model}: no such file or folder; give a Stable Diffusion folder "
                       f"in the diffusers layout, or a single .safetensors file{load}")
    return [model] if model.is_file() else part_files(model, "unet")


def encoder_files(model: Path) -> list[Path]:
    """All that latents and prompt states depend on: the VAE, text encoders and tokenizers."""
    return files_of(model, ENCODERS)


def model_files(model: Path) -> list[Path]:
    """All that a picture depends on: weights, settings and tokenizers, also those beside a single
    file."""
    return files_of(model, ("unet", "scheduler", *ENCODERS))


def files_of(model: Path, parts: tuple[str, ...]) -> list[Path]:
    """Those that are read, and no other that lies there: finished work stays finished."""
    single = model.is_file()
    side, files = (model.parent, [model]) if single else (model, [])
    files += side.glob("model_index.json")    # may say what SDXL's empty prompt means
    for part in parts:
        if single:
            read = vae_beside(model) if part == "vae" else []
        else:
            read = part_files(side, part) if part in PARTS and (side / part).is_dir() else []
        files += sorted(file for file in (side / part).glob("*")
                        if file.name in READ or file in read)
    return files


def vae_beside(model: Path) -> list[Path]:
    """The weights that lie beside a single file without a VAE, as fine-tuned ones may be; else
    none."""
    with opened(model) as file:
        own = any(key.startswith(single_file.VAE) for key in file.keys())
    there = any((model.parent / "vae").glob("*.safetensors"))
    return part_files(model.parent, "vae") if there and not own else []


def matrix(shape: torch.Size) -> torch.Size:
    """A 1x1 convolution and a linear layer are one thing in two shapes: the layer's."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def misfit(shapes: dict[str, torch.Size], tensors: dict[str, torch.Tensor],
           keys: dict[str, str]) -> str | None:
    """What is wrong with the first tensor that is missing, of another shape, or extra. keys: {our
    name: the file's key}."""
    for name, shape in shapes.items():
        if name not in tensors:
            return f"lacks {name}, expected with shape {list(shape)}"
        found = tensors[name].shape
        if matrix(found) != matrix(shape):
            return f"holds {keys[name]} with shape {list(found)}, expected {list(shape)}"
    for name in tensors:
        if name not in shapes:
            return f"holds {keys[name]} {list(tensors[name].shape)}, which this model does not have"


class Checkpoint:
    """One checkpoint, open for reading. family: of a single file, a key of single_file.FAMILIES.
    parts: {part: {key: (file, our names, without text_model.)}}; three names where the file keeps
    q, k and v in one tensor. Raises BadInput, naming file and key, for anything that is broken or
    that is not a Stable Diffusion 1, 2 or XL base.
    """
    def __init__(self, path: Path):
        unet_files(path)    # raises BadInput if there is none
        self.path, self.single, self.family = path, path.is_file(), None
        self.side = path.parent if self.single else path    # where configs and tokenizers lie
        self.parts = self._parts_of_file() if self.single else self._parts_of_folder()
        names = [name for _, [name] in self.parts["unet"].values()]
        if not any(name.startswith("mid_block.attentions.") for name in names):
            refuse(path, "its UNet has no attention in the middle, like that of a distilled model "
                         "(SSD-1B, Vega, small BK-SDM)")

    def _parts_of_folder(self):
        self._check_inputs(self.config("unet").get("in_channels", 4))
        return {part: self._part_of_folder(part) for part in PARTS    # the last is SDXL's alone
                if part != "text_encoder_2" or (self.path / part).is_dir()}

    def _part_of_folder(self, part: str):
        places = {}
        for path in part_files(self.side, part):
            with opened(path) as file:
                keys = [key for key in file.keys() if not key.endswith("position_ids")]
            if any(".base_layer." in key for key in keys):
                raise BadInput(f"{path}: was saved with a LoRA still loaded; unload it first "
                               "(unload_lora_weights, a fused one stays in), and save again")
            for key in keys:
                old = single_file.OLD_ATTENTION if part == "vae" else ()
                places[key] = path, [single_file.renamed(key, old).removeprefix(TEXT)]
        return places

    def _parts_of_file(self):
        with opened(self.path) as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
            prediction = PREDICTIONS.get((file.metadata() or {}).get(PREDICTION))
        first = single_file.UNET + "input_blocks.0.0.weight"
        self._check_inputs((*shapes.get(first, (0, 4)), 0, 0)[1])
        self.family = single_file.family_of(list(shapes))
        if first not in shapes or not self.family:
            refuse(self.path, other_model("\n".join(shapes)))
        # An SD 2 is asked, whatever its header says (stable_diffusion.py).
        self.notes = {"prediction_type": prediction} if prediction and self.family != "SD 2" else {}
        self.notes |= dict(setting for key, setting in NOTES.items() if key in shapes)
        parts = {part: {} for part in ("unet", "vae", *single_file.FAMILIES[self.family])}
        counts = [self.from_config(part, count) for part, count in single_file.COUNTS.items()]
        for key, shape in shapes.items():
            try:
                part, names = single_file.place(key, self.family, *counts)
            except KeyError:
                refuse(self.path, f"holds {key} {shape}, which belongs to no part of {self.family}")
            if part:
                parts[part][key] = self.path, names
        if not parts["vae"]:
            if not vae_beside(self.path):
                raise BadInput(f"{self.path}: holds no VAE; put the folder vae/ of a diffusers "
                               f"{self.family} beside it")
            parts["vae"] = self._part_of_folder("vae")
        return parts

    def _check_inputs(self, channels: int):
        if channels != 4:
            refuse(self.path, f"its UNet takes {channels} channels, not 4, like that of an "
                              "inpainting model, an editor, an upscaler or a depth-guided model")

    def _config_file(self, part: str) -> Path:
        return self.side / part / f"{'scheduler_' if part == 'scheduler' else ''}config.json"

    def has_config(self, part: str) -> bool:
        return self._config_file(part).is_file()

    def config(self, part: str) -> dict:
        """The contents of <part>/config.json (scheduler: scheduler_config.json); for a single file
        without one, the published config."""
        if not self.single or self.has_config(part):
            return read_json(self._config_file(part))
        config = single_file.CONFIGS[self.family][part]
        return {**config, **self.notes} if part == "scheduler" else config

    @property
    def zero_negative(self) -> bool:
        """Whether an empty negative prompt means zeros: SDXL, unless model_index.json says no."""
        index = self.side / "model_index.json"
        settings = read_json(index) if index.is_file() else {}
        return "text_encoder_2" in self.parts and settings.get("force_zeros_for_empty_prompt", True)

    @property
    def tokenizers(self):
        """(folder, settings) for each text encoder. Single files share one tokenizer; OpenCLIP was
        trained on prompts padded with id 0, which is "!"."""
        if not self.single:
            return [(self.side / part.replace("text_encoder", "tokenizer"), {})
                    for part in self.parts if part.startswith("text")]
        return [(self.side / "tokenizer", {"pad_token": "!"} if writer == "OpenCLIP" else {})
                for _, writer in single_file.FAMILIES[self.family].values()]

    def from_config(self, part: str, kind: Callable):
        """kind(config of the part). Raises BadInput for a config that kind() fails on: a width of
        0 or "x" breaks a constructor wherever it is used first."""
        config = self.config(part)
        try:
            return kind(config)
        except Exception as error:
            reason = error if isinstance(error, ValueError) else repr(error)
            raise BadInput(f"{self.path}: {part} config: {reason}; use a Stable Diffusion 1, 2 or "
                           "XL with its own configs") from None

    def on_meta(self, part: str, kind: Callable) -> nn.Module:
        """from_config() on the meta device: names and shapes without memory."""
        with torch.device("meta"):
            return self.from_config(part, kind)

    def load(self, part: str, kind: Callable, device, dtype: torch.dtype) -> nn.Module:
        """from_config() with this checkpoint's tensors, which become its parameters without a copy.
        Strict: raises BadInput for the first that does not fit, with its key and shape."""
        network, tensors = self.on_meta(part, kind), self.tensors(part, device, dtype)
        keys = {name: key for key, (_, names) in self.parts[part].items() for name in names}
        shapes = {name: parameter.shape for name, parameter in network.state_dict().items()}
        problem = misfit({name.removeprefix(TEXT): shapes[name] for name in shapes}, tensors, keys)
        if problem:
            raise BadInput(f"{self.path}: {part} {problem}; does its config.json belong to it? If "
                           "so, copy the checkpoint again")
        fitting = {name: tensors[name.removeprefix(TEXT)].reshape(shapes[name]) for name in shapes}
        network.load_state_dict(fitting, strict=True, assign=True)
        return network

    def tensors(self, part: str, device, dtype: torch.dtype):
        """A part's tensors by our names. Those that fit as they are stay in the mapped file: what
        is never used (most words, the VAE's other half) is never read."""
        tensors, places = {}, self.parts[part]
        files = {path: opened(path) for path in dict(places.values())}
        for key, (path, names) in places.items():
            tensor = files[path].get_tensor(key)
            if key.endswith("text_projection"):    # OpenCLIP's is x @ W, not W x
                tensor = tensor.T
            for name, third in zip(names, tensor.chunk(3) if len(names) == 3 else [tensor]):
                tensors[name] = third.to(device, dtype).contiguous()
        return tensors

    def dtypes(self, part: str) -> set[str]:
        """As safetensors calls them."""
        places = self.parts[part].items()
        files = {path: opened(path) for _, (path, _) in places}
        return {files[path].get_slice(key).get_dtype() for key, (path, _) in places}
