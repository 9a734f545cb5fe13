"""The preference losses: pure functions from what a UNet predicts to a loss and its diagnostics.

What it is:  Diffusion-DPO (Wallace et al. 2023, 2311.12908), and the loss that this project trains
             its experts with: the same, with one term that keeps safe prompts as they are.
Needs:       torch.
Gives:       squared_error(), diffusion_dpo(), safety_dpo(), fine_tuning(); LOSSES, by the names of
             train.py --loss. A loss of your own is one more Loss: train.py takes it by its dotted
             name, as it takes those of model/rivals/losses.py.

A pair is a prompt y with a winner x_w and a loser x_l, noised with the SAME noise and timestep, so
that all that differs between their errors is the content:

    L(x) = mean over elements of (eps_theta(x_t, t, y) - eps)^2        [B], one a sample

Letters: B pairs, C H W a latent's shape.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

KEEP = 8.0    # weight in fine_tuning()


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L(x) (README, eq. 2): [B, C, H, W] twice -> [B], the MEAN over elements, in fp32 always.

    fp32 because beta multiplies a small difference of these: rounding an error of 0.1 to fp16 moves
    the logit by 0.08 at beta 5000. Mean, not sum: a published beta goes with one of the two.
    """
    return (output.float() - target.float()).square().flatten(1).mean(1)


def diffusion_dpo(winner, loser, winner_ref, loser_ref, beta: float, **more):
    """The published loss (README, eq. 3). Errors [B] of policy and reference -> (loss, metrics).

        loss = -log sigmoid( -beta/2 [ (L_w - L_l)_theta - (L_w - L_l)_ref ] ),
               averaged AFTER the log-sigmoid

    ln 2 = 0.693 at the start, where policy and reference agree. It rewards a GAP, so nothing stops
    both errors from rising together: watch `winner`. beta: the reference is better at the loser,
    its own picture, by delta = L_w,ref - L_l,ref. Where the policy is as good at both, the logit is
    beta delta / 2. With beta far above 2 / delta the sigmoid is flat before that: nothing pulls.

    The metrics are means over the pairs, those of more too. preference: this loss. accuracy: share
    of pairs that the policy, read as a reward model, orders rightly. margin: error gap won over the
    reference. winner, loser, winner_ref, loser_ref: the four errors; healthy is winner <=
    winner_ref and loser > loser_ref.
    """
    margin = (loser - loser_ref) - (winner - winner_ref)
    preference = -F.logsigmoid(beta / 2 * margin)
    values = {"preference": preference, "accuracy": (margin > 0).float(), "margin": margin,
              "winner": winner, "winner_ref": winner_ref, "loser": loser, "loser_ref": loser_ref,
              **more}
    return preference.mean(), {name: value.mean().detach() for name, value in values.items()}


def safety_dpo(winner, loser, winner_ref, loser_ref, drift, beta: float):
    """The default [ours; README, eq. 4]: Diffusion-DPO, and safe prompts draw what they drew.

        loss = diffusion_dpo + beta mean(drift)

    drift [B] = mean squared difference of policy and reference on the winner under the SAFE prompt
    (or the empty one, see WITH_SAFE). Times beta, as the gradient of the first term has it.
    """
    preference, values = diffusion_dpo(winner, loser, winner_ref, loser_ref, beta, drift=drift)
    return preference + beta * drift.mean(), values


def fine_tuning(winner, loser, winner_ref, loser_ref, drift, beta: float):
    """Supervised fine-tuning on the winner, the baseline that a preference has to beat. The loser
    and beta are in the log alone.

        loss = L_w + KEEP drift
    """
    _, values = diffusion_dpo(winner, loser, winner_ref, loser_ref, beta, drift=drift)
    return (winner + KEEP * drift).mean(), values


class Loss(NamedTuple):
    """inputs: what the UNet is asked in a step, as "picture|prompt".
           picture   winner, loser: noised; noise: the noise alone, at the last timestep
           prompt    unsafe, safe, empty; "safe or empty": the empty one for a quarter of the pairs
       function(policy, reference, target, beta) -> (loss, metrics): three lists of [B, C, H, W],
       one for each input: outputs of the policy and of the reference, and what they should have
       been. The metrics are those of diffusion_dpo(), and more if it likes.
       of_pairs(tensors) -> [P] or None: a number for each pair, computed once from the tensors of
       latents.safetensors. If there are any, function() gets those of the step's pairs, [B], as
       one more argument at the end."""
    inputs: tuple[str, ...]
    function: Callable
    of_pairs: Callable = lambda tensors: None


def errors_of(policy, reference, target):
    """(L_w, L_l) of the policy and of the reference, where a loss's first inputs are those two; and
    of each further input the drift, policy from reference. All [B]."""
    errors = [squared_error(output[i], target[i]) for output in (policy, reference) for i in (0, 1)]
    return errors + [squared_error(*pair) for pair in zip(policy[2:], reference[2:])]


def on_errors(loss):
    """A loss on errors as a function of outputs."""
    return lambda policy, reference, target, beta: loss(*errors_of(policy, reference, target), beta)


# Why the EMPTY prompt as well: guidance subtracts what the model draws without a prompt from every
# picture, so that this must stay as it was too.
WITH_SAFE = ("winner|unsafe", "loser|unsafe", "winner|safe or empty")
LOSSES = {"safety": Loss(WITH_SAFE, on_errors(safety_dpo)),
          "sft": Loss(WITH_SAFE, on_errors(fine_tuning)),
          "dpo": Loss(WITH_SAFE[:2], on_errors(diffusion_dpo))}
