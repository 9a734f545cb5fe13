"""A checkpoint on disk: a diffusers folder, or one .safetensors file of the first code's layout.

What it is:  where each tensor and each config lies in either layout, reading them without a second
             copy, and writing the same checkpoint with some of the UNet's weights changed.
Needs:       torch, safetensors; single_file.py for what single files call things.
Gives:       Checkpoint; unet_files(), encoder_files(), model_files().

A folder carries everything. A single file carries tensors alone, so the rest lies beside it, in the
folders that every diffusers checkpoint has:
    tokenizer/               needed. SD 1, SD 2 and SDXL share one vocabulary: any CLIP's will do;
    scheduler/               optional: says noise or v. Without it SD 1 and SDXL predict noise, and
                             an SD 2 is asked;
    unet/config.json, ...    optional, for networks that are not the published ones.
Nothing is ever unpickled.
"""
import json
import re
import shutil
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn

from model.formats import single_file
from model.tools.command import BadInput
from model.tools.files import opened, read_json, replacing

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
         "text_encoder": "model", "text_encoder_2": "model"}
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
TEXT = "text_model."    # a level of names that transformers 5 has dropped: names here go without it

# Settings that some single files of SDXL carry as keys, without a value that matters.
NOTES = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
# What else a single file may be, by the start of a key.
OTHERS = ((r"(model\.diffusion_model\.)?(joint_blocks|context_embedder)\.", "Stable Diffusion 3"),
          (r"(model\.diffusion_model\.)?(double_blocks|single_blocks)\.", "Flux or a relative"),
          (r"conditioner\.embedders\.0\.model\.", "the SDXL refiner"),
          (r"control_model\.", "a ControlNet"),
          (r".*[._](lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up)\.",
           "a LoRA, which goes with --lora"),
          (r"(down_blocks|mid_block|conv_in|encoder|decoder|text_model)\.",
           "one part of a diffusers folder (give the folder above it)"))


def refuse(path: Path, reason: str):
    raise BadInput(f"{path}: {reason}; only Stable Diffusion 1.x, 2.x and XL base for text to "
                   "image are supported")


class Place(NamedTuple):
    """Where a tensor is. third: 0, 1, 2 where the file keeps q, k and v in one tensor."""
    file: Path
    key: str
    third: int | None = None
    transposed: bool = False

    def read(self, file) -> torch.Tensor:
        tensor = file.get_tensor(self.key)    # memory-mapped: nothing is read yet
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return tensor.T if self.transposed else tensor


def part_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of one part of a diffusers folder: one, or the shards that an index
    lists; or else the fp16 ones."""
    stem = f"{folder / part / PARTS[part]}"
    for variant in ("", ".fp16"):
        file = Path(f"{stem}{variant}.safetensors")
        if file.is_file():
            return [file]
        index = Path(f"{stem}.safetensors.index{variant}.json")
        if index.is_file():
            return shards(index)
    if (folder / part).is_dir():
        raise BadInput(f"{folder / part}: no {PARTS[part]}.safetensors; pickled weights (.bin) are "
                       "never opened, so get the checkpoint in safetensors form")
    refuse(folder, f"has no {part} folder; a checkpoint has unet, vae, text_encoder, tokenizer and "
                   "scheduler side by side (Stable Diffusion 3 or Flux, and the SDXL refiner, have "
                   "others)")


def shards(index: Path) -> list[Path]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    files = [index.parent / Path(name).name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise BadInput(f"{index}: lists {', '.join(missing) or 'no file'}, which is not there; "
                       "copy the checkpoint again")
    return files


def unet_files(model: Path) -> list[Path]:
    """The files that hold the UNet: sha256() of them says which base model this is."""
    if not model.exists():
        raise BadInput(f"--model {model}: no such file or folder; give a Stable Diffusion folder "
                       "in the diffusers layout, or a single .safetensors file")
    return [model] if model.is_file() else part_files(model, "unet")


def encoder_files(model: Path) -> list[Path]:
    """All that latents and prompt states depend on: the VAE, text encoders and tokenizers."""
    return files_of(model, ENCODERS)


def model_files(model: Path) -> list[Path]:
    """All that a picture depends on: weights, settings and tokenizers; what a single file needs
    beside it too."""
    return files_of(model, ("unet", "scheduler", *ENCODERS))


def files_of(model: Path, parts: tuple[str, ...]) -> list[Path]:
    single = model.is_file()
    side = model.parent if single else model
    kinds = (".json", ".txt") if single else (".json", ".txt", ".safetensors")
    files = [model] if single else []
    files += side.glob("model_index.json")    # may say what SDXL's empty prompt means
    for part in parts:
        files += sorted(file for file in (side / part).glob("*") if file.suffix in kinds)
    return files


def matrix(shape: torch.Size) -> torch.Size:
    """A 1x1 convolution and a linear layer are one thing in two shapes: the layer's."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def fill(module: nn.Module, state: dict[str, torch.Tensor], where: str, keys: dict[str, str]):
    """Gives a module on the meta device its tensors: they become its parameters, without a copy.

    keys: {our name: the file's key}. Strict: raises BadInput with the key, its shape and the
    expected one for the first tensor that is missing, extra or of another shape.
    """
    problems, fitting = [], {}
    for name, parameter in module.state_dict().items():
        key, shape = name.removeprefix(TEXT), parameter.shape
        if key not in state:
            problems.append(f"lacks {key}, expected with shape {list(shape)}")
            continue
        tensor = state.pop(key)
        if matrix(tensor.shape) == matrix(shape):
            fitting[name] = tensor.reshape(shape)
        else:
            problems.append(f"holds {keys[key]} with shape {list(tensor.shape)}, "
                            f"expected {list(shape)}")
    problems += [f"holds {keys[name]} {list(tensor.shape)}, which this model does not have"
                 for name, tensor in state.items()]
    if problems:
        raise BadInput(f"{where} {problems[0]}; does its config.json belong to it? If so, copy the "
                       "checkpoint again")
    module.load_state_dict(fitting, strict=True, assign=True)


class Checkpoint:
    """One checkpoint, open for reading.

    family: of a single file, a key of single_file.FAMILIES; None of a folder.
    parts: {part: {our name, without text_model.: Place}}. Raises BadInput, naming file and key, for
    anything that is broken or that is not a Stable Diffusion 1, 2 or XL base.
    """

    def __init__(self, path: Path):
        unet_files(path)    # raises BadInput if there is none
        self.path, self.single, self.family = path, path.is_file(), None
        self.side = path.parent if self.single else path    # where configs and tokenizers lie
        self.parts = {}
        if self.single:
            self._index_single()
        else:
            self._index_folder()

    def _index_folder(self):
        for part in PARTS:
            if part == "text_encoder_2" and not (self.path / part).is_dir():
                continue
            places = self.parts[part] = {}
            for path in part_files(self.path, part):
                with opened(path) as file:
                    keys = [key for key in file.keys() if not key.endswith("position_ids")]
                for key in keys:
                    name = key.removeprefix(TEXT)
                    if part == "vae":
                        name = single_file.old_vae_name(key)
                    places[name] = Place(path, key)
        self._check_inputs(self.config("unet").get("in_channels", 4))

    def _index_single(self):
        with opened(self.path) as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        first = single_file.UNET + "input_blocks.0.0.weight"
        self._check_inputs(shapes.get(first, (None, 4))[1])
        self.family = single_file.family_of(list(shapes))
        if first not in shapes or not self.family:
            self._refuse_other(shapes)
        self.parts = {part: {} for part in ("unet", "vae", *single_file.FAMILIES[self.family])}
        self.notes = dict(setting for key, setting in NOTES.items() if key in shapes)
        L = self.config("unet").get("layers_per_block", 2) + 1
        levels = len(self.config("vae")["block_out_channels"])
        layers = self.config("text_encoder")["num_hidden_layers"]
        for key, shape in shapes.items():
            try:
                part, names = single_file.place(key, self.family, L, levels, layers)
            except KeyError:
                refuse(self.path, f"holds {key} {shape}, which belongs to no part of {self.family}")
            for i, name in enumerate(names):
                third = i if len(names) == 3 else None
                # OpenCLIP's projection is x @ W, not W x.
                transposed = name == "text_projection.weight" and not key.endswith(".weight")
                self.parts[part][name] = Place(self.path, key, third, transposed)

    def _check_inputs(self, channels: int):
        if channels != 4:
            refuse(self.path, f"its UNet takes {channels} channels, not 4, like that of an "
                              "inpainting model, an editor, an upscaler or a depth-guided model")

    def _refuse_other(self, keys):
        lines = "\n".join(keys)
        for pattern, kind in OTHERS:
            if re.search("^" + pattern, lines, re.MULTILINE):
                refuse(self.path, f"this is {kind}")
        refuse(self.path, "lacks the UNet or the text encoder of a Stable Diffusion")

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
    def tokenizers(self) -> list[tuple[Path, dict]]:
        """(folder, settings) for each text encoder. Single files share one tokenizer; OpenCLIP was
        trained on prompts padded with id 0, which is "!"."""
        if not self.single:
            return [(self.side / part.replace("text_encoder", "tokenizer"), {})
                    for part in self.parts if part.startswith("text")]
        folder = self.side / "tokenizer"
        if not folder.is_dir():
            raise BadInput(f"{folder}: not there, and a single file carries no tokenizer; copy the "
                           "tokenizer folder of any diffusers checkpoint there")
        return [(folder, {"pad_token": "!"} if writer == "OpenCLIP" else {})
                for _, writer in single_file.FAMILIES[self.family].values()]

    def state(self, part: str, device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """A part's tensors by our names. Those that fit as they are stay in the mapped file: what
        is never used (most words, the VAE's other half) is never read."""
        state, places = {}, self.parts[part]
        for path in sorted({place.file for place in places.values()}):
            with opened(path) as file:
                for name, place in places.items():
                    if place.file == path:
                        state[name] = place.read(file).to(device, dtype).contiguous()
        return state

    def build(self, part: str, kind: Callable, device, dtype: torch.dtype) -> nn.Module:
        """kind(config) with this checkpoint's tensors."""
        module = self.skeleton(part, kind)
        keys = {name: place.key for name, place in self.parts[part].items()}
        fill(module, self.state(part, device, dtype), f"{self.path}: {part}", keys)
        return module

    def skeleton(self, part: str, kind: Callable) -> nn.Module:
        """kind(config) on the meta device: names and shapes without memory. Raises ValueError
        for a damaged config: a width of 0 or "x" breaks a constructor wherever it is used first."""
        config = self.config(part)
        try:
            with torch.device("meta"):
                return kind(config)
        except (ValueError, BadInput):
            raise
        except Exception as error:
            raise ValueError(f"{part} config: {type(error).__name__}: {error}; get an undamaged "
                             "copy of it") from None

    def rewrite(self, out: Path, change: Callable[[str], torch.Tensor | None]) -> int:
        """Writes this checkpoint to the folder `out`, in the same layout, with change(name) added
        to the UNet's tensors. Returns how many tensors changed.

        change: our name of a tensor -> what to add, or None. Files are copied, and then only the
        changed tensors are written over, one at a time: headers, dtypes and all other bytes stay,
        and memory holds one tensor. The folder appears complete or not at all.
        """
        if out.is_dir() and any(out.iterdir()):
            raise BadInput(f"--out {out}: is not empty; name a new folder")
        changed = set()
        with replacing(out) as temporary:
            for source in self._kept_files():
                target = temporary / source.relative_to(self.side)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                in_unet = source == self.path or target.parent == temporary / "unet"
                if source.suffix == ".safetensors" and in_unet:
                    changed |= self._add(source, target, change)
        return len(changed)

    def _kept_files(self) -> list[Path]:
        """What a copy holds: no pickles, and no whole model on the top level of a folder, which
        would still have the old weights."""
        if self.single:
            return model_files(self.path)
        kinds = (".json", ".txt", ".model", ".md", ".safetensors")
        return [path for path in self.path.rglob("*") if path.suffix in kinds
                and (path.suffix != ".safetensors" or path.parent != self.path)]

    def _add(self, source: Path, target: Path, change) -> set[str]:
        """Adds change(name) to the UNet's tensors in `target`, a copy of `source`; their names."""
        names = {place.key: name for name, place in self.parts["unet"].items()}
        # The averaged copy that some files carry changes too: some programs prefer it.
        names |= {"model_ema." + key.removeprefix("model.").replace(".", ""): name
                  for key, name in names.items()}
        changed = set()
        with opened(source) as file, open(target, "r+b") as written:
            size = int.from_bytes(written.read(8), "little")
            header = json.loads(written.read(size))
            for key in file.keys():
                name = names.get(key, None if self.single else key)    # variants have our names
                delta = change(name) if name else None
                if delta is None or not delta.any():    # strength 0 is the same file, bit for bit
                    continue
                old = file.get_tensor(key)
                exact = torch.promote_types(old.dtype, torch.float32)
                new = (old.to(exact) + delta.reshape(old.shape)).to(old.dtype)
                if not new.isfinite().all():
                    raise BadInput(f"{source}: {key} is not finite any more with the LoRA in it; "
                                   "use a lower strength")
                written.seek(8 + size + header[key]["data_offsets"][0])
                written.write(new.contiguous().view(torch.uint8).numpy().data)
                changed.add(name)
        return changed
