#!/usr/bin/env bash
# `fuse_qkv_projections()` silently drops a LoRA on to_q, to_k and to_v, loaded before or after.
# guess: a faster way to compute the same attention: the same output, or an error.
# seen:  in self-attention the output is the base model's, to the bit: the joined matrix is a copy
#        of the base's three weights, and from then on the three layers that hold the LoRA are not
#        called. `fuse_lora()` afterwards changes nothing either.
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0. (Upstream: huggingface/diffusers issue
# 11903.)
# Who is hurt: a safety LoRA that is switched off without a word. Fuse the LoRA into a checkpoint
# first (`merge.py --fuse`), and let the projections be joined then.
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


@torch.no_grad()
def run(unet, **kwargs):
    random = torch.Generator().manual_seed(1)
    x, context = (torch.randn(shape, generator=random) for shape in ((1, 4, 8, 8), (1, 7, 32)))
    return unet(x, 500, context, **kwargs).sample


base = small_unet()
base.fuse_qkv_projections()
without_lora = run(base)
config = LoraConfig(target_modules=["attn1.to_q", "attn1.to_k", "attn1.to_v"],
                    init_lora_weights=False)
unet = small_unet()
unet.add_adapter(config)
print("the LoRA changes the output:", not torch.allclose(run(unet), without_lora, atol=1e-3))
assert not torch.allclose(run(unet), without_lora, atol=1e-3)
unet.fuse_qkv_projections()
gone = torch.equal(run(unet), without_lora)
unet.fuse_lora()
still_gone = torch.equal(run(unet), without_lora)
later = small_unet()
later.fuse_qkv_projections()
later.add_adapter(config)
never_there = torch.equal(run(later), without_lora)
print("gone after fusing the projections:", gone, "and after fuse_lora:", still_gone)
print("without effect if added afterwards:", never_there)
assert gone and still_gone and never_there
END
