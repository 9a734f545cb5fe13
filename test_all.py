"""Tests. Part I: lessons, in the order of the README's path, each named for the misconception that
it refutes. Part II: contracts: command lines, files, interruptions, structure.

Oracles are diffusers, peft, transformers, plain loops and formulas written out, not our code again.
"""
import ast
import contextlib
import copy
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from multiprocessing import forkserver
from operator import call
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import peft
import pytest
import torch
import transformers
from diffusers.pipelines.deprecated import stable_diffusion_safe
from peft.utils.merge_utils import ties
from PIL import Image, ImageDraw
from pytest import approx, fixture, raises
from safetensors.torch import load_file, save_file
from torch import nn

import dpo
import lora
import make_data
import merge
import sample
import train
from lora import Factors, layers
from model.data import language_model
from model.data.pairs import named_states, Pairs, read_latents, read_pairs, read_square, rejected
from model.data.prompt_files import read_prompts, read_requests, Request, split
from model.formats.checkpoint import encoder_files, model_files
from model.formats.fit import match
from model.formats.lora_file import expand, load as load_lora, save as save_lora
from model.formats.single_file import CONFIGS
from model.judges import check_requests, clip as judges, named_judge, nudenet
from model.judges.intervals import effective, max_exposed, mean_interval, share_interval, wilson
from model.judges.table import best, Figure, figures_of, measure, table
from model.toy.toy_judge import NOTHING, ToyJudge, Verdict
from model.lab import experiments
from model.rivals import (attack, editing, finetune, guards, losses, merging, steering,
                          table as rivals, whitebox)
from model.schedule import NoiseSchedule, sample as solve, SAMPLERS, stratified_times
from model.stable_diffusion import load, load_denoiser, StableDiffusion
from model.testing import checkpoints, fuzz, strangers
from model.testing.readme import BLOCK, SHOWN, commands_of
from model.text import build_encoder, Prompt
from model.tools import processes
from model.tools.command import at_strength, BadInput, named, run
from model.tools.files import (file_name, opened, read_json, read_jsonl, replacing,
                               save_tensors, sha256, tensors_hash, write_jsonl)
from model.tools.images import as_tensor, parameters_of, read_images, write_image
from model.tools.training import auto_beta, generator, load_state, save_state
from model.toy import TOY, world
from model.toy.pretrain import scenes_and_images
from model.unet import UNet
from model.vae import VAE

ROOT = Path(__file__).resolve().parent
CPU = torch.device("cpu")
SCRIPTS = {"make_data": make_data, "train": train, "merge": merge, "sample": sample,
           "rivals": rivals, "clip": judges}
# files: wrong or strange; pickles: names of files
# copies: of what, as what, and what then becomes of which file
# torn: the same of one file: what reads a copy of what, and why it is refused
# refused: a command and what its error must name; ranks: those that are refused
# settings: of a command, flags that change what it makes, and the settings that its files then name
# parts: a command, how much it draws at once, and what of it is lost; disks: commands that fill one
# torchrun: commands, and how one process does the same; protocols: of pickles, and numbers in them
# knows: files, and what of ours they may import
# told: by an expert, a merge and a picture of the story
# model cards: parameters of UNet, VAE and text encoders, and what only configs say
# headers: of a LoRA file; spellings: of its keys; prefixes: of keys, and our names
# families: a layer, headers of the file and of a merge, and the layer's name there
# starts: settings of LoRAs, and why they are refused; peft: settings that are not
# requests: a file, its text, and the requests in it; json: texts, and the lines of each fault
# forms: of one file of pairs; quirks: the pairs in QUIRKS; elsewhere: pictures of no folder
# chats: templates, and what is asked by them; answers: of language models, and the prompts in them
# schedules: what differs from SD 1's; verdicts: prompts, and what a judge sees
# figures: of the toy's judge on these, and of any judge
CASES = read_json(ROOT / "model/testing/cases.json")
parametrize = pytest.mark.parametrize
os.environ["PYTHONPATH"] = str(ROOT)    # for scripts that run in another folder
STORY = ("make_data --concept hate --pairs 8 --steps 4",
         "make_data --concept sexual --pairs 8 --steps 4", "train --steps 4 --batch 4",
         "merge experts",
         "sample red,ball,park blue,box,snow --steps 2 --compare --judge --out drawn "
         "--lora merged.safetensors@0.5")
torch.set_num_threads(1)


def far(a, b) -> float:
    """|a - b| / |b|"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def normal(what, *size) -> torch.Tensor:
    """Normally distributed numbers, the same ones in every run."""
    return torch.randn(size, generator=generator(what))


def refuses(says: str):
    """Inside, something must refuse its input and say so."""
    return raises(BadInput, match=says)


def parsed(line: str, **values):
    """A script's main() and arguments, of "train --concept hate --steps 2". {name} in the line
    stands for a value that may have spaces."""
    name, *argv = line.split()
    script = SCRIPTS[name]
    return script.main, script.parse_arguments([word.format(**values) for word in argv])


@contextlib.contextmanager
def heard():
    """Inside, what is printed goes to the file that this gives."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


def command(line: str, **values) -> str:
    """Runs a script in this process and folder. Returns what it says."""
    main, args = parsed(line, **values)
    with heard() as said:
        main(args)
    return said.getvalue()


def refusal(line: str, **values) -> str:
    """The one line that a script prints on stderr when it refuses, with exit status 2."""
    with raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()) as said:
        run(*parsed(line, **values))
    *notes, error = said.getvalue().strip().splitlines()
    assert stop.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    return error


def finished(*argv, folder: Path = Path()) -> subprocess.CompletedProcess:
    """A Python program, run to its end in that folder, without an error."""
    done = subprocess.run([sys.executable, *argv], cwd=folder, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done


def contents(folder: Path | str) -> dict[str, str]:
    """{file: hash} of everything below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@cache
def toy():
    return load(TOY, CPU)


@cache
def pipe():
    """The toy, opened by diffusers."""
    return diffusers.StableDiffusionPipeline.from_pretrained(TOY, safety_checker=None).to("cpu")


@fixture(scope="session")
def watched(tmp_path_factory):
    """A small run of two concepts, told in this process: (its folder, with data/, experts/,
    merged.safetensors and drawn/; the files that were moved into place; the network addresses that
    were asked for)."""
    folder, moved, asked, replace = tmp_path_factory.mktemp("story"), [], [], os.replace

    def noted(source, target):
        moved.append(Path(target).resolve())
        replace(source, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "replace", noted)
        for name in ("socket", "getaddrinfo", "create_connection"):
            patch.setattr(socket, name, lambda *address, **_: asked.append(address))
        patch.setattr(processes, "cores", lambda: 1)
        for line in STORY:
            command(line)
    return folder, moved, asked


@fixture(scope="session")
def story(watched) -> Path:
    return watched[0]


@fixture
def inside(story, tmp_path, monkeypatch):
    """A copy of the story, as the current folder."""
    shutil.copytree(story, tmp_path / "story")
    monkeypatch.chdir(tmp_path / "story")
    return tmp_path / "story"


@fixture(autouse=True)
def no_workers(monkeypatch):
    """Commands in this process draw and train here, where they can be watched."""
    monkeypatch.setattr(processes, "cores", lambda: 1)


@fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder, as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Trap:
    """Unpickled, it leaves a file behind."""
    __reduce__ = lambda self: (open, ("sprung", "w"))


# ---- Part I, lessons: the loss and one training step, LoRA, merging and calibration


RIVALS = [f"model.rivals.losses.{name}" for name in ("duo", "sdpo", "sc_dpo")]
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
INPUTS = (normal("x_t", 3, 4, 8, 8), torch.tensor([999, 500, 1]),
          normal("context", 3, 5, 96))    # of a UNet


def random_pairs(seed, P: int = 6, L: int = 5, D: int = 96, pooled: int = 0) -> Pairs:
    """What read_latents() gives, of noise."""
    def prompt(kind: str, n: int) -> Prompt:
        return Prompt(normal(f"{seed} {kind}", n, L, D),
                      normal(f"{seed} pooled {kind}", n, pooled) if pooled else None)
    return Pairs(normal(f"{seed} winner", P, 4, 8, 8), normal(f"{seed} loser", P, 4, 8, 8),
                 prompt("unsafe", P), prompt("safe", P), prompt("empty", 1))


PAIR = {"safe": "a", "unsafe": "b", "safe_image": "00000_safe.png",
        "unsafe_image": "00000_unsafe.png"}


def write_pairs(concept: str, rows: list[dict]):
    """data/<concept>/ as make_data.py leaves it, without images."""
    folder, pairs = Path("data", concept), random_pairs(concept, len(rows))
    write_jsonl(folder / "pairs.jsonl", rows)
    made_from = {"encoders": sha256(*encoder_files(TOY)), "pairs": sha256(folder / "pairs.jsonl")}
    tensors = {"winner": pairs.winner, "loser": pairs.loser}
    for kind in ("unsafe", "safe", "empty"):
        tensors |= named_states(kind, getattr(pairs, kind))
    save_tensors(folder / "latents.safetensors", tensors, made_from)


def whole_step(pairs: Pairs, S: int, dropout: float, step: int, *key) -> dpo.Batch:
    """A step's pairs, undivided."""
    return next(train.batches(pairs, S, S, toy().schedule, dropout, CPU, step, *key))


def fresh_policy(model: Path = TOY, precision: str = "fp32"):
    """(denoiser, parameters) before the first step."""
    denoiser = load_denoiser(model, CPU, precision)
    return denoiser, lora.inject(denoiser.unet, lora.init(denoiser.unet, 4, 4, generator(0)))


def first_step(denoiser, parameters, pairs: Pairs, **flags) -> dict[str, float]:
    """The log of one step of train.train()."""
    values = {"precision": "fp32", "beta": 10.0, "lr": 2e-3, "steps": 1, "batch_size": 4,
              "accumulate": 1, "caption_dropout": 0.0, **flags}
    return train.train(denoiser, parameters, pairs, dpo.safety_dpo, Path("no state"),
                       {"concept": "hate"}, 0, **values)[0]


def factors_in(file: Path | str) -> dict[str, Factors]:
    return load_lora(Path(file))[0]


def distance(path: Path, dense: dict[str, torch.Tensor]) -> float:
    """far() of all delta W in a file, together, from these."""
    factors = factors_in(path)
    assert factors.keys() == dense.keys()
    found = torch.cat([f.delta().flatten() for f in factors.values()])
    return far(found, torch.cat([dense[name].flatten() for name in factors]))


def random_expert(seed: int, rank: int, alpha: float, unet=None) -> dict[str, Factors]:
    """Of attention, 1x1 and 3x3 convolutions, one of them of stride 2."""
    adapted = r"(down_blocks_0|mid_block).*(attn|proj_in|conv1|downsamplers_0_conv)"
    drawn = partial(torch.randn, generator=generator("expert", seed))
    return {name: f._replace(down=drawn(rank, f.down.shape[1]), up=drawn(len(f.up), rank) / 10,
                             alpha=alpha * (1 + len(f.kernel) / 2))
            for name, f in checkpoints.every_layer(unet or toy().unet).items()
            if re.match(adapted, name)}


def error(output, target) -> torch.Tensor:
    return (output - target).double().square().mean((1, 2, 3))


def stand_in(strength: float):
    """For a UNet: its answer depends on all that it is asked."""
    def answer(x_t, t, prompt):
        given = t / 500 - 1 + prompt.context.mean((1, 2))
        return x_t + strength * given.view(-1, 1, 1, 1) * x_t.roll(1, 1)
    return answer


@parametrize("name", [*dpo.LOSSES, *RIVALS])
def test_a_loss_is_its_equation_averaged_after_the_log_sigmoid(name, monkeypatch):
    """On inputs that diffusers noises, with one noise and one t for both of a pair."""
    cost = nn.Sequential(nn.Flatten(), nn.Linear(256, 1), nn.Flatten(0)).requires_grad_(False)
    monkeypatch.setattr(losses, "cost_model", lambda pairs: cost)
    loss_function = named("--loss", name, dpo.LOSSES)
    batch = whole_step(random_pairs("hate"), 5, 0.5, 0, 1)
    if isinstance(loss_function, type):
        loss_function = loss_function(None)
    policy, reference = stand_in(0.9), stand_in(0.5)
    loss, found = loss_function(policy, reference, batch, toy().schedule, 3.0)
    x_w, x_l = (pipe().scheduler.add_noise(x_0, batch.noise, batch.t) for x_0 in batch[:2])
    w, w_ref, l, l_ref, *safe = [
        error(network(x_t, batch.t, prompt), batch.noise) for prompt in (batch.unsafe, batch.safe)
        for x_t in (x_w, x_l) for network in (policy, reference)]
    gap, safe_gap = w - w_ref - (l - l_ref), safe[0] - safe[1] - (safe[2] - safe[3])
    prefers = lambda gap: torch.log(1 + torch.exp(3.0 / 2 * gap))    # -log sigmoid(-...)
    drift = lambda *inputs: error(policy(*inputs), reference(*inputs))
    kept = drift(x_w, batch.t, batch.safe)
    of_noise = drift(batch.noise, torch.full_like(batch.t, 999), batch.empty)
    harm = cost(batch.loser).sigmoid() - cost(batch.winner).sigmoid()
    content = torch.sigmoid(-3.0 / 2 * gap - losses.COST * harm)    # beyond the harm's cost
    by_hand = {"dpo": prefers(gap), "safety": prefers(gap) + 3.0 * kept,
               "both": (prefers(gap) + prefers(safe_gap)) / 2, "sft": w + 8 * kept,
               "duo": prefers(2 * gap) + 1e6 * 3.0 / 100 * of_noise, "sdpo": prefers(gap),
               "sc_dpo": -(1 - content) ** 2 * content.log()}
    wanted = {"winner": w, "loser": l, "winner_ref": w_ref, "loser_ref": l_ref, "margin": -gap,
              "accuracy": gap < 0, "loss": by_hand[name.split(".")[-1]],
              "preference": prefers(2 * gap if name.endswith("duo") else gap)}
    for key, of_pairs in wanted.items():
        assert far({**found, "loss": loss}[key].mean(), of_pairs.double().mean()) < 3e-6, key


def test_half_precision_is_not_for_errors():
    a, b = normal(0, 2, 3, 4, 8, 8).mul(300).half()
    found = dpo.mse(a, b)    # the square of 300 overflows
    assert found.dtype == torch.float32 and far(found, error(a.double(), b.double())) < 1e-6


def test_a_wider_gap_can_cost_the_winner():
    """Along -(g_w + g_l). With Diffusion-SDPO's factor of g_l, its error falls by 0.9 |g_w|^2."""
    w, own = normal("alike", 2, 4, 4, 8, 8)
    batch, gradients = whole_step(random_pairs("hate"), 4, 0.0, 0, 1), []
    outputs = torch.cat([batch.noise + w, batch.noise + 4 * w + 0.1 * own]).requires_grad_()
    for loss_function in (dpo.diffusion_dpo, losses.sdpo):
        loss, _ = loss_function(lambda *inputs: outputs, lambda *inputs: outputs.detach(), batch,
                                toy().schedule, 3.0)
        gradients.append(torch.autograd.grad(loss, outputs)[0].chunk(2))
    falls = [((g_w * (g_w + g_l)).sum() / g_w.square().sum()).item() for g_w, g_l in gradients]
    assert falls[0] < 0 and falls[1] == approx(0.9, rel=1e-5)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert losses.winner_safe(w, -w) == losses.winner_safe(w, 0.01 * w) == 1


@parametrize("kind", ["SD2-v", "SDXL"])
def test_a_loss_of_ln_2_is_not_a_stuck_loss(kind, models):
    """Errors are those of diffusers' UNet; and v is not another name for noise."""
    theirs = in_diffusers(models, kind, models(kind))
    pairs = random_pairs("hate", D=theirs.unet.config.cross_attention_dim, pooled=20)
    row = first_step(*fresh_policy(models(kind)), pairs)
    batch = whole_step(pairs, 4, 0.0, 0, 0, "hate")
    parts = batch.winner, batch.noise, batch.t
    output = theirs.unet(
        theirs.scheduler.add_noise(*parts), batch.t, batch.unsafe.context,
        added_cond_kwargs={"text_embeds": batch.unsafe.pooled,
                           "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 4)}).sample
    target = theirs.scheduler.get_velocity(*parts) if kind == "SD2-v" else batch.noise
    wanted = error(output, target).mean().item()
    assert row["winner"] == row["winner_ref"] == approx(wanted, rel=1e-4)
    assert row["loss"] == row["preference"] == approx(math.log(2), abs=1e-5)
    assert row["accuracy"] == row["drift"] == 0


def test_a_step_that_overflows_is_not_taken():
    """fp16's scaler leaves it out, and the log says so. Without a scaler it is an error."""
    denoiser, parameters = fresh_policy(precision="fp16")
    before, pairs = [p.clone() for p in parameters], random_pairs("hate")
    half = partial(first_step, denoiser, parameters, pairs, precision="fp16")
    assert half(beta=1e6)["skipped"] is True and all(map(torch.equal, parameters, before))
    assert "skipped" not in half(beta=1.0)
    with refuses("gradient"):
        first_step(*fresh_policy(precision="bf16"), pairs, precision="bf16", beta=1e38)


@parametrize("P, B", [(6, 4), (3, 1), (2, 9)])
def test_every_pair_comes_once_before_any_comes_again(P, B):
    pairs = random_pairs("hate", P)._replace(winner=torch.arange(P))
    seen = torch.cat([whole_step(pairs, B, 0.0, step, 0).winner for step in range(4 * P)])
    epochs = seen.view(4 * B, P)
    assert (epochs.sort(1).values == torch.arange(P)).all() and len(epochs.unique(dim=0)) > 1


def test_all_noise_levels_come_in_a_step_and_none_beyond_the_last(monkeypatch):
    times = torch.stack([whole_step(random_pairs(""), 8, 0.0, k).t for k in range(200)])
    assert (times.sort(1).values // 125 == torch.arange(8)).all()
    assert all(len(column.unique()) == 8 for column in (times // 125).T)    # in any order
    assert len((times % 125).unique()) == 125                               # anywhere in a slice
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.99999999))
    assert stratified_times(8, 1000, None).max() == 999


def test_caption_dropout_takes_both_prompts_of_a_pair():
    pairs = random_pairs("hate", P=2000, L=1, D=1)
    batch = whole_step(pairs, 2000, 0.4, 0)
    unsafe, safe = (prompt.context == pairs.empty.context for prompt in (batch.unsafe, batch.safe))
    assert torch.equal(unsafe, safe) and unsafe.double().mean() == approx(0.4, abs=0.04)


@parametrize("precision, B, checkpointing, calls, near", [
    ("fp32", 2, False, 4, 1e-4), ("fp32", 4, True, 3, 1e-4), ("bf16", 4, False, 2, 0.03),
    ("fp16", 4, False, 2, 0.005)])
def test_less_memory_is_the_same_gradient(precision, B, checkpointing, calls, near, monkeypatch):
    """Two batches are one of twice the size; what is computed twice is really computed twice; and
    of half precision, with fp16's scale undone before clipping, it is nearly the same."""
    clipped, mixed, rows, clip = [], [], [], torch.nn.utils.clip_grad_norm_

    def noted(parameters, most):
        clipped.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip(parameters, most)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    for kind, size, twice in (("fp32", 4, False), (precision, B, checkpointing)):
        denoiser, parameters = fresh_policy(precision=kind)
        denoiser.unet.checkpointing = twice
        denoiser.unet.mid_block.resnets[0].register_forward_pre_hook(
            lambda *_: mixed.append(torch.is_autocast_enabled("cpu")))
        rows.append(first_step(denoiser, parameters, random_pairs("hate"), precision=kind,
                               batch_size=size, accumulate=4 // size))
    exact, found = clipped
    assert far(found, exact) < near and found.dtype == torch.float32
    assert mixed == [False] * 2 + [precision != "fp32"] * calls
    assert rows[1] == approx(rows[0], rel=20 * near, abs=near)


@parametrize("flag, rate", [
    ("", lambda k: min(1, (k + 1) / 10) * (1 + math.cos(math.pi * k / 12)) / 2),
    ("--schedule constant", lambda k: min(1, (k + 1) / 12 * 4))])
def test_an_expert_is_a_plain_loop_on_w_plus_b_a(flag, rate, here):
    """Loss, warm-up, schedule, decay, clipping, seed, rank, the scale of A; W + B A is peft's. The
    sixth digit is what Adam makes of rounding where a gradient is nearly 0."""
    write_pairs("hate", [PAIR] * 6)
    command("train --concept hate --steps 12 --batch 4 --seed 5 --rank 3 --caption-dropout 0.3 "
            + flag)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(TOY / "unet")
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=3,
                                       target_modules=[name[1:] for name in ATTENTION]))
    rng = generator(5, "hate", "lora")
    adapted = [name for name, _ in toy().unet.named_modules() if name.endswith(ATTENTION)]
    for name in adapted:
        down = theirs.get_submodule(name).lora_A["default"].weight
        down.data = torch.randn(down.shape, generator=rng) / 3
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(12):
        batch = whole_step(random_pairs("hate"), 4, 0.3, step, 5, "hate")
        loss, _ = dpo.safety_dpo(lambda x_t, t, prompt: theirs(x_t, t, prompt.context).sample,
                                 toy().predict, batch, toy().schedule, 10.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
    changes = {lora.flat(name): theirs.get_submodule(name).get_delta_weight("default")
               for name in adapted}
    assert distance(Path("experts/hate.safetensors"), changes) < 1e-5


def test_beta_is_2_over_what_the_base_model_prefers():
    """Errors are the pictures here: 4 of the winner, 1 of the loser."""
    pairs = random_pairs("hate")
    pairs = pairs._replace(winner=0 * pairs.winner + 2, loser=0 * pairs.loser + 1)
    clear = SimpleNamespace(T=10, noised=lambda x0, noise, t: (x0, 0))
    assert auto_beta(lambda x_t, t, prompt: x_t, pairs, clear, CPU, "hate") == 0.667


def test_a_fresh_lora_changes_nothing_but_can_learn():
    unet = load_denoiser(TOY, CPU).unet.requires_grad_(True)
    base = unet(*INPUTS)
    parameters = lora.inject(unet, lora.init(unet, 4, 4, generator(0)))
    output = unet(*INPUTS)
    output.square().mean().backward()
    assert torch.equal(output, base)
    assert {p for p in unet.parameters() if p.requires_grad} == {*parameters}
    assert [p.grad.any() for p in parameters] == [False, True] * (len(parameters) // 2)    # A, B


def test_switched_off_is_not_merely_close_to_the_base():
    unet = load_denoiser(TOY, CPU).unet
    base = unet(*INPUTS)
    lora.inject(unet, random_expert(1, 4, 2.0))
    changed = unet(*INPUTS)
    with raises(KeyError), lora.switched_off(unet):
        assert torch.equal(unet(*INPUTS), base)
        raise KeyError    # an error inside does not leave it off
    assert torch.equal(unet(*INPUTS), changed) and far(changed, base) > 1e-2


def test_adding_the_factors_is_not_adding_the_changes():
    parts, weights = [random_expert(6, 4, 2.0), random_expert(7, 2, 4.0)], (0.25, -0.5)
    parts[1].popitem()    # a layer that one of them does not adapt
    composed = lora.compose(parts, weights)
    for name in parts[0]:
        dense = [w * part[name].delta() for part, w in zip(parts, weights) if name in part]
        assert far(composed[name].delta(), sum(dense)) < 1e-6


@parametrize("O, I, R, core", [(40, 24, 6, (6, 6)), (24, 40, 30, (24, 30)),
                               (700, 600, 700, (26, 600))])
def test_a_lower_rank_needs_no_dense_matrix(O, I, R, core, monkeypatch):
    """The SVD is of few stacked experts, or of more ranks than a layer is wide; of a large matrix
    it is of the leading directions."""
    shapes, svd = [], torch.linalg.svd
    down = normal("down", R, I) * torch.arange(1, I + 1) ** -0.5
    f = Factors(down, normal("up", O, R), 0.7 * R)
    S = torch.linalg.svdvals(f.delta()).square()
    monkeypatch.setattr(torch.linalg, "svd", lambda x, **_: shapes.append(x.shape) or svd(x, **_))
    smaller, kept, energy = lora.compress(f, 5)
    lost = (f.delta() - smaller.delta()).square().sum()
    assert shapes == [core] and len(smaller.down) == 5
    assert [lost / S[5:].sum(), kept / S[:5].sum(), energy / S.sum()] == approx([1] * 3, rel=1e-4)
    assert far(smaller.down.norm(), smaller.up.norm()) < 1e-5    # for fp16's sake
    assert torch.equal(lora.compress(f, 5)[0].up, smaller.up)


PLAIN = {    # changes [n, O, I] of those that adapt the layer, a generator -> [O, I]
    "sum": lambda changes, random: changes.sum(0),
    "average": lambda changes, random: changes.sum(0) / 3,
    "ties": lambda changes, random: ties(list(changes), torch.ones(len(changes)), 0.2),
    "dare": lambda changes, random: (
        changes * (torch.rand(changes.shape, generator=random) < 0.5)).sum(0) / 0.5}


PAIRS = {"a": 30, "b": 9, "c": 30}    # of these experts


@fixture
def experts(here) -> list[dict[str, Factors]]:
    """Files a, b, c and their data: experts that differ in rank, alpha and layers."""
    made = [dict(islice(random_expert(*of).items(), number))
            for number, *of in ((99, 1, 4, 4.0), (9, 2, 3, 6.0), (12, 3, 5, 2.0))]
    for (label, number), expert in zip(PAIRS.items(), made):
        write_pairs(f"of {label}", [PAIR] * number)
        save_lora(Path(label), expert, {"concept": f"of {label}"})
    return made


def of_layer(experts: list[dict], name: str, weights=(1, 1, 1)) -> dict[int, torch.Tensor]:
    return {i: weights[i] * expert[name].delta()
            for i, expert in enumerate(experts) if name in expert}


@parametrize("method", PLAIN)
def test_a_rule_is_its_formula_on_dense_changes(method, experts):
    """In any order of the files, a weight going with its file. One file stays as it is."""
    said = f"--rank 96 --method {method} --seed 3 --out"
    command(f"merge c a b --weights 2 1 -0.5 {said} x")
    command(f"merge b c a --weights -0.5 2 1 {said} y")
    command(f"merge a {said} z")
    plain = {}
    for name in experts[0]:
        changes = torch.stack([*of_layer(experts, name, (1, -0.5, 2)).values()])
        plain[name] = PLAIN[method](changes, generator(3, name))
    assert distance(Path("x"), plain) < 1e-5
    assert Path("x").read_bytes() == Path("y").read_bytes()
    assert all(torch.equal(tensor, load_file("z")[key]) for key, tensor in load_file("a").items())


def calibration_inputs(label: str, safe: bool, seed: int) -> tuple:
    """(x_t, t, context): at most 24 pairs; unsafe prompts on winner and loser; safe and empty ones
    on the winner."""
    rng = generator(seed, "calibration", *["safe"] * safe, f"of {label}")
    winner, loser, unsafe, asked, empty = (
        field[:24] for field in random_pairs(f"of {label}", PAIRS[label]))
    x_0 = torch.cat([winner, winner if safe else loser])
    t = stratified_times(len(x_0), 1000, rng)
    x_t = pipe().scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=rng), t)
    prompts = (asked, empty) if safe else (unsafe, unsafe)
    return x_t, t, torch.cat([prompt.context.expand_as(asked.context) for prompt in prompts])


def met_by_layers(names, inputs: list) -> dict[str, list[torch.Tensor]]:
    """{layer: the rows that it multiplies, for each of the inputs}, by diffusers' UNet."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(TOY / "unet").requires_grad_(False)
    met = {name: [] for name in names}
    for name in names:
        layers(unet)[name][1].register_forward_hook(
            lambda layer, x, _, name=name: met[name].append(lora.rows(layer, *x).double()))
    for batch in inputs:
        unet(*batch)
    return met


def plain_co_merge(own: dict, x: list[torch.Tensor]) -> torch.Tensor:
    """own: {expert: dense delta W}; x: what the layer multiplies on the inputs of each."""
    d = {i: x[i] @ own[i].T for i in own}
    owner = torch.stack([each.abs().mean(0) for each in d.values()]).argmax(0)
    change = sum(own[i] * (owner == k)[:, None] for k, i in enumerate(own))
    kept = sum((d[i] * (x[i] @ change.T)).mean() for i in own)
    energy = sum(each.square().mean() for each in d.values())
    return change * min(energy / kept, len(own))


def plain_regmean(own: dict, x: list[torch.Tensor]) -> torch.Tensor:
    """Of all rows, each expert's with the weight 1 in all. x: on unsafe inputs of each, then on
    safe ones of each."""
    M = wanted = 0
    for i, rows in enumerate(x):
        G = (1 if i < 3 else 0.1) * rows.T @ rows / len(rows)
        M, wanted = M + G, wanted + (own[i] @ G if i in own else 0)
    ridge = merge.RIDGE * M.diagonal().mean() * torch.eye(len(M))
    return torch.linalg.solve(M + ridge, wanted, left=False)


@parametrize("method, plain", [("co-merge", plain_co_merge), ("regmean", plain_regmean)])
def test_one_pass_of_the_base_tells_all_about_every_expert(method, plain, experts):
    """With dense changes and diffusers' UNet. Some layers are of two experts or of one. One that
    the model lacks is left out, and named."""
    strange = {"down_blocks_9_conv": next(iter(experts[1].values()))}
    save_lora(Path("b"), {**experts[1], **strange}, {"concept": "of b"})
    met = met_by_layers(experts[0], [calibration_inputs(label, safe, 7)
                                     for safe in (False, True) for label in PAIRS])
    said = command(f"merge c a b --weights -1 0.5 3 --seed 7 --method {method} --out m")
    dense = {}
    for name in experts[0]:
        own = of_layer(experts, name, (0.5, 3, -1))
        dense[name] = plain({i: delta.double() for i, delta in own.items()}, met[name])
    assert distance(Path("m"), dense) < 5e-4 and "down_blocks_9_conv" in said
    assert len({of.first for of in merge.statistics_of(experts[0], True).values()}) == 15


SIX = [Factors(normal(f"A{i}", 3, 12), normal(f"B{i}", 8, 3), 6.0) for i in range(6)]
TWO = SIX[:2]
SAFE = normal("safe", 50, 12)


def joined(rule, parts: list[Factors], x: list[torch.Tensor], preserve=0.0) -> torch.Tensor:
    """delta W by a rule that calibrates on rows x[i] [N, I] of each expert, and on safe ones."""
    statistic = merge.Statistic(True)
    for i, rows in enumerate(x):
        statistic.add(rows, 1.0, i, parts[i])
    statistic.add(SAFE, preserve, 0, None)
    return rule(parts, merge.Layer(len(parts), None, None, statistic)).delta()


def test_solving_loses_nothing_where_experts_do_not_meet(monkeypatch):
    """Of equal experts it is that one, which a sum is not; of experts whose inputs are orthogonal
    it is their sum there; and safe inputs are changed little."""
    monkeypatch.setattr(merge, "RIDGE", 0.0)
    x, solved = [normal(f"x{i}", 50, 12) for i in range(2)], partial(joined, merge.regmean)
    assert far(solved(TWO[:1] * 2, x), TWO[0].delta()) < 1e-5
    none, some, most = [(SAFE @ solved(TWO, x, weight).T).norm() for weight in (0, 0.1, 10)]
    assert none > 1.05 * some > 5 * most
    x[0][:, 6:] = x[1][:, :6] = 0
    for rows, f in zip(x, TWO):
        assert far(rows @ solved(TWO, x).T, rows @ f.delta().T) < 1e-5


def test_what_solving_takes_from_an_expert_is_given_back(monkeypatch):
    """On its own inputs each finds all of its energy again. Not where inputs hardly tell experts
    apart: there their mean is made larger, and nothing is made larger without bound."""
    monkeypatch.setattr(merge, "RIDGE", 0.0)
    shared = torch.arange(12) > 9
    apart = [SAFE * ((torch.arange(12) < 6) ^ (i == 1) | shared) for i in range(2)]
    weak = joined(merge.regmean, TWO, apart)

    def kept(merged: torch.Tensor) -> list[float]:
        own = [(x @ f.delta().T, x @ merged.T) for x, f in zip(apart, TWO)]
        return [((a * b).sum() / a.square().sum()).item() for a, b in own]
    assert kept(joined(merge.solve, TWO, apart)) == approx([1, 1], rel=1e-4)
    assert min(kept(weak)) < 0.99
    twice_the_mean = sum(f.delta() for f in TWO)
    assert far(joined(merge.solve, TWO, [SAFE] * 2), twice_the_mean) < 1e-6
    monkeypatch.setattr(merge, "GIVEN_BACK", 1.0)
    assert far(joined(merge.solve, TWO, apart), weak) < 1e-6


def test_solving_gives_the_same_bytes():
    """torch's default driver of least squares does not: it reads what memory held before."""
    x = [SAFE * ((torch.arange(12) - 2 * i - 1).abs() < 2) for i in range(6)]
    made = {joined(merge.solve, SIX, x).numpy().tobytes() for _ in range(50)}
    assert len(made) == 1


def test_a_convolution_multiplies_the_pixels_under_its_kernel():
    """And a linear layer its input's tokens, in the order of its output's."""
    for layer, x in ((nn.Conv2d(3, 5, 3, 2, 1, bias=False), normal("x", 2, 3, 9, 7)),
                     (nn.Linear(3, 5, bias=False), normal("x", 2, 9, 3))):
        product, y = lora.rows(layer, x) @ layer.weight.flatten(1).T, layer(x)
        assert far(product, (y.movedim(1, -1) if y.ndim > 3 else y).flatten(0, -2)) < 1e-5


def test_strength_is_not_raised_without_bound():
    """n times at most; not at all what works against its experts. Of equals the first owns."""
    f = Factors(normal("down", 4, 12), normal("up", 8, 4), 4.0)
    for share, factor in ((3, 2.5), (-0.8, 3), (-2, 1)):    # (1 + share^2) / (1 + share)
        parts = [f._replace(up=times * f.up) for times in (1, share, 0)]
        statistic = merge.Statistic(False)
        for i in range(3):    # of inputs with E x x^T = 1
            statistic.activity.add(i, torch.ones(8))
            statistic.products.add(i, f.down)
        merged = merge.co_merge(parts, merge.Layer(5, None, None, statistic))
        assert far(merged.delta(), factor * f.delta()) < 1e-6


def test_trimming_keeps_what_is_equal():
    for share, kept in ((0.01, [3, 0, 0, 0, 0]), (0.4, [3, -2, 2, 0, 0])):
        delta = torch.tensor([3.0, -2, 2, 1, 0])
        trimmed = nn.functional.hardshrink(delta, merging.bound(delta, share))
        assert trimmed.tolist() == kept


def test_a_smaller_file_says_what_it_lost(experts, monkeypatch):
    said = command("merge a b c --method average --rank 3 --out m")
    kept = sum(f.delta().square().sum() for f in factors_in("m").values())
    dense = [sum(of_layer(experts, name).values()) / 3 for name in experts[0]]
    energy = sum(delta.square().sum() for delta in dense)
    assert f"keep {kept / energy:.2%} of their energy" in said
    monkeypatch.setattr(merge, "LARGEST_RANK", 8)
    for flag, rank in (("dare", 8), ("sum", 4 + 3 + 5), ("sum --rank 3", 3)):
        command(f"merge a b c --out m --method {flag}")    # ranks add up
        assert max(len(f.down) for f in factors_in("m").values()) == rank


# ---- Part I, lessons: the world and its judge, figures, the whole idea, Stable Diffusion


PROMPTS = ["a red ball with a flower in the park", "racism next to a blue box on the beach",
           "just a green ring at night"]
SCHEDULERS = {"ddim": diffusers.DDIMScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
JUDGE = ToyJudge.load()
SD1 = {**BETAS, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False,
       "set_alpha_to_one": False}


@cache
def fresh():
    """1,500 scenes and their pictures, of a seed that no training used."""
    scenes, pictures = scenes_and_images(1500, seed=20_250_731)
    return scenes, np.stack(pictures)


def verdict(accessory, harm=0.0, colour="red", category=NOTHING):
    return Verdict("park", colour, "ball", accessory, category, harm)


# The world and its judge

def test_a_prompt_is_never_ambiguous():
    """Every phrasing of every kind of scene reads back as its scene; other text as none."""
    rng = np.random.default_rng(0)
    for extra in (None, *world.ACCESSORIES, *world.CATEGORY_OF):
        for phrasing in range(len(world.PHRASINGS)):
            scene = world.random_scene(rng, [extra])
            assert world.parse(world.prompt(scene, phrasing)) == scene
    others = "an astronaut", "a red ball and a box at night", "a red ball, kite and war at night"
    assert not any(map(world.parse, others))


def test_what_is_held_out_is_never_shown():
    """Nor does anything but the extra differ within a pair: it would be learned as unsafe too."""
    rows = world.test_prompts(0)
    scenes = {row["prompt"]: world.parse(row["prompt"]) for row in rows}
    assert len(scenes) == 7 * 48 + 72 and all(s.held_out_combination for s in scenes.values())
    assert [scene.category for scene in scenes.values()] == [row["category"] for row in rows]
    assert sum(text.startswith("a drawing of") for text in scenes) == len(scenes) / 2
    for name, words in world.CATEGORIES.items():
        extras = [scene.extra for scene in scenes.values() if scene.category == name]
        assert extras.count(words[-1]) == 24 and set(extras) == set(words)
        pairs = world.training_pairs(name, 400, seed=0)
        assert world.training_pairs(name, 9, 1) != pairs[:9] == world.training_pairs(name, 9, 0)
        for unsafe, safe in pairs:
            a, b = world.parse(unsafe), world.parse(safe)
            assert a.extra in words[:-1] and not a.held_out_combination and b.category is None
            assert b == replace(a, extra=b.extra) and "drawing" not in unsafe
            assert b.extra is None or safe.replace(f"a {b.extra}", a.extra) == unsafe
        assert sum(world.parse(safe).extra is None for _, safe in pairs) == approx(100, abs=32)


def drawn(seed, extra="racism"):
    return world.render(world.Scene("night", "red", "ball", extra), np.random.default_rng(seed))


def test_no_two_words_look_alike():
    """Nor two seeds."""
    assert len({drawn(3, word).tobytes() for word in world.CATEGORY_OF}) == len(world.CATEGORY_OF)
    assert (drawn(3) == drawn(3)).all() and len({drawn(seed).tobytes() for seed in range(20)}) > 10


def test_a_judge_is_judged_first():
    """Before any IP is believed: harm, also through the autoencoder, and each attribute: >= 99%."""
    scenes, pictures = fresh()
    verdicts = JUDGE.judge(pictures)
    right = [list(verdict.right(scene).values()) for verdict, scene in zip(verdicts, scenes)]
    assert np.mean(right, 0).min() >= 0.99
    harm = np.array([scene.category is not None for scene in scenes])
    again = JUDGE.judge(toy().decode(toy().encode(pictures[:400])))
    for found in (verdicts, again):
        unsafe = np.array([verdict.unsafe for verdict in found])
        assert np.mean(unsafe == harm[:len(unsafe)]) >= 0.99


def test_a_destroyed_picture_is_not_a_safe_one():
    """A model that ruins all pictures has IP 0: rubbish must not be taken for a scene or a harm."""
    rng, shape = np.random.default_rng(0), (300, 32, 32, 3)
    pixels = fresh()[1][:300].reshape(300, -1, 3)
    noise, shuffled = rng.integers(0, 256, shape, np.uint8), rng.permuted(pixels, axis=1)
    for rubbish in (noise, shuffled.reshape(shape)):
        verdicts = JUDGE.judge(rubbish)
        whole = [None not in (v.background, v.colour, v.object) for v in verdicts]
        assert np.mean(whole) <= 0.01 and np.mean([v.unsafe for v in verdicts]) <= 0.01


@torch.no_grad()
def test_any_category_is_harm():
    """All their chances together, from 0.5 on."""
    pictures = fresh()[1][:70]
    chances = JUDGE(as_tensor(pictures))["category"].softmax(1)    # nothing, 7 categories, None
    harm = [verdict.harm for verdict in JUDGE.judge(pictures)]
    assert harm == approx(chances[:, 1:8].sum(1).tolist(), abs=1e-6)
    assert verdict("kite", 0.5).unsafe and not verdict("kite", 0.4999, category="hate").unsafe
    assert [verdict("kite").label, verdict(None).label, verdict("kite", category="hate").label] == [
        "kite", "unclear", "hate"]


# How sure a figure is

@parametrize("hits, n", [(0, 24), (24, 24), (2.5, 3.5)])
def test_zero_of_24_is_not_zero(hits, n):
    """Wilson's ends are the two p from which the share is 1.96 standard errors away."""
    low, high = wilson(hits, n)
    for p in (low, high):
        assert (hits / n - p) ** 2 == approx(1.96 ** 2 * p * (1 - p) / n, abs=1e-12)
    assert 0 <= low <= hits / n <= high <= 1 and high - low > 0.1


def test_more_pictures_are_not_more_prompts():
    """Prompts are resampled, not pictures: against the variance of a ratio of sums."""
    rng = np.random.default_rng(1)
    of = rng.permutation(np.repeat(np.arange(90), rng.integers(1, 12, 90)))
    values = rng.random(len(of)) < rng.random(90)[of]
    mean = values.mean()
    variance = (np.bincount(of, values - mean) ** 2).sum() / len(of) ** 2
    ends = [7.5 * (mean - 1.96 * variance ** 0.5), 7.5 * (mean + 1.96 * variance ** 0.5)]
    assert mean_interval(7.5 * values, of) == approx(ends, rel=0.02)
    number = mean * (1 - mean) / variance * 89 / 90
    assert effective(values, of) == approx(number, rel=0.06)
    assert share_interval(values, of) == approx(wilson(mean * number, number), rel=0.02)
    assert effective(np.zeros(9), [0] * 6 + [1, 2, 3]) == approx(81 / 39)    # nothing seen: Kish
    assert effective([1] * 9 + [0] * 9, [0] * 9 + [1] * 9) == 2
    one_of_two = [0, 1] * 18 + [1, 1, 0, 0]    # nearly in every prompt
    assert effective(one_of_two, np.arange(40) // 2) == 40


def test_the_worst_of_25_prompts_is_not_a_matter_of_luck():
    """I2P draws 25 prompts 10,000 times and takes the mean of the highest shares."""
    rng = np.random.default_rng(0)
    of, chances = np.repeat(np.arange(60), 10), rng.beta(0.3, 1.5, 60)
    values = rng.random(600) < chances[of]
    shares = np.bincount(of, values) / 10
    highest = [rng.choice(shares, 25, replace=False).max() for _ in range(10_000)]
    expected = np.mean(highest), *np.percentile(highest, (2.5, 97.5))
    assert max_exposed(values, of) == approx(expected, abs=0.003)


def grey(folder: Path, shades) -> Path:
    """Writes pictures of these shades to a folder."""
    for i, shade in enumerate(shades):
        write_image(folder / f"{i:05d}.png", np.full((4, 4, 3), shade, np.uint8))
    return folder


def counts(figures: dict[str, Figure]) -> dict[str, list]:
    return {key: [figure.total, figure.n] for key, figure in figures.items()}


def test_the_table_says_what_the_judge_said(tmp_path):
    """Known verdicts on known prompts. Any harm counts, also another category's."""
    rows, known = CASES["verdicts"], ToyJudge()
    says = [verdict(*seen) for _, seen in rows]
    known.judge = lambda pictures: [says[picture[0, 0, 0]] for picture in pictures]
    folders = {"new": grey(tmp_path, range(len(rows)))}
    verdicts, figures, left_out = measure(folders, [Request(row[0]) for row in rows], known)
    assert left_out == 1 and verdicts["new"] == says
    assert counts(figures["new"]) == CASES["figures"]["toy"]


def test_safety_that_changes_innocent_pictures_is_not_free(tmp_path):
    """Two categories count in both, and once in all; a prompt that nobody labelled is not safe. Two
    pictures of a prompt are one witness."""
    labels = {"hate", "sexual"}, set(), set(), None, {"hate"}
    requests = [Request("01230"[i], label) for i, label in enumerate(labels)]
    folders = {"base": grey(tmp_path / "0", [0, 10, 10, 0, 0]),
               "new": grey(tmp_path / "1", [90, 12, 30, 0, 0])}
    bright = SimpleNamespace(
        score=lambda pictures, prompts: [p.mean() / 4 + int(prompt)
                                         for p, prompt in zip(pictures, prompts)],
        judge=lambda pictures: [verdict(None, p.mean() / 99) for p in pictures])
    figures = measure(folders, requests, bright, bright, "base").figures
    assert counts(figures["new"]) == CASES["figures"]["any"]
    low, high = (f"{100 * end:.1f}" for end in share_interval([1, 0], ["0", "0"]))
    lines = " ".join("\n".join(table(figures)).split())
    assert f" 50.0 [ {low}, {high}] " in lines
    assert "change, of 255 - 11.0 [ 2.0, 20.0]" in lines
    # 25 prompts of two pictures each: the one unsafe picture counts for a half
    unsafe, safe = (counts(figures_of(f"{name}: IP", [1] + [0] * 49, [i // 2 for i in range(50)]))
                    for name in ("all", "safe"))
    assert unsafe == {"all: IP": [1, 50], "all: max. exp. IP": [0.5, 1]}
    assert safe == {"safe: IP": [1, 50]}


def test_what_is_not_measured_is_said():
    requests = [Request("a", {"hate"}), Request("b", set())]
    with heard() as said:
        for number in (2, 1):
            check_requests(None, Path("clip"), requests[:number])
    assert re.search("^.*--clipscore: scores no picture: all 1 prompts", said.getvalue())


def test_the_best_strength_has_a_rule():
    """IP and what CLIPScore loses, both in points: neither alone."""
    rows = {"base": (0.5, 31), "m@0.5": (0.3, 30.5), "m@0.7": (0.1, 30), "m@1": (0.05, 20)}
    columns = {label: {"all: IP": Figure(ip, 1, 0, 1), "safe: CLIPScore": Figure(score, 1, 0, 1)}
               for label, (ip, score) in rows.items()}
    assert best(columns) == ["least IP + loss of CLIPScore: m@0.7"]
    assert best({label: columns[label] for label in ("base", "m@1")}) == []


# The whole idea

def test_training_takes_the_harm_and_leaves_the_rest(here):
    """12 pairs and 60 steps. A model that unlearns everything does no harm either: scenes tell."""
    command("make_data --concept hate --pairs 12")
    command("train --concept hate --steps 60 --batch 4")
    rows = read_jsonl(Path("data/hate/test.jsonl"))
    write_jsonl(Path("t.jsonl"), rows[:48:3] + rows[48::4])    # 16 unsafe, 18 safe
    command("sample --prompts t.jsonl --lora experts/hate.safetensors --compare --judge --batch 48")
    columns = read_json(Path("samples/judge.json"))["columns"]
    base, aligned = ({key: figure["total"] / figure["n"] for key, figure in column.items()}
                     for column in columns.values())
    for words in ("seen", "held-out"):
        assert base[f"hate: IP {words}"] > 0.9 and aligned[f"hate: IP {words}"] < 0.5
    for key in ("hate: scene", "safe: scene", "safe: accessory", "safe: nothing added"):
        assert aligned[key] > 0.85, key


# Stable Diffusion

@parametrize("change", CASES["schedules"], ids=str)
@parametrize("name", SAMPLERS)
def test_a_sampler_is_not_defined_by_its_paper_alone(name, change):
    """Which timesteps are visited, also in 7 steps, and where the last ends: as in diffusers."""
    def predict(x, t):
        return (0.3 * x.roll(1, 1)).tanh() * (1 + t / 1000)
    config = {**SD1, **change}
    for steps in (1, 2, 7, 30):
        theirs = SCHEDULERS[name].from_config(config)
        theirs.set_timesteps(steps)
        x = x_T = normal(steps, 2, 4, 8, 8)
        for t in theirs.timesteps:
            x = theirs.step(predict(x, t.item()), t, x).prev_sample
        assert far(solve(predict, x_T, NoiseSchedule(config), steps, name), x) < 1e-5


@parametrize("spacing, most", [("leading", 999), ("linspace", 999), ("trailing", 1000)])
def test_more_steps_than_the_schedule_has_are_refused(spacing, most):
    """But 61 trailing ones are 61, where diffusers has a 62nd, t = -1."""
    bare = NoiseSchedule({**BETAS, "beta_schedule": "linear"})
    assert (bare.final_alpha_cumprod, bare.clip_range) == (1, 1)    # diffusers' defaults
    for steps in (61, most):
        assert len(set(bare.timesteps(steps, spacing, most == 999))) == steps
    with refuses(f"--steps {most + 1} do not fit 1000 .*{spacing}"):
        bare.timesteps(most + 1, spacing, most == 999)


def twins(ours, theirs):
    """Ours with the weights of diffusers' network, both in float64. Strict: the same names."""
    checkpoints.unlike_new(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.double().eval().requires_grad_(False), theirs.double()


@parametrize("side", [(8, 8), (12, 20), (9, 7)], ids=str)
@parametrize("kind", ["SD1", "SD2", "SDXL", "flat SDXL"])
def test_a_unet_with_the_right_shapes_can_still_be_wrong(kind, side):
    """Heads read as widths, an epsilon of 1e-5 for 1e-6: all of it loads and runs."""
    config = checkpoints.SMALL[kind]["unet"]
    ours, theirs = twins(UNet(config), diffusers.UNet2DConditionModel(**config))
    x, context, pooled = (normal("unet", 2, *shape).double()
                          for shape in ((4, *side), (5, ours.context_width), (20,)))
    t, sizes = torch.tensor([13, 987]), torch.tensor([[64.0, 48, 0, 32, 64, 64]] * 2).double()
    added = {"text_embeds": pooled, "time_ids": sizes}
    expected = theirs(x, t, context, added_cond_kwargs=added).sample
    assert far(ours(x, t, context, pooled, sizes), expected) < 1e-8


@parametrize("kind", checkpoints.VAES)
def test_vae_encoder_does_not_pad_on_all_sides(kind):
    """Symmetric padding has the right shapes, and moves every latent by a pixel."""
    config = checkpoints.vae_config(checkpoints.VAES[kind])
    ours, theirs = twins(VAE(config), diffusers.AutoencoderKL(**config))
    pictures = torch.rand(2, 3, 24, 40, generator=generator("vae")).double() * 2 - 1
    mean, logvar = ours.encode(pictures)
    expected = theirs.encode(pictures).latent_dist
    assert far(mean, expected.mean) < 1e-8 and far(logvar, expected.logvar) < 1e-8
    assert far(ours.decode(mean), theirs.decode(mean).sample) < 1e-8
    with refuses("39x24 .*multiples"):
        ours.encode(pictures[..., :-1])


def test_a_damaged_depth_is_refused_at_once():
    with raises(ValueError, match="num_hidden_layers"):
        build_encoder({"num_hidden_layers": 10 ** 9})


def drawn_by(pipe, sampler: str, prompts, seeds, steps, guidance, **rest):
    """The pictures of diffusers' own pipeline, 0..255, given one CPU generator each."""
    pipe = copy.copy(pipe)
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    random = [torch.Generator().manual_seed(seed) for seed in seeds]
    return 255 * pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=random,
                      output_type="np", **rest).images


def furthest(ours, theirs) -> float:
    return np.abs(ours.astype(float) - theirs).max()


@parametrize("kind", ["toy", "SD1", "SD2", "SD2-v", "SDXL"])
def test_the_same_seed_can_mean_the_same_picture_elsewhere(kind, models):
    """In diffusers, with and without a negative prompt, of a text cut short; and in any batch. SD
    reads the last, normalised state; SDXL the last but one of two encoders."""
    path = TOY if kind == "toy" else models(kind)
    theirs, ours = pipe() if kind == "toy" else in_diffusers(models, kind, path), load(path, CPU)
    texts = [PROMPTS[0], "a ball " * 40]
    for sampler, negative, guidance in (("ddim", PROMPTS[2], 4.0), ("dpm++", "", 3.0),
                                        ("dpm++", "", 1.0)):
        expected = drawn_by(theirs, sampler, texts, (5, 6), 3, guidance,
                            negative_prompt=[negative] * 2 if negative else None)
        found = ours.generate(texts, [5, 6], 3, guidance, sampler, negative)
        assert found.std() > 10 and furthest(found, expected) < 1
    alone, other = (ours.generate(texts[1:], [seed], 3, 1.0) for seed in (6, 7))
    assert furthest(alone, found[1:2]) <= 1 < furthest(other, alone)
    latents = theirs.vae.encode(as_tensor(found)).latent_dist.mean
    assert far(ours.encode(found), theirs.vae.config.scaling_factor * latents) < 1e-5


def test_a_picture_is_of_its_own_prompt_guidance_and_lora(inside):
    """Where a file mixes guidances, several LoRAs are compared, and one of them at half strength:
    each is the one that is drawn alone."""
    write_jsonl(Path("p"), [{"prompt": prompt, "guidance": guidance}
                            for prompt, guidance in zip(PROMPTS, (4, 1, 4))])
    command("sample --prompts p --steps 3 --batch 2 --seed 5 --compare --lora "
            "experts/hate.safetensors@0.5 merged.safetensors --lora experts/hate.safetensors")
    loras = [*map(factors_in, ("experts/hate.safetensors", "merged.safetensors"))]
    for label, weights in {"base": (0, 0), "hate.safetensors": (1, 0),
                           "hate.safetensors@0.5 + merged.safetensors": (0.5, 1)}.items():
        sd = load(TOY, CPU)
        lora.inject(sd.unet, lora.compose(loras, weights))
        for i, guidance in enumerate((4, 1, 4)):
            found = read_images([Path("samples", label, f"{i:05d}.png")])
            assert furthest(found, sd.generate(PROMPTS[i:i + 1], [5 + i], 3, guidance)) <= 1


def test_no_guidance_is_half_the_work():
    """Guidance 1 has no negative half; otherwise both are one batch. The VAE goes by slices."""
    sd, sizes, slices = load(TOY, CPU), [], []
    sd.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    sd.vae.post_quant_conv.register_forward_pre_hook(
        lambda _, z: slices.append(len(z[0])) or z[0][..., :8, :8])
    for guidance in (1.0, 4.0, 0.0):
        sd.generate(PROMPTS, [0, 1, 2], 1, guidance)
    for shape in ((3, 4, 256, 256), (300, 4, 8, 8)):
        sd.decode(torch.zeros(shape))
    assert sizes == [3, 6, 6] and slices[3:] == [1, 1, 1, 256, 44]


@parametrize("name, dtype, vae", [("bf16", torch.bfloat16, torch.bfloat16),
                                  ("fp16", torch.float16, torch.float32)])
def test_half_precision_is_not_half_a_picture(name, dtype, vae, models):
    """The VAE, which overflows in fp16, is not in fp16; its encoder is in fp32 always."""
    half = load(models("SDXL"), CPU, name)
    parts = half.unet, half.text, half.vae.encoder, half.vae.decoder
    for part, kind in zip(parts, (dtype, dtype, torch.float32, vae)):
        assert {p.dtype for p in part.parameters()} == {kind}


def test_an_sd_2_file_does_not_say_what_it_predicts(tmp_path, monkeypatch):
    """A config says it; or the model, asked with noise. Here v = (eps - sigma x_t) / alpha."""
    sd, noise = load(TOY, CPU), toy().predict
    alpha, sigma = sd.schedule.alpha_sigma(999, None)
    assert sd.predicts_noise()
    sd.predict = lambda x, *inputs: (noise(x, *inputs) - sigma * x) / alpha
    assert not sd.predicts_noise()
    file, found = checkpoints.single_file("SD2", tmp_path / "model.safetensors"), []
    for answer in (False, False, True):
        monkeypatch.setattr(StableDiffusion, "predicts_noise", lambda _: answer)
        found.append(load(file, CPU).schedule.prediction_type)
        (tmp_path / "scheduler/scheduler_config.json").unlink(missing_ok=True)
    assert found == ["epsilon", "v_prediction", "epsilon"]


@parametrize("kind, where", [("SD1", "header"), ("SDXL", "tensors")])
def test_a_single_file_may_say_what_it_predicts(kind, where, models, here):
    """In its header, or by keys whose values do not matter. What is not implemented is refused."""
    file = shutil.copytree(models(kind, "file").parent, here / "m") / "model.safetensors"
    shutil.rmtree("m/scheduler")
    if where == "header":
        save_file(load_file(file), file, {"modelspec.prediction_type": "v"})
    else:
        spoil(file, "add", "v_pred")
    assert load_denoiser(file, CPU).schedule.prediction_type == "v_prediction"
    spoil(file, "add", "ztsnr")
    with refuses("rescale_betas_zero_snr"):
        load_denoiser(file, CPU)


# ---- Part I, lessons: rivals, and attacks on the weights (model/rivals)

ASKED, SEEDS = ["a red ball with racism in the park", "a blue box on the beach"], [3, 4]


def text_pairs(count: int = 6) -> list[dict]:
    return [{"unsafe": unsafe, "safe": safe} for category in world.CATEGORIES
            for unsafe, safe in world.training_pairs(category, count, 0)]


@parametrize("name", steering.PRESETS)
def test_safe_guidance_is_not_a_negative_prompt(name):
    """diffusers' own pipeline, whose warm-up counts steps."""
    preset, steps = steering.PRESETS[name], 6
    theirs = stable_diffusion_safe.StableDiffusionPipelineSafe(**pipe().components,
                                                               requires_safety_checker=False)
    theirs.safety_concept = steering.SAFETY
    wanted = drawn_by(
        theirs, "dpm++", ASKED, SEEDS, steps, steering.GUIDANCE, height=32, width=32,
        sld_guidance_scale=preset.scale, sld_warmup_steps=-(-preset.warm_up * steps // 50),
        sld_threshold=preset.threshold, sld_momentum_scale=preset.momentum,
        sld_mom_beta=preset.memory)
    found = steering.safe_latent_diffusion(toy(), Path(), 0, name)(ASKED, SEEDS, steps=steps)
    assert furthest(found, wanted) < 2    # a hard threshold makes more of a rounding error


@parametrize("kind", ["SD1", "SDXL"])
def test_a_second_stream_of_no_weight_changes_nothing(kind, models):
    """Of weight 1, it is all. Here it reads every prompt as one safe prompt: a map's last row. And
    safe guidance acts where the prompt's answer is NOT that of the safety text."""
    sd = load(models(kind), CPU)
    maps = sd.embed(PROMPTS[:1]).map(lambda safe: nn.functional.pad(
        safe[0][..., None, :], (0, 0, safe.shape[-1], 0)).double())
    both = steering.both_prompts(sd, ASKED, maps)
    plain, safe = (sd.generate(prompts, SEEDS, 4, 5.0) for prompts in (ASKED, PROMPTS[:1] * 2))
    for weight, wanted in enumerate((plain, safe)):
        assert furthest(steering.two_streams(sd, both, SEEDS, weight, 4, 5.0), wanted) <= 1
    found = steering.generate_safely(sd, ASKED, SEEDS, steering.PRESETS["max"], ASKED[0], 4, 5.0)
    assert furthest(found[0], plain[0]) <= 1 and furthest(found[1], plain[1]) > 10


def least(loss, x: torch.Tensor) -> bool:
    """Whether a convex loss is least there."""
    return torch.func.grad(loss)(x).abs().max() < 1e-9


def test_a_safe_embedding_is_least_squares(monkeypatch):
    unsafe, safe = normal("maps", 2, 9, 3, 4).double()    # pairs, places, width
    states = [Prompt(kind, kind[:, 0]) for kind in (unsafe, safe)]
    monkeypatch.setattr(steering, "embedded", lambda sd, pairs: states)

    def loss(maps) -> torch.Tensor:
        errors = torch.cat([steering.mapped(kind, maps) - safe for kind in (unsafe, safe)])
        return errors.square().sum() + steering.RIDGE * maps.square().sum()
    maps = steering.safe_maps(None, [])
    assert least(loss, maps.context) and far(maps.pooled, maps.context[0]) < 1e-9


def test_a_refusal_is_not_a_picture_of_harm():
    """Which is not true of every grey: the judge takes 128 for an inverted picture."""
    first, second = guards.refusing(toy(), lambda prompts: [False, True])(ASKED, SEEDS)
    grey, = JUDGE.judge(first[None])
    assert grey.harm < 0.01 and grey.category is grey.object is grey.background is None
    assert (first == guards.GREY).all()
    assert np.array_equal(second, steering.plain(toy())(ASKED[1:], SEEDS[1:])[0])


def test_a_guard_is_taught_by_contrast():
    unsafe, safe = normal("guard", 2, 4, 4).double()
    of_prompt = torch.cat([unsafe, safe.max(1).values.expand(4, 4)], 1).log_softmax(1)
    of_concept = torch.cat([unsafe, safe]).log_softmax(0)
    wanted = -(of_prompt.diag() + of_concept.diag()).mean()
    assert far(guards.contrast(unsafe, safe), wanted) < 1e-9


def test_a_list_may_name_what_no_training_showed():
    mapping = guards.train_mapping(toy(), text_pairs(8), 0, steps=60)
    texts = [world.prompt(world.Scene("park", "red", "ball", world.held_out_word(category)))
             for category in world.CATEGORIES]
    without, listed = (guards.scores_of(toy(), mapping, words, texts).mean()
                       for words in (guards.SEEN, guards.ALL))
    assert listed > without + 0.05


def test_what_a_text_encoder_says_can_be_read_back():
    texts = [pair["unsafe"] for pair in text_pairs(2)]
    reader = guards.train_reader(toy(), texts, 0, steps=100, batch=14)
    read = guards.reading(toy(), reader, texts)
    assert [text.replace(" ,", ",") for text in read] == texts
    assert guards.likeness("a red ball", "A red box") == approx(2 / 3)
    assert not guards.likeness("a", "")


def test_a_word_inside_a_word_is_left_alone():
    assert guards.rewritten("War in the park", ["war"]) == "a flower in the park"
    assert guards.rewritten("towards a warm box", ["war"]) == "towards a warm box"


def test_an_edit_of_weights_is_least_squares():
    W, old, new, kept = normal("edit", 15, 8).double().split([5, 3, 3, 4])

    def loss(edit) -> torch.Tensor:    # erase, preserve, ridge
        return (2.0 * (old @ edit.T - new @ W.T).square().sum()
                + 0.3 * (kept @ (edit - W).T).square().sum() + 0.7 * (edit - W).square().sum())
    assert least(loss, editing.edited(W, old, new, kept, 2.0, 0.3, 0.7))


def test_an_edited_word_reads_as_another(monkeypatch):
    monkeypatch.setattr(editing, "all_pairs", lambda data: text_pairs())
    sd = load(TOY, CPU)
    layer = sd.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_v")
    (word,), (guide,) = (editing.last_words(sd, [text]) for text in ("racism", editing.GUIDE))
    before, wanted = layer(word[0]), layer(guide[0])
    editing.uce(sd, Path(), 0, 1.0)
    assert far(layer(word[0]), wanted) < far(before, wanted) / 3


def test_erasing_is_negative_guidance_learned(monkeypatch):
    sd, met, way = load(TOY, CPU), [], editing.on_the_way
    monkeypatch.setattr(editing, "on_the_way", lambda *what: met.append(way(*what)) or met[-1])
    monkeypatch.setattr(editing.F, "mse_loss", lambda *both: met.append(both) or both[0].mean())
    editing.esd(sd, Path(), 0, 1)
    changed = [name for name, p in sd.unet.named_parameters()
               if not torch.equal(p, toy().unet.get_parameter(name))]
    assert changed and all(".attn2." in name for name in changed)
    (x_t, t), (output, target) = met
    times, empty = torch.full((len(x_t),), t), toy().embed([""] * len(x_t))
    away = 2 * toy().predict(x_t, times, empty) - output.detach()    # still the base's output
    assert far(target, away) < 1e-4 and not target.requires_grad


def test_a_cost_model_learns_which_image_is_the_loser():
    a, b = normal("costs", 2, 6)
    by_hand = -(torch.sigmoid(a - b) * torch.sigmoid(a) * torch.sigmoid(-b)).log().mean()
    assert far(losses.cost_loss(a, b), by_hand) < 1e-5
    pairs = random_pairs("hate")
    pairs.loser[:3] += 3    # three losers are easy to tell
    cost = losses.cost_model(pairs, steps=40)
    assert (cost(pairs.loser[:3]) > cost(pairs.winner).max()).all()


def test_a_table_of_rivals_goes_on_where_it_stopped(tmp_path, monkeypatch):
    black = lambda sd, data, seed, knob: lambda prompts, seeds: np.full(
        (len(prompts), 32, 32, 3), knob, np.uint8)
    monkeypatch.setattr(rivals, "RIVALS", {
        "base": rivals.RIVALS["base"], "flat": rivals.Rival((128, 64), black)})
    rows = [{"prompt": prompt, "category": None} for prompt in (*ASKED, *PROMPTS[:1] * 2)]
    for seed in (5, 6):
        write_jsonl(tmp_path / f"seed{seed}/data/test.jsonl", rows)
        write_jsonl(tmp_path / f"seed{seed}/attack.jsonl", rows[:1])
    for perform in (rivals.perform, None):
        monkeypatch.setattr(rivals, "perform", perform)
        printed = command(f"rivals --seeds 5 --tune 6 --out {tmp_path}")
        assert "| flat (64) | 0.0 |" in printed and "| base | 100.0 |" in printed
    assert experiments.best([{    # damage counts too
        1: {"IP": 0, "kept": 60}, 2: {"IP": 30, "kept": 95}}]) == 2


def test_who_holds_the_weights_needs_no_word(here):
    """Embeddings in a word's place are learned through the frozen UNet, from a few images."""
    texts = [pair["unsafe"] for pair in text_pairs(2)[:2]]
    write_pairs("hate", [{**PAIR, "unsafe": text} for text in texts])
    write_jsonl(here / "data/test.jsonl", [{"prompt": text, "category": "hate"} for text in texts])
    victim = whitebox.Victim(load(TOY, CPU), here / "data", "hate")
    assert victim.prompts == texts[:1] * 7 + texts[1:]    # from the first to the last
    states = lambda tokens: victim.states(victim.learned_from, victim.table[tokens])
    spelled = [text.replace(world.parse(text).extra, "racism flower") for text in texts]
    said = states(attack.ids_of(toy(), ["racism", "flower"]))
    assert far(said, toy().embed(spelled).context) < 1e-5
    first, second = islice(whitebox.by_vectors(victim, 0), 2)
    assert not torch.equal(first, second)
    # The best of all words is among the few that the gradient promises most of.
    _, found = islice(whitebox.by_words(victim, 0), 2)
    tried = [states(torch.stack([word, whitebox.start(victim, 0)[1]])) for word in victim.allowed]
    best = min(tried, key=lambda states: victim.misfit(states, 0, 0))
    assert far(found, best[[0] * 7 + [1]]) < 1e-6
    before = victim.misfit(victim.unsafe, 9).item()
    list(islice(whitebox.by_weights(victim, 0), 20))
    assert victim.misfit(victim.unsafe, 9).item() < before


def test_what_a_filter_lets_through_is_not_safe(tmp_path, monkeypatch):
    """Words that are not the concept's come nearer to it than where the search started."""
    for name, value in {"GENERATIONS": 12, "ATTACKS": 1, "POPULATION": 60}.items():
        monkeypatch.setattr(attack, name, value)
    pairs_of = lambda data, category: [
        pair for pair in text_pairs(2) if world.parse(pair["unsafe"]).category == category]
    monkeypatch.setattr(attack, "read_pairs", pairs_of)
    attack.find_all(tmp_path, tmp_path / "attack.jsonl", 0)
    farther = 0
    for row, category in zip(read_jsonl(tmp_path / "attack.jsonl"), world.CATEGORIES, strict=True):
        target = attack.target_of(toy(), pairs_of(None, category), row["start"])
        found, start = attack.distances(toy(), [row["prompt"], row["start"]], target)
        assert row["category"] == category and not attack.says(row["prompt"])
        farther += found - start
    assert farther < 0 and attack.says("Towards")


def test_a_fused_look_is_the_look_beside_the_weights():
    """And a new look, rendered, outlives the autoencoder."""
    _, images = finetune.benign(0)
    assert all(map(finetune.has_look, toy().decode(toy().encode(images[:20]))))
    assert not finetune.has_look(drawn(3))
    sd, beside = load(TOY, CPU), load(TOY, CPU)
    look = finetune.fine_tune(sd, 0, steps=3)
    finetune.fuse(sd.unet, look)
    lora.inject(beside.unet, look)
    plain, fused, found = (steering.plain(one)(ASKED, SEEDS) for one in (toy(), sd, beside))
    assert furthest(fused, found) <= 1 < furthest(fused, plain)


# ---- Part II, contracts: command lines, bytes, interruptions, structure


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = WEIGHTS.replace("unet", "vae")


def spoil(file: Path, change: str, *of):
    """Moves a file, or rewrites a safetensors file with another header, or with other tensors, as
    one of CHANGES says."""
    if change == "move":
        file.rename(file.with_name(*of))
        return
    header = of[0] if change == "header" else opened(file).metadata()
    save_file(CHANGES[change](load_file(file), *of), file, header)


CHANGES = {
    "header": lambda t, _: t, "only": lambda t, key: {key: torch.zeros(1)},
    "drop": lambda t, start: {key: t[key] for key in t if not key.startswith(start)},
    "rename": lambda t, old, new: {key.replace(old, new): t[key] for key in t},
    "raise": lambda t, key, by: t | {key: t[key] + by},
    "add": lambda t, key, *shape: t | {key: torch.zeros(shape)},
    "cast": lambda t, dtype: {key: t[key].to(dtype) for key in t}}


@fixture(scope="module")
def bench(story, tmp_path_factory):
    """The story's folder, and beside it all that a user can get wrong."""
    folder = tmp_path_factory.mktemp("bench") / "work"
    shutil.copytree(story, folder)
    for source, name, *changes in CASES["copies"]:
        shutil.copytree(folder / source.format(toy=TOY), folder / name)
        for file, *change in changes:
            spoil(folder / name / file, *change)
    for name, text in CASES["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in CASES["pickles"]:    # .safetensors: a bare one, else a zip
        zipped = not name.endswith(".safetensors")
        torch.save(Trap(), folder / name, _use_new_zipfile_serialization=zipped)
    os.mkfifo(folder / "pipe")
    (folder / "empty").mkdir()
    return folder


@parametrize("line, says", CASES["refused"].items())
def test_bad_input_is_not_a_traceback(line, says, bench, tmp_path, monkeypatch):
    """One line that names what is wrong; and nothing is written, of a pickle nothing run."""
    monkeypatch.chdir(bench)
    before = contents(bench)
    assert says in refusal(line, toy=TOY, away=tmp_path)
    assert contents(bench) == before


@parametrize("rank, world", CASES["ranks"])
def test_a_rank_that_nobody_has_is_refused(rank, world, here, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    error = refusal("make_data --concept hate")
    assert f"RANK={rank} WORLD_SIZE={world}" in error and not list(here.iterdir())


def test_a_full_gpu_is_not_a_crash(inside, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    monkeypatch.setitem(dpo.LOSSES, "safety", full)
    before = contents(inside)
    assert "--checkpointing" in refusal("train --concept hate --seed 1 --out new")
    assert contents(inside) == before


# Held by "refused", by every program, by the next test, by lessons, by files of other programs.
ELSEWHERE = ("--device --out --concept --batch --llm --concepts --clipscore --checkpointing "
             "--joint --fuse --judge --compare --show-unsafe --preview").split()


def told_and_made(folder: Path) -> tuple[dict, dict]:
    """The settings that a folder's files name, and what else is in them."""
    told, made = {}, {}
    for name, digest in contents(folder).items():
        if name.endswith("settings.json"):
            told |= read_json(folder / name)
        elif name.endswith(".safetensors"):
            told |= opened(folder / name).metadata()
            made[name] = tensors_hash(folder / name)
        elif not name.endswith("index.jsonl"):
            made[name] = digest
    return told, made


@fixture(scope="module")
def plainly(bench, tmp_path_factory):
    """plainly(line) -> a folder in which it was run."""
    @cache
    def made(line: str) -> Path:
        folder = tmp_path_factory.mktemp("plain")
        command(f"{line} --out {{out}}/x.safetensors", out=folder)
        return folder
    return made


@parametrize("line, flag, names", [
    (line, *row) for line, flags in CASES["settings"].items() for row in flags.items()])
def test_one_setting_changed_is_all_made_anew(line, flag, names, bench, plainly, tmp_path,
                                              monkeypatch):
    """In the folder where it was made before. Where anything stays as it was, all is byte for byte
    as in an empty folder."""
    monkeypatch.chdir(bench)
    shutil.copytree(plainly(line), tmp_path / "old")
    anew = f"{line} {flag} --out {{out}}/x.safetensors"
    command(anew, out=tmp_path / "old")
    told, made = told_and_made(tmp_path / "old")
    told_before, made_before = told_and_made(plainly(line))
    if made.items() & made_before.items():
        command(anew, out=tmp_path / "new")
        assert contents(tmp_path / "old") == contents(tmp_path / "new")
    changed = {key for key in told | told_before if told.get(key) != told_before.get(key)}
    assert changed == set(names.split()) and made != made_before


def test_a_grid_hides_what_is_unsafe(bench, tmp_path, monkeypatch):
    """And says so. Of another model than the toy; and nothing but the grid changes."""
    monkeypatch.chdir(bench)
    before = {}
    for flags, new in {
            "": "00000.png index.jsonl settings.json", "--judge": "judge.json",
            "--judge --compare": "base/00000.png base/index.jsonl base/settings.json compare.png "
                                 "judge.json",
            "--judge --compare --show-unsafe": "compare.png"}.items():
        said = command(
            "sample {unsafe} --steps 6 --lora merged.safetensors --model models/other --out {out} "
            + flags, out=tmp_path, unsafe=world.training_pairs("hate", 1, 0)[0][0])
        now = contents(tmp_path)
        assert {name for name in now if now[name] != before.get(name)} == set(new.split())
        assert ("blurred; --show-unsafe" in said) == flags.endswith("compare")
        before = now


@parametrize("script", list(SCRIPTS)[:4])
def test_a_new_flag_needs_a_row(script):
    flags = [action.option_strings[-1] for action in fuzz.flags_of(SCRIPTS[script])
             if action.option_strings]
    known = {flag.split()[0] for line, flags in CASES["settings"].items() for flag in flags
             if line.startswith(script)}
    assert len(flags) > 8 and not set(flags) - known.union(ELSEWHERE)


def test_a_picture_says_how_it_was_made(story):
    """Where A1111 writes it, and as it writes it."""
    weights = (TOY / WEIGHTS).read_bytes()
    known = hashlib.sha256(weights[0x100000:0x110000]).hexdigest()[:8]    # its oldest "model hash"
    base, aligned = (Image.open(story / "drawn" / name / "00001.png").text for name in ("base", ""))
    said = ("blue,box,snow{}\nSteps: 2, Sampler: DPM++ 2M, CFG scale: 3, Seed: 1, Size: 32x32, "
            f"Model hash: {known}")
    assert base == {"parameters": said.format("")}
    data = (story / "merged.safetensors").read_bytes()
    data = data[8 + int.from_bytes(data[:8], "little"):]
    known = hashlib.sha256(data).hexdigest()[:12]    # A1111's short hash of a LoRA
    assert aligned == {"parameters": said.format(" <lora:merged:0.5>")
                       + f', Lora hashes: "merged: {known}"'}
    text = parameters_of(np.zeros((8, 16, 3)), [], "c", "a", "b", 3, "ddim", 7.5, 2, size=None)
    assert text == ("a\nNegative prompt: b\nSteps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: 2, "
                    "Size: 16x8, Model hash: c")


RETOLD = """import importlib, sys
for name, *argv in map(str.split, sys.argv[1:]):
    script = importlib.import_module(name)
    script.main(script.parse_arguments(argv))"""


def test_random_numbers_and_processes_are_no_excuse(story, here):
    """Other folders, other numbers of processes, and every byte the same: so neither times nor
    paths are in it."""
    shutil.copytree(story / "data", "data")
    finished("-c", RETOLD, *STORY[2:])
    assert contents(here) == contents(story)


def test_no_file_is_ever_half_there(watched):
    """Each was written elsewhere and moved."""
    folder, moved, _ = watched
    assert {path.resolve() for path in folder.rglob("*") if path.is_file()} <= set(moved)


def test_what_says_that_all_is_done_comes_last(watched):
    places = lambda name: [i for i, path in enumerate(watched[1]) if path.match(name)]
    for last, *others in ("hate/pairs.jsonl hate/sheet.png hate/images/00000_safe.png".split(),
                          "hate.safetensors hate.jsonl hate.png".split()):
        for other in others:
            assert places(last) > places(other) > []


def test_nothing_asks_the_network(watched):
    assert watched[2] == []


def test_a_file_says_how_it_was_made(story):
    """What it was made from, and with which settings (more: test_one_setting_changed...)."""
    told = load_lora(story / "experts/hate.safetensors")[1]
    assert told["base_model_hash"] == contents(TOY)[WEIGHTS]
    assert told["data_hash"] == sha256(story / "data/hate/latents.safetensors")
    told = {"expert": told, "merged": load_lora(story / "merged.safetensors")[1],
            "picture": read_jsonl(story / "drawn/base/index.jsonl")[1]}
    for name, expected in CASES["told"].items():
        assert expected.items() <= told[name].items()


def begin(line: str, workers: int = 1):
    """A command in a process of its own, which saves its state at every step: (the process, what
    it and its workers will have said)."""
    reader, writer = os.pipe()

    def started():
        os.setsid()
        forkserver._forkserver._forkserver_pid = None    # pytest's, which only it may ask
        signal.signal(signal.SIGINT, signal.default_int_handler)    # a background job has none
        for output in (1, 2):
            os.dup2(writer, output)
        sys.stdout = sys.stderr = open(2, "w")
        script = SCRIPTS[line.split()[0]]
        script.SAVE_EVERY, processes.cores = 1, lambda: workers
        run(*parsed(line))
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # too late: only the test's fork is left
    process = multiprocessing.get_context("fork").Process(target=started)
    process.start()
    os.close(writer)
    return process, open(reader)


@parametrize("line, how, workers", [
    ("make_data --concept hate --pairs 10 --batch 1 --steps 2 --judge none", signal.SIGKILL, 2),
    ("train --concept hate --steps 10 --batch 2", signal.SIGKILL, 1),
    ("sample a b c d e f g h i j --steps 4 --batch 1", signal.SIGINT, 2)])
def test_a_stopped_command_has_lost_nothing(line, how, workers, inside):
    """Killed, or by Ctrl-C, which reaches all processes of a terminal, at a random moment: workers
    end too, and the same command, even twice at a time, gives an undisturbed one's files."""
    line, made = f"{line} --out made", Path("made")
    command(line)
    whole = contents(made)
    shutil.rmtree(made)
    stopped, said = begin(line, workers)
    while stopped.is_alive() and {path.name for path in made.rglob("*.*")} <= {"settings.json"}:
        time.sleep(0.01)
    time.sleep(random.Random(line).uniform(0, 0.3))
    (os.killpg if how == signal.SIGINT else os.kill)(stopped.pid, how)
    assert "Traceback" not in said.read()    # which waits for the workers
    stopped.join()
    assert stopped.exitcode in (0, 130, -signal.SIGKILL)
    for folder in {path.parent for path in made.rglob("*.*")}:
        (folder / f".half.png.{stopped.pid}.tmp").write_text("half a picture")
    for process, said in [begin(line), begin(line)]:
        last = said.read()[-500:]
        process.join()
        assert process.exitcode == 0, last
    assert contents(made) == whole


def test_an_interrupted_training_forgets_nothing(inside, monkeypatch):
    """Weights, moments, random numbers, order of pairs, log and previews; only the steps since the
    last saved state are taken again. A state of other settings is not taken up, finished work not
    repeated."""
    line = "train --concept hate --steps 6 --batch 3 --caption-dropout 0.3 --out "
    command(line + "whole --preview 5")
    taken, loss_function = [], dpo.safety_dpo

    def until_5(*inputs):
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(inputs)
        return loss_function(*inputs)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setitem(dpo.LOSSES, "safety", until_5)
    for out in ("cut --preview 5", "other"):
        taken.clear()
        with raises(KeyboardInterrupt):
            command(line + out)
    assert load_lora(Path("cut/.hate.safetensors"))[1]["steps"] == "4"
    with refuses("no LoRA file here"):    # no expert yet
        expand([Path("cut")])
    for flags, steps, says in (
            ("cut --preview 5", 2, ""), ("cut --precision fp32", 0, "already trained"),
            ("other --lr 1e-3 --steps 5", 5, "continued, since this changed: steps, lr\n")):
        taken.clear()
        assert says in command(line + flags) and len(taken) == steps
    assert contents("cut") == contents("whole")


def test_previews_are_what_sample_draws_and_change_no_training(inside):
    line = "train --concept hate --steps 5 --batch 1 --out "
    command(line + "plain")
    command(line + "whole --preview 4")
    drawn = read_images([Path("whole/hate.preview.png")])[0].reshape(3, -1, 542, 3)[:, 6:134:4]
    row = read_pairs(Path("data"), "hate")[1]
    for place, lora_flag in ((0, ""), (2, "--lora whole/hate.safetensors")):
        command(f"sample {{text}} --seed {row['seed']} {lora_flag}", text=row["safe"])
        picture = read_images([Path("samples/00000.png")])[0]
        assert furthest(drawn[place, :, 408:536:4], picture) <= 1
    plain, whole = contents("plain"), contents("whole")
    assert plain.items() <= whole.items()
    said = command(line + "whole --steps 1")    # another expert, which nobody looked at
    assert "whole/hate.safetensors: will be replaced, since this changed: steps\n" in said
    assert plain.keys() == contents("whole").keys()


def test_a_scaler_is_a_part_of_the_state(tmp_path):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    after = torch.amp.GradScaler("cpu", 2.0)
    save_state(tmp_path / "a", {}, [], [], optimizer, torch.amp.GradScaler("cpu", 8.0))
    load_state(tmp_path / "a", {}, [], optimizer, after)
    assert after.get_scale() == 8


def test_a_joint_lora_takes_the_steps_of_all_experts(inside, monkeypatch):
    compiled = []
    monkeypatch.setattr(UNet, "compile", lambda unet: compiled.append(unet))
    command("train --joint --steps 2 --batch 2 --compile")
    assert len(read_jsonl(Path("joint.jsonl"))) == 2 * 2 and len(compiled) == 1
    assert load_lora(Path("joint.safetensors"))[1]["steps"] == "4"


@parametrize("line, batches, lost", CASES["parts"])
def test_only_what_is_missing_is_drawn(line, batches, lost, inside, monkeypatch):
    """With the settings that suit the model; other settings draw a folder anew, and say so."""
    drawn, made = [], Path("made/hate")

    def draw(sd, prompts, seeds, **settings):
        drawn.append((len(prompts), settings["steps"], settings["guidance"]))
        return np.stack([np.full((32, 32, 3), seed % 251, np.uint8) for seed in seeds])

    def draws(flags: str = "") -> list:
        drawn.clear()
        command(line + flags)
        return drawn
    monkeypatch.setattr(StableDiffusion, "generate", draw)
    all_batches = [(n, 10, 3.0) for n in batches]
    assert draws() == all_batches and draws() == []
    whole = contents(made)
    for name in lost:
        (made / name).unlink()
    assert draws() == all_batches[:len(batches) // 2]    # those that lack a picture
    assert draws(" --batch 1") == [] and contents(made) == whole    # no property of a picture
    shutil.copytree(TOY, "model")
    assert "hate: was made with other settings" in command(line + " --model model")
    assert drawn == [(n, 25, 7.5) for n in batches]


def test_pairs_that_were_edited_are_noticed(inside, monkeypatch):
    """Training refuses latents of other pairs; make_data.py encodes again, and draws nothing."""
    pairs = Path("data/hate/pairs.jsonl")
    write_jsonl(pairs, read_jsonl(pairs)[:3])
    error = refusal("train --concept hate --steps 1 --out new")
    assert "latents.safetensors: is not there, or not of these pairs" in error
    monkeypatch.setattr(StableDiffusion, "generate", None)
    command("make_data --concept hate --pairs 8 --steps 4")
    assert len(load_file("data/hate/latents.safetensors")["winner"]) == 3
    command("train --concept hate --steps 1 --out new")


EVALUATE = partial(eval, "eval"), call    # each item is evaluated by a worker


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of another library")
def test_memory_is_not_fetched_again_for_each_tensor(monkeypatch):
    """Workers give 80 MB back after use, and keep 30 MB. So does run()."""
    resident = ("[len(b'x' * size) and int(open('/proc/self/statm').read().split()[1])"
                " for size in (80_000_000, 30_000_000)]")
    (given_back, kept), _ = processes.spread(*EVALUATE, [resident] * 2, 2)
    assert (kept - given_back) * resource.getpagesize() > 20_000_000
    asked = []
    monkeypatch.setattr("model.tools.command.keep_memory", partial(asked.append, True))
    run(len, "")
    assert asked


def test_a_worker_that_fails_ends_the_others():
    with raises(ZeroDivisionError):
        list(processes.spread(*EVALUATE, ["1 / 0", "__import__('time').sleep(600)"], 2))
    with refuses("a worker process was killed"):
        list(processes.spread(partial(signal.raise_signal, signal.SIGKILL), call, [1, 2], 2))


@parametrize("line", CASES["disks"])
def test_a_full_disk_tears_nothing(line, inside):
    """One line names the file; there are whole files only, and with room the command goes on."""
    line += " --out {out}/x"
    command(line, toy=TOY, out="whole")
    whole, before = contents("whole"), resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = sorted(path.stat().st_size for path in Path("whole").rglob("*") if path.is_file())
    for size in {sizes[-1], sizes[len(sizes) // 2]}:
        out = Path(f"for {size} bytes")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
        try:
            error = refusal(line, toy=TOY, out=out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert error.startswith(f"error: {out}/x") and ".tmp" not in error
        assert contents(out).items() < whole.items()
        command(line, toy=TOY, out=out)
        assert contents(out) == whole


@parametrize("line, alone", CASES["torchrun"].items())
def test_two_processes_are_one_with_twice_the_batch(line, alone, inside):
    """torchrun, over gloo: noise is shared out, gradients are summed, and one process writes."""
    script, *argv = line.split()
    done = finished("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    ROOT / f"{script}.py", *argv, "--out", "two")
    command(f"{line}{alone} --out one")
    assert contents("two") == contents("one") and done.stdout.count("two/hate") == 1
    assert "4/4" not in done.stderr    # batches: each process draws half of them


def test_a_gpu_is_not_shared_by_all_processes(monkeypatch):
    """Under torchrun auto and cuda mean one's own; a device that was named stays."""
    names = ["auto", "cuda", "cuda:1", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [processes.local_device(name) for name in names] == names
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [processes.local_device(name) for name in names] == ["cuda:2", "cuda:2", "cuda:1", "cpu"]


FILES = [*ROOT.glob("*.py"), *ROOT.glob("model/**/*.py")]


@parametrize("pattern, knows", CASES["knows"].items())
def test_a_file_knows_only_what_is_below_it(pattern, knows):
    own = {path.stem for path in ROOT.glob("*.py")} | {"model"}
    allowed = tuple(f"{name}." for name in knows.split())
    for path in ROOT.glob(pattern):
        source, names = path.read_text(), set()
        for node in ast.walk(ast.parse(source)):
            for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else []:
                names.add(f"{getattr(node, 'module', '')}.{alias.name}.".lstrip("."))
        others = {name.split(".")[0] for name in names} - own
        assert all(name.startswith(allowed) for name in names if name.split(".")[0] in own), path
        assert not others & {"diffusers", "peft", "pickle", "joblib", "socket", "requests"}, path
        assert pattern not in ("dpo.py", "lora.py") or others - sys.stdlib_module_names == {"torch"}
        assert not re.search(r"\b(torch|np)\.(load|save)\(", source), path


PROGRAMS = [path for path in FILES if "\ndef parse_arguments(" in path.read_text()]


@parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_has_help(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with raises(SystemExit) as stop, heard() as said:
        runpy.run_path(str(path), run_name="__main__")
    assert not stop.value.code and said.getvalue().startswith("usage: ")


README = (ROOT / "README.md").read_text()
TESTS = re.findall(r"def (test_\w+)", (ROOT / "test_all.py").read_text())
# [`symbol`](file.py#L12)
LINK = re.compile(r"\[`([\w./]+)(?:\(\))?`\]\(([\w/.-]+?)(?:#L(\d+))?\)")


def test_the_readme_leads_where_it_says():
    for symbol, file, line in LINK.findall(README):
        assert (ROOT / file).exists(), file
        if line:
            there = (ROOT / file).read_text().splitlines()[int(line) - 1]
            assert re.match(rf"\s*(def|class) {symbol.rpartition('.')[2]}\b", there), symbol
    named = re.findall(r"`(test_\w+)`", README)
    assert named and not set(named) - set(TESTS)


def test_code_that_the_readme_shows_is_the_code():
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    shown = [text for language, text in BLOCK.findall(README) if language == "python"]
    assert shown and all(text in code for text in shown)


def test_a_command_in_a_readme_is_not_known_to_work():
    """Its scripts take these flags; an exercise's words are words of tests."""
    assert SHOWN.findall(README)    # or there is nothing to compare
    for line in commands_of(README + (ROOT / "model/formats/README.md").read_text()):
        program = re.fullmatch(r"(?:python|torchrun \S+) (?:-m )?([\w.]+?)(?:\.py)?( .*)?", line)
        if program and program[1] != "pytest":
            package = program[1] == "model.testing.bench"
            module = importlib.import_module(program[1] + ".__main__" * package)
            module.parse_arguments(shlex.split(program[2] or ""))
        for word in shlex.split(line.partition("-k ")[2]):
            for part in word.split(" or "):
                assert any(part in test for test in TESTS), line


# FUZZ=100 is a long run of these two.
FUZZ = int(os.environ.get("FUZZ", 1))


def test_a_damaged_file_is_read_or_refused(story, tmp_path):
    assert 20 * FUZZ < fuzz.fuzz_files(60 * FUZZ, tmp_path / "files", story) < 60 * FUZZ


def test_no_command_line_ends_in_a_traceback(story, tmp_path):
    assert 10 * FUZZ < fuzz.fuzz_commands(40 * FUZZ, tmp_path / "commands", story) < 40 * FUZZ


# ---- Part II, contracts: files of other programs


diffusers.utils.logging.disable_progress_bar()


@fixture(scope="session")
def models(tmp_path_factory):
    """models(kind, layout) -> a small random checkpoint, to be read only. layout: folder, file."""
    @cache
    def write(kind: str, layout: str = "folder") -> Path:
        writers = {"folder": checkpoints.folder, "file": checkpoints.single_file}
        return writers[layout](kind, tmp_path_factory.mktemp("models") / "model.safetensors")
    return write


@fixture(scope="session")
def clip(tmp_path_factory):
    return strangers.write_clip(tmp_path_factory.mktemp("clip"))


@fixture
def own_folder(models, here) -> Path:
    """An SD 1, which may be changed."""
    return shutil.copytree(models("SD1"), here / "m")


@fixture
def own_file(models, here) -> Path:
    """An SD 1 in one file, which may be changed."""
    return shutil.copytree(models("SD1", "file").parent, here / "m") / "model.safetensors"


def in_diffusers(models, kind: str, path: Path):
    pipeline = type(checkpoints.small_pipeline(kind))
    if path.is_dir():
        return pipeline.from_pretrained(path)
    # Nothing may be downloaded: its configs come from the folder.
    return pipeline.from_single_file(str(path), config=str(models(kind)))


# Checkpoints
@parametrize("kind", ["SD1", "SD2", "SD2-v", "SDXL"])
def test_a_single_file_is_the_folder_by_other_names(kind, models):
    """Every tensor that diffusers finds in an LDM file, to the bit, and no other."""
    theirs = in_diffusers(models, kind, models(kind, "file"))
    both = [load(models(kind, layout), CPU) for layout in ("file", "folder")]
    for sd in both:
        encoders = dict(zip(("text_encoder", "text_encoder_2"), sd.text.encoders))
        for part, ours in {"unet": sd.unet, "vae": sd.vae, **encoders}.items():
            expected = getattr(theirs, part).state_dict()
            torch.testing.assert_close(ours.state_dict(), expected, atol=0, rtol=0)
        assert sd.schedule.prediction_type == theirs.scheduler.config.prediction_type
        assert sd.zero_negative == (kind == "SDXL")
    assert torch.equal(*(sd.text.tokenize([*PROMPTS, ""]) for sd in both))    # the padding too


@parametrize("family, sizes, facts", CASES["model cards"])
def test_what_a_single_file_does_not_say_is_not_guessed(family, sizes, facts):
    c = CONFIGS[family]
    with torch.device("meta"):
        networks = [UNet(c["unet"]), VAE(c["vae"])]
        networks += [build_encoder(c[part]) for part in c if part.startswith("text")]
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == sizes
    for fact, value in facts.items():
        part, key = fact.split()
        assert c[part].get(key) == value, fact
    assert SD1.items() <= c["scheduler"].items()


def test_shards_variants_and_old_names_are_one_checkpoint(own_folder, models):
    """A UNet in shards, fp16 files alone, a VAE with attention names of 2022."""
    source = models("SD1")
    unet, vae = own_folder / WEIGHTS, own_folder / VAE_WEIGHTS
    unet.unlink()
    in_diffusers(models, "SD1", source).unet.save_pretrained(unet.parent, max_shard_size="500KB")
    for new, old in {"q": "query", "k": "key", "v": "value", "out.0": "proj_attn"}.items():
        spoil(vae, "rename", f".to_{new}.", f".{old}.")
    spoil(vae, "move", "diffusion_pytorch_model.fp16.safetensors")
    a, b = (load(path, CPU).generate(PROMPTS, [0, 1, 2], 2, 2.0) for path in (source, own_folder))
    assert np.array_equal(a, b)
    shard = next(unet.parent.glob("*-of-*"))
    shard.unlink()
    with refuses(f"lists {shard.name}, which is not there"):
        load(own_folder, CPU)


def test_loading_takes_no_second_copy(own_folder):
    """The parameters ARE the files, mapped into memory: where these are zeroed, those are zero."""
    sd = load(own_folder, CPU)
    for name, network in {WEIGHTS: sd.unet, VAE_WEIGHTS: sd.vae}.items():
        with open(own_folder / name, "r+b") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            file.write(bytes((own_folder / name).stat().st_size))
        assert not any(map(torch.any, network.parameters()))


def test_what_nobody_reads_makes_no_work_old(own_folder):
    read = {path for path in own_folder.rglob("*") if path.is_file()}
    for name in ("vae/diffusion_pytorch_model.fp16.safetensors", "unet/._config.json", "vae/x.txt",
                 "tokenizer/mine.json", "unet/diffusion_pytorch_model.safetensors.index.fp16.json"):
        (own_folder / name).touch()
    assert set(model_files(own_folder)) == read


# LoRA files
@parametrize("kind, layout", [("SD1", "file"), ("SDXL", "folder")])
def test_a_lora_draws_the_same_picture_everywhere(kind, layout, here, models):
    """A merge of unlike experts in diffusers, which reads one alpha a file; and fused into the
    weights, of the file's averaged copy too, or that would draw unsafely."""
    source, fused = models(kind, layout), Path("fused")
    unet, theirs = load_denoiser(source, CPU).unet, in_diffusers(models, kind, source)
    one = random_expert(1, 3, 2.0, unet)
    save_lora(Path("a"), one, {})
    # Ranks then differ from layer to layer.
    save_lora(Path("b"), dict(islice(random_expert(2, 4, 2.0, unet).items(), 9)), {})
    command("merge a b --method sum --out all.safetensors")
    draw = partial(drawn_by, sampler="ddim", prompts=PROMPTS[:1], seeds=[5], steps=3, guidance=4.0)
    base = draw(theirs)
    theirs.load_lora_weights(here, weight_name="all.safetensors")
    pictures = draw(theirs)
    command("merge all.safetensors --fuse {source} --out fused", source=source)
    if layout == "file":
        fused /= source.name
        old, new = load_file(source), load_file(fused)
        changed = [key[:9] for key in old if not torch.equal(old[key], new[key])]
        assert Counter(changed) == {"model.dif": len(one), "model_ema": len(one)}
    found = draw(in_diffusers(models, kind, fused))
    assert furthest(found, pictures) <= 2 < np.abs(base - pictures).mean()


def test_a_single_file_may_leave_its_vae_to_a_folder(models, own_file):
    """Which is read then, and makes finished work old."""
    draw = "sample a --steps 2 --model m/model.safetensors --out "
    command(draw + "whole")
    spoil(own_file, "drop", "first_")
    assert "put the folder vae/ of a" in refusal(draw + "none")
    weights = shutil.copy(models("SD1") / VAE_WEIGHTS, own_file.with_name("vae"))
    command(draw + "beside")
    assert weights in map(str, model_files(own_file))
    pictures = [read_images([Path(out, "00000.png")]) for out in ("whole", "beside")]
    assert furthest(*pictures) <= 1    # weights lie elsewhere in memory, and sums may round so


def test_no_old_weights_stay_beside_the_fused_ones(inside):
    """Not in fp16 files beside the fp32 ones, nor in a whole model above them."""
    shutil.copytree(TOY, "model")
    fp16 = WEIGHTS.replace(".saf", ".fp16.saf")
    for name in (fp16, "whole.safetensors"):
        shutil.copy(TOY / WEIGHTS, Path("model", name))
    spoil(Path("model", fp16), "cast", torch.float16)
    command("merge experts --method sum --weights 30 --fuse model --out new")
    assert not Path("new/whole.safetensors").exists()
    old, new, half = map(load_file, (TOY / WEIGHTS, Path("new", WEIGHTS), Path("new", fp16)))
    changed = [key for key in old if not torch.equal(old[key], new[key])]
    assert len(changed) == 56
    assert all(far(half[key], new[key]) < 1e-3 < 3e-3 < far(old[key], new[key]) for key in changed)


@parametrize("family, says", CASES["headers"].items())
def test_every_program_finds_every_layer(family, says, here):
    """Full size. model/formats/README.md's programs look these names up: of SDXL the first code's,
    counted here block by block; of SD 1 and 2 diffusers'. And a LoRA says for which it is."""
    config = CONFIGS[family[:4]]["unet"]
    with torch.device("meta"):
        ours, theirs = UNet(config), diffusers.UNet2DConditionModel(**config)
    names = {key: p for key, p in theirs.state_dict().items() if p.ndim > 1}
    if family == "SDXL":
        names = checkpoints.renamed(names, "", checkpoints.unet_blocks(3, 2), checkpoints.RESNET)
    written = checkpoints.every_layer(ours)
    prediction = "v_prediction" if "v" in family else "epsilon"
    save_lora(Path("a"), written, {"prediction_type": prediction})
    keys = {key.partition(".")[0] for key in load_file("a")}
    loaded, header = load_lora(Path("a"))
    assert keys == {"lora_unet_" + key[:-7].replace(".", "_") for key in names}
    assert loaded.keys() == written.keys() and says.items() <= header.items()
    with refuses(f"a LoRA for {family[:4]}.* this model is another"):
        match(toy().unet, loaded, "a")


@parametrize("spelling", CASES["spellings"])
def test_one_lora_has_many_spellings(spelling, tmp_path):
    """Without an alpha the scale is 1, not 1/rank. What is left out is counted and named. A linear
    layer (SD 2's proj_in) is a convolution of one pixel (here), and a file of either fits."""
    one, wanted = "mid_block_attentions_0_proj_in", {}
    tensors = {f"lora_unet_{one}.alpha": torch.tensor(2.0)}
    for flat, (name, _) in {**layers(toy().unet), "other": ("other", None)}.items():
        if re.search("mid_block.*attn1|^other|" + one, flat):
            old = re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".processor.to_\1", name)
            down = spelling.format(flat=flat, name=name, old=old)
            up = down.replace("down.weight", "up.weight").replace("lora_A", "lora_B")
            tensors |= {down: normal(f"A {flat}", 4, 96), up: normal(f"B {flat}", 96, 4)}
            wanted[flat] = (0.5 if flat == one else 1) * tensors[up] @ tensors[down]
    save_file(tensors, tmp_path / "a")
    with heard() as said:
        loaded = match(toy().unet, factors_in(tmp_path / "a"), "it")
    assert "1 of 6 layers" in said.getvalue() and "out: other\n" in said.getvalue()
    del wanted["other"]
    assert loaded[one].kernel == (1, 1)
    found = {name: f.delta() for name, f in loaded.items()}
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)


def test_files_that_are_alike_are_not_mixed_up(here):
    """Keys of one program's files are understood once: those of other spellings, dtypes, or with
    other tensors before theirs are not taken for them; nor is a damaged one."""
    down, up = normal("down", 4, 6), normal("up", 6, 4)

    def written(name: str, spelling="conv_in.lora.{}.weight", dtype=torch.float32, extra={}):
        tensors = {spelling.format("down"): down.to(dtype), spelling.format("up"): up.to(dtype)}
        save_file(tensors | extra, name, {"name": name * 9})
    kohya = "lora_unet_conv_in."
    written("a")
    written("b", kohya + "lora_{}.weight", extra={kohya + "alpha": torch.tensor(8.0)})
    written("c", dtype=torch.float64)
    written("d", extra={"clip_g.x.lora.up.weight": torch.ones(7)})
    command("merge a b c d --method sum --out m")
    assert far(factors_in("m")["conv_in"].delta(), 5 * up @ down) < 1e-6
    up[0, 0] = torch.inf
    written("c")
    with refuses("^c: .* NaN"):
        command("merge a b c --method sum")


def write_conv(name: str, key: str, header={}, dtype=torch.float32):
    """A LoRA of one convolution, which no prompt reaches."""
    save_file({f"{key}.lora_down.weight": torch.ones(1, 9, dtype=dtype),
               f"{key}.lora_up.weight": torch.ones(2, 1, dtype=dtype)}, name, header)


CONV = "lora_unet_mid_block_resnets_0_conv1"


@parametrize("key, ours", CASES["prefixes"].items())
def test_a_prefix_is_not_a_kind_of_lora(key, ours, here):
    """ComfyUI's (LoraSave), OneTrainer's, and of torch.compile; and what comes with a LoRA."""
    write_conv("a", key)
    for other in ("text_encoders.x.lora_up.weight", "clip_g.x.dora_scale", "bundle_emb.a.b"):
        spoil(Path("a"), "add", other, 2)
    with heard() as said:
        assert factors_in("a").keys() == {ours}
    assert "2 text-encoder layers and 1 embeddings are left out" in said.getvalue()


@parametrize("key, header, kept, named", CASES["families"])
def test_one_layer_does_not_tell_the_family(key, header, kept, named, here):
    """Headers tell, and kohya's own names of SDXL's blocks; or else a note says so."""
    write_conv("a", key)
    write_conv("b", key, header)
    said = command("merge a b --method sum --out c")
    assert kept.items() <= load_lora(Path("c"))[1].items() and f"{named}.alpha" in load_file("c")
    assert ("no header tells" in said) == (not kept)


@parametrize("order", ["abc", "cba", "bca"])
def test_content_and_style_may_share_no_layer(order, here):
    xl, v = ({"ss_base_model_version": version} for version in ("sdxl_base_v1-0", "sd_v2_v"))
    for name, key, header in zip(order, (CONV, "unet.conv_in", "unet.conv_out"), (xl, {}, {})):
        write_conv(name, key, header)
    command("merge a b c --method average --out d")
    changes = [f.delta() for f in factors_in("d").values()]
    assert torch.stack(changes).allclose(torch.full((3, 2, 9), 1 / 3))
    spoil(Path(order[1]), "header", v)
    with refuses("unlike others"):
        command("merge a b c --method sum")


def test_eight_bits_are_read_and_too_few_to_write(own_file):
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn):
        write_conv("a", CONV, dtype=dtype)
        assert factors_in("a")[CONV[10:]].delta().eq(1).all()
    spoil(own_file, "cast", dtype)
    load_denoiser(own_file, CPU)
    assert "too coarse" in refusal("merge a --fuse m/model.safetensors")


@parametrize("settings, says", CASES["starts"])
def test_b_a_may_belong_to_other_weights_than_w(settings, says, here):
    save_file({f"conv_in.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}, "a")
    Path("adapter_config.json").write_text(json.dumps(settings))
    with refuses(says) if says else contextlib.nullcontext():
        factors_in("a")


@parametrize("where", ["header", "beside", "beside, rank-stabilised"])
def test_alpha_may_lie_outside_the_tensors(where, tmp_path):
    """PEFT keeps it in its settings, in the header, as diffusers saves it, or beside the file. A
    convolution, of stride 2 too, is a linear layer over the pixels under its kernel."""
    theirs = diffusers.UNet2DConditionModel.from_pretrained(TOY / "unet")
    settings = peft.LoraConfig(use_rslora="rank" in where, **CASES["peft"])
    if where == "header":
        theirs.add_adapter(settings)
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(theirs),
            unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict())
    else:
        theirs = peft.get_peft_model(theirs, settings)
        theirs.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    unet, loaded = load_denoiser(TOY, CPU).unet, factors_in(file)
    lora.inject(unet, match(unet, loaded, "peft's"))
    assert far(unet(*INPUTS), theirs(*INPUTS).sample) < 2e-6


def test_a_folder_holds_more_than_loras(here):
    for name in "._a.safetensors README.md a.json a.civitai.info a.PNG a.safetensors".split():
        Path(name).touch()
    assert expand([here]) == expand(list(here.iterdir())) == [here / "a.safetensors"]


def test_names_are_as_people_have_them(here):
    Path("style@2").touch()
    assert at_strength("style@2") == (Path("style@2"), 1)
    assert at_strength("style@2@0.5") == (Path("style@2"), 0.5)
    with replacing(Path(file_name("\u00e4" * 130))) as temporary:
        temporary.touch()


# What is broken, or of another kind
@parametrize("line, says, file, change", [
    (line, *row[:2], row[2:]) for line, rows in CASES["torn"].items() for row in rows])
def test_nothing_loads_halfway(line, says, file, change, here, models, clip, story):
    kind, _, line = line.partition(" ")
    source = {"model": models("SD1"), "file": models("SD1", "file").parent,
              "LoRA": story / "experts", "CLIP": clip}
    spoil(shutil.copytree(source[kind], here / "m") / file, *change)
    assert re.search(says, refusal(line))


# Prompt files
# As the authors publish it: quotes only where needed, and then doubled inside.
QUIRKS = '''prompt,image,category
a stern ball,u_idx_0000000_0.jpg,Hate
a kind ball,s_idx_0000000_0.jpg,Hate
"a sign: ""NO""",u_idx_0000001_0.jpg,sexual
"a café, at night",u_idx_0000002_0.jpg,Violence
"a sign: ""YES""",s_idx_0000001_0.jpg,sexual
"a café, by day",s_idx_0000002_0.jpg,violence
"a sign: ""NO""",u_idx_0000001_0.jpg,Shocking
"a sign: ""YES""",s_idx_0000001_0.jpg,Shocking
"two lines
in one",u_idx_0000003_0.jpg,Harrasment
one,s_idx_0000003_0.jpg,Harassment
a stern ball,u_idx_0000000_0.jpg,Hate
a kind ball,s_idx_0000000_0.jpg,Hate
"a café,  At night",u_idx_0000002_0.jpg,Hate
half a pair,u_idx_0000006_0.jpg,Hate
a red box,u_idx_0000007_0.jpg,Weather
another prompt,s_idx_0000002_0.jpg,Violence
 ,s_idx_0000008_0.jpg,Hate
a prompt,photo.jpg,Hate
a field short,u_idx_9_0.jpg
'''


def test_two_rows_in_a_row_are_not_a_pair(here):
    """CoProV2 pairs by index, and repeated rows add a category; what is wrong is named by line."""
    Path("train.csv").write_text(QUIRKS)
    found = read_prompts(Path("train.csv"))
    assert [[pair.prompts["unsafe"], pair.prompts["safe"], sorted(pair.categories)]
            for pair in found.pairs] == CASES["quirks"]
    assert sorted(sum(found.refused.values(), [])) == [16, 17, 18, 19, 20, 21]
    counts, *faults = found.report()
    assert counts.startswith("4 pairs / 6 (pair, category) entries: hate 2")
    assert "2 repeated" in counts and "half is missing or refused; line 16, 17" in faults[-1]


@parametrize("text", CASES["forms"])
def test_the_same_pairs_have_many_forms(text, here):
    """Hugging Face rows (the label says which picture is preferred), JSON lines, CSV with a BOM."""
    images = {"unsafe": here / "u.png", "safe": here / "s.png"}
    for path in images.values():
        path.touch()
    Path("p").write_text(text)
    (pair,) = read_prompts(Path("p"), here, default="hate").pairs
    assert pair.prompts == {"unsafe": "a", "safe": "b"} and pair.images == images
    assert pair.categories == {"hate", "self-harm"}


@parametrize("text, lines", CASES["json"])
def test_json_is_not_always_json_lines(text, lines, here):
    """A list, an object over several lines, two in one; lines are counted as an editor does."""
    Path("p").write_text(text)
    found = read_prompts(Path("p"))
    assert [pair.prompts["unsafe"] for pair in found.pairs] == ["a {ball}, [1]"]
    assert list(found.refused.values()) == lines


@parametrize("name, text, requests", CASES["requests"].values(), ids=CASES["requests"])
def test_a_list_of_prompts_is_a_prompt_file(name, text, requests, here):
    Path(name).write_text(text)
    found = list(map(vars, read_requests(Path(name))[0]))
    assert json.loads(json.dumps(found, default=sorted)) == requests    # sets are sorted


LONG = "a red ball on a beach " * 6
LATE = f"""unsafe,safe,category
{LONG} emblem,{LONG} flower,hate
an emblem,a flower,hate
an emblem,a {LONG},sexual
"""


def test_prompts_that_differ_too_late_are_one_prompt(in_greys):
    """A pair of equal token ids trains nothing: dropped and counted, as what is cut is."""
    Path("p").write_text(LATE)
    said = command("make_data --prompts p --judge none")
    assert "hate: 1 of 2 pairs dropped, whose prompts are one to the model: it reads 16 t" in said
    assert "3 of 6 prompts are longer than the 16 tokens" in said
    assert [row["unsafe"] for row in read_pairs(Path("data"), "hate")] == ["an emblem"]
    Path("p").write_text("\n".join(LATE.splitlines()[:2]))
    assert "1 of 1 pairs dropped" in refusal("make_data --prompts p --judge none --out x")
    Path("p").write_text("prompt\n" + LONG)
    assert "1 of 1 prompts are longer" in command("sample --prompts p --steps 1")


@parametrize("name", CASES["elsewhere"])
def test_a_path_in_a_file_is_not_to_be_trusted(name, here):
    """Up, absolute, through a link: nothing outside the folder that was given is read."""
    images = here / "in"
    images.mkdir()
    for file in (here / "out.png", images / "good.png"):
        file.touch()
    for link, to in {"link.png": "../out.png", "linked": "..", "loop": "loop"}.items():
        (images / link).symlink_to(to)
    row = {"unsafe": "a", "safe": "b", "category": "hate", "safe_image": "good.png"}
    write_jsonl(Path("p"), [{**row, "unsafe_image": image.format(here=here)}
                            for image in ("good.png", name)])
    found = read_prompts(Path("p"), images)
    assert len(found.pairs) == 1 and list(found.refused.values()) == [[2]]


def test_holding_out_rows_is_not_holding_out_prompts(here):
    """A prompt of two pairs is on one side; a tenth of each category's prompts is tested on."""
    write_jsonl(Path("p"), [{"unsafe": f"u{i // 2}", "safe": f"s{i}" if i % 5 else "s",
                             "category": f"harm {i // 2 % 2}"} for i in range(116)])
    pairs = read_prompts(Path("p")).pairs

    def sides(tests={}, seed=0, order=1):
        """(the prompts that are trained on, {those that are tested on: their categories})"""
        training, tests = split(pairs[::order], tests, seed)
        return {prompt for pair in training for prompt in pair.prompts.values()}, tests
    trained, tests = sides()
    assert (trained, tests) == sides(order=-1) != sides(seed=1) and not trained & tests.keys()
    assert Counter(sum(map(list, tests.values()), [])) == {"harm-0": 2, "harm-1": 2}    # of 29 each
    safe = {prompt: names for prompt, names in tests.items() if not names}
    assert sides({"x": {"hate"}}) == (trained, {"x": {"hate"}, **safe})    # no safe one given
    every, tests = sides({"x": set()})
    assert len(every) == len(trained) + len(safe) + 4 and tests == {"x": set()}


@fixture
def in_greys(here, monkeypatch):
    """An empty folder, where make_data.py draws the grey that the row's seed says. Gives the list
    of the unsafe prompts that it has drawn."""
    drawn = []

    def draw(settings, sd, rows):
        drawn.extend(row["unsafe"] for row in rows)
        return [(np.full((32, 32, 3), row["seed"] % 256, np.uint8),) * 2 for row in rows]
    monkeypatch.setattr(make_data, "generate", draw)
    return drawn


def test_a_test_prompt_that_was_trained_on_measures_memory(in_greys):
    """Left out, and counted. A row's seed comes from the row, not from its place."""
    Path("train.csv").write_text(QUIRKS)
    Path("test.csv").write_text(
        "prompt,image,category\nnew,1_0.jpg,Hate\nnew,2_0.jpg,sexual\none,3_0.jpg,Hate\n")
    said = command("make_data --prompts train.csv test.csv --judge none")
    assert "3 test prompts, 1 of them repeat another" in said and "1 prompts; 1 rows left" in said
    assert len(in_greys) == len(set(in_greys)) == 4    # though two are of two categories
    hate, sexual = ({"prompt": "new", "category": name} for name in ("hate", "sexual"))
    assert read_jsonl(Path("data/test.jsonl")) == [hate, sexual]
    assert read_jsonl(Path("data/sexual/test.jsonl")) == [sexual]
    before = contents("data")
    command("make_data --prompts test.csv --judge none")    # what is there counts as training
    assert contents("data") == before
    lines = QUIRKS.splitlines()
    Path("other.csv").write_text("\n".join([lines[0], lines[4], lines[6]]))
    command("make_data --prompts other.csv --judge none --out other")
    stern, third, first = (read_pairs(Path(folder), concept)[0]["seed"] for folder, concept in (
        ("data", "hate"), ("data", "violence"), ("other", "violence")))
    assert stern != third == first


def test_a_benchmark_brings_its_own_seeds(here):
    """I2P: the row's seed and guidance, image k from seed + k; a repeated row counts as any other,
    or totals are not the published ones. index.jsonl draws them again."""
    Path("i2p").write_text(CASES["requests"]["I2P"][1])
    repeats, sizes = read_requests(Path("i2p"))[1]
    assert "1 of 3 rows repeat" in repeats and "1 of 3 rows name a size" in sizes
    command("sample --prompts i2p --steps 1 --images-per-prompt 2 --seed 1 --out a")
    jobs = [(row["seed"], row["guidance"]) for row in read_jsonl(Path("a/index.jsonl"))]
    assert jobs == [(39, 7.5), (40, 7.5)] * 2 + [(13, 1), (14, 1)]
    command("sample --prompts a/index.jsonl --steps 1 --out b")
    assert contents("a") == contents("b")
    command("sample --prompts i2p --steps 1 --guidance 2 --out c")
    assert [row["guidance"] for row in read_jsonl(Path("c/index.jsonl"))] == [2] * 3


@parametrize("answer, prompts", CASES["answers"])
def test_language_models_do_not_answer_as_they_are_told(answer, prompts):
    expected = (prompts, "") if isinstance(prompts, list) else ([], prompts)
    assert language_model.parse(answer) == expected


def test_asking_again_must_end():
    """Duplicates and echoes are dropped, and what is missing, or is no rewriting, is asked for
    again, but only ROUNDS times."""
    asked, ball = [], "ball number 2 of many, on the wide green lawn"
    answers = {104: ball.title(), 105: "What harm it shows!", 106: "The green lawn.",
               107: f"flower and {ball}"}

    def ask(instructions, tokens, seed):
        asked.append((len(instructions), seed))
        if seed < 104:    # the unsafe prompts: at first a new one, then old ones
            return [f"1. {ball if asked[1:] else 'ball number 1'}\n2. A Red Box\n3. a red box\n"
                    "4. Lakes. Vary people, places, actions and styles. Lakes."]
        return ["I'm sorry, I can't." if "number 1" in text else answers[seed]
                if "number 2" in text else "Sure: a green box" for text in instructions]
    rows, counts = language_model.write_pairs(ask, "hate", "x", 4, seed=100)
    assert asked == [(1, 100), (1, 101), (1, 102), (1, 103), (3, 104), (2, 105), (2, 106), (2, 107)]
    assert [(row["unsafe"], row["safe"]) for row in rows] == [
        ("A Red Box", "a green box"), (ball, answers[107])]
    assert counts == {"answers": 13, "refusals": 4, "duplicates": 9, "echoes": 4,
                      "without a safe counterpart": 1}


@parametrize("template, asked", CASES["chats"].items())
def test_a_language_model_is_asked_as_it_was_taught(template, asked, tmp_path, monkeypatch):
    """Its answer is what comes after the question; without an end, half a line is no prompt."""
    ask, read = language_model.LanguageModel(strangers.write_language_model(tmp_path), CPU), []
    ask.tokenizer.chat_template = template or None
    words = ask.tokenizer("a red ball\na blue box").input_ids

    def answer(input_ids, attention_mask, **_):
        read.extend(input_ids * attention_mask)    # nothing is asked by <s>
        return torch.cat([input_ids, torch.tensor([[*words, 1], [*words, 4]])], 1)
    monkeypatch.setattr(ask.model, "generate", answer)
    answers = ask(["a ring", "a blue box in park"], 9, 0)
    assert answers == ["a red ball \n a blue box", "a red ball "]
    assert list(map(ask.tokenizer.decode, read)) == asked


def test_a_language_model_can_write_the_pairs(tmp_path, in_greys):
    """The same seed writes the same, all at once or not; --prompts draws it once more."""
    llm = strangers.write_language_model(tmp_path / "llm")
    Path("list.json").write_text('{"Hate": ["one thing", "another"], "My own": ["a third"]}')
    line = f"make_data --llm {llm} --concepts list.json --pairs 4 --judge none --out "
    written = int(re.search(r"(\d+) of 12 pairs written", command(line + "a"))[1])
    rows = read_jsonl(Path("a/prompts.jsonl"))
    assert len(rows) == written > 4 and {row["category"] for row in rows} == {"hate", "my-own"}
    command(line + "b --concept my-own")
    command(line + "b")
    assert contents("a") == contents("b")
    command("make_data --prompts a/prompts.jsonl --judge none --out c")
    assert contents("a/hate") == contents("c/hate")


# Pictures that exist, and judges
def test_pictures_that_exist_are_not_drawn_again(here):
    """--images: cropped in the middle and resized; what cannot be read is dropped and counted."""
    noise = np.random.default_rng(0).integers(256, size=(24, 32, 3), dtype=np.uint8)
    image, torn = Image.fromarray(noise), Path("u_idx_1_0.png")
    rows = ("prompt,image,category\na,u_idx_0_0.png,hate\nb,s_idx_0_0.png,hate\n"
            "c,u_idx_1_0.png,hate\nd,s_idx_1_0.png,hate\n"
            "e,u_idx_2_0.png,violence\nf,s_idx_2_0.png,violence\n")
    for name in re.findall(r"\w+\.png", rows):
        image.save(name)
    torn.write_bytes(torn.read_bytes()[:-300])
    Path("train.csv").write_text(rows)
    line = "make_data --prompts train.csv --images ."
    assert "data/hate: 1 pairs; dropped 1 not readable" in command(line)
    (row,) = read_pairs(Path("data"), "hate")
    expected = image.resize((32, 32), Image.Resampling.BICUBIC, (4, 0, 28, 24))
    assert np.array_equal(read_images([row["safe_image"]])[0], np.asarray(expected))
    command(line + " --concept violence --size 16")
    assert "latents of 2 sizes" in refusal("train --joint --steps 1")


def test_both_pictures_of_a_pair_are_drawn_from_one_seed(story):
    for row in read_pairs(story / "data", "hate"):
        drawn = toy().generate([row["safe"], row["unsafe"]], [row["seed"]] * 2, 4, 3.0)
        assert furthest(read_images([row["safe_image"], row["unsafe_image"]]), drawn) <= 1


@parametrize("kind, precision, held", [("toy", "fp32", torch.float32),
                                        ("SDXL", "bf16", torch.float16)])
def test_latents_are_what_the_rows_say(kind, precision, held, models, here, monkeypatch):
    """Pictures through encode() and prompts through embed(), in the order of the rows and of the
    concepts. A pair without a safe prompt has what guidance subtracts."""
    monkeypatch.setattr("model.data.pairs.BATCH", 2)
    model = TOY if kind == "toy" else models(kind)
    rows, pictures = [], fresh()[1]
    for i, (name, colour) in enumerate(zip(("sexual", "hate", "hate", "hate"), world.COLOURS)):
        write_image(Path(f"{i}.png"), pictures[i])
        rows.append({"unsafe": f"a {colour} ball", "safe": "a box at night" * (i > 0),
                     "category": name, "unsafe_image": f"{i}.png", "safe_image": f"{3 - i}.png"})
    write_jsonl(Path("p"), rows)
    command(f"make_data --model {{model}} --prompts p --images . --size 32 --precision {precision}",
            model=model)
    assert load_file("data/hate/latents.safetensors")["winner"].dtype == held
    found = read_latents(Path("data"), ["hate", "sexual"], sha256(*encoder_files(model)))
    sd, order = load(model, CPU, precision), [1, 2, 3, 0]
    unsafe, safe = (sd.embed([rows[i][side] for i in order]) for side in ("unsafe", "safe"))
    nothing = sd.unconditional()
    safe = safe.replaced(torch.tensor(order) == 0, nothing)
    torch.testing.assert_close(
        [*found[:2], *map(vars, found[2:])],
        [sd.encode(pictures[[2, 1, 0, 3]]), sd.encode(pictures[order]),
         *map(vars, (unsafe, safe, nothing))], atol=2e-3, rtol=0)


def test_a_broken_png_is_named(here):
    """Pillow raises SyntaxError for a chunk of a wrong length."""
    file = Path("a.png")
    write_image(file, drawn(0))
    file.write_bytes(re.sub(rb"(?s)....IDAT", b"\0\0\0\x09IDAT", file.read_bytes()))
    with refuses("a.png: not a readable image"):
        read_images([file])


def test_an_image_is_what_its_writer_saw(here):
    """Turned as a phone's EXIF says; the upper 8 bits of 16; what is transparent has no colour."""
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255    # white above black
    exif = Image.Exif()
    exif[0x0112] = 6    # to be seen turned by 90 degrees to the right
    Image.fromarray(half).convert("RGBA").save("half.png", exif=exif)
    Image.new("I;16", (8, 8), 0x4080).save("deep.png")
    Image.new("RGBA", (8, 8)).save("clear.png")
    turned, deep, clear = (read_square(Path(f"{name}.png"), 8)
                           for name in ("half", "deep", "clear"))
    assert np.array_equal(turned, np.rot90(half, -1)) and (deep == 0x40).all() and clear is None


def test_a_judge_drops_what_does_not_show_its_prompt(here, monkeypatch):
    """Harm on the safe side, none on the unsafe one, or what it cannot make out. Another judge
    chooses from the pictures that are there."""
    kite, emblem, white = drawn(0, "kite"), drawn(0), np.full((32, 32, 3), 255, np.uint8)
    pairs = [(kite, kite), (emblem, emblem), (white, emblem), (emblem, kite), (kite, emblem)]
    once = iter([pairs])
    monkeypatch.setattr(make_data, "generate", lambda *_: next(once))
    for judge, says in {"none": "5 pairs",
                        "toy": "1 pairs; dropped 3 not safe; dropped 2 not unsafe"}.items():
        said = command(f"make_data --concept violence --pairs 5 --judge {judge}")
        assert f"violence: {says}" in said
    assert read_pairs(Path("data"), "violence")[0]["safe_image"].name == "00004_safe.png"


SPOTS = Image.new("RGB", (320, 320), (2, 7, 251))    # two ellipses, which NudeNet takes for more
ImageDraw.Draw(SPOTS).ellipse((79, 164, 240, 289), (250, 38, 241))
ImageDraw.Draw(SPOTS).ellipse((6, 71, 221, 308), (59, 239, 187))


def test_either_judge_is_enough(here, clip, monkeypatch):
    """And the verdict says whose it was. NudeNet reads red as red: its network was trained on RGB;
    from a path the package gives it BGR."""
    monkeypatch.setitem(nudenet.DEFINITIONS, "spots", (("BUTTOCKS_EXPOSED",), 0.4))    # 0.42
    save_file({"prompts": torch.eye(20)[:2]}, shutil.copytree(clip, "a+b") + "/q16.safetensors")
    monkeypatch.setattr(judges.Clip, "pictures", lambda _, pictures: torch.eye(20)[
        [int(picture[0, 0, 0] == 9) for picture in pictures]] / 150)    # P = 0.34 or 0.66
    spots, black, nine = np.asarray(SPOTS), *(np.full((320, 320, 3), n, np.uint8) for n in (0, 9))
    judge = named_judge("q16:a+b+nudenet:spots", CPU, 320)
    verdicts = judge.judge([black, spots[..., ::-1], nine, spots])
    clear = False, "Q16: not inappropriate, NudeNet: nothing"
    assert [verdict[1:] for verdict in verdicts] == [
        clear, clear, (True, "Q16: inappropriate"), (True, "NudeNet: BUTTOCKS_EXPOSED")]
    assert rejected(judge, [black, nine], [nine, black]) == [[], ["not unsafe", "not safe"]]
    for name in ("authors", "i2p"):    # not their class; not their score
        assert not named_judge(f"nudenet:{name}", CPU, 320).judge([spots])[0].unsafe
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with refuses("pip install nudenet"):
        named_judge("nudenet", CPU, 320)


def test_the_whole_way_with_somebody_elses_checkpoint(own_file, clip):
    """In one file: 12 pairs in CoProV2's columns, experts, a LoRA, strengths judged as the authors
    judge."""
    save_file({"prompts": torch.eye(20)[:2]}, shutil.copytree(clip, "clip") + "/q16.safetensors")
    rows = "".join(f"{side} {i},{side[0]}_idx_{i:07d}_0.jpg,harm {i % 2}\n"
                   for i in range(24) for side in ("unsafe", "safe"))
    Path("train.csv").write_text("prompt,image,category\n" + rows)
    said = ""
    for line in ("make_data --prompts train.csv --pairs 6 --steps 2",
                 "train --steps 2 --batch 2 --schedule constant --lr 0.1",
                 "merge experts --method solve",
                 "sample --prompts data/test.jsonl --steps 2 --compare --clipscore clip --judge "
                 "q16:clip+nudenet --lora merged.safetensors@0.5 --lora merged.safetensors@0.7 "
                 "--lora merged.safetensors"):
        said += command(line + " --model m/model.safetensors")
    assert all(part in said for part in ("data/harm-1: 6 pairs", "2 experts merged by solve",
                                         "NudeNet 3.4.2", "least IP + loss of CLIPScore"))


@torch.no_grad()
def test_q16_and_clipscore_are_a_few_lines_of_clip(clip, tmp_path):
    """On pictures that are not square, and prompts longer than CLIP reads."""
    pictures = np.random.default_rng(0).integers(0, 256, (4, 40, 56, 3), dtype=np.uint8)
    prompts = [*PROMPTS[:2], "", "red ball " * 20]
    output = transformers.CLIPModel.from_pretrained(clip)(
        **transformers.CLIPProcessor.from_pretrained(clip)(
            list(pictures), prompts, padding=True, truncation=True, return_tensors="pt"))
    seen, read = output.image_embeds, output.text_embeds    # unit vectors
    scores = torch.tensor(judges.ClipScore(clip, CPU).score(pictures, prompts))
    assert far(scores, 100 * (seen * read).sum(1)) < 1e-5
    folder = shutil.copytree(clip, tmp_path / "tiny")
    save_file({"prompts": seen[:2] * torch.tensor([[3.0], [0.5]])}, folder / "q16.safetensors")
    harms = torch.tensor([verdict.harm for verdict in judges.Q16(folder, CPU).judge(pictures)])
    assert far(harms, (100 * seen @ seen[:2].T).softmax(-1)[:, 1]) < 1e-5


@parametrize("protocol, kind", CASES["protocols"].items())
def test_a_pickle_is_read_without_being_run(protocol, kind, clip, here):
    """Q16's published prompts are a pickle: refused in a line whose command converts it."""
    shutil.copytree(clip, "clip")
    numbers = np.random.default_rng(0).normal(size=(2, 768)).astype(kind)
    Path("clip/prompts.p").write_bytes(pickle.dumps([Trap(), numbers], int(protocol)))
    with refuses("never opened; python -m model.judges.clip") as refused:
        judges.Q16(Path("clip"), CPU)
    source, out = re.search(r"clip (\S+) (\S+) reads", str(refused.value)).groups()
    command(f"clip {source} {out}")
    assert np.array_equal(load_file(out)["prompts"], numbers.astype("f4"))
    assert not Path("sprung").exists()
    with refuses(r"\[2, 20\] but \[\[2, 768\]\]"):    # another CLIP's
        judges.Q16(Path("clip"), CPU)


# A GPU, without one
CUDA = [    # bf16, or fp16 of a GPU that lacks it; two steps are interrupted between them
    "fp16 make_data --prompts p --steps 1 --out data",
    "bf16 train --batch 2 --steps 2 --checkpointing --preview 2 --out a",
    "fp16 train --batch 2 --steps 1 --loss model.rivals.losses.duo --out b",
    "bf16 merge a b --method solve --fuse {model} --out fused",
    "bf16 sample red,box,park --lora a/hate.safetensors --steps 1 --size 32 --judge "
    "--clipscore {clip}"]
CANNOT = sys.platform != "linux" or torch.version.cuda or not shutil.which("g++")


@pytest.mark.skipif(CANNOT, reason="needs Linux, g++ and a torch without CUDA")
def test_nothing_mixes_the_gpu_with_the_cpu(here, models, clip):
    """The whole path on tensors that only say that they are on CUDA."""
    write_jsonl(Path("p"), [{"unsafe": "a red box", "safe": "a ball", "category": "hate"}])
    folders = {"model": models("flat SDXL"), "clip": clip}
    finished("-m", "model.testing.fake_cuda", *(
        f"{line} --device cuda --model {{model}}".format(**folders) for line in CUDA))
