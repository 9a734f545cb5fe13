#!/usr/bin/env bash
# diffusers' own `save_lora_weights` drops alpha: a LoRA of rank 4 and alpha 16 comes back at a
# quarter.
# guess: what `save_lora_weights` writes and `load_lora_weights` reads has the strength it was
#        trained with, alpha/rank = 4.
# seen:  strength 1. The file holds neither alpha nor a header that says it; without one a loader
#        takes alpha = rank. (The optional `unet_lora_adapter_metadata` would write it.)
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0, safetensors 0.8.0.
# Who is hurt: whoever trains with PEFT at alpha != rank and saves as diffusers' documentation
# shows. No reader can tell: here as elsewhere such a file means alpha = rank. Write `--lora
# FILE@4`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 peft==0.21.2 \
    transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'END'
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

def small_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


def strength(unet, adapter):
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    return layer.get_delta_weight(adapter).norm().item()


trained = small_unet()
trained.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_k"],
                               init_lora_weights=False), "style")
tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained, adapter_name="style"))
StableDiffusionPipeline.save_lora_weights("saved", unet_lora_layers=tensors)
pipe = StableDiffusionPipeline(
    unet=small_unet(), scheduler=DDIMScheduler(), vae=None, text_encoder=None, tokenizer=None,
    safety_checker=None, feature_extractor=None, requires_safety_checker=False)
pipe.load_lora_weights("saved", adapter_name="style")
kept = strength(pipe.unet, "style") / strength(trained, "style")
print(f"strength that came back: {kept:.4f} of what was trained")
assert abs(kept - 0.25) < 1e-4
END
