"""RMSProp in chunks against torch's, and the bf16 second moment's rounding."""

import pytest
import torch

from spin.engine.optimizer import RMSprop, randomly_rounded


def trajectory(make, steps=30, **settings):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (3,), (11, 4))]
    optimizer = make(weights, lr=1e-2, **settings)
    for step in range(steps):
        for weight in weights:
            weight.grad = torch.randn_like(weight) * (1 + step % 3)
        optimizer.param_groups[0]["step"] = step
        optimizer.step()
    return weights, optimizer


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_steps_are_torchs_to_the_bit_in_any_chunk(chunk):
    def make(weights, lr):
        ours = RMSprop(weights, lr)
        ours.chunk = chunk
        return ours

    theirs, _ = trajectory(lambda weights, lr: torch.optim.RMSprop(weights, lr, alpha=0.99, eps=1e-8))
    assert all(torch.equal(a, b) for a, b in zip(trajectory(make)[0], theirs))


def test_rounding_is_to_a_neighbour_and_right_on_average():
    exact = torch.tensor([1.0, 1.001, 1.007, 3.3e-9, 0.0, 7.77e20])
    draws = torch.stack(
        [randomly_rounded(exact.clone(), torch.Generator().manual_seed(i)) for i in range(20_000)]
    ).float()
    for i, value in enumerate(exact.tolist()):
        below = torch.tensor(value).view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32).item()
        above = torch.tensor(below).view(torch.int32).add(1 << 16).view(torch.float32).item()
        assert set(draws[:, i].tolist()) <= {below, above}
        share = (value - below) / (above - below)  # of draws that must be rounded up
        assert (draws[:, i] == above).double().mean() == pytest.approx(share, abs=5 * 0.5 / 20_000**0.5)


def test_a_bf16_second_moment_converges_where_rounding_to_the_nearest_stays():
    # v = 1, g² = 1.3: a step moves v by 0.3 %, less than half the distance to its bf16 neighbour.
    weights = [torch.nn.Parameter(torch.zeros(4096))]
    optimizer = RMSprop(weights, lr=0.0, second_moment=torch.bfloat16)
    nearest = torch.ones((), dtype=torch.bfloat16)
    for step in range(600):
        weights[0].grad = torch.full((4096,), 1.3**0.5)
        optimizer.param_groups[0]["step"] = step
        if step == 0:
            optimizer.state[weights[0]]["square_avg"] = torch.ones(4096, dtype=torch.bfloat16)
        optimizer.step()
        nearest = (nearest.float() * 0.99 + 0.013).bfloat16()
    moment = optimizer.state[weights[0]]["square_avg"].double()
    assert nearest == 1.0
    assert moment.mean() == pytest.approx(1.3, abs=2e-3)
    assert moment.std() / 1.3 < 2**-8 / (1 - 0.99**2) ** 0.5  # the docstring's bound on the noise


def test_the_random_bits_depend_on_step_and_place_alone():
    one, other = (trajectory(RMSprop, second_moment=torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0]))
    state = [
        optimizer.state[weight]["square_avg"] for weights, optimizer in (one, other) for weight in weights
    ]
    assert state[0].dtype == torch.bfloat16 and torch.equal(state[0], state[3])
