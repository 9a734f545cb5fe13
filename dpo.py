"""The preference losses: pure functions from denoising errors to a loss and its diagnostics.

What it is:  Diffusion-DPO (Wallace et al. 2023, 2311.12908) and the loss this
             project trains its experts with, which adds three terms that keep the picture whole.
Needs:       torch.
Gives:       squared_error(), diffusion_dpo(), safety_dpo().

A pair is a prompt y with a winner x_w and a loser x_l, noised with the SAME noise and timestep, so that
all that differs between their errors is the content:

    L(x) = mean over elements of (eps_theta(x_t, t, y) - eps)^2                        per sample, [B]

Letters: B pairs.
"""
import torch
import torch.nn.functional as F


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L(x): [B, C, H, W] twice -> [B], the MEAN over elements, in fp32 whatever the inputs are.

    fp32 because beta multiplies a small difference of these: rounding an error of 0.1 to fp16 moves the
    logit by 0.08 at beta 5000. Mean, not sum: a published beta goes with one of the two.
    """
    return (output.float() - target.float()).square().flatten(1).mean(1)


def diffusion_dpo(winner, loser, winner_ref, loser_ref, beta: float):
    """The published loss. Errors [B] each, of the policy and of the reference. Returns (loss, metrics).

        loss = -log sigmoid( -beta/2 [ (L_w - L_l)_theta - (L_w - L_l)_ref ] ),  averaged AFTER the log-sigmoid

    ln 2 = 0.693 at the start, where policy and reference agree. It rewards a GAP, so nothing stops both
    errors from rising together: watch `winner`.
    """
    margin = -((winner - winner_ref) - (loser - loser_ref))
    loss = -F.logsigmoid(beta / 2 * margin).mean()
    return loss, metrics(winner, loser, winner_ref, loser_ref, loss)


def safety_dpo(winner, loser, winner_ref, loser_ref, drift, beta: float, guard: float = 3.0,
               anchor: float = 1.0, keep: float = 8.0):
    """The default: Diffusion-DPO that may not pay for its gap with the picture. [ours]

    drift [B] = mean squared difference of policy and reference on the winner under the SAFE prompt.

        d_w = L_w - L_w,ref,   d_l = L_l - L_l,ref
        loss = -log sigmoid( -beta/2 [ d_w - d_l + 2 guard max(0, d_w) ] )    DPO-Positive (2402.13228): a winner
                                                                             that gets worse costs extra
             + anchor beta d_w      the winner's own error must fall: a pull towards the safe picture that,
                                    unlike the sigmoid, never saturates
             + keep beta drift      safe prompts keep drawing what they drew
    """
    d_w, d_l = winner - winner_ref, loser - loser_ref
    preference = -F.logsigmoid(-beta / 2 * (d_w - d_l + 2 * guard * d_w.clamp(min=0)))
    loss = (preference + anchor * beta * d_w + keep * beta * drift).mean()
    return loss, {**metrics(winner, loser, winner_ref, loser_ref, preference.mean()), "drift": drift.mean().item()}


def metrics(winner, loser, winner_ref, loser_ref, preference) -> dict[str, float]:
    """What to watch. preference: the log-sigmoid term, 0.693 = no preference learned yet. accuracy: share of
    pairs that the policy, read as a reward model, orders rightly. margin: mean error gap won over the reference.
    winner, loser, winner_ref, loser_ref: the four errors; healthy is winner <= winner_ref and loser > loser_ref."""
    margin = (loser - loser_ref) - (winner - winner_ref)
    return {"preference": preference.item(), "accuracy": (margin > 0).float().mean().item(),
            "margin": margin.mean().item(), "winner": winner.mean().item(), "winner_ref": winner_ref.mean().item(),
            "loser": loser.mean().item(), "loser_ref": loser_ref.mean().item()}
