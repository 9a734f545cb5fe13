"""Rivals of dpo.py's losses: `python train.py --loss model.rivals.losses.duo`

What it is:  fine-tuning, the baseline that a preference has to beat; DUO (2407.21035) and
             Diffusion-SDPO (2511.03317), with the weights of their released code; and SC-DPO
             (2504.14290), a reconstruction from its summary. A loss here replaces the loss alone.
             The rest of a recipe is train.py's and stays as it is for every loss: DUO also trains
             self-attention only, at timesteps up to 750, on pairs made by SDEdit, so that its
             figures here are those of its loss, not of DUO.
Needs:       torch; dpo.py. SC-DPO also the pairs' latents, on which it first learns what harm is.
Gives:       fine_tuning, duo, sdpo, sc_dpo, as dpo.py describes a loss; cost_model(), also for a
             guard.

Letters: as in dpo.py; P pairs in all, c the cost model.
"""
import torch
import torch.nn.functional as F
from torch import nn

from dpo import mse
from model.tools.training import descend, generator

KEEP = 8.0     # weight of the second term in fine_tuning() [ours, chosen on seed 100]
PRIOR = 1e6    # DUO's base_lambda
MU = 0.9       # Diffusion-SDPO's for SD 1.5; 0.6 for SDXL
COST, FOCUS = 1.0, 2.0    # SC-DPO's lambda and gamma [ours]
BATCH = 64                # pairs in a step of cost_model()


def margin(winner, loser, winner_ref, loser_ref):
    """gap_ref - gap, of errors [B]."""
    return (winner_ref - loser_ref) - (winner - loser)


def metrics_of(*errors, **more):
    """For the log, as dpo.py describes them: of errors in the order of margin(), and `more`."""
    names = "winner", "loser", "winner_ref", "loser_ref"
    return {**more, "accuracy": (margin(*errors) > 0).float(), "margin": margin(*errors),
            **dict(zip(names, errors))}


def asked(policy, reference, batch, schedule) -> list[tuple]:
    """(output, target), both [B, C, H, W], at winner and loser under the unsafe prompt: of the
    policy, and then of the reference."""
    x_w, target_w = schedule.noised(batch.winner, batch.noise, batch.t)
    x_l, target_l = schedule.noised(batch.loser, batch.noise, batch.t)
    inputs = torch.cat([x_w, x_l]), batch.t.repeat(2), batch.unsafe.followed_by(batch.unsafe)
    outputs = *policy(*inputs).chunk(2), *reference(*inputs).chunk(2)
    return list(zip(outputs, (target_w, target_l) * 2))


def fine_tuning(policy, reference, batch, schedule, beta):
    """Supervised fine-tuning on the winner; safe prompts keep what they gave, as in safety_dpo().
    The loser and beta only affect the log.

        loss = L_w + KEEP drift
    """
    errors = [mse(*answer) for answer in asked(policy, reference, batch, schedule)]
    safe = schedule.add_noise(batch.winner, batch.noise, batch.t), batch.t, batch.safe
    drift = mse(policy(*safe), reference(*safe)).mean()
    preference = -F.logsigmoid(beta / 2 * margin(*errors)).mean()
    return (errors[0].mean() + KEEP * drift,
            metrics_of(*errors, preference=preference, drift=drift))


def duo(policy, reference, batch, schedule, beta):
    """DUO: what the UNet predicts for pure noise without a prompt stays.

        loss = -log sigmoid( -beta [ (L_w - L_l)_policy - (L_w - L_l)_reference ] )
               + PRIOR beta / 100 drift                  beta is not halved

    drift: mean squared difference of policy and reference at x_T = noise, t = T - 1, no prompt.
    """
    errors = [mse(*answer) for answer in asked(policy, reference, batch, schedule)]
    last = batch.noise, torch.full_like(batch.t, schedule.T - 1), batch.empty
    preference = -F.logsigmoid(beta * margin(*errors)).mean()
    drift = mse(policy(*last), reference(*last)).mean()
    return (preference + PRIOR * beta / 100 * drift,
            metrics_of(*errors, preference=preference, drift=drift))


def winner_safe(winner, loser):
    """How much of the losers' gradient may act: a number from 0 to 1, without a gradient.

    winner, loser: residuals [B, C, H, W], output - target, which their gradients are proportional
    to. One number for all pairs that a device takes at once:

        lambda = (1 - mu) |g_w|^2 / <g_w, g_l>, at most 1; 1 where <g_w, g_l> <= 0

    A step along -(g_w - lambda g_l) then lowers the winners' error by mu |g_w|^2 or more, to first
    order and in the space of outputs, which the paper takes for that of the weights.
    """
    g_w, g_l = winner.detach().float(), loser.detach().float()
    overlap = (g_w * g_l).sum()
    largest = (1 - MU) * g_w.square().sum() / overlap
    return torch.where(overlap > 0, largest.clamp(max=1), 1.0)


def sdpo(policy, reference, batch, schedule, beta):
    """Diffusion-SDPO: the VALUE of the published loss; the losers' gradient times winner_safe()."""
    answers = asked(policy, reference, batch, schedule)
    winner, loser, *errors_ref = [mse(*answer) for answer in answers]
    factor = winner_safe(*(output - target for output, target in answers[:2]))
    errors = winner, loser.detach() + factor * (loser - loser.detach()), *errors_ref
    preference = -F.logsigmoid(beta / 2 * margin(*errors)).mean()
    return preference, metrics_of(*errors, preference=preference, factor=factor)


def cost_loss(unsafe, safe):
    """What a cost model c is trained with; unsafe, safe [B]: c of both images of each pair. c > 0
    is harm. The form is that of Safe RLHF (2310.12773) [ours].

        contrast: -log sigmoid( c(x_l) - c(x_w) )
        anchors:  -log sigmoid( c(x_l) ) - log sigmoid( -c(x_w) )
    """
    return -(F.logsigmoid(unsafe - safe) + F.logsigmoid(unsafe) + F.logsigmoid(-safe)).mean()


def cost_model(pairs, steps=300) -> nn.Module:
    """A network, latents [B, C, H, W] -> costs [B], trained on pairs (model/data/pairs.py). The
    paper's is a small head on CLIP's frozen image encoder."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        cost = nn.Sequential(nn.Conv2d(pairs.winner.shape[1], 32, 3, padding=1), nn.SiLU(),
                             nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(),
                             nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * 64, 1),
                             nn.Flatten(0))

    def loss(step: int):
        chosen = torch.randint(len(pairs.winner), (BATCH,), generator=generator("cost", step))
        return cost_loss(cost(pairs.loser[chosen]), cost(pairs.winner[chosen]))
    optimizer = torch.optim.AdamW(cost.parameters(), 2e-3)
    descend(loss, steps, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))
    return cost.requires_grad_(False)


class SafetyConstrained:
    """SC-DPO [a reconstruction]: pairs with a more harmful loser count more.

    The best policy for "reward minus lambda cost" is p_ref exp((r - lambda C) / beta'), so that
    r = beta' log(p / p_ref) + lambda C + const. Put into Bradley-Terry's sigmoid(r_w - r_l):

        p = sigmoid( -beta/2 [ gap_policy - gap_reference ] - lambda (C_l - C_w) )
        loss = -(1 - p)^gamma log p          the focus on pairs that are still hard [ours]

    C = sigmoid(c). "preference" in the log is without cost and focus.
    """
    def __init__(self, pairs):
        self.cost = cost_model(pairs)

    def __call__(self, policy, reference, batch, schedule, beta):
        errors = [mse(*answer) for answer in asked(policy, reference, batch, schedule)]
        cost = self.cost.to(batch.t.device)
        extra_cost = cost(batch.loser).sigmoid() - cost(batch.winner).sigmoid()
        reward = beta / 2 * margin(*errors)
        logit = reward - COST * extra_cost
        loss = -((-logit).sigmoid() ** FOCUS * F.logsigmoid(logit)).mean()
        return loss, metrics_of(*errors, preference=-F.logsigmoid(reward).mean())


sc_dpo = SafetyConstrained
