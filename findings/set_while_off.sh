#!/usr/bin/env bash
# `set_adapters()` after `disable_lora()` does not switch a LoRA on, though it is reported as
# active.
# guess: whoever names the active adapters and their weights wants them: they act again.
# seen:  the output stays the base model's to the bit, while `active_adapters()` says ["safe"].
#        `enable_lora()` is needed besides.
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0.
# Who is hurt: a program that draws "before" with `disable_lora()` and "after" with
# `set_adapters()` compares the base model with itself; for a safety LoRA all later pictures are
# unguarded.
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


unet = small_unet()
base = run(unet)
unet.add_adapter(LoraConfig(target_modules=["to_k", "to_v"], init_lora_weights=False), "safe")
with_lora = run(unet)
assert not torch.allclose(base, with_lora, atol=1e-3)
unet.disable_lora()
unet.set_adapters(["safe"], [1.0])
active, off = unet.active_adapters(), torch.equal(run(unet), base)
unet.enable_lora()
on = torch.equal(run(unet), with_lora)
print("active:", active, " yet the base's output:", off, " after enable_lora:", on)
assert active == ["safe"] and off and on
END
