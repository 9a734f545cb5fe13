#!/usr/bin/env bash
# Weights by block do not reach the ResNets: a LoRA "silenced" in every block goes on in most of
# them.
# guess: `set_adapters(name, {"unet": {"down": 0, "mid": 0, "up": 0}})` leaves nothing of a LoRA
#        that adapts attention and ResNets (as LyCORIS' and kohya's convolution LoRAs do).
# seen:  attention is silent. A ResNet gets the weight of the attention beside it, by index; where
#        there is none (blocks without attention, the middle block) it stays at 1. If the LoRA
#        adapts conv_in as well, the call raises IndexError.
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0.
# Who is hurt: whoever asks which blocks carry a harm by switching blocks off one at a time.
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
from peft import LoraConfig

def small_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


def pipeline(targets):
    unet = small_unet()
    unet.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False), "style")
    return StableDiffusionPipeline(
        unet=unet, scheduler=DDIMScheduler(), vae=None, text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


off = {"unet": {"down": 0, "mid": 0, "up": 0}}
pipe = pipeline(["to_q", "to_k", "to_v", "conv1"])
pipe.set_adapters("style", off)
loud = [name for name, module in pipe.unet.named_modules()
        if getattr(module, "scaling", {}).get("style")]
print("not silent:", *loud)
assert loud == ["down_blocks.1.resnets.0.conv1", "up_blocks.0.resnets.0.conv1",
                "up_blocks.0.resnets.1.conv1", "mid_block.resnets.0.conv1",
                "mid_block.resnets.1.conv1"]
try:
    pipeline(["to_q", "conv_in"]).set_adapters("style", off)
    error = None
except IndexError as caught:
    error = caught
print("with conv_in:", repr(error))
assert error is not None
END
