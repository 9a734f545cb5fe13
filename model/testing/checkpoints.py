"""Random Stable Diffusions, small and full-size, written as diffusers and as the first code did.

Needs:       diffusers, transformers (requirements-test.txt).
Gives:       small_pipeline(), folder(), single_file() of the kinds SD1, SD2, SD2-v and SDXL;
             full_size() of the published configs; unlike_new(), random_lora(),
             every_layer(); SMALL and VAES, configs (small.json).

Every number differs where a mix-up could hide: heads by level, depth by level. The single files are
named by diffusers' own tables and by counting blocks, and not by the table in
model/formats/single_file.py, which they test.
"""
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING as LDM
from safetensors.torch import save_file

import lora
from lora import Factors, layers
from model.formats.single_file import CONFIGS, columns
from model.text import build_encoder
from model.tools.files import read_json
from model.toy import world
from model.toy.bpe import write_tokenizer

SMALL = read_json(Path(__file__).with_name("small.json"))    # {kind: {part: config}}
VAES = SMALL.pop("VAE")    # the first is of all kinds but the flat one, for what costs by the layer
SMALL["SD2-v"] = SMALL["SD2"]
SCHEDULERS = {"SD1": "SD 1", "SD2": "SD 1", "SD2-v": "SD 2"}    # of CONFIGS; others: SDXL's


def vae_config(config: dict) -> dict:
    """With the block types that diffusers wants to be told."""
    levels = len(config["block_out_channels"])
    return dict(config, down_block_types=["DownEncoderBlock2D"] * levels,
                up_block_types=["UpDecoderBlock2D"] * levels)


@torch.no_grad()
def unlike_new(module: torch.nn.Module) -> torch.nn.Module:
    """Shakes every weight: in a fresh network norms are (1, 0), where one that was swapped or
    forgotten would not show."""
    random = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.add_(torch.randn(p.shape, generator=random) * (0.1 if p.ndim == 1 else 0.03))
    return module.eval().requires_grad_(False)


def random_lora(unet: torch.nn.Module, seed: int) -> dict:
    """A LoRA of rank 4 as after training: B is not zero any more."""
    random = torch.Generator().manual_seed(1000 + seed)
    fresh = lora.init(unet, 4, 4.0, random)
    return {name: f._replace(up=torch.randn(f.up.shape, generator=random) * 0.1)
            for name, f in fresh.items()}


def every_layer(unet: torch.nn.Module) -> dict:
    """A LoRA of rank 1 on every layer, the meta device's too, that changes nothing."""
    return {name: Factors(torch.ones(1, layer.weight[0].numel()), torch.zeros(len(layer.weight), 1),
                          1.0, tuple(layer.weight.shape[2:]))
            for name, (_, layer) in layers(unet).items()}


def text_parts(part: str, config: dict) -> dict:
    """A CLIP text model and a tokenizer of the toy's words. part: text_encoder or
    text_encoder_2."""
    pad = {"pad_token": "!"} if config["hidden_act"] == "gelu" else {}    # OpenCLIP's id 0
    with tempfile.TemporaryDirectory() as scratch:
        length = config.get("max_position_embeddings", 77)
        ids = write_tokenizer(Path(scratch), world.vocabulary(), length)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(scratch, **pad)
    return {part: build_encoder({**ids, **config}),
            part.replace("text_encoder", "tokenizer"): tokenizer}


def pipeline(configs) -> diffusers.DiffusionPipeline:
    """A new Stable Diffusion of such configs as single_file.CONFIGS holds."""
    torch.manual_seed(0)
    parts = {"unet": diffusers.UNet2DConditionModel(**configs["unet"]),
             "vae": diffusers.AutoencoderKL(**vae_config(configs["vae"])),
             "scheduler": diffusers.DDIMScheduler.from_config(configs["scheduler"])}
    for part in configs:
        if part.startswith("text_encoder"):
            parts |= text_parts(part, configs[part])
    if "text_encoder_2" in configs:
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                             requires_safety_checker=False)


def full_size(family: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a diffusers folder of a published configuration, "SD 1", "SD 2" or "SDXL", with random
    weights. Returns the path."""
    torch.set_default_dtype(dtype)
    pipeline(CONFIGS[family]).save_pretrained(path)
    torch.set_default_dtype(torch.float32)
    return path


@cache
def small_pipeline(kind: str) -> diffusers.DiffusionPipeline:
    """A whole Stable Diffusion of this kind, that draws 64 x 64 pixels, in diffusers. The same one
    in every call."""
    scheduler = CONFIGS[SCHEDULERS.get(kind, "SDXL")]["scheduler"]
    pipe = pipeline({"vae": VAES["SD"], **SMALL[kind], "scheduler": scheduler})
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            unlike_new(part)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def folder(kind: str, path: Path) -> Path:
    """Writes small_pipeline(kind) as diffusers does. Returns the path."""
    small_pipeline(kind).save_pretrained(path)
    return path


def single_file(kind: str, path: Path) -> Path:
    """Writes small_pipeline(kind) as the file that the first code would have written, tensors that
    nobody reads included, with tokenizers and configs beside it. Returns the path."""
    with tempfile.TemporaryDirectory() as scratch:
        ignored = shutil.ignore_patterns("*.safetensors", "model_index.json")
        shutil.copytree(folder(kind, Path(scratch)), path.parent, ignore=ignored,
                        dirs_exist_ok=True)
    tensors = {key: tensor.clone().contiguous() for key, tensor in ldm_tensors(kind).items()}
    save_file(tensors, path, {"format": "pt"})
    return path


def unet_blocks(levels: int, first_up: int):
    """{start of a diffusers name: of the single file's}. first_up: the place of the first level's
    upsampling in its block."""
    names = {**LDM["unet"]["layers"], **LDM["unet"]["addition_embed_type"],
             "mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2",
             "mid_block.attentions.0": "middle_block.1"}
    for b in range(levels):
        for j in range(3):
            for place, kind in enumerate(("resnets", "attentions")):
                names[f"down_blocks.{b}.{kind}.{j}"] = f"input_blocks.{3 * b + j + 1}.{place}"
                names[f"up_blocks.{b}.{kind}.{j}"] = f"output_blocks.{3 * b + j}.{place}"
        names[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{3 * b + 3}.0.op"
        place = 2 if b else first_up
        names[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{3 * b + 2}.{place}.conv"
    return names


def vae_blocks():
    """The same of a VAE of four levels."""
    names = dict(LDM["vae"])
    for side in ("encoder", "decoder"):
        names |= {f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
                  f"{side}.mid_block.resnets.1": f"{side}.mid.block_2",
                  f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1"}
    for b in range(4):
        up = 3 - b
        for j in range(3):
            names[f"encoder.down_blocks.{b}.resnets.{j}"] = f"encoder.down.{b}.block.{j}"
            names[f"decoder.up_blocks.{b}.resnets.{j}"] = f"decoder.up.{up}.block.{j}"
        names[f"encoder.down_blocks.{b}.downsamplers.0"] = f"encoder.down.{b}.downsample"
        names[f"decoder.up_blocks.{b}.upsamplers.0"] = f"decoder.up.{up}.upsample"
    return names


# What diffusers says, and what the first code said.
RESNET = columns("""
    norm1                   in_layers.0
    conv1                   in_layers.2
    time_emb_proj           emb_layers.1
    norm2                   out_layers.0
    conv2                   out_layers.3
    conv_shortcut           skip_connection""")
VAE_LAYERS = columns("""
    conv_shortcut           nin_shortcut
    group_norm              norm
    to_q                    q
    to_k                    k
    to_v                    v
    to_out.0                proj_out""")
OPEN_CLIP = columns("""
    self_attn.out_proj      attn.out_proj
    layer_norm1             ln_1
    layer_norm2             ln_2
    mlp.fc1                 mlp.c_fc
    mlp.fc2                 mlp.c_proj""")


def renamed(state: dict, prefix: str, blocks: dict[str, str], layers) -> dict:
    """A part's tensors by the single file's names."""
    tensors = {}
    for key, tensor in state.items():
        block = max((name for name in blocks if f"{key}.".startswith(f"{name}.")), key=len)
        inner = key[len(block):]
        if ".resnets." in block or "attn_1" in blocks[block]:
            for ours, theirs in layers:
                inner = re.sub(rf"^\.{ours}\.", f".{theirs}.", inner)
        if "attn_1" in blocks[block] and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]    # q, k and v were 1x1 convolutions
        tensors[prefix + blocks[block] + inner] = tensor
    return tensors


def open_clip(state: dict, prefix: str, numbers: tuple[int, ...]) -> dict:
    """A text encoder of three layers as OpenCLIP keeps it. numbers: the layers in the file; those
    above 2 repeat the last one."""
    projection = state.get("text_projection.weight", torch.zeros(20, 24))
    tensors = {"logit_scale": torch.ones(()), "text_projection": projection.T,
               "positional_embedding": state["embeddings.position_embedding.weight"],
               "token_embedding.weight": state["embeddings.token_embedding.weight"]}
    for end in ("weight", "bias"):
        tensors[f"ln_final.{end}"] = state[f"final_layer_norm.{end}"]
        for n in numbers:
            layer, block = f"encoder.layers.{min(n, 2)}", f"transformer.resblocks.{n}"
            thirds = [state[f"{layer}.self_attn.{x}_proj.{end}"] for x in "qkv"]
            tensors[f"{block}.attn.in_proj_{end}"] = torch.cat(thirds)
            for ours, theirs in OPEN_CLIP:
                tensors[f"{block}.{theirs}.{end}"] = state[f"{layer}.{ours}.{end}"]
    return {prefix + key: tensor for key, tensor in tensors.items()}


def ldm_tensors(kind: str):
    """All tensors of small_pipeline(kind) by the single file's names."""
    pipe, xl = small_pipeline(kind), kind == "SDXL"
    unet_names = unet_blocks(len(SMALL[kind]["unet"]["block_out_channels"]), 2 if xl else 1)
    tensors = renamed(pipe.unet.state_dict(), "model.diffusion_model.", unet_names, RESNET)
    # The running mean that some files carry must not be taken for the model.
    tensors |= {"model_ema." + key.removeprefix("model.").replace(".", ""): tensor + 1
                for key, tensor in tensors.items()}
    tensors |= renamed(pipe.vae.state_dict(), "first_stage_model.", vae_blocks(), VAE_LAYERS)
    tensors |= {"betas": torch.zeros(9), "embedding_manager.string_to_param": torch.zeros(9)}
    for i, part in enumerate(("text_encoder", "text_encoder_2")[:1 + xl]):
        encoder = getattr(pipe, part)
        state = {key.removeprefix("text_model."): tensor
                 for key, tensor in encoder.state_dict().items()}
        prefix = f"conditioner.embedders.{i}." if xl else "cond_stage_model."
        if encoder.config.hidden_act == "gelu":
            # SD 2's last layer is in the file, and nobody reads it.
            tensors |= open_clip(state, prefix + "model.", (0, 1, 2) if xl else (0, 1, 2, 23))
            continue
        prefix += "transformer.text_model."
        tensors |= {prefix + key: tensor for key, tensor in state.items()}
        tensors[prefix + "embeddings.position_ids"] = torch.arange(16)[None]
    return tensors

