"""A checkpoint on disk: a diffusers folder, or one .safetensors file as the first Stable Diffusion code wrote it.

What it is:  where each tensor and each config lies in either layout, reading them without a second copy, and writing
             the same checkpoint with some of the UNet's weights changed.
Needs:       torch, safetensors; single_file.py for what single files call things.
Gives:       Checkpoint, fill(), unet_files().

A folder carries everything. A single file carries tensors alone, so the rest lies beside it, in the same directory,
in the folders that every diffusers checkpoint has:
    tokenizer/               needed. SD 1, SD 2 and SDXL share one vocabulary, so any CLIP tokenizer/ will do;
    scheduler/               optional: says noise or v. Without it SD 1 and SDXL predict noise, and an SD 2 is asked;
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

from . import single_file
from .files import BadInput, opened, replacing

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
TEXT = "text_model."  # a level of names that transformers 5 has dropped: both sides are compared without it

# What else such a file or folder may be, recognised so that the sentence can say it.
INPUTS = {9: "an inpainting model", 8: "InstructPix2Pix", 7: "an upscaler", 5: "a depth-guided model"}     # by UNet input channels
OTHERS = ((r"(model\.diffusion_model\.)?(joint_blocks|context_embedder)\..*", "Stable Diffusion 3"),
          (r"(model\.diffusion_model\.)?(double_blocks|single_blocks)\..*", "Flux or a relative"),
          (r"conditioner\.embedders\.0\.model\..*", "the SDXL refiner"), (r"control_model\..*", "a ControlNet"),
          (r".*[._](lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up)\..*", "a LoRA, which goes with --lora"),
          (r"(down_blocks|mid_block|conv_in|encoder|decoder|text_model)\..*", "one part of a diffusers folder; give the folder above it"))
ONLY = "only Stable Diffusion 1.x, 2.x and XL base for text to image are supported"


class Place(NamedTuple):
    """Where a tensor is: key in file; `third` 0, 1, 2 where the file keeps q, k and v in one; turned: stored transposed."""
    file: Path
    key: str
    third: int | None = None
    turned: bool = False

    def read(self, file) -> torch.Tensor:
        tensor = file.get_tensor(self.key)                        # memory-mapped: nothing is read yet
        tensor = tensor if self.third is None else tensor.chunk(3)[self.third]
        return tensor.T if self.turned else tensor


def read_json(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
        return config
    except OSError:
        raise BadInput(f"{path}: cannot be read; --model takes a Stable Diffusion folder in the diffusers layout, or a single "
                       ".safetensors file") from None
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error}); copy the checkpoint again") from None


def part_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of one part of a diffusers folder: one, or the shards that an index lists; else the fp16 ones."""
    stem = folder / part / PARTS[part]
    for variant in ("", ".fp16"):
        if (file := Path(f"{stem}{variant}.safetensors")).is_file():
            return [file]
        for index in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
            if (index := Path(index)).is_file():
                shards = [index.parent / Path(name).name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
                gone = [shard.name for shard in shards if not shard.is_file()]
                if gone or not shards:
                    raise BadInput(f"{index}: lists {', '.join(gone) or 'no file'}, which is not there; copy the checkpoint again")
                return shards
    if (folder / part).is_dir():
        raise BadInput(f"{folder / part}: no {PARTS[part]}.safetensors; pickled weights (.bin) are never opened, "
                       "so get the checkpoint in safetensors form")
    raise BadInput(f"{folder}: has no {part} folder; " + (
        f"its transformer folder says Stable Diffusion 3 or Flux; {ONLY}" if (folder / "transformer").is_dir() else
        f"{ONLY}, and the SDXL refiner is not" if (folder / "text_encoder_2").is_dir() and part == "text_encoder" else
        "give a whole checkpoint: unet, vae, text_encoder, tokenizer and scheduler side by side"))


def unet_files(model: Path) -> list[Path]:
    """The files that hold the UNet: what says, by sha256() of their bytes, which base model this is."""
    if not model.exists():
        raise BadInput(f"--model {model}: no such file or folder; give a Stable Diffusion folder in the diffusers layout, or a "
                       "single .safetensors file")
    return [model] if model.is_file() else part_files(model, "unet")


def model_files(model: Path) -> list[Path]:
    """All that a picture depends on: weights, settings and tokenizers; of a single file, what is read beside it too."""
    parts = ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    side, kinds = (model.parent, (".json", ".txt")) if model.is_file() else (model, (".json", ".txt", ".safetensors"))
    found = [f for folder in (side, *(side / part for part in parts)) for f in folder.glob("*") if f.suffix in kinds]
    return [model] * model.is_file() + sorted(f for f in found if f.parent != side or f.name == "model_index.json")


def fill(module: nn.Module, state: dict[str, torch.Tensor], where: str, keys: dict[str, str] = {}) -> nn.Module:
    """Gives a module (built on the meta device) its tensors: they become the parameters, nothing is copied.

    Strict. Raises BadInput with the key, its shape and the expected one for the first tensor that is missing, extra or
    of another shape. A 1x1 convolution and a linear layer are one thing in two shapes, and fit each other.
    keys: {our name: the file's key}, where they differ.
    """
    expected = {name.removeprefix(TEXT): (name, list(tensor.shape)) for name, tensor in module.state_dict().items()}
    problems = [f"lacks {name}, expected with shape {shape}" for name, (_, shape) in expected.items() if name not in state]
    problems += [f"holds {keys.get(name, name)} {list(t.shape)}, which this model does not have"
                 for name, t in state.items() if name not in expected]
    for name in expected.keys() & state.keys():
        _, shape = expected[name]
        if (found := list(state[name].shape)) != shape and max(found, shape, key=len) == min(found, shape, key=len) + [1, 1]:
            state[name] = state[name].reshape(shape)
        elif found != shape:
            problems.append(f"holds {keys.get(name, name)} with shape {found}, expected {shape}")
    if problems:
        raise BadInput(f"{where} {sorted(problems)[0]}" + (f" (and {len(problems) - 1} more misfits)" if problems[1:] else "")
                       + "; does its config.json belong to it? If so, copy the checkpoint again")
    module.load_state_dict({expected[name][0]: tensor for name, tensor in state.items()}, strict=True, assign=True)
    return module


class Checkpoint:
    """One checkpoint, open for reading: .config(part), .state(part, ...), .tokenizers, .rewrite().

    parts: {part: {our name, without text_model.: Place}}. Raises BadInput, naming file and key, for anything that is
    broken or that is not a Stable Diffusion 1, 2 or XL base.
    """

    def __init__(self, path: Path):
        self.path, self.single = Path(path), Path(path).is_file()
        self.side = self.path.parent if self.single else self.path       # where configs and tokenizers lie
        self.files = unet_files(self.path)
        self.family = None
        if self.single:
            self._index_single()
        else:
            names = [p for p in PARTS if p != "text_encoder_2" or (self.path / p).is_dir()]
            self.parts = {part: self._index_folder(part) for part in names}
            self._refuse_inputs(self.config("unet").get("in_channels", 4))

    def _index_folder(self, part: str) -> dict[str, Place]:
        places = {}
        for path in part_files(self.path, part):
            with opened(path) as file:
                for key in file.keys():
                    name = single_file.old_vae_name(key) if part == "vae" else key.removeprefix(TEXT)
                    if not key.endswith("position_ids"):          # 0, 1, 2, ...: once stored as if it were a weight
                        self._put(places, name, Place(path, key))
        return places

    def _index_single(self):
        with opened(self.path) as file:
            keys = list(file.keys())
            conv_in = file.get_slice(single_file.UNET + "input_blocks.0.0.weight").get_shape() if (
                single_file.UNET + "input_blocks.0.0.weight" in keys) else None
        self.notes = {"v_pred", "ztsnr"} & set(keys)
        self._refuse_inputs(conv_in[1] if conv_in else 4)
        families = [name for name, text in single_file.FAMILIES.items()
                    if all(any(key.startswith(prefix) for key in keys) for prefix, _ in text.values())]
        if not families or conv_in is None:
            kind = next((kind for pattern, kind in OTHERS if any(re.fullmatch(pattern, key) for key in keys)), None)
            lacks = "a UNet" if conv_in is None else "a text encoder"
            raise BadInput(f"{self.path}: " + (f"this is {kind}; {ONLY}" if kind else
                                               f"holds {len(keys)} tensors but not {lacks} of Stable Diffusion; {ONLY}"))
        self.family = families[0]
        L = self.config("unet").get("layers_per_block", 2) + 1
        levels, layers = len(self.config("vae")["block_out_channels"]), self.config("text_encoder")["num_hidden_layers"]
        self.parts = {part: {} for part in ("unet", "vae", *single_file.FAMILIES[self.family])}
        for key in keys:
            try:
                found = single_file.place(key, self.family, L, levels, layers)
            except KeyError:
                with opened(self.path) as file:
                    shape = file.get_slice(key).get_shape()
                raise BadInput(f"{self.path}: holds {key} {shape}, which belongs to no part of {self.family}; {ONLY}") from None
            if found:
                part, names = found
                for i, name in enumerate(names):
                    turned = name == "text_projection.weight" and not key.endswith(".weight")       # OpenCLIP keeps x @ W, not W x
                    self._put(self.parts[part], name, Place(self.path, key, i if len(names) == 3 else None, turned))

    @staticmethod
    def _put(places: dict[str, Place], name: str, place: Place):
        if name in places:
            raise BadInput(f"{place.file}: holds {name} twice, as {places[name].key} and as {place.key}; get an undamaged copy")
        places[name] = place

    def _refuse_inputs(self, channels: int):
        if channels != 4:
            raise BadInput(f"{self.path}: its UNet takes {channels} channels: this is {INPUTS.get(channels, 'another model')}; {ONLY}")

    def _config_file(self, part: str) -> Path:
        return self.side / part / ("scheduler_config.json" if part == "scheduler" else "config.json")

    def has_config(self, part: str) -> bool:
        return self._config_file(part).is_file()

    def config(self, part: str) -> dict:
        """The contents of <part>/config.json (scheduler: scheduler_config.json); a single file's is the published one."""
        if not self.single or self.has_config(part):
            return read_json(self._config_file(part))
        config = dict(single_file.CONFIGS[self.family][part])
        if part == "scheduler":  # some single files of SDXL carry these two names, without a value that matters
            config |= {"prediction_type": "v_prediction"} if "v_pred" in self.notes else {}
            config |= {"rescale_betas_zero_snr": True} if "ztsnr" in self.notes else {}
        return config

    @property
    def zero_negative(self) -> bool:
        """Whether an empty negative prompt means zeros: SDXL, unless its model_index.json says otherwise."""
        index = self.side / "model_index.json"
        return "text_encoder_2" in self.parts and (read_json(index) if index.is_file() else {}).get("force_zeros_for_empty_prompt", True)

    @property
    def tokenizers(self) -> list[tuple[Path, dict]]:
        """(folder, settings) for each text encoder. OpenCLIP was trained on prompts padded with id 0, which is "!"."""
        result = []
        for part in (p for p in self.parts if p.startswith("text")):
            folder = self.side / part.replace("text_encoder", "tokenizer")
            if not self.single:
                result.append((folder, {}))
                continue
            folder = folder if folder.is_dir() else self.side / "tokenizer"
            if not folder.is_dir():
                raise BadInput(f"{folder}: not there, and a single file carries no tokenizer; copy the tokenizer folder of any "
                               "Stable Diffusion in the diffusers layout (vocab.json, merges.txt, tokenizer_config.json) to it")
            result.append((folder, {"pad_token": "!"} if single_file.FAMILIES[self.family][part][1] == "OpenCLIP" else {}))
        return result

    def state(self, part: str, device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """A part's tensors by our names, each moved and converted by itself, or left in the mapped file if it fits as it is:
        then nothing is read until it is used, and what is never used (most words, the VAE's other half) never."""
        state, places = {}, self.parts[part]
        for path in sorted({place.file for place in places.values()}):
            with opened(path) as file:
                for name, place in places.items():
                    if place.file == path:
                        state[name] = place.read(file).to(device, dtype).contiguous()
        return state

    def build(self, part: str, kind: Callable, device, dtype: torch.dtype) -> nn.Module:
        """kind(config) with this checkpoint's tensors."""
        return fill(self.skeleton(part, kind), self.state(part, device, dtype), f"{self.path}: {part}",
                    {name: place.key for name, place in self.parts[part].items()})

    def skeleton(self, part: str, kind: Callable) -> nn.Module:
        """kind(config) on the meta device: names and shapes without memory. Raises ValueError if the config is damaged: a
        width of 0 or "x" breaks a constructor wherever it is used first."""
        config = self.config(part)
        try:
            with torch.device("meta"):
                return kind(config)
        except (ValueError, BadInput):
            raise
        except Exception as error:
            raise ValueError(f"{part} config: {type(error).__name__}: {error}; get an undamaged copy of it") from None

    def rewrite(self, out: Path, change: Callable[[str], torch.Tensor | None]) -> int:
        """Writes this checkpoint to the folder `out`, in the same layout, with change(name) added to the UNet's tensors.

        change: our name of a tensor -> what to add, or None. Files are copied and then only the changed tensors are
        written over, one at a time: headers, dtypes and all other bytes stay, and memory holds one tensor. The
        folder appears complete or not at all. Returns how many tensors changed.
        """
        if out.is_dir() and any(out.iterdir()):
            raise BadInput(f"--out {out}: is not empty; name a new folder")
        if self.single:
            keep = [self.path, *(p for t in ("tokenizer", "tokenizer_2", "scheduler") for p in (self.side / t).glob("*"))]
        else:  # pickles, and whole models lying on the top level, would be copies of the unchanged weights
            keep = [p for p in self.path.rglob("*") if p.suffix in (".json", ".txt", ".safetensors", ".model", ".md")
                    and not any(part.startswith(".") for part in p.relative_to(self.path).parts)
                    and (p.parent != self.path or p.suffix != ".safetensors")]
        changed = set()
        with replacing(out) as temporary:
            for source in (p for p in keep if p.is_file()):
                target = temporary / source.relative_to(self.side)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                if source.suffix == ".safetensors" and (self.single or target.parent == temporary / "unet"):
                    changed |= self._patch(source, target, change)
        return len(changed)

    def _patch(self, source: Path, target: Path, change) -> set[str]:
        names = {place.key: name for name, place in self.parts["unet"].items()}
        # The averaged copy that some files carry changes too, or whoever prefers it would draw with the old weights.
        names |= {"model_ema." + key.removeprefix("model.").replace(".", ""): name for key, name in names.items()}
        changed = set()
        with opened(source) as file, open(target, "r+b") as written:
            size = int.from_bytes(written.read(8), "little")
            for key, entry in json.loads(written.read(size)).items():
                name = names.get(key, None if self.single else key)    # other variants in unet/ have our names
                delta = change(name) if name and key != "__metadata__" else None
                if delta is None or not delta.any():                   # strength 0 is the same file, bit for bit
                    continue
                old = file.get_tensor(key)
                new = (old.to(torch.promote_types(old.dtype, torch.float32)) + delta.reshape(old.shape)).to(old.dtype)
                if not new.isfinite().all():
                    raise BadInput(f"{source}: {key} is not finite any more with the LoRA in it; use a lower strength")
                written.seek(8 + size + entry["data_offsets"][0])
                written.write(new.contiguous().view(torch.uint8).numpy().data)
                changed.add(name)
        return changed
