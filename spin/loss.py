"""The SPIN losses (arXiv 2401.01335, section 4) as pure functions of log-probabilities, and a step's metrics.

B pairs; log-probabilities are summed over a response and in nats.
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
    """Loss of each pair (B,): ℓ(β·margin). All log-probabilities are summed over the response, in nats.

    margin = log(p_θ(y|x) / p_θt(y|x)) − log(p_θ(y'|x) / p_θt(y'|x));  β is the paper's λ.
    """
    if kind not in LOSSES:
        raise ValueError(f"kind = {kind!r} is not one of {', '.join(LOSSES)}")
    margin = margins(policy_real_logps, policy_generated_logps, opponent_real_logps, opponent_generated_logps)
    return LOSSES[kind](beta * margin)


def margins(
    policy_real: Tensor, policy_generated: Tensor, opponent_real: Tensor, opponent_generated: Tensor
) -> Tensor:
    """How much more the policy tells real from generated than the opponent does (B,), in nats."""
    return (policy_real - opponent_real) - (policy_generated - opponent_generated)


def initial_loss(kind: str) -> float:
    """ℓ(0): what every iteration starts from, since policy and opponent are then the same model."""
    return float(LOSSES[kind](torch.zeros(())))


# What spin_step returns, as means over a step's pairs. drift: how far policy and opponent are apart.
METRICS = tuple("loss accuracy margin reward_real reward_generated logps_real logps_generated drift".split())


def spin_step(
    logps: Tensor,  # (2 B,) the policy's, of the real and the generated response of each pair alternately
    opponent: Tensor,  # (B, 2) the opponent's, of the same
    identical: Tensor,  # (B,) bool: the two responses are one text
    pairs: int,
    beta: float,
    kind: str,
) -> tuple[Tensor, list[Tensor]]:
    """Loss of a micro-batch as its share of a step of `pairs` pairs, and the shares of METRICS."""
    real, generated = logps.view(-1, 2).unbind(-1)  # (B,)
    opponent_real, opponent_generated = opponent.unbind(-1)
    # One text has one log-probability, even if it was rounded differently in two places: its gradient is 0.
    generated = torch.where(identical, real, generated)
    opponent_generated = torch.where(identical, opponent_real, opponent_generated)
    loss = spin_loss(real, generated, opponent_real, opponent_generated, beta, kind).sum() / pairs
    with torch.no_grad():
        margin = margins(real, generated, opponent_real, opponent_generated)
        metrics = (
            (margin > 0).float(),  # accuracy: the policy tells the two apart better than the opponent
            margin,
            beta * (real - opponent_real),
            beta * (generated - opponent_generated),
            real,
            generated,
            (real - opponent_real).abs() + (generated - opponent_generated).abs(),
        )
        return loss, [loss, *(metric.sum() / pairs for metric in metrics)]
