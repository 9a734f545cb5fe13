"""What single-file checkpoints call their tensors, as a table of rules, and the configs that they leave out.

What it is:  the first Stable Diffusion code (LDM, CompVis) numbered its layers through; the diffusers folders, and
             the modules of this project, name them by level. Same tensors, same arithmetic, other names.
Needs:       nothing but Python.
Gives:       CONFIGS, the published ones; FAMILIES, where each part of SD 1, SD 2 and SDXL lies in a file; place(), a key
             of the file -> where its tensor belongs here; unet_name(), which LoRA files in the old naming need as well.

A dot in a pattern stands for a dot or, in LoRA files, for an underscore. Letters: L = layers_per_block + 1, the
layers that the U's numbering counts to a level (the down- or upsampling is one of them); b level, j layer in it.
"""
import re

# The published configs, as far as they differ from the defaults in unet.py and vae.py.
_VAE = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, scaling_factor=0.18215)
_CLIP_L = dict(architectures=["CLIPTextModel"], hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
               num_attention_heads=12, hidden_act="quick_gelu", vocab_size=49408, projection_dim=768)
_OPEN_CLIP_H = dict(_CLIP_L, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                    hidden_act="gelu", projection_dim=512)
_OPEN_CLIP_G = dict(architectures=["CLIPTextModelWithProjection"], hidden_size=1280, intermediate_size=5120, vocab_size=49408,
                    num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", projection_dim=1280)
_SCHEDULER = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                  steps_offset=1, clip_sample=False, set_alpha_to_one=False)
CONFIGS = {
    "SD 1": dict(unet=dict(sample_size=64, cross_attention_dim=768), vae=_VAE, text_encoder=_CLIP_L, scheduler=_SCHEDULER),
    # 768 px and v; load() turns it to 512 px and noise if that is what the weights predict.
    "SD 2": dict(unet=dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True),
                 vae=_VAE, text_encoder=_OPEN_CLIP_H, scheduler=dict(_SCHEDULER, prediction_type="v_prediction")),
    "SDXL": dict(unet=dict(sample_size=128, cross_attention_dim=2048, block_out_channels=[320, 640, 1280], attention_head_dim=[5, 10, 20],
                           down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, transformer_layers_per_block=[1, 2, 10],
                           up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], use_linear_projection=True,
                           addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816),
                 vae=dict(_VAE, scaling_factor=0.13025), text_encoder=_CLIP_L, text_encoder_2=_OPEN_CLIP_G,
                 scheduler=dict(_SCHEDULER, timestep_spacing="leading"))}

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# family: {part: (prefix in the file, who wrote that text encoder)}
FAMILIES = {
    "SD 1": {"text_encoder": ("cond_stage_model.transformer.", "CLIP")},
    "SD 2": {"text_encoder": ("cond_stage_model.model.", "OpenCLIP")},
    "SDXL": {"text_encoder": ("conditioner.embedders.0.transformer.", "CLIP"),
             "text_encoder_2": ("conditioner.embedders.1.model.", "OpenCLIP")}}

# In a file, and rightly unused. Whatever is neither here nor in a part stops the loading, by name.
UNUSED = re.compile("|".join((
    r"model_ema\..*",                                                  # a running mean of the UNet's weights
    r"(betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*|logvar|lvlb_weights|denoiser\.sigmas)",  # computed
    r"(global_step|v_pred|ztsnr)",                                     # notes; the last two are read elsewhere
    r"first_stage_model\.loss\..*",                                    # from the VAE's training
    r".*position_ids", r".*logit_scale",                               # 0, 1, 2, ...; CLIP's own temperature
    r"cond_stage_model\.(model|transformer)\.text_projection(\.weight)?",      # SD 1 and 2 read no pooled state
    r"conditioner\.embedders\.0\.transformer\.text_projection(\.weight)?")))   # SDXL: from the second encoder alone

RESNET = (("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"), ("out_layers.0", "norm2"),
          ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut"))


def level(kind, name, L):
    """The numbered block (down: from 1, since 0 is conv_in) as <kind>_blocks.b.<name>.j"""
    return lambda m: "{}_blocks.{}.{}.{}".format(kind, (n := int(m[1]) - (kind == "down")) // L, name, n % L)


def sampler(kind, name, L):
    return lambda m: f"{kind}_blocks.{(int(m[1]) - (kind == 'down')) // L}.{name}.0.conv"


def unet_name(key: str, L: int = 3) -> str:
    """A UNet key (prefix taken off) or a LoRA's module name -> our name; any other name comes back as it was.
    L is 3 in every published Stable Diffusion."""
    rules = [(r"time_embed.0", "time_embedding.linear_1"), (r"time_embed.2", "time_embedding.linear_2"),
             (r"label_emb.0.0", "add_embedding.linear_1"), (r"label_emb.0.2", "add_embedding.linear_2"),
             (r"input_blocks.0.0", "conv_in"), (r"out.0(?!\d)", "conv_norm_out"), (r"out.2(?!\d)", "conv_out"),
             (r"input_blocks.(\d+).0.op", sampler("down", "downsamplers", L)),
             (r"input_blocks.(\d+).0", level("down", "resnets", L)), (r"input_blocks.(\d+).1", level("down", "attentions", L)),
             (r"middle_block.0", "mid_block.resnets.0"), (r"middle_block.1", "mid_block.attentions.0"),
             (r"middle_block.2", "mid_block.resnets.1"),
             # An upsampling comes last in its block: place 1, or 2 where there is an attention.
             (r"output_blocks.(\d+).[12].conv", sampler("up", "upsamplers", L)),
             (r"output_blocks.(\d+).0", level("up", "resnets", L)), (r"output_blocks.(\d+).1", level("up", "attentions", L))]
    for pattern, new in rules:
        name, hit = re.subn("^" + pattern, new, key)
        if hit:
            for old, ours in RESNET:
                name = re.sub(rf"(resnets.\d+).{old}(?!\d)", rf"\1.{ours}", name)
            return name
    return key


def vae_name(key: str, levels: int) -> str:
    for pattern, new in (
            (r"encoder.down.(\d+).block.(\d+)", r"encoder.down_blocks.\1.resnets.\2"),
            (r"encoder.down.(\d+).downsample", r"encoder.down_blocks.\1.downsamplers.0"),
            # Here the decoder is numbered like the encoder, by size; ours by the order in which it runs.
            (r"decoder.up.(\d+).block.(\d+)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.resnets.{m[2]}"),
            (r"decoder.up.(\d+).upsample", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.upsamplers.0"),
            (r"mid.block_1", "mid_block.resnets.0"), (r"mid.block_2", "mid_block.resnets.1"),
            (r"mid.attn_1.norm", "mid_block.attentions.0.group_norm"), (r"mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
            (r"mid.attn_1.([qkv])\b", r"mid_block.attentions.0.to_\1"), ("nin_shortcut", "conv_shortcut"), ("norm_out", "conv_norm_out")):
        key = re.sub(pattern, new, key)
    return old_vae_name(key)


def old_vae_name(key: str) -> str:
    """The VAE's attention as diffusers folders called it until 2023."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        key = re.sub(rf"(mid_block\.attentions\.0)\.{old}\.", rf"\1.{new}.", key)
    return key


def open_clip_name(key: str) -> str:
    """in_proj_* holds q, k and v on top of each other: it becomes one name, {qkv}_proj, that stands for three."""
    for old, new in ((r"^transformer\.resblocks\.", "encoder.layers."), (r"\.ln_([12])\.", r".layer_norm\1."),
                     (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."), (r"\.attn\.in_proj_", ".self_attn.{qkv}_proj."),
                     (r"\.attn\.", ".self_attn."), (r"^ln_final\.", "final_layer_norm."), (r"^text_projection$", "text_projection.weight"),
                     (r"^positional_embedding$", "embeddings.position_embedding.weight"),
                     (r"^token_embedding\.", "embeddings.token_embedding.")):
        key = re.sub(old, new, key)
    return key


def place(key: str, family: str, L: int, levels: int, text_layers: int):
    """(part, [our name or names]) of a key in a single file; None for a key that is rightly unused.

    Raises KeyError for a key that belongs to no part. levels: the VAE's. text_layers: SD 2 reads the last but one
    layer of its text encoder, so that folders do not hold the last one, which files do: it is left out.
    """
    if UNUSED.fullmatch(key):
        return None
    if key.startswith(UNET):
        return "unet", [unet_name(key[len(UNET):], L)]
    if key.startswith(VAE):
        return "vae", [vae_name(key[len(VAE):], levels)]
    for part, (prefix, writer) in FAMILIES[family].items():
        if key.startswith(prefix):
            name = key[len(prefix):].removeprefix("text_model.")
            if writer == "OpenCLIP":
                name = open_clip_name(name)
                layer = re.match(r"encoder\.layers\.(\d+)\.", name)
                if family == "SD 2" and layer and int(layer[1]) >= text_layers:
                    return None
            return part, [name.replace("{qkv}", x) for x in "qkv"] if "{qkv}" in name else [name]
    raise KeyError(key)
