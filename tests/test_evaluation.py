"""The held-out task's small parts, by hand."""

import pytest

from spin.evaluation.heldout import extract, mean_and_stderr


def test_answers_are_the_last_match_or_the_whole_text():
    pattern = r"#### (-?[0-9.,]+)"
    assert extract("1 + 1 = 2\n#### 2", pattern) == "2"
    assert extract("#### 3\n#### -4.5 ", pattern) == "-4.5"
    assert extract("so it is 2", pattern) is None
    assert extract(" oh ", "") == "oh"


def test_standard_error_of_a_share_is_the_binomials():
    mean, error = mean_and_stderr([1, 0, 0, 1, 1])
    assert (mean, error) == (0.6, pytest.approx((0.6 * 0.4 / 4) ** 0.5))
