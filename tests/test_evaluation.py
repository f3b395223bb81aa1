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
from sklearn import metrics

from patchcore_nb.core import ArgumentError
from patchcore_nb.evaluation import (aupro, aupro_regions, auroc, auroc_pairs, average_precision, counts, evaluate, f1max, pro_curve,
                                     region_weights, roc_curve)

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
    got = evaluate(torch.from_numpy(image_scores), torch.from_numpy(defect), torch.from_numpy(maps), torch.from_numpy(masks))
    anomaly = auroc(maps[defect], masks[defect]) if defect.any() else float('nan')
    want = dict(image_auroc=auroc(image_scores, defect), image_ap=average_precision(image_scores, defect), image_f1max=f1max(image_scores, defect)[0],
                pixel_auroc=auroc(maps, masks), anomaly_pixel_auroc=anomaly, pixel_ap=average_precision(maps, masks),
                pixel_f1max=f1max(maps, masks)[0], aupro=aupro(maps, masks))
    assert list(got) == list(want)
    assert list(got.values()) == pytest.approx(list(want.values()), abs=1e-12, nan_ok=True)


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
