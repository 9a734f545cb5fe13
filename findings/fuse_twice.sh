#!/usr/bin/env bash
# After `fuse_lora(lora_scale=0.5)` and `unfuse_lora()` a LoRA stays at half its strength; fused
# again in the same way it has a quarter.
# guess: unfusing brings back the state before: strength 1, and the second fuse equals the first.
# seen:  strengths 1 (loaded), 0.5 (fused), 0.5 (unfused), 0.25 (fused again). The weights of the
#        base are restored; the LoRA's own scale, which `lora_scale` was multiplied into, is not.
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0.
# Who is hurt: whoever looks for a good strength by fusing at several scales: each is multiplied
# with all before it. `set_adapters(name, 1.0)` after unfusing puts it right. Here `--lora
# NAME@0.5` is taken from the file each time.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 peft==0.21.2 \
    transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'END'
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

def small_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


unet = small_unet()
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k"], init_lora_weights=False))
layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
base, delta = layer.weight.clone(), layer.get_delta_weight("default")


def strength():
    """Of what the layer computes: B A and scale as they are, and what is fused into the weight."""
    fused = layer.weight - base
    beside = 0 if layer.merged else layer.get_delta_weight("default")
    return round(((fused + beside).norm() / delta.norm()).item(), 3)


seen = {"loaded": strength()}
unet.fuse_lora(lora_scale=0.5)
seen["fused at 0.5"] = strength()
unet.unfuse_lora()
seen["unfused"] = strength()
unet.fuse_lora(lora_scale=0.5)
seen["fused at 0.5 again"] = strength()
print(seen)
assert list(seen.values()) == [1.0, 0.5, 0.5, 0.25]
END
