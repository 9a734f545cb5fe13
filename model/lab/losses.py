"""Two rivals of dpo.py's losses: `python train.py --loss model.lab.losses.duo --beta 500`

What it is:  DUO (2407.21035) and Diffusion-SDPO (2511.03317), with the weights of their released
             code. A loss here replaces the loss alone. The rest of a recipe is train.py's and stays
             as it is for every loss: DUO also trains self-attention only, at timesteps up to 750,
             on pairs made by SDEdit, so that its figures here are those of its loss, not of DUO.
Needs:       torch; dpo.py.
Gives:       duo, sdpo; their equations prior_dpo(), winner_safe(), winner_safe_dpo().

Letters: B pairs, C H W a latent's shape.
"""
import torch

from dpo import Loss, diffusion_dpo, errors_of, on_errors

PRIOR = 1e6    # DUO's base_lambda
MU = 0.9       # Diffusion-SDPO's for SD 1.5; 0.6 for SDXL


def prior_dpo(winner, loser, winner_ref, loser_ref, drift, beta: float):
    """DUO: what the model makes of pure noise without a prompt stays. -> (loss, metrics)

    Errors [B] of policy and reference; drift [B] = the mean squared difference of their outputs at
    x_T = eps, t = T - 1, no prompt.

        loss = -log sigmoid( -beta [ (L_w - L_l)_theta - (L_w - L_l)_ref ] )    beta is not halved
             + PRIOR beta / 100 drift
    """
    errors = winner, loser, winner_ref, loser_ref
    preference, values = diffusion_dpo(*errors, 2 * beta, drift=drift)
    return preference + PRIOR * beta / 100 * drift.mean(), values


def winner_safe(winner, loser) -> torch.Tensor:
    """How much of the losers' gradient may act: a number from 0 to 1, without a gradient.

    winner, loser: residuals [B, C, H, W], output - target, which their gradients are proportional
    to. One number for all pairs that a device takes at once:

        lambda = (1 - mu) |g_w|^2 / <g_w, g_l>, at most 1; 1 where <g_w, g_l> <= 0

    A step along -(g_w - lambda g_l) then lowers the winners' error by mu |g_w|^2 or more, to first
    order and in the space of outputs, which the paper takes for that of the weights.
    """
    w, l = winner.detach().float(), loser.detach().float()
    overlap = (w * l).sum()
    largest = (1 - MU) * w.square().sum() / overlap
    return torch.where(overlap > 0, largest.clamp(max=1), 1.0)


def winner_safe_dpo(winner, loser, winner_ref, loser_ref, factor, beta: float):
    """Diffusion-SDPO: the VALUE of the published loss, the losers' gradient times factor."""
    loser = loser.detach() + factor * (loser - loser.detach())
    return diffusion_dpo(winner, loser, winner_ref, loser_ref, beta, factor=factor)


def with_safe_winner(policy, reference, target, beta: float):
    factor = winner_safe(policy[0] - target[0], policy[1] - target[1])
    return winner_safe_dpo(*errors_of(policy, reference, target), factor, beta)


duo = Loss(("winner|unsafe", "loser|unsafe", "noise|empty"), on_errors(prior_dpo))
sdpo = Loss(("winner|unsafe", "loser|unsafe"), with_safe_winner)
