"Thresholds keep what they promise: counted through, drawn thousands of times, and on real images."
import warnings
from fractions import Fraction
from math import floor, isinf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from patchcore_nb.conformal import (confidence_reached, conformal_threshold, expected_alarms, images_needed,
                                    naive_p_values, naive_rank, p_values, rate_law, threshold_rank)
from patchcore_nb.thresholds import PROMISES, calibrate

FEW = st.integers(-3, 3).map(float)                               # full of ties
ANY = st.floats(-1e6, 1e6, allow_nan=False)
SCORES = st.lists(st.one_of(FEW, ANY), min_size=1, max_size=60)
PERCENT = st.integers(1, 99)
SURE = st.none() | PERCENT.map(lambda p: p/100)                   # on average, or with a confidence


def tried(*args):
    "Run the test on 150 inputs, the same each time."
    return lambda f: settings(deadline=None, derandomize=True, max_examples=150)(given(*args)(f))


@tried(st.lists(st.one_of(FEW, ANY), min_size=2, max_size=60), PERCENT)
def test_the_average_rule_keeps_its_promise(scores, percent):
    "Each score in turn as the next one: of n, at most floor(n alpha) raise an alarm, which is the proof."
    n, alpha = len(scores), percent/100
    alarms = sum(s > conformal_threshold(scores[:i]+scores[i+1:], alpha) for i, s in enumerate(scores))
    assert alarms <= floor(n*Fraction(percent, 100))


@pytest.mark.parametrize('percent', range(1, 100))
def test_the_average_rule_is_no_stricter_than_it_must_be(percent):
    alpha, n = percent/100, 100
    scores = np.random.default_rng(percent).permutation(n)
    assert sum(scores[i] > conformal_threshold(np.delete(scores, i), alpha) for i in range(n)) == percent


@tried(st.integers(0, 300), PERCENT, PERCENT)
def test_the_rank_is_the_exact_tails(n, percent, sure): assert threshold_rank(n, percent/100, sure/100) == naive_rank(n, percent/100, sure/100)


@tried(st.integers(1, 300), PERCENT, PERCENT)
def test_the_rank_is_the_largest_that_the_beta_law_allows(n, percent, sure):
    rank, alpha = threshold_rank(n, percent/100, sure/100), percent/100
    if rank: assert stats.beta(*rate_law(n, alpha, sure/100)).cdf(alpha) >= sure/100-1e-9
    if rank < n: assert stats.beta(rank+1, n-rank).cdf(alpha) < sure/100+1e-9


@tried(PERCENT, SURE)
def test_images_needed_is_the_least(percent, sure):
    enough = images_needed(percent/100, sure)
    assert threshold_rank(enough, percent/100, sure) == 1 or enough == 1
    assert not isinf(conformal_threshold(range(enough), percent/100, sure))
    assert enough == 1 or isinf(conformal_threshold(range(enough-1), percent/100, sure))


@tried(SCORES, PERCENT, PERCENT, SURE)
def test_a_lower_rate_takes_a_higher_threshold(scores, one, two, sure):
    low, high = sorted([one/100, two/100])
    assert conformal_threshold(scores, low, sure) >= conformal_threshold(scores, high, sure)
    assert images_needed(low, sure) >= images_needed(high, sure)


@tried(SCORES, PERCENT, PERCENT, PERCENT)
def test_more_confidence_takes_a_higher_threshold(scores, percent, one, two):
    low, high = sorted([one/100, two/100])
    assert conformal_threshold(scores, percent/100, high) >= conformal_threshold(scores, percent/100, low)
    assert images_needed(percent/100, high) >= images_needed(percent/100, low)


@tried(SCORES, SCORES, PERCENT, SURE)
def test_p_values_say_who_raises_an_alarm(scores, good, percent, sure):
    p = p_values(scores, good)
    assert (p == naive_p_values(scores, good)).all() and (p >= 1/(len(good)+1)).all() and (p <= 1).all()
    order = np.argsort(scores)
    assert (np.diff(p[order]) <= 0).all()                         # a higher score is no likelier
    alarms = np.array(scores) > conformal_threshold(good, percent/100, sure)
    rank = threshold_rank(len(good), percent/100, sure)
    assert (alarms == (p <= rank/(len(good)+1))).all()
    if sure is None: assert (alarms == (p <= percent/100)).all()


@tried(SCORES, st.randoms(use_true_random=False))
def test_the_order_of_the_images_says_nothing(scores, random):
    turned = random.sample(scores, len(scores))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert calibrate(scores, scores, 0.1) == calibrate(turned, turned, 0.1)


def test_the_true_rates_follow_the_beta_law():
    """Uniform scores, whose true rate is one less the threshold; 2,000 draws of 150.

    A draw keeps the target with exactly the probability that the Beta law has below it, so the number that do is binomial: no fewer, or the
    promise is broken, and no more, or the threshold is stricter than it must be. (It is a fixed seed; the margins are for other ones.)"""
    n, alpha, rng = 150, 0.05, np.random.default_rng(3)
    draws = rng.random((2000, n))
    for sure in (None, 0.9):
        rates = np.array([1-conformal_threshold(o, alpha, sure) for o in draws])
        law = stats.beta(*rate_law(n, alpha, sure))
        low, high = stats.binom(2000, law.cdf(alpha)).interval(0.999)
        assert low <= (rates <= alpha).sum() <= high and stats.kstest(rates, law.cdf).pvalue > 0.01
        assert abs(rates.mean()-law.mean()) < 4*law.std()/2000**.5
        assert law.cdf(alpha) >= (sure or 0) and (sure or law.mean() <= alpha)
    assert confidence_reached(n, alpha) == pytest.approx(stats.beta(*rate_law(n, alpha)).cdf(alpha), abs=1e-12)


def test_ties_only_lower_the_rate():
    law = stats.poisson(3)                                        # a score in a dozen values
    draws = law.rvs((2000, 150), random_state=0)
    for sure in (None, 0.9):
        rates = law.sf([conformal_threshold(o, 0.05, sure) for o in draws])
        exact = stats.beta(*rate_law(150, 0.05, sure))
        assert rates.mean() < exact.mean() and all((rates <= o).mean() >= exact.cdf(o)-0.02 for o in np.linspace(0.01, 0.12, 12))


@pytest.mark.parametrize(('n', 'm', 'sure'), [(19, 5, None), (150, 1000, 0.9), (60, 200, 0.5)])
def test_expected_alarms_is_the_shortest_way_from_quantile_to_quantile(n, m, sure):
    law = stats.betabinom(m, *rate_law(n, 0.05, sure))
    low, high = expected_alarms(n, m, 0.05, sure)
    assert law.cdf(low-1) < 0.005 <= law.cdf(low) and law.cdf(high-1) < 0.995 <= law.cdf(high)
    drawn = np.random.default_rng(0).random((4000, n+m))
    alarms = np.array([(o[n:] > conformal_threshold(o[:n], 0.05, sure)).sum() for o in drawn])
    assert ((low <= alarms) & (alarms <= high)).mean() >= stats.binom(4000, 0.99).ppf(0.001)/4000


@pytest.mark.parametrize(('n', 'held_out', 'promise', 'words'), [
    (60, True, 'confidence', None), (44, True, 'average', 'too few to keep 0.05 false alarms with a confidence of 0.9, which takes 45'),
    (18, True, None, '18 held-out images are too few for a threshold at 0.05 false alarms, which takes 19: the model has none'),
    (60, False, 'approximate', None), (19, False, 'approximate', None), (18, False, None, None)])
def test_calibrate_says_what_it_can_promise(n, held_out, promise, words):
    scores, peaks = np.random.default_rng(n).random((2, n))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        found = calibrate(scores, peaks, 0.05, 0.9, held_out)
    threshold, of_map, got = found.threshold, found.map_threshold, found.promise
    assert got == promise and [str(o.message) for o in told if words and words in str(o.message)] == [str(o.message) for o in told] and len(told) == bool(words)
    sure = 0.9 if promise == 'confidence' else None
    if promise: assert promise in PROMISES and (threshold, of_map) == (conformal_threshold(scores, 0.05, sure), conformal_threshold(peaks, 0.05, sure))
    else: assert threshold is None and of_map is None


@pytest.fixture(scope='module')
def bottles(testdata)->tuple[np.ndarray, np.ndarray]: # (139,) in the order of the files; (20,)
    "Scores of good bottles that a model fitted on every third one has not seen: of the training folder, and of the test folder."
    from patchcore_nb import PatchCore
    paths, test = (sorted((testdata/'data'/'mvtec256'/'bottle'/o/'good').glob('*.png')) for o in ('train', 'test'))
    fitted = paths[::3]
    model = PatchCore('resnet18', ratio=.01, seed=0, weights_dir=testdata/'weights', batchnorm='trained').fit(fitted)
    scores = model.predict([o for o in paths if o not in fitted]+test).image_scores.numpy()
    return scores[:len(paths)-len(fitted)], scores[len(paths)-len(fitted):]


@pytest.mark.parametrize('sure', [None, 0.9])
def test_alarms_on_real_images(bottles, sure):
    """500 random splits of one pool of real scores: 80 calibrate, the other 58 may raise a false alarm.

    The pool is finite and the splits share it, but nothing is lost by that. Without ties only ranks matter, and a random split gives every
    set of 80 ranks of 138 the same chance, whatever the scores are. With rank a from the top, x alarms mean that the a-th highest of the
    80 is number x+a of the pool, which has probability C(x+a-1, a-1) C(138-x-a, 80-a)/C(138, 80): a negative hypergeometric law, and the
    same as the beta-binomial one with (58, a, 81-a). (There too all orders of calibration and further scores are equally likely, and
    only the order counts.) The splits are drawn independently, so given the pool the 500 numbers of alarms are independent and each
    follows that law exactly: the count inside the band is binomial, the mean has the standard error of an independent mean, and a
    chi-squared test may be done. That checks ranks, ties and the band; that bottles come from one process, the next test asks.
    (Two of the 139 images have the same score, and one of them is left out: a tie could only lower the count.)"""
    pool, n, alpha, rng = np.unique(bottles[0]), 80, 0.05, np.random.default_rng(0)
    m = len(pool)-n
    assert (len(bottles[0]), len(pool)) == (139, 138)
    splits = [rng.permutation(pool) for _ in range(500)]
    alarms = np.array([(o[n:] > conformal_threshold(o[:n], alpha, sure)).sum() for o in splits])
    law = stats.betabinom(m, *rate_law(n, alpha, sure))
    low, high = expected_alarms(n, m, alpha, sure)
    inside = ((low <= alarms) & (alarms <= high)).sum()
    fewest, most = stats.binom(500, law.cdf(high)-law.cdf(low-1)).interval(0.999)
    assert fewest <= inside <= most
    assert abs(alarms.mean()-law.mean()) < 3.3*law.std()/500**.5
    tops = np.arange(7)                                           # 0 to 5 alarms, and more
    seen, wanted = np.bincount(alarms.clip(max=6), minlength=7), 500*np.append(law.pmf(tops[:-1]), law.sf(5))
    assert stats.chisquare(seen, wanted).pvalue > 0.001
    rank = rate_law(n, alpha, sure)[0]
    assert law.pmf(3) == pytest.approx(stats.nhypergeom(len(pool), m, rank).pmf(3), abs=1e-9) # the same law


def test_real_images_are_of_one_kind(bottles):
    "What random splits cannot tell: the first 80 files calibrate, and the later ones and the test folder's good ones raise as many false alarms as foretold."
    train, test = bottles
    for further in (train[80:], test):
        for sure in (None, 0.9):
            low, high = expected_alarms(80, len(further), 0.05, sure)
            assert low <= (further > conformal_threshold(train[:80], 0.05, sure)).sum() <= high
        assert stats.ks_2samp(train[:80], further).pvalue > 0.01
