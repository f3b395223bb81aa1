"Intervals against their slow twin, against themselves turned round, and against a truth that is known."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn.metrics import roc_auc_score

from patchcore_nb.aupro import region_weights
from patchcore_nb.closed_form import auroc_interval, auroc_variance, perfect_auroc_bound
from patchcore_nb.core import ArgumentError
from patchcore_nb.evaluation import evaluate
from patchcore_nb.intervals import bootstrap, compare, over_seeds
from patchcore_nb.resampling import is_metric, naive_metrics, resampled_metrics, resamples

BINS = 7


def tried(*args):
    "Run the test on 80 inputs, the same each time."
    return lambda f: settings(deadline=None, derandomize=True, max_examples=80)(given(*args)(f))


def count_rows(maps, masks, bins=BINS):
    "Good pixels, defective pixels, region weights: (B, bins) each, highest bin first, image by image and bin by bin."
    rows = np.zeros((3, len(maps), bins))
    for i, (m, k) in enumerate(zip(maps, masks)):
        regions = np.zeros(k.shape)
        regions[k] = region_weights(k[None])
        for j in range(bins):
            at = m == bins-1-j
            rows[:, i, j] = (at & ~k).sum(), (at & k).sum(), regions[at].sum()
    return list(rows)


@st.composite
def judged(draw):
    "A test set full of ties: (B,) scores, labels with both kinds, maps of seven levels, masks (empty for some of the defective ones), weights of five resamples."
    shape = draw(st.tuples(st.integers(2, 6), st.integers(1, 4), st.integers(1, 4)))
    maps, masks = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, BINS-1), fill=st.nothing())), draw(hnp.arrays(bool, shape))
    labels = draw(hnp.arrays(bool, shape[0]))
    labels[:2] = True, False
    scores = draw(hnp.arrays(np.float32, shape[0], elements=st.integers(-2, 2).map(float), fill=st.nothing()))
    return scores, labels, maps, masks & labels[:, None, None], resamples(labels, 5, draw(st.integers(0, 99)))


@tried(judged(), st.sampled_from([(0.3, 0.05), (1, 0.01), (0.3,)]))
def test_all_resamples_at_once_are_one_after_another(x, limits):
    scores, labels, maps, masks, weights = x
    fast = resampled_metrics(weights, scores, labels, count_rows(maps, masks), limits)
    slow = naive_metrics(weights, scores, labels, maps.astype(float), masks, limits)
    assert fast.keys() == slow.keys()
    for k in slow: assert fast[k] == pytest.approx(slow[k], abs=1e-9, nan_ok=True), k


@tried(judged())
def test_the_order_of_the_images_says_nothing(x):
    scores, labels, maps, masks, weights = x
    rows, turn = count_rows(maps, masks), np.random.default_rng(0).permutation(len(labels))
    fast = resampled_metrics(weights, scores, labels, rows)
    turned = resampled_metrics(weights[:, turn], scores[turn], labels[turn], [o[turn] for o in rows])
    for k in fast: assert turned[k] == pytest.approx(fast[k], abs=1e-9, nan_ok=True)


@tried(judged())
def test_the_value_is_evaluates(x):
    scores, labels, maps, masks, _ = x
    table = bootstrap(scores, labels, count_rows(maps, masks), n=3)
    wanted = {k: v for k, v in evaluate(scores, labels, maps, masks).items() if is_metric(k)}
    assert list(table.index) == list(wanted)
    for k, v in wanted.items(): assert table.value[k] == pytest.approx(v, abs=1e-9, nan_ok=True), k
    bounded = table.dropna(subset=['low'])
    assert (bounded.low <= bounded.high+1e-12).all() and (table.low.isna() == table.high.isna()).all()


@tried(judged())
def test_a_model_does_not_differ_from_itself(x):
    scores, labels, maps, masks, _ = x
    rows = count_rows(maps, masks)
    table = compare(scores, scores*2+1, labels, rows, rows, n=30).dropna(subset=['low'])
    assert (table[['difference', 'low', 'high']] == 0).all(axis=None) and (table.other_sign == 0.5).all()


def drawn(seed, n_good=20, n_bad=63, auroc=0.85):
    labels = np.arange(n_good+n_bad) >= n_good
    return np.random.default_rng(seed).normal(size=labels.size)+2**0.5*stats.norm.ppf(auroc)*labels, labels


def test_each_kind_is_drawn_in_its_number():
    labels = np.random.default_rng(0).random(50) > 0.7
    weights = resamples(labels, 4000)
    assert (weights[:, labels].sum(1) == labels.sum()).all() and (weights[:, ~labels].sum(1) == (~labels).sum()).all()
    for kind in (labels, ~labels):
        assert weights[:, kind].mean(0) == pytest.approx(np.ones(kind.sum()), abs=0.07) and weights[:, kind].var() == pytest.approx(1-1/kind.sum(), abs=0.03)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    "In the middle of the scale; 200 test sets, so two standard errors are three in a hundred."
    found = [resampled_metrics(resamples(labels, 300, i), scores, labels)['image_auroc'] for i, (scores, labels) in enumerate(map(drawn, range(200)))]
    ends, values = np.array([np.quantile(o, [0.025, 0.975]) for o in found]), [evaluate(*drawn(i))['image_auroc'] for i in range(200)]
    assert 0.88 <= ((ends[:, 0] <= 0.85) & (0.85 <= ends[:, 1])).mean() <= 0.99
    spread = np.std(values)                                       # how the metric varies over test sets, which the intervals estimate from one
    assert (ends[:, 1]-ends[:, 0]).mean()/2/1.96 == pytest.approx(spread, rel=0.15)
    deviations = [auroc_variance(*drawn(i))**.5 for i in range(200)]
    assert np.mean(deviations) == pytest.approx(spread, rel=0.15)

@pytest.mark.parametrize('truth', [0.85, 0.95, 0.98, 0.995])
def test_the_auroc_keeps_its_word_near_the_end(truth):
    "Where percentiles of resamples hold the truth in four test sets of five or fewer; 1,000 sets: two standard errors are 1.4 in a hundred."
    held = [low <= truth <= high for low, high in (auroc_interval(*drawn(i, auroc=truth)) for i in range(1000))]
    assert np.mean(held) > 0.9

@tried(judged())
def test_delongs_variance_is_that_of_pairs(x):
    scores, labels, *_ = x
    pairs = (scores[labels][:, None] > scores[~labels])+(scores[labels][:, None] == scores[~labels])/2
    if min(pairs.shape) < 2: return
    slow = sum(pairs.mean(1-i).var(ddof=1)/pairs.shape[i] for i in (0, 1))
    assert auroc_variance(scores, labels) == pytest.approx(slow, abs=1e-12)
    low, high = auroc_interval(scores, labels)
    assert np.isnan(low) == np.isnan(high) and (np.isnan(low) or 0 <= low <= pairs.mean() <= high <= 1)


@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize(('few', 'many'), [(4, 9), (10, 10), (1, 5)])
def test_the_bound_holds_at_the_worst_law(few, many, turned):
    "Images of the smaller kind on the wrong side of all others with the bound's probability: perfect order is then as rare as it should be."
    bound, rng, perfect = perfect_auroc_bound(few, many), np.random.default_rng(0), 0
    labels = np.arange(few+many) < few
    for _ in range(2000):
        scores = np.where(labels, np.where(rng.random(labels.size) < bound, 2, 0), 1)+rng.random(labels.size)/2
        if turned: scores, truth = -scores, ~labels
        else: truth = labels
        perfect += scores[truth].min() > scores[~truth].max()
    assert stats.binom(2000, 0.025).ppf(0.001) <= perfect <= stats.binom(2000, 0.025).ppf(0.999)
    assert perfect_auroc_bound(few, many) == perfect_auroc_bound(many, few) < perfect_auroc_bound(few+1, many+1)


def test_perfect_order_is_not_called_certain():
    scores, labels = np.arange(83.), np.arange(83) >= 20
    table = bootstrap(scores, labels)
    assert table.loc['image_auroc'].tolist() == [1, perfect_auroc_bound(20, 63), 1] and table.loc['image_ap':, 'low':].isna().all(axis=None)
    assert bootstrap(scores, labels, level=0.99).low['image_auroc'] < table.low['image_auroc'] < 0.84


def test_a_difference_is_the_resamples_of_both():
    (a, labels), (noise, _) = drawn(0), drawn(1)
    b = a+noise
    table, weights = compare(a, b, labels, n=500, seed=3), resamples(labels, 500, 3)
    d = {k: naive_metrics(weights, a, labels)[k]-v for k, v in naive_metrics(weights, b, labels).items()}
    for k, v in d.items():
        assert table.loc[k, ['low', 'high']].tolist() == pytest.approx(np.quantile(v, [0.025, 0.975]), abs=1e-9)
        sign = np.sign(table.difference[k])
        assert table.other_sign[k] == pytest.approx((sign*v < -1e-12).mean()+(abs(v) < 1e-12).mean()/2, abs=1e-9)
    whole = evaluate(a, labels), evaluate(b, labels)
    for k in d: assert table.loc[k, ['a', 'b', 'difference']].tolist() == pytest.approx([whole[0][k], whole[1][k], whole[0][k]-whole[1][k]])


def test_a_seed_is_the_draw_and_nothing_global():
    scores, labels = drawn(0)
    np.random.seed(0)
    first = bootstrap(scores, labels, n=50, seed=5)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    pd.testing.assert_frame_equal(bootstrap(scores, labels, n=50, seed=5), first)
    assert (np.random.get_state()[1] == before).all() and not bootstrap(scores, labels, n=50, seed=6).equals(first)


def test_thousands_of_bins():
    "A test set's size: 83 images, 3,000 bins, 1,000 resamples; the fast way's pixels are gone, so their number costs nothing."
    rng, (scores, labels) = np.random.default_rng(0), drawn(0)
    law = np.exp(-np.linspace(6, 0, 3000)); law /= law.sum()
    good, bad = rng.multinomial(50000, law, 83), rng.multinomial(900, law[::-1]**0.3/(law**0.3).sum(), 83)*labels[:, None]
    table = bootstrap(scores, labels, [good, bad, bad/900])
    assert (table.low < table.high).all() and table.value['pixel_auroc'] == pytest.approx(table.value['anomaly_pixel_auroc'], abs=0.01)
    weights = resamples(labels, 2)
    items = np.tile(np.arange(3000)[::-1], 2)                     # each bin once for its good pixels and once for its defective ones
    for i, w in enumerate(weights):
        want = roc_auc_score(np.repeat([0, 1], 3000), items, sample_weight=np.concatenate([w @ good, w @ bad]))
        assert resampled_metrics(weights, scores, labels, [good, bad, bad/900])['pixel_auroc'][i] == pytest.approx(want, abs=1e-9)


@tried(hnp.arrays(float, st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 3)), elements=st.floats(0, 1)))
def test_over_seeds_is_mean_and_deviation(values):
    reports = [pd.DataFrame(o, [f'c{i}' for i in range(values.shape[1])], [f'f{i}' for i in range(values.shape[2])]) for o in values]
    table = over_seeds(reports)
    for i, row in enumerate(table.index):
        for j in range(values.shape[2]): assert table.loc[row, [f'f{j}', f'f{j}_std']].tolist() == pytest.approx([values[:, i, j].mean(), np.std(values[:, i, j], ddof=1)], abs=1e-12)


@pytest.mark.parametrize(('call', 'words'), [
    (lambda s, l: bootstrap(s, l, n=0), 'n must be at least 1, got 0'), (lambda s, l: bootstrap(s, l, level=1), r'level must be in \(0, 1\), got 1'),
    (lambda s, l: bootstrap(s[:4], l), 'labels must have the shape'), (lambda s, l: bootstrap(s, l, [np.ones((83, 3))]*2), 'rows must be three of shape'),
    (lambda s, l: bootstrap(s, l, [np.ones((83, 3))]*3), 'rows of good images must have no defective pixels, got 20'),
    (lambda s, l: compare(s, s, l, [np.ones((83, 3))]*3), 'rows_a and rows_b must come together'), (lambda s, l: over_seeds([]), 'reports must not be empty')])
def test_bad_input_is_told(call, words):
    with pytest.raises(ArgumentError, match=words): call(*drawn(0))
