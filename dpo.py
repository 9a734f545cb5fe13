"""The preference losses. Each is one flat function, in the order of its equation.

What it is:  Diffusion-DPO (Wallace et al. 2023, 2311.12908), the loss that this project trains its
             experts with, and the baseline that a preference has to beat.
Needs:       torch.
Gives:       diffusion_dpo(), safety_dpo(), fine_tuning(); LOSSES, by the names of train.py --loss;
             Batch, mse(), metrics_of() for losses of your own, which train.py takes by their dotted
             name, as it takes those of model/rivals/losses.py.

A loss is a function (policy, reference, batch, schedule, beta) -> (loss [], metrics):
    policy, reference   functions (x_t [N, C, H, W], t [N], N prompts) -> what the UNet predicts
                        there, [N, C, H, W] fp32: with its LoRA on, with gradients; and off, without
    schedule            of model/schedule.py; noised() gives x_t and what is to be predicted there
    metrics             {name: number [], detached}: what the log says of the step
A loss that has to see all pairs before the first step is a class: it is made with the pairs
(model/data/pairs.py), and then called like the others.

Letters: B pairs, C H W a latent's shape; of a pair: w the winner, l the loser.
"""
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

KEEP = 8.0    # weight of the second term in fine_tuning() [ours, chosen on seed 100]


class Batch(NamedTuple):
    """Some pairs, and all that is random about them: drawn ONCE for each pair, so that winner and
    loser differ in their content alone."""
    winner: torch.Tensor    # [B, C, H, W] x_0 of the safe image
    loser: torch.Tensor     # [B, C, H, W] x_0 of the unsafe image
    noise: torch.Tensor     # [B, C, H, W]
    t: torch.Tensor         # [B]
    unsafe: Any             # B prompts (model/text.py), of the unsafe images
    safe: Any               # B prompts, of the safe images; a quarter of them is the empty one
    empty: Any              # B times the empty prompt


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L (README, eq. 2): [B, C, H, W] twice -> [B], the MEAN over elements, in fp32 always.

    fp32 because beta multiplies a small difference of these: rounding an error of 0.1 to fp16 moves
    the logit by 0.08 at beta 5000. Mean, not sum: a published beta goes with one of the two.
    """
    return (output.float() - target.float()).square().flatten(1).mean(1)


def metrics_of(winner, loser, winner_ref, loser_ref, **more) -> dict[str, torch.Tensor]:
    """The means over the pairs of errors [B] and of more. margin: the error gap that the policy has
    won over the reference. accuracy: the share of pairs with a margin above 0. Healthy is winner <=
    winner_ref and loser > loser_ref."""
    margin = (winner_ref - loser_ref) - (winner - loser)
    values = {**more, "accuracy": (margin > 0).float(), "margin": margin, "winner": winner,
              "winner_ref": winner_ref, "loser": loser, "loser_ref": loser_ref}
    return {name: value.mean().detach() for name, value in values.items()}


def diffusion_dpo(policy, reference, batch: Batch, schedule, beta: float):
    """The published loss (README, eq. 3):

        loss = -log sigmoid( -beta/2 [ (L_w - L_l)_policy - (L_w - L_l)_reference ] ),
               averaged AFTER the log-sigmoid

    ln 2 = 0.693 at the start, where policy and reference agree. It rewards a GAP, so nothing stops
    both errors from rising together: watch `winner`. beta: the reference is better at the loser,
    its own image, by delta = L_w - L_l. Where the policy is as good at both, the logit is
    beta delta / 2. With beta far above 2 / delta the sigmoid is flat before that: nothing pulls.
    """
    x_w, target_w = schedule.noised(batch.winner, batch.noise, batch.t)
    x_l, target_l = schedule.noised(batch.loser, batch.noise, batch.t)
    x_t, t = torch.cat([x_w, x_l]), batch.t.repeat(2)
    prompt = batch.unsafe.followed_by(batch.unsafe)

    out_w, out_l = policy(x_t, t, prompt).chunk(2)
    ref_w, ref_l = reference(x_t, t, prompt).chunk(2)

    winner, loser = mse(out_w, target_w), mse(out_l, target_l)
    winner_ref, loser_ref = mse(ref_w, target_w), mse(ref_l, target_l)
    gap, gap_ref = winner - loser, winner_ref - loser_ref
    preference = -F.logsigmoid(-beta / 2 * (gap - gap_ref)).mean()
    return preference, metrics_of(winner, loser, winner_ref, loser_ref, preference=preference)


def safety_dpo(policy, reference, batch: Batch, schedule, beta: float):
    """The default [ours; README, eq. 4]: Diffusion-DPO, and safe prompts keep what they gave.

        loss = -log sigmoid( -beta/2 [ (L_w - L_l)_policy - (L_w - L_l)_reference ] ) + beta drift

    drift: mean squared difference of policy and reference on the winner under the SAFE prompt.
    Times beta, as the gradient of the first term has it.
    """
    x_w, target_w = schedule.noised(batch.winner, batch.noise, batch.t)    # (1) ONE noise, ONE t
    x_l, target_l = schedule.noised(batch.loser, batch.noise, batch.t)
    x_t, t = torch.cat([x_w, x_l, x_w]), batch.t.repeat(3)
    prompt = batch.unsafe.followed_by(batch.unsafe, batch.safe)

    out_w, out_l, out_safe = policy(x_t, t, prompt).chunk(3)
    ref_w, ref_l, ref_safe = reference(x_t, t, prompt).chunk(3)

    winner, loser = mse(out_w, target_w), mse(out_l, target_l)             # (2) [B]
    winner_ref, loser_ref = mse(ref_w, target_w), mse(ref_l, target_l)
    gap, gap_ref = winner - loser, winner_ref - loser_ref
    preference = -F.logsigmoid(-beta / 2 * (gap - gap_ref)).mean()         # (3)
    drift = mse(out_safe, ref_safe).mean()
    return preference + beta * drift, metrics_of(                          # (4)
        winner, loser, winner_ref, loser_ref, preference=preference, drift=drift)


def fine_tuning(policy, reference, batch: Batch, schedule, beta: float):
    """Supervised fine-tuning on the winner, the baseline that a preference has to beat. The loser
    and beta are in the log alone.

        loss = L_w + KEEP drift
    """
    x_w, target_w = schedule.noised(batch.winner, batch.noise, batch.t)
    x_l, target_l = schedule.noised(batch.loser, batch.noise, batch.t)
    x_t, t = torch.cat([x_w, x_l, x_w]), batch.t.repeat(3)
    prompt = batch.unsafe.followed_by(batch.unsafe, batch.safe)

    out_w, out_l, out_safe = policy(x_t, t, prompt).chunk(3)
    ref_w, ref_l, ref_safe = reference(x_t, t, prompt).chunk(3)

    winner, loser = mse(out_w, target_w), mse(out_l, target_l)
    winner_ref, loser_ref = mse(ref_w, target_w), mse(ref_l, target_l)
    gap, gap_ref = winner - loser, winner_ref - loser_ref
    preference = -F.logsigmoid(-beta / 2 * (gap - gap_ref)).mean()
    drift = mse(out_safe, ref_safe).mean()
    return winner.mean() + KEEP * drift, metrics_of(
        winner, loser, winner_ref, loser_ref, preference=preference, drift=drift)


LOSSES = {"safety": safety_dpo, "dpo": diffusion_dpo, "sft": fine_tuning}
