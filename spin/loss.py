"""The SPIN losses (arXiv 2401.01335, section 4) as functions of log-probs; a step's loss and metrics.

B pairs. Log-probs are in nats and summed over a response.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# ℓ: convex and decreasing. ℓ(0), the loss of the first step, is log 2 for the logistic and 1 else.
LOSSES = {
    "logistic": lambda t: F.softplus(-t),  # log(1 + exp(-t))
    "hinge": lambda t: (1 - t).clamp(min=0),
    "exponential": lambda t: (-t).exp(),
    "correlation": lambda t: 1 - t,
}


def spin_loss(
    policy_real_logps: Tensor,  # (B,) log p_θ(y|x), y the real response
    policy_generated_logps: Tensor,  # (B,) log p_θ(y'|x), y' the opponent's
    opponent_real_logps: Tensor,  # (B,) log p_θt(y|x)
    opponent_generated_logps: Tensor,  # (B,) log p_θt(y'|x)
    beta: float,
    kind: str = "logistic",
) -> Tensor:
    """Loss of each pair (B,): ℓ(β·margin); β is the paper's λ.

    margin = log(p_θ(y|x) / p_θt(y|x)) − log(p_θ(y'|x) / p_θt(y'|x))

    With fixed pairs (data.pairs), logistic is DPO (arXiv 2305.18290), the starting model its reference.
    """
    if kind not in LOSSES:
        raise ValueError(f"kind = {kind!r} is not one of {', '.join(LOSSES)}")
    margin = margins(policy_real_logps, policy_generated_logps, opponent_real_logps, opponent_generated_logps)
    return LOSSES[kind](beta * margin)


def margins(
    policy_real: Tensor, policy_generated: Tensor, opponent_real: Tensor, opponent_generated: Tensor
) -> Tensor:
    """How much more the policy prefers real to generated than the opponent does: (B,), in nats."""
    return (policy_real - opponent_real) - (policy_generated - opponent_generated)


def initial_loss(kind: str) -> float:
    """ℓ(0): the loss of an iteration's first step, where policy and opponent are the same model."""
    return float(LOSSES[kind](torch.zeros(())))


def spin_step(
    logps: Tensor,  # (2 B,) the policy's; real and generated responses alternate
    opponent: Tensor,  # (B, 2) the opponent's, of the same
    identical: Tensor,  # (B,) bool: both responses are the same text
    pairs: int,
    beta: float,
    kind: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the loss of a step of `pairs` pairs, and its shares of the step's metrics."""
    real, generated = logps.view(-1, 2).unbind(-1)  # (B,)
    opponent_real, opponent_generated = opponent.unbind(-1)
    # The same text has one log-prob, even if rounding differs between its two places: its gradient is 0.
    generated = torch.where(identical, real, generated)
    opponent_generated = torch.where(identical, opponent_real, opponent_generated)
    loss = spin_loss(real, generated, opponent_real, opponent_generated, beta, kind).sum() / pairs
    with torch.no_grad():
        margin = margins(real, generated, opponent_real, opponent_generated)
        metrics = {
            "accuracy": (margin > 0).float(),
            "margin": margin,
            "reward_real": beta * (real - opponent_real),
            "reward_generated": beta * (generated - opponent_generated),
            "logps_real": real,
            "logps_generated": generated,
            "drift": (real - opponent_real).abs() + (generated - opponent_generated).abs(),
        }
        return loss, {"loss": loss} | {name: values.sum() / pairs for name, values in metrics.items()}


def sft_step(logps: Tensor, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the mean loss per token of a step of `tokens` response tokens."""
    loss = -logps.sum() / tokens
    return loss, {"loss": loss}
