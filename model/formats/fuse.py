"""A whole checkpoint with a LoRA in its weights, in the layout of the model that it is made from.

Needs:       torch, safetensors.
Gives:       check_out(), fuse() for merge.py.
"""
import shutil
from pathlib import Path

import torch
from torch import nn

from lora import Factors, layers
from model.formats.checkpoint import Checkpoint, model_files
from model.formats.experts import Experts
from model.formats.fit import match
from model.tools.command import BadInput
from model.tools.files import check_folder, opened, places, replacing

# To what a change may be added. Of one of 1% float8 keeps 13% (e4m3fn) to 23% (e5m2): the rest is
# rounded away (random W, delta W of rank 4).
FINE = {"F64", "F32", "F16", "BF16"}


def check_out(out: Path, model: Path | None, experts: Experts):
    """Raises BadInput where a merged LoRA, or the model that it is fused with, cannot be written:
    now, and not after hours of work."""
    check_folder(out.parent)
    if model:
        check_fuse(model, out)
    elif out.is_dir():
        raise BadInput(f"--out {out}: is a folder; give a file's name")
    if out.resolve() in [file.path.resolve() for file in experts.files]:
        raise BadInput(f"--out {out}: is one of the LoRAs that are merged; name another file")


def check_fuse(model: Path, out: Path):
    """Raises BadInput where fuse() could not begin."""
    if not model.exists():
        raise BadInput(f"--fuse {model}: no such file or folder; give a Stable Diffusion")
    if out.suffix == ".safetensors" and (model.is_dir() or out.resolve() == model.resolve()):
        raise BadInput(f"--out {out}: is the model itself, or one file for a model that is a "
                       "folder; name another, a folder for a folder")
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"--out {out}: is not empty; name a new folder")
    coarse = Checkpoint(model).dtypes("unet") - FINE
    if coarse:
        raise BadInput(f"--fuse {model}: its UNet is in {', '.join(sorted(coarse))}, too coarse "
                       "for a LoRA's small changes; give the model in 16 bits, or load the LoRA "
                       "beside this one")


def kept_files(checkpoint: Checkpoint) -> list[Path]:
    """What a copy holds: no pickles, and no whole model on the top level of a folder, which would
    still have the old weights."""
    if checkpoint.single:
        return model_files(checkpoint.path)
    kinds = (".json", ".txt", ".model", ".md", ".safetensors")
    return [path for path in checkpoint.path.rglob("[!.]*") if path.suffix in kinds
            and (path.suffix != ".safetensors" or path.parent != checkpoint.path)]


def add(checkpoint: Checkpoint, changes: dict, source: Path, target: Path) -> set[str]:
    """Adds delta W, in fp32, to the UNet's tensors in `target`, a copy of `source`, one tensor at a
    time: the header, dtypes and all other bytes stay. changes: {our name: Factors}. Returns the
    names of what changed."""
    names = {key: name for key, (_, [name]) in checkpoint.parts["unet"].items()}
    # The averaged copy that some files carry changes too: some programs prefer it.
    names |= {"model_ema." + key.removeprefix("model.").replace(".", ""): name
              for key, name in names.items()}
    tensors, _, begin = places(source)
    changed, starts = set(), {place.key: begin + place.start for place in tensors}
    with opened(source) as file, open(target, "r+b") as written:
        for key in file.keys():
            name = names.get(key)
            if name not in changes:
                continue
            delta, old = changes[name].delta(), file.get_tensor(key)
            if not delta.any():    # strength 0 is the same file, bit for bit
                continue
            exact = torch.promote_types(old.dtype, torch.float32)
            new = (old.to(exact) + delta.reshape(old.shape)).to(old.dtype)
            if not new.isfinite().all():
                raise BadInput(f"{source}: {key} is not finite any more with the LoRA in it; use a "
                               "lower strength")
            written.seek(starts[key])
            written.write(new.contiguous().view(torch.uint8).numpy().data)
            changed.add(name)
    return changed


def fuse(model: Path, network: nn.Module, lora: dict[str, Factors], what: str, out: Path) -> int:
    """Copies a checkpoint, whose UNet is like `network`, to the folder `out`, or a single file to
    `out`.safetensors, with W + delta W in its layers. Returns how many tensors changed. `out`
    appears complete or not at all. Raises BadInput as match() does."""
    fused, known = match(network, lora, what), layers(network)
    changes = {f"{known[key][0]}.weight": f for key, f in fused.items()}
    checkpoint, changed, alone = Checkpoint(model), set(), out.suffix == ".safetensors"
    with replacing(out) as temporary:
        for source in [model] if alone else kept_files(checkpoint):
            target = temporary if alone else temporary / source.relative_to(checkpoint.side)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            in_unet = source == model or source.parent == model / "unet"
            if source.suffix == ".safetensors" and in_unet:
                changed |= add(checkpoint, changes, source, target)
    return len(changed)
