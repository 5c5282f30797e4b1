"""benchmarks/negatives.py: the pairs it compares with packed prompts, and what its check refuses."""

import pytest
import torch

from benchmarks.negatives import Side, check, prompts_with, separated
from model.weights import save_model
from spin.engine.distributed import ranks, sharded_model
from spin.packing import Item
from tests.helpers import pairs, small_model


def test_a_prompt_with_several_responses_and_its_pairs_by_hand():
    drawn = [Item([i], ([10 + i], [20 + i])) for i in range(4)]
    items = prompts_with(drawn, prompts=2, negatives=2)
    assert items == [Item([0], ([10], [20], [22])), Item([1], ([11], [21], [23]))]
    split, logps = separated(items, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert split == [Item([i], ([10 + i], [j])) for i, j in ((0, 20), (0, 22), (1, 21), (1, 23))]
    assert logps.tolist() == [[1, 2], [1, 3], [4, 5], [4, 6]]


def test_packed_responses_take_the_step_of_separate_pairs_and_another_step_is_refused(tmp_path):
    items, reference = pairs(5, responses=4), torch.randn(5, 4)
    save_model(small_model(), tmp_path / "model", torch.float32)
    with ranks() as group:
        model = sharded_model(tmp_path / "model", group, torch.float32)
        split, of_pairs = separated(items, reference)
        sides = [(items, reference), (split, of_pairs), (split, of_pairs + torch.tensor([0.0, 1.0]))]
        packed, separate, other = (Side(model, *side, "float32", group) for side in sides)
        one, two, apart = check({"packed": packed, "separate": separate}, model, "float32")
        assert one == pytest.approx(two, abs=1e-5) and apart < 1e-4
        with pytest.raises(SystemExit, match="not the same step"):
            check({"packed": packed, "separate": other}, model, "float32")
