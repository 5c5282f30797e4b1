"""The losses against hand calculations, the paper's theory and TRL's DPOTrainer."""

import math

import pytest
import torch

from spin.config import Train
from spin.loss import LOSSES, spin_loss, spin_step
from spin.packing import Item, pack, response_logps, response_places
from tests.helpers import pairs, reference, small_model


def test_logistic_loss_of_a_pair_worked_by_hand():
    # margin = (-10 - -12) - (-9 - -8) = 3; t = 0.5 · 3 = 1.5; log(1 + e^-1.5) = 0.2014132779827524
    loss = spin_loss(*(torch.tensor([v], dtype=torch.float64) for v in (-10.0, -9.0, -12.0, -8.0)), beta=0.5)
    assert loss.item() == pytest.approx(0.2014132779827524, abs=1e-12)


def ell(x):
    """log(1 + e^-x)"""
    return math.log(1 + math.exp(-x))


# λ = 1/2, μ = 3, r = 2 of a response of 4 tokens, r' = -1 and 1/2 of responses of 2 and 5: each pair's loss.
BY_HAND = {
    "logistic": (ell(1.5), ell(0.75)),
    "hinge": (0, 0.25),
    "exponential": (math.exp(-1.5), math.exp(-0.75)),
    "correlation": (-0.5, 0.25),
    "ipo": (1, 0.0625),
    "per-token": (ell(0.5), ell(0.2)),  # 2/4 + 1/2 = 1 and 2/4 - 1/10 = 0.4, times λ
    "sppo": (1 + 0, 1 + 2.25),  # 1/(2λ) = 1: (2 - 1)² + (-1 + 1)² and (2 - 1)² + (0.5 + 1)²
    # βr = 1, βr' = -1/2 and 1/4; b = -log 3, so e^-(βr + b) = 3e^-1 and e^(βr' + b) = e^βr' / 3
    "gsil": tuple(math.log(1 + 3 / math.e) + math.log(1 + math.exp(x) / 3) for x in (-0.5, 0.25)),
    "space": tuple(math.log(1 + 3 / math.e) + 3 * math.log(1 + math.exp(x) / 3) for x in (-0.5, 0.25)),
    "t-spin": (ell(1.5) + 3 * ell(-0.75),),  # the second one is the base model's
}


@pytest.mark.parametrize("kind", LOSSES)
def test_each_loss_of_two_negatives_worked_by_hand(kind):
    ratios = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    opponent = torch.tensor([[-9.0, -7.0, -8.0]], dtype=torch.float64)
    policy, lengths = opponent + ratios, torch.tensor([[4, 2, 5]])
    logps = (policy[:, 0], policy[:, 1:], opponent[:, 0], opponent[:, 1:])
    loss = spin_loss(*logps, beta=0.5, kind=kind, mu=3.0, lengths=lengths)
    expected = sum(BY_HAND[kind]) / len(BY_HAND[kind])
    assert loss.tolist() == [pytest.approx(expected, abs=1e-12)]
    part = Train(loss=kind, beta=0.5, mu=3.0)  # a step of four prompts, of which this is one
    share, metrics = spin_step(policy.flatten(), opponent, torch.tensor([[0, 1, 2]]), lengths, 4, part)
    assert share.item() == pytest.approx(expected / 4, abs=1e-12)
    margins = [3] if kind == "t-spin" else [3, 1.5]
    expected = sum(margins) / len(margins)
    assert (4 * metrics["margin"]).item() == pytest.approx(expected, abs=1e-12)
    assert (4 * metrics["reward_real"]).item() == 1 and (4 * metrics["accuracy"]).item() == 1
    assert (4 * metrics["reward_generated"]).item() == pytest.approx(0.5 * (2 - expected), abs=1e-12)


# At r = r' = 0, with λ = 5 and μ = 3.
AT_FIRST = {
    "logistic": math.log(2),
    "ipo": 0.25,
    "per-token": math.log(2),
    "sppo": 2 * 0.1**2,
    "gsil": math.log(4) + math.log(4 / 3),
    "space": math.log(4) + 3 * math.log(4 / 3),
    "t-spin": 4 * math.log(2),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_policy_equal_to_opponent_gives_the_loss_at_zero(kind):
    real, generated = torch.randn(5) * 30, torch.randn(5, 2) * 30
    lengths = torch.randint(1, 9, (5, 3))
    loss = spin_loss(real, generated, real, generated, beta=5.0, kind=kind, mu=3.0, lengths=lengths)
    torch.testing.assert_close(loss, torch.full((5,), AT_FIRST.get(kind, 1.0)))


def test_large_margins_stay_finite():
    t = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = spin_loss(t, torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=1.0)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([0.0, 1e4]))
    torch.testing.assert_close(t.grad, torch.tensor([0.0, -1.0]))


def test_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="sigmoid.*logistic, hinge"):
        spin_loss(*torch.zeros(4, 1), beta=1.0, kind="sigmoid")
    with pytest.raises(ValueError, match='"per-token" needs lengths'):
        spin_loss(*torch.zeros(4, 1), beta=1.0, kind="per-token")


def tabular_minimum(p_data, p_opponent, beta, kind="logistic", mu=1.0):
    """Minimise E_{y ~ data, y' ~ opponent} spin_loss over a softmax policy, the expectation taken exactly."""
    opponent = p_opponent.log()
    logits = opponent.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        policy = logits.log_softmax(-1)
        y, other = torch.cartesian_prod(torch.arange(len(policy)), torch.arange(len(policy))).T
        losses = spin_loss(policy[y], policy[other], opponent[y], opponent[other], beta, kind, mu)
        loss = (p_data[y] * p_opponent[other] * losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.softmax(-1).detach(), closure().item()


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_tabular_policy_reaches_the_closed_form_of_the_next_opponent(beta):
    # p_θt+1 ∝ p_θt · (p_data / p_θt)^(1/λ)
    torch.manual_seed(0)
    p_data, p_opponent = torch.randn(2, 6, dtype=torch.float64).softmax(-1)
    reached, _ = tabular_minimum(p_data, p_opponent, beta)
    expected = p_opponent * (p_data / p_opponent) ** (1 / beta)
    torch.testing.assert_close(reached, expected / expected.sum(), atol=1e-5, rtol=0)


def test_tabular_policy_stays_where_opponent_is_the_data():
    p_data = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reached, loss = tabular_minimum(p_data, p_data, 1.0)
    torch.testing.assert_close(reached, p_data, atol=1e-6, rtol=0)
    assert loss == pytest.approx(math.log(2), abs=1e-10)


@pytest.mark.parametrize("kind, mu", [("gsil", 1.0), ("space", 0.3), ("space", 1.0), ("space", 4.0)])
def test_density_ratio_losses_have_their_minimum_at_the_data(kind, mu):
    """Noise contrastive estimation with μ samples of the noise to one of the data (arXiv 1206.6426)."""
    torch.manual_seed(0)
    p_data, p_opponent = torch.randn(2, 6, dtype=torch.float64).softmax(-1)
    reached, _ = tabular_minimum(p_data, p_opponent, 1.0, kind, mu)
    torch.testing.assert_close(reached, p_data, atol=1e-5, rtol=0)


def test_gradient_at_the_opponent_is_half_beta_times_the_sft_difference():
    logps = torch.zeros(4, 1, requires_grad=True)
    spin_loss(*logps, beta=0.1).sum().backward()
    torch.testing.assert_close(logps.grad[:2], torch.tensor([[-0.05], [0.05]]))


# Functions of r - r' alone. The others pull at r and r' one by one, equal or not.
MARGIN_LOSSES = ("logistic", "hinge", "exponential", "correlation", "ipo", "per-token")


def gradients(items: list[Item], kind: str) -> list[torch.Tensor]:
    """The step's gradient; policy and reference differ."""
    policy, packed = small_model(0), pack(items)
    with torch.no_grad():
        reference = response_logps(small_model(1), packed).view(len(items), -1)
    part = Train(loss=kind, beta=0.3)
    loss, _ = spin_step(response_logps(policy, packed), reference, *response_places(items), len(items), part)
    loss.backward()
    return [weight.grad for weight in policy.parameters()]


@pytest.mark.parametrize("kind", MARGIN_LOSSES)
def test_identical_responses_have_exactly_no_gradient_and_others_keep_theirs(kind):
    few = pairs(5)
    assert all((g == 0).all() for g in gradients([Item(i.prompt, i.responses[:1] * 3) for i in few], kind))
    mixed = gradients([Item(i.prompt, (*i.responses, i.responses[0])) for i in few], kind)
    for half, whole in zip(mixed, gradients(few, kind)):
        assert (half - whole / 2).norm() <= 1e-5 * whole.norm()


EOS = 2
# What TRL has of ours. Its "ipo" divides by the lengths first; its "bco_pair" has no running mean.
TRL = {"logistic": "sigmoid", "hinge": "hinge", "per-token": "sigmoid_norm", "sppo": "sppo_hard"}
TRL |= {"gsil": "bco_pair"}


def trl_trainer(items: list[Item], kind: str, beta: float, directory):
    """DPOTrainer for these pairs, in fp32; its policy and its reference have other weights."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({"</s>" if i == EOS else f"t{i}": i for i in range(97)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="t0")

    def row(item):  # DPOTrainer appends the EOS
        texts = (item.prompt, *(response[:-1] for response in item.responses))
        return dict(zip(("prompt", "chosen", "rejected"), ("".join(f" t{i}" for i in ids) for ids in texts)))

    settings = DPOConfig(
        str(directory),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        beta=beta,
        loss_type=[TRL[kind]],
    )
    models_ = (reference(small_model(seed)) for seed in (0, 1))
    data = Dataset.from_list([row(item) for item in items])
    return DPOTrainer(*models_, settings, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("kind", TRL)
def test_loss_and_gradients_on_fixed_pairs_are_those_of_trls_dpo(kind, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")  # TRL then sends no telemetry
    items = [Item(i.prompt, tuple([*response, EOS] for response in i.responses)) for i in pairs(8)]
    assert len({len(item.prompt) for item in items}) > 4
    trainer = trl_trainer(items, kind, 0.3, tmp_path)
    rows = list(trainer.train_dataset)
    assert [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in rows] == [
        (item.prompt, *item.responses) for item in items
    ]
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    expected.backward()

    policy, packed = small_model(0), pack(items)
    with torch.no_grad():
        opponent = response_logps(small_model(1), packed).view(-1, 2)
    logps = response_logps(policy, packed)
    part = Train(loss=kind, beta=0.3)
    loss, metrics = spin_step(logps, opponent, *response_places(items), len(items), part)
    loss.backward()
    assert metrics["margin"].abs() > 0.1  # policy and opponent differ
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    theirs = dict(trainer.model.named_parameters())
    for name, weight in policy.named_parameters():
        assert (weight.grad - theirs[name].grad).norm() <= 1e-5 * theirs[name].grad.norm(), name
