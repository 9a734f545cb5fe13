"""Tests of model/lab's rivals, to be moved to test_all.py."""
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.pipelines.deprecated import stable_diffusion_safe

import train
from model.judges.toy import ToyJudge
from model.lab import editing, guards, losses, rivals, steering
from model.stable_diffusion import load
from model.tools import processes
from model.tools.files import read_json, write_jsonl
from model.tools.training import generator
from model.toy import TOY, world
from test_all import CPU, far, pipe, random_pairs

torch.set_num_threads(1)
PROMPTS, SEEDS = ["a red ball with racism in the park", "a blue box on the beach"], [3, 4]


@pytest.fixture(autouse=True)
def no_workers(monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 1)


@cache
def toy():
    return load(TOY, CPU)


def text_pairs(count: int = 6) -> list[dict]:
    return [{"unsafe": unsafe, "safe": safe} for category in world.CATEGORIES
            for unsafe, safe in world.training_pairs(category, count, 0)]


@pytest.fixture
def with_pairs(monkeypatch):
    for module in (steering, guards, editing):
        monkeypatch.setattr(module, "all_pairs", lambda data: text_pairs())


@pytest.mark.parametrize("name", steering.PRESETS)
def test_safe_guidance_is_not_a_negative_prompt(name):
    """diffusers' own pipeline, whose warm-up counts steps."""
    preset, steps = steering.PRESETS[name], steering.STEPS
    parts = {**pipe().components,
             "scheduler": DPMSolverMultistepScheduler.from_config(pipe().scheduler.config)}
    theirs = stable_diffusion_safe.StableDiffusionPipelineSafe(**parts,
                                                               requires_safety_checker=False)
    theirs.safety_concept = steering.SAFETY
    theirs.set_progress_bar_config(disable=True)
    noise = toy().noise(SEEDS, 32)
    wanted = theirs(PROMPTS, latents=noise, num_inference_steps=steps, output_type="np",
                    guidance_scale=steering.GUIDANCE, sld_guidance_scale=preset.scale,
                    sld_warmup_steps=-(-preset.warm_up * steps // 50), height=32, width=32,
                    sld_threshold=preset.threshold, sld_momentum_scale=preset.momentum,
                    sld_mom_beta=preset.memory).images
    found = steering.safe_latent_diffusion(toy(), Path(), 0, name)(PROMPTS, SEEDS)
    assert abs(found - 255.0 * wanted).max() < 1


def test_a_second_stream_of_no_weight_changes_nothing(with_pairs):
    draw = steering.dual_latents(toy(), Path(), 0, 0.0)
    assert np.array_equal(draw(PROMPTS, SEEDS), steering.plain(toy())(PROMPTS, SEEDS))
    other = steering.dual_latents(toy(), Path(), 0, 1.0)(PROMPTS, SEEDS)
    assert (other[0] != draw(PROMPTS, SEEDS)[0]).any()


def test_a_safe_embedding_is_least_squares():
    pairs = text_pairs(12)
    maps = steering.safe_states(toy(), pairs)
    unsafe, safe = (toy().embed([pair[kind] for pair in pairs]).double()
                    for kind in ("unsafe", "safe"))
    for place in (0, 5, 15):
        x, y = torch.cat([unsafe, safe])[:, place], torch.cat([safe, safe])[:, place]
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        small = steering.RIDGE ** 0.5 * torch.eye(97).double()
        wanted = torch.linalg.lstsq(torch.cat([x, small]),
                                    torch.cat([y, torch.zeros(97, 96).double()])).solution
        assert far(maps[place], wanted) < 1e-6


def test_a_refusal_is_not_a_picture_of_harm():
    """Which is not true of every grey: the judge takes 128 for an inverted picture."""
    grey, = ToyJudge.load(TOY / "judge").judge(np.full((1, 32, 32, 3), guards.GREY, np.uint8))
    assert grey.harm < 0.01 and grey.category is grey.object is grey.background is None
    draw = guards.refusing(toy(), lambda prompts: [False, True])
    first, second = draw(PROMPTS, SEEDS)
    assert (first == guards.GREY).all()
    assert np.array_equal(second, steering.plain(toy())(PROMPTS[1:], SEEDS[1:])[0])


def test_a_guard_is_taught_by_contrast():
    unsafe, safe = torch.randn(2, 4, 4, generator=generator("guard")).double()
    total = 0.0
    for i in range(4):
        own = unsafe[i, i].exp()
        of_prompt = unsafe[i].exp().sum() + sum(row.max().exp() for row in safe)
        of_concept = unsafe[:, i].exp().sum() + safe[:, i].exp().sum()
        total -= (own / of_prompt).log() + (own / of_concept).log()
    assert guards.contrast(unsafe, safe).item() == pytest.approx(total.item() / 4)


def test_a_list_may_name_what_no_training_showed():
    mapping = guards.train_mapping(toy(), text_pairs(8), 0, steps=60)
    scenes = [world.Scene("park", "red", "ball", word) for word in world.CATEGORY_OF]
    held_out = [scene for scene in scenes
                if scene.extra == world.held_out_word(scene.category)]
    texts = [world.prompt(scene) for scene in held_out]
    safe = [world.prompt(replace(scene, colour=colour, extra=extra)) for scene in held_out[:1]
            for colour in world.COLOURS for extra in world.ACCESSORIES]
    without, listed = (guards.scores_of(toy(), mapping, words, texts)
                       for words in (guards.SEEN, guards.ALL))
    assert (listed >= without).all() and listed.mean() > without.mean() + 0.05
    assert guards.auc(listed, guards.scores_of(toy(), mapping, guards.ALL, safe)) > 0.95


def test_an_area_under_a_curve_is_a_share_of_pairs():
    unsafe, safe = torch.tensor([3.0, 2.0, 2.0, 5.0]), torch.tensor([1.0, 2.0, 4.0])
    wins = np.mean([(u > s) + 0.5 * (u == s) for u in unsafe.tolist() for s in safe.tolist()])
    assert guards.auc(unsafe, safe) == pytest.approx(wins)
    assert guards.roc(unsafe, safe)[[0, -1]].tolist() == [[0, 0], [1, 1]]


def test_what_a_text_encoder_says_can_be_read_back():
    texts = [pair["unsafe"] for pair in text_pairs(2)]
    reader = guards.train_reader(toy(), texts, 0, steps=100, batch=14)
    read = guards.reading(toy(), reader, texts)
    assert [text.replace(" ,", ",") for text in read] == texts
    assert all(guards.says(text, guards.SEEN) for text in read)
    assert guards.likeness("a red ball", "A red box") == pytest.approx(2 / 3)
    assert guards.likeness(texts[0], read[0]) == pytest.approx(1) and not guards.likeness("a", "")


def test_a_word_inside_a_word_is_left_alone():
    assert guards.rewritten("War in the park", ["war"]) == "a flower in the park"
    assert guards.rewritten("towards a warm box", ["war"]) == "towards a warm box"
    assert not guards.says("towards the riots", ["war", "riot"]) and guards.says("War!", ["war"])


def test_an_edit_of_weights_is_least_squares():
    W, old, new, kept = torch.randn(15, 8, generator=generator("edit")).double().split([5, 3, 3, 4])
    scales = [scale ** 0.5 for scale in (2.0, 0.3, 0.7)]    # erase, preserve, ridge
    x = torch.cat([s * c for s, c in zip(scales, (old, kept, torch.eye(8).double()))])
    y = torch.cat([s * c @ W.T for s, c in zip(scales, (new, kept, torch.eye(8).double()))])
    wanted = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0].T
    assert far(editing.edited(W, old, new, kept, 2.0, 0.3, 0.7), torch.tensor(wanted)) < 1e-9
    exact = editing.edited(W, old, new, kept, 1.0, 1.0, 1e-9)
    assert far(old @ exact.T, new @ W.T) < 1e-5 and far(kept @ exact.T, kept @ W.T) < 1e-5


def test_an_edited_word_reads_as_another(with_pairs):
    sd = load(TOY, CPU)
    layer = sd.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_v")
    (word,), (guide,) = (editing.last_words(sd, [text]) for text in ("racism", editing.GUIDE))
    before, wanted = layer(word[0]), layer(guide[0])
    editing.uce(sd, Path(), 0, 1.0)
    assert far(layer(word[0]), wanted) < far(before, wanted) / 3


def test_erasing_is_negative_guidance_learned(monkeypatch):
    concept, without = torch.randn(2, 2, 4, 8, 8, generator=generator("erase"))
    assert far(editing.erase_target(concept, without), 2 * without - concept) < 1e-6
    sd, wanted = load(TOY, CPU), []
    monkeypatch.setattr(editing.F, "mse_loss",
                        lambda output, target: wanted.append((output, target)) or output.mean())
    before = {name: p.clone() for name, p in sd.unet.named_parameters()}
    editing.esd(sd, Path(), 0, 1)
    changed = [name for name, p in sd.unet.named_parameters() if not torch.equal(p, before[name])]
    assert changed and all(".attn2." in name for name in changed)
    assert wanted[0][0].requires_grad and not wanted[0][1].requires_grad


def test_a_cost_asks_for_a_wider_gap():
    """SC-DPO: the policy is content only when its margin exceeds what the harm costs."""
    w, l, w_ref, l_ref, cost = torch.rand(5, 6, generator=generator("cost")).double()
    p = torch.sigmoid(-3.0 / 2 * ((w - w_ref) - (l - l_ref)) - losses.COST * cost)
    loss, _ = losses.safety_constrained_dpo(w, l, w_ref, l_ref, cost, 3.0)
    assert loss.item() == pytest.approx((-(1 - p) ** 2 * p.log()).mean().item())
    a, b = torch.randn(2, 6, generator=generator("costs")).double()
    by_hand = -(torch.sigmoid(a - b) * torch.sigmoid(a) * torch.sigmoid(-b)).log().mean()
    assert losses.cost_loss(a, b).item() == pytest.approx(by_hand.item())


def test_a_cost_is_of_its_own_pair(monkeypatch):
    tensors = random_pairs("hate")
    tensors["loser"][:3] += 3    # three losers are easy to tell
    own = losses.cost_model(tensors, steps=40)
    assert (own(tensors["loser"][:3]) > own(tensors["winner"]).max()).all()
    given = []
    noted = losses.sc_dpo._replace(
        function=lambda *inputs: given.append(inputs[-1]) or losses.with_cost(*inputs),
        of_pairs=lambda tensors: torch.arange(float(len(tensors["winner"]))))
    monkeypatch.setattr(losses, "sc_dpo", noted)
    args = train.parse_arguments("--loss model.lab.losses.sc_dpo --batch 4".split())
    alone = train.Trainer(args, CPU, "hate", tensors)
    row = alone.take_step(0, 10)
    assert given[0].tolist() == train.pairs_of_step(6, 4, 0, *alone.seed).tolist()
    assert row["preference"] == pytest.approx(np.log(2), abs=1e-5)


def test_a_table_of_rivals_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    black = lambda sd, data, seed, knob: lambda prompts, seeds: np.full(
        (len(prompts), 32, 32, 3), knob, np.uint8)
    monkeypatch.setattr(rivals, "RIVALS", {
        "base": rivals.RIVALS["base"], "flat": rivals.Rival("nothing", (128, 64), black)})
    flower = "a red ball with a flower in the park"
    rows = [{"prompt": prompt, "category": None} for prompt in (*PROMPTS, "", "", flower, flower)]
    for seed in (5, 6):
        write_jsonl(tmp_path / f"seed{seed}/data/test.jsonl", rows)
    command = rivals.parse_arguments(f"--seeds 5 --tune 6 --out {tmp_path}".split())
    command.only = ["base", "flat"]
    rivals.main(command)
    printed = capsys.readouterr().out
    assert "| flat (64) | 0.0 |" in printed and "| base | 100.0 |" in printed
    assert "flat needs: nothing" in printed
    monkeypatch.setattr(rivals, "perform", None)
    rivals.main(command)
    assert capsys.readouterr().out == printed
    judged = read_json(tmp_path / "seed6/rivals/flat-128/judge.json")
    assert judged["columns"]["flat"]["all: IP seen"]["total"] == 1
