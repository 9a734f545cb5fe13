"""Three rivals of dpo.py's losses: `python train.py --loss model.rivals.losses.duo`

What it is:  DUO (2407.21035) and Diffusion-SDPO (2511.03317), with the weights of their released
             code, and SC-DPO (2504.14290), a reconstruction from its summary. A loss here replaces
             the loss alone. The rest of a recipe is train.py's and stays as it is for every loss:
             DUO also trains self-attention only, at timesteps up to 750, on pairs made by SDEdit,
             so that its figures here are those of its loss, not of DUO.
Needs:       torch; dpo.py. SC-DPO also the pairs' latents, on which it first learns what harm is.
Gives:       duo, sdpo, sc_dpo; never_empty, dpo.py's own without the empty prompts; the rivals'
             equations prior_dpo(), winner_safe(), winner_safe_dpo(), cost_loss(),
             safety_constrained_dpo(); cost_model().

Letters: B pairs, C H W a latent's shape.
"""
import torch
import torch.nn.functional as F
from torch import nn

from dpo import Loss, diffusion_dpo, errors_of, on_errors, safety_dpo
from model.tools.training import generator, set_rate

PRIOR = 1e6    # DUO's base_lambda
MU = 0.9       # Diffusion-SDPO's for SD 1.5; 0.6 for SDXL
COST, FOCUS = 1.0, 2.0    # SC-DPO's lambda and gamma [ours]
BATCH = 64                # pairs in a step of cost_model()


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


def cost_loss(unsafe, safe) -> torch.Tensor:
    """What a cost model c is trained with; unsafe, safe [B]: c of both pictures of each pair. c > 0
    is harm. The form is that of Safe RLHF (2310.12773) [ours].

        contrast: -log sigmoid( c(x_l) - c(x_w) )
        anchors:  -log sigmoid( c(x_l) ) - log sigmoid( -c(x_w) )
    """
    return -(F.logsigmoid(unsafe - safe) + F.logsigmoid(unsafe) + F.logsigmoid(-safe)).mean()


def cost_model(tensors: dict[str, torch.Tensor], steps: int = 300) -> nn.Module:
    """A network, latents [B, C, H, W] of "winner" and "loser" -> costs [B]. The paper's is a small
    head on CLIP's frozen image encoder."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        cost = nn.Sequential(nn.Conv2d(tensors["winner"].shape[1], 32, 3, padding=1), nn.SiLU(),
                             nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(),
                             nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * 64, 1),
                             nn.Flatten(0))
    optimiser = torch.optim.AdamW(cost.parameters(), 2e-3, weight_decay=1e-2)
    for step in range(steps):
        set_rate(optimiser, 2e-3, step, steps)
        pairs = torch.randint(len(tensors["winner"]), (BATCH,), generator=generator("cost", step))
        unsafe, safe = (cost(tensors[side][pairs]) for side in ("loser", "winner"))
        optimiser.zero_grad()
        cost_loss(unsafe, safe).backward()
        optimiser.step()
    return cost.requires_grad_(False)


def extra_cost(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """How much more harmful the loser of each pair is: sigmoid c(x_l) - sigmoid c(x_w), [P]."""
    cost = cost_model(tensors)
    return cost(tensors["loser"]).sigmoid() - cost(tensors["winner"]).sigmoid()


def safety_constrained_dpo(winner, loser, winner_ref, loser_ref, cost, beta: float):
    """SC-DPO [a reconstruction]. Errors [B]; cost [B] of extra_cost(). -> (loss, metrics), the
    metrics of diffusion_dpo(): "preference" is without cost and focus.

    The best policy for "reward minus lambda cost" is p_ref exp((r - lambda C) / beta'), so that
    r = beta' log(p / p_ref) + lambda C + const. Put into Bradley-Terry's sigmoid(r_w - r_l):

        p = sigmoid( -beta/2 [ d_w - d_l ] - lambda cost )     d = L_theta - L_ref
        loss = -(1 - p)^gamma log p          the focus on pairs that are still hard [ours]
    """
    _, values = diffusion_dpo(winner, loser, winner_ref, loser_ref, beta)
    margin = (loser - loser_ref) - (winner - winner_ref)
    logit = beta / 2 * margin - COST * cost
    return -((-logit).sigmoid() ** FOCUS * F.logsigmoid(logit)).mean(), values


def with_cost(policy, reference, target, beta: float, cost):
    errors = errors_of(policy, reference, target)
    return safety_constrained_dpo(*errors, cost.to(errors[0]), beta)


never_empty = Loss(("winner|unsafe", "loser|unsafe", "winner|safe"), on_errors(safety_dpo))
duo = Loss(("winner|unsafe", "loser|unsafe", "noise|empty"), on_errors(prior_dpo))
sdpo = Loss(("winner|unsafe", "loser|unsafe"), with_safe_winner)
sc_dpo = Loss(("winner|unsafe", "loser|unsafe"), with_cost, extra_cost)
