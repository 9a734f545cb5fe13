#!/usr/bin/env bash
# A LoRA that is hot-swapped runs at strength 1, whatever `set_adapters` had said of its name.
# guess: `load_lora_adapter(..., hotswap=True)` changes the tensors in place and keeps the weight
#        0.5.
# seen:  the weight is back at alpha/rank, without a message. The old LoRA ran at 0.5, the new one
#        at 1.
# Versions: diffusers 0.42.1, peft 0.21.2, torch 2.13.0.
# Who is hurt: whoever evaluates many LoRAs at one weight: hot-swapping is the documented fast
# way, and all but the first are judged at twice the strength. Call `set_adapters` after each
# swap.
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
from peft import LoraConfig, get_peft_model_state_dict

def small_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


def lora_file(seed):
    unet = small_unet()
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k"],
                                init_lora_weights=False))
    return get_peft_model_state_dict(unet)


unet = small_unet()
layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
unet.load_lora_adapter(lora_file(1), adapter_name="expert", prefix=None)
unet.set_adapters(["expert"], [0.5])
first = layer.to_k.scaling["expert"]
unet.load_lora_adapter(lora_file(2), adapter_name="expert", prefix=None, hotswap=True)
second = layer.to_k.scaling["expert"]
print("weight of the first LoRA", first, "and of the one swapped in", second)
assert (first, second) == (0.5, 1.0)
END
