#!/usr/bin/env bash
# A pipeline that was only saved and loaded again draws other pictures once its sampler is
# changed.
# guess: `DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`, the documented way to
#        change the sampler, walks the same timesteps before and after `save_pretrained` +
#        `from_pretrained`.
# seen:  other timesteps at every one of 10 steps. SD 1.5's published scheduler file does not say
#        `timestep_spacing`: DPM++ then takes its own (linspace, from t = 999). Saving writes the
#        value that PNDM had taken for itself (leading) as if it had been asked for, and DPM++ now
#        obeys it and starts at t = 901.
# Versions: diffusers 0.42.1, torch 2.13.0.
# Who is hurt: whoever compares a base model as published with a fine-tune that diffusers saved.
# Here sample.py reads the file in the same way: give both folders one scheduler_config.json.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'END'
import json
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler

published = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
             "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": False,
             "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
             "trained_betas": None}    # the keys and values of Stable Diffusion 1.5
with open("scheduler_config.json", "w") as file:
    json.dump(published, file)


def timesteps_of_dpm(folder):
    loaded = PNDMScheduler.from_pretrained(folder)
    loaded.save_pretrained("saved")
    sampler = DPMSolverMultistepScheduler.from_config(loaded.config)
    sampler.set_timesteps(10)
    return sampler.timesteps.tolist()


before, after = timesteps_of_dpm("."), timesteps_of_dpm("saved")
print("as published ", before)
print("saved, loaded", after)
assert before == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
assert after == [901, 811, 721, 631, 541, 451, 361, 271, 181, 91]
END
