"""RMSProp in place: apart from parameters, gradients and state it needs memory for one chunk only."""

from collections.abc import Iterable

import torch
from torch import Tensor

from model.mistral import Mistral
from spin.config import Optimization
from spin.engine.distributed import local, whole

# Elements updated at a time: as many as fit a CPU's caches, or keep a GPU busy.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}


class RMSprop(torch.optim.Optimizer):
    """v ← α v + (1 − α) g²,  θ ← θ − lr · g / (√v + ε): torch.optim.RMSprop without momentum or weight decay.

    The second moment v may be kept in bfloat16, for half the memory. bfloat16 neighbors are up to 2^-7 apart
    (relative), and a step changes v by some hundredths at most, so round-to-nearest would discard every small
    update. Stochastic rounding keeps the expectation of v. Its noise, at most 2^-8 a step, decays at the rate
    1 − α as the gradients' own does: 2^-8 / √(1 − α²) = 2.8% of v, 1.4% of the length of a step. The random
    bits depend on the group's "step" and the parameter's place.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        alpha: float = 0.99,
        eps: float = 1e-8,
        second_moment=torch.float32,
    ):
        super().__init__(parameters, dict(lr=lr, alpha=alpha, eps=eps, step=0))
        self.second_moment = second_moment
        self.chunk = CHUNK[self.param_groups[0]["params"][0].device.type]

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, alpha, eps = float(group["lr"]), group["alpha"], group["eps"]
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["square_avg"] = torch.zeros_like(parameter, dtype=self.second_moment)
                flat = (local(tensor).view(-1) for tensor in (parameter, parameter.grad, state["square_avg"]))
                generator = None
                if self.second_moment != torch.float32:
                    generator = torch.Generator(parameter.device).manual_seed(
                        group["step"] * 1_000_003 + place
                    )
                for p, g, v in zip(*(tensor.split(self.chunk) for tensor in flat)):
                    exact = v if v.dtype == torch.float32 else v.float()
                    exact.mul_(alpha).addcmul_(g, g, value=1 - alpha)
                    p.addcdiv_(g, exact.sqrt().add_(eps), value=-lr)
                    if exact is not v:
                        v.copy_(randomly_rounded(exact, generator))


def randomly_rounded(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round x (fp32) to a bfloat16 neighbor at random, with expectation x. Overwrites x."""
    bits = x.view(torch.int32)  # bfloat16 is the upper half of the bits of fp32
    bits += torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits &= -(1 << 16)
    return x.bfloat16()


def state_bytes(part: Optimization) -> int:
    """Bytes of state for each parameter."""
    return 8 if part.optimizer == "adamw" else getattr(torch, part.second_moment).itemsize


def make_optimizer(part: Optimization, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """RMSProp as in the paper (alpha 0.99, eps 1e-8, no momentum), or AdamW; no weight decay."""
    if part.optimizer == "rmsprop":
        return RMSprop(parameters, lr=part.lr, second_moment=getattr(torch, part.second_moment))
    return torch.optim.AdamW(parameters, lr=part.lr, weight_decay=0.0, foreach=True)


def update(optimizer: torch.optim.Optimizer, lr: float, step: int) -> None:
    """Take an optimizer step, and clear the gradient. `step` selects the random bits of rounding."""
    for group in optimizer.param_groups:
        group |= {"lr": lr, "step": step}
    optimizer.step()
    optimizer.zero_grad()


def clip_gradient(model: Mistral, limit: float) -> Tensor:
    """Clip the gradient's norm, over all ranks, to `limit`; returns the norm before clipping."""
    return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
