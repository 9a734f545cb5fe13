"""Does a LoRA belong to this network? Asked before anything is put together.

Needs:       torch; a network, on the meta device too, where nothing but names and shapes exists.
Gives:       fitting(), match(), match_experts().

Letters: O, I a layer's output and input width (of a convolution: times the kernel's area).
"""
import math
import sys
from pathlib import Path

from torch import nn

from lora import Factors, layers
from model.formats.checkpoint import unet_files
from model.formats.experts import Experts
from model.formats.lora_file import FAMILIES, prompt_width
from model.tools.command import BadInput
from model.tools.files import sha256


def fitting(network: nn.Module, shapes, what: str):
    """Raises BadInput, naming `what`, if one of the layers {flat name: [O, I]} has another shape in
    the network (a meta one will do), and if the network has none of them: such a LoRA would load
    "successfully" and do nothing.
    """
    known = layers(network)
    shared = [name for name in shapes if name in known]
    for name in shared:
        out, *rest = known[name][1].weight.shape
        own = [out, math.prod(rest)]
        if shapes[name] != own:
            widths = {key: layer.weight.shape[1] for key, (_, layer) in known.items()}
            theirs, ours = family({key: shape[1] for key, shape in shapes.items()}), family(widths)
            raise BadInput(f"{what}: {name} is for a layer of shape {shapes[name]}, this model's "
                           f"is {own}: a LoRA for {theirs}, and this model is {ours}; use a LoRA "
                           "made for this model")
    if not shared:
        raise BadInput(f"{what}: adapts other layers ({next(iter(shapes), 'it is empty')} ...), "
                       "none of which this model has; use a LoRA made for this model")


def family(widths: dict[str, int]) -> str:
    return FAMILIES.get(prompt_width(widths), ("another model",))[0]


def known_of(names, known, what: str) -> list[str]:
    """The names that are known, with a note on stderr that counts and names the rest."""
    rest = [name for name in names if name not in known]
    if rest:
        print(f"note: {what}{len(rest)} of {len(names)} layers are not in this model and are left "
              f"out: {', '.join(rest[:3])}{' ...' if rest[3:] else ''}", file=sys.stderr)
    return [name for name in names if name in known]


def match(network: nn.Module, lora: dict[str, Factors], what: str) -> dict[str, Factors]:
    """The part of a LoRA that is for layers of this network, with a note on stderr that counts and
    names the rest. Raises BadInput as fitting() does."""
    fitting(network, {name: [len(f.up), f.down.shape[1]] for name, f in lora.items()}, what)
    known = layers(network)
    # A linear layer and a 1x1 convolution are one thing, and some files have the other one.
    return {name: lora[name]._replace(kernel=tuple(known[name][1].weight.shape[2:]))
            for name in known_of(lora, known, f"{what}: ")}


def match_experts(network: nn.Module, experts: Experts, model: Path, data: Path):
    """Leaves of experts.names the layers that the network has, with a note that counts the rest.
    Raises BadInput as fitting() does, where the experts were not trained on this model, and where
    `data` has no folder of an expert's concept."""
    if experts.metadata.get("base_model_hash") not in (None, sha256(*unet_files(model))):
        raise BadInput(f"{experts.files[0].path}: was trained on another base model than --model "
                       f"{model}; give that model")
    for file, concept in zip(experts.files, experts.concepts):
        if not (data / concept).is_dir():    # a merged LoRA, or another program's
            raise BadInput(f"{file.path}: {data} has no pairs of {concept!r}; give the folder of "
                           "all pairs as --data, or use --method average")
        fitting(network, file.shapes, str(file.path))
    experts.names = known_of(experts.names, layers(network), "")
