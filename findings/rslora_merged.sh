#!/usr/bin/env bash
# Two rsLoRA adapters joined by PEFT come out 2.8 times too strong.
# guess: `add_weighted_adapter([a, b], [1, 1], combination_type="cat")` is exact: delta W of a
#        plus that of b. So it is for plain LoRA of any ranks and alphas, patterns, convolutions,
#        DoRA.
# seen:  with `use_rslora` the sum is multiplied by the root of the new rank, sqrt(8) = 2.83. The
#        new adapter gets alpha = rank to mean 1, and inherits the flag by which that means
#        sqrt(rank).
# Versions: peft 0.21.2, torch 2.13.0. (Known upstream, huggingface/peft pull request 3449.)
# Who is hurt: whoever merges experts trained with rsLoRA in PEFT. Here the scale is computed for
# each file (`alpha/sqrt(rank)` where its config says so) and the merged file is plain.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 peft==0.21.2 transformers==5.23.0 \
    accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'END'
import torch
from peft import LoraConfig, get_peft_model


def strength_of_sum(rslora):
    """|cat(a, b)| / |a + b|, having asserted that the two are proportional."""
    torch.manual_seed(0)
    config = dict(r=4, lora_alpha=8, target_modules=["0"], use_rslora=rslora,
                  init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 12)), LoraConfig(**config), "a")
    model.add_adapter("b", LoraConfig(**config))
    layer = model.base_model.model[0]
    wanted = layer.get_delta_weight("a") + layer.get_delta_weight("b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "joined", "cat")
    joined = layer.get_delta_weight("joined")
    ratio = (joined.norm() / wanted.norm()).item()
    assert torch.allclose(joined, ratio * wanted, atol=1e-4)
    return round(ratio, 3)


seen = {"plain": strength_of_sum(False), "rslora": strength_of_sum(True)}
print(seen)
assert seen == {"plain": 1.0, "rslora": 2.828}
END
