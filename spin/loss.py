"""The losses of SPIN and of its variants as functions of log-probs; a step's loss and metrics.

B prompts, each with a real response and K generated ones. Log-probs are in nats, summed over a response. Of a
response, r = log p_θ − log p_ref: the reference is the opponent (SPIN) or what train.reference says.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spin.config import Train


class Ratios(NamedTuple):
    """What a loss is a function of."""

    real: Tensor  # (B, 1) r of the real response
    generated: Tensor  # (B, K) r' of the generated ones
    lengths: Tensor  # (B, 1 + K) tokens of these responses
    beta: float = 1.0  # the paper's λ
    mu: float = 1.0  # the second parameter of gsil, space and t-spin

    @property
    def t(self) -> Tensor:
        """(B, K) β(r − r'), of which the losses of SPIN are convex and decreasing functions."""
        return self.beta * (self.real - self.generated)


def logistic(x: Ratios) -> Tensor:
    """log(1 + exp(−t)): SPIN (arXiv 2401.01335); with fixed pairs and reference, DPO (arXiv 2305.18290)."""
    return F.softplus(-x.t)


def hinge(x: Ratios) -> Tensor:
    """max(0, 1 − t) (arXiv 2401.01335, section 4)."""
    return (1 - x.t).clamp(min=0)


def exponential(x: Ratios) -> Tensor:
    """exp(−t) (arXiv 2401.01335, section 4)."""
    return (-x.t).exp()


def correlation(x: Ratios) -> Tensor:
    """1 − t (arXiv 2401.01335, section 4)."""
    return 1 - x.t


def ipo(x: Ratios) -> Tensor:
    """(t − 1/2)²: IPO (arXiv 2310.12036, equation 17) times β², its τ, so that β scales t as elsewhere."""
    return (x.t - 0.5).square()


def per_token(x: Ratios) -> Tensor:
    """Logistic, of r and r' divided by their responses' tokens (as "sigmoid_norm" in TRL)."""
    real, generated = x.real / x.lengths[:, :1], x.generated / x.lengths[:, 1:]
    return F.softplus(-x.beta * (real - generated))


def sppo(x: Ratios) -> Tensor:
    """(r − 1/(2β))² + (r' + 1/(2β))²: SPPO with hard labels (arXiv 2405.00675; β = 1/η, as in TRL)."""
    target = 0.5 / x.beta
    return (x.real - target).square() + (x.generated + target).square()


def gsil(x: Ratios) -> Tensor:
    """log(1 + exp(−(βr + b))) + log(1 + exp(βr' + b)): GSIL (arXiv 2410.10093), logistic; b = −log μ."""
    b = -math.log(x.mu)
    return F.softplus(-(x.beta * x.real + b)) + F.softplus(x.beta * x.generated + b)


def space(x: Ratios) -> Tensor:
    """−log σ_μ(r) − μ log σ_1/μ(−r'), σ_μ(s) = 1/(1 + μ exp(−s)): SPACE (arXiv 2512.07175) of βr and βr'.

    That is GSIL with weight μ on the generated responses: noise contrastive estimation of μ to one.
    """
    b = -math.log(x.mu)
    return F.softplus(-(x.beta * x.real + b)) + x.mu * F.softplus(x.beta * x.generated + b)


def t_spin(x: Ratios) -> Tensor:
    """log(1 + exp(−β(r − r'))) + μ log(1 + exp(−β(r' − r0))): T-SPIN (arXiv 2601.08198; β is its α, μ its β).

    r0 is of the base model's response, the last of the generated ones. Made for train.reference = "none".
    """
    new, base = x.generated[:, :-1], x.generated[:, -1:]
    return F.softplus(-x.beta * (x.real - new)) + x.mu * F.softplus(-x.beta * (new - base))


# Each returns (B, K): the loss of every pair of the real response and a generated one.
_LOSSES = (logistic, hinge, exponential, correlation, ipo, per_token, sppo, gsil, space, t_spin)
LOSSES = {loss.__name__.replace("_", "-"): loss for loss in _LOSSES}


def spin_loss(
    policy_real_logps: Tensor,  # (B,) log p_θ(y|x), y the real response
    policy_generated_logps: Tensor,  # (B,) log p_θ(y'|x), y' the opponent's; or (B, K)
    opponent_real_logps: Tensor,  # (B,) log p_θt(y|x)
    opponent_generated_logps: Tensor,  # like policy_generated_logps
    beta: float,
    kind: str = "logistic",
    mu: float = 1.0,
    lengths: Tensor | None = None,  # (B, 1 + K) tokens of the responses, for "per-token"
) -> Tensor:
    """Loss of each prompt (B,), the mean over its K pairs; β is the paper's λ."""
    if kind not in LOSSES:
        raise ValueError(f"kind = {kind!r} is not one of {', '.join(LOSSES)}")
    real = (policy_real_logps - opponent_real_logps).unsqueeze(-1)
    generated = (policy_generated_logps - opponent_generated_logps).view(len(real), -1)
    if lengths is None:
        if kind == "per-token":
            raise ValueError('kind = "per-token" needs lengths, the tokens of the responses')
        lengths = real.new_ones(len(real), 1 + generated.shape[1])
    return LOSSES[kind](Ratios(real, generated, lengths, beta, mu)).mean(-1)


def spin_step(
    logps: Tensor,  # (B C,) the policy's, of the C responses of each prompt, the real one first
    reference: Tensor,  # (B, C) the reference's, of the same
    same: Tensor,  # (B, C) int64: the first response of the prompt with the same tokens
    lengths: Tensor,  # (B, C) tokens of the responses
    prompts: int,
    part: Train,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the loss of a step of `prompts` prompts, and its shares of the metrics."""
    # The same text has one log-prob, even if rounding differs between its places: its gradient is 0.
    logps, reference = (values.gather(1, same) for values in (logps.view(reference.shape), reference))
    ratios = logps - reference
    x = Ratios(ratios[:, :1], ratios[:, 1:], lengths, part.beta, part.mu)
    losses = LOSSES[part.loss](x)  # (B, K)
    loss = losses.mean(-1).sum() / prompts
    with torch.no_grad():
        pairs = slice(1, 1 + losses.shape[1])  # without the base model's response, which t-spin adds
        margin = x.real - ratios[:, pairs]
        metrics = {
            "accuracy": (margin > 0).float(),
            "margin": margin,
            "reward_real": part.beta * x.real,
            "reward_generated": part.beta * ratios[:, pairs],
            "logps_real": logps[:, :1],
            "logps_generated": logps[:, pairs],
        }
        shares = {name: values.mean(-1).sum() / prompts for name, values in metrics.items()}
        return loss, {"loss": loss, **shares}


def sft_step(logps: Tensor, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the mean loss per token of a step of `tokens` response tokens."""
    loss = -logps.sum() / tokens
    return loss, {"loss": loss}
