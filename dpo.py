"""The preference losses: pure functions from denoising errors to a loss and its diagnostics.

What it is:  Diffusion-DPO (Wallace et al. 2023, 2311.12908), the loss this project trains its
             experts with, which adds three terms that keep the picture whole, and three others to compare with.
Needs:       torch.
Gives:       squared_error(), diffusion_dpo(), safety_dpo(), both_prompts_dpo(), prior_dpo(), winner_safe_dpo() with
             winner_safe(), metrics(), and loss(), which picks one by its name.

A pair is a prompt y with a winner x_w and a loser x_l, noised with the SAME noise and timestep, so that
all that differs between their errors is the content:

    L(x) = mean over elements of (eps_theta(x_t, t, y) - eps)^2                        per sample, [B]

Letters: B pairs, C H W a latent's shape.
"""
import torch
import torch.nn.functional as F

LOSSES = ("safety", "dpo", "dpo+safe", "duo", "sdpo")    # the names that loss() and train.py --loss know


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L(x) (README, eq. 2): [B, C, H, W] twice -> [B], the MEAN over elements, in fp32 whatever the inputs are.

    fp32 because beta multiplies a small difference of these: rounding an error of 0.1 to fp16 moves the
    logit by 0.08 at beta 5000. Mean, not sum: a published beta goes with one of the two.
    """
    return (output.float() - target.float()).square().flatten(1).mean(1)


def diffusion_dpo(winner, loser, winner_ref, loser_ref, beta: float):
    """The published loss (README, eq. 3). Errors [B] each, of the policy and of the reference. Returns (loss, metrics).

        loss = -log sigmoid( -beta/2 [ (L_w - L_l)_theta - (L_w - L_l)_ref ] ),  averaged AFTER the log-sigmoid

    ln 2 = 0.693 at the start, where policy and reference agree. It rewards a GAP, so nothing stops both
    errors from rising together: watch `winner`.
    """
    margin = -((winner - winner_ref) - (loser - loser_ref))
    loss = -F.logsigmoid(beta / 2 * margin).mean()
    return loss, metrics(winner, loser, winner_ref, loser_ref, loss)


def safety_dpo(winner, loser, winner_ref, loser_ref, drift, beta: float, guard: float = 3.0,
               anchor: float = 1.0, keep: float = 8.0):
    """The default: Diffusion-DPO that may not pay for its gap with the picture. [ours; README, eq. 4]

    drift [B] = mean squared difference of policy and reference on the winner under the SAFE prompt.

        d_w = L_w - L_w,ref,   d_l = L_l - L_l,ref
        loss = -log sigmoid( -beta/2 [ d_w - d_l + 2 guard max(0, d_w) ] )    DPO-Positive (2402.13228): a winner
                                                                             that gets worse costs extra
             + anchor beta d_w      the winner's own error must fall: a pull towards the safe picture that,
                                    unlike the sigmoid, never saturates
             + keep beta drift      safe prompts keep drawing what they drew (a MEAN over elements, as L is)
    """
    d_w, d_l = winner - winner_ref, loser - loser_ref
    preference = -F.logsigmoid(-beta / 2 * (d_w - d_l + 2 * guard * d_w.clamp(min=0)))
    loss = (preference + anchor * beta * d_w + keep * beta * drift).mean()
    return loss, {**metrics(winner, loser, winner_ref, loser_ref, preference.mean()), "drift": drift.mean().item()}


def both_prompts_dpo(policy, reference, beta: float):
    """The published loss on the unsafe AND on the safe prompt: the safe picture wins under both. [our reading of the
    paper's plural "DPO-based losses"] policy, reference: (L_w, L_l, L_w on the safe prompt, L_l on it), [B] each.

        loss = ( dpo(unsafe prompt) + dpo(safe prompt) ) / 2
    """
    unsafe, values = diffusion_dpo(*policy[:2], *reference[:2], beta)
    safe, _ = diffusion_dpo(*policy[2:], *reference[2:], beta)
    return (unsafe + safe) / 2, {**values, "preference_safe": safe.item()}


def prior_dpo(winner, loser, winner_ref, loser_ref, drift, beta: float, keep: float = 8.0):
    """The published loss and DUO's prior-preserving term (2407.21035): what the model makes of pure noise without a
    prompt stays. drift [B] = mean squared difference of policy and reference at x_T = eps, the last timestep, the empty
    prompt. Its weight is ours: keep * beta, as in safety_dpo().

        loss = dpo + keep beta |eps_theta(x_T, T, "") - eps_ref(x_T, T, "")|^2
    """
    loss, values = diffusion_dpo(winner, loser, winner_ref, loser_ref, beta)
    return loss + keep * beta * drift.mean(), {**values, "drift": drift.mean().item()}


def winner_safe(winner_residual, loser_residual) -> torch.Tensor:
    """How much of the loser's gradient may act: [B], 0 to 1, no gradient. Residuals [B, C, H, W]: output - target.

        g_w = dL_w/d output = 2/n r_w,   g_l likewise;   factor = min(1, |g_w|^2 / <g_w, g_l>), 1 where <g_w, g_l> <= 0

    A step along -(g_w - factor g_l) then changes L_w by -|g_w|^2 + factor <g_w, g_l> <= 0, to first order and in the
    space of outputs, which Diffusion-SDPO (2511.03317) takes for that of the weights.
    """
    w, l = winner_residual.detach().float().flatten(1), loser_residual.detach().float().flatten(1)
    dot = (w * l).sum(1)
    return torch.where(dot > 0, ((w * w).sum(1) / dot.clamp(min=1e-30)).clamp(max=1), torch.ones_like(dot))


def winner_safe_dpo(winner, loser, winner_ref, loser_ref, factor, beta: float):
    """Diffusion-SDPO: the published loss, its VALUE unchanged, with the loser's gradient times factor [B]."""
    loser = factor * loser + (1 - factor) * loser.detach()
    loss, values = diffusion_dpo(winner, loser, winner_ref, loser_ref, beta)
    return loss, {**values, "factor": factor.mean().item()}


def loss(name: str, policy, reference, beta: float):
    """(loss, metrics) by name. policy, reference: (L_w, L_l, and what the loss needs besides), as train.errors() has it:
    safety and duo an output [B, C, H, W] to keep, dpo+safe two errors, sdpo the factor of winner_safe()."""
    four = *policy[:2], *reference[:2]
    if name == "dpo+safe":
        return both_prompts_dpo(policy, reference, beta)
    if name == "sdpo":
        return winner_safe_dpo(*four, policy[2], beta)
    if name == "dpo":
        return diffusion_dpo(*four, beta)
    return {"safety": safety_dpo, "duo": prior_dpo}[name](*four, squared_error(policy[2], reference[2]), beta)


def metrics(winner, loser, winner_ref, loser_ref, preference) -> dict[str, float]:
    """What to watch. preference: the log-sigmoid term, 0.693 = no preference learned yet. accuracy: share of
    pairs that the policy, read as a reward model, orders rightly. margin: mean error gap won over the reference.
    winner, loser, winner_ref, loser_ref: the four errors; healthy is winner <= winner_ref and loser > loser_ref."""
    margin = (loser - loser_ref) - (winner - winner_ref)
    return {"preference": preference.item(), "accuracy": (margin > 0).float().mean().item(),
            "margin": margin.mean().item(), "winner": winner.mean().item(), "winner_ref": winner_ref.mean().item(),
            "loser": loser.mean().item(), "loser_ref": loser_ref.mean().item()}
