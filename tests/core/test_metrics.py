"""Metrics against values worked by hand on four tokens, a slow loop in Python's own floats, and invariants."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from r1q.core.errors import InputError
from r1q.core.metrics import (
    Estimate,
    Fidelity,
    Logits,
    TokenScores,
    log_softmax,
    mean,
    merge,
    quantile,
    sample_deviation,
    score,
    summarize,
)

# Logits that are logarithms of probabilities with small denominators, so that everything can be worked on paper.
REFERENCE = np.log(np.array([[8, 4, 2, 2], [1, 1, 1, 1]], dtype=np.float64) / [[16], [4]]).astype(np.float32)
MODEL = np.log(np.array([[4, 8, 2, 2], [1, 1, 1, 1]], dtype=np.float64) / [[16], [4]]).astype(np.float32)
TARGETS = np.array([1, 3])
# Row 0: p_ref = (1/2, 1/4, 1/8, 1/8), p = (1/4, 1/2, 1/8, 1/8): Σ p_ref ln(p_ref/p) = ½·ln 2 − ¼·ln 2 = ¼·ln 2. Row 1: 0.
ROUNDED = 2.0**-22  # a logit of at most 2.1 stored in float32 is off by at most 2^-23; two of them enter each number


def slow(logits: Logits, targets: list[int], reference: Logits) -> tuple[list[float], list[float], list[bool]]:
    """Return nll, kld and agreement with fsum and one number at a time."""
    nll, kld, same = [], [], []
    for row, base, target in zip(logits.tolist(), reference.tolist(), targets, strict=True):
        lse, lse_base = (math.log(math.fsum(math.exp(x - max(r)) for x in r)) + max(r) for r in (row, base))
        nll.append(lse - row[target])
        kld.append(
            math.fsum(math.exp(b - lse_base) * ((b - lse_base) - (x - lse)) for x, b in zip(row, base, strict=True))
        )
        same.append(row.index(max(row)) == base.index(max(base)))
    return nll, kld, same


def test_hand_worked_scores() -> None:
    scores = score(MODEL, TARGETS, REFERENCE)
    assert scores.kld is not None
    assert scores.same_top is not None
    np.testing.assert_allclose(scores.nll, [math.log(2), math.log(4)], atol=ROUNDED)
    np.testing.assert_allclose(scores.kld, [math.log(2) / 4, 0], atol=ROUNDED)
    assert scores.same_top.tolist() == [False, True]


def test_hand_worked_summary() -> None:
    summary = summarize(score(MODEL, TARGETS, REFERENCE))
    assert summary.tokens == 2
    # exp((ln 2 + ln 4)/2) = √8; with two samples the standard error is half their difference: ½·ln 2.
    assert summary.perplexity.value == pytest.approx(math.sqrt(8), abs=1e-5)
    assert summary.perplexity.error == pytest.approx(math.sqrt(8) * math.log(2) / 2, abs=1e-5)
    assert summary.kld is not None
    assert summary.kld.value == pytest.approx(math.log(2) / 8, abs=ROUNDED)
    assert summary.kld.error == pytest.approx(math.log(2) / 8, abs=ROUNDED)
    assert summary.kld_median == pytest.approx(math.log(2) / 8, abs=ROUNDED)
    assert summary.kld_max == pytest.approx(math.log(2) / 4, abs=ROUNDED)
    assert summary.top1 is not None
    assert (summary.top1.value, summary.top1.error) == (0.5, 0.5)


def test_hand_worked_perplexity_ratio_and_change_of_probability() -> None:
    # p = (1/2, 1/4, 1/8) and p_ref = (1/4, 1/4, 1/4): ln ratios −ln 2, 0, ln 2 have mean 0 and deviation ln 2: error ln 2/√3.
    nll, base = np.log([2.0, 4.0, 8.0]), np.log([4.0, 4.0, 4.0])
    summary = summarize(TokenScores(nll=nll), base)
    assert summary.perplexity_ratio is not None
    assert summary.perplexity_ratio.value == pytest.approx(1)
    assert summary.perplexity_ratio.error == pytest.approx(math.log(2) / math.sqrt(3))
    # Δp = 1/4, 0, −1/8: squares 16/256, 0, 4/256, mean 20/768; their deviation is √(((16−20/3)² + (20/3)² + (4−20/3)²)/2)/256.
    assert summary.rms_delta is not None
    rms = math.sqrt(20 / 768)
    assert summary.rms_delta.value == pytest.approx(rms)
    deviation = math.sqrt(((28 / 3) ** 2 + (20 / 3) ** 2 + (8 / 3) ** 2) / 2) / 256
    assert summary.rms_delta.error == pytest.approx(deviation / math.sqrt(3) / (2 * rms))


def test_the_same_probabilities_have_ratio_one_and_no_change() -> None:
    nll = np.linspace(0.1, 5, 50)
    summary = summarize(TokenScores(nll=nll), nll.copy())
    assert summary.perplexity_ratio == Estimate(value=1.0, error=0.0)
    assert summary.rms_delta == Estimate(value=0.0, error=0.0)


def test_the_ratio_is_known_better_than_either_perplexity_where_both_find_the_same_tokens_hard() -> None:
    rng = np.random.default_rng(5)
    base = rng.exponential(3, 400)
    summary = summarize(TokenScores(nll=base + rng.normal(0.01, 0.02, 400)), base)
    assert summary.perplexity_ratio is not None
    assert summary.perplexity_ratio.error is not None
    assert summary.perplexity.error is not None
    assert summary.perplexity_ratio.error / summary.perplexity_ratio.value < 0.02
    assert summary.perplexity.error / summary.perplexity.value > 0.1


def test_quantiles_by_hand() -> None:
    # 101 samples 0…100: place of the 90th percentile is 90; one deviation is √(101·0.09) = 3.015, so the 87th and the 93rd.
    samples = np.random.default_rng(3).permutation(np.arange(101.0))
    assert quantile(samples, 0.9) == Estimate(value=90.0, error=3.0)
    # Of 100 squares, place 98.01: 98² + 0.01·(99² − 98²); 1.0 deviation reaches the last, 99, and 97.
    found = quantile(np.arange(100.0) ** 2, 0.99)
    assert found.value == pytest.approx(9605.97)
    assert found.error == (99**2 - 97**2) / 2
    assert quantile(np.array([1.0, 2.0]), 0.99).error is None


def test_the_error_of_a_quantile_is_the_spread_of_repeated_experiments() -> None:
    rng = np.random.default_rng(4)
    experiments = rng.exponential(1, (400, 2000))
    found = [quantile(row, 0.9) for row in experiments]
    spread = float(np.std([one.value for one in found]))
    # Theory: √(q(1−q)/n)/density(q) = √(0.09/2000)/0.1.
    assert spread == pytest.approx(math.sqrt(0.09 / 2000) / 0.1, rel=0.15)
    assert float(np.mean([one.error for one in found if one.error is not None])) == pytest.approx(spread, rel=0.15)


def test_agreement_has_the_binomial_error_of_llama_perplexity() -> None:
    same = np.array([True] * 90 + [False] * 10)
    scores = TokenScores(nll=np.ones(100), kld=np.zeros(100), same_top=same)
    top1 = summarize(scores).top1
    assert top1 is not None
    assert top1.value == pytest.approx(0.9)
    assert top1.error == pytest.approx(math.sqrt(0.9 * 0.1 / 99))


def test_uniform_predictions_have_the_vocabulary_as_perplexity() -> None:
    summary = summarize(score(np.full((5, 7), 3.5, dtype=np.float32), np.arange(5)))
    assert summary.perplexity.value == pytest.approx(7)
    assert summary.perplexity.error == pytest.approx(0)
    assert (summary.kld, summary.top1) == (None, None)


@given(
    arrays(np.float32, (3, 5), elements=st.floats(-80, 80, width=32)),
    arrays(np.float32, (3, 5), elements=st.floats(-80, 80, width=32)),
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_equal_to_a_slow_loop_within_rounding(logits: Logits, reference: Logits, targets: list[int]) -> None:
    scores = score(logits, np.array(targets), reference)
    nll, kld, same = slow(logits, targets, reference)
    # Numbers up to 160 in float64, a handful of operations each: 160·2^-52·10 < 1e-12.
    np.testing.assert_allclose(scores.nll, nll, rtol=0, atol=1e-12)
    assert scores.kld is not None
    assert scores.same_top is not None
    np.testing.assert_allclose(scores.kld, kld, rtol=0, atol=1e-12)
    assert scores.same_top.tolist() == same
    assert min(kld) >= -1e-12


@given(arrays(np.float32, (2, 6), elements=st.floats(-50, 50, width=32)), st.integers(-100, 100))
def test_a_constant_added_to_logits_changes_nothing(logits: Logits, shift: int) -> None:
    moved = log_softmax(logits.astype(np.float64) + shift)
    np.testing.assert_allclose(moved, log_softmax(logits), atol=1e-12)
    np.testing.assert_allclose(np.exp(moved).sum(axis=1), 1, atol=1e-12)


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([[3e38, -3e38, 0.0]], dtype=np.float32)
    scores = score(logits, np.array([0]), logits)
    assert scores.kld is not None
    assert (scores.nll[0], scores.kld[0]) == (0.0, 0.0)


def test_itself_as_the_reference_has_no_divergence() -> None:
    logits = np.random.default_rng(1).normal(size=(70, 11)).astype(np.float32)
    summary = summarize(score(logits, np.zeros(70, dtype=np.int64), logits.copy()))
    assert (summary.kld_max, summary.top1 and summary.top1.value) == (0.0, 1.0)


def test_many_rows_equal_the_same_rows_one_at_a_time() -> None:
    rng = np.random.default_rng(2)
    logits, reference = rng.normal(size=(2, 100, 9)).astype(np.float32)
    targets = rng.integers(0, 9, 100)
    whole = score(logits, targets, reference)
    parts = merge(score(logits[i : i + 1], targets[i : i + 1], reference[i : i + 1]) for i in range(100))
    for left, right in ((whole.nll, parts.nll), (whole.kld, parts.kld), (whole.same_top, parts.same_top)):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("who", ["the model", "the reference"])
def test_a_logit_that_is_no_number_names_its_place(value: float, who: str) -> None:
    good = np.zeros((40, 4), dtype=np.float32)
    bad = good.copy()
    bad[35, 2] = value
    arrays_of = (bad, good) if who == "the model" else (good, bad)
    with pytest.raises(InputError, match=f"{who} gives a logit that is not a number at scored position 35"):
        score(arrays_of[0], np.zeros(40, dtype=np.int64), arrays_of[1])


def test_one_sample_has_no_error() -> None:
    assert mean(np.array([4.0])).error is None
    assert sample_deviation([4.0]) is None
    assert summarize(TokenScores(nll=np.array([0.0]))) == Fidelity(tokens=1, perplexity=mean(np.array([1.0])))


def test_sample_deviation_divides_by_n_less_one() -> None:
    assert sample_deviation([2, 4, 4, 4, 5, 5, 7, 9]) == pytest.approx(math.sqrt(32 / 7))


def test_what_does_not_belong_together_is_our_mistake() -> None:
    logits = np.zeros((2, 4), dtype=np.float32)
    with pytest.raises(ValueError, match="do not belong together"):
        score(logits, np.array([0]))
    with pytest.raises(ValueError, match="do not belong together"):
        score(logits, np.array([0, 1]), np.zeros((2, 5), dtype=np.float32))
    with pytest.raises(ValueError, match="no scores"):
        merge([])
    with pytest.raises(ValueError, match="some scores have a reference"):
        merge([score(logits, np.array([0, 1])), score(logits, np.array([0, 1]), logits)])
    with pytest.raises(ValueError, match="come together"):
        TokenScores(nll=np.zeros(1), kld=np.zeros(1))
    with pytest.raises(ValueError, match="one entry for each token"):
        TokenScores(nll=np.zeros(1), kld=np.zeros(2), same_top=np.zeros(2, dtype=np.bool_))
    with pytest.raises(ValueError, match="no samples"):
        mean(np.zeros(0))
    with pytest.raises(ValueError, match="no samples"):
        quantile(np.zeros(0), 0.5)
    with pytest.raises(ValueError, match="not of the same tokens"):
        summarize(TokenScores(nll=np.zeros(2)), np.zeros(3))
