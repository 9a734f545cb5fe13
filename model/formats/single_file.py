"""What single-file checkpoints call their tensors, as a table of rules. configs.json: the configs
that they lack.

What it is:  the first Stable Diffusion code (LDM, CompVis) numbered its layers through; diffusers
             folders, and the modules of this project, name them by level. The same tensors.
Gives:       CONFIGS, the published ones; FAMILIES, where each part of SD 1, SD 2 and SDXL lies in a
             file; family_of() it; place(), a key -> where its tensor belongs here; unet_name(),
             which LoRA files need too, and original_name(), its inverse for SDXL; columns().

Letters: L = layers_per_block + 1, the layers that the numbering counts to a level (the down- or
upsampling is one of them); n a layer's number, b = n // L its level, j = n % L its place there.
"""
import re
from pathlib import Path

from model.tools.files import read_json

# The published configs, as far as they differ from the defaults in unet.py and vae.py. SD 2: 768 px
# and v; loading turns it to 512 px and noise if that is what the weights predict.
CONFIGS = read_json(Path(__file__).with_name("configs.json"))    # {family: {part: config}}

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# family: {part: (prefix in the file, who wrote that text encoder)}
FAMILIES = {
    "SD 1": {"text_encoder": ("cond_stage_model.transformer.", "CLIP")},
    "SD 2": {"text_encoder": ("cond_stage_model.model.", "OpenCLIP")},
    "SDXL": {"text_encoder": ("conditioner.embedders.0.transformer.", "CLIP"),
             "text_encoder_2": ("conditioner.embedders.1.model.", "OpenCLIP")}}

# In a file, and rightly unused. Whatever is neither here nor in a part stops the loading, by name.
UNUSED = re.compile(r"""
      model_ema\..*                        # a running mean of the UNet's weights
    | (betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*|logvar|lvlb_weights)
    | denoiser\.sigmas                     # both computed
    | (global_step|v_pred|ztsnr)           # notes; the last two are read elsewhere
    | first_stage_model\.loss\..*          # from the VAE's training
    | embedding_manager\..*                # from a textual inversion's training
    | .*position_ids | .*logit_scale       # 0, 1, 2, ...; CLIP's own temperature
    # SD 1 and 2 read no pooled state, and SDXL that of its second encoder alone:
    | cond_stage_model\.(model|transformer)\.text_projection(\.weight)?
    | conditioner\.embedders\.0\.transformer\.text_projection(\.weight)?""", re.VERBOSE)


def columns(text: str) -> list[list[str]]:
    """The rows of a table. Those below: what a file says (a pattern), and what we say."""
    return [line.split() for line in text.strip().splitlines()]


# The start of a UNet name in a file, and ours. A dot stands for a dot or, in LoRA files, for an
# underscore. The first rule that fits counts. An upsampling comes last in its block: place 1, or 2
# where there is an attention.
BLOCKS = columns(r"""
    time_embed.0                        time_embedding.linear_1
    time_embed.2                        time_embedding.linear_2
    label_emb.0.0                       add_embedding.linear_1
    label_emb.0.2                       add_embedding.linear_2
    input_blocks.0.0                    conv_in
    out.0(?!\d)                         conv_norm_out
    out.2(?!\d)                         conv_out
    input_blocks.(\d+).0.op             down_blocks.{b}.downsamplers.0.conv
    input_blocks.(\d+).0                down_blocks.{b}.resnets.{j}
    input_blocks.(\d+).1                down_blocks.{b}.attentions.{j}
    middle_block.0                      mid_block.resnets.0
    middle_block.1                      mid_block.attentions.0
    middle_block.2                      mid_block.resnets.1
    output_blocks.(\d+).[12].conv       up_blocks.{b}.upsamplers.0.conv
    output_blocks.(\d+).0               up_blocks.{b}.resnets.{j}
    output_blocks.(\d+).1               up_blocks.{b}.attentions.{j}""")
RESNET = columns("""
    in_layers.0         norm1
    in_layers.2         conv1
    out_layers.0        norm2
    out_layers.3        conv2
    emb_layers.1        time_emb_proj
    skip_connection     conv_shortcut""")


def renamed(key: str, rules) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key


def unet_name(key: str, L=3) -> str:
    """A UNet key (prefix taken off) or a LoRA's module name -> our name, the start of it with dots;
    any other name comes back as it was. L is 3 in every published Stable Diffusion."""
    for pattern, block in BLOCKS:
        match = re.match(pattern, key)
        if not match:
            continue
        n = int(match[1]) if match.lastindex else 0
        n -= pattern.startswith("input")    # number 0 is conv_in
        inner = key[match.end():]
        if "resnets" in block:
            inner = renamed(inner, RESNET)
        return block.format(b=n // L, j=n % L) + inner
    return key


# SDXL's blocks, flat: {ours: original}. Numbers that no block has do no harm: nobody asks for them.
ORIGINALS = """time_embed_0 time_embed_2 label_emb_0_0 label_emb_0_2 out_2
    input_blocks_3_0_op input_blocks_6_0_op output_blocks_2_2_conv output_blocks_5_2_conv
    middle_block_0 middle_block_1 middle_block_2""".split()
ORIGINALS += [f"{side}_blocks_{n}_{i}" for side in ("input", "output") for n in range(9)
              for i in (0, 1)]
SDXL_BLOCKS = {unet_name(original).replace(".", "_"): original for original in ORIGINALS}


def original_name(name: str) -> str:
    """Our flat name of an SDXL layer -> the original one, which kohya's scripts alone know:
    "down_blocks_1_attentions_0_proj_in" -> "input_blocks_4_1_proj_in"."""
    for ours, original in SDXL_BLOCKS.items():
        if not (name + "_").startswith(ours + "_"):
            continue
        inner = name[len(ours):]
        if "resnets" in ours:
            inner = renamed(inner, [(new, old.replace(".", "_")) for old, new in RESNET])
        return original + inner
    return name


VAE_NAMES = columns(r"""
    ^encoder\.down\.                encoder.down_blocks.
    \.block\.(\d+)                  .resnets.\1
    \.(down|up)sample\.             .\1samplers.0.
    mid\.block_1                    mid_block.resnets.0
    mid\.block_2                    mid_block.resnets.1
    mid\.attn_1                     mid_block.attentions.0
    attentions\.0\.norm             attentions.0.group_norm
    attentions\.0\.proj_out         attentions.0.to_out.0
    attentions\.0\.([qkv])\b        attentions.0.to_\1
    nin_shortcut                    conv_shortcut
    \bnorm_out                      conv_norm_out""")
OLD_ATTENTION = columns(r"""
    attentions\.0\.query            attentions.0.to_q
    attentions\.0\.key              attentions.0.to_k
    attentions\.0\.value            attentions.0.to_v
    attentions\.0\.proj_attn        attentions.0.to_out.0""")    # of diffusers folders until 2023
OPEN_CLIP_NAMES = columns(r"""
    ^transformer\.resblocks\.       encoder.layers.
    \.ln_([12])\.                   .layer_norm\1.
    \.c_fc\.                        .fc1.
    \.c_proj\.                      .fc2.
    \.attn\.in_proj_                .self_attn.{qkv}_proj.
    \.attn\.                        .self_attn.
    ^ln_final\.                     final_layer_norm.
    ^text_projection$               text_projection.weight
    ^positional_embedding$          embeddings.position_embedding.weight
    ^token_embedding\.              embeddings.token_embedding.""")


def vae_name(key: str, levels: int) -> str:
    """A VAE key (prefix taken off) -> our name."""
    up = re.match(r"decoder\.up\.(\d+)", key)
    if up:    # numbered like the encoder here, by size; ours by the order in which it runs
        key = f"decoder.up_blocks.{levels - 1 - int(up[1])}" + key[up.end():]
    return renamed(key, VAE_NAMES)


def family_of(keys: list[str]) -> str | None:
    """Which of FAMILIES a file with these keys is, by its text encoders."""
    lines = "\n" + "\n".join(keys)
    for name, encoders in FAMILIES.items():
        if all("\n" + prefix in lines for prefix, _ in encoders.values()):
            return name


def unet_layers(config: dict) -> int:
    """L."""
    layers = int(config.get("layers_per_block", 2))
    if layers < 1:
        raise ValueError(f"layers_per_block = {layers}")
    return layers + 1


# What place() counts with, each out of the config of its part: L, levels, text_layers.
COUNTS = {"unet": unet_layers, "vae": lambda config: len(config["block_out_channels"]),
          "text_encoder": lambda config: int(config["num_hidden_layers"])}


def place(key: str, family: str, L: int, levels: int, text_layers: int):
    """(part, our names) of a key in a single file: three names of OpenCLIP's in_proj, which holds
    q, k and v on top of each other, and none of a key that is rightly unused.

    Raises KeyError for a key that belongs to no part. levels: the VAE's. text_layers: SD 2 reads
    the last but one layer of its text encoder, so that folders do not hold the last one, which
    files do: it is left out.
    """
    if UNUSED.fullmatch(key):
        return None, []
    if key.startswith(UNET):
        return "unet", [unet_name(key[len(UNET):], L)]
    if key.startswith(VAE):
        return "vae", [vae_name(key[len(VAE):], levels)]
    for part, (prefix, writer) in FAMILIES[family].items():
        if not key.startswith(prefix):
            continue
        name = key[len(prefix):].removeprefix("text_model.")
        if writer == "CLIP":
            return part, [name]
        name = renamed(name, OPEN_CLIP_NAMES)
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        if family == "SD 2" and layer and int(layer[1]) >= text_layers:
            return None, []
        return part, [name.replace("{qkv}", x) for x in "qkv"] if "{qkv}" in name else [name]
    raise KeyError(key)
