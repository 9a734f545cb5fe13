#!/usr/bin/env bash
# In SDXL an empty negative prompt draws another picture than none.
# guess: `negative_prompt=""` is the default written out: the same picture as without it (as in SD
#        1).
# seen:  other latents from the first step on. Without one, SDXL's pipeline puts zeros where the
#        second text of guidance stands; "" is encoded. " " equals "".
# Versions: diffusers 0.42.1, transformers 5.23.0, torch 2.13.0.
# Who is hurt: whoever compares two programs, or has a form whose empty field is "": an unlike
# picture that no seed explains. Here SDXL without `--negative` gets zeros too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'END'
import json
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection,
                          CLIPTokenizer)

letters = "abcdefghijklmnopqrstuvwxyz"
words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
with open("vocab.json", "w") as file:
    json.dump({word: i for i, word in enumerate(words)}, file)
with open("merges.txt", "w") as file:
    file.write("#version: 0.2\n")
tokenizer = CLIPTokenizer.from_pretrained(".")
tokenizer.model_max_length = 8

torch.manual_seed(0)
config = CLIPTextConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32,
                        num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
                        max_position_embeddings=8, bos_token_id=52, eos_token_id=53)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
    cross_attention_dim=32, attention_head_dim=4, addition_embed_type="text_time",
    addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
pipe = StableDiffusionXLPipeline(
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=8), CLIPTextModel(config),
    CLIPTextModelWithProjection(config), tokenizer, tokenizer, unet, DDIMScheduler(),
    add_watermarker=False)
pipe.set_progress_bar_config(disable=True)


def draw(**negative):
    return pipe("a b", num_inference_steps=2, guidance_scale=7.5, height=8, width=8,
                output_type="latent", generator=torch.Generator().manual_seed(0), **negative).images


none, empty, blank = draw(), draw(negative_prompt=""), draw(negative_prompt=" ")
print("none, repeated, is the same:", torch.equal(none, draw()))
print("empty is the same as none:", torch.allclose(none, empty, atol=1e-2))
print("blank is the same as empty:", torch.equal(empty, blank))
assert torch.equal(none, draw()) and torch.equal(empty, blank)
assert not torch.allclose(none, empty, atol=1e-2)
END
