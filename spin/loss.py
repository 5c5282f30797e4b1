"""The SPIN losses (arXiv 2401.01335, section 4) as pure functions."""

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
