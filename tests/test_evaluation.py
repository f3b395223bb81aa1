"Evaluation against scikit-learn, against its own slow twins, and against itself turned round, on inputs that hypothesis thinks up."
import os
from math import isnan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.integrate import trapezoid
from sklearn import metrics

from patchcore_nb import evaluation, intervals, pixels
from patchcore_nb.auc import area, auroc, auroc_pairs, average_precision, counts, f1max, roc_curve, tied
from patchcore_nb.aupimo import aupimo_curves, aupimo_images
from patchcore_nb.aupro import aupro, aupro_regions, pro_curve, region_weights
from patchcore_nb.bins import bin_floor, centre_of, slack, to_bins
from patchcore_nb.core import ArgumentError
from patchcore_nb.evaluation import evaluate, no_pixel_metrics, seg_f1
from patchcore_nb.kinds import by_kind
from patchcore_nb.pixels import Tally, pixel_rows

FEW = st.integers(-3, 3).map(float)                               # full of ties
ANY = st.floats(-1e6, 1e6, allow_nan=False)
WIDE = st.floats(allow_nan=False, allow_infinity=False, width=32) # up to the ends of float32, subnormal numbers and both zeros


def tried(*args):
    "Run the test on 150 inputs, the same each time."
    return lambda f: settings(deadline=None, derandomize=True, max_examples=150)(given(*args)(f))


@st.composite
def scored(draw, both=True):
    "Scores and labels, by default with both classes."
    n = draw(st.integers(2, 40))
    dtype, values = draw(st.sampled_from([(np.float32, FEW), (np.float64, FEW), (np.float64, ANY), (np.float32, WIDE)]))
    scores, labels = draw(hnp.arrays(dtype, n, elements=values, fill=st.nothing())), draw(hnp.arrays(bool, n))
    scores = tied(scores) # which scikit-learn would tell apart
    if both: labels[:2] = True, False
    return scores, labels


@st.composite
def pictured(draw):
    "Maps and masks, small enough for the loop over regions; any mask, full and empty ones too."
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
    dtype, values = draw(st.sampled_from([(np.float32, FEW), (np.float64, ANY)]))
    return draw(hnp.arrays(dtype, shape, elements=values, fill=st.nothing())), draw(hnp.arrays(bool, shape))


@tried(scored())
def test_auroc_is_scikit_learns_and_the_game(x):
    scores, labels = x
    assert auroc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-9)
    assert auroc(scores, labels) == pytest.approx(auroc_pairs(scores, labels), abs=1e-12)


@tried(scored())
def test_auroc_knows_order_only(x):
    scores, labels = x
    ranks = np.unique(scores, return_inverse=True)[1]
    assert auroc(ranks, labels) == auroc(scores, labels)
    assert auroc(-scores, labels) == pytest.approx(1-auroc(scores, labels), abs=1e-12)
    assert auroc(scores, ~labels) == pytest.approx(1-auroc(scores, labels), abs=1e-12)


@tried(scored())
def test_roc_curve_is_scikit_learns(x):
    scores, labels = x
    fpr, tpr = roc_curve(scores, labels)
    theirs = metrics.roc_curve(labels, scores, drop_intermediate=False)[:2]    # a point for each threshold, where ours has the corners
    assert set(zip(fpr.round(9), tpr.round(9))) <= set(zip(*(o.round(9) for o in theirs)))
    assert metrics.auc(fpr, tpr) == pytest.approx(auroc(scores, labels), abs=1e-12)
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all() and (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)


@tried(scored())
def test_average_precision_is_scikit_learns(x):
    scores, labels = x
    assert average_precision(scores, labels) == pytest.approx(metrics.average_precision_score(labels, scores), abs=1e-9)


@tried(scored())
def test_no_threshold_beats_f1max(x):
    scores, labels = x
    f1, threshold = f1max(scores, labels)
    each = {t: metrics.f1_score(labels, scores >= t) for t in np.unique(scores)}
    assert f1 == pytest.approx(max(each.values()), abs=1e-12) == pytest.approx(each[threshold], abs=1e-12)


@tried(scored(both=False), st.booleans())
def test_one_class(x, defective):
    scores, _ = x
    labels = np.full(len(scores), defective)
    assert isnan(auroc(scores, labels)) and isnan(auroc_pairs(scores, labels)) and np.isnan(roc_curve(scores, labels)).all()
    if defective: assert average_precision(scores, labels) == f1max(scores, labels)[0] == 1
    else: assert isnan(average_precision(scores, labels)) and np.isnan(f1max(scores, labels)).all()


@tried(pictured(), st.sampled_from([0.01, 0.05, 0.3, 0.77, 1.]))
def test_aupro_is_the_loop_over_regions(x, limit):
    maps, masks = x
    assert aupro(maps, masks, limit) == pytest.approx(aupro_regions(maps, masks, limit), abs=1e-9, nan_ok=True)


@tried(pictured())
def test_aupro_of_single_pixels_is_the_pixel_auroc(x):
    maps, masks = x
    lone = np.zeros(masks.shape, bool)
    lone[:, ::2, ::2] = masks[:, ::2, ::2]                                    # no two of them touch
    assert region_weights(lone) == pytest.approx(np.ones(lone.sum()))
    assert aupro(maps, lone, 1.) == pytest.approx(auroc(maps, lone), abs=1e-12, nan_ok=True)


def test_pixels_that_touch_by_a_corner_are_one_region():
    masks = np.array([[[1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 1]], [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]], bool)
    assert region_weights(masks).tolist() == [1/3, 1, 1/3, 1/3, 1, 1]


@tried(pictured())
def test_pro_curve_has_the_area(x):
    maps, masks = x
    fpr, pro = pro_curve(maps, masks)
    if not masks.any() or masks.all(): assert np.isnan(fpr).all() and np.isnan(pro).all()
    else: assert metrics.auc(fpr, pro) == pytest.approx(aupro(maps, masks, 1.), abs=1e-12)


@tried(pictured())
def test_evaluate_agrees_with_its_parts(x):
    maps, masks = x
    defect, image_scores = masks.any((1, 2)), maps.max((1, 2))
    got = evaluate(torch.from_numpy(image_scores), torch.from_numpy(defect), torch.from_numpy(maps), torch.from_numpy(masks), (.3, .05, 1), 0.)
    (best, at), (pixel_best, pixel_at) = f1max(image_scores, defect), f1max(maps, masks)
    each, alone = aupimo_images(maps, masks), (maps[defect], masks[defect])
    want = dict(image_auroc=auroc(image_scores, defect), image_ap=average_precision(image_scores, defect), image_f1max=best, image_f1max_threshold=at,
                pixel_auroc=auroc(maps, masks), pixel_ap=average_precision(maps, masks), pixel_f1max=pixel_best, pixel_f1max_threshold=pixel_at,
                aupro=aupro(maps, masks), **{'aupro_0.05': aupro(maps, masks, .05), 'aupro_1': aupro(maps, masks, 1.)},
                aupimo=float('nan') if np.isnan(each).all() else np.nanmean(each))
    for name, f in dict(auroc=auroc, ap=average_precision, f1max=lambda *o: f1max(*o)[0]).items(): want[f'anomaly_pixel_{name}'] = f(*alone) if defect.any() else float('nan')
    want |= dict(anomaly_aupro=aupro(*alone) if defect.any() else float('nan'), seg_f1=seg_f1(maps, masks, 0.))
    assert list(got) == list(want)
    assert list(got.values()) == pytest.approx(list(want.values()), abs=1e-12, nan_ok=True)
    assert list(evaluate(image_scores, defect)) == [o for o in want if o.startswith('image')]+list(no_pixel_metrics())


@tried(pictured(), st.sampled_from([.2, .5, 1.]))
def test_area_moves_by_no_more_than_its_slack(x, limit):
    "Ties told apart at random."
    maps, masks = x
    c, ranks = counts(maps, masks), np.unique(maps, return_inverse=True)[1].reshape(maps.shape)
    told = counts(ranks+np.random.default_rng(0).random(maps.shape)/2, masks)
    if masks.any() and not masks.all(): assert abs(area(c, limit)-area(told, limit)) <= slack(c, limit)+1e-12
    else: assert isnan(slack(c, limit))


# AUPIMO, SegF1

@tried(pictured(), st.sampled_from([(1e-5, 1e-4), (.01, .1), (.05, 1.), (.3, .7)]))
def test_aupimo_is_the_walk_along_each_curve(x, rates):
    maps, masks = x
    got = aupimo_images(maps, masks, *rates)
    assert got == pytest.approx(aupimo_curves(maps, masks, *rates), abs=1e-9, nan_ok=True)
    assert (np.isnan(got) == (~masks.any((1, 2)) | masks.any((1, 2)).all())).all() and not ((got < -1e-12) | (got > 1+1e-12)).any()

@tried(pictured())
def test_aupimo_does_not_ask_what_lies_around_a_defect(x):
    maps, masks = x
    around = ~masks & masks.any((1, 2))[:, None, None]
    assert aupimo_images(np.where(around, 9e6, maps), masks, .01, .5) == pytest.approx(aupimo_images(maps, masks, .01, .5), abs=1e-12, nan_ok=True)

@tried(pictured(), st.sampled_from([-1., 0., .5, 3.]))
def test_seg_f1_is_scikit_learns(x, threshold):
    maps, masks = x
    if masks.any(): assert seg_f1(maps, masks, threshold) == pytest.approx(metrics.f1_score(masks.ravel(), maps.ravel() > threshold, zero_division=0), abs=1e-12)
    else: assert isnan(seg_f1(maps, masks, threshold))


# Regions

REGIONS = dict(pixel=[(4, 4)], diagonal=[(3, 3), (4, 4), (5, 3)], corner=[(0, 0)], border=[(0, 3), (0, 4), (8, 0), (8, 8)], all_but_one=[(i, j) for i in range(9) for j in range(9) if (i, j) != (4, 4)])

@pytest.mark.parametrize('name', REGIONS)
@pytest.mark.parametrize('scores', ['any', 'ties', 'constant', 'defects first', 'defects last'])
def test_aupro_of_awkward_regions(name, scores):
    masks = np.zeros((3, 9, 9), bool)
    masks[1][tuple(zip(*REGIONS[name]))] = True
    masks[2, 6, 2] = True
    maps = dict(zip(['any', 'ties', 'constant', 'defects first', 'defects last'], [x := np.random.default_rng(0).normal(size=masks.shape), x.round(), 0*x, 1.*masks, -1.*masks]))[scores]
    for limit in (.01, .05, .3, 1.): assert aupro(maps, masks, limit) == pytest.approx(aupro_regions(maps, masks, limit), abs=1e-9)
    got = evaluate([0]*3, masks.any((1, 2)), maps, masks)
    if scores == 'defects first': assert [v for k, v in got.items() if 'pixel_a' in k or 'aup' in k] == pytest.approx([1]*8)
    if scores == 'constant': assert got['pixel_auroc'] == .5 and got['aupro'] == pytest.approx(.15)


# One by one

def stained(n=24, size=72, seed=0):
    "Noise with stains: the first half is good."
    rng = np.random.default_rng(seed)
    maps, masks = rng.normal(size=(n, size, size)), np.zeros((n, size, size), bool)
    for i in range(n//2, n):
        for y, x, h, w in rng.integers([2, 2, 1, 1], [size-12, size-12, 12, 12], (3, 4)): masks[i, y:y+h, x:x+w] = True
    return maps+2*masks, masks, rng

def late(maps, masks): return np.where(masks & (np.arange(len(maps)) > len(maps)-4)[:, None, None], maps*1e7, maps)
KINDS = dict(normal=lambda m, k, r: m, offset=lambda m, k, r: 1e4+.01*m, offset_of_many_digits=lambda m, k, r: np.float64(1e4)+1e-9*m, negative=lambda m, k, r: -1e3-np.exp(-m),
             heavy_tail=lambda m, k, r: m+r.standard_cauchy(m.shape), log_normal=lambda m, k, r: np.exp(8*m), late_and_far=lambda m, k, r: late(m, k), late_and_far_below=lambda m, k, r: -late(m, k),
             constant=lambda m, k, r: 0*m+3, ties=lambda m, k, r: m.round(1), two_values=lambda m, k, r: 1.*(m > 1), squashed=lambda m, k, r: np.tanh(m)**9,
             first_map_constant=lambda m, k, r: m*(np.arange(len(m)) > 0)[:, None, None], tiny=lambda m, k, r: m*1e-30, huge=lambda m, k, r: m*1e37)

@pytest.mark.parametrize('name', KINDS)
def test_a_tally_is_as_good_as_exact(name):
    maps, masks, rng = stained()
    maps = KINDS[name](maps, masks, rng)
    if 'digits' not in name: maps = maps.astype(np.float32)
    tally = Tally(map_threshold=float(np.median(maps)))
    for m, mask in zip(maps, masks): tally.add(m[None], [mask if mask.any() else None])
    want = evaluate(np.zeros(len(maps)), masks.any((1, 2)), maps, masks, map_threshold=tally.map_threshold)
    got, bounds = tally.metrics(), tally.bounds()
    assert list(got) == [k for k in want if not k.startswith('image_')]
    for k, v in got.items():
        if 'threshold' not in k: assert v == pytest.approx(want[k], abs=1e-4), k
        else: assert v == pytest.approx(want[k], rel=1e-4, abs=1e-4*np.ptp(maps.astype(float)))
    for k, v in bounds.items(): assert abs(got[k]-want[k]) <= v+1e-9, k
    assert {'pixel_auroc', 'aupro', 'aupro_0.05'} <= set(bounds) and (bounds['pixel_auroc'] < 1e-3 or name in ('constant', 'ties', 'two_values', 'offset'))

@settings(deadline=None, derandomize=True, max_examples=25)
@given(pictured())
def test_a_tally_keeps_its_bounds(x):
    maps, masks = x
    tally = Tally().add(maps, masks)
    got, want = tally.metrics(), evaluate(np.zeros(len(maps)), masks.any((1, 2)), maps, masks)
    for k, v in tally.bounds().items(): assert isnan(v) and isnan(want[k]) or abs(got[k]-want[k]) <= v+1e-9, k
    assert {k for k, v in got.items() if isnan(v)} == {k for k, v in want.items() if isnan(v) and not k.startswith('image_')}

@tried(hnp.arrays(np.float32, st.integers(1, 40), elements=WIDE), WIDE)
def test_bins_keep_the_order(scores, centre):
    scores = np.sort(scores)
    bins = to_bins(scores, np.float32(centre))
    assert (np.diff(bins) >= 0).all() and bins.min() >= 0 and bins.max() < 2**24
    assert (np.diff(bin_floor(bins, np.float32(centre))) >= 0).all()
    assert centre_of(scores) in scores

def test_a_tally_does_not_see_how_images_are_cut_into_chunks():
    maps, masks, _ = stained()
    labels = masks.any((1, 2)) | (np.arange(24) < 2)                         # two defects that no mask shows
    whole, parts, wide = Tally().add(maps, masks, labels), Tally(), Tally()
    for i in range(0, 24, 5): parts.add(torch.from_numpy(maps[i:i+5]), torch.from_numpy(masks[i:i+5]), torch.from_numpy(labels[i:i+5]))
    wide.add(maps[:9], masks[:9], labels[:9]).counted_.counters.widen()      # as from four billion pixels on
    wide.add(maps[9:], masks[9:], labels[9:])
    for o in (parts, wide):
        assert o.metrics() == whole.metrics() and o.bounds() == whole.bounds()
        for k, v in o.rows().items(): assert np.array_equal(v, whole.rows()[k])
    want = evaluate(np.zeros(24), labels, maps, masks)
    for k, v in whole.metrics().items(): assert v == pytest.approx(want[k], abs=1e-4)
    assert want['aupimo'] != evaluate(np.zeros(24), masks.any((1, 2)), maps, masks)['aupimo']

def test_large_defects_leave_a_sketch():
    rng = np.random.default_rng(0)
    maps, masks = rng.normal(size=(4, 300, 300)).astype(np.float32), np.zeros((4, 300, 300), bool)
    masks[2:, 20:280, 10:250] = True
    maps[2:] += 3*masks[2:]
    got, want = Tally().add(maps, masks).metrics(), evaluate(np.zeros(4), masks.any((1, 2)), maps, masks)
    assert got['aupimo'] == pytest.approx(want['aupimo'], abs=1e-4)

@pytest.mark.parametrize('name', ['normal', 'heavy_tail', 'ties', 'late_and_far', 'constant'])
def test_rows_hold_what_a_bootstrap_needs(name):
    maps, masks, rng = stained()
    maps = KINDS[name](maps, masks, rng).astype(np.float32)
    rows, tally = pixel_rows(maps, masks), Tally().add(maps[:3], masks[:3]).add(maps[3:], masks[3:]).rows()
    for k, v in rows.items(): assert np.array_equal(v, tally[k])
    assert (rows['good'].sum(1) == (~masks).sum((1, 2))).all() and (rows['bad'].sum(1) == masks.sum((1, 2))).all()
    drawn = rng.integers(24, size=24)                                        # any draw of images, not these alone
    good, bad, region = (o[drawn].sum(0) for o in rows.values())
    below = good.sum()-good.cumsum()+good/2
    assert (bad*below).sum()/good.sum()/bad.sum() == pytest.approx(auroc(maps[drawn], masks[drawn]), abs=2e-3)
    assert (region*below).sum()/good.sum()/region.sum() == pytest.approx(aupro(maps[drawn], masks[drawn], 1.), abs=2e-3)

def test_curves_are_those_of_the_pixels():
    maps, masks, _ = stained()
    found = Tally().add(maps, masks).curves()
    for name, of in (('pixel_roc', roc_curve), ('pro', pro_curve)):
        x, y = found[name]
        assert (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all() and (x[0], y[0], x[-1], y[-1]) == pytest.approx((0, 0, 1, 1))
        assert trapezoid(y, x) == pytest.approx(trapezoid(*of(maps, masks)[::-1]), abs=1e-4)


# Kind by kind

@tried(pictured(), st.lists(st.sampled_from(['good', 'cut', 'hole']), min_size=3, max_size=3))
def test_a_kind_is_judged_as_if_it_were_alone(x, kinds):
    maps, masks = x
    kinds = np.array(kinds[:len(maps)])
    masks = masks & (kinds != 'good')[:, None, None]
    scores = maps.mean((1, 2))
    table = by_kind(scores, kinds, maps, masks, (.3, .05), threshold=0.)
    assert list(table.index) == sorted(set(kinds)-{'good'})
    for kind, row in table.iterrows():
        part = np.isin(kinds, ['good', kind])
        want = evaluate(scores[part], kinds[part] != 'good', maps[part], masks[part])
        assert row.drop(['n_images', 'missed']).tolist() == pytest.approx([want[k] for k in table.columns.drop(['n_images', 'missed'])], abs=1e-12, nan_ok=True)
        assert row.n_images == (kinds == kind).sum() and row.missed == (scores[kinds == kind] <= 0).mean()


@tried(scored(both=False), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_one_bad_score_is_told(x, bad, data):
    scores, labels = x
    at = data.draw(st.integers(0, len(scores)-1))
    scores[at] = bad
    for f in (auroc, auroc_pairs, average_precision, f1max, roc_curve, counts, evaluate):
        with pytest.raises(ArgumentError, match=rf'must be finite, got 1 NaN or infinite of {len(scores)}, the first at \[{at}\]'): f(scores, labels)


def test_pixels_by_the_hundred_thousand_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    maps = rng.gamma(2, size=(9, 120, 120)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[:5, 30:50, 40:60] = masks[3:7, 100:, 5:9] = True
    maps[masks] += 1
    for m in (maps, maps.round(1)):
        got = evaluate(m.max((1, 2)), masks.any((1, 2)), m, masks)
        assert got['pixel_auroc'] == pytest.approx(metrics.roc_auc_score(masks.ravel(), m.ravel()), abs=1e-9)
        assert got['anomaly_pixel_auroc'] == pytest.approx(metrics.roc_auc_score(masks[:7].ravel(), m[:7].ravel()), abs=1e-9)
        assert got['pixel_ap'] == pytest.approx(metrics.average_precision_score(masks.ravel(), m.ravel()), abs=1e-9)


@pytest.mark.skipif('PATCHCORE_NB_TESTDATA' not in os.environ, reason='PATCHCORE_NB_TESTDATA does not say where the golden results are')
@pytest.mark.parametrize('name', ['single', 'ensemble'])
def test_image_auroc_of_the_reference(name):
    golden = Path(os.environ['PATCHCORE_NB_TESTDATA'])/'golden'
    labels = np.load(golden/'predict_single.npz')['is_anomaly']
    got = np.load(golden/f'predict_{name}.npz')
    assert auroc(got['score'], labels) == pytest.approx(got['image_auroc'].item(), abs=1e-9)


# Names

OLD = {evaluation: ['pixel_figures', 'no_pixel_figures', 'auroc_pairs', 'add_sorted', 'aupro_regions', 'aupimo_curves', 'log_room', 'room_between'],
       pixels: ['bin_floor'], intervals: ['is_figure', 'naive_figures', 'resampled_figures', 'areas', 'precision_areas', 'best_f1s']}

@pytest.mark.parametrize(('module', 'name'), [(module, name) for module, names in OLD.items() for name in names])
def test_old_names_are_found_with_a_warning(module, name):
    with pytest.warns(DeprecationWarning, match=f'{name} is called'): assert getattr(module, name) is not None

def test_a_tally_had_figures():
    tally = Tally().add(np.eye(4)[None], np.eye(4)[None] > 0)
    with pytest.warns(DeprecationWarning, match='is called metrics now'): assert tally.figures() == pytest.approx(tally.metrics(), nan_ok=True)

def test_one_import_offers_what_it_always_did():
    for name in ('auroc', 'average_precision', 'f1max', 'roc_curve', 'counts', 'curve', 'aupro', 'pro_curve', 'weigh_regions', 'aupimo_images', 'evaluate', 'seg_f1'): assert name in evaluation.__all__
    for name in ('Tally', 'by_kind', 'pixel_rows', 'GOOD_KIND'): assert name in pixels.__all__
    for name in ('bootstrap', 'compare', 'over_seeds', 'share_interval', 'auroc_interval', 'by_kind_of_rows', 'resamples'): assert name in intervals.__all__
