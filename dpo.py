"""The preference losses. Each is one flat function, in the order of its equation.

What it is:  diffusion_dpo() (Wallace et al. 2023, 2311.12908); both_prompts(), the same twice; and
             safety_dpo(), the default, which is the one to read. Needs torch.
Gives:       LOSSES, by the names of train.py --loss. For losses of your own Batch and mse(): --loss
             takes dotted names too, such as those in model/rivals/losses.py.

The idea: under the UNSAFE prompt the SAFE image is preferred. The winner w of a pair is the safe
image and the loser l the unsafe one, and the UNet is asked about both under the unsafe prompt.

A loss is a function (policy, reference, batch, schedule, beta) -> (loss [], metrics); or a class,
which train.py first calls with all pairs (model/data/pairs.py), whose objects are such functions.
    policy      (x_t [N, C, H, W], t [N], N prompts) -> what the UNet predicts there, [N, C, H, W]
                fp32, with the LoRA on and with gradients
    reference   the same UNet with the LoRA off and without gradients
    schedule    of model/schedule.py; noised() gives x_t and the target there, noise or v
    metrics     {name: fp32 [B] or []}, whose means are the log; preference is plotted. In a healthy
                run winner stays below winner_ref, and loser rises above loser_ref. margin is above
                0 where the policy prefers the winner more than the reference; accuracy: how often

Letters: B pairs of a batch, N latents of a call, C H W a latent's shape; w winner, l loser, L an
error. Numbers (1) to (4) are the README's equations. "Ours": from no paper.
"""
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Batch(NamedTuple):
    """Some pairs, and all that is random about them: drawn ONCE for each pair, so that winner and
    loser differ in their content alone."""
    winner: torch.Tensor    # [B, C, H, W] x_0 of the safe image
    loser: torch.Tensor     # [B, C, H, W] x_0 of the unsafe image
    noise: torch.Tensor     # [B, C, H, W]
    t: torch.Tensor         # [B]
    unsafe: Any             # B prompts (Prompt of model/text.py), of the unsafe images
    safe: Any               # B prompts, of the safe images
    empty: Any              # B times the empty prompt, for losses that ask about it


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L (README, eq. 2): [B, C, H, W] twice -> [B], the MEAN over elements, as the published beta
    of 5000 assumes. In fp32, because beta multiplies a small difference of these: rounding
    an error of 0.1 to fp16 moves the logit by up to 0.08 at beta 5000."""
    return (output.float() - target.float()).square().flatten(1).mean(1)


def diffusion_dpo(policy, reference, batch: Batch, schedule, beta: float):
    """The published loss (README, eq. 3), all of it under the unsafe prompt:

        loss = mean over pairs of -log sigmoid( -beta/2 [ (L_w - L_l) - (L_w - L_l)_reference ] )

    It is ln 2 = 0.693 at the start, where policy and reference agree. It rewards a GAP, so nothing
    stops both errors from rising together: watch `winner`. How to choose beta: the reference
    predicts the unsafe image better than the safe one, by delta = (L_w - L_l)_reference. A policy
    that predicts both equally well has the logit beta delta / 2. Where beta is far above 2 / delta,
    the sigmoid is flat long before that, and training stops pulling."""
    x_w, target_w = schedule.noised(batch.winner, batch.noise, batch.t)
    x_l, target_l = schedule.noised(batch.loser, batch.noise, batch.t)
    x_t, t = torch.cat([x_w, x_l]), batch.t.repeat(2)
    prompt = batch.unsafe.followed_by(batch.unsafe)

    out_w, out_l = policy(x_t, t, prompt).chunk(2)
    ref_w, ref_l = reference(x_t, t, prompt).chunk(2)

    L_w, L_l = mse(out_w, target_w), mse(out_l, target_l)
    L_w_ref, L_l_ref = mse(ref_w, target_w), mse(ref_l, target_l)
    gap, gap_ref = L_w - L_l, L_w_ref - L_l_ref
    preference = -F.logsigmoid(-beta / 2 * (gap - gap_ref)).mean()
    return preference, {"preference": preference, "accuracy": (gap < gap_ref).float(),
                        "margin": gap_ref - gap, "winner": L_w, "winner_ref": L_w_ref,
                        "loser": L_l, "loser_ref": L_l_ref}


def both_prompts(policy, reference, batch: Batch, schedule, beta: float):
    """diffusion_dpo() under the unsafe prompt, and again under the safe one, with the safe image as
    the winner of both: how SafetyDPO was most likely trained, since its released data has one row
    for each image with that image's own prompt [our reconstruction]."""
    first, metrics = diffusion_dpo(policy, reference, batch, schedule, beta)
    again, _ = diffusion_dpo(policy, reference, batch._replace(unsafe=batch.safe), schedule, beta)
    return (first + again) / 2, metrics


def safety_dpo(policy, reference, batch: Batch, schedule, beta: float):
    """The default [ours; README, eq. 4]: Diffusion-DPO, and a penalty on what changes under safe
    prompts.

        loss = diffusion_dpo + beta drift
        drift = mean |policy - reference|^2, on the winner under the SAFE prompt

    Times beta, as the first term's gradient is at first: beta leaves their balance as it is."""
    x_w, target_w = schedule.noised(batch.winner, batch.noise, batch.t)    # (1) the same noise and
    x_l, target_l = schedule.noised(batch.loser, batch.noise, batch.t)     # t for both of a pair
    x_t, t = torch.cat([x_w, x_l, x_w]), batch.t.repeat(3)
    prompt = batch.unsafe.followed_by(batch.unsafe, batch.safe)

    out_w, out_l, out_safe = policy(x_t, t, prompt).chunk(3)
    ref_w, ref_l, ref_safe = reference(x_t, t, prompt).chunk(3)

    L_w, L_l = mse(out_w, target_w), mse(out_l, target_l)                  # (2) [B]
    L_w_ref, L_l_ref = mse(ref_w, target_w), mse(ref_l, target_l)
    gap, gap_ref = L_w - L_l, L_w_ref - L_l_ref
    preference = -F.logsigmoid(-beta / 2 * (gap - gap_ref)).mean()         # (3)
    drift = mse(out_safe, ref_safe).mean()
    loss = preference + beta * drift                                       # (4)
    return loss, {"preference": preference, "drift": drift, "accuracy": (gap < gap_ref).float(),
                  "margin": gap_ref - gap, "winner": L_w, "winner_ref": L_w_ref,
                  "loser": L_l, "loser_ref": L_l_ref}


LOSSES = {"safety": safety_dpo, "dpo": diffusion_dpo, "both": both_prompts,
          "sft": "model.rivals.losses.fine_tuning"}
