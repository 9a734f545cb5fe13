#!/usr/bin/env bash
# Six of diffusers' "compatible" samplers ignore zero terminal SNR without a message.
# guess: `from_config` of a config with `rescale_betas_zero_snr: true` and v-prediction gives a
#        sampler that rescales its betas, or one line that says it cannot (as EDMEulerScheduler
#        does).
# seen:  PNDM, Heun, DEIS, KDPM2 (both) and DPM++ singlestep keep the unscaled table and are
#        silent: the first step tells a network trained on pure noise that 0.5% of the picture's
#        power is there.
# Versions: diffusers 0.42.1, torch 2.13.0.
# Who is hurt: whoever draws with a zero-SNR model (v-prediction variants of SDXL) and tries
# samplers: washed-out contrast that looks like the model's fault. Here the setting is refused by
# name.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'END'
import logging
import diffusers
from diffusers import DDIMScheduler

heard = []
handler = logging.Handler()
handler.emit = lambda record: heard.append(record.getMessage())
logging.getLogger("diffusers").addHandler(handler)
config = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                       prediction_type="v_prediction", timestep_spacing="trailing",
                       rescale_betas_zero_snr=True).config
silent = []
for name in ("DDIM", "DDPM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete",
             "EulerAncestralDiscrete", "PNDM", "HeunDiscrete", "DEISMultistep", "KDPM2Discrete",
             "KDPM2AncestralDiscrete", "DPMSolverSinglestep"):
    heard.clear()
    scheduler = getattr(diffusers, name + "Scheduler").from_config(config)
    left = scheduler.alphas_cumprod[-1].item()
    print(f"{name:24} signal left at the last t: {left:.1e}   messages: {len(heard)}")
    if left > 1e-6 and not heard:
        silent.append(name)
assert silent == ["PNDM", "HeunDiscrete", "DEISMultistep", "KDPM2Discrete",
                  "KDPM2AncestralDiscrete", "DPMSolverSinglestep"], silent
END
