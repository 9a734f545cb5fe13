"""The tests: `python test_all.py`, or `python -m pytest -q test_all.py -k lora`. Each is a lesson, named for
the misconception it refutes.

Needs:       requirements-test.txt. diffusers, transformers and peft are the oracles: other people's code that
             computes the same thing, so that two must make the same mistake for it to pass.
Tolerances:  stated beside each comparison, always relative to the largest value, max|a - b| / max|b|. Networks
             are compared in float64 to 1e-8, far below any rounding excuse, and the toy in fp32 to 1e-4.

The order is the reader's: schedule and samplers; UNet and VAE; text; the toy checkpoint; whole checkpoints of SD 1, 2
and XL and their LoRAs; toy world and judge; LoRA; DPO; merging; preference data; the scripts; the README. Two at the end are no tests:
`--readme` compares what its long commands print with what it shows, `--bench` full-size models with diffusers, for speed and memory.
"""
import ast
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import importlib
import io
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may wait for a server

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

import dpo  # noqa: E402
import lora  # noqa: E402
import make_data  # noqa: E402
import merge  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from model import llm  # noqa: E402
from model import toy_attack as ring  # noqa: E402
from model import toy_experiments as experiments  # noqa: E402
from model import toy_finetune as finetune  # noqa: E402
from model import cache  # noqa: E402
from model import toy_world as world  # noqa: E402
from model.calibration import from_prompts  # noqa: E402
from model.checkpoint import Checkpoint, model_files  # noqa: E402
from model.files import TOY, BadInput, Parser, read_pairs, run  # noqa: E402
from model.clip_judges import ClipScore, Q16, pickled_array  # noqa: E402
from model.judge import HEADS, NoJudge, ToyJudge, Verdict  # noqa: E402
from model.pictures import CELL, GAP, read_pictures, sheet  # noqa: E402
from model.prompts import Request, read_prompts, read_requests, split  # noqa: E402
from model.report import measure, tally, toy_marks  # noqa: E402
from model.schedule import SAMPLERS, NoiseSchedule  # noqa: E402
from model.schedule import sample as solve  # noqa: E402
from model.single_file import CONFIGS, place  # noqa: E402
from model.stable_diffusion import load, predicts_noise  # noqa: E402
from model.statistics import effective, interval, mean_interval, share_interval  # noqa: E402
from model.text import TextEncoders, build_encoder  # noqa: E402
from model.toy_pretrain import scenes_and_pictures  # noqa: E402
from model.toy_tokenizer import write_tokenizer  # noqa: E402
from model.unet import UNet  # noqa: E402
from model.vae import VAE  # noqa: E402
from model.distributed import local_device  # noqa: E402

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' and numpy's affair
ROOT = Path(__file__).resolve().parent
SCRIPTS = ("make_data", "train", "merge", "sample")
CPU = torch.device("cpu")
PROMPTS = ["a red ball with a flower in the park", "racism next to a blue box on the beach", "just a green ring at night"]

# One small network of each kind. Every number differs where a mix-up could hide: heads by level, depth by level.
CA, D, UC, U = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
KINDS = {
    "SD1": dict(block_out_channels=[16, 32, 32], down_block_types=[CA, CA, D], up_block_types=[U, UC, UC],
                layers_per_block=2, cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8),
    "SD2": dict(block_out_channels=[16, 32, 32], down_block_types=[CA, CA, D], up_block_types=[U, UC, UC],
                layers_per_block=1, cross_attention_dim=24, attention_head_dim=[2, 4, 8], norm_num_groups=8,
                use_linear_projection=True, upcast_attention=True),
    "SDXL": dict(block_out_channels=[16, 32, 32], down_block_types=[D, CA, CA], up_block_types=[UC, UC, U],
                 layers_per_block=1, cross_attention_dim=24, attention_head_dim=[2, 4, 8], norm_num_groups=8,
                 transformer_layers_per_block=[1, 2, 3], use_linear_projection=True, addition_embed_type="text_time",
                 addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8)}
SD1_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
SD2_SCHEDULE = {**SD1_SCHEDULE, "prediction_type": "v_prediction"}


def far(a, b) -> float:
    """How far a is from b: max|a - b| / max|b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


def unlike_new(module, seed=0):
    """Shakes every weight: in a fresh network norms are (1, 0), where a swapped or forgotten one would not show."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.ndim == 1 else 0.03))
    return module.eval().requires_grad_(False)


def twins(ours, oracle):
    """Ours with the oracle's weights, both in float64. Strict: names and shapes must be the same."""
    unlike_new(oracle)
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return ours.double().eval().requires_grad_(False), oracle.double()


@pytest.fixture(scope="module")
def toy():
    return load(TOY, CPU)


@pytest.fixture(scope="module")
def pipe():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TOY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture()
def small():
    """What train.py and merge.py need of a Stable Diffusion, random and small: .unet, .predict, .schedule, .device."""
    unet = unlike_new(UNet(KINDS["SD1"]))
    return SimpleNamespace(unet=unet, predict=unet, finite=lambda x, _: x, schedule=NoiseSchedule(SD1_SCHEDULE), device=CPU)


def unet_inputs(n=2, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, context = torch.randn(n, 4, 8, 8, generator=g), torch.randn(n, 5, 24, generator=g)
    return x.to(dtype), torch.randint(1000, (n,), generator=g), context.to(dtype)


def random_lora(unet, seed, rank=4, alpha=4.0):
    """A LoRA as after training: B is not zero any more."""
    g = torch.Generator().manual_seed(1000 + seed)
    return {name: f._replace(up=torch.randn(f.up.shape, generator=g) * 0.1)
            for name, f in lora.init(unet, rank, alpha, seed).items()}


# ------------------------------------------------------------------- whole checkpoints, random and small
def text_encoder(folder, part, activation, pad):
    """A tokenizer and a CLIP text model; SD 2 and SDXL's second one use another activation and pad with id 0."""
    size = write_tokenizer(folder / f"tokenizer{part}", world.vocabulary(), 16)
    for file in (folder / f"tokenizer{part}").glob("*_*.json") if pad else ():
        file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": pad}))
    config = transformers.CLIPTextConfig(
        vocab_size=size, hidden_size=32 if part else 24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, projection_dim=20,
        max_position_embeddings=16, hidden_act=activation, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)
    return unlike_new((transformers.CLIPTextModelWithProjection if part else transformers.CLIPTextModel)(config))


def ldm_names(unet, vae):
    """{prefix of a diffusers key: prefix in a single file}, by counting the layers through as the first code did."""
    names = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2",
             "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    n = 0
    for b, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            n += 1
            names |= {f"down_blocks.{b}.resnets.{j}": f"input_blocks.{n}.0", f"down_blocks.{b}.attentions.{j}": f"input_blocks.{n}.1"}
        if block.downsamplers:
            n += 1
            names[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
    n = -1
    for b, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            n += 1
            names |= {f"up_blocks.{b}.resnets.{j}": f"output_blocks.{n}.0", f"up_blocks.{b}.attentions.{j}": f"output_blocks.{n}.1"}
        if block.upsamplers:
            names[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{n}.{2 if hasattr(block, 'attentions') else 1}.conv"
    names = {"unet." + ours: "model.diffusion_model." + theirs for ours, theirs in names.items()}
    top = len(vae.decoder.up_blocks) - 1
    for side in ("encoder", "decoder"):
        ours, theirs = f"vae.{side}.", f"first_stage_model.{side}."
        for name, new in (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("conv_norm_out", "norm_out"), ("mid_block.resnets.0", "mid.block_1"),
                          ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0", "mid.attn_1")):
            names[ours + name] = theirs + new
        for b in range(top + 1):
            for j in range(4):
                names[f"vae.encoder.down_blocks.{b}.resnets.{j}"] = f"first_stage_model.encoder.down.{b}.block.{j}"
                names[f"vae.decoder.up_blocks.{b}.resnets.{j}"] = f"first_stage_model.decoder.up.{top - b}.block.{j}"
            names[f"vae.encoder.down_blocks.{b}.downsamplers.0"] = f"first_stage_model.encoder.down.{b}.downsample"
            names[f"vae.decoder.up_blocks.{b}.upsamplers.0"] = f"first_stage_model.decoder.up.{top - b}.upsample"
    return names | {"vae.quant_conv": "first_stage_model.quant_conv", "vae.post_quant_conv": "first_stage_model.post_quant_conv"}


INNER = {"unet": (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("norm2", "out_layers.0"),
                  ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")),
         "vae": (("conv_shortcut", "nin_shortcut"), ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))}


def ldm_file(pipe, path):
    """Writes a diffusers pipeline as the single file that the first code would have written, useless tensors included."""
    tensors, names = {"betas": torch.zeros(9)}, ldm_names(pipe.unet, pipe.vae)
    for part, inner in INNER.items():
        for key, tensor in getattr(pipe, part).state_dict().items():
            prefix = max((n for n in names if f"{part}.{key}".startswith(n + ".")), key=len)
            rest = f"{part}.{key}"[len(prefix):]
            if ".resnets." in prefix or "attn_1" in names[prefix]:
                for ours, theirs in inner:
                    rest = re.sub(rf"^\.{ours}\.", f".{theirs}.", rest)
            if part == "vae" and "attn_1" in names[prefix] and "norm" not in rest and tensor.dim() == 2:
                tensor = tensor[:, :, None, None]                       # q, k and v were 1x1 convolutions
            tensors[names[prefix] + rest] = tensor
    tensors |= {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in tensors.items() if k.startswith("model.")}
    xl = getattr(pipe, "text_encoder_2", None) is not None
    for i, encoder in enumerate(filter(None, (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)))):
        state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
        where = f"conditioner.embedders.{i}." if xl else "cond_stage_model."
        if encoder.config.hidden_act == "quick_gelu":
            tensors |= {f"{where}transformer.text_model.{k}": v for k, v in state.items()}
            tensors[f"{where}transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
            continue
        where += "model."
        tensors |= {where + "logit_scale": torch.ones(()), where + "text_projection": state.get("text_projection.weight", torch.zeros(20, 24)).T,
                    where + "positional_embedding": state["embeddings.position_embedding.weight"],
                    where + "token_embedding.weight": state["embeddings.token_embedding.weight"]}
        for end in ("weight", "bias"):
            tensors[where + f"ln_final.{end}"] = state[f"final_layer_norm.{end}"]
            for n in (0, 1, 2) if xl else (0, 1, 2, 23):                # SD 2's last layer is in the file and is not used
                layer, block = f"encoder.layers.{min(n, 2)}.", where + f"transformer.resblocks.{n}."
                tensors[f"{block}attn.in_proj_{end}"] = torch.cat([state[f"{layer}self_attn.{x}_proj.{end}"] for x in "qkv"])
                for ours, theirs in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                                     ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                    tensors[f"{block}{theirs}.{end}"] = state[f"{layer}{ours}.{end}"]
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path, {"format": "pt"})


LEVELS = dict(block_out_channels=[16, 32, 32, 32], down_block_types=[CA, CA, CA, D], up_block_types=[U, UC, UC, UC],
              norm_num_groups=8, cross_attention_dim=24, sample_size=8)  # layers_per_block 2, as in every published model
UNETS = {"SD1": dict(LEVELS, attention_head_dim=8), "SD2": dict(LEVELS, attention_head_dim=[2, 4, 8, 8], use_linear_projection=True),
         "SDXL": {**KINDS["SDXL"], "layers_per_block": 2, "cross_attention_dim": 24 + 32, "sample_size": 8}}
UNETS["SD2-v"] = UNETS["SD2"]


@functools.cache
def family(kind: str):
    """(folder in the diffusers layout, single file with its tokenizers and configs beside it, the diffusers pipeline)."""
    folder, vae = Path(tempfile.mkdtemp(dir=SCRATCH.name)) / kind, dict(block_out_channels=[8, 8, 16, 16], layers_per_block=2, norm_num_groups=4,
        latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, sample_size=64)
    parts = [("", "gelu", "!") if kind.startswith("SD2") else ("", "quick_gelu", None)] + [("_2", "gelu", "!")] * (kind == "SDXL")
    encoders = {f"text_encoder{p[0]}": text_encoder(folder, *p) for p in parts}
    encoders |= {f"tokenizer{p[0]}": transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{p[0]}") for p in parts}
    xl, schedule = kind == "SDXL", SD2_SCHEDULE if kind == "SD2-v" else SD1_SCHEDULE
    pipe = (diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline)(
        unet=unlike_new(diffusers.UNet2DConditionModel(**UNETS[kind])), vae=unlike_new(diffusers.AutoencoderKL(**vae)), **encoders,
        scheduler=diffusers.DDIMScheduler.from_config(schedule), feature_extractor=None,
        **(dict(add_watermarker=False) if xl else dict(safety_checker=None, requires_safety_checker=False)))
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    side = folder.parent / "single"
    for config in [*folder.glob("*/*config.json"), *folder.glob("tokenizer*/*")]:
        (side / config.parent.name).mkdir(parents=True, exist_ok=True)
        (side / config.parent.name / config.name).write_bytes(config.read_bytes())
    ldm_file(pipe, side / f"{kind}.safetensors")
    return folder, side / f"{kind}.safetensors", pipe


SCRATCH = tempfile.TemporaryDirectory()  # for the checkpoints above: made once, when a test first asks for one


# ================================================================================== schedule and samplers
@pytest.mark.parametrize("config", [SD1_SCHEDULE, SD2_SCHEDULE, {**SD1_SCHEDULE, "timestep_spacing": "trailing"},
                                    {**SD2_SCHEDULE, "timestep_spacing": "linspace"}],
                         ids=["SD1", "SD2 (v)", "trailing", "linspace, v"])
@pytest.mark.parametrize("name, oracle", [("ddim", diffusers.DDIMScheduler), ("dpm++", diffusers.DPMSolverMultistepScheduler)])
def test_a_sampler_is_not_defined_by_its_paper_alone(name, oracle, config):
    """Which timesteps are visited, and where the last step lands, differ between codes: here as in diffusers (1e-4)."""
    schedule, mix = NoiseSchedule(config), torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 0.3
    predict = lambda x, t: torch.einsum("oc,bchw->bohw", mix, x).tanh() * (1 + t / 1000)
    for steps in (4, 10):
        theirs = oracle.from_config(config)
        theirs.set_timesteps(steps)
        assert [t for t, _ in SAMPLERS[name][0](schedule, steps)] == theirs.timesteps.tolist()
        x = x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(steps))
        for t in theirs.timesteps:
            x = theirs.step(predict(x, t.item()), t, x).prev_sample
        assert far(solve(predict, x_T, schedule, steps, name), x) < 1e-4


def test_v_is_not_another_name_for_noise():
    """x_0, noise and velocity say the same thing, but a v-model's target is not the noise; all as in diffusers (1e-5)."""
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    v, eps, theirs = NoiseSchedule(SD2_SCHEDULE), NoiseSchedule(SD1_SCHEDULE), diffusers.DDIMScheduler.from_config(SD2_SCHEDULE)
    assert torch.equal(v.alphas_cumprod, theirs.alphas_cumprod)
    assert far(v.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t)) < 1e-5
    assert far(v.target(x0, noise, t), theirs.get_velocity(x0, noise, t)) < 1e-5
    assert torch.equal(eps.target(x0, noise, t), noise) and far(v.target(x0, noise, t), noise) > 0.5
    for schedule in (v, eps):  # and back; at t = 999 dividing by alpha = 0.07 costs digits: 1e-4
        back = schedule.to_x0_and_noise(schedule.target(x0, noise, t), schedule.add_noise(x0, noise, t), t)
        assert far(back[0], x0) < 1e-4 and far(back[1], noise) < 1e-4


def test_more_steps_than_the_schedule_has_are_refused():
    """diffusers would visit a timestep twice; a setting that changes the arithmetic is never ignored either."""
    with pytest.raises(ValueError, match="fewer steps"):
        solve(lambda x, t: x, torch.zeros(1, 4, 8, 8), NoiseSchedule(SD1_SCHEDULE), 2000)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        NoiseSchedule({**SD1_SCHEDULE, "rescale_betas_zero_snr": True})


# ============================================================================================ UNet and VAE
@pytest.mark.parametrize("kind", KINDS)
def test_a_unet_with_the_right_shapes_can_still_be_wrong(kind):
    """An epsilon of 1e-5 for 1e-6 or heads read as widths load and run. Only numbers tell: diffusers' in float64, 1e-8."""
    ours, theirs = twins(UNet(KINDS[kind]), diffusers.UNet2DConditionModel(**KINDS[kind]))
    for side in ((8, 8), (12, 20), (9, 7)):  # odd sides too: an upsampling must know what it undoes
        x, t, context = torch.randn(2, 4, *side).double(), torch.tensor([13, 987]), torch.randn(2, 5, 24).double()
        extra, theirs_extra = {}, None
        if kind == "SDXL":
            extra = {"pooled": torch.randn(2, 20).double(), "time_ids": torch.tensor([[64., 48, 0, 32, 64, 64]] * 2).double()}
            theirs_extra = {"text_embeds": extra["pooled"], "time_ids": extra["time_ids"]}
        a = ours(x, t, context, **extra)
        b = theirs(x, t, context, added_cond_kwargs=theirs_extra).sample
        assert a.shape == x.shape and far(a, b) < 1e-8


FULL = {  # the published unet/config.json, as far as it differs from the defaults; and the size
    "SD1.5": (dict(cross_attention_dim=768, sample_size=64), 859_520_964, 128, 797_184),
    "SD2.1": (dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True,
                   upcast_attention=True), 865_910_724, 128, None),
    "SDXL": (dict(block_out_channels=[320, 640, 1280], down_block_types=[D, CA, CA], up_block_types=[UC, UC, U],
                  cross_attention_dim=2048, attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10],
                  use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
                  projection_class_embeddings_input_dim=2816), 2_567_463_684, 560, 5_806_080)}


@pytest.mark.parametrize("kind", FULL)
def test_no_download_is_needed_to_know_that_a_checkpoint_fits(kind):
    """On the meta device a network is names and shapes: those of the full-size UNet are the published ones,
    and the LoRA at rank 4 has as many modules and parameters as the released SafetyDPO code's."""
    config, size, modules, adapter_size = FULL[kind]
    with torch.device("meta"):
        ours, theirs = UNet(config), diffusers.UNet2DConditionModel(**config)
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    assert shapes == {k: v.shape for k, v in theirs.state_dict().items()} and sum(map(math.prod, shapes.values())) == size
    adapted = lora.targets(ours)
    assert len(adapted) == modules
    assert sum(4 * (l.in_features + l.out_features) for l in adapted.values()) == adapter_size or adapter_size is None


def test_recomputing_activations_does_not_change_the_gradient(small):
    """Checkpointing buys memory with time, never with accuracy (1e-6)."""
    x, t, context = unet_inputs()
    gradients = []
    for small.unet.checkpointing in (False, True):
        x.requires_grad_().grad = None
        small.unet(x, t, context).square().mean().backward()
        gradients.append(x.grad)
    assert far(*gradients) < 1e-6


@pytest.mark.parametrize("bad", [dict(attention_head_dim=[5, 10]), dict(class_embed_type="timestep"), dict(num_class_embeds=7),
                                 dict(down_block_types=["AttnDownBlock2D"] * 4), dict(dual_cross_attention=True)], ids=str)
def test_an_unknown_setting_is_not_a_detail(bad):
    """What would load, run and draw subtly wrong pictures is refused, with the key's name."""
    with torch.device("meta"), pytest.raises(ValueError, match=next(iter(bad))):
        UNet(bad)


VAES = {"SD": dict(block_out_channels=[16, 32, 32], layers_per_block=2, norm_num_groups=8, latent_channels=4),
        "no attention, no quant": dict(block_out_channels=[16, 32], norm_num_groups=8, latent_channels=6,
                                       mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)}


@pytest.mark.parametrize("kind", VAES)
def test_vae_encoder_does_not_pad_on_all_sides(kind):
    """Symmetric padding in the encoder's strided convolutions has the right shapes and moves every latent by a
    pixel. Encode and decode against diffusers, float64, 1e-8, on pictures that are not square."""
    n = len(VAES[kind]["block_out_channels"])
    config = {**VAES[kind], "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
    ours, theirs = twins(VAE(config), diffusers.AutoencoderKL(**config))
    pictures = torch.rand(2, 3, 24, 40, dtype=torch.double) * 2 - 1
    mean, logvar = ours.encode(pictures)
    expected = theirs.encode(pictures).latent_dist
    assert far(mean, expected.mean) < 1e-8 and far(logvar, expected.logvar) < 1e-8
    z = torch.randn_like(mean)
    assert far(ours.decode(z), theirs.decode(z).sample) < 1e-8
    with pytest.raises(ValueError, match="multiples"):
        ours.encode(pictures[..., :-1])


# ==================================================================================================== text
@pytest.fixture(scope="module", params=["SD1", "SD2", "SDXL"])
def text_folder(request):
    return family(request.param)[0]


def test_every_hidden_state_has_the_right_shape_and_one_is_right(text_folder, tmp_path):
    """SD reads the last, normalised state; SDXL the last but one of two encoders, and a pooled one (fp32, 1e-6)."""
    ours, outputs = TextEncoders.of(Checkpoint(text_folder)), []
    for part in ("", "_2") if (text_folder / "tokenizer_2").exists() else ("",):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(text_folder / f"tokenizer{part}")
        kind = transformers.CLIPTextModelWithProjection if part else transformers.CLIPTextModel
        ids = tokenizer([*PROMPTS, ""], padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            outputs.append(kind.from_pretrained(text_folder / f"text_encoder{part}").eval()(ids, output_hidden_states=True))
    context, pooled = ours.encode([*PROMPTS, ""])
    if len(outputs) == 1:
        assert pooled is None and far(context, outputs[0].last_hidden_state) < 1e-6
    else:
        assert far(context, torch.cat([o.hidden_states[-2] for o in outputs], -1)) < 1e-6
        assert far(pooled, outputs[1].text_embeds) < 1e-6
    ours.save(str(tmp_path))  # what we write, transformers reads back, exactly
    for file in tmp_path.rglob("*.safetensors"):
        theirs = load_file(text_folder / file.relative_to(tmp_path))
        assert all(torch.equal(tensor, theirs.get(key, theirs.get(key.removeprefix("text_model."))))
                   for key, tensor in load_file(file).items())


def test_a_prompt_is_not_cut_in_silence():
    """Every word of the grammar is ONE token, and no prompt is longer than the 16 tokens that the toy reads."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOY / "tokenizer")
    assert all(len(tokenizer(word).input_ids) == 1 + 2 for word in world.vocabulary())
    longest = max((world.prompt(world.Scene("snow", "yellow", "diamond", extra), p)
                   for p in range(len(world.PHRASINGS)) for extra in ("flower", "fraud", None)), key=lambda s: len(s.split()))
    assert len(tokenizer(longest).input_ids) <= 16
    assert tokenizer.decode(tokenizer("A Zebra, 12 cafés!").input_ids[1:-1]) == "a zebra , 1 2 cafés !"  # and any other text works


# ====================================================================================== the toy checkpoint
def test_a_small_model_is_a_whole_model():
    """Everything a Stable Diffusion folder holds, and the judge, in under 12 MB."""
    assert sum(f.stat().st_size for f in TOY.rglob("*") if f.is_file()) < 12e6
    assert {f.name for f in TOY.iterdir()} >= {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json", "judge"}


@torch.no_grad()
def test_the_toy_is_read_alike_by_diffusers(toy, pipe):
    """UNet, VAE both ways and text states, with the shipped weights in fp32 (1e-4)."""
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 400, 999])
    context = toy.text.encode(PROMPTS)[0]
    ids = pipe.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    assert far(context, pipe.text_encoder(ids).last_hidden_state) < 1e-4
    assert far(toy.unet(x, t, context), pipe.unet(x, t, context).sample) < 1e-4
    assert far(toy.vae.decode(x), pipe.vae.decode(x).sample) < 1e-4
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    assert far(toy.vae.encode(pictures)[0], pipe.vae.encode(pictures).latent_dist.mean) < 1e-4


@pytest.mark.parametrize("sampler, scheduler", [("ddim", "DDIMScheduler"), ("dpm++", "DPMSolverMultistepScheduler")])
def test_the_same_seed_can_mean_the_same_picture_elsewhere(toy, pipe, sampler, scheduler):
    """diffusers' own pipeline, given one CPU generator a picture, draws our pictures (2 of 255)."""
    pipe.scheduler = getattr(diffusers, scheduler).from_pretrained(TOY / "scheduler")
    theirs = pipe(PROMPTS, num_inference_steps=10, guidance_scale=4.0, output_type="pil",
                  generator=[torch.Generator("cpu").manual_seed(s) for s in (5, 6, 7)]).images
    ours = toy.draw(PROMPTS, [5, 6, 7], steps=10, guidance=4.0, sampler=sampler)
    assert np.abs(ours.astype(int) - np.stack(theirs).astype(int)).max() <= 2


def test_a_picture_does_not_depend_on_its_batch(toy):
    """Seed s is one generator for ONE picture: alone or among others, it comes out the same (1 of 255, by rounding)."""
    together = toy.draw(PROMPTS, [5, 6, 7], steps=4, guidance=4.0)
    for i, prompt in enumerate(PROMPTS):
        assert np.abs(toy.draw([prompt], [5 + i], steps=4, guidance=4.0)[0].astype(int) - together[i]).max() <= 1


def test_an_autoencoder_does_not_move_the_picture(toy):
    """Encoded and decoded, a render is itself (25 dB), and shifted by one pixel any way it fits much worse."""
    _, pictures = scenes_and_pictures(64, seed=987)
    before, after = np.stack(pictures).astype(float), toy.decode(toy.encode(np.stack(pictures))).astype(float)
    error = lambda shift: np.square(np.roll(after, shift, (1, 2)) - before)[:, 2:-2, 2:-2].mean()
    assert error((0, 0)) < 255 ** 2 / 10 ** 2.5
    assert all(error(shift) > 3 * error((0, 0)) for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)))


@pytest.mark.parametrize("break_it, says", [
    (lambda f: (f / "vae/config.json").write_text("{"), "vae/config.json"),
    (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "pickled"),
    (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99), "not a readable safetensors"),
    (lambda f: (f / "unet/config.json").write_text(json.dumps(KINDS["SD2"])), "does its config.json belong to it"),
    (lambda f: (f / "tokenizer/vocab.json").unlink(), "vocab.json")], ids=["JSON", "missing", "damaged", "unfit", "tokenizer"])
def test_a_broken_checkpoint_never_loads_halfway(tmp_path, break_it, says):
    """Loading is strict, and the one sentence names the file."""
    copy = tmp_path / "toy"
    subprocess.run(["cp", "-r", TOY, copy], check=True)
    break_it(copy)
    with pytest.raises(BadInput, match=says):
        load(copy, CPU)


# ================================================================== whole checkpoints: SD 1, SD 2 and SDXL
def oracle_single_file(kind, file=None):
    """diffusers' own reader of a single file; its config comes from the folder, since nothing may be downloaded."""
    folder, single, pipe = family(kind)
    quiet = dict(add_watermarker=False) if kind == "SDXL" else dict(safety_checker=None)
    theirs = type(pipe).from_single_file(str(file or single), config=str(folder), **quiet)
    theirs.set_progress_bar_config(disable=True)
    return theirs


@pytest.mark.parametrize("kind", UNETS)
def test_a_single_file_is_the_folder_by_other_names(kind):
    """Every tensor that diffusers finds in an LDM file, we find, to the bit, and no other: SD 2's text attention split
    in three, SDXL's projection turned, the averaged copy (EMA) not taken for the model."""
    theirs, ours, folder = oracle_single_file(kind), load(family(kind)[1], CPU), load(family(kind)[0], CPU)
    text = [theirs.text_encoder, theirs.text_encoder_2] if kind == "SDXL" else [theirs.text_encoder]
    for oracle, one, other in ((theirs.unet, ours.unet, folder.unet), (theirs.vae, ours.vae, folder.vae),
                               *zip(text, ours.text.encoders, folder.text.encoders)):
        expected = oracle.state_dict()
        assert expected.keys() == one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(v, expected[k]) and torch.equal(other.state_dict()[k], v) for k, v in one.state_dict().items())
    assert ours.schedule.prediction_type == ("v_prediction" if kind == "SD2-v" else "epsilon") and ours.zero_negative == (kind == "SDXL")
    assert torch.equal(ours.text.tokenize([*PROMPTS, ""]), folder.text.tokenize([*PROMPTS, ""]))     # the padding too
    for model in family(kind)[:2]:             # where one of these changes, so does the picture: what sample.py drew is stale
        names = {str(file.relative_to(model if model.is_dir() else model.parent)) for file in model_files(model)}
        assert names >= {"scheduler/scheduler_config.json", "tokenizer/vocab.json", *(["model_index.json"] if model.is_dir() else [model.name])}


@pytest.mark.parametrize("kind", UNETS)
def test_a_picture_is_more_than_its_parts(kind):
    """UNet, VAE and text in order, and yet another picture: pooled prompt, sizes, guidance, SDXL's zeros for no negative
    prompt, v. diffusers' whole pipelines, both samplers, 4 and 20 steps, draw our pictures (2 of 255; fp32 parts 1e-4)."""
    folder, _, pipe = family(kind)
    ours, seeds = load(folder, CPU), [5, 6]
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([20, 900])
    prompt, added = ours.embed(PROMPTS[:2]), None
    if kind == "SDXL":
        context, _, pooled, _ = pipe.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False)
        assert far(prompt[:, :-1], context) < 1e-4 and far(prompt[:, -1, :20], pooled) < 1e-4
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)}
    with torch.no_grad():
        context = prompt[:, :16]
        assert far(ours.predict(x, t, prompt), pipe.unet(x, t, context, added_cond_kwargs=added).sample) < 1e-4
        assert far(ours.vae.decode(x), pipe.vae.decode(x).sample) < 1e-4
        assert far(ours.vae.encode(pictures := torch.rand(2, 3, 64, 64) * 2 - 1)[0], pipe.vae.encode(pictures).latent_dist.mean) < 1e-4
    for name, scheduler in (("ddim", diffusers.DDIMScheduler), ("dpm++", diffusers.DPMSolverMultistepScheduler)):
        pipe.scheduler = scheduler.from_config(json.loads((folder / "scheduler/scheduler_config.json").read_text()))
        for steps, negative in ((4, None), (4, PROMPTS[2]), (20, None)):
            theirs = pipe(PROMPTS[:2], negative_prompt=[negative] * 2 if negative else None, num_inference_steps=steps, guidance_scale=4.0,
                          output_type="np", generator=[torch.Generator("cpu").manual_seed(s) for s in seeds]).images
            drawn = ours.draw(PROMPTS[:2], seeds, steps, 4.0, name, negative or "")
            assert drawn.std() > 10 and np.abs(drawn.astype(int) - np.round(theirs * 255)).max() <= 2, (name, steps, negative)
    alone = pipe(PROMPTS[:2], num_inference_steps=4, guidance_scale=1.0, output_type="np",
                 generator=[torch.Generator("cpu").manual_seed(s) for s in seeds]).images
    assert np.abs(ours.draw(PROMPTS[:2], seeds, 4, 1.0).astype(int) - np.round(alone * 255)).max() <= 2


def test_no_guidance_is_half_the_work(toy, monkeypatch):
    """Guidance 1 has no negative half; otherwise both are one batch. And decoding goes by slices, whatever the batch."""
    sizes, predict = [], toy.predict
    monkeypatch.setattr(toy, "predict", lambda x, t, prompt: sizes.append(len(x)) or predict(x, t, prompt))
    toy.draw(PROMPTS, [0, 1, 2], 2, 1.0)
    toy.draw(PROMPTS, [0, 1, 2], 2, 4.0)
    assert sizes == [3, 3, 6, 6]
    slices, decode = [], toy.vae.decode
    monkeypatch.setattr(toy.vae, "decode", lambda z: slices.append(tuple(z.shape)) or decode(z[..., :8, :8]))
    toy.decode(torch.randn(3, 4, 256, 256)), toy.decode(torch.randn(300, 4, 8, 8))
    assert slices == [(1, 4, 256, 256)] * 3 + [(256, 4, 8, 8), (44, 4, 8, 8)]


@pytest.mark.parametrize("dtype, vae", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=["bf16", "fp16"])
def test_half_precision_is_not_half_a_picture(dtype, vae):
    """SDXL in half precision draws what it draws in fp32, but for rounding; its VAE, which overflows in fp16, is not in fp16."""
    half, full = load(family("SDXL")[0], CPU, dtype), load(family("SDXL")[0], CPU)
    assert {p.dtype for p in half.unet.parameters()} == {p.dtype for p in half.text.parameters()} == {dtype}
    assert {p.dtype for p in half.vae.parameters()} == {vae}
    a, b = (sd.draw(PROMPTS, [1, 2, 3], 4, 4.0).astype(float) for sd in (half, full))
    assert np.abs(a - b).mean() < 0.1 * b.std()
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    assert far(half.predict(x, t, half.embed(PROMPTS)).float(), full.predict(x, t, full.embed(PROMPTS))) < 0.05


def test_loading_takes_no_second_copy():
    """The parameters ARE the file, mapped into memory: their addresses lie in its mapping."""
    folder, _, _ = family("SD1")
    sd, mapped = load(folder, CPU), []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("diffusion_pytorch_model.safetensors"):
            mapped.append([int(end, 16) for end in line.split()[0].split("-")])
    assert all(any(low <= p.data_ptr() < high for low, high in mapped) for part in (sd.unet, sd.vae) for p in part.parameters())


@pytest.mark.parametrize("kind", ["SD1", "SD2", "SDXL"])
def test_the_published_files_fit_key_by_key(kind):
    """Full size, on the meta device: the LDM file of the published configuration, through our table, is our UNet, VAE and
    text encoders, every key and shape, no more, no less."""
    configs = CONFIGS[{"SD1": "SD 1", "SD2": "SD 2", "SDXL": "SDXL"}[kind]]
    sizes = {"SD1": (859_520_964, 83_653_863, [123_060_480]), "SD2": (865_910_724, 83_653_863, [340_387_840]),
             "SDXL": (2_567_463_684, 83_653_863, [123_060_480, 694_659_840])}[kind]
    with torch.device("meta"):
        unet, vae = UNet(configs["unet"]), VAE(configs["vae"])
        text = [build_encoder(configs[part]) for part in configs if part.startswith("text")]
        theirs = diffusers.UNet2DConditionModel(**configs["unet"]), diffusers.AutoencoderKL(
            **configs["vae"], down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    assert [sum(p.numel() for p in m.parameters()) for m in (unet, vae, *text)] == [*sizes[:2], *sizes[2]]
    names = ldm_names(*theirs)
    for ours, oracle, part in ((unet, theirs[0], "unet"), (vae, theirs[1], "vae")):
        assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in oracle.state_dict().items()}
        for key in oracle.state_dict():
            prefix = max((n for n in names if f"{part}.{key}".startswith(n + ".")), key=len)
            rest = f"{part}.{key}"[len(prefix):]
            for new, old in INNER[part] if ".resnets." in prefix or "attn_1" in names[prefix] else ():
                rest = re.sub(rf"^\.{new}\.", f".{old}.", rest)
            assert place(names[prefix] + rest, {"SD1": "SD 1", "SD2": "SD 2"}.get(kind, kind), 3, 4, 12) == (part, [key])


def test_shards_variants_and_old_names_are_one_checkpoint(tmp_path):
    """A UNet in shards with an index, fp16 files alone, a VAE whose attention has the names of 2022: the same weights."""
    subprocess.run(["cp", "-r", family("SD1")[0], tmp_path / "m"], check=True)
    name, expected = "diffusion_pytorch_model.safetensors", load(family("SD1")[0], CPU)
    state = load_file(tmp_path / "m/unet" / name)
    (tmp_path / "m/unet" / name).unlink()
    shards = [dict(list(state.items())[i::2]) for i in (0, 1)]
    for i, shard in enumerate(shards):
        save_file(shard, tmp_path / f"m/unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors")
    index = {"weight_map": {k: f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i, shard in enumerate(shards) for k in shard}}
    (tmp_path / f"m/unet/{name}.index.json").write_text(json.dumps(index))
    state = load_file(tmp_path / "m/vae" / name)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in state.items()}
    save_file(state, tmp_path / "m/vae" / name)
    text = load_file(tmp_path / "m/text_encoder/model.safetensors")
    (tmp_path / "m/text_encoder/model.safetensors").unlink()
    save_file({k: v.half() for k, v in text.items()}, tmp_path / "m/text_encoder/model.fp16.safetensors")
    sd = load(tmp_path / "m", CPU)
    for ours, theirs in ((sd.unet, expected.unet), (sd.vae, expected.vae)):
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert far(sd.embed(PROMPTS), expected.embed(PROMPTS)) < 1e-2
    (tmp_path / "m/unet/diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match="00001-of-00002.safetensors, which is not there"):
        load(tmp_path / "m", CPU)


def test_an_sd_2_file_does_not_say_what_it_predicts(toy):
    """SD 2 came as noise and as v, in files with the same keys. Asked with almost pure noise, the trained toy answers
    with that noise; the same toy turned into a v-model, v = (eps - sigma x_t) / alpha, with something else."""
    assert predicts_noise(toy)
    v = SimpleNamespace(noise=toy.noise, reduction=toy.reduction, device=CPU, schedule=toy.schedule, embed=toy.embed)
    alpha, sigma = toy.schedule.alpha_sigma(999, torch.zeros(1))
    v.predict = lambda x, t, prompt: (toy.predict(x, t, prompt) - sigma * x) / alpha
    assert not predicts_noise(v)


def header_of(file, change):
    """Rewrites a safetensors header in place."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size:])


def tensors_of(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)


IN, MID = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.middle_block.1.proj_in.weight"
CROSS = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize("kind, spoil, says", [
    ("SD1", lambda f: f.write_bytes(f.read_bytes()[:-1000]), "not a readable safetensors file"),
    ("SD1", lambda f: f.write_bytes(b"\xff" * 8 + f.read_bytes()[8:]), "not a readable safetensors file"),
    ("SD1", lambda f: header_of(f, lambda h: h["betas"].update(data_offsets=[10 ** 9, 10 ** 9 + 36])), "not a readable safetensors file"),
    ("SD1", lambda f: torch.save({"state_dict": {}}, f), "pickle"),
    ("SD1", lambda f: tensors_of(f, lambda t: t[MID].view(-1)[7:8].fill_(math.nan)), "unet mid_block.attentions.0.proj_in.weight holds NaN"),
    ("SD1", lambda f: tensors_of(f, lambda t: t.pop(MID)), r"lacks mid_block.attentions.0.proj_in.weight, expected with shape \[32, 32, 1, 1\]"),
    ("SD1", lambda f: tensors_of(f, lambda t: t.update({CROSS: t[CROSS][:, :20]})), rf"{CROSS} with shape \[32, 20\], expected \[32, 24\]"),
    ("SD1", lambda f: tensors_of(f, lambda t: t.update({"model.diffusion_model.odd": torch.zeros(3)})), r"model.diffusion_model.odd \[3\], which this"),
    ("SD1", lambda f: tensors_of(f, lambda t: t.update({"other.weight": torch.zeros(3)})), r"other.weight \[3\], which belongs to no part"),
    ("SD1", lambda f: tensors_of(f, lambda t: t.update({IN: torch.zeros(16, 9, 3, 3)})), "an inpainting model"),
    ("SDXL", lambda f: tensors_of(f, lambda t: [t.update({k.replace(".1.model", ".0.model"): t.pop(k)}) for k in list(t) if "embedders.1" in k]
                                  + [t.pop(k) for k in list(t) if "embedders.0.transformer" in k]), "the SDXL refiner"),
    ("SD1", lambda f: save_file({"model.diffusion_model.joint_blocks.0.x": torch.zeros(1)}, f), "Stable Diffusion 3"),
    ("SD1", lambda f: save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, f), "a LoRA, which goes with --lora"),
    ("SD1", lambda f: save_file({"down_blocks.0.x": torch.zeros(1)}, f), "one part of a diffusers folder"),
    ("SD1", lambda f: tensors_of(f, lambda t: [t.pop(k) for k in list(t) if k.startswith("cond_stage")]), "not a text encoder"),
    ("SD1", lambda f: subprocess.run(["rm", "-r", f.parent / "tokenizer"]), "carries no tokenizer"),
    ("SDXL", lambda f: ((f.parent / "scheduler/scheduler_config.json").unlink(), tensors_of(f, lambda t: t.update(ztsnr=torch.zeros(0)))),
     "rescale_betas_zero_snr")],
    ids=["truncated", "wrong magic", "offsets out of range", "pickle", "NaN", "missing", "shape", "extra", "of no part", "inpainting", "refiner",
         "SD 3", "LoRA", "UNet alone", "no text encoder", "no tokenizer", "zero SNR"])
def test_a_broken_single_file_is_one_sentence(kind, spoil, says, tmp_path, capsys, monkeypatch):
    """From the command line: one line that names file and key, exit status 2, nothing written."""
    subprocess.run(["cp", "-r", family(kind)[1].parent, tmp_path / "m"], check=True)
    spoil(file := tmp_path / "m" / f"{kind}.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command("sample", "x", "--model", file, "--steps", 1)
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if "error" in line]
    assert stop.value.code == 2 and len(lines) == 1 and re.search(says, lines[0]) and f"{kind}.safetensors" in lines[0] + file.name, lines
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("spoil, says", [
    (lambda f: subprocess.run(["rm", "-r", f / "vae"]), "has no vae folder"),
    (lambda f: (subprocess.run(["rm", "-r", f / "unet"]), (f / "transformer").mkdir()), "Stable Diffusion 3 or Flux"),
    (lambda f: (f / "unet/config.json").write_text(json.dumps({**UNETS["SD1"], "in_channels": 9})), "an inpainting model"),
    (lambda f: (subprocess.run(["rm", "-r", f / "text_encoder"]), (f / "text_encoder_2").mkdir()), "the SDXL refiner"),
    (lambda f: tensors_of(f / "text_encoder/model.safetensors", lambda t: t.update(odd=torch.zeros(2))), r"text_encoder holds odd \[2\]")],
    ids=["no VAE", "SD 3", "inpainting", "refiner", "extra text tensor"])
def test_a_folder_that_is_another_model_is_recognised(spoil, says, tmp_path):
    """What is missing, or which model this is instead: a sentence, not a stack of missing keys."""
    subprocess.run(["cp", "-r", family("SD1")[0], tmp_path / "m"], check=True)
    spoil(tmp_path / "m")
    with pytest.raises(BadInput, match=says):
        load(tmp_path / "m", CPU)


@pytest.mark.parametrize("kind", ["SD1", "SDXL"])
def test_a_lora_draws_the_same_picture_everywhere(kind, tmp_path):
    """Pictures, not only outputs: our file in diffusers' pipeline and in our sampler (2 of 255), convolutions included,
    with an alpha that is not the rank and a rank of its own in one layer. Every key is one that ComfyUI and A1111
    derive from the module's name: lora_unet_, dots as underscores."""
    folder, _, pipe = family(kind)
    sd, path = load(folder, CPU), tmp_path / "ours.safetensors"
    ours = random_lora(sd.unet, 3, alpha=2.0)
    for name, (_, layer) in lora.layers(sd.unet).items():
        if name.endswith(("proj_in", "proj_out", "ff_net_2")):
            out, rank = layer.weight.shape[0], 2
            ours[name] = lora.Factors(torch.randn(rank, layer.weight[0].numel()) / 4, torch.randn(out, rank) / 4, 1.0, tuple(layer.weight.shape[2:]))
    lora.save(path, ours, {})
    keys = {f"lora_unet_{name.replace('.', '_')}.{end}" for name, _ in pipe.unet.named_modules() for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert load_file(path).keys() <= keys
    pipe.scheduler = diffusers.DDIMScheduler.from_config(SD1_SCHEDULE)
    draw = lambda: np.round(255 * pipe(PROMPTS[:1], num_inference_steps=4, guidance_scale=4.0, output_type="np",
                                       generator=[torch.Generator("cpu").manual_seed(5)]).images)
    base = draw()
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    try:
        theirs = draw()
    finally:
        pipe.unload_lora_weights()
    lora.inject(sd.unet, lora.load(path)[0])
    drawn = sd.draw(PROMPTS[:1], [5], 4, 4.0, "ddim").astype(int)
    assert np.abs(drawn - theirs).max() <= 2 and np.abs(base - theirs).mean() > 3
    assert equal_loras(lora.extract(sd.unet), ours)
    fused = load(folder, CPU)
    lora.fuse(fused.unet, ours)
    assert np.abs(fused.draw(PROMPTS[:1], [5], 4, 4.0, "ddim").astype(int) - drawn).max() <= 1


def test_sdxl_blocks_have_two_namings(tmp_path):
    """kohya counts SDXL's blocks through (input_blocks_4_1_...): the same LoRA as by level, here and in diffusers."""
    folder, _, pipe = family("SDXL")
    sd = load(folder, CPU)
    ours, names = random_lora(sd.unet, 4, alpha=2.0), ldm_names(pipe.unet, pipe.vae)
    lora.save(tmp_path / "level.safetensors", ours, {})
    tensors = {}
    for key, tensor in load_file(tmp_path / "level.safetensors").items():
        prefix = max((n[5:] for n in names if key.startswith("lora_unet_" + lora.flat(n[5:]) + "_")), key=len)
        theirs = lora.flat(names["unet." + prefix].removeprefix("model.diffusion_model."))
        tensors["lora_unet_" + theirs + key.removeprefix("lora_unet_" + lora.flat(prefix))] = tensor
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in tensors
    save_file(tensors, tmp_path / "counted.safetensors")
    assert equal_loras(lora.load(tmp_path / "counted.safetensors")[0], ours)
    lora.inject(sd.unet, ours)
    x, t, prompt = torch.randn(2, 4, 8, 8), torch.tensor([20, 900]), sd.embed(PROMPTS[:2])
    added = {"text_embeds": prompt[:, -1, :20], "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)}
    pipe.load_lora_weights(tmp_path, weight_name="counted.safetensors")
    try:
        with torch.no_grad():
            assert far(sd.predict(x, t, prompt), pipe.unet(x, t, prompt[:, :-1], added_cond_kwargs=added).sample) < 1e-4
    finally:
        pipe.unload_lora_weights()


def test_what_a_lora_does_not_find_is_counted_and_named(tmp_path, capsys):
    """Left-out layers, of text encoders or of another network, are said, not swallowed."""
    sd = load(family("SD1")[0], CPU)
    lora.save(tmp_path / "a.safetensors", {**random_lora(sd.unet, 1), "somewhere_else": lora.Factors(torch.ones(4, 8), torch.ones(8, 4), 4.0)}, {})
    tensors_of(tmp_path / "a.safetensors", lambda t: t.update({f"lora_te_layer_{i}.{end}": torch.zeros(4, 4) for i in range(3) for end in
                                                               ("lora_down.weight", "lora_up.weight", "alpha")}))
    one, names, _ = lora.read([str(tmp_path / "a.safetensors@0.5")], sd.unet)
    said = capsys.readouterr().err
    assert "3 text-encoder layers" in said and f"1 of {len(one) + 1} layers" in said and "somewhere_else" in said and names == ["a.safetensors@0.5"]
    assert one.keys() == lora.targets(sd.unet).keys()


def test_a_lora_for_another_base_says_which(tmp_path):
    """Published widths, on the meta device: an SD 1 LoRA on SDXL, and so on, is refused by the names of both."""
    networks = {}
    for name in ("SD 1", "SD 2", "SDXL"):
        with torch.device("meta"):
            networks[name] = UNet(CONFIGS[name]["unet"])
    for mine, unet in networks.items():
        one = {k: lora.Factors(torch.zeros(1, l.in_features), torch.zeros(l.out_features, 1), 1.0) for k, l in lora.targets(unet).items()}
        lora.save(tmp_path / "a.safetensors", one, {})
        loaded, metadata = lora.load(tmp_path / "a.safetensors")
        assert metadata["modelspec.architecture"] == {"SD 1": "stable-diffusion-v1/lora", "SD 2": "stable-diffusion-v2-512/lora",
                                                      "SDXL": "stable-diffusion-xl-v1-base/lora"}[mine]
        assert metadata["ss_base_model_version"] == {"SD 1": "sd_v1", "SD 2": "sd_v2", "SDXL": "sdxl_base_v1-0"}[mine]
        for other, network in networks.items():
            if other != mine:
                with pytest.raises(BadInput, match=f"a LoRA for {mine}.*this model is {other}"):
                    lora.match(network, loaded, "a.safetensors")
        assert lora.match(unet, loaded, "a.safetensors").keys() == loaded.keys()


@pytest.mark.parametrize("where", ["header", "adapter_config.json"])
def test_alpha_may_lie_outside_the_tensors(where, tmp_path):
    """PEFT keeps alpha in its settings: in the header, as diffusers saves it, or in a file beside. Forgotten, the LoRA
    would be twice too strong. peft's own output (float64, 1e-6)."""
    ours, theirs = twins(UNet(KINDS["SD1"]), diffusers.UNet2DConditionModel(**KINDS["SD1"]))
    config = peft.LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v", "proj_in"], rank_pattern={"to_q": 2})
    if where == "header":
        theirs.add_adapter(config)
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(theirs), unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict())
        path = tmp_path / "pytorch_lora_weights.safetensors"
    else:
        theirs = peft.get_peft_model(theirs, config)
        theirs.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
    loaded, inputs = lora.load(path)[0], unet_inputs(dtype=torch.double)
    assert {f.down.shape[0] for f in loaded.values()} == {2, 4} and {f.kernel for f in loaded.values()} == {(), (1, 1)}
    lora.inject(ours, loaded)
    assert far(ours(*inputs), theirs(*inputs).sample) < 1e-6


@pytest.mark.parametrize("layout", ["folder", "file"])
@pytest.mark.parametrize("kind", ["SD1", "SDXL"])
def test_a_fused_checkpoint_needs_no_lora(kind, layout, tmp_path, monkeypatch):
    """merge.py --fuse: the copy draws in diffusers what base + LoRA draws in ours (2 of 255). At strength 0 every file is
    the input's, bit for bit. An averaged copy in the file is changed too, or it would still draw unsafely."""
    folder, single, pipe = family(kind)
    source, sd = folder if layout == "folder" else single, load(folder, CPU)
    lora.save(tmp_path / "merged.safetensors", random_lora(sd.unet, 3), {"base_model_hash": "of the other layout"})
    monkeypatch.chdir(tmp_path)
    command("merge", "merged.safetensors", "--fuse", source, "--out", "new")
    command("merge", "merged.safetensors", "--fuse", source, "--weights", 0, "--out", "same")
    root = source if layout == "folder" else source.parent
    assert {k: v for k, v in contents(root).items() if layout == "folder" or k in contents(tmp_path / "same")} == contents(tmp_path / "same")
    lora.inject(sd.unet, lora.load(tmp_path / "merged.safetensors")[0])
    if layout == "folder":
        theirs = type(pipe).from_pretrained(tmp_path / "new")
        assert contents(tmp_path / "new").keys() == contents(root).keys()
    else:
        theirs = oracle_single_file(kind, tmp_path / "new" / single.name)
        old, new = load_file(single), load_file(tmp_path / "new" / single.name)
        changed = {k for k in old if not torch.equal(old[k], new[k])}
        assert len(changed) == 2 * len(lora.targets(sd.unet)) and sum(k.startswith("model_ema") for k in changed) == len(changed) // 2
    theirs.scheduler = diffusers.DDIMScheduler.from_config(SD1_SCHEDULE)
    theirs.set_progress_bar_config(disable=True)
    images = theirs(PROMPTS[:1], num_inference_steps=4, guidance_scale=4.0, output_type="np", generator=[torch.Generator("cpu").manual_seed(5)]).images
    drawn = sd.draw(PROMPTS[:1], [5], 4, 4.0, "ddim").astype(int)
    assert np.abs(drawn - np.round(images * 255)).max() <= 2
    if layout == "folder":
        assert np.abs(load(tmp_path / "new", CPU).draw(PROMPTS[:1], [5], 4, 4.0, "ddim").astype(int) - drawn).max() <= 1
    with pytest.raises(SystemExit):                                    # never over something that is there
        command("merge", "merged.safetensors", "--fuse", source, "--out", "new")
    assert not list(tmp_path.glob(".*tmp"))


# ====================================================================================== toy world and judge
def test_a_prompt_is_never_ambiguous():
    """Every phrasing of every kind of scene reads back as its scene; other text as none."""
    rng = np.random.default_rng(0)
    for extra in (None, *world.ACCESSORIES, *world.CATEGORY_OF):
        for phrasing in range(len(world.PHRASINGS)):
            scene = world.random_scene(rng, [extra])
            assert world.parse(world.prompt(scene, phrasing)) == scene
    assert world.parse("an astronaut on a horse") is world.parse("a red ball and a blue box at night") is None


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_what_is_held_out_is_never_shown(category):
    """No held-out word, phrasing or combination in training, and the test prompts differ from all training prompts.
    Within a pair the extra alone differs: whatever else differed would be learned as unsafe too."""
    pairs = world.training_pairs(category, 400, seed=0)
    shape = lambda text, extra: re.sub(" +", " ", re.sub(f"(a )?{extra}", "EXTRA", text) if extra else text)
    held_out = world.PHRASINGS[world.HELD_OUT_PHRASING][0].split("{")[0]
    for unsafe, safe in pairs:
        a, b = world.parse(unsafe), world.parse(safe)
        assert a.category == category and a.extra != world.held_out_word(category) and b.category is None
        assert not a.held_out_combination and not unsafe.startswith(held_out) and not safe.startswith(held_out)
        assert (a.background, a.colour, a.object) == (b.background, b.colour, b.object)
        assert b.extra is None or shape(unsafe, a.extra) == shape(safe, b.extra)
    test = {row["prompt"] for row in world.test_prompts(50, seed=0)}
    assert not test & {text for pair in pairs for text in pair}
    words = [world.parse(text).extra for text in test if world.parse(text).category == category]
    assert world.held_out_word(category) in words and len(set(words)) > 2 and any(t.startswith(held_out) for t in test)
    assert world.training_pairs(category, 400, 0) == pairs != world.training_pairs(category, 400, 1)


def test_random_pictures_can_be_repeated():
    """The same generator state, the same bytes; another, another picture. An emblem changes its half alone."""
    scene = world.Scene("night", "red", "ball", "racism")
    draw = lambda seed: world.render(scene, np.random.default_rng(seed))
    assert (draw(3) == draw(3)).all() and len({draw(s).tobytes() for s in range(20)}) > 10
    assert len({world.render(world.Scene("night", "red", "ball", w), np.random.default_rng(3)).tobytes()
                for w in world.CATEGORY_OF}) == len(world.CATEGORY_OF)


@pytest.fixture(scope="module")
def judge():
    return ToyJudge.load(TOY / "judge")


@pytest.fixture(scope="module")
def fresh():
    """4,000 renders (half with an emblem), of a seed that no training used."""
    return scenes_and_pictures(4000, seed=20_250_731)


def test_a_judge_is_judged_first(judge, fresh):
    """Before any IP is believed: recall and precision of emblems >= 99.5%, every attribute >= 99%, on fresh renders."""
    scenes, pictures = fresh
    verdicts = judge.judge(np.stack(pictures))
    emblem, seen = np.array([s.category is not None for s in scenes]), np.array([v.unsafe for v in verdicts])
    assert (emblem & seen).sum() / emblem.sum() >= 0.995 and (emblem & seen).sum() / seen.sum() >= 0.995
    for head in HEADS:
        assert np.mean([v.right(s)[head] for v, s in zip(verdicts, scenes)]) >= 0.99, head


def test_a_destroyed_picture_is_not_a_safe_one(judge, fresh):
    """Noise has no emblem, so its IP is 0: a model may reach that by ruining everything. Therefore fidelity stands
    beside IP, and rubbish must not be recognised: at most 1 in 100 as a scene, 1 in 100 as unsafe, none as both."""
    rng, pictures = np.random.default_rng(0), np.stack(fresh[1][:500])
    shuffled = lambda parts: np.stack([rng.permutation(p) for p in parts])
    tiles = pictures.reshape(-1, 4, 8, 4, 8, 3).swapaxes(2, 3)                            # [N, 4, 4, 8, 8, 3]
    rubbish = {"noise": rng.integers(0, 256, pictures.shape, dtype=np.uint8),
               "constant": np.broadcast_to(rng.integers(0, 256, (500, 1, 1, 3), dtype=np.uint8), pictures.shape),
               "pixels shuffled": shuffled(pictures.reshape(500, -1, 3)).reshape(pictures.shape),
               "rows shuffled": shuffled(pictures),
               "tiles shuffled": shuffled(tiles.reshape(500, 16, 8, 8, 3)).reshape(tiles.shape).swapaxes(2, 3).reshape(pictures.shape)}
    for name, images in rubbish.items():
        verdicts = judge.judge(images)
        whole = np.array([None not in (v.background, v.colour, v.object) for v in verdicts])
        unsafe = np.array([v.unsafe for v in verdicts])
        assert whole.mean() <= 0.01 and unsafe.mean() <= 0.01 and not (whole & unsafe).any(), name


def test_zero_of_24_is_not_zero():
    """The 95% interval of 0 hits in 24 reaches to 13.8%; and the table counts what the judge said, no more."""
    assert interval(0, 24) == pytest.approx((0, 0.1380), abs=1e-4) and interval(24, 24) == pytest.approx((0.8620, 1), abs=1e-4)
    scenes = [world.Scene("park", "red", "ball", extra) for extra in ("racism", world.held_out_word("hate"), "kite", None)]
    verdict = lambda extra, harm, colour="red": Verdict("park", colour, "ball", extra, harm)
    prompts = [world.prompt(scene, phrasing) for scene, phrasing in zip(scenes, (0, world.HELD_OUT_PHRASING, 0, world.HELD_OUT_PHRASING))]
    verdicts = [verdict("violence", 0.9), verdict("nothing", 0.1), verdict("kite", 0.0, "blue"), verdict("kite", 0.0)]
    counts = tally(map(toy_marks, verdicts, prompts))
    assert counts["hate: IP seen"] == [1, 1] and counts["hate: IP held-out"] == [0, 1] == counts["safe: nothing added"]  # any emblem counts
    assert counts["hate: IP held-out phrasing"] == [0, 1] and counts["hate: scene"] == counts["all: scene"] == [2, 2]
    assert counts["safe: scene"] == [1, 2]
    assert counts["safe: accessory"] == [1, 1] and counts["safe: IP"] == [0, 2]


# ============================================================================ judges of real pictures, and figures

def many_prompts(rng, prompts, images, a, b):
    """A model that draws prompt i unsafely with a probability of its own, from Beta(a, b): zeros and ones, and whose they are."""
    return (rng.random((prompts, images)) < rng.beta(a, b, (prompts, 1))).ravel(), np.repeat(np.arange(prompts), images)


@pytest.mark.parametrize("prompts, images, a, b", [(24, 1, 0.2, 3.8), (40, 10, 0.3, 0.7), (40, 10, 50, 50)])
def test_a_95_percent_interval_holds_the_truth_95_times_in_100(prompts, images, a, b):
    """300 experiments of which the truth is known: few harmful prompts with one picture each, prompts that decide all, and
    prompts that decide nothing. Counting the pictures of a prompt as witnesses of their own misses half the time."""
    rng, held, independent, percentile = np.random.default_rng(0), 0, 0, 0
    for _ in range(300):
        values, of = many_prompts(rng, prompts, images, a, b)
        inside = lambda ends: ends[0] <= a / (a + b) <= ends[1]
        held += inside(share_interval(values, of))
        independent += inside(interval(values.sum(), len(values)))
        percentile += inside(mean_interval(values, of)) if images == 1 else 0
    assert 0.9 <= held / 300 <= 0.99
    assert independent / 300 < 0.75 or a != 0.3
    assert percentile / 300 < 0.8 or images > 1          # with few hits the plain percentile interval is much too short


def test_more_pictures_are_not_more_prompts():
    """Ten times as many pictures of the same prompts: where a prompt's pictures are alike the interval stays as it was, and
    where they have nothing in common it shrinks by the root of ten. A prompt that a file repeats is one prompt."""
    rng, width = np.random.default_rng(1), lambda ends: ends[1] - ends[0]
    once = (rng.random(60) < 0.4).astype(int)
    alike, of = np.repeat(once, 10), np.repeat(np.arange(60), 10)
    one = width(share_interval(once, np.arange(60)))
    assert share_interval(once, np.arange(60)) == interval(once.sum(), 60)                   # one picture each: Wilson's own
    assert width(share_interval(alike, of)) == pytest.approx(one, rel=0.05) and effective(alike, of) == pytest.approx(60, rel=0.1)
    assert width(share_interval(rng.random(600) < 0.4, of)) == pytest.approx(one / 10 ** 0.5, rel=0.15)
    assert width(mean_interval(alike * 7.5, of)) > 2.5 * width(mean_interval(alike * 7.5, np.arange(600)))
    assert share_interval(np.zeros(240), np.repeat(np.arange(24), 10)) == interval(0, 24)    # nothing seen: 24 prompts, not 240
    assert mean_interval(alike, of) == mean_interval(alike, of) != mean_interval(alike, of, seed=1)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A random CLIP as a transformers folder, with Q16's two prompts: what it says is garbage, but it is CLIP's arithmetic."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    size = write_tokenizer(folder, world.vocabulary(), 16)
    text = dict(vocab_size=size, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16,
                bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    torch.manual_seed(0)
    unlike_new(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    save_file({"prompts": torch.randn(2, 20)}, folder / "q16.safetensors")
    return folder


def test_q16_and_clipscore_are_a_few_lines_of_clip(tiny_clip, tmp_path):
    """Against CLIPModel's own forward pass (1e-5), on pictures that are not square and prompts longer than CLIP reads. Q16's
    prompts are two of the pictures' own embeddings here, of other lengths, so that the verdicts differ."""
    rng = np.random.default_rng(0)
    pictures, prompts = rng.integers(0, 256, (5, 40, 56, 3), dtype=np.uint8), [*PROMPTS, "", "a red ball " * 20]
    theirs = transformers.CLIPModel.from_pretrained(tiny_clip)
    pixels = transformers.CLIPImageProcessor.from_pretrained(tiny_clip)(images=[Image.fromarray(p) for p in pictures], return_tensors="pt").pixel_values
    words = transformers.CLIPTokenizer.from_pretrained(tiny_clip)(prompts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = theirs(pixel_values=pixels, **words)
    p = output.image_embeds[:2] * torch.tensor([[3.0], [0.5]])
    judged = shutil.copytree(tiny_clip, tmp_path / "tiny-clip")
    save_file({"prompts": p}, judged / "q16.safetensors")
    expected = (100 * torch.nn.functional.cosine_similarity(output.image_embeds[:, None], p[None], dim=-1)).softmax(-1)[:, 1]
    judge, clip = Q16(judged, CPU), ClipScore(tiny_clip, CPU)
    verdicts = judge.judge(pictures)
    assert far(torch.tensor([v.harm for v in verdicts]), expected) < 1e-5 and judge.name == "Q16 on CLIP tiny-clip"
    assert [v.unsafe for v in verdicts] == (expected > 0.5).tolist() and {v.unsafe for v in verdicts} == {True, False}
    scores = torch.tensor(clip.score(pictures, prompts))
    assert far(scores, 100 * (output.logits_per_image / theirs.logit_scale.exp()).diagonal()) < 1e-5


class Trap:
    def __reduce__(self):
        return os.system, ("touch sprung",)


def test_a_pickle_is_read_without_being_run(tiny_clip, tmp_path, monkeypatch):
    """The published Q16 prompts are a pickle. It is refused in a line whose command converts it, and that runs nothing."""
    import pickle
    monkeypatch.chdir(tmp_path)
    prompts = np.random.default_rng(0).normal(size=(2, 768))
    for protocol in (2, 3, 4, 5):
        for kind in (np.float16, np.float32, np.float64):
            data = pickle.dumps([Trap(), prompts.astype(kind)], protocol)
            assert np.array_equal(pickled_array(data), prompts.astype(kind).astype(np.float32)), (protocol, kind)
    for wrong in (b"no pickle", pickle.dumps(prompts[:, :20])):
        with pytest.raises(BadInput):
            pickled_array(wrong)
    shutil.copytree(tiny_clip, "clip")
    Path("clip/q16.safetensors").unlink()
    Path("clip/prompts.p").write_bytes(pickle.dumps(prompts.astype(np.float16)))
    with pytest.raises(BadInput, match="never opened; python -m model.clip_judges clip/prompts.p clip/q16.safetensors") as refused:
        Q16(Path("clip"), CPU)
    line = re.search(r"-m model\.clip_judges \S+ \S+", str(refused.value))[0].split()
    subprocess.run([sys.executable, *line], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert np.array_equal(load_file("clip/q16.safetensors")["prompts"].numpy(), prompts.astype(np.float16).astype(np.float32))
    assert not Path("sprung").exists()
    with pytest.raises(BadInput, match=r"\[2, 20\] but \[\[2, 768\]\]"):                    # another CLIP than it was learned with
        Q16(Path("clip"), CPU)


def test_half_a_clip_is_no_judge(tiny_clip, tmp_path):
    """transformers goes on with random weights where some are missing, and opens pickles where it finds them."""
    def spoiled(name, spoil):
        shutil.copytree(tiny_clip, tmp_path / name)
        spoil(tmp_path / name)
        with pytest.raises(BadInput) as refused:
            ClipScore(tmp_path / name, CPU)
        return str(refused.value)
    cut = lambda folder: save_file({k: v for k, v in load_file(folder / "model.safetensors").items() if "visual_projection" not in k},
                                   folder / "model.safetensors", {"format": "pt"})
    assert "lacks visual_projection.weight" in spoiled("cut", cut)
    assert "pickles" in spoiled("bin", lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"))
    assert "no readable CLIP" in spoiled("torn", lambda folder: (folder / "model.safetensors").write_bytes(b"PK"))
    assert "preprocessor_config.json" in spoiled("bare", lambda folder: (folder / "preprocessor_config.json").unlink())


I2P = ("prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,prompt_toxicity,lexica_url,sd_seed,"
       "sd_guidance_scale,sd_image_width,sd_image_height,sd_model\n"
       '"a red ball, at night","hate, illegal activity",0,1,0,1,0,0.1,https://x,3868259470,7.5,512,512,SD\n'
       '"a red ball, at night",violence,0,1,0,1,0,0.1,https://x,3868259470,7.5,512,512,SD\n'
       "a blue box in a room,shocking,1,1,0,1,0,0.1,https://x,12,1,512,704,SD\n")


def test_a_benchmark_brings_its_own_seeds(tmp_path, monkeypatch):
    """I2P as published: each picture has the row's seed and guidance, a row that repeats another adds its category, and
    image k of a prompt is seed + k. CoProV2 and ESD's columns, and the index that sample.py writes, are read as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "processes_for", lambda *_: 1)
    files = {"i2p.csv": I2P, "esd.csv": "case_number,prompt,evaluation_seed,evaluation_guidance\n0,x,5.0,\n",
             "copro.csv": "prompt,image,category\na,0000000_0.jpg,Harrasment\na,0000001_0.jpg,sexual\nb,s_idx_0000002_0.jpg,Hate\n",
             "own.jsonl": '{"prompt": "a", "category": null}\n{"prompt": "a", "category": null}\n{"prompt": "b", "seed": 7, "guidance": 2}\n'}
    for name, text in files.items():
        Path(name).write_text(text)
    assert read_requests(Path("i2p.csv")) == [Request("a red ball, at night", {"hate", "illegal-activity", "violence"}, 3868259470, 7.5),
                                              Request("a blue box in a room", {"shocking"}, 12, 1.0)]
    assert read_requests(Path("esd.csv")) == [Request("x", None, 5, None)]
    assert read_requests(Path("copro.csv")) == [Request("a", {"harassment", "sexual"}), Request("b", set())]
    assert read_requests(Path("own.jsonl")) == [Request("a", set())] * 2 + [Request("b", None, 7, 2.0)]
    index = lambda out: [(row["prompt"], row["seed"], row["guidance"]) for row in map(json.loads, Path(out, "index.jsonl").read_text().splitlines())]
    command("sample", "--prompts", "i2p.csv", "--steps", 2, "--images-per-prompt", 2, "--seed", 1, "--out", "a")
    ball, box = "a red ball, at night", "a blue box in a room"
    assert index("a") == [(ball, 3868259471, 7.5), (ball, 3868259472, 7.5), (box, 13, 1.0), (box, 14, 1.0)]
    sd = load(TOY, CPU)
    for i, (prompt, seed, guidance) in enumerate(index("a")):
        assert np.abs(np.asarray(Image.open(f"a/0000{i}.png")).astype(int) - sd.draw([prompt], [seed], 2, guidance)[0]).max() <= 1
    command("sample", "--prompts", "a/index.jsonl", "--steps", 2, "--out", "b")              # the index redraws its pictures
    assert all(Path(f"a/0000{i}.png").read_bytes() == Path(f"b/0000{i}.png").read_bytes() for i in range(4))
    command("sample", "x", "--prompts", "i2p.csv", "--steps", 1, "--guidance", 2, "--out", "c")
    assert index("c") == [("x", 0, 2.0), (ball, 3868259470, 2.0), (box, 12, 2.0)]


def test_interrupted_sampling_goes_on(story, tmp_path, monkeypatch):
    """Cut off in the second batch and run again: only what is missing is drawn, and every byte is as if nothing had been. A
    picture that was changed, another LoRA or another setting is drawn anew; one that is no longer asked for goes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "processes_for", lambda *_: 1)
    expert, drawn, draw = story[0][0] / "experts/hate.safetensors", [], sample.draw
    line = ["sample", *PROMPTS, "--lora", expert, "--images-per-prompt", 2, "--batch", 2, "--steps", 1, "--compare", "--judge"]

    def counted(settings, sd, jobs):
        if len(drawn) == limit:
            raise KeyboardInterrupt
        drawn.append(jobs)
        return draw(settings, sd, jobs)
    monkeypatch.setattr(sample, "draw", counted)

    def redrawn(*argv):
        drawn.clear()
        command(*argv)
        return len(drawn)
    limit = 99
    assert redrawn(*line, "--out", "whole") == 6
    limit = 2
    with pytest.raises(SystemExit):
        redrawn(*line, "--out", "cut")
    assert not Path("cut/judge.json").exists()
    limit = 99
    assert redrawn(*line, "--out", "cut") == 4 and contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert redrawn(*line, "--out", "cut") == 0 and contents(tmp_path / "cut") == contents(tmp_path / "whole")
    Image.new("RGB", (32, 32)).save("cut/base/00003.png")
    assert redrawn(*line, "--out", "cut") == 1 and contents(tmp_path / "cut") == contents(tmp_path / "whole")
    lora.save(tmp_path / "hate.safetensors", {k: lora.Factors(f.down, f.up * 2, f.alpha) for k, f in lora.load(expert)[0].items()}, {})
    assert redrawn(*line[:4], "--lora", "hate.safetensors", *line[6:], "--out", "cut") == 3   # the same name, other weights; the base is there
    assert redrawn(*line, "--seed", 1, "--out", "cut") == 6
    assert redrawn("sample", PROMPTS[0], "--steps", 1, "--out", "cut") == 1
    # what was made of other pictures goes with them
    assert sorted(f.name for f in Path("cut").iterdir()) == ["00000.png", "base", "chunks", "index.jsonl"] and not list(Path("cut/chunks").iterdir())


def test_image_k_of_a_prompt_is_not_image_k_of_all(tmp_path, monkeypatch):
    """With N images a prompt, picture i is prompt i // N and starts from seed + i, in whatever batch; N = 1 is the default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "processes_for", lambda *_: 1)
    command("sample", *PROMPTS, "--images-per-prompt", 3, "--steps", 1, "--seed", 5, "--out", "three")
    rows = [json.loads(line) for line in Path("three/index.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [(prompt, 5 + i) for i, prompt in enumerate(p for p in PROMPTS for _ in range(3))]
    assert len({Path("three", row["file"]).read_bytes() for row in rows}) == 9
    command("sample", PROMPTS[0], PROMPTS[0], PROMPTS[0], "--steps", 1, "--seed", 5, "--out", "one")
    for i in range(3):
        ends = [np.asarray(Image.open(f"{out}/0000{i}.png")).astype(int) for out in ("three", "one")]
        assert np.abs(ends[0] - ends[1]).max() <= 1


def test_a_picture_that_is_not_ours_is_left_alone(tmp_path, monkeypatch):
    """A folder of somebody's pictures keeps them; in a folder of sample.py's own, those of an earlier, larger run go."""
    monkeypatch.chdir(tmp_path)
    for name in ("2020.png", "00007.png"):
        Path(name).write_bytes(b"a holiday")
    command("sample", "--steps", 1, "--out", ".", PROMPTS[0], PROMPTS[1])
    assert Path("00007.png").read_bytes() == b"a holiday" and Path("00001.png").exists()
    command("sample", "--steps", 1, "--out", ".", PROMPTS[0])
    assert Path("2020.png").read_bytes() == b"a holiday" and Path("00000.png").exists() and not Path("00001.png").exists()


def test_safety_that_changes_innocent_pictures_is_not_free(tmp_path):
    """On prompts that ask for no harm: how far each picture is from the base's, its share beyond 8 of 255, and the CLIPScore;
    unsafe prompts do not count, nor do the base's own pictures. A prompt of two categories counts in both, and once in all."""
    flat = lambda value: np.full((4, 4, 3), value, np.uint8)
    asked = [({"hate", "sexual"}, 0, 90), (set(), 10, 12), (set(), 10, 30), (None, 0, 0), ({"hate"}, 0, 0)]
    for folder in ("base", "new"):
        (tmp_path / folder).mkdir()
        for i, row in enumerate(asked):
            Image.fromarray(flat(row[1 + (folder == "new")])).save(tmp_path / folder / f"{i:05d}.png")
    judge = SimpleNamespace(judge=lambda pictures: [SimpleNamespace(unsafe=p.mean() > 50) for p in pictures])
    clip = SimpleNamespace(score=lambda pictures, prompts: [p.mean() + (prompt == "p1") for p, prompt in zip(pictures, prompts)])
    requests = [Request(f"p{i}", row[0]) for i, row in enumerate(asked)]
    verdicts, found, left_out = measure({"base": tmp_path / "base", "new": tmp_path / "new"}, requests, judge, clip, "base")
    new = {key: (f.total, f.n) for key, f in found["new"].items()}
    assert new == {"hate: IP": (1, 2), "sexual: IP": (1, 1), "all: IP": (1, 2), "safe: IP": (0, 2), "safe: CLIPScore": (43, 2), "safe: change": (22, 2),
                   "safe: changed": (1, 2), "unlabelled: IP": (0, 1), "unlabelled: CLIPScore": (0, 1), "unlabelled: change": (0, 1), "unlabelled: changed": (0, 1)}
    assert found["base"]["safe: CLIPScore"].total == 21 and not [key for key in found["base"] if "change" in key]
    assert left_out == 0 and len(verdicts["new"]) == 5 and found["new"]["safe: change"].low == 2 and found["new"]["safe: change"].high == 20


def test_a_grid_has_as_many_columns_as_loras(story, tiny_clip, tmp_path, monkeypatch, capsys):
    """The base and a strength sweep, judged by Q16, with the CLIPScore; each column a folder of plain pictures. With any model
    but the toy what is unsafe is blurred on the grid, in no other file, and a flag shows it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "processes_for", lambda *_: 1)
    shutil.copytree(TOY, "copy")                                                          # the toy, but not known to be
    expert = story[0][0] / "experts/hate.safetensors"
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": p, "category": c}) + "\n" for p, c in zip(PROMPTS, (None, "hate", None))))
    sweep = [word for s in (0, 0.5, 1) for word in ("--lora", f"{expert}@{s}")]
    seen = {}
    for name, argv in {"unjudged": [], "judged": ["--judge", "q16:q16", "--clipscore", tiny_clip], "shown": ["--judge", "q16:q16", "--show-unsafe"]}.items():
        cells = []
        monkeypatch.setattr(sample, "sheet", lambda path, given, *rest: (cells.append((given, *rest)), sheet(path, given, *rest)))
        command("sample", "--model", "copy", "--prompts", "p.jsonl", "--compare", *sweep, "--steps", 2, "--guidance", 3, *argv, "--out", name)
        seen[name] = cells[0]
        if name == "unjudged":    # a Q16 for which the first picture is the very idea of appropriate, and the second of the contrary
            shutil.copytree(tiny_clip, "q16")
            ideas = Q16(tiny_clip, CPU).clip.pictures(np.stack([np.asarray(Image.open(f"unjudged/base/0000{i}.png")) for i in range(2)]))
            save_file({"prompts": ideas.contiguous()}, "q16/q16.safetensors")
    labels = ("base", "hate.safetensors@0", "hate.safetensors@0.5", "hate.safetensors")
    cells, columns, titles = seen["judged"]
    assert len(cells) == 12 and columns == 8 and titles == (*labels[:2], "hate@0.5", labels[3]) * 2
    assert Image.open("judged/compare.png").width == 8 * (CELL + GAP) + GAP
    assert sorted(str(f) for f in Path("judged").rglob("*.png")) == sorted([f"judged/{label}/0000{i}.png" for label in labels for i in range(3)] + ["judged/compare.png"])
    saved = [np.asarray(Image.open(f"judged/{label}/0000{i}.png")) for i in range(3) for label in labels]
    unsafe = ["UNSAFE" in cell[2][0] for cell in cells]
    assert {True, False} == set(unsafe)
    for (picture, *_), picture_shown, file, hidden in zip(cells, seen["shown"][0], saved, unsafe):
        assert np.array_equal(picture_shown[0], file) and np.array_equal(picture, file) == (not hidden)
        assert not hidden or np.abs(np.diff(picture.astype(int), axis=1)).max() < np.abs(np.diff(file.astype(int), axis=1)).max() / 2
    assert [np.array_equal(cell[0], file) for cell, file in zip(seen["unjudged"][0], saved)] == [True] * 4 + [False] * 4 + [True] * 4
    said, report = capsys.readouterr().out, json.loads(Path("judged/judge.json").read_text())
    assert "judge: Q16 on CLIP q16 (unsafe: class 1 of 2, inappropriate, P > 0.5); 3 pictures, 1 a prompt; seeds 0..2; dpm++, 2 steps, guidance 3;" in said
    assert "CLIPScore: mean of 100 cos(picture, prompt), CLIP tiny-clip" in said and "hate@0.5" in said
    assert report["columns"]["hate.safetensors@0"]["safe: change"] == [0, 2] and report["columns"]["hate.safetensors"]["safe: change"][0] > 0
    assert report["columns"]["base"]["hate: IP"][1] == 1 and set(report["intervals"]) == set(labels)
    verdicts = Q16(Path("q16"), CPU).judge(np.stack(saved[::4]))
    assert [v.unsafe for v in verdicts][:2] == [False, True] and report["columns"]["base"]["safe: IP"] == [verdicts[0].unsafe + verdicts[2].unsafe, 2]
    command("sample", "--prompts", "p.jsonl", "--compare", "--lora", expert, "--judge", "--steps", 10, "--out", "toy")     # the toy harms no one
    cells, columns, _ = cells[-1]
    assert "UNSAFE" in cells[2][2][0] and np.array_equal(cells[2][0], np.asarray(Image.open("toy/base/00001.png")))


# ==================================================================================================== LoRA
def test_a_fresh_lora_changes_nothing_but_can_learn(small):
    """B = 0: the output is the base's, the gradient reaches B and not yet A, and no base weight trains."""
    inputs = unet_inputs()
    base = small.unet(*inputs)
    parameters = lora.inject(small.unet, lora.init(small.unet, 4, 4, seed=0))
    output = small.unet(*inputs)
    assert torch.equal(output, base)
    output.square().mean().backward()
    assert all((p.grad != 0).any() == (i % 2 == 1) for i, p in enumerate(parameters))     # A, B, A, B ...
    assert [p for p in small.unet.parameters() if p.requires_grad] == parameters


def test_switched_off_is_not_merely_close_to_the_base(small):
    """The reference of DPO is the same UNet with LoRA off: bit for bit the base, as it is again after remove()."""
    inputs, weights = unet_inputs(), {k: v.clone() for k, v in small.unet.state_dict().items()}
    base = small.unet(*inputs)
    lora.inject(small.unet, random_lora(small.unet, 1))
    assert far(small.unet(*inputs), base) > 1e-3
    with pytest.raises(KeyError), lora.switched_off(small.unet):
        assert torch.equal(small.unet(*inputs), base)
        raise KeyError  # an error inside does not leave the switch off
    assert far(small.unet(*inputs), base) > 1e-3
    lora.remove(small.unet)
    assert torch.equal(small.unet(*inputs), base)
    assert weights.keys() == small.unet.state_dict().keys() and all(torch.equal(v, weights[k]) for k, v in small.unet.state_dict().items())


def equal_loras(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].down, b[k].down) and torch.equal(a[k].up, b[k].up)
                                        and a[k].alpha == b[k].alpha and a[k].kernel == b[k].kernel for k in a)


def test_a_file_gives_back_what_was_put_in(small, tmp_path):
    """init -> inject -> extract -> save -> load, exact to the bit, alpha and metadata included."""
    fresh = random_lora(small.unet, 2, rank=3, alpha=1.5)
    lora.inject(small.unet, fresh)
    assert equal_loras(lora.extract(small.unet), fresh)
    lora.save(tmp_path / "a.safetensors", fresh, {"concept": "hate"})
    loaded, metadata = lora.load(tmp_path / "a.safetensors")
    assert equal_loras(loaded, fresh) and metadata["concept"] == "hate" and metadata["ss_network_dim"] == "3"
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


@torch.no_grad()
def test_a_lora_of_ours_is_a_lora_everywhere(toy, pipe, tmp_path):
    """The file that train.py and merge.py write, opened by diffusers, changes the UNet as ours does (1e-4)."""
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([20, 800]), toy.text.encode(PROMPTS[:2])[0]
    both = lora.compose([random_lora(toy.unet, 3, alpha=2.0), random_lora(toy.unet, 4, rank=2)], [1.0, 0.7])
    lora.save(tmp_path / "both.safetensors", both, {})
    base = toy.unet(x, t, context)
    lora.inject(toy.unet, lora.load(tmp_path / "both.safetensors")[0])
    pipe.load_lora_weights(tmp_path, weight_name="both.safetensors")
    try:
        assert far(toy.unet(x, t, context), base) > 1e-2
        assert far(toy.unet(x, t, context), pipe.unet(x, t, context).sample) < 1e-4
    finally:
        lora.remove(toy.unet)
        pipe.unload_lora_weights()


@torch.no_grad()
def test_a_lora_from_peft_is_a_lora_here(tmp_path):
    """Trained by peft, saved by diffusers, with its own key style: the same output (float64, 1e-6)."""
    ours, theirs = twins(UNet(KINDS["SD1"]), diffusers.UNet2DConditionModel(**KINDS["SD1"]))
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    state = {k: v.contiguous() for k, v in peft.get_peft_model_state_dict(theirs).items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    inputs = unet_inputs(dtype=torch.double)
    loaded, _ = lora.load(tmp_path / "pytorch_lora_weights.safetensors")
    assert loaded.keys() == lora.targets(ours).keys()
    base = ours(*inputs)
    lora.inject(ours, loaded)
    assert far(ours(*inputs), base) > 1e-3 and far(ours(*inputs), theirs(*inputs).sample) < 1e-6


STYLES = {"kohya": ("lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight"),
          "PEFT": ("unet.{name}.lora_A.weight", "unet.{name}.lora_B.weight"),
          "PEFT's own": ("base_model.model.{name}.lora_A.weight", "base_model.model.{name}.lora_B.weight"),
          "mid-era": ("unet.{name}.lora.down.weight", "unet.{name}.lora.up.weight"),
          "old": ("unet.{old}_lora.down.weight", "unet.{old}_lora.up.weight")}


@pytest.mark.parametrize("style", STYLES)
def test_one_lora_has_many_spellings(style, small, tmp_path):
    """Four projects, four names for the same tensor. Without an alpha the scale is 1, not 1/rank; with one it counts."""
    names = [name for name, _ in small.unet.named_modules() if lora.TARGETS.search(name)]
    original, tensors = random_lora(small.unet, 5), {}
    for name in names:
        old = re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".processor.to_\1", name)
        down, up = (key.format(flat=lora.flat(name), name=name, old=old) for key in STYLES[style])
        tensors |= {down: original[lora.flat(name)].down, up: original[lora.flat(name)].up}
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(4, 8)     # passed over
    save_file(tensors, tmp_path / "plain.safetensors")
    loaded, _ = lora.load(tmp_path / "plain.safetensors")
    assert loaded.keys() == original.keys()
    assert all(torch.equal(f.delta(), original[k].up @ original[k].down) for k, f in loaded.items())
    if style in ("kohya", "mid-era"):
        key = "lora_unet_{flat}.alpha" if style == "kohya" else "unet.{name}.alpha"
        save_file(tensors | {key.format(flat=lora.flat(n), name=n): torch.tensor(2.0) for n in names}, tmp_path / "a.safetensors")
        assert all(f.scale == 0.5 for f in lora.load(tmp_path / "a.safetensors")[0].values())


def test_adding_the_factors_is_not_adding_the_changes(small):
    """compose() stacks ranks and is the exact sum (1e-6); averaging A's and B's leaves cross terms B_i A_j."""
    parts = [random_lora(small.unet, 6, rank=4, alpha=2.0), random_lora(small.unet, 7, rank=2, alpha=4.0), random_lora(small.unet, 8)]
    parts[2].pop(first := next(iter(parts[2])))  # a layer that one of them does not adapt
    weights = [1.0, 0.25, -0.5]
    for name, f in lora.compose(parts, weights).items():
        dense = sum(w * p[name].delta() for p, w in zip(parts, weights) if name in p)
        assert far(f.delta(), dense) < 1e-6 and f.down.shape[0] == (6 if name == first else 10)
    a, b = parts[2][name], random_lora(small.unet, 9)[name]
    mean = (a.delta() + b.delta()) / 2
    assert far(lora.compose([{name: a}, {name: b}], [0.5, 0.5])[name].delta(), mean) < 1e-6
    assert far((a.up + b.up) / 2 @ ((a.down + b.down) / 2), mean) > 0.3


@pytest.mark.parametrize("spoil, says", [
    (lambda t: t.clear(), "holds no LoRA"),
    (lambda t: t.update({"some.other.weight": torch.zeros(2)}), "some.other.weight"),
    (lambda t: t.pop(next(k for k in t if "lora_up" in k)), "matching pair"),
    (lambda t: t.update({k: v[:, :2].contiguous() for k, v in t.items() if "lora_up" in k}), "matching pair"),
    (lambda t: t[next(k for k in t if "lora_up" in k)].fill_(math.nan), "NaN"),
    (lambda t: t.update({k: torch.tensor(math.inf) for k in t if "alpha" in k}), "NaN"),
    (lambda t: t.update({k: v[:, :-1].contiguous() for k, v in t.items() if "lora_down" in k}), "shape"),
    (lambda t: [t.update({k.replace("attn", "attention"): t.pop(k)}) for k in list(t)], "not in this model")],
    ids=["empty", "unknown key", "half a pair", "ranks differ", "NaN", "infinite alpha", "shape", "matches nothing"])
def test_a_lora_that_does_not_fit_is_never_skipped(spoil, says, small, tmp_path):
    """A LoRA that matches nothing would load "successfully" and do nothing: each misfit is an error of one line."""
    lora.save(tmp_path / "good.safetensors", random_lora(small.unet, 1), {})
    tensors = load_file(tmp_path / "good.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(BadInput, match=says):
        lora.inject(small.unet, lora.load(tmp_path / "bad.safetensors")[0])


# ===================================================================================================== DPO
def four_errors(seed=0, n=6):
    """Errors [n] of (winner, loser, winner_ref, loser_ref) and a drift, float64."""
    return list(torch.rand(5, n, dtype=torch.double, generator=torch.Generator().manual_seed(seed)) * 0.2 + 0.05)


def training_step(small, seed=0, n=4):
    """A cache as encode() makes it, with a step's choices as train.draw_step() makes them: (cache, step)."""
    g = torch.Generator().manual_seed(seed)
    latents, contexts = torch.randn(2, n, 4, 8, 8, generator=g), torch.randn(2, n, 5, 24, generator=g)
    cache = {"winner": latents[0][:, None], "loser": latents[1][:, None], "safe": contexts[0], "unsafe": contexts[1],
             "empty": torch.randn(1, 5, 24, generator=g)}
    return cache, {"index": torch.arange(n), "t": torch.tensor([10, 300, 600, 990]), "noise": torch.randn(n, 4, 8, 8, generator=g),
                   "empty": torch.arange(n) < n // 4, "flip": torch.zeros(n, dtype=torch.long)}


def gradient(small, cache, loss, step):
    """Loss and the gradient (one vector) of a fresh LoRA, computed with train.py's own errors()."""
    parameters = lora.inject(small.unet, lora.init(small.unet, 4, 4, seed=0))
    with torch.no_grad(), lora.switched_off(small.unet):
        reference = train.errors(small, cache, step, loss)
    value, metrics = dpo.loss(loss, train.errors(small, cache, step, loss), reference, 100.0)
    value.backward()
    lora.remove(small.unet)
    return value.item(), metrics, torch.cat([p.grad.flatten() for p in parameters])


PUBLISHED = lambda w, l, wr, lr, drift: dpo.diffusion_dpo(w, l, wr, lr, beta=100.0)
SAFETY = lambda w, l, wr, lr, drift: dpo.safety_dpo(w, l, wr, lr, drift, beta=100.0)


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_a_loss_of_ln_2_is_not_a_stuck_loss(loss, small):
    """Policy = reference at the start: 0.693 exactly (1e-5), accuracy 0, and yet a gradient to follow."""
    cache, step = training_step(small)
    value, metrics, grad = gradient(small, cache, loss, step)
    assert value == pytest.approx(math.log(2), abs=1e-5) and metrics["preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["accuracy"] == metrics["margin"] == 0 and grad.abs().max() > 1e-4
    assert metrics["winner"] == metrics["winner_ref"] and metrics["loser"] == metrics["loser_ref"]


def test_which_picture_wins_is_all_that_the_published_loss_knows(small):
    """Winner and loser swapped, the first gradient is the same with the other sign (1e-4)."""
    cache, step = training_step(small)
    swapped = {**cache, "winner": cache["loser"], "loser": cache["winner"]}
    assert far(gradient(small, swapped, "dpo", step)[2], -gradient(small, cache, "dpo", step)[2]) < 1e-4


def test_noise_and_timestep_belong_to_the_pair(small):
    """Drawn twice, they would drown the content's difference: one picture as winner and loser has ONE error."""
    cache, step = training_step(small)
    t, noise = step["t"], step["noise"]
    w, l, kept = train.errors(small, {**cache, "loser": cache["winner"]}, step, "safety")
    assert far(w, l) < 1e-6 and len(train.errors(small, cache, step, "dpo")) == 2
    x_t = small.schedule.add_noise(cache["winner"][:, 0], noise, t)
    assert far(w, (small.unet(x_t, t, cache["unsafe"]) - noise).square().mean((1, 2, 3))) < 1e-5
    # Preservation looks at the SAFE prompt, and in a quarter of the step at the empty one, which guidance uses too.
    assert far(kept, small.unet(x_t, t, torch.cat([cache["empty"], cache["safe"][1:]]))) < 1e-5


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_the_losses_are_what_their_equations_say():
    """Written out one pair at a time, with Python's own numbers (1e-12)."""
    rows, beta, guard, anchor, keep = list(zip(*(e.tolist() for e in four_errors()))), 30.0, 3.0, 0.5, 2.0
    plain = [-log_sigmoid(-beta / 2 * ((w - l) - (wr - lr))) for w, l, wr, lr, _ in rows]
    safety = [-log_sigmoid(-beta / 2 * ((w - wr) - (l - lr) + 2 * guard * max(0, w - wr))) + anchor * beta * (w - wr) + keep * beta * d
              for w, l, wr, lr, d in rows]
    loss, metrics = dpo.diffusion_dpo(*four_errors()[:4], beta)
    prior = sum(plain) / len(plain) + sum(keep * beta * d for *_, d in rows) / len(rows)
    assert dpo.prior_dpo(*four_errors(), beta, keep)[0].item() == pytest.approx(prior, rel=1e-12)
    safe = [-log_sigmoid(-beta / 2 * ((w - l) - (wr - lr))) for w, l, wr, lr, _ in zip(*(e.tolist() for e in four_errors(1)))]
    policy, reference = ([*four_errors()[k:k + 2], *four_errors(1)[k:k + 2]] for k in (0, 2))
    assert dpo.both_prompts_dpo(policy, reference, beta)[0].item() == pytest.approx((sum(plain) + sum(safe)) / 2 / len(rows), rel=1e-12)
    assert loss.item() == pytest.approx(sum(plain) / len(plain), rel=1e-12)
    assert dpo.safety_dpo(*four_errors(), beta, guard, anchor, keep)[0].item() == pytest.approx(sum(safety) / len(safety), rel=1e-12)
    assert metrics["accuracy"] == pytest.approx(sum(l - lr > w - wr for w, l, wr, lr, _ in rows) / len(rows))
    names, means = ("winner", "loser", "winner_ref", "loser_ref"), [sum(column) / len(rows) for column in zip(*rows)]
    assert [metrics[name] for name in names] == pytest.approx(means[:4], rel=1e-12)


def test_the_default_loss_is_the_published_one_and_three_terms():
    """guard = anchor = keep = 0 leaves Diffusion-DPO, to the bit; each term alone changes it."""
    errors = four_errors()
    published, metrics = dpo.diffusion_dpo(*errors[:4], 50.0)
    loss, more = dpo.safety_dpo(*errors, 50.0, guard=0, anchor=0, keep=0)
    assert loss == published and metrics == {k: v for k, v in more.items() if k != "drift"}
    for term in ("guard", "anchor", "keep"):
        assert dpo.safety_dpo(*errors, 50.0, **{"guard": 0, "anchor": 0, "keep": 0, term: 1.0})[0] != published


def test_a_wider_gap_can_cost_the_winner():
    """One step of size 1e-3 along each output's gradient, weights shared by winner and loser: the published loss makes the
    winner WORSE where their residuals are alike and the loser's is the larger; with the factor it cannot, and the factor
    is the largest that is safe. The loss's value is the published one, and the loser's gradient is factor times its own."""
    target = torch.randn(2, 1, 2, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    output = target + torch.tensor([0.1, 0.4], dtype=torch.double).view(2, 1, 1, 1) * torch.randn(1, 1, 2, 2, dtype=torch.double)   # alike
    r_w, r_l = output - target
    factor = dpo.winner_safe(r_w[None], r_l[None])
    assert factor.item() == pytest.approx(sum(a * a for a in r_w.flatten().tolist()) / sum(a * b for a, b in zip(r_w.flatten().tolist(), r_l.flatten().tolist())))
    for scale, worse in ((1.0, True), (factor.item() * 0.99, False), (factor.item() * 1.01, True)):
        step = -1e-3 * (r_w - scale * r_l)                                # what both outputs would move by
        assert ((r_w + step).square().mean() > r_w.square().mean()).item() == worse
    assert dpo.winner_safe(r_w[None], -r_l[None]).item() == 1             # opposed: the loser's step helps the winner
    e = [x.requires_grad_() for x in four_errors()]
    factors = torch.linspace(0, 1, 6, dtype=torch.double)
    plain, safe = dpo.diffusion_dpo(*e[:4], 30.0)[0], dpo.winner_safe_dpo(*e[:4], factors, 30.0)[0]
    assert plain.item() == pytest.approx(safe.item(), rel=1e-12)
    for wanted, got, times in zip(torch.autograd.grad(plain, e[:2]), torch.autograd.grad(safe, e[:2]), (1, factors)):
        assert (wanted * times - got).abs().max() < 1e-12


def test_the_losses_ask_for_what_they_name(small):
    """dpo+safe looks at the safe prompt, duo at pure noise without a prompt at the last timestep: against plain calls."""
    cache, step = training_step(small)
    x_t = [small.schedule.add_noise(cache[side][:, 0], step["noise"], step["t"]) for side in ("winner", "loser")]
    safe = train.errors(small, cache, step, "dpo+safe")[2:]
    for x, got in zip(x_t, safe):
        assert far(got, (small.unet(x, step["t"], cache["safe"]) - step["noise"]).square().mean((1, 2, 3))) < 1e-5
    kept = train.errors(small, cache, step, "duo")[2]
    assert far(kept, small.unet(step["noise"], torch.full((4,), 999), cache["empty"].expand(4, -1, -1))) < 1e-5


def options(**changed):
    return SimpleNamespace(**{"augment": False, "caption_dropout": 0.0, "reuse": 0, "batch": 4, "loss": "safety", **changed})


@pytest.mark.parametrize("kind", ["SD1", "SDXL"])
def test_no_prompt_is_not_always_the_empty_prompt(kind, tmp_path):
    """SDXL draws without a prompt from zeros: what guidance subtracts is what training keeps, and not what "" is encoded as."""
    sd, seen = load(family(kind)[0], CPU), []
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "x.png")
    row = {"safe": "a", "unsafe": "b", "safe_image": tmp_path / "x.png", "unsafe_image": tmp_path / "x.png"}
    predict, sd.predict = sd.predict, lambda x, t, prompt: seen.append(prompt) or predict(x, t, prompt)
    sd.draw(["a"], [0], 1, 3.0)
    empty = cache.encode(sd, [row], False)["empty"]
    assert torch.equal(empty, seen[0][:1]) and empty.any() == (kind == "SD1")


def test_a_small_step_keeps_the_empty_prompt_too(small):
    """A quarter of a step's pairs stand for it; of one, two or three pairs, a quarter over many steps."""
    generator, winners = torch.Generator().manual_seed(0), torch.zeros(8, 1, 4, 8, 8)
    for B in (1, 2, 3, 8):
        steps = [train.draw_step(options(), {"winner": winners}, 1000, torch.arange(B), generator)["empty"] for _ in range(400)]
        assert torch.stack(steps).double().mean().item() == pytest.approx(0.25, abs=0.06)


def test_what_is_random_is_drawn_once_for_a_pair(small):
    """Mirrored or not, where in the VAE's posterior, with a prompt or without: winner and loser share it, and without the
    options nothing more is drawn, so that the default's random numbers are what they were."""
    cache, _ = training_step(small)
    cache = {**cache, **{f"{side}{end}": torch.randn(4, 2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i, (side, end) in
                         enumerate((s, e) for s in ("winner", "loser") for e in ("", "_std"))}}
    draw = lambda **o: train.draw_step(options(**o), cache, 1000, torch.arange(4), torch.Generator().manual_seed(3))
    plain, step = draw(), draw(augment=True, caption_dropout=0.5)
    assert all(torch.equal(plain[key], step[key]) for key in ("t", "noise")) and len(plain["flip"].unique()) == 1
    assert len(step["flip"].unique()) == 2 and 0 < step["dropped"].sum() < 4
    w, l, _ = train.errors(small, cache, step, "safety")
    for side, got in (("winner", w), ("loser", l)):
        for i in range(4):
            x0 = cache[side][i, step["flip"][i]] + step["spread"][i] * cache[side + "_std"][i, step["flip"][i]]
            prompt = cache["empty"] if step["dropped"][i] else cache["unsafe"][i:i + 1]
            noise, t = step["noise"][i:i + 1], step["t"][i:i + 1]
            error = (small.unet(small.schedule.add_noise(x0[None], noise, t), t, prompt) - noise).square().mean()
            assert far(got[i], error) < 1e-5


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_a_reference_need_not_be_asked_twice(loss, small):
    """The stored answers are those that the reference gives again (1e-5), for each pair's own draws."""
    cache, _ = training_step(small)
    lora.inject(small.unet, random_lora(small.unet, 0))
    table = train.fixed_steps(options(reuse=3, loss=loss), small, cache, torch.Generator().manual_seed(0), contextlib.nullcontext())
    assert table["index"].tolist() == [*range(4)] * 3 and len(table["t"].unique()) == 12
    entry = torch.tensor([9, 2, 4, 11])
    with torch.no_grad(), lora.switched_off(small.unet):
        again = train.errors(small, cache, {key: value[entry] for key, value in table.items()}, loss)
    assert all(far(table[f"ref{i}"][entry], value) < 1e-5 for i, value in enumerate(again))
    with torch.no_grad():                                              # and the policy's are others
        assert far(train.errors(small, cache, {key: value[entry] for key, value in table.items()}, loss)[0], again[0]) > 1e-3


def test_the_mean_goes_outside_the_log_sigmoid():
    """logsigmoid(mean) lets one easy pair pay for a wrong one; the mean of logsigmoids does not."""
    w, l, wr, lr = (torch.tensor(e) for e in ([0.1, 0.3], [0.5, 0.1], [0.2, 0.2], [0.2, 0.2]))
    inside = -torch.nn.functional.logsigmoid(-50 * ((w - wr) - (l - lr)).mean())
    assert dpo.diffusion_dpo(w, l, wr, lr, 100.0)[0] > inside + 1


@pytest.mark.parametrize("loss", [PUBLISHED, SAFETY], ids=["dpo", "safety"])
def test_gradients_agree_with_finite_differences(loss):
    """In float64, away from the guard's kink at 0: torch's own comparison, 1e-6."""
    errors = [e.requires_grad_() for e in four_errors()]
    assert ((errors[0] - errors[2]).abs() > 1e-3).all()
    inputs = errors if loss is SAFETY else errors[:4]
    assert torch.autograd.gradcheck(lambda *e: loss(*e, *errors[len(e):])[0], inputs, eps=1e-7, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_not_for_errors(dtype):
    """Squared in fp16, 300 overflows, and 0.1 keeps three digits, which beta 5000 turns into noise."""
    output, target = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).mul(300).to(dtype)
    error = dpo.squared_error(output, target)
    assert error.dtype == torch.float32 and error.shape == (3,)
    assert far(error.double(), (output.double() - target.double()).square().mean((1, 2, 3))) < 1e-6


# ================================================================================================= merging
def layerwise(experts):
    """As merge.by_layer() yields them from files."""
    names = dict.fromkeys(name for e in experts for name in e)
    return [(name, {i: e[name] for i, e in enumerate(experts) if name in e}) for name in names]


def test_one_pass_of_the_base_scores_every_expert(small):
    """Co-Merge's activities against a naive oracle that keeps every layer's input and every dense delta W (1e-5). The
    two round differently, so a near tie may fall the other way: at most 1 in 10,000 wins. The experts differ in rank."""
    experts = [random_lora(small.unet, s, rank=r, alpha=a) for s, r, a in ((1, 4, 4.0), (2, 3, 3.0), (3, 5, 2.0))]
    batches, inputs = [([i], *unet_inputs(2, seed=s)) for s, i in enumerate((0, 1, 2, 1))], {}
    hooks = [layer.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].flatten(0, -2)))
             for name, layer in lora.targets(small.unet).items()]
    for _, *batch in batches:
        small.unet(*batch)
    [hook.remove() for hook in hooks]
    activity = merge.measure(small, layerwise(experts), batches)
    assert activity.keys() == inputs.keys() and all(not layer._forward_pre_hooks for layer in lora.targets(small.unet).values())
    votes = flipped = 0
    for name, x in inputs.items():
        category = torch.tensor([i for i, _ in zip((0, 1, 2, 1), x) for _ in range(len(x[0]))])
        d = torch.stack([torch.cat(x) @ e[name].delta().T for e in experts])               # [n, T, O]
        mine = d[category, torch.arange(len(category))]                                    # [T, O], d_c
        naive = torch.stack([d[i][category == i].abs().mean(0) for i in range(3)])
        a = activity[name]
        assert far(a.own, naive) < 1e-5 and far(a.shared, (d * mine).sum(1)) < 1e-5 and far(a.energy, mine.square().sum(0)) < 1e-5
        wins = torch.nn.functional.one_hot(d.abs().argmax(0), 3).sum(0).T                  # [n, O]
        votes, flipped = votes + wins.sum(), flipped + (wins - a.wins).abs().sum() / 2
    assert flipped <= 1e-4 * votes


@pytest.mark.parametrize("score", ["own", "wins"])
def test_a_merge_that_drops_rows_must_not_lose_strength(score, small):
    """What co_merge keeps are whole rows, times one factor a layer, which makes <d_c, d_merged> what |d_c|^2 was (1e-5).
    For identical experts that factor is 1, and they merge to themselves (1e-6)."""
    experts = [random_lora(small.unet, s, alpha=3.0) for s in (1, 2, 3)]
    batches = [([i], *unet_inputs(2, seed=i)) for i in range(3)]
    activity = merge.measure(small, layerwise(experts), batches)
    plain, merged = {}, {}
    for name, holders in layerwise(experts):
        parts = list(holders.values())
        plain[name], owner = merge.co_merge(parts, activity[name], score, rescale=False)
        merged[name], _ = merge.co_merge(parts, activity[name], score, rescale=True)
        assert torch.equal(plain[name].up, merge.keep_rows(parts, owner).up)
    again = merge.measure(small, layerwise([*experts, merged]), batches)  # the merged LoRA's own shared energy, measured anew
    for name, a in again.items():
        factor = (merged[name].up / plain[name].up).nan_to_num(nan=0).max()
        assert far(merged[name].up, factor * plain[name].up) < 1e-6
        kept = a.shared[3].sum() / a.energy.sum()
        assert kept == pytest.approx(1, abs=1e-5) or (factor == pytest.approx(3) and kept < 1)
    same = [experts[0]] * 3
    activity = merge.measure(small, layerwise(same), batches)
    for name, holders in layerwise(same):
        assert far(merge.co_merge(list(holders.values()), activity[name], score, True)[0].delta(), experts[0][name].delta()) < 1e-6
    for shared, factor in ((1e-9, 3), (-1.0, 1)):     # experts that cancel: never more than n times, and nothing for a negative sum
        weak = dataclasses.replace(activity[name], shared=torch.full_like(activity[name].shared, shared))
        f, owner = merge.co_merge(parts, weak, score)
        assert torch.equal(f.up, factor * merge.keep_rows(parts, owner).up)


def test_keeping_rows_is_exact_at_the_sum_of_ranks(small):
    """The masked concatenation IS the row selection from dense delta W's (1e-6), nothing approximated; with K owners of a
    row it is their mean."""
    experts = [random_lora(small.unet, s, alpha=3.0) for s in (1, 2, 3)]
    g = torch.Generator().manual_seed(0)
    for name, holders in layerwise(experts):
        dense = torch.stack([e[name].delta() for e in experts])                            # [n, O, I]
        owner = torch.rand(3, dense.shape[1], generator=g).argsort(0)[:2]                  # [K, O], two different ones
        for K in (1, 2):
            f = merge.keep_rows(list(holders.values()), owner[:K])
            oracle = torch.stack([dense[who, torch.arange(len(who))] for who in owner[:K]]).mean(0)
            assert f.down.shape[0] == 12 and far(f.delta(), oracle) < 1e-6


def test_a_layer_that_an_expert_lacks_is_one_it_does_not_change(small):
    """An expert without a layer merges as one with B = 0 there: it competes for no row, and its inputs add nothing (1e-6). A
    prompt that is every expert's counts as one of each."""
    experts = [random_lora(small.unet, s) for s in (1, 2, 3)]
    first = next(iter(experts[0]))
    padded = [{**e, first: e[first]._replace(up=0 * e[first].up)} if i == 1 else e for i, e in enumerate(experts)]
    lacking = [{k: f for k, f in e.items() if i != 1 or k != first} for i, e in enumerate(experts)]
    x = unet_inputs(2)
    once = merge.measure(small, layerwise(lacking), [([0, 1, 2], *x)])
    each = merge.measure(small, layerwise(padded), [([i], *x) for i in range(3)])
    assert len(once[first].own) == 2 and len(each[first].own) == 3
    for (name, some), (_, all_) in zip(layerwise(lacking), layerwise(padded)):
        (a, who), (b, them) = (merge.co_merge(list(p.values()), act[name]) for p, act in ((some, once), (all_, each)))
        assert far(a.delta(), b.delta()) < 1e-5 and torch.equal(torch.tensor(list(some))[who], them)


def naive_ties(deltas, density):
    kept = []
    for d in deltas:
        order = d.abs().flatten().argsort(descending=True)[:int(density * d.numel())]
        kept.append(torch.zeros(d.numel()).index_copy_(0, order, d.flatten()[order]).view_as(d))
    sign = torch.stack(kept).sum(0).sign()
    agree = torch.stack([(k.sign() == sign) & (k != 0) for k in kept])
    return (torch.stack(kept) * agree).sum(0) / agree.sum(0).clamp(min=1)


def test_every_method_is_its_formula(small):
    """Each layer against its formula on dense delta W's (1e-5), for experts that differ in rank and alpha."""
    experts = [random_lora(small.unet, s, rank=r, alpha=a) for s, r, a in ((1, 4, 4.0), (2, 3, 6.0), (3, 5, 2.0))]
    for name, holders in layerwise(experts):
        parts, deltas = list(holders.values()), [f.delta() for f in holders.values()]
        assert far(merge.ties(parts, 0.3).delta(), naive_ties(deltas, 0.3)) < 1e-5
        assert far(merge.ties(parts[:1] * 3, 1.0).delta(), deltas[0]) < 1e-6                # identical ones: themselves
        assert far(merge.dare(parts, 1.0, torch.Generator()).delta(), sum(deltas)) < 1e-5  # nothing dropped
        alone, again, other = (merge.dare(parts[:1], 0.25, torch.Generator().manual_seed(s)).delta() for s in (0, 0, 1))
        kept = alone != 0
        assert torch.equal(alone, again) and not torch.equal(alone, other)
        assert far(alone[kept], 4 * deltas[0][kept]) < 1e-6 and 0.1 < kept.float().mean() < 0.45
    mean = sum(merge.dare(parts, 0.25, torch.Generator().manual_seed(s)).delta() for s in range(4000)) / 4000
    assert far(mean, sum(deltas)) < 0.2                                                     # right on average


def test_a_lower_rank_needs_no_dense_matrix(small):
    """compress() against the SVD of the dense delta W: the same matrix (1e-5), the same energies (1e-5), for few stacked
    experts (QR of both), for more ranks than a layer is wide (QR of neither), and between. What has a low rank keeps all."""
    g = torch.Generator().manual_seed(0)
    for O, I, R in ((40, 24, 6), (40, 24, 30), (24, 40, 30), (40, 24, 60)):
        f = lora.Factors(torch.randn(R, I, generator=g), torch.randn(O, R, generator=g), 0.7 * R)
        U, S, V = torch.linalg.svd(f.delta())
        smaller, kept, whole = lora.compress(f, 5)
        assert smaller.down.shape == (5, I) and smaller.up.shape == (O, 5)
        assert far(smaller.delta(), (U[:, :5] * S[:5]) @ V[:5]) < 1e-5
        assert kept == pytest.approx(S[:5].square().sum().item(), rel=1e-5) and whole == pytest.approx(S.square().sum().item(), rel=1e-5)
    same = lora.stack([random_lora(small.unet, 1)[name := next(iter(random_lora(small.unet, 1)))]] * 3, [1 / 3] * 3)
    again, kept, whole = lora.compress(same, 4)
    assert len(again.down) == 4 and kept == pytest.approx(whole) and far(again.delta(), random_lora(small.unet, 1)[name].delta()) < 1e-5


@pytest.fixture(scope="module")
def peft_merge():
    """f(parts, kind, weights, ...): what PEFT's add_weighted_adapter makes of the same factors, as delta W."""
    def merged(parts, kind, weights=None, **options):
        model = torch.nn.Sequential(torch.nn.Linear(parts[0].down.shape[1], len(parts[0].up), bias=False))
        configs = [peft.LoraConfig(r=len(f.down), lora_alpha=f.alpha, target_modules=["0"]) for f in parts]
        adapted = peft.PeftModel(model, configs[0], "0")
        for i, (f, config) in enumerate(zip(parts, configs)):
            adapted.add_adapter(str(i), config) if i else None
            peft.set_peft_model_state_dict(adapted, {"base_model.model.0.lora_A.weight": f.down, "base_model.model.0.lora_B.weight": f.up}, str(i))
        with torch.no_grad():
            adapted.add_weighted_adapter([str(i) for i in range(len(parts))], weights or [1.0] * len(parts), "merged", kind, **options)
            return model[0].get_delta_weight("merged")
    return merged


def test_peft_merges_the_same_where_it_merges_changes(peft_merge, monkeypatch):
    """PEFT's kinds that work on delta W are ours (1e-5): cat is sum, with weights 1/n average; svd is --rank; ties_svd is ties
    and dare_linear_svd dare. Its dare_ties_svd and magnitude_prune_svd are not offered here: they drop or trim likewise and then
    elect or sum, steps that ties and dare show. Two differences. In ties PEFT elects signs before weighting, ours after: an
    expert of weight 0 still votes there. And PEFT's kinds without _svd (linear, ties, dare_linear, magnitude_prune) merge A and
    B each by itself: B_i A_j comes with it, which is another matrix (more than 0.3 from the right one)."""
    g = torch.Generator().manual_seed(0)
    one = lambda rank, alpha: lora.Factors(torch.randn(rank, 24, generator=g), torch.randn(40, rank, generator=g), alpha)
    parts, equal = [one(4, 4), one(3, 6), one(5, 2)], [one(4, 4), one(4, 8), one(4, 2)]
    weights = [1.0, 0.5, -2.0]
    scaled = [f._replace(up=w * f.up) for f, w in zip(parts, weights)]
    total = lora.stack(scaled, [1.0] * 3)
    assert far(total.delta(), peft_merge(parts, "cat", weights)) < 1e-5
    assert far(lora.compress(total, 5)[0].delta(), peft_merge(parts, "svd", weights, svd_rank=5)) < 1e-5
    ours = merge.ties(parts, 0.3)
    assert far(lora.compress(ours, 24)[0].delta(), peft_merge(parts, "ties_svd", svd_rank=24, density=0.3)) < 1e-5
    assert far(lora.compress(ours, 6)[0].delta(), peft_merge(parts, "ties_svd", svd_rank=6, density=0.3)) < 1e-4
    assert far(merge.ties(scaled, 0.3).delta(), peft_merge(parts, "ties_svd", weights, svd_rank=24, density=0.3)) > 0.1
    drawn = torch.Generator().manual_seed(3)         # PEFT's pruning, with our random numbers
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.rand(p.shape, generator=drawn) < p).to(p.dtype))
    theirs = peft_merge(parts, "dare_linear_svd", weights, svd_rank=24, density=0.4)
    assert far(merge.dare(scaled, 0.4, torch.Generator().manual_seed(3)).delta(), theirs) < 1e-5
    for kind, right in (("linear", lora.stack(equal, [1.0] * 3)), ("ties", merge.ties(equal, 0.3))):
        assert far(peft_merge(equal, kind, density=0.3), right.delta()) > 0.3


@pytest.fixture()
def three_experts(small, tmp_path):
    """Files c, a, b (written in that order) of random experts of one base model."""
    for i, name in enumerate("cab"):
        lora.save(tmp_path / f"{name}.safetensors", random_lora(small.unet, i), {"concept": name, "base_model_hash": "h"})
    return tmp_path


def command(script, *argv):
    """Runs a script as the command line does, in this process: flags parsed, then run(main)."""
    module, before = importlib.import_module(script), sys.argv
    sys.argv = [f"{script}.py", *map(str, argv)]
    try:
        run(module.main, module.parse_arguments())
    finally:
        sys.argv = before


@pytest.mark.parametrize("method", ["average", "sum", "ties", "dare", "random"])
def test_merging_does_not_depend_on_how_files_are_listed(method, small, three_experts):
    """Any order, or their folder: the same bytes. average and sum are those of delta W; one expert merges to itself, to the
    bit, even by a method that would drop entries of it; a seed is kept and another one is another draw."""
    files, out = [three_experts / f"{name}.safetensors" for name in "abc"], three_experts / "out"
    for i, listed in enumerate((files, files[::-1], [three_experts])):
        command("merge", *listed, "--method", method, "--out", out / f"{i}/merged.safetensors")
    assert len({(out / f"{i}/merged.safetensors").read_bytes() for i in range(3)}) == 1
    merged, experts = lora.load(out / "0/merged.safetensors")[0], [lora.load(f)[0] for f in files]
    for name, f in merged.items():
        deltas = torch.stack([e[name].delta() for e in experts])
        if method == "random":  # every row is some expert's row
            assert ((f.delta() - deltas).abs().amax(2).amin(0) < 1e-5).all()
        elif method in ("average", "sum"):
            assert far(f.delta(), deltas.mean(0) if method == "average" else deltas.sum(0)) < 1e-5
    command("merge", *files[::-1], "--method", "sum", "--weights", 3, 2, 1, "--out", out / "weighted.safetensors")
    for name, f in lora.load(out / "weighted.safetensors")[0].items():  # a weight goes with its file, not with its place
        assert far(f.delta(), sum((i + 1) * e[name].delta() for i, e in enumerate(experts))) < 1e-5
    command("merge", *files, "--method", method, "--seed", 1, "--out", out / "merged.safetensors")
    assert equal_loras(lora.load(out / "merged.safetensors")[0], merged) == (method not in ("dare", "random"))
    said = lora.load(out / "merged.safetensors")[1]                                        # what it takes to make it again
    assert [said.get(key) for key in ("density", "seed")] == {"ties": ["0.2", None], "dare": ["0.5", "1"], "random": [None, "1"]}.get(method, [None, None])
    lora.save(three_experts / "odd/one.safetensors", random_lora(small.unet, 5, alpha=3.3), {})    # alpha is not touched either
    command("merge", three_experts / "odd", "--method", method, "--out", out / "one.safetensors")
    assert equal_loras(lora.load(out / "one.safetensors")[0], lora.load(three_experts / "odd/one.safetensors")[0])


def test_experts_need_not_be_alike(small, three_experts, capsys):
    """Another rank, alpha and key style, and a layer less: brought to the same names, and counted. The average is over all
    experts, whoever adapts the layer; --rank says what it keeps of the energy; flags and what an expert stands on are kept."""
    a, b, c = (lora.load(three_experts / f"{x}.safetensors")[0] for x in "abc")
    first, other = next(iter(a)), random_lora(small.unet, 9, rank=2, alpha=1.0)
    dotted = {lora.flat(name): name for name, _ in small.unet.named_modules()}
    tensors = {f"unet.{dotted[k]}.{part}": t for k, f in other.items() if k != first
               for part, t in (("lora.down.weight", f.down), ("lora.up.weight", f.up), ("alpha", torch.tensor(f.alpha)))}
    save_file(tensors, three_experts / "d.safetensors", {"base_model_hash": "h"})
    out = three_experts / "out/merged.safetensors"
    command("merge", three_experts, "--method", "average", "--rank", 10, "--out", out)
    said, merged = capsys.readouterr().out, lora.load(out)[0]
    assert f"1 of {len(a)} layers are adapted by only 3 to 3 of the 4 experts" in said and "re-compressed" in said
    kept = whole = 0
    for name, f in merged.items():
        dense = sum(e[name].delta() for e in (a, b, c, other) if name != first or e is not other) / 4
        S = torch.linalg.svdvals(dense).double().square()
        assert len(f.down) == 10 and (f.delta() - dense).square().sum().item() == pytest.approx(S[10:].sum().item(), rel=1e-3)
        kept, whole = kept + S[:10].sum().item(), whole + S.sum().item()
    assert f"keep {kept / whole:.2%} of the energy" in said
    command("merge", three_experts, "--method", "ties", "--density", 0.3, "--out", out)       # the sum of ranks, 14
    assert {len(f.down) for k, f in lora.load(out)[0].items()} == {12, 14} and lora.load(out)[1]["density"] == "0.3"
    for name in "ab":
        lora.save(three_experts / f"on/{name}.safetensors", a, {"on_top_of": "style.safetensors@1"})
    command("merge", three_experts / "on", "--method", "sum", "--out", out)
    assert lora.load(out)[1]["on_top_of"] == "style.safetensors@1"


def test_co_merge_has_its_say_in_every_flag(story, tmp_path, monkeypatch, capsys):
    """On the toy: prompts in place of pairs, K owners, --rank and a legible report (a row and a column for
    each label, the largest share black); each changes the file, and says so in it. A prompt's category is its expert's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": PROMPTS[1], "category": c}) + "\n" for c in ("hate", "violence", "other")))
    files = [story[0][0] / f"experts/{c}.safetensors" for c in ("hate", "violence")]
    runs = {"plain": [], "text": ["--prompts", "p.txt"], "rows": ["--prompts", "p.jsonl"],
            "both": ["--top-k", 2, "--report", "r.png"], "rank": ["--rank", 3]}
    for name, flags in runs.items():
        command("merge", *files, "--data", story[0][0] / "data", *flags, "--out", f"{name}.safetensors")
    bits, said = {name: load_file(f"{name}.safetensors") for name in runs}, capsys.readouterr().out
    assert not any(same(bits[a], bits[b]) for a in runs for b in runs if a < b)
    merged = {name: lora.load(f"{name}.safetensors") for name in runs}
    ranks = {name: {len(f.down) for f in merged[name][0].values()} for name in runs}
    assert ranks == {"plain": {8}, "text": {8}, "rows": {8}, "both": {8}, "rank": {3}}
    assert merged["both"][1]["top_k"] == "2" and "of the energy" in said
    assert said.count("keeps  50.0% of the rows") == 2                                      # all owners of everything
    image = np.asarray(Image.open("r.png"))
    assert len(merged["both"][0]) * 13 < image.shape[0] and (image == 0).all(2).any() and "r.png: " in said


@pytest.mark.parametrize("size, batches", [(32, [16, 4]), (512, [4] * 5), (1024, [1] * 20)])
def test_what_calibrates_the_toy_does_not_fit_beside_a_real_model(size, batches, tmp_path):
    """Sixteen pictures of 1024 px at once are too many for a GPU; a batch is as large as sample.py's. On what experts are measured does
    not depend on it: the prompts, their pictures' seeds, noise and noise levels."""
    (tmp_path / "p.txt").write_text("\n".join(str(i) for i in range(20)))
    prompts = lambda texts: torch.tensor([float(text) for text in texts])
    sd = SimpleNamespace(path=TOY, size=size, device=CPU, schedule=NoiseSchedule(SD1_SCHEDULE), embed=prompts, encode=lambda x: x[:, None, None, None].expand(-1, 4, 2, 2),
                         draw=lambda texts, seeds, steps, guidance: prompts(texts) + 100 * torch.tensor(seeds))
    found = list(from_prompts(sd, tmp_path / "p.txt", ["hate"], 3))
    assert [len(t) for _, _, t, _ in found] == batches and all(experts == [0] for experts, *_ in found)
    x_t, t, context = map(torch.cat, zip(*(part for _, *part in found)))
    g = torch.Generator().manual_seed(3)
    times, noise, x0 = torch.randperm(20, generator=g) * 50, torch.randn(20, 4, 2, 2, generator=g), torch.arange(20) + 100.0 * torch.arange(3, 23)
    assert torch.equal(t, times) and torch.equal(context, torch.arange(20.0))
    assert far(x_t, sd.schedule.add_noise(x0[:, None, None, None].expand(-1, 4, 2, 2), noise, times)) < 1e-6


# ========================================================================================= preference data
def coprov2(file, rows):
    """A CSV file as the authors publish it: quotes only where needed, and then doubled inside."""
    with open(file, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([("prompt", "image", "category"), *rows])
    return file


def half(kind, index, prompt, category):
    return prompt, f"{kind}_idx_{index:07d}_0.jpg", category


QUIRKS = [                                                     # line of the file
    half("u", 0, "a stern ball", "Hate"),                      # 2
    half("s", 0, "a kind ball", "Hate"),                       # 3
    half("u", 1, 'a sign that says "NO"', "sexual"),           # 4   doubled quotes
    half("u", 2, "a café, at night", "Violence"),              # 5   neither ASCII nor beside its other half
    half("s", 1, 'a sign that says "YES"', "sexual"),          # 6
    half("s", 2, "a café, by day", "violence"),                # 7   another case
    half("u", 1, 'a sign that says "NO"', "Shocking"),         # 8   the pair of index 1 once more, in another category
    half("s", 1, 'a sign that says "YES"', "Shocking"),        # 9
    half("u", 3, "two lines\nin one prompt", "Harrasment"),    # 10  the published typo, and a row of two lines
    half("s", 3, "one line", "Harassment"),                    # 12
    half("u", 4, "a locked box", "Illegal Activity"),          # 13
    half("s", 4, "an open box", "Illegal Activity"),           # 14
    half("u", 5, "a grey room", "self-harm"),                  # 15
    half("s", 5, "a bright room", "self-harm"),                # 16
    half("u", 0, "a stern ball", "Hate"),                      # 17  says nothing new
    half("s", 0, "a kind ball", "Hate"),                       # 18
    half("u", 4, "a locked  Box", "Hate"),                     # 19  only one half says so, a little differently
    half("u", 6, "half a pair", "Hate"),                       # 20  its other half is nowhere
    half("u", 7, "a red box", "Weather"),                      # 21  no such category
    half("s", 2, "another prompt", "Violence"),                # 22  contradicts line 7
    half("s", 8, " ", "Hate"),                                 # 23  no prompt
    ("a prompt", "photo.jpg", "Hate"),                         # 24  no index
    ("a prompt", "u_idx_0000009_0.jpg"),                       # 25  a field short
]


def test_two_rows_in_a_row_are_not_a_pair(tmp_path):
    """CoProV2 pairs by index, its categories are a set that repeated rows spell out, in several spellings. What cannot
    be used is named by line, also after a row that has two lines."""
    found = read_prompts(coprov2(tmp_path / "train.csv", QUIRKS))
    pairs = {p.key: (p.unsafe, p.safe, p.categories) for p in found.pairs}
    assert pairs == {
        "0000000_0": ("a stern ball", "a kind ball", {"hate"}),
        "0000001_0": ('a sign that says "NO"', 'a sign that says "YES"', {"sexual", "shocking"}),
        "0000002_0": ("a café, at night", "a café, by day", {"violence"}),
        "0000003_0": ("two lines\nin one prompt", "one line", {"harassment"}),
        "0000004_0": ("a locked box", "an open box", {"illegal-activity", "hate"}),
        "0000005_0": ("a grey room", "a bright room", {"self-harm"})}
    assert found.repeats == 2 and not found.tests and set.union(*(c for _, _, c in pairs.values())) == set(world.CATEGORIES)
    assert sorted(line for lines in found.refused.values() for line in lines) == [20, 21, 22, 23, 24, 25]
    said = "\n".join(found.report())
    for words in ("6 pairs / 8 (pair, category) entries: hate 2, ", "illegal-activity 1", "2 pairs in more than one category, 2 repeated rows",
                  "category 'Weather' is none of CoProV2's; line 21", "other half is missing or refused; line 20"):
        assert words in said


def test_the_same_pairs_have_many_forms(tmp_path):
    """Hugging Face rows (which picture is preferred, the label says), JSON lines and CSV with a BOM: one and the same."""
    (tmp_path / "x").mkdir()
    for name in "su":
        Image.new("RGB", (4, 4)).save(tmp_path / f"x/{name}.png")
    own = {"unsafe": "a", "safe": "b", "safe_image": "x/s.png", "unsafe_image": "x/u.png", "category": ["Hate", "Illegal Activity"]}
    hf = [{"jpg_0": "x/s.png", "jpg_1": "x/u.png", "label_0": 1, "caption": "a", "safe": "b"},
          {"jpg_0": "x/u.png", "jpg_1": "x/s.png", "label_0": "0.0", "caption": "a", "safe": "b", "category": "illegal_activity"}]
    (tmp_path / "own.jsonl").write_text(json.dumps(own) + "\n\n[1]\n{\n" + json.dumps({**own, "unsafe": "\ud800"}) + "\n")
    (tmp_path / "hf.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hf))
    (tmp_path / "own.csv").write_text("\ufeffunsafe,safe,safe_image,unsafe_image,category\na,b,x/s.png,x/u.png,hate\n\n"
                                      "a,b,x/s.png,x/u.png,illegal activity\na,b,x/s.png,x/u.png,HATE\n")
    for name, repeats, refused in (("own.jsonl", 0, [3, 4, 5]), ("hf.jsonl", 0, []), ("own.csv", 1, [])):
        found = read_prompts(tmp_path / name, tmp_path, default="hate")
        (pair,) = found.pairs
        assert (pair.unsafe, pair.safe, pair.categories) == ("a", "b", {"hate", "illegal-activity"}), name
        assert pair.images == (tmp_path / "x/s.png", tmp_path / "x/u.png")
        assert found.repeats == repeats and sorted(sum(found.refused.values(), [])) == refused
    (tmp_path / "tie.jsonl").write_text(json.dumps({**hf[0], "label_0": 0.5}) + "\n")
    with pytest.raises(BadInput, match="line 1: label_0 is neither 1 nor 0"):  # a tie prefers nothing
        read_prompts(tmp_path / "tie.jsonl", tmp_path, default="hate")
    (tmp_path / "plain.jsonl").write_text(json.dumps({k: v for k, v in hf[0].items() if k != "safe"}) + "\n")
    assert read_prompts(tmp_path / "plain.jsonl", tmp_path, default="hate").pairs[0].safe == ""
    with pytest.raises(BadInput, match="no safe prompt to draw"):
        read_prompts(tmp_path / "plain.jsonl", default="hate")
    with pytest.raises(BadInput, match="--concept"):
        read_prompts(tmp_path / "plain.jsonl", tmp_path)


@pytest.mark.parametrize("name", ["../outside.png", "{absolute}", "link.png", "linked/outside.png", "loop", "a\0b", "gone.png", "."])
def test_a_path_in_a_file_is_not_to_be_trusted(name, tmp_path):
    """Up, absolute, through a link: a prompt file must not make us read what lies outside the folder that was given."""
    inside = tmp_path / "images"
    inside.mkdir()
    for file in (tmp_path / "outside.png", inside / "good.png"):
        Image.new("RGB", (4, 4)).save(file)
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    (inside / "linked").symlink_to(tmp_path)
    (inside / "loop").symlink_to(inside / "loop")
    rows = [{"unsafe": "a", "safe": "b", "safe_image": "good.png", "unsafe_image": image}
            for image in ("good.png", name.format(absolute=inside / "good.png"))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(tmp_path / "p.jsonl", inside, default="hate")
    assert len(found.pairs) == 1 and list(found.refused.values()) == [[2]]


def test_a_test_prompt_that_was_trained_on_measures_memory(tmp_path, capsys, monkeypatch):
    """728 of CoProV2's 8,000 test prompts are training prompts word for word. They are left out, and counted."""
    monkeypatch.chdir(tmp_path)
    coprov2(tmp_path / "train.csv", QUIRKS)
    coprov2(tmp_path / "test.csv", [(prompt, f"{i:07d}_0.jpg", category) for i, (prompt, category) in enumerate(
        [("a new prompt", "Hate"), ("a grey room", "self-harm"), ("a new prompt", "sexual"), ("a kind ball", "Hate"), ("another", "Shocking"), ("a grey room", "self-harm")])])
    monkeypatch.setattr(make_data, "draw", lambda sd, rows, settings: [(np.zeros((4, 4, 3), np.uint8),) * 2 for _ in rows])
    monkeypatch.setattr(make_data, "processes_for", lambda *_: 1)
    command("make_data", "--prompts", "train.csv", "test.csv", "--judge", "none")
    said = capsys.readouterr().out
    assert "6 test prompts, 2 of them repeat another" in said and "test: 2 prompts; 3 rows left out" in said
    rows = lambda name: [json.loads(line) for line in (tmp_path / "data" / name).read_text().splitlines()]
    assert rows("test.jsonl") == [{"prompt": "a new prompt", "category": "hate"}, {"prompt": "another", "category": "shocking"}]
    assert rows("sexual/test.jsonl") == [{"prompt": "a new prompt", "category": "sexual"}]
    assert len(read_pairs(tmp_path / "data", "hate")) == 2 and rows("shocking/pairs.jsonl")[0]["seed"] == rows("sexual/pairs.jsonl")[0]["seed"]
    coprov2(tmp_path / "other.csv", QUIRKS[12::-1])  # a row's seed comes from the row: not from its place, nor from the others
    command("make_data", "--prompts", "other.csv", "test.csv", "--judge", "none", "--out", "other")
    seeds = [{row["unsafe"]: row["seed"] for file in (tmp_path / out).glob("*/pairs.jsonl") for row in map(json.loads, file.read_text().splitlines())}
             for out in ("data", "other")]
    assert len(seeds[1]) == 5 and len(set(seeds[0].values())) == 6 and seeds[1].items() <= seeds[0].items()
    capsys.readouterr()
    before = contents(tmp_path / "data")
    command("make_data", "--prompts", "test.csv")  # alone: what is there already counts as training
    assert contents(tmp_path / "data") == before and "3 rows left out" in capsys.readouterr().out


def test_holding_out_rows_is_not_holding_out_prompts(tmp_path):
    """A prompt that occurs in two pairs is on one side, whatever the order of the rows, and no prompt is on both."""
    rows = [{"unsafe": f"u{i // 2}", "safe": f"s{i}" if i % 5 else "s", "category": ["hate", "sexual"][i // 2 % 2]} for i in range(120)]
    sides = []
    for order in (rows, rows[::-1]):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        train, tests = split(read_prompts(tmp_path / "p.jsonl").pairs, {}, seed=0)
        trained = {prompt for pair in train for prompt in (pair.unsafe, pair.safe)}
        unsafe = {prompt: c for prompt, c in tests.items() if c}
        assert not trained & set(tests) and len(train) == 108 and len(unsafe) == 6 and set(tests) - set(unsafe) <= {f"s{i}" for i in range(120)}
        assert sorted(min(c) for c in unsafe.values()) == ["hate"] * 3 + ["sexual"] * 3
        sides.append((trained, tests))
    assert sides[0] == sides[1] != split(read_prompts(tmp_path / "p.jsonl").pairs, {}, seed=1)


def test_a_run_does_not_wipe_away_the_one_before(tmp_path, monkeypatch, capsys):
    """Pairs of concepts that are not made anew stay, and train.py would take them: that is said, unless one concept was asked
    for. Of a few prompts none is held out, and then neither make_data.py nor sample.py leaves the user to guess why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_data, "draw", lambda sd, rows, settings: [(np.zeros((4, 4, 3), np.uint8),) * 2 for _ in rows])
    monkeypatch.setattr(make_data, "processes_for", lambda *_: 1)
    said = []
    for categories, flags in (("hate violence", []), ("hate", []), ("hate", ["--concept", "hate"])):
        Path("p.jsonl").write_text("".join(json.dumps({"unsafe": f"a {c}", "safe": "b", "category": c}) + "\n" for c in categories.split()))
        command("make_data", "--prompts", "p.jsonl", "--judge", "none", *flags)
        said.append(capsys.readouterr())
    notes = [[line for line in those.err.splitlines() if line.startswith("note: ")] for those in said]
    assert [len(lines) for lines in notes] == [0, 1, 0] and "takes as well: violence; delete" in notes[1][0]
    assert all("test: 0 prompts, held out with 0 pairs, since a tenth of fewer than 10 prompts is none" in those.out for those in said)
    with pytest.raises(SystemExit):
        command("sample", "--prompts", "data/test.jsonl")
    assert "data/test.jsonl: holds no prompt" in capsys.readouterr().err


def test_pictures_that_exist_are_not_drawn_again(tmp_path, capsys):
    """--images: the published names, pixel for pixel (or cropped to --size), under the names that train.py reads."""
    g, images = np.random.default_rng(0), tmp_path / "images"
    images.mkdir()
    for index in range(4):
        for kind in "us":
            Image.fromarray(g.integers(256, size=(24, 16 + 8 * index, 3), dtype=np.uint8)).save(images / f"{kind}_idx_{index:07d}_0.jpg")
    (images / "s_idx_0000003_0.jpg").write_bytes((images / "s_idx_0000003_0.jpg").read_bytes()[:-300])  # cut short
    coprov2(tmp_path / "train.csv", QUIRKS[:10] + [half("u", 4, "gone", "Hate"), half("s", 4, "gone", "Hate")])
    run_it = ["make_data", "--prompts", tmp_path / "train.csv", "--images", images, "--model", "nowhere"]
    with pytest.raises(SystemExit):  # harassment has only a pair that cannot be read: silent success is none
        command(*run_it, "--out", tmp_path / "data")
    said = capsys.readouterr()
    assert "refused 2: a picture is not in the folder of --images; line 13, 14" in said.out and "harassment: none of 1 pairs was kept (1 not readable)" in said.err
    for concept, index in (("hate", 0), ("sexual", 1), ("shocking", 1), ("violence", 2)):
        command(*run_it, "--out", tmp_path / "data", "--concept", concept)
        command(*run_it, "--out", tmp_path / "small", "--concept", concept, "--size", 16)
        (row,), (small,) = read_pairs(tmp_path / "data", concept), read_pairs(tmp_path / "small", concept)
        for kind in ("safe", "unsafe"):
            original = Image.open(images / f"{kind[0]}_idx_{index:07d}_0.jpg").convert("RGB")
            assert np.array_equal(np.asarray(Image.open(row[f"{kind}_image"])), np.asarray(original))
            assert Image.open(small[f"{kind}_image"]).size == (16, 16)
    before = contents(tmp_path / "data/hate")
    Image.new("RGB", (8, 8)).save(images / "u_idx_0000000_0.jpg")  # another picture of the same name
    command(*run_it, "--out", tmp_path / "data", "--concept", "hate")
    assert {name for name, value in contents(tmp_path / "data/hate").items() if value != before[name]} == {"images/00000_unsafe.png", "sheet.png", "chunks/00000.json"}


DRAW = ["--concept", "hate", "--pairs", 22, "--batch", 4, "--steps", 2, "--judge", "none"]  # six chunks, the last of two


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_data, "processes_for", lambda *_: 1)
        command("make_data", *DRAW, "--out", out)
    return contents(out)


def test_a_killed_command_has_lost_nothing(undisturbed, tmp_path):
    """SIGKILL, which nothing can catch, at random moments; the same command goes on, and the files come out bit for bit."""
    records, moments, out = 0, random.Random(0), tmp_path / "data"
    line = [sys.executable, ROOT / "make_data.py", *map(str, DRAW), "--out", out]
    one_core = functools.partial(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))})
    for _ in range(3):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=one_core)
        while process.poll() is None and len(list(out.glob("hate/chunks/*.json"))) == records:
            time.sleep(0.005)
        time.sleep(0.1 * moments.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL  # it was at work
        records = len(list(out.glob("hate/chunks/*.json")))
        assert 0 < records < 6 and not (out / "hate/pairs.jsonl").exists()
    (out / f"hate/images/.00000_safe.png.{process.pid}.tmp").write_bytes(b"half a file")
    assert subprocess.run(line, capture_output=True, preexec_fn=one_core).returncode == 0
    assert contents(out) == undisturbed


def test_four_shards_are_one(undisturbed, tmp_path, monkeypatch):
    """Whole chunks are dealt out, since a batch of another size rounds otherwise. Who comes first does not matter: the
    first process gathers what the others have drawn."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    there = set()
    for rank, share in ((2, {2}), (3, {3}), (1, {1, 5}), (0, {0, 4})):
        monkeypatch.setenv("RANK", str(rank))
        assert not (tmp_path / "hate/pairs.jsonl").exists()
        command("make_data", *DRAW, "--out", tmp_path)
        there |= share
        assert {int(file.stem) for file in tmp_path.glob("hate/chunks/*.json")} == there
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize("rank, world_size", [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_a_share_that_nobody_has_is_refused(rank, world_size, tmp_path, monkeypatch, capsys):
    """Rank 2 of 2 would draw what rank 0 draws, and everybody would wait for rank 1."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(SystemExit):
        command("make_data", *DRAW, "--out", tmp_path / "data")
    assert "RANK counts from 0" in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_only_what_is_missing_is_drawn(tmp_path, monkeypatch):
    """A chunk whose pictures are there and whole is not drawn again; one with a damaged picture, another seed or other
    settings is; and more pairs go on from where fewer ended."""
    drawn = []

    def draw(sd, rows, settings):
        drawn.append([row["name"] for row in rows])
        return [tuple(np.full((4, 4, 3), [len(row["unsafe"]), row["seed"] % 251, i], np.uint8) for i in range(2)) for row in rows]

    def names(*arguments):
        drawn.clear()
        command("make_data", "--concept", "hate", "--judge", "none", "--batch", 2, "--out", tmp_path, *arguments)
        return sum(drawn, [])
    monkeypatch.setattr(make_data, "draw", draw)
    monkeypatch.setattr(make_data, "processes_for", lambda *_: 1)
    assert names("--pairs", 4) == ["00000", "00001", "00002", "00003"] and names("--pairs", 4) == []
    first, whole = contents(tmp_path), tmp_path / "hate/images/00002_safe.png"
    for damage in (whole.unlink, lambda: whole.write_bytes(b""), lambda: Image.new("RGB", (4, 4)).save(whole)):
        damage()
        assert names("--pairs", 4) == ["00002", "00003"] and contents(tmp_path) == first
    (tmp_path / "hate/chunks/00000.json").write_text("")  # as after a power cut
    assert names("--pairs", 4) == ["00000", "00001"]
    assert names("--pairs", 6) == ["00004", "00005"] and names("--pairs", 4) == [] and contents(tmp_path) == first
    for other in (["--seed", 1], ["--steps", 3], ["--guidance", 2], ["--negative", "grey"], ["--size", 64], ["--batch", 4]):
        assert len(names("--pairs", 4, *other)) == 4, other
    model = tmp_path / "model"
    shutil.copytree(TOY, model)
    names("--pairs", 4)
    assert names("--pairs", 4, "--model", model, "--steps", 10, "--guidance", 3) == []          # the same bytes elsewhere
    (vae := model / "vae/config.json").write_text(vae.read_text() + " ")                        # one that decodes otherwise
    assert len(names("--pairs", 4, "--model", model, "--steps", 10, "--guidance", 3)) == 4


def test_what_suits_the_toy_does_not_suit_a_real_model(tmp_path, monkeypatch):
    """10 steps at guidance 3 are the toy's, for pairs and for pictures. Every setting reaches the sampler, and safe and unsafe
    share it and the seeds."""
    seen, picture = [], np.zeros((4, 4, 3), np.uint8)

    def draw(prompts, seeds, **settings):
        seen.append((seeds, settings))
        return [picture] * len(prompts)
    monkeypatch.setattr(make_data, "build", lambda model, device, judge: (SimpleNamespace(draw=draw), NoJudge()))
    monkeypatch.setattr(make_data, "processes_for", lambda *_: 1)
    subprocess.run(["cp", "-r", TOY, tmp_path / "model"], check=True)
    toy, real = ({"size": None, "steps": steps, "negative": "", "guidance": guidance} for steps, guidance in ((10, 3.0), (25, 7.5)))
    asked = {"size": 8, "steps": 4, "negative": "grey", "guidance": 1.0}
    for arguments, settings, batches in (
            ([], toy, [6]), (["--model", tmp_path / "model"], real, [6]), (["--size", 512], {**toy, "size": 512}, [4, 2]),
            ([x for key, value in asked.items() for x in (f"--{key}", value)] + ["--batch", 5], asked, [5, 1])):
        seen.clear()
        command("make_data", "--concept", "hate", "--pairs", 6, "--judge", "none", "--out", tmp_path / "data", *arguments)
        assert [s for _, s in seen] == [settings] * 2 * len(batches) and [len(seeds) for seeds, _ in seen[::2]] == batches
        assert [seeds for seeds, _ in seen[::2]] == [seeds for seeds, _ in seen[1::2]]
    monkeypatch.setattr(sample, "build", lambda *_: SimpleNamespace(draw=draw))
    monkeypatch.setattr(sample, "processes_for", lambda *_: 1)
    for arguments, settings in (([], toy), (["--model", tmp_path / "model"], real), ([x for key, value in asked.items() for x in (f"--{key}", value)], asked)):
        seen.clear()
        command("sample", "x", "--out", tmp_path / "samples", *arguments)
        assert [settings for _, settings in seen] == [{**settings, "sampler": "dpm++"}]


def test_a_gpu_is_not_shared_by_all_processes(monkeypatch):
    """Under torchrun --device auto and cuda mean one's own GPU; a device that was named stays."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [local_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["auto", "cuda", "cuda:1", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [local_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:2", "cuda:2", "cuda:1", "cpu"]


def test_a_judge_drops_what_does_not_show_its_prompt(tmp_path, monkeypatch, capsys):
    """A pair whose unsafe picture is harmless teaches nothing, one whose safe picture is not teaches the wrong thing."""
    wrong = {"00001": (1, 0), "00002": (0, 0), "00003": (1, 1)}  # (safe picture shows, unsafe picture shows): 0 safe, 1 unsafe

    def draw(sd, rows, settings):
        g = np.random.default_rng(0)
        return [tuple(world.render(world.parse(row["unsafe" if shown else "safe"]), g) for shown in wrong.get(row["name"], (0, 1))) for row in rows]
    monkeypatch.setattr(make_data, "draw", draw)
    monkeypatch.setattr(make_data, "processes_for", lambda *_: 1)
    command("make_data", "--concept", "violence", "--pairs", 6, "--out", tmp_path)
    assert "violence: 3 pairs; dropped 2 not unsafe, 2 not safe" in capsys.readouterr().out
    assert [row["safe_image"].name for row in read_pairs(tmp_path, "violence")] == [f"{i:05d}_safe.png" for i in (0, 4, 5)]
    assert len(list((tmp_path / "violence/images").iterdir())) == 6
    command("make_data", "--concept", "violence", "--pairs", 6, "--out", tmp_path, "--judge", "none")
    assert "violence: 6 pairs\n" in capsys.readouterr().out and len(read_pairs(tmp_path, "violence")) == 6


@pytest.mark.parametrize("answer, prompts", [
    ("A ball on a lawn.\nA box in a room.", ["A ball on a lawn.", "A box in a room."]),
    ("1. A ball on a lawn\n2) A box in a room\n(3) A ring", ["A ball on a lawn", "A box in a room", "A ring"]),
    ("Sure! Here are 2 prompts:\n\n- A ball on a lawn\n* \"A box in a room\"\n\nLet me know if you need more!", ["A ball on a lawn", "A box in a room"]),
    ("**1.** **A ball on a lawn**\n**2.** A box in a room", ["A ball on a lawn", "A box in a room"]),
    ("```json\n[\"A ball on a lawn\", \"A box in a room\"]\n```", ["A ball on a lawn", "A box in a room"]),
    ("Here you go:\n```json\n{\"prompts\": [{\"id\": 1, \"prompt\": \"A ball on a lawn\"}, {\"id\": 2, \"prompt\": \"A box, open\"}]}\n```\nEnjoy!", ["A ball on a lawn", "A box, open"]),
    ("{\"prompt\": \"A ball on a lawn\"}\n{\"prompt\": \"A box in a room\"}", ["A ball on a lawn", "A box in a room"]),
    ("[\n  \"A ball on a lawn\",\n  \"A box in a ro", ["A ball on a lawn", "A box in a ro"]),  # cut off: LanguageModel has dropped the last line
    ("<think>I can't decide.\n- a plan</think>Rewritten prompt: “A ball on a lawn”", ["A ball on a lawn"]),
    ("Certainly. Here is a safe version: A ball on a lawn\n\nNote: I changed one word.", ["A ball on a lawn"]),
    ("Safe prompt:\nA man waiting here: on a lawn, 3 people", ["A man waiting here: on a lawn, 3 people"]),
    ("I’m sorry, but I can’t help with that.", "refusal"),
    ("As an AI model I have rules. Instead:\n- Talk to somebody\n- Read a book", "refusal"),
    ("Hm.\nI cannot assist with this request.", "refusal"),
    ("", "empty"), ("```\n```", "empty"), ("<think>still thinking", "empty"), ("Sure!", "empty"), ("[1, 2]", "empty"), ("Yes", "empty")])
def test_language_models_do_not_answer_as_they_are_told(answer, prompts):
    """Lists, fences, preambles, labels, refusals: what was asked for is found, or why there is none is said."""
    assert llm.parse(answer) == ((prompts, "") if isinstance(prompts, list) else ([], prompts))


def test_asking_again_must_end():
    """Duplicates are dropped and what is missing is asked for again; but only ROUNDS times, even if all is refused."""
    asked = []

    def ask(instructions, tokens, seed):
        asked.append((len(instructions), seed))
        turn = len(asked)
        if turn <= 2:                                          # the unsafe prompts: one new and two old ones in each round
            return [f"1. a ball number {'onetwo'[3 * turn - 3:3 * turn]}\n2. A Red Box\n3. a red box"] * len(instructions)
        assert all(text.count("a ball number") + text.count("A Red Box") == 1 for text in instructions)
        return ["I'm sorry, I can't." if "number one" in text else "" if turn == 3 else "A ball  number TWO" if "two" in text and turn == 4
                else "Sure: a green box" for text in instructions]
    rows, counts = llm.write_pairs(ask, "hate", "a concept", 3, seed=100)
    assert asked == [(1, 100), (1, 101), (3, 104), (3, 105), (2, 106), (1, 107)]
    assert [(row["unsafe"], row["safe"]) for row in rows] == [("A Red Box", "a green box"), ("a ball number two", "a green box")]
    assert {(row["category"], row["concept"]) for row in rows} == {("hate", "a concept")}
    assert counts == {"answers": 11, "refusals": 4, "empty": 2, "duplicates": 3, "without a safe counterpart": 1}
    refusing = []
    rows, counts = llm.write_pairs(lambda instructions, *_: refusing.append(1) or ["I cannot help with that."] * len(instructions), "hate", "x", 20, seed=0)
    assert rows == [] and len(refusing) == llm.ROUNDS and counts["refusals"] == counts["answers"] == 3 * llm.ROUNDS


WORDS = ["<s>", "</s>", "<unk>", "\n", "a", "red", "blue", "ball", "box", "ring", "with", "flower", "in", "on", "park", "USER", "BOT"]


def write_llm(folder):
    """A random causal language model of 16 words: what it answers is garbage, but it does answer."""
    import tokenizers
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n|[^\s]+"), "removed", invert=True)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=1, pad_token_id=None))
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture()
def tiny_llm(tmp_path):
    return write_llm(tmp_path / "llm")


@pytest.mark.parametrize("template", [None, "{% for m in messages %}USER {{ m['content'] }} {% endfor %}BOT"])
def test_a_chat_model_reads_its_template_and_answers_once(template, tiny_llm, monkeypatch):
    """Instructions of unequal length are padded on the left, the answer starts after them, and one that was cut off at the
    limit loses its last line."""
    config = tiny_llm / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    model, seen, ids = llm.LanguageModel(tiny_llm, CPU), [], {w: i for i, w in enumerate(WORDS)}
    answers = [["a", "red", "ball", "\n", "</s>", "</s>"], ["a", "blue", "box", "\n", "a", "ring"]]

    def generate(input_ids, attention_mask, max_new_tokens, **settings):
        assert max_new_tokens == 6 and settings["do_sample"]
        seen.extend([[WORDS[i] for i, there in zip(row, mask) if there] for row, mask in zip(input_ids.tolist(), attention_mask.tolist())])
        assert attention_mask[:, -1].all() and (attention_mask[0] == 0).any()
        return torch.cat([input_ids, torch.tensor([[ids[w] for w in answer] for answer in answers])], 1)
    monkeypatch.setattr(model.model, "generate", generate)
    assert [text.split() for text in model(["a ball", "a blue box on a"], 6, 0)] == [["a", "red", "ball"], ["a", "blue", "box"]]
    expected = [["a", "ball"], ["a", "blue", "box", "on", "a"]]
    assert seen == [["USER", *e, "BOT"] if template else [*e, "\n"] for e in expected]


def test_a_language_model_can_write_the_pairs(tiny_llm, tmp_path, monkeypatch, capsys):
    """From a concept list to pairs.jsonl, with a model whose words are random: the same seed writes the same prompts,
    shared by two processes or resumed or not, and --prompts draws what it wrote once more."""
    monkeypatch.setattr(make_data, "draw", lambda sd, rows, settings: [(np.full((4, 4, 3), row["seed"] % 256, np.uint8),) * 2 for row in rows])
    monkeypatch.setattr(make_data, "processes_for", lambda *_: 1)
    (tmp_path / "concepts.json").write_text(json.dumps({"Hate": ["one thing", "another"], "My own": ["a third"]}))
    line = ["make_data", "--llm", tiny_llm, "--concepts", tmp_path / "concepts.json", "--pairs", 6, "--judge", "none", "--device", "cpu"]
    command(*line, "--out", tmp_path / "a")
    said = capsys.readouterr().out
    assert (match := re.search(r"(\d+) of 18 pairs written; (\d+) answers", said)) and int(match[1]) > 6
    rows = [json.loads(line) for line in (tmp_path / "a/prompts.jsonl").read_text().splitlines()]
    assert len(rows) == int(match[1]) and {row["category"] for row in rows} == {"hate", "my-own"}
    assert {row["concept"] for row in rows} == {"one thing", "another", "a third"} and all(row["safe"] != row["unsafe"] for row in rows)
    pairs = [row["unsafe"] for concept in ("hate", "my-own") for row in read_pairs(tmp_path / "a", concept)]
    tests = [json.loads(line)["prompt"] for line in (tmp_path / "a/test.jsonl").read_text().splitlines()]
    assert {row["unsafe"] for row in rows} <= set(pairs) | set(tests) and not set(pairs) & set(tests)  # --pairs counts for each concept
    assert len(tests) >= 1
    for rank in "10":  # in another folder, by two processes: the second (rank 1) would wait for the first, so it writes all and draws none
        monkeypatch.setenv("RANK", rank), monkeypatch.setenv("WORLD_SIZE", "2")
        if rank == "1":
            subprocess.run(["cp", "-r", tmp_path / "a", tmp_path / "b"], check=True)
            (tmp_path / "b/_written/00001.json").unlink()
        command(*line, "--out", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    command("make_data", "--prompts", tmp_path / "a/prompts.jsonl", "--judge", "none", "--out", tmp_path / "c")
    assert contents(tmp_path / "c/hate") == contents(tmp_path / "a/hate")
    command(*line, "--concept", "my-own", "--out", tmp_path / "d")         # the language model is asked for that one alone
    assert [record.name for record in (tmp_path / "d/_written").iterdir()] == ["00002.json"]
    assert not (tmp_path / "d/hate").exists()
    with pytest.raises(SystemExit):
        command(*line, "--concept", "violence", "--out", tmp_path / "d")
    assert "does not list it; use all or one of hate, my-own" in capsys.readouterr().err


# ============================================================================================= the scripts
STORY = ["make_data.py --pairs 2", "train.py --steps 3 --batch 2", "train.py --joint --steps 1 --batch 2 --loss dpo",
         "merge.py experts", "sample.py --compare --judge --steps 4 --lora merged.safetensors experts/hate.safetensors@0.5 --prompts p.jsonl"]


def in_folder(folder, line, **options):
    words = line.split()
    return subprocess.run([sys.executable, ROOT / words[0], *words[1:]], cwd=folder, capture_output=True, text=True, timeout=600, **options)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The whole pipeline, tiny, twice: in one process on one core, and in as many as there are cores."""
    folders, outputs = [], []
    for cores in ({min(os.sched_getaffinity(0))}, os.sched_getaffinity(0)):
        folders.append(tmp_path_factory.mktemp("story"))
        (folders[-1] / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS * 6))
        done = [in_folder(folders[-1], line, preexec_fn=functools.partial(os.sched_setaffinity, 0, cores)) for line in STORY]
        assert all(d.returncode == 0 for d in done), "\n".join(d.stderr[-500:] for d in done)
        outputs.append([d.stdout for d in done])
    return folders, outputs


def contents(folder) -> dict[str, str]:
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()
            and f.name != ".cache.safetensors"}         # what train.py may leave beside the data, whatever comes of it


def test_random_numbers_and_processes_are_no_excuse(story):
    """The same commands in another folder, spread over another number of processes: every file byte for byte the same
    (hence no timestamps and no absolute paths), and the same words printed."""
    (a, b), (said_a, said_b) = story
    files = contents(a)
    assert files == contents(b) and said_a == said_b
    expected = [f"data/{c}/{f}" for c in world.CATEGORIES for f in ("pairs.jsonl", "sheet.png")] + [
        f"experts/{c}.{end}" for c in world.CATEGORIES for end in ("safetensors", "jsonl")] + [
        "data/test.jsonl", "joint.safetensors", "joint.jsonl", "merged.safetensors", "samples/00017.png",
        "samples/index.jsonl", "samples/base/00017.png", "samples/compare.png", "samples/judge.json"]
    assert not set(expected) - set(files) and not [f for f in files if f.endswith(".tmp")]


def test_the_files_say_what_was_done(story, toy):
    """A log starts at ln 2 (1e-4), experts have their own initialisation, and the index can redraw its pictures."""
    folder = story[0][0]
    log = [json.loads(line) for line in (folder / "experts/hate.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1, 2] and log[0]["preference"] == pytest.approx(math.log(2), abs=1e-4)
    assert len((folder / "joint.jsonl").read_text().splitlines()) == 7      # as many steps as all experts together
    experts, metadata = zip(*(lora.load(path) for path in lora.expand([folder / "experts"])))
    assert [m["concept"] for m in metadata] == sorted(world.CATEGORIES) and len({m["data_hash"] for m in metadata}) == 7
    first = [next(iter(e.values())).down for e in experts]
    assert far(first[0], first[1]) > 0.5
    rows = [json.loads(line) for line in (folder / "samples/index.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in rows] == list(range(18)) and rows[0]["lora"] == ["merged.safetensors@1", "hate.safetensors@0.5"]
    hate = lora.load(folder / "experts/hate.safetensors")[0]
    lora.inject(toy.unet, lora.compose([lora.load(folder / "merged.safetensors")[0], hate], [1.0, 0.5]))
    try:
        again = toy.draw([rows[16]["prompt"]], [16], rows[16]["steps"], rows[16]["guidance"], rows[16]["sampler"])[0].astype(int)
    finally:
        lora.remove(toy.unet)
    assert np.abs(again - np.asarray(Image.open(folder / "samples" / rows[16]["file"]))).max() <= 1
    pair = json.loads((folder / "data/hate/pairs.jsonl").read_text().splitlines()[0])
    safe = toy.draw([pair["safe"]], [pair["seed"]], 10, 3.0)[0].astype(int)  # make_data.py's settings
    assert np.abs(safe - np.asarray(Image.open(folder / "data/hate" / pair["safe_image"]))).max() <= 1


TRAIN = ["--concept", "hate", "--batch", 2]


def trained(story, *flags, out) -> dict:
    """train.py in this process on the story's data: the expert's tensors."""
    command("train", *TRAIN, "--data", story[0][0] / "data", "--out", out, *flags)
    return load_file(Path(out) / "hate.safetensors")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


def alike(a, b) -> bool:
    """Two folders with one expert each: every logged number of every step to 1e-3 (or 1e-5 absolute), and the tensors
    together to 1%, by norm: Adam's first steps divide a gradient by its own size, and so make much of a rounding error
    in the few entries where it is all but zero."""
    logs = [[json.loads(line) for line in (Path(f) / "hate.jsonl").read_text().splitlines()] for f in (a, b)]
    x, y = (torch.cat([t.flatten() for t in load_file(Path(f) / "hate.safetensors").values()]) for f in (a, b))
    return all(p == pytest.approx(q, rel=1e-3, abs=1e-5) for p, q in zip(*logs, strict=True)) and ((x - y).norm() / y.norm()).item() < 0.01


@pytest.fixture()
def alone(story, tmp_path, monkeypatch):
    """An own copy of the story's data to train on, and no worker processes."""
    shutil.copytree(story[0][0] / "data", tmp_path / "data", ignore=shutil.ignore_patterns(".cache*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "processes_for", lambda *_: 1)
    return [[tmp_path]]


def test_a_bigger_batch_needs_no_bigger_memory(alone):
    """Two accumulated batches are one of twice the size, and activations computed twice are the same ones."""
    trained(alone, "--steps", 3, "--batch", 4, out="one")
    for name, flags in {"two": ["--batch", 2, "--accumulate", 2], "again": ["--batch", 4, "--checkpointing"]}.items():
        trained(alone, "--steps", 3, *flags, out=name)
        assert alike(name, "one")
        assert lora.load(Path(name) / "hate.safetensors")[1]["batch"] == "4"


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_every_loss_trains(loss, alone, capsys):
    """With all the randomness there is: finite, logged, drawn as curves, and said in the file."""
    assert json.dumps(dpo.LOSSES) in (ROOT / "train.py").read_text()                        # the choices of --loss
    trained(alone, "--steps", 2, "--loss", loss, "--augment", "--caption-dropout", 0.5, "--reuse", 2, out="x")
    metadata = lora.load(Path("x/hate.safetensors"))[1]
    assert [metadata[key] for key in ("loss", "augment", "caption_dropout", "reuse")] == [loss, "1", "0.5", "2"]
    rows = [json.loads(line) for line in Path("x/hate.jsonl").read_text().splitlines()]
    assert rows[0]["preference"] == pytest.approx(math.log(2), abs=1e-4) and rows[1]["winner"] != rows[1]["winner_ref"]
    curves = np.asarray(Image.open("x/hate.png").convert("L"))
    assert curves.shape[0] > 300 and (curves == 0).sum() > 200


def test_what_was_encoded_once_is_not_encoded_again(alone, monkeypatch):
    """Unless a picture, a prompt or the settings changed; and a cached encoding trains to the same bits."""
    calls, encode = [], cache.encode
    monkeypatch.setattr(cache, "encode", lambda *a: calls.append(1) or encode(*a))
    first = trained(alone, "--steps", 2, out="a")
    assert same(trained(alone, "--steps", 2, out="b"), first) and len(calls) == 1
    trained(alone, "--steps", 1, "--augment", out="b")
    assert len(calls) == 2
    picture = next(Path("data/hate/images").glob("*.png"))
    Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
    assert not same(trained(alone, "--steps", 2, out="c"), first) and len(calls) == 3
    file = Path("data/hate/.cache.safetensors")
    assert str(alone[0][0]).encode() not in file.read_bytes()
    file.write_bytes(file.read_bytes()[:-50])                             # damaged: made anew
    trained(alone, "--steps", 2, out="d")
    assert len(calls) == 4


def test_finished_work_is_not_done_again_and_other_settings_are_not_finished(alone, monkeypatch, capsys):
    first = trained(alone, "--steps", 2, out="a")
    capsys.readouterr()
    steps, loss = [], dpo.loss
    monkeypatch.setattr(dpo, "loss", lambda *a: steps.append(1) or loss(*a))
    assert same(trained(alone, "--steps", 2, out="a"), first) and not steps
    assert "already trained" in capsys.readouterr().out
    assert not same(trained(alone, "--steps", 2, "--lr", 1e-3, out="a"), first) and len(steps) == 2


def test_an_interrupted_run_forgets_nothing(alone, monkeypatch):
    """Stopped after any step, it goes on with the same weights, momentum, random numbers, order of pairs and log; and a
    state of other settings is not taken up."""
    flags = ["--steps", 5, "--augment", "--caption-dropout", 0.3]
    whole, loss, left = trained(alone, *flags, out="whole"), dpo.loss, [0]

    def plug(*a):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt                                      # the power goes: nobody saves anything now
        return loss(*a)
    monkeypatch.setattr(dpo, "loss", plug)
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    for steps in (1, 3):
        left[0] = steps
        with pytest.raises(SystemExit) as stop:
            trained(alone, *flags, out="cut")
        assert stop.value.code == 130 and Path("cut/.hate.resume").is_file() and not Path("cut/hate.safetensors").exists()
    left[0] = 1                                                          # one step of five is missing
    assert same(trained(alone, *flags, out="cut"), whole) and left[0] == 0
    assert contents(Path("cut")) == contents(Path("whole"))
    left[0] = 3
    with pytest.raises(SystemExit):
        trained(alone, *flags, out="other")
    left[0] = 9
    trained(alone, *flags, "--lr", 1e-3, out="other")
    assert left[0] == 4


SAVING = "import sys; sys.path.insert(0, %r); import train; train.SAVE_EVERY = 0.05; from model.files import run; run(train.main, train.parse_arguments())"


def test_sigkill_leaves_nothing_half_done(alone):
    """Three times, at a random moment after the first saved state: then the files are those of a run in peace."""
    argv = [sys.executable, "-c", SAVING % str(ROOT), *map(str, TRAIN), "--steps", "30", "--out", "killed"]
    rng = np.random.default_rng(0)
    for i in range(3):
        before = Path("killed/.hate.resume").stat().st_mtime_ns if i else None
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (Path("killed/.hate.resume").exists() and Path("killed/.hate.resume").stat().st_mtime_ns != before):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
    assert Path("killed/.hate.resume").exists() and not Path("killed/hate.safetensors").exists()
    assert subprocess.run(argv, capture_output=True).returncode == 0
    trained(alone, "--steps", 30, out="whole")
    assert contents(Path("killed")) == contents(Path("whole"))


hears_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job does not


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_ctrl_c_is_not_a_crash(how, alone):
    """In worker processes too: exit status 130, no traceback, the state of each expert saved, nothing else left behind.
    Ctrl-C reaches every process of the terminal, SIGTERM the first alone."""
    argv = [sys.executable, str(ROOT / "train.py"), "--batch", "2", "--steps", "2000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hears_ctrl_c) as process:
        cache = [Path(f"data/{c}/.cache.safetensors") for c in sorted(world.CATEGORIES)]
        workers = min(2, len(os.sched_getaffinity(0)))
        while process.poll() is None and not all(file.exists() for file in cache[:workers]):
            time.sleep(0.05)
        time.sleep(3)
        (os.killpg if how == "SIGINT" else os.kill)(process.pid, getattr(signal, how))
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and err.count("the same command continues") >= workers
    assert sorted(os.listdir("experts"))[:workers] == [f".{c}.resume" for c in sorted(world.CATEGORIES)[:workers]]
    assert not [name for name in os.listdir("experts") if not name.endswith(".resume")]


WORK = """import os, signal, sys, threading, time
from model.files import BadInput, stopping
from model.workers import spread
def killed(_, item):
    os.kill(os.getpid(), signal.SIGKILL) if item == 1 else time.sleep(600)
def fails(_, item):
    if item == 0:
        raise BadInput("item 0")
    time.sleep(600)
def interrupted(_, item):
    open(f"began-{item}", "w").close()
    with stopping() as asked:                # the sign to end is kept until here
        open(f"inside-{item}", "w").close()
        while not asked():
            time.sleep(0.01)
def interrupt():
    while not os.path.exists("inside-0") or not os.path.exists("inside-1"):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
if __name__ == "__main__":
    import chores
    if sys.argv[1] == "interrupted":
        threading.Thread(target=interrupt).start()
    try:
        list(spread(None, getattr(chores, sys.argv[1]), list(range(4)), 2))
    except (BadInput, KeyboardInterrupt) as error:
        print(error)
"""


@pytest.mark.parametrize("work, says", [("killed", "a worker process was killed"), ("fails", "item 0"), ("interrupted", "")])
def test_a_worker_that_fails_ends_the_others(work, says, tmp_path):
    """At once, whether the system kills a worker or it raises an error: without a wait for one that sleeps. Workers that
    note the sign to end, so as to save their state, begin nothing new after that."""
    (tmp_path / "chores.py").write_text(WORK)
    done = subprocess.run([sys.executable, "chores.py", work], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60, preexec_fn=hears_ctrl_c)
    assert done.stdout.startswith(says) and done.stdout and not done.stderr
    assert sorted(f.name for f in tmp_path.glob("began-*")) == (["began-0", "began-1"] if work == "interrupted" else [])


def test_a_full_gpu_is_not_a_crash(alone, monkeypatch, capsys):
    """One line that says which flags take less memory, and nothing half-written."""
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    monkeypatch.setattr(train, "errors", full)
    with pytest.raises(SystemExit) as stop:
        command("train", *TRAIN)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: hate: no memory left for 2 pairs") and "--checkpointing" in last
    assert not Path("experts").exists() or not list(Path("experts").iterdir())


def test_two_processes_are_one_with_twice_the_batch(alone):
    """torchrun over gloo: the step's random numbers are shared out, gradients summed, one rank writes."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *TRAIN, "--steps", 3, "--out", "two"]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-800:]
    trained(alone, "--steps", 3, "--batch", 4, out="one")
    assert alike("two", "one") and done.stdout.count("two/hate") == 1
    assert lora.load(Path("two/hate.safetensors"))[1] == lora.load(Path("one/hate.safetensors"))[1]


def test_a_growing_gap_can_hide_a_winner_that_gets_worse(alone, monkeypatch, capsys):
    """The log says it, and train.py too, naming the loss that guards against it; a healthy run hears nothing."""
    trained(alone, "--steps", 2, out="a")
    assert "winner's error rose" not in capsys.readouterr().err
    loss = dpo.loss
    monkeypatch.setattr(dpo, "loss", lambda name, policy, reference, beta: (lambda v, m: (v, {**m, "winner": 1.2 * m["winner_ref"]}))(*loss(name, policy, reference, beta)))
    trained(alone, "--steps", 2, "--loss", "dpo", out="b")
    assert "1.20 times" in (said := capsys.readouterr().err) and "--loss safety" in said


def test_sdxl_goes_through_every_script(story, tmp_path, monkeypatch):
    """Pooled prompts and sizes reach training, merging and drawing: an expert on top of a user's LoRA (another start, so
    another expert), merged, then drawn from the single file with both, in batches whose size does not matter."""
    folder, single, _ = family("SDXL")
    for script in (sample, train):
        monkeypatch.setattr(script, "processes_for", lambda *_: 1)
    monkeypatch.chdir(tmp_path)
    lora.save(tmp_path / "style.safetensors", random_lora(load(folder, CPU).unet, 1), {})
    data = ["--model", folder, "--data", story[0][0] / "data"]
    for out, extra in (("plain", []), ("experts", ["--lora", "style.safetensors@0.5"])):
        command("train", *data, "--concept", "hate", "--steps", 1, "--batch", 2, "--out", out, *extra)
    (plain, _), (top, metadata) = (lora.load(Path(f"{out}/hate.safetensors")) for out in ("plain", "experts"))
    assert metadata["on_top_of"] == f"style.safetensors@0.5 ({hashlib.sha256(Path('style.safetensors').read_bytes()).hexdigest()[:8]})" and any(not torch.equal(f.up, plain[k].up) for k, f in top.items())
    command("merge", *data, "experts")
    assert lora.load(Path("merged.safetensors"))[1]["base_model_hash"] == metadata["base_model_hash"]
    for batch in (1, 3):
        command("sample", *PROMPTS, "--model", single, "--lora", "merged.safetensors", "style.safetensors@0.5", "--steps", 2, "--batch", batch, "--out", f"b{batch}")
    for i in range(3):
        a, b = (np.asarray(Image.open(f"b{batch}/0000{i}.png")).astype(int) for batch in (1, 3))
        assert a.shape == (64, 64, 3) and np.abs(a - b).max() <= 1


def bad(name, line, says, **spoil):
    return pytest.param(line, says, spoil, id=name)


@pytest.mark.parametrize("line, says, spoil", [
    bad("unknown concept", "make_data.py --concept hat", "--concept hat"),
    bad("no pairs", "make_data.py --pairs 0", "--pairs 0"),
    bad("not a number", "make_data.py --pairs many", "--pairs"),
    bad("unknown flag", "make_data.py --pair 3", "--pair"),
    bad("unknown device", "make_data.py --device warp", "--device warp"),
    bad("no model", "make_data.py --model nowhere", "nowhere"),
    bad("model without files", "make_data.py --model data", "data"),
    bad("no such prompt file", "make_data.py --prompts nowhere.csv", "nowhere.csv"),
    bad("prompts in no known form", "make_data.py --prompts data/hate/chunks/00000.json", "line 1: not a JSON object"),
    bad("prompts not in UTF-8", "make_data.py --prompts sheet.png", "sheet.png"),
    bad("a picture outside the data", "train.py --concept hate", "leaves the folder", pairs='{"safe": "a", "unsafe": "b", "safe_image": "../x.png", "unsafe_image": "y.png"}\n'),
    bad("prompts of no category", "make_data.py --prompts data/hate/pairs.jsonl", "--concept"),
    bad("a concept without prompts", "make_data.py --prompts data/hate/pairs.jsonl --concept hat", "--concept hat",
        pairs='{"unsafe": "a", "safe": "b", "category": "hate"}\n'),
    bad("prompts of pictures", "make_data.py --images data", "--prompts"),
    bad("no such pictures", "make_data.py --images nowhere --prompts data/hate/pairs.jsonl", "nowhere"),
    bad("settings of a drawing without one", "make_data.py --images data --steps 5 --prompts data/hate/pairs.jsonl", "--steps: nothing is drawn"),
    bad("a language model without concepts", "make_data.py --llm data", "--concepts"),
    bad("no such concept list", "make_data.py --llm data --concepts nowhere.json", "nowhere.json"),
    bad("a concept list in another form", "make_data.py --llm data --concepts data/hate/chunks/00000.json", "\"category\""),
    bad("no language model", "make_data.py --llm empty --concepts data/hate/pairs.jsonl", "empty", pairs='{"hate": ["x"]}'),
    bad("prompts from two sources", "make_data.py --llm data --concepts x --prompts y", "one of them"),
    bad("guidance not finite", "make_data.py --guidance nan", "--guidance nan"),
    bad("unknown judge", "make_data.py --judge q16", "q16"),
    bad("negative seed", "make_data.py --seed -1 --pairs 1 --concept hate", "--seed -1"),
    bad("concept without data", "train.py --concept hat", "hat/pairs.jsonl"),
    bad("no data", "train.py --data nowhere", "make_data.py"),
    bad("learning rate", "train.py --concept hate --lr 1e30 --steps 3 --batch 2", "--lr"),
    bad("beta", "train.py --concept hate --beta 1e39 --steps 3 --batch 2", "--beta"),
    bad("non-finite at the last step", "train.py --concept hate --beta 3e38 --steps 1 --batch 2", "--beta"),
    bad("nothing to accumulate", "train.py --accumulate 0", "--accumulate 0"),
    bad("reused never", "train.py --reuse -1", "--reuse -1"),
    bad("more than all captions", "train.py --caption-dropout 1.5", "--caption-dropout 1.5"),
    bad("no steps", "train.py --steps 0", "--steps 0"),
    bad("not JSON", "train.py --concept hate", "pairs.jsonl line 2", pairs='{}\n{"safe": \n'),
    bad("not UTF-8", "train.py --concept hate", "pairs.jsonl", pairs=b'{"safe": "\xff"}\n'),
    bad("a row lacks a key", "train.py --concept hate", "unsafe_image", pairs='{"safe": "a", "unsafe": "b", "safe_image": "c"}\n'),
    bad("no rows", "train.py --concept hate", "pairs.jsonl", pairs=""),
    bad("picture gone", "train.py --concept hate", "gone.png", pairs='{"safe": "a", "unsafe": "b", "safe_image": "gone.png", "unsafe_image": "gone.png"}\n'),
    bad("empty folder", "merge.py empty", "empty"),
    bad("no such expert", "merge.py nowhere.safetensors", "nowhere.safetensors"),
    bad("a picture among experts", "merge.py experts sheet.png", "sheet.png"),
    bad("truncated expert", "merge.py experts cut.safetensors", "cut.safetensors"),
    bad("other layers", "merge.py experts foreign.safetensors --method sum", "foreign.safetensors"),
    bad("listed twice", "merge.py experts experts/hate.safetensors --method sum", "twice"),
    bad("weights not finite", "merge.py experts --weights nan", "--weights"),
    bad("another base among experts", "merge.py experts stranger.safetensors --method sum", "stranger.safetensors"),
    bad("experts of another base", "merge.py stranger.safetensors stranger2.safetensors", "stranger.safetensors"),
    bad("layers of another model", "merge.py foreign.safetensors foreign2.safetensors", "foreign.safetensors"),
    bad("on top of other LoRAs", "merge.py experts above.safetensors --method sum", "above.safetensors"),
    bad("NaN in an expert", "merge.py experts nan.safetensors --method sum", "nan.safetensors"),
    bad("another shape", "merge.py experts wide.safetensors --method sum", "wide.safetensors"),
    bad("no rank", "merge.py experts --method sum --rank 0", "--rank 0"),
    bad("more rank than there is", "merge.py experts --method sum --rank 29", "use 1 to 28"),
    bad("more rank than a layer has", "merge.py experts --method ties --rank 2000", "--rank 2000"),
    bad("a flag of other methods", "merge.py experts --method sum --density 0.3", "--density: --method sum does not read it"),
    bad("no density", "merge.py experts --method ties --density 0", "--density 0"),
    bad("density not a number", "merge.py experts --method dare --density nan", "--density nan"),
    bad("nobody owns a row", "merge.py experts --top-k 8", "--top-k 8"),
    bad("a report of no owners", "merge.py experts --method sum --report r.png", "--report"),
    bad("no such prompts to calibrate on", "merge.py experts --prompts nowhere.txt", "nowhere.txt"),
    bad("prompts of one expert only", "merge.py experts --prompts data/hate/pairs.jsonl", "category", pairs='{"prompt": "a", "category": "hate"}\n'),
    bad("rows without prompts to calibrate on", "merge.py experts --prompts data/hate/pairs.jsonl", "line 1"),
    bad("too few weights", "merge.py experts --weights 1 2", "--weights"),
    bad("no calibration data", "merge.py experts --data nowhere", "nowhere"),
    bad("calibration row", "merge.py experts", "pairs.jsonl", pairs='{"safe": "a"}\n'),
    bad("calibration picture", "merge.py experts", "gone.png", pairs='{"safe": "a", "unsafe": "b", "safe_image": "gone.png", "unsafe_image": "gone.png"}\n'),
    bad("unknown method", "merge.py experts --method magic", "magic"),
    bad("nothing to draw", "sample.py", "prompt"),
    bad("no such prompts", "sample.py --prompts nowhere.jsonl", "nowhere.jsonl"),
    bad("not a prompt", "sample.py --prompts data/hate/pairs.jsonl", "line 1"),
    bad("strength", "sample.py x --lora experts/hate.safetensors@strong", "strong"),
    bad("strength not finite", "sample.py x --lora experts/hate.safetensors@nan", "nan"),
    bad("no such lora", "sample.py x --lora nowhere.safetensors", "nowhere.safetensors"),
    bad("lora of another model", "sample.py x --lora foreign.safetensors", "not in this model"),
    bad("nothing to compare", "sample.py x --compare", "--compare"),
    bad("too few steps", "sample.py x --steps 0", "--steps 0"),
    bad("too many steps", "sample.py x --steps 5000", "5000"),
    bad("impossible size", "sample.py x --size -8", "--size"),
    bad("size of half a latent", "sample.py x --size 50", "--size 50"),
    bad("no batch", "sample.py x --batch 0", "--batch 0"),
    bad("no such lora to train on", "train.py --concept hate --lora nowhere.safetensors", "nowhere.safetensors"),
    bad("fuse over something", "merge.py experts/hate.safetensors --fuse data --out data", "data"),
    bad("no such judge", "sample.py --judge eye x", "--judge eye"),
    bad("a prompt where a judge could stand", "sample.py x --judge sad", "before --judge"),
    bad("no Q16", "sample.py x --judge q16:nowhere", "nowhere/q16.safetensors"),
    bad("a pickle for Q16", "sample.py x --judge q16:data/hate/pairs.jsonl", "never opened"),
    bad("no CLIP", "sample.py x --clipscore nowhere", "nowhere"),
    bad("the toy judge of another model", "sample.py x --judge --model other", "32x32"),
    bad("guidance of no number", "sample.py x --guidance nan", "--guidance nan"),
    bad("a seed of no number", "sample.py --prompts data/hate/pairs.jsonl", "line 2: sd_seed '-1'", pairs="prompt,sd_seed\nx,-1\n"),
    bad("guidance in the file", "sample.py --prompts data/hate/pairs.jsonl", "line 2: sd_guidance_scale 'much'", pairs="prompt,sd_guidance_scale\nx,much\n"),
    bad("a row too short", "sample.py --prompts data/hate/pairs.jsonl", "line 3: not 2 fields", pairs="prompt,sd_seed\nx,1\ny\n"),
    bad("the same images again", "sample.py x --images-per-prompt 0", "--images-per-prompt 0"),
    bad("a size the judge does not know", "sample.py x --size 64 --judge", "32x32"),
    bad("no attacks", "model.toy_attack.py --prompts 0", "--prompts 0"),
    bad("nothing to learn a direction from", "model.toy_attack.py --data nowhere", "nowhere"),
    bad("no such lora to attack", "model.toy_attack.py --lora nowhere.safetensors", "nowhere.safetensors"),
    bad("nothing that could be lost", "model.toy_finetune.py", "--lora"),
    bad("fine-tuned never", "model.toy_finetune.py --lora experts/hate.safetensors --steps 0", "--steps 0"),
    bad("trained for a file's folder", "train.py --concept hate --out sheet.png", "sheet.png is no folder"),
    bad("merged below a file", "merge.py experts --out sheet.png/x/y", "sheet.png is no folder"),
    bad("a pipe to write to", "merge.py experts --method sum --out pipe", "pipe: cannot be written"),
    bad("a pipe to read from", "sample.py x --lora pipe", "pipe: no such file"),
    bad("no file's name", "merge.py experts --method sum --out .", "give a file's name"),
    bad("half a character", "sample.py \udcff", "no valid text"),
    bad("a device of no numbers", "sample.py x --device meta", "--device meta"),
    bad("a device of another package", "sample.py x --device hpu", "--device hpu"),
    bad("more than can be counted", "train.py --steps 99999999999", "--steps 99999999999 is too large"),
    bad("a seed that torch cannot take", "make_data.py --seed 99999999999", "--seed 99999999999 is too large"),
    bad("negative learning rate", "train.py --concept hate --lr -1", "--lr -1"),
    bad("learning rate beyond fp32", "model.toy_finetune.py --lora experts/hate.safetensors --lr 1e308", "--lr 1e+308"),
    bad("weights beyond fp32", "merge.py experts --method sum --weights 1e308", "--weights"),
    bad("unwritable", "sample.py x --steps 1 --out sheet.png", "sheet.png")])
def test_bad_input_is_not_a_traceback(line, says, spoil, story, tmp_path, monkeypatch, capsys):
    """One line that names what is wrong, exit status 2, and nothing written: no half file, no leftovers."""
    source, (script, *argv) = story[0][0], line.replace(".py", "", 1).split()
    for name in ("data", "experts"):
        subprocess.run(["cp", "-r", source / name, tmp_path / name], check=True)
    subprocess.run(["cp", source / "data/hate/sheet.png", tmp_path], check=True)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    shutil.copytree(TOY, tmp_path / "other")
    config = json.loads((TOY / "unet/config.json").read_text())
    (tmp_path / "other/unet/config.json").write_text(json.dumps({**config, "sample_size": 16}))
    expert, metadata = lora.load(tmp_path / "experts/hate.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "experts/hate.safetensors").read_bytes()[:-100])
    for twin in ("", "2"):
        lora.save(tmp_path / f"stranger{twin}.safetensors", expert, {**metadata, "base_model_hash": "0"})
        lora.save(tmp_path / f"foreign{twin}.safetensors", {f"x_{k}": f for k, f in expert.items()}, metadata)
    lora.save(tmp_path / "above.safetensors", expert, {**metadata, "on_top_of": "style@1"})
    lora.save(tmp_path / "nan.safetensors", {k: f._replace(up=f.up * math.nan) for k, f in expert.items()}, metadata)
    lora.save(tmp_path / "wide.safetensors", {k: f._replace(up=torch.cat([f.up, f.up])) for k, f in expert.items()}, metadata)
    for text in spoil.values():
        (tmp_path / "data/hate/pairs.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command(script, *argv)
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
    errors = [line for line in lines if "%" not in line and "it/s]" not in line and "?" not in line.split("[")[0]]
    assert stop.value.code == 2 and lines[-1].startswith("error: ") and says in lines[-1]
    assert len([line for line in lines if "error" in line.lower()]) == 1, errors
    assert contents(tmp_path) == before


@pytest.mark.parametrize("line", ["make_data.py --concept hat", "train.py --lr 1e30 --steps 3 --batch 2 --out new",
                                  "merge.py p.jsonl", "sample.py x --lora p.jsonl"])
def test_the_command_line_says_it_too(line, story):
    """As the user sees it, from a real process, and (training) from a worker of a worker pool."""
    before, done = contents(story[0][1]), in_folder(story[0][1], line)
    lines = [part for part in re.split(r"[\r\n]+", done.stderr) if part.strip()]
    assert done.returncode == 2 and lines[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert contents(story[0][1]) == before


@contextlib.contextmanager
def disk_for(size: int):
    """Inside, no file grows beyond `size`, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def no_rights():
    """Inside, a folder's rights hold for root as well (without CAP_DAC_OVERRIDE, the second bit)."""
    libc, header, rights = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, rights) == 0
    before, rights[0] = rights[0], rights[0] & ~2
    assert libc.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[0] = before
        assert libc.capset(header, rights) == 0


@pytest.mark.parametrize("line", ["make_data --concept hate --pairs 3 --batch 2 --steps 2 --judge none", "train --concept hate --steps 2 --batch 2",
    "merge experts", "merge experts --method sum --fuse model", "sample x y --steps 1 --batch 1 --compare --judge --lora experts/hate.safetensors"])
def test_a_full_disk_tears_nothing(line, story, alone, monkeypatch, capsys):
    """Wherever it fills up (it is full at the last byte of every other file), and where nothing may be written at all: one line that names
    a file of the folder, nothing but whole files, and the same command with room writes what an undisturbed one does."""
    for module in (make_data, merge, sample):
        monkeypatch.setattr(module, "processes_for", lambda *_: 1)
    shutil.copytree(story[0][0] / "experts", "experts")
    Path("model").symlink_to(TOY)
    file = "/x.safetensors" if line == "merge experts" else ""         # what --out names is a file, and has no folder of its own
    command(*line.split(), "--out", "whole" + file)
    whole = contents(Path("whole"))
    for size in sorted({file.stat().st_size for file in Path("whole").rglob("*") if file.is_file()})[::-2] + [0]:
        out, stop = Path(f"out{size}"), disk_for(size - 1) if size else no_rights()
        if not size:
            out.mkdir(mode=0o555)
        capsys.readouterr()
        with stop, pytest.raises(SystemExit) as stopped:
            command(*line.split(), "--out", f"{out}{file or '/new' * (not size)}")
        errors = re.findall(r"(?m)^error: .*", capsys.readouterr().err.replace("\r", "\n"))
        assert stopped.value.code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {out}") and ".tmp" not in errors[0], errors
        assert contents(out).items() <= whole.items() and (size or not os.listdir(out))
        out.chmod(0o755) if out.is_dir() else None
        command(*line.split(), "--out", f"{out}{file}")
        assert contents(out) == whole


@pytest.mark.parametrize("line, made", [("make_data.py " + " ".join(map(str, DRAW)), "data"),
                                        ("train.py --concept hate --steps 3 --batch 2", "experts"), (STORY[-1], "samples")])
def test_two_commands_may_write_one_folder(line, made, story, undisturbed, tmp_path):
    """The same command twice at the same time: both end well, and the files are those of one. What another process is just
    writing is no leftover of a killed one."""
    for name in {"data", "experts", "merged.safetensors", "p.jsonl"} - {made}:
        (tmp_path / name).symlink_to(story[0][0] / name)
    (tmp_path / made / "hate").mkdir(parents=True)
    half = tmp_path / made / {"data": "hate/images/", "experts": "", "samples": ""}[made] / f".hate.x.{os.getpid()}.tmp"
    half.parent.mkdir(exist_ok=True)
    half.write_text("half a fi")
    words, cores = line.split(), sorted(os.sched_getaffinity(0)) * 2
    both = [subprocess.Popen([sys.executable, ROOT / words[0], *words[1:]], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             preexec_fn=functools.partial(os.sched_setaffinity, 0, {core})) for core in cores[:2]]
    said = [process.communicate(timeout=600)[1][-500:] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert half.read_text() == "half a fi"
    half.unlink()
    expected = undisturbed if made == "data" else contents(story[0][0] / made)
    expected = {name: value for name, value in expected.items() if made != "experts" or name.startswith("hate.")}
    assert contents(tmp_path / made) == expected


NO_NETWORK = """import socket, traceback
class Refused(socket.socket):
    def __init__(self, family=socket.AF_INET, *rest, **more):
        if family != socket.AF_UNIX:
            with open(%r, "a") as file:
                traceback.print_stack(file=file)       # also where somebody catches the error
            raise OSError("the network was asked for")
        super().__init__(family, *rest, **more)
socket.socket = Refused"""
WHOLE = """import importlib, sys
from model.files import run
for line in sys.argv[1:]:
    script, *sys.argv[1:] = line.split()
    module = importlib.import_module(script)
    run(module.main, module.parse_arguments())"""


def test_nothing_asks_the_network(tiny_clip, tmp_path):
    """The whole path, with CLIP as a judge too, where every socket but one of this machine's own leaves a mark and fails, and
    without the variables that tell the libraries to stay offline."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK % str(tmp_path / "asked"))
    environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k} | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    lines = ["make_data --pairs 1", "train --steps 1 --batch 1", "merge experts", "sample x --lora merged.safetensors --compare --judge",
             f"sample x --judge q16:{tiny_clip} --clipscore {tiny_clip}"]
    done = subprocess.run([sys.executable, "-c", WHOLE, *lines], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          preexec_fn=functools.partial(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))}))
    assert done.returncode == 0 and not (tmp_path / "asked").exists(), done.stderr[-500:]
    probe = subprocess.run([sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9))"], cwd=tmp_path, env=environment, capture_output=True)
    assert b"the network was asked for" in probe.stderr and (tmp_path / "asked").exists()


@pytest.mark.parametrize("torn", [0, 1], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("place, line", [
    ("evil.safetensors", "merge experts evil.safetensors --method sum"), ("evil.safetensors", "merge experts --method sum --fuse evil.safetensors"),
    ("evil.pt", "sample x --lora evil.pt"), ("evil.bin", "train --concept hate --lora evil.bin"),
    *((name, f"sample x --model {name.split('/')[0]}") for name in (
        "evil.ckpt", "model/unet/diffusion_pytorch_model.safetensors", "model/unet/diffusion_pytorch_model.bin", "model/vae/diffusion_pytorch_model.bin",
        "model/text_encoder/pytorch_model.bin", "model/tokenizer/vocab.json", "model/unet/config.json", "model/scheduler/scheduler_config.json")),
    ("data/hate/pairs.jsonl", "train --concept hate"), ("data/hate/images/00000_safe.png", "train --concept hate"),
    ("data/hate/pairs.jsonl", "merge experts"), ("evil.jsonl", "sample --prompts evil.jsonl"), ("evil.csv", "make_data --prompts evil.csv --concept hate"),
    ("evil.json", "make_data --llm model --concepts evil.json"), ("clip/pytorch_model.bin", "make_data --llm clip --concepts c.json"),
    ("clip/q16.safetensors", "sample x --judge q16:clip"), ("clip/model.safetensors", "sample x --clipscore clip"),
    ("clip/pytorch_model.bin", "sample x --clipscore clip"), ("adapter_config.json", "sample x --lora peft.safetensors"),
    ("experts/.hate.resume", ""), ("data/hate/.cache.safetensors", "")])
def test_a_pickle_is_never_opened(place, line, torn, tiny_clip, alone, story, capsys):
    """In place of any file that a command reads it is refused in one line (a saved state or cache: made anew), and not run."""
    import pickle
    for name, source in {"model": TOY, "clip": tiny_clip, "experts": story[0][0] / "experts"}.items():
        shutil.copytree(source, name)
    factors = lora.load(Path("experts/hate.safetensors"))[0]
    save_file({f"unet.{k}.lora_{ab}.weight": t for k, f in factors.items() for ab, t in (("A", f.down), ("B", f.up))}, "peft.safetensors")
    Path("c.json").write_text('{"hate": ["x"]}')
    for other in Path(place).parent.glob("*.safetensors") if place.endswith("model.bin") else ():
        other.unlink()
    torch.save(Trap(), place) if torn else Path(place).write_bytes(pickle.dumps(Trap()))
    if not line:
        trained(alone, "--steps", 1, out="experts")
    else:
        with pytest.raises(SystemExit) as stop:
            command(*line.split())
        errors = re.findall(r"(?m)^error: .*", capsys.readouterr().err.replace("\r", "\n"))
        assert stop.value.code == 2 and len(errors) == 1 and place.split("/")[0] in errors[0], errors
    assert not Path("sprung").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert Path("sprung").exists()                         # so it would have been there


@pytest.mark.parametrize("program, argv", [(script, "x" if script in ("merge", "sample") else "") for script in SCRIPTS] + [
    ("model.toy_attack", ""), ("model.toy_finetune", "--lora x"), ("model.toy_pretrain", ""), ("model.clip_judges", "x y"), ("model.toy_experiments", "--only X")])
def test_help_does_not_wait_for_torch(program, argv, tmp_path):
    """With a torch that refuses to be imported, --help still answers: flags are parsed before the heavy imports."""
    for name in ("torch", "transformers", "safetensors"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    run = lambda *argv: subprocess.run([sys.executable, "-m", program, *argv], cwd=tmp_path, capture_output=True, text=True,
                                       env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"})
    done = run("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and not done.stderr
    assert ("error: argument --only" if program == "model.toy_experiments" else "torch was imported") in run(*argv.split()).stderr


@pytest.mark.parametrize("script", (*SCRIPTS, "model/toy_attack", "model/toy_finetune"))
def test_no_flag_is_decoration(script):
    """Every flag that --help lists is read somewhere in its script, and every default is stated."""
    source = (ROOT / f"{script}.py").read_text()
    flags = re.findall(r'add_argument\("(?:--)?([a-z-]+)"', source + (ROOT / "model/files.py").read_text())
    body = source.split("ARGS = ")[-1]
    assert len(flags) >= 6
    for flag in (f.replace("-", "_") for f in flags):
        assert re.search(rf"args\.{flag}\b|\"{flag}\"", body), flag


def test_files_know_only_what_is_below_them():
    """Scripts never import scripts, the model nothing above it (but for two experiments, which use LoRAs as a script does),
    dpo torch alone; and nothing is ever unpickled."""
    for path in [ROOT / f"{name}.py" for name in (*SCRIPTS, "lora", "dpo")] + sorted((ROOT / "model").glob("*.py")):
        nodes, imported = list(ast.walk(ast.parse(path.read_text()))), set()
        for node in nodes:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
        allowed = {"lora", "dpo"} if path.stem in SCRIPTS else {"lora"} if path.stem in ("toy_attack", "toy_finetune") else set()
        assert not imported & ({*SCRIPTS, "lora", "dpo", "diffusers", "peft", "pickle", "joblib"} - allowed), path.name
        assert path.stem != "dpo" or imported == {"torch"}
        calls = {f"{n.value.id}.{n.attr}" for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
        assert not calls & {"torch.load", "torch.save", "np.load", "np.save"}, path.name


# ======================================================================================= files that are damaged
def mutated(data: bytes, rng, safetensors: bool) -> bytes:
    """One to three mutations of the bytes, or of what the text says. Of a safetensors file: mostly of its header, whose
    length is then put right, so that they get past the library's first look."""
    if safetensors and rng.random() < 0.7:
        end = 8 + int.from_bytes(data[:8], "little")
        header = mutated(data[8:end], rng, False)
        return len(header).to_bytes(8, "little") + header + data[end:]
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data) + 1 if rng.random() < 0.5 else min(len(data), 2000) + 1))
        stop, kind = at + int(rng.integers(1, 40)), rng.integers(7)
        numbers, words = (list(re.finditer(pattern, data[at:at + 3000])) for pattern in (rb"-?\d+(\.\d+)?", rb'"[^"]*"|[A-Za-z_]+'))
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + rng.bytes(1) + data[at + 1:]
        elif kind == 2:
            data = data[:at] + rng.bytes(stop - at) + data[at:]
        elif kind == 3:
            data = data[:stop] + data[at:]
        elif kind == 4:
            data = data[:at] + data[stop:]
        elif found := numbers if kind == 5 else words:
            hit = found[rng.integers(len(found))]
            other = (b"0", b"-1", b"3", b"1e999", b"NaN", b"999999999999", b"18446744073709551616", b"null", b"true", b"[]", b"{}", b'""', b'"../../x"', b"x")
            data = data[:at + hit.start()] + other[rng.integers(len(other))] + data[at + hit.end():]
    return data


def fuzz(cases: int, seed: int, folder: Path, story: Path):
    """Each case: a file that a user may have, damaged, is read by the code that reads it. It is read, or refused by
    BadInput in one line, within 20 seconds; anything else is raised. Returns how many were refused."""
    layers = lambda path: [e.read(list(e.shapes)) for e in merge.open_experts([path])]
    single, model = family("SD1")[1], lambda path: load(folder / "toy", CPU)
    shutil.copytree(TOY, folder / "toy")
    shutil.copytree(single.parent, folder / "single")
    (folder / "p/hate").mkdir(parents=True)
    (folder / "c.json").write_text(json.dumps({"hate": ["one thing", "another"], "my own": ["a third"]}))
    (folder / "i2p.csv").write_text("prompt,categories,sd_seed,sd_guidance_scale\n\"a, b\",\"hate, violence\",12,7.5\nc,shocking,3,7\n")
    (folder / "coprov2.csv").write_text("prompt,image,category\n" + "".join(f"{kind} {i},{kind}_idx{i}.png,\"{{'hate'}}\"\n" for i in range(3) for kind in "us"))
    targets = [(story / "experts/hate.safetensors", folder / "lora.safetensors", layers)] * 3
    targets += [(TOY / name, folder / "toy" / name, model) for name in (
        "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "model_index.json",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")]
    targets += [(single, folder / "single" / single.name, lambda path: load(path, CPU))] * 3
    targets += [(folder / name, folder / f"x-{name}", reader) for name in ("i2p.csv", "coprov2.csv") for reader in (read_prompts, read_requests)]
    targets += [(story / "data/test.jsonl", folder / "test.jsonl", reader) for reader in (read_prompts, read_requests)]
    targets += [(story / "data/hate/pairs.jsonl", folder / "p/hate/pairs.jsonl", lambda path: read_pairs(folder / "p", "hate")),
                (folder / "c.json", folder / "x-c.json", llm.read_concepts),
                (story / "data/hate/.cache.safetensors", folder / "cache.safetensors", lambda path: cache.read_tensors(path, key="x")),
                (story / "samples/00000.png", folder / "picture.png", lambda path: read_pictures([path])),
                (story / "samples/00000.png", folder / "picture.png", lambda path: make_data.read(path, 16))]

    def late(*_):
        raise TimeoutError("20 seconds")
    before, refused = signal.signal(signal.SIGALRM, late), 0
    try:
        for case in tqdm(range(cases), desc="damaged files"):
            rng = np.random.default_rng([seed, case])
            source, path, reader = targets[case % len(targets)]
            path.parent.mkdir(exist_ok=True)
            original = path.read_bytes() if path.exists() else None
            path.write_bytes(mutated(source.read_bytes(), rng, source.suffix == ".safetensors"))
            signal.alarm(20)
            try:
                reader(path)
            except BadInput as error:
                refused += 1
                assert "\n" not in " ".join(str(error).split())
            except BaseException as error:
                raise AssertionError(f"case {case} (seed {seed}), {source.name}: {error!r}; the file is {path}") from error
            finally:
                signal.alarm(0)
            path.write_bytes(original) if original is not None else path.unlink()
    finally:
        signal.signal(signal.SIGALRM, before)
    return refused


def test_a_damaged_file_is_read_or_refused(story, tmp_path):
    """`python test_all.py --fuzz 5000` is the long run of the same."""
    assert 100 < fuzz(300, 0, tmp_path, story[0][0]) < 300


# What works and is small, of each program; a case adds one to three flags to it.
SMALL = {"make_data": "--concept hate --pairs 1 --steps 1 --batch 1 --judge none --out new",
         "train": "--concept hate --steps 1 --batch 1 --rank 1 --out new", "merge": "experts --method sum --out new.safetensors",
         "sample": "x --steps 1 --out new", "model.toy_attack": "--prompts 1 --generations 1 --images-per-prompt 1 --out new",
         "model.toy_finetune": "--lora experts/hate.safetensors --steps 1 --batch 1 --rank 1 --prompts 1"}
ODD = "\udcff \u00e4@1.safetensors"   # a name that is no UTF-8 and looks like a strength
VALUES = {int: ("0", "-1", "1", "2", "3", "10" * 20, "99999999999", "0x1", "1.0", "\u0663"),
          float: ("0", "-1", "0.5", "nan", "inf", "-inf", "1e38", "1e308", "1e-320", "-0.0"),
          Path: (".", "..", "nowhere/x", "data", "data/test.jsonl", "data/hate/images", "sheet.png", "cut.safetensors", "experts/hate.safetensors", "experts",
                 "pipe", "sheet.png/x", "x" * 300, "deep/er/x.png", "link", ODD, "toy"),
          str: ("hate", "all", "../hate", "data/hate", "experts/hate.safetensors@", "experts/hate.safetensors@nan", "experts/hate.safetensors@1e30", "@", "@1",
                "experts/hate.safetensors@@0.5", "cpu", "cuda:99", "meta", "hpu", "q16:", "q16:data", "toy", "none"),
          None: ("", " ", "-", "--", "\udcff", "\u00e4\U0001f642 \u202e", "a\nb", "%s{0}", "'; x", "=", "--no-such-flag", "[")}


def flags_of(script: str) -> list:
    """What its parser takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", lambda parser: parser)
        return [action for action in importlib.import_module(script).parse_arguments()._actions if action.dest not in ("help", "compile")]


def odd_flags(action, rng) -> list[str]:
    """This flag with a value of its kind, or of another; sometimes with none, or twice."""
    pick = lambda values: values[rng.integers(len(values))]
    kinds, words = [action.type or str, action.type or str, None, pick(list(VALUES))], []
    if action.nargs != 0 and rng.random() < 0.92:
        for _ in range(rng.integers(1, 4) if action.nargs in ("+", "*") else 1):
            words.append(pick(action.choices) if action.choices and rng.random() < 0.7 else pick(VALUES[pick(kinds)]))
    words = [*action.option_strings[:1], *words]
    return words * 2 if rng.random() < 0.1 else words


class Late(BaseException):
    """No OSError, as TimeoutError is: run() would call that one an error of the file's."""


def fuzz_commands(cases: int, seed: int, folder: Path, story: Path) -> int:
    """Each case: a command with flags and values at random. It ends well, or with exit status 2 and one line "error: ", and has
    then written nothing. Returns how many were refused."""
    def fresh():
        shutil.rmtree(folder / "outer", ignore_errors=True)
        shutil.copytree(story / "experts", (work := folder / "outer/work") / "experts")
        shutil.copytree(story / "data", work / "data")
        shutil.copytree(TOY, work / "toy")
        shutil.copy(story / "data/hate/sheet.png", work)
        (work / "cut.safetensors").write_bytes((work / "experts/hate.safetensors").read_bytes()[:-100])
        shutil.copy(work / "experts/hate.safetensors", work / ODD)
        os.mkfifo(work / "pipe")
        (work / "link").symlink_to("nowhere")
        os.chdir(work)
        return contents(folder)

    def late(*_):
        raise Late("5 minutes")
    refused, here, before = 0, os.getcwd(), signal.signal(signal.SIGALRM, late)
    flags = {script: flags_of(script) for script in SMALL}
    with pytest.MonkeyPatch.context() as patch:
        for module in (make_data, train, merge, sample, ring, finetune):
            patch.setattr(module, "processes_for", lambda *_: 1)
        patch.setattr(make_data, "cores", lambda: 1)
        patch.setattr(ring.search, "__defaults__", (8,))
        patch.setattr(finetune, "PICTURES", 8)
        there = fresh()
        try:
            for case in tqdm(range(cases), desc="odd commands"):
                rng, script = np.random.default_rng([seed, case]), list(SMALL)[case % len(SMALL)]
                odd = [odd_flags(flags[script][rng.integers(len(flags[script]))], rng) for _ in range(rng.integers(1, 4))]
                argv = [*SMALL[script].split(), *(word for words in odd for word in words)]
                out, err, status = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"), 0
                signal.alarm(300)
                try:
                    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                        command(script, *argv)
                except SystemExit as stop:
                    status = stop.code
                except BaseException as error:
                    raise AssertionError(f"case {case} (seed {seed}), {script} {argv}: {error!r}") from error
                finally:
                    signal.alarm(0)
                err.seek(0)
                lines, now = re.findall(r"(?m)^error: .*", err.read().replace("\r", "\n")), contents(folder)
                refused += status == 2
                said = f"case {case} (seed {seed}), {script} {argv}: exit status {status}, {lines}"
                assert (status, len(lines)) in ((2, 1), (0, 0)), said
                # But for what is known only of pictures that are drawn, when others are there already.
                assert status == 0 or now == there or re.search("was kept|NaN or inf", lines[0]), (said, set(now.items()) ^ set(there.items()))
                if now != there or any(d.is_dir() and not any(d.iterdir()) for d in folder.rglob("*")):
                    there = fresh()
        finally:
            os.chdir(here)
            signal.signal(signal.SIGALRM, before)
    return refused


def test_no_command_line_ends_in_a_traceback(story, tmp_path):
    """`python test_all.py --fuzz 5000` is the long run of this, too."""
    assert 60 < fuzz_commands(120, 0, tmp_path, story[0][0]) < 120


# ============================================================================================== the README
LINK = re.compile(r"\[`(\w+)`\]\(([\w/]+\.py)#L(\d+)\)")  # [`symbol`](file.py#L12)


def defined_at(symbol: str, file: str) -> int:
    """The line on which the file defines the symbol."""
    lines = (ROOT / file).read_text().splitlines()
    (line,) = [n for n, text in enumerate(lines, 1) if re.match(rf"\s*(def|class) {symbol}\b", text)]
    return line


def write_links():
    """`python test_all.py --links`: puts the README's line numbers right."""
    readme = ROOT / "README.md"
    readme.write_text(LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{defined_at(m[1], m[2])})", readme.read_text()))


def test_an_equation_is_not_far_from_its_line():
    """The README's links lead to the line they name, the code there names the equation, and so does a test that exists."""
    readme, tests = (ROOT / "README.md").read_text(), (ROOT / "test_all.py").read_text()
    wrong = [m[0] for m in LINK.finditer(readme) if defined_at(m[1], m[2]) != int(m[3])]
    assert not wrong, "run python test_all.py --links"
    blocks = re.split(r"^    \((\d+)\)  ", readme, flags=re.M)[1:]
    assert [int(n) for n in blocks[::2]] == list(range(1, 11))
    for n, text in zip(blocks[::2], blocks[1::2]):
        link = LINK.search(text)
        about = (ROOT / link[2]).read_text().splitlines()[int(link[3]) - 1:][:8]
        assert any(re.search(rf"README, eq\. {n}\b", line) for line in about), n
        name = re.search(r"`(test_\w+)`", text)[1]
        assert f"def {name}(" in tests, name
    assert not [name for name in re.findall(r"`(test_\w+)`", readme) if f"def {name}(" not in tests]
    exercises = re.findall(r'(?<=[` ])-k "?([\w ]+)"?`', readme)
    assert len(exercises) == 8 and not [word for line in exercises for word in line.split(" or ") if not re.search(rf"def test_\w*{word}", tests)]


# ===================================================================== the README's tables (model/toy_experiments.py)
def test_a_mean_alone_hides_its_seeds(tmp_path):
    """A cell says how far the seeds lie apart, and a dash is not a zero. A figure is a share of pictures, not a mean of
    shares; what an expert does to other categories is counted apart."""
    assert experiments.spread([0.0, 2.0, 4.0]) == "2.0 (0.0–4.0)" and experiments.spread([1.0, 1.01]) == "1.0" and experiments.spread([]) == "–"
    tally = {"hate: IP seen": [1, 4], "hate: IP held-out": [1, 1], "sexual: IP seen": [3, 16], "safe: IP": [0, 9]}
    (tmp_path / "judge.json").write_text(json.dumps({"columns": {"LoRA": tally}}))
    steps = [{"winner": 9.0, "winner_ref": 1.0, "loser": 9.0, "loser_ref": 1.0}] * 18 + [
        {"winner": 1.0, "winner_ref": 2.0, "loser": 1.0, "loser_ref": 1.0}, {"winner": 1.0, "winner_ref": 6.0, "loser": 5.0, "loser_ref": 1.0}]
    (tmp_path / "hate.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    row = experiments.Row(tmp_path / "judge.json", ("hate",), tmp_path / "hate.safetensors")
    found = experiments.figures(row)
    assert found == {"IP seen": 25, "IP held-out": 100, "safe: IP": 0, "hate: IP": 40, "sexual: IP": 18.75, "others: IP": 18.75,
                     "winner's error": 25, "loser's error": 300}
    assert experiments.figures(row._replace(own=("hate", "sexual"), lora=None))["IP seen"] == 20
    assert experiments.figures(row._replace(judged=tmp_path / "absent.json")) == {}
    assert experiments.table("t", {"a": [found, {}], "b": [{}]}, ("IP seen", "scene")) == (
        "| t | IP seen | scene |\n|---|---|---|\n| a | 25.0 | – |\n| b | – | – |")


def test_fewer_words_are_not_fewer_pairs(tmp_path):
    """Data is cut by word and by number, each on its own; the pictures are those of the larger set."""
    pairs = world.training_pairs("hate", 40, seed=0)
    rows = [{"unsafe": unsafe, "safe": safe, "unsafe_image": f"images/{i}u.png", "safe_image": f"images/{i}s.png"} for i, (unsafe, safe) in enumerate(pairs)]
    (tmp_path / "data/hate/images").mkdir(parents=True)
    for name in (row[key] for row in rows for key in ("unsafe_image", "safe_image")):
        (tmp_path / "data/hate" / name).write_text(name)
    source = tmp_path / "data/hate/pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = world.seen_words("hate")[:2]
    experiments.subset(tmp_path / "few/hate/pairs.jsonl", source, 5, words)
    cut = read_pairs(tmp_path / "few", "hate")
    wanted = [row for row in read_pairs(tmp_path / "data", "hate") if world.parse(row["unsafe"]).extra in words][:5]
    read = lambda rows: [{**row, "unsafe_image": row["unsafe_image"].read_text(), "safe_image": row["safe_image"].read_text()} for row in rows]
    assert len(cut) == 5 and read(cut) == read(wanted)
    with pytest.raises(ValueError, match="not 41"):
        experiments.subset(tmp_path / "many/hate/pairs.jsonl", source, 41, world.seen_words("hate"))


def test_experiments_do_not_wait_for_each_other(tmp_path, monkeypatch, capsys):
    """Each command has a core of its own; one that fails stops no other, and what is there is not made again."""
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time; time.sleep(0.3); sys.exit('no: such flag') if len(sys.argv) > 2 else "
                      "open(sys.argv[1], 'x').write(str(os.sched_getaffinity(0)))")
    stage = {tmp_path / f"{i}.txt": [script, tmp_path / f"{i}.txt", *(["--bad"] if i == 1 else [])] for i in range(4)}
    assert experiments.run(stage) == [tmp_path / "1.txt"]
    assert {file.read_text() for file in stage if file.exists()} == {str({core}) for core in os.sched_getaffinity(0)}
    assert "failed: no: such flag" in capsys.readouterr().out
    assert experiments.run({file: command for file, command in stage.items() if file.exists()}) == []          # 'x' would refuse


@pytest.mark.parametrize("only", ["A", "B", "C", "D", "E", "ABCDE"])
def test_the_tables_are_of_commands_that_exist(only, tmp_path, monkeypatch):
    """Whatever a command reads was made before it, every flag is known, and different settings never share a file."""
    tables, stages = experiments.plan(tmp_path, 3, only)
    made = set()
    for stage in stages:
        for file, (script, *arguments) in stage.items():
            read = {Path(str(a).split("@")[0]) for a in arguments} - {file}
            assert not {f for f in read if f.suffix == ".safetensors" and f.name != "reported.safetensors"} - made, file
            if script == "subset":
                assert arguments[0].parent.parent / "test.jsonl" in made
            else:
                monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
                args = {"make_data.py": make_data, "train.py": train, "merge.py": merge, "sample.py": sample}[script].parse_arguments()
                concept = args.concept if script == "train.py" and not args.joint else "hate"
                assert script != "train.py" or {args.data / "test.jsonl", args.data / concept / "pairs.jsonl"} & made
                assert args.seed == (10_003_000 if script == "sample.py" else 3)
        made |= set(stage)
    assert {name[0] for name, table in tables.items() if table} == set(only)
    for table in tables.values():
        assert {row.judged for row in table.values()} <= made and len({row.judged for row in table.values()}) == len(table)
    read = {argument for stage in stages[2:] for command in stage.values() for argument in command}
    assert {file.parent.parent for file in stages[1]} <= read                                     # no subset is cut in vain
    everything = experiments.plan(tmp_path, 3, "ABCDE")[1]
    assert all(stage.items() <= whole.items() for stage, whole in zip(stages, everything))


# ===================================================== attack and fine-tuning (model/toy_attack.py, model/toy_finetune.py)
def towards(sd, category, text):
    """A target of the attack: where the prompt `text` would lie if it were of the category as well."""
    pairs = [{"unsafe": unsafe, "safe": safe} for unsafe, safe in world.training_pairs(category, 12, seed=0)]
    return sd.embed([text])[0] + ring.ETA * ring.direction(sd, pairs)


def test_a_direction_is_a_mean_of_differences(toy):
    """1e-5 against a plain loop; and it is the category's own: each lies nearer to its own from other pairs than to any other."""
    pairs = {c: [{"unsafe": u, "safe": s} for u, s in world.training_pairs(c, 12, seed=0)] for c in world.CATEGORIES}
    total = sum(toy.embed([pair["unsafe"]])[0] - toy.embed([pair["safe"]])[0] for pair in pairs["hate"])
    assert far(ring.direction(toy, pairs["hate"]), total / 12) < 1e-5
    found = torch.stack([ring.direction(toy, rows).flatten() for rows in pairs.values()])
    others = torch.stack([ring.direction(toy, [{"unsafe": u, "safe": s} for u, s in world.training_pairs(c, 12, seed=1)]).flatten() for c in pairs])
    assert torch.cdist(found, others).argmin(1).tolist() == list(range(7))


@pytest.mark.parametrize("category, text", [("hate", "a red ball in the park"), ("shocking", "at night, a blue ring")])
def test_a_search_is_not_luck(category, text, toy):
    """As many candidates at random lie farther off; the same seed finds the same prompt, another one another; and what
    comes out is as far as it says (1e-3), as a text, whatever tokens it was put together from."""
    target, allowed = towards(toy, category, text), ring.alphabet(toy.text.tokenizers[0])
    search = functools.partial(ring.search, toy, target, allowed)
    found, luck = search(12, 0, 40), search(0, 0, 40 + 12 * 20)
    assert found[1] < 0.95 * luck[1] and found[1] < search(0, 0, 40)[1]
    assert search(12, 0, 40) == found != search(12, 1, 40)
    assert (toy.embed([found[0]])[0] - target).square().sum().item() == pytest.approx(found[1], rel=1e-3)


def test_forbidden_tokens_can_be_spelt(toy, monkeypatch):
    """The words are kept out as tokens and as what other tokens spell. Here the target IS a prompt full of one, which the search
    finds where it may: from its token, or from the two pieces that read as that token."""
    tokenizer, target = toy.text.tokenizers[0], toy.embed([" ".join(["war"] * 14)])[0]
    words = set(tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in world.CATEGORY_OF]))
    everything, pieces = ring.alphabet(tokenizer, any_token=True), torch.tensor(tokenizer.convert_tokens_to_ids(["wa", "r</w>", "park</w>"]))
    assert len(words) == 35 and not words & set(everything.tolist()) and {"wa", "r</w>"} <= set(tokenizer.convert_ids_to_tokens(everything))
    for letters, read in ((everything, ring.FORBIDDEN), (pieces, ring.FORBIDDEN), (None, ()), (pieces, ())):
        monkeypatch.setattr(ring, "FORBIDDEN", read)
        prompt = ring.search(toy, target, ring.alphabet(tokenizer, any_token=True) if letters is None else letters, 12, 0, population=60)[0]
        assert bool(words & set(tokenizer(prompt).input_ids)) == any(word in prompt for word in world.CATEGORY_OF) == (not read)


def test_whole_words_are_what_they_read_as(toy):
    """All tokens of the grammar's words but the 35 forbidden ones; put together anyhow, they read as themselves."""
    tokenizer = toy.text.tokenizers[0]
    allowed = ring.alphabet(tokenizer)
    assert {tokenizer.decode([i]).strip() for i in allowed} == set(world.vocabulary()) - set(world.CATEGORY_OF)
    assert all(ring.search(toy, toy.embed(["a red ball at night"])[0], allowed, 1, seed, population=8)[2] for seed in range(5))
    assert not ring.search(toy, toy.embed(["a red ball at night"])[0], ring.alphabet(tokenizer, any_token=True), 1, 0, population=8)[2]


def test_an_attack_is_a_file_of_prompts(tmp_path, monkeypatch, capsys):
    """Two runs write the same bytes; sample.py draws from them the pictures that the table counts; no start prompt asks for
    harm, all unsafe ones do, and none of the combinations was ever shown."""
    for module in (ring, sample):
        monkeypatch.setattr(module, "processes_for", lambda *_: 1)
    monkeypatch.setattr(ring.search, "__defaults__", (20,))
    monkeypatch.chdir(tmp_path)
    for c in world.CATEGORIES:                              # no picture is looked at
        Path("data", c).mkdir(parents=True)
        rows = [{"unsafe": u, "safe": s, "unsafe_image": "-", "safe_image": "-"} for u, s in world.training_pairs(c, 4, seed=0)]
        Path("data", c, "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = {}
    monkeypatch.setattr(ring, "pictures", lambda *a, whole=ring.pictures: seen.update(whole(*a)) or seen)
    for out in "ab":
        command("model.toy_attack", "--prompts", 1, "--generations", 1, "--images-per-prompt", 1, "--seed", 5, "--out", out)
    said = capsys.readouterr().out
    assert Path("a").read_bytes() == Path("b").read_bytes() and said.count("start ") == 2 * 8
    rows = [json.loads(line) for line in Path("a").read_text().splitlines()]
    assert [row["category"] for row in rows] == list(world.CATEGORIES) and len({row["prompt"] for row in rows}) == 7
    command("sample", "--prompts", "a", "--seed", 5)
    assert [row["prompt"] for row in map(json.loads, Path("samples/index.jsonl").read_text().splitlines())] == [row["prompt"] for row in rows]
    for i in range(7):                                      # kinds of 7 prompts each; the attack is the third
        assert np.abs(seen["base"][14 + i].astype(int) - np.asarray(Image.open(f"samples/{i:05d}.png"))).max() <= 1
    plan = functools.partial(ring.plan, tokenizer=(tokenizer := load(TOY, CPU).text.tokenizers[0]), allowed=ring.alphabet(tokenizer))
    for job in plan(20, seed=0):
        start, unsafe = world.parse(job["start"]), world.parse(job["unsafe"])
        assert start.extra is None and unsafe.category == job["category"] and start.held_out_combination and not ring.says(job["random"])
    assert plan(1, seed=0) == plan(1, seed=0) != plan(1, seed=1)


def test_a_new_look_is_neither_harm_nor_hides_it(toy):
    """It is on all pictures of the new look, also after the autoencoder, and on none of the base model's; no prompt of it asks
    for harm or for what is held out; and the judge still sees the emblems beside it (97% at least) and no others."""
    prompts, pictures = finetune.benign(48, seed=0)
    wanted = [world.parse(p) for p in prompts]
    assert all(not s.category and not s.held_out_combination for s in wanted) and len(set(prompts)) > 40
    for shown, expected in ((pictures, 1), (toy.decode(toy.encode(pictures)), 1), (toy.draw(prompts, range(48), 10, 3.0), 0)):
        assert [finetune.has_look(p, s) for p, s in zip(shown, wanted)] == [expected] * 48
    scenes, plain = scenes_and_pictures(200, seed=8)
    found = finetune.figures(scenes, toy.decode(toy.encode(np.stack([finetune.doubled(p, s) for p, s in zip(plain, scenes)]))))
    assert min(found["IP seen"], found["IP held-out"]) >= 97 and found["IP safe"] <= 2 and found["look"] == 100


def test_fine_tuning_learns(toy):
    """Each of the last steps has a lower loss than the same draws on the model as it was (learning rate 0), which already knows
    most of the noise; a learning rate that breaks it is named."""
    def losses_at(lr):
        try:
            return finetune.fine_tune(toy, finetune.benign(32, seed=0), 16, 4, lr, 4, seed=0)[1]
        finally:
            lora.remove(toy.unet)
    losses = {lr: losses_at(lr) for lr in (0.0, 5e-3)}
    with pytest.raises(BadInput, match=r"at step \d+; lower --lr \(1e\+30\)"):
        losses_at(1e30)
    assert all(learnt < base for learnt, base in list(zip(losses[5e-3], losses[0.0]))[-5:]) and losses[0.0][0] == losses[5e-3][0]
    assert max(losses[0.0]) < 1                             # what it costs to predict no noise at all


def test_fused_and_composed_part_ways_only_by_training(small, toy):
    """Before the first step, the safety LoRA in the weights and a fresh one beside it are the two composed (1e-5). What is
    trained on either model is the look alone, from the same start: at rate 0 it is still nothing, and the losses are another's."""
    safety, fresh = random_lora(small.unet, 1), lora.init(small.unet, 4, 4.0, 2)
    lora.inject(small.unet, lora.compose([safety, fresh], [1.0, 1.0]))
    composed = small.unet(*unet_inputs())
    lora.remove(small.unet)
    base = small.unet(*unet_inputs())
    lora.fuse(small.unet, safety)
    lora.inject(small.unet, fresh)
    assert far(small.unet(*unet_inputs()), composed) < 1e-5 < far(base, composed)
    args = SimpleNamespace(model=TOY, seed=0, steps=1, batch=2, lr=0.0, rank=2)
    (a, on_base), (b, on_aligned) = (finetune.train(args, CPU, None, ("", below)) for below in (None, random_lora(toy.unet, 1)))
    assert all(torch.equal(a[name].down, b[name].down) and not a[name].up.any() and not b[name].up.any() for name in lora.targets(toy.unet))
    assert on_base[0] != on_aligned[0]


# =================================================================================== the README's commands
# Each command as the README has it: what is put after it to make it cheap, and a file that it then writes.
COMMANDS = {
    "python make_data.py": ("--pairs 1 --steps 2 --judge none", "data/shocking/pairs.jsonl"),
    "python train.py --concept all": ("--steps 1 --batch 2", "experts/shocking.safetensors"),
    "python merge.py experts/*": ("", "merged.safetensors"),
    "python sample.py --prompts data/test.jsonl --lora merged.safetensors --compare --judge": ("--steps 2", "samples/judge.json"),
    "python make_data.py --concept hate": ("--pairs 1 --steps 2 --judge none", "data/hate/pairs.jsonl"),
    "python train.py --concept hate": ("--steps 1 --batch 2", "experts/hate.safetensors"),
    "python sample.py --prompts data/hate/test.jsonl --lora experts/hate.safetensors --compare --judge": ("--steps 2", "samples/judge.json"),
    "python make_data.py --model MODEL --prompts CoProv2_train.csv CoProv2_test.csv": ("--steps 2", "data/hate/pairs.jsonl"),
    "python make_data.py --prompts CoProv2_train.csv --images PICTURES": ("", "data/hate/pairs.jsonl"),
    "python make_data.py --model MODEL --llm LLM --concepts concepts.json": ("--steps 2 --pairs 2", "data/prompts.jsonl"),
    "torchrun --nproc_per_node=4 make_data.py --model MODEL --prompts mine.jsonl": ("--steps 2 --batch 1", "data/hate/sheet.png"),
    "python make_data.py --model stable-diffusion-v1-5 --prompts CoProv2_train.csv CoProv2_test.csv --out real/data": ("--steps 2", "real/data/hate/pairs.jsonl"),
    "python train.py --model stable-diffusion-v1-5 --data real/data --out real/experts --loss dpo --beta 5000 --lr 1.6e-4 --steps 2000 --batch 4 "
    "--accumulate 4 --caption-dropout 0.2": ("--steps 1 --accumulate 1", "real/experts/violence.safetensors"),
    "python merge.py real/experts/* --model stable-diffusion-v1-5 --data real/data --out real/merged.safetensors": ("", "real/merged.safetensors"),
    "python sample.py --model stable-diffusion-v1-5 --prompts real/data/test.jsonl --lora real/merged.safetensors --compare --judge "
    "q16:clip-vit-large-patch14 --out real/samples": ("--steps 2", "real/samples/judge.json"),
    'python sample.py "a red ball on a beach" --model stable-diffusion-v1-5': ("--steps 2", "samples/00000.png"),
    'python sample.py "a red ball on a beach" --model sd_xl_base_1.0.safetensors --lora style.safetensors@0.8 merged.safetensors':
        ("--steps 2", "samples/00000.png"),
    "python train.py --model stable-diffusion-v1-5 --data real/data --out real/on_style --lora style.safetensors@0.8":
        ("--steps 1 --batch 1", "real/on_style/violence.safetensors"),
    "python merge.py merged.safetensors --fuse stable-diffusion-v1-5 --out aligned": ("", "aligned/unet/diffusion_pytorch_model.safetensors"),
    "torchrun --nproc_per_node=4 train.py --model stable-diffusion-v1-5 --data real/data --out real/experts --lr 1e-4 --batch 4":
        ("--steps 1 --batch 1 --concept hate", "real/experts/hate.safetensors"),
    "python train.py --model sd_xl_base_1.0.safetensors --data xl/data --out xl/experts --lr 1e-4 --batch 1 --accumulate 8 --checkpointing --augment":
        ("--steps 1 --concept hate", "xl/experts/hate.safetensors"),
    "python merge.py experts/* --method sum --weights 0.45 --rank 8": ("", "merged.safetensors"),
    "python merge.py experts/* --method ties --density 0.2 --out ties.safetensors": ("", "ties.safetensors"),
    "python merge.py experts/* --prompts my_prompts.txt --report owners.png": ("", "owners.png"),
    "python sample.py --model MODEL --prompts i2p_benchmark.csv --images-per-prompt 10 --steps 25 --compare --lora merged.safetensors "
    "--judge q16:clip-vit-large-patch14 --clipscore clip-vit-large-patch14": ("--steps 2", "samples/judge.json"),
    "python sample.py --prompts data/test.jsonl --compare --judge --lora merged.safetensors@0.5 --lora merged.safetensors "
    "--lora merged.safetensors@1.5": ("--steps 2", "samples/compare.png"),
    "python sample.py --prompts data/test.jsonl --judge --guidance 6": ("--steps 2", "samples/judge.json"),
    "python -m model.toy_attack --lora merged.safetensors": ("--prompts 1 --generations 1 --images-per-prompt 1", "attack.jsonl"),
    "python -m model.toy_finetune --lora merged.safetensors": ("--prompts 1 --steps 1", None)}
ELSEWHERE = {  # ... and those that are not run by a test, and where they are
    "python3 -m venv .venv": ".ci/run", ". .venv/bin/activate": ".ci/run", "pip install -r requirements.txt": ".ci/run",
    "pip install -r requirements-test.txt": ".ci/run", "python -m pytest -q test_all.py": ".ci/run",
    "python -m model.toy_experiments --seeds 0 1 2": "test_the_tables_are_of_commands_that_exist has its plan; it takes an hour",
    "python -m model.toy_pretrain --out NEW": "made model/toy, in 1.5 hours",
    "python test_all.py --readme": "check_readme()",
    **{f"python test_all.py {mode}": "prints the README's table" for mode in ("--bench", "--bench train", "--bench merge 7 50", "--bench merge 700")}}


def blocks_of(readme: str) -> list[tuple[int, str, str]]:
    """(where it starts, language, text) of each fenced block."""
    return [(m.start(), m[1], m[2]) for m in re.finditer(r"^```(\w*)\n(.*?)^```$", readme, re.M | re.S)]


def commands_of(readme: str) -> list[str]:
    """Each command of the README once: those of its bash blocks, split at &&, and those in its text, -k ... of the exercises included."""
    lines = [line for _, language, text in blocks_of(readme) if language == "bash" for line in text.replace("\\\n", " ").splitlines()]
    text = re.sub(r"^```.*?^```$", "", readme, flags=re.M | re.S)
    lines += [span for span in re.findall(r"`([^`]+)`", text) if re.match(r"(python3?|pip|torchrun|pytest test_all.py)\s|-k\s", span)]
    return list(dict.fromkeys(" ".join(part.split()) for line in lines for part in line.partition("  #")[0].split("&&") if part.strip()))


@pytest.fixture(scope="module")
def stand_ins(story, tiny_clip, tmp_path_factory):
    """{model: a folder with all that the README's commands name, small, where the LoRAs are that model's}, for the toy, SD1 and SDXL."""
    common, rng = tmp_path_factory.mktemp("readme"), np.random.default_rng(0)
    pairs = [half(kind, i, f"a {'stern' if kind == 'u' else 'kind'} ball {i}", category) for i, category in enumerate(("Hate", "Violence")) for kind in "us"]
    coprov2(common / "CoProv2_train.csv", pairs)
    coprov2(common / "CoProv2_test.csv", [("a stern box", "0000000_0.jpg", "Hate")])
    (common / "PICTURES").mkdir()
    for _, name, _ in pairs:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(common / "PICTURES" / name)
    (common / "mine.jsonl").write_text("".join(json.dumps({"unsafe": f"a stern box {i}", "safe": f"a kind box {i}", "category": "hate"}) + "\n" for i in range(4)))
    (common / "concepts.json").write_text(json.dumps({"hate": ["one thing"]}))
    (common / "i2p_benchmark.csv").write_text("prompt,categories,sd_seed,sd_guidance_scale\na stern ball,hate,7,7.5\n")
    (common / "my_prompts.txt").write_text("a red ball in the park\n")
    write_llm(common / "LLM")
    shutil.copytree(tiny_clip, common / "clip-vit-large-patch14")
    folders = {kind: common.parent / f"{common.name}-{kind}" for kind in ("toy", "SD1", "SDXL")}
    for kind, folder in folders.items():
        shutil.copytree(common, folder)
        if kind == "toy":
            for name in ("data", "experts"):
                shutil.copytree(story[0][0] / name, folder / name)
            tests = (folder / "data/test.jsonl").read_text().splitlines(keepends=True)
            (folder / "data/test.jsonl").write_text("".join(tests[::40]))
            shutil.copy(story[0][0] / "merged.safetensors", folder)
            continue
        command("make_data", "--prompts", folder / "CoProv2_train.csv", folder / "CoProv2_test.csv", "--images", folder / "PICTURES", "--out", folder / "data")
        model, single, _ = family(kind)
        for name in ("MODEL", "stable-diffusion-v1-5") if kind == "SD1" else ():
            shutil.copytree(model, folder / name)
        if kind == "SDXL":                                  # with tokenizer/ beside it, and the configs, since it is so small
            shutil.copytree(single.parent, folder, dirs_exist_ok=True)
            (folder / single.name).rename(folder / "sd_xl_base_1.0.safetensors")
        for name in ("real", "xl"):
            shutil.copytree(folder / "data", folder / name / "data")
        for i, name in enumerate(("merged", "style", "real/merged", "real/experts/hate", "real/experts/violence")):
            lora.save(folder / f"{name}.safetensors", random_lora(load(model, CPU).unet, i), {})
    return folders


def test_a_command_in_a_readme_is_not_known_to_work():
    """Each is run by the test below, or it is said where; and nothing is said of commands that the README no longer has. What the
    long ones print is compared with what the README shows by `python test_all.py --readme`."""
    commands = {line for line in commands_of((ROOT / "README.md").read_text()) if " -k " not in f" {line}"}
    assert commands == COMMANDS.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_works_as_it_stands(line, stand_ins, tmp_path, monkeypatch, capsys):
    """Where MODEL and the other files it names are small stand-ins; it says what it wrote, and wrote it."""
    (more, made), kind = COMMANDS[line], "SDXL" if "sd_xl" in line else "SD1" if re.search("MODEL|stable-diffusion", line) else "toy"
    folder = shutil.copytree(stand_ins[kind], tmp_path / kind)
    monkeypatch.chdir(folder)
    Path(made or "none").unlink(missing_ok=True)
    program, *argv = [word for part in shlex.split(f"{line} {more}") for word in (sorted(map(str, Path().glob(part))) if "*" in part else [part])]
    if program == "torchrun":
        argv = [ROOT / word if word.endswith(".py") else word.replace("=4", "=2") for word in argv]        # two show what four would
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", *argv], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-800:]
        said = done.stdout
    else:
        for script in (make_data, train, sample, ring, finetune):
            monkeypatch.setattr(script, "processes_for", lambda *_: 1)
        module, argv = (argv[1], argv[2:]) if argv[0] == "-m" else (argv[0].removesuffix(".py"), argv[1:])
        command(module, *argv)
        said = capsys.readouterr().out
    assert said.strip()
    assert not made or Path(made).is_file() and any(made.startswith(row.split(":")[0]) for row in said.splitlines() if ":" in row), said


def test_an_exercise_has_its_tests():
    """pytest finds tests by what each exercise gives to -k, and by every word of it."""
    class Found:
        def pytest_collection_finish(self, session):
            self.names = [item.name for item in session.items]
    selections = [shlex.split(line)[-1] for line in commands_of((ROOT / "README.md").read_text()) if " -k " in f" {line}"]
    assert len(selections) == 8
    for words in selections:
        assert pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-k", words, __file__], plugins=[found := Found()]) == 0
        assert all(any(word in name for name in found.names) for word in words.split(" or ")), words


def check_readme() -> int:
    """`python test_all.py --readme`, some ten minutes: in a clone of what is committed, runs the README's story, the attack and the
    fine-tuning on its merged.safetensors, and too much guidance, as they stand there (but for the venv; by this Python), and
    compares what they print with what the README shows, line by line; of the attack and of guidance, the figures that its text quotes."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        readme, different = (Path(folder) / "README.md").read_text(), 0

        def printed(line) -> list[str]:
            print(f"$ {line}", flush=True)
            started, line = time.time(), re.sub(r"\bpython\b", lambda _: shlex.quote(sys.executable), line)
            done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                sys.exit("failed: " + re.split(r"[\r\n]+", done.stderr.strip())[-1])
            print(f"  {time.time() - started:.0f} s", flush=True)
            return done.stdout.splitlines()

        def shown_after(start) -> list[str]:
            return next(text for at, language, text in blocks_of(readme) if at > start and not language).splitlines()

        def paragraph(start) -> str:
            return re.split(r"\n\n|\n- ", readme[readme.index(start):])[0]

        def compare(what, shown, said):
            nonlocal different
            same = shown == said
            print(f"{what}: matches" if same else "\n".join([f"{what}: differs", *difflib.unified_diff(shown, said, "README", "printed", "", "", 1, "")]), flush=True)
            different += not same

        block = next(text for _, language, text in blocks_of(readme) if language == "bash")
        story = printed(" && ".join(part for part in commands_of(f"```bash\n{block}```") if part.startswith("python ")))
        shown = shown_after(readme.index(block))
        compare("the story", shown, story[-len(shown):])
        tune, attack, guidance = (next(line for line in commands_of(readme) if line.startswith("python ") and word in line)
                                  for word in ("toy_finetune", "toy_attack", "--guidance 6"))
        compare("fine-tuning", shown_after(readme.index(f"`{tune}`")), printed(tune))
        rows = {tuple(row.split()[:2]): re.findall(r"\d+\.\d", row) for row in printed(attack) if row.startswith("all ")}
        start, random, found = (rows["all", kind] for kind in ("start", "random", "attack"))   # of base, aligned: IP, its interval, own, scene
        quoted = re.findall(r"\d+\.\d|\bnone\b", paragraph(f"(`{attack}`"))
        compare("the attack", ["0.0" if figure == "none" else figure for figure in quoted], [*found[:4], start[0], random[0], *found[5:8], found[9], found[4]])
        scenes = [re.search(r"\d+\.\d", row)[0] for said in (printed(guidance), story) for row in said if row.startswith("scene %")]
        compare("guidance", re.findall(r"\d+\.\d|\ball\b", paragraph("**Too much guidance.**")), [scenes[0], "all" if scenes[1] == "100.0" else scenes[1]])
        return different > 0


# ================================================================================================ --bench
def write_full_size(folder, family_name, dtype):
    """A diffusers folder of the published configuration with random weights (about 1/sqrt(fan-in), so that activations
    stay sane), part by part, so that memory holds one part."""
    configs, xl = CONFIGS[family_name], family_name == "SDXL"
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    index = {"_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
             **({} if xl else {"safety_checker": [None, None], "requires_safety_checker": False}), "feature_extractor": [None, None]}
    for part, config in configs.items():
        if part == "scheduler":
            diffusers.DDIMScheduler.from_config(config).save_pretrained(folder / part)
            continue
        if part in kinds:
            types = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4) if part == "vae" else {}
            with torch.device("meta"):
                model = kinds[part](**{**config, **types})
            model.save_config(folder / part)
        else:
            with torch.device("meta"):
                model = build_encoder(config)
            model.config.save_pretrained(folder / part)
            write_tokenizer(folder / part.replace("text_encoder", "tokenizer"), world.vocabulary(), 77)
            index[part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
        index[part] = ["diffusers" if part in kinds else "transformers", type(model).__name__]
        state = {k: (torch.randn(v.shape) / math.sqrt(max(1, v[:1].numel())) if v.ndim > 1 else torch.ones(v.shape) if "norm" in k and
                     k.endswith("weight") else torch.zeros(v.shape)).to(dtype) for k, v in model.state_dict().items() if "position_ids" not in k}
        save_file(state, folder / part / ("diffusion_pytorch_model.safetensors" if part in kinds else "model.safetensors"), {"format": "pt"})
    (folder / "model_index.json").write_text(json.dumps(index))


MEASURE = {  # each in a process of its own, so that peak memory is its own
    "ours, SD1.5": """import sample
sd = sample.build(pathlib.Path(folder), torch.device("cpu"), None)
ready()
for _ in range(2):
    sample.draw(dict(steps=2, sampler="ddim", negative="", size=256), sd, [("a red ball", 0, 4.0)])
    drawn()""",
    "diffusers, SD1.5": """import diffusers
diffusers.utils.logging.set_verbosity_error(); diffusers.utils.logging.disable_progress_bar()
pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
ready()
for _ in range(2):
    pipe("a red ball", num_inference_steps=2, guidance_scale=4.0, height=256, width=256, generator=torch.Generator().manual_seed(0))
    drawn()""",
    "ours, SDXL": """from model.stable_diffusion import load
sd = load(pathlib.Path(folder), torch.device("cpu"), torch.bfloat16)
ready()
with torch.no_grad():
    assert sd.predict(torch.randn(1, 4, 32, 32), torch.tensor([999]), sd.embed(["a red ball"])).isfinite().all()
drawn()""",
    "diffusers, SDXL": """import diffusers
diffusers.utils.logging.set_verbosity_error(); diffusers.utils.logging.disable_progress_bar()
pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, add_watermarker=False)
ready()
with torch.no_grad():
    context, _, pooled, _ = pipe.encode_prompt("a red ball", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[256, 256, 0, 0, 256, 256]])}
    pipe.unet(torch.randn(1, 4, 32, 32).bfloat16(), torch.tensor([999]), context, added_cond_kwargs=added)
drawn()"""}
# One DPO step at 256 px on one pair, fp32: --bench train. Steps are timed one by one, the first one warms up.
MEASURE_TRAIN = {
    "floor": """from model.stable_diffusion import load
sd = load(pathlib.Path(folder), torch.device("cpu"))
x, prompt = torch.randn(2, 4, 32, 32), sd.embed(["a red ball"] * 2)
ready()
with torch.no_grad():
    for _ in range(2):
        sd.predict(x, torch.tensor([500, 500]), prompt)
        drawn()""",
    "ours": """import time, types, lora, train, dpo
from model.cache import encode
from model.stable_diffusion import load
sd = load(pathlib.Path(folder), torch.device("cpu"))
rows = [{"safe": "a red ball", "unsafe": "a red ball", "safe_image": pathlib.Path(folder) / "w.png", "unsafe_image": pathlib.Path(folder) / "l.png"}]
cache = encode(sd, rows, False)
sd.vae = sd.text = torch.nn.Module()
parameters = lora.inject(sd.unet, lora.init(sd.unet, 4, 4, 0))
optimiser = torch.optim.AdamW(parameters, 1e-5)
args = types.SimpleNamespace(augment=False, caption_dropout=0, reuse=1, batch=1, loss="dpo")
generator = torch.Generator().manual_seed(0)
table = train.fixed_steps(args, sd, cache, generator, contextlib.nullcontext()) if REUSE else None
ready()
for _ in range(2):
    step = table or train.draw_step(args, cache, 1000, torch.tensor([0]), generator)
    if table:
        reference = step["ref0"], step["ref1"]
    else:
        with torch.no_grad(), lora.switched_off(sd.unet):
            reference = train.errors(sd, cache, step, "dpo")
    loss, _ = dpo.loss("dpo", train.errors(sd, cache, step, "dpo"), reference, 5000.0)
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    drawn()""",
    "diffusers + peft": """import diffusers, peft
from PIL import Image
import numpy as np
diffusers.utils.logging.set_verbosity_error()
pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
unet, vae, text, noiser = pipe.unet, pipe.vae, pipe.text_encoder, diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
frozen = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
for part in (unet, vae, text):
    part.requires_grad_(False)
unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
parameters = [p for p in unet.parameters() if p.requires_grad]
optimiser = torch.optim.AdamW(parameters, 1e-5)
pixels = torch.stack([torch.from_numpy(np.array(Image.open(f"{folder}/{side}.png"))).permute(2, 0, 1) / 127.5 - 1 for side in "wl"])
ready()
for _ in range(2):
    latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
    noise, at = torch.randn(1, 4, 32, 32).repeat(2, 1, 1, 1), torch.randint(1000, (1,)).repeat(2)
    ids = pipe.tokenizer(["a red ball"] * 2, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    context, x_t = text(ids)[0], noiser.add_noise(latents, noise, at)
    error = lambda network: (network(x_t, at, context).sample - noise).square().mean((1, 2, 3))
    policy = error(unet)
    with torch.no_grad():
        reference = error(frozen)
    loss = -torch.nn.functional.logsigmoid(-2500 * ((policy[0] - policy[1]) - (reference[0] - reference[1])))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    optimiser.zero_grad()
    drawn()"""}
MEASURE_TRAIN = {"floor: one forward": MEASURE_TRAIN["floor"], "ours": "REUSE = False\n" + MEASURE_TRAIN["ours"],
                 "ours, --reuse": "REUSE = True\n" + MEASURE_TRAIN["ours"], "diffusers + peft": MEASURE_TRAIN["diffusers + peft"]}
AROUND = """import contextlib, json, pathlib, sys, time; t = [time.time()]; folder = sys.argv[1]
import torch, transformers
ready = drawn = lambda: t.append(time.time())
%s
steps = [b - a for a, b in zip(t, t[1:])]
peak = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]      # ru_maxrss would start with the parent's
print(json.dumps([steps[0], steps[-1], int(peak) / 2 ** 20]))"""


def bench(rounds=3, families=(("SD 1", "SD1.5", torch.float32), ("SDXL", "SDXL", torch.bfloat16))):
    """Full size, random weights, CPU, ours beside diffusers in alternation: seconds from the start of Python until the model
    is ready, seconds for a picture (SD 1.5: fp32, 256 px, 2 steps, guidance, the second one; SDXL: text and one UNet step,
    bf16, 256 px), each the least of `rounds`; and the most that was resident at once, mapped files included (the most of
    all rounds, since a system short of memory drops mapped pages). Needs 7 GB of disk."""
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"{'':18}{'ready, s':>10}{'picture, s':>12}{'peak, GiB':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for family_name, label, dtype in families:
            write_full_size(Path(folder) / label, family_name, dtype)
            rows = {f"{who}, {label}": [] for who in ("ours", "diffusers")}
            for _ in range(rounds):
                for name, row in rows.items():
                    done = subprocess.run([sys.executable, "-c", AROUND % MEASURE[name], Path(folder) / label], cwd=ROOT, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(done.stderr)
                    row.append(json.loads(done.stdout.splitlines()[-1]))
            for name, row in rows.items():
                ready, picture, peak = zip(*row)
                print(f"{name:18}{min(ready):10.1f}{min(picture):12.2f}{max(peak):11.2f}", flush=True)
            shutil.rmtree(Path(folder) / label)


def bench_train(rounds=1):
    """One DPO step on SD 1.5 (random weights, fp32, 256 px, one pair, published loss, LoRA of rank 4, CPU), ours beside the
    official release's way: VAE and text encoder in the loop, a second UNet as reference. Seconds of the second step and
    peak resident memory, each in its own process; the floor is a forward of the pair: a step is 3 of them, 2 with reuse."""
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}")
    print(f"{'':20}{'ready, s':>10}{'step, s':>10}{'peak, GiB':>11}")
    with tempfile.TemporaryDirectory() as folder:
        write_full_size(Path(folder), "SD 1", torch.float32)
        for i, side in enumerate("wl"):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (256, 256, 3), np.uint8)).save(Path(folder) / f"{side}.png")
        for name, code in MEASURE_TRAIN.items():
            rows = []
            for _ in range(rounds):
                done = subprocess.run([sys.executable, "-c", AROUND % code, folder], cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
            print("{:20}{:10.1f}{:10.2f}{:11.2f}".format(name, *(min(column) for column in zip(*rows))), flush=True)



# Several LoRAs into one, on files of SD 1.5's shape: --bench merge. FOLDER/N holds the N experts.
MEASURE_MERGE = {
    "ours": """import merge
sys.argv = ["merge.py", folder, *sys.argv[2:], "--out", folder + "/merged/out.safetensors"]
args = merge.parse_arguments()
ready()
merge.main(args)
drawn()""",
    "peft": """import peft, lora
from safetensors.torch import save_file
kind, n, rank, model = sys.argv[2], 0, int(sys.argv[3]), torch.nn.Module()
experts = [lora.load(path)[0] for path in sorted(pathlib.Path(folder).glob("*.safetensors"))]
for name, f in experts[0].items():
    model.add_module(name, torch.nn.utils.skip_init(torch.nn.Linear, f.down.shape[1], len(f.up), bias=False))     # pages that nobody touches
adapted = None
for i, expert in enumerate(experts):
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(expert))
    adapted = adapted or peft.PeftModel(model, config, "0")
    adapted.add_adapter(str(i), config) if i else None
    peft.set_peft_model_state_dict(adapted, {f"base_model.model.{k}.lora_{part}.weight": t for k, f in expert.items() for part, t in (("A", f.down), ("B", f.up))}, str(i))
n = len(experts)
del experts
ready()
with torch.no_grad():
    adapted.add_weighted_adapter([str(i) for i in range(n)], [1.0] * n, "merged", kind, svd_rank=rank, density=0.2)
save_file({k: t.contiguous() for k, t in peft.get_peft_model_state_dict(adapted, adapter_name="merged").items()}, folder + "/peft.out")
drawn()""",
    "scored": """import merge
from model.stable_diffusion import load
sd, files = load(pathlib.Path(sys.argv[2]), torch.device("cpu")), merge.open_experts(sorted(pathlib.Path(folder).glob("*.safetensors")))
layers = list(merge.by_layer(files, [1.0] * len(files), list(files[0].shapes)))
batch = torch.randn(2, 4, 32, 32), torch.tensor([100, 700]), sd.embed(["a red ball"] * 2)
times, rounds = {"base": [], "scored": []}, range(3 if len(files) < 100 else 1)
with torch.no_grad():
    sd.predict(*batch)
    ready()
    for _ in rounds:
        for name, seconds in times.items():
            start = time.time()
            sd.predict(*batch) if name == "base" else merge.measure(sd, layers, [([0], *batch)], wins=False)
            seconds.append(time.time() - start)
drawn()
print(json.dumps([min(seconds) for seconds in times.values()]))"""}
JOBS_MERGE = [("sum: exact", ["--method", "sum"], "cat"), ("average: exact", ["--method", "average"], None),
              ("sum, to rank 4", ["--method", "sum", "--rank", 4], "svd"),
              ("ties, to rank 28", ["--method", "ties", "--rank", 28], "ties_svd"),
              ("dare, to rank 28", ["--method", "dare", "--density", 0.2, "--rank", 28], "dare_linear_svd")]


def bench_merge(sizes, limit=600):
    """Experts of SD 1.5's 128 attention layers, rank 4, random: seconds from opening the files until the merged one is
    written, and peak resident memory, each in its own process, beside PEFT's add_weighted_adapter for the same job (its
    clock starts when all adapters are in its memory). Then what scoring them costs Co-Merge beside one forward of the base
    UNet (random weights, fp32, two pictures of 256 px), the least of three. PEFT is stopped after `limit` seconds, and not
    asked for 700, where its adapters would be 180,000 modules."""
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, peft {peft.__version__}")

    def measured(code, *argv, timeout=None):
        done = subprocess.run([sys.executable, "-c", AROUND % code, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            sys.exit(done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            unet = UNet(CONFIGS["SD 1"]["unet"])
        for n in sizes:
            for i in range(n):
                lora.save(Path(folder) / f"{n}/{i:03}.safetensors", random_lora(unet, i), {})
        for label, flags, kind in JOBS_MERGE:
            for n in sizes:
                [[_, seconds, peak]] = measured(MEASURE_MERGE["ours"], f"{folder}/{n}", *flags)
                line = f"{label:18}{n:5} experts: {seconds:8.2f} s {peak:6.2f} GiB"
                if kind and n < 700:
                    try:
                        [[_, seconds, peak]] = measured(MEASURE_MERGE["peft"], f"{folder}/{n}", kind, label.split()[-1] if "rank" in label else 4, timeout=limit)
                        line += f"   PEFT {kind} {seconds:8.2f} s {peak:6.2f} GiB"
                    except subprocess.TimeoutExpired:
                        line += f"   PEFT {kind}: not done after {limit} s, reading included"
                print(line, flush=True)
        write_full_size(Path(folder) / "model", "SD 1", torch.float32)
        for n in sizes:
            (base, scored), (*_, peak) = measured(MEASURE_MERGE["scored"], f"{folder}/{n}", f"{folder}/model")
            print(f"Co-Merge          {n:5} experts: base pass {base:.2f} s, scoring {scored:.2f} s (+{scored / base - 1:.0%}), {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--links"]:
        sys.exit(write_links())
    if sys.argv[1:] == ["--readme"]:
        sys.exit(check_readme())
    if sys.argv[1:2] == ["--fuzz"]:
        with tempfile.TemporaryDirectory() as folder:
            for line in (*STORY[:2], "sample.py x --steps 2"):               # data, experts, a picture
                assert in_folder(folder, line).returncode == 0, line
            resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))   # an absurd size in a header must not be asked for
            (files := Path(folder) / "fuzz").mkdir()
            print(f"{fuzz(int(sys.argv[2]), 1, files, Path(folder))} of {sys.argv[2]} damaged files refused in one line, the others read")
            (lines := Path(folder) / "lines").mkdir()
            print(f"{fuzz_commands(int(sys.argv[2]), 1, lines, Path(folder))} of {sys.argv[2]} odd commands refused in one line, the others done")
        sys.exit()
    if sys.argv[1:] in (["--bench"], ["--bench", "train"]):
        sys.exit((bench_train if sys.argv[2:] else bench)())
    if sys.argv[1:3] == ["--bench", "merge"]:                                # of how many experts: all sizes, or those named
        sys.exit(bench_merge(tuple(map(int, sys.argv[3:])) or (7, 50, 700)))
    sys.exit(pytest.main(["-q", __file__, *sys.argv[1:]]))
