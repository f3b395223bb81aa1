"Nested coresets: a shrunken model is the model that its ratio gives, and a sweep is what its separate runs would be."
import warnings

import numpy as np
import pytest
import torch

from patchcore_nb import scorer
from patchcore_nb.core import ArgumentError, generator, limit_threads
from patchcore_nb.data import Category, load_category
from patchcore_nb.embedder import Embedder
from patchcore_nb.judging import judge
from patchcore_nb.nested_search import Nested
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.search import Exact
from patchcore_nb.store import load, save
from patchcore_nb.sweeping import sweep

FITTED = 'idxs_', 'anchor_dists_', 'memory_bank_', 'origin_'


@pytest.fixture(scope='module')
def cog(demo_root): return load_category('demo', demo_root, 'cog')

def model(**kw): return PatchCore('filterbank', **dict(target_dim=128, ratio=.1, device='cpu') | kw)

def same(a, b):
    for name in FITTED: assert torch.equal(getattr(a, name).nan_to_num(), getattr(b, name).nan_to_num()), name
    assert (a.n_images_, a.n_patches_, a.ratio, a.grid_) == (b.n_images_, b.n_patches_, b.ratio, b.grid_)

@pytest.fixture(scope='module', params=['approx_greedy_coreset', 'greedy_coreset', 'random'])
def wide(request, cog): return model(sampler=request.param).fit(cog.train[:16])

@pytest.mark.parametrize('ratio', [.1, .0999, .05, .013, .001, .00001])
def test_shrunken_is_fitted(wide, cog, ratio):
    "Every pick, bit for bit, at any ratio."
    direct, small = model(ratio=ratio, sampler=wide.sampler).fit(cog.train[:16]), wide.shrink(ratio)
    same(small, direct)
    assert torch.equal(small.predict(cog.test[:2]).anomaly_maps, direct.predict(cog.test[:2]).anomaly_maps)
    known = dict(zip(direct.sizes_, direct.radii_))
    assert small.sizes_ == [o for o in wide.sizes_ if o <= len(direct.memory_bank_)]
    for size, radius in zip(small.sizes_, small.radii_):
        if size in known: assert radius == pytest.approx(known[size], rel=1e-5)

def test_twice_shrunken(wide): same(wide.shrink(.05).shrink(.01), wide.shrink(.01))

def test_the_larger_one_is_untouched(wide):
    before = {k: getattr(wide, k).clone() for k in FITTED}
    small = wide.shrink(.01)
    small.memory_bank_.zero_(), small.origin_.zero_()
    assert all(torch.equal(getattr(wide, k).nan_to_num(), v.nan_to_num()) for k, v in before.items()) and wide.ratio == .1
    assert small.extractor_ is wide.extractor_ and small.aggregator_ is wide.aggregator_

def test_saved_and_loaded(wide, cog, tmp_path):
    save(wide, tmp_path/'wide', 'ours')
    small = load(tmp_path/'wide', device='cpu').shrink(.02)
    same(small, wide.shrink(.02))
    save(small, tmp_path/'small', 'ours')
    again = load(tmp_path/'small', device='cpu')
    same(again, small)
    assert (tmp_path/'small'/'model.safetensors').stat().st_size < .3*(tmp_path/'wide'/'model.safetensors').stat().st_size
    assert torch.equal(again.predict(cog.test[:2]).image_scores, small.predict(cog.test[:2]).image_scores)

def test_the_threshold_is_found_anew(cog, tmp_path):
    kw = dict(train_val_split=.4, false_alarms=.1) # 24 held out, and 22 are needed
    wide, direct = model(**kw).fit(cog.train), model(ratio=.01, **kw).fit(cog.train)
    assert wide.shrink(.01).calibration_ == direct.calibration_ and direct.threshold_ != wide.threshold_
    assert direct.calibration_.promise == 'confidence' and len(direct.calibration_) == len(direct.held_)
    save(wide, tmp_path/'m', 'ours')
    with pytest.warns(UserWarning, match='not at hand: the model has none now'): small = load(tmp_path/'m', device='cpu').shrink(.01)
    assert small.threshold_ is None and 'threshold' not in judge(small.predict(cog.test), cog.test)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert model().fit(cog.train[:3]).shrink(.01).calibration_ is None # there was none
    approximate = model().fit(cog.train[:20])
    with pytest.warns(UserWarning, match='approximate one'): assert approximate.threshold_ > 0 and approximate.shrink(.01).calibration_ is None # nobody held images out for it

def test_what_cannot_be_shrunken(cog):
    wide = model().fit(cog.train[:2])
    for ratio, word in ((.2, 'fit at 0.2'), (0, r'\(0, 1\]'), (-1, r'\(0, 1\]'), (2, r'\(0, 1\]'), (float('nan'), r'\(0, 1\]')):
        with pytest.raises(ArgumentError, match=word): wide.shrink(ratio)
    with pytest.raises(ArgumentError, match='call fit'): model().shrink(.01)
    for kw in (dict(sampler='identity'), dict(ratio=1)):
        with pytest.raises(ArgumentError, match='no order of picks'): model(**kw).fit(cog.train[:2]).shrink(.01)
    with pytest.raises(ArgumentError, match='memory bank of 1 '): model(k=2).fit(cog.train[:2]).shrink(.0001)
    with pytest.raises(ArgumentError, match='there is only 1'): model(patch_score='reweighted').fit(cog.train[:2]).shrink(.0001)

def test_the_references_models_have_no_order(testdata):
    with pytest.raises(ArgumentError, match="reference's files do not tell"): load(testdata/'golden'/'model_single', weights_dir=testdata/'weights').shrink(.01)


@pytest.mark.parametrize('how', ['max', 'mean', 'reweighted'])
def test_a_sweep_is_its_separate_runs(cog, how):
    cog = Category(cog.dataset, cog.name, cog.train[:12], cog.test[::3])
    table = sweep(model(patch_score=how), cog, [.1, .002, .02], [4, 1], all_pixels=True)
    assert list(table.ratio) == [.002]*2+[.02]*2+[.1]*2 and list(table.k) == [1, 4]*3
    for row in table.itertuples():
        m = model(patch_score=how, ratio=row.ratio, k=row.k).fit(cog)
        metrics = judge(m.predict(cog.test), cog.test)
        assert row.n_patches == len(m.memory_bank_)
        assert row.image_auroc == pytest.approx(metrics['image_auroc'], abs=1e-6) and row.pixel_auroc == pytest.approx(metrics['pixel_auroc'], abs=1e-6)

def test_a_sweep_reweights_by_as_many_neighbours_as_the_model(cog, monkeypatch):
    seen = []
    monkeypatch.setattr(scorer, 'reweight', lambda *args, real=scorer.reweight: (seen.append(args[4]), real(*args))[1])
    sweep(model(patch_score='reweighted', reweight_k=3), Category(cog.dataset, cog.name, cog.train[:4], cog.test[::6]), [.02])
    assert set(seen) == {3}

def test_a_sweep_judges_pixels_once_unless_asked(cog):
    table = sweep(model(), Category(cog.dataset, cog.name, cog.train[:6], cog.test[::4]), [.02, .01], [1, 2])
    assert table.pixel_auroc.isna().tolist() == [True]*3+[False] and np.isfinite(table.image_auroc).all()

@pytest.mark.parametrize('kw, word', [(dict(ratios=[.1, 2]), r'\(0, 1\]'), (dict(ratios=[.1, 1]), 'no order of picks'), (dict(ratios=[.00001, .1], ks=[5]), 'memory bank of 1 '), (dict(patch_scores=['maks']), 'unknown patch_score')])
def test_sweeps_that_cannot_be(cog, kw, word):
    with pytest.raises(ArgumentError, match=word): sweep(model(), cog, **dict(ratios=[.1]) | kw)


@pytest.mark.parametrize('args, words', [
    (dict(ratios=[.1, 1.]), 'below 1'), (dict(ratios=[0, .1]), 'ratio'), (dict(ratios=[.1], ks=[1, 10**6]), 'memory bank'), (dict(ratios=[.1], ks=[0, 1]), 'at least 1'),
    (dict(ratios=[.1], patch_scores=['max', 'foo']), 'unknown patch_score'), (dict(ratios=[]), 'at least one ratio'), (dict(ratios=[1e-6, .1], patch_scores=['reweighted']), 'reweighted')])
def test_a_sweep_is_refused_before_the_work_begins(cog, monkeypatch, args, words):
    monkeypatch.setattr(Embedder, 'forward', lambda *a, **kw: pytest.fail('images were embedded'))
    with pytest.raises(ArgumentError, match=words): sweep(model(), cog, **args)

def test_a_sweep_keeps_to_its_threads(cog, monkeypatch):
    few, seen = Category(**vars(cog) | dict(train=cog.train[:4], test=cog.test[::6])), []
    monkeypatch.setattr(torch, 'set_num_threads', lambda n, real=torch.set_num_threads: (seen.append(n), real(n)))
    sweep(model(search_threads=7), few, [.1])
    assert 7 in seen

def test_a_shrunken_model_claims_no_radius_of_another(wide):
    m = wide.shrink(.0999)
    assert m.sizes_[-1] < len(m.memory_bank_) and 'cover radius' not in m._repr_html_() and 'cover radius' in wide._repr_html_()


class Coded(Nested):
    "Whole numbers, however slow they may be on this machine."
    def _suits(self): return True

@pytest.mark.parametrize('way', [Nested, Coded])
@pytest.mark.parametrize('k', [1, 4])
def test_nested_search_is_a_search_for_each_size(way, k):
    g = generator(0)
    shape = torch.randn(8, 64, generator=g)
    rows, queries = (torch.randn(n, 8, generator=g) @ shape+.1*torch.randn(n, 64, generator=g) for n in (2500, 300))
    sizes = [5, 150, 151, 2500]
    found = way().fit(rows, sizes)
    assert bool(found.targets_) or way is Nested
    with limit_threads(2): answers = found(queries, k)
    for m, (dists, idxs) in zip(sizes, answers):
        alone = Exact().fit(rows[:m])(queries, k)
        assert torch.equal(idxs, alone[1]) and torch.equal(dists, alone[0])
    with pytest.raises(ArgumentError, match='memory bank of 5 '): found(queries, 6)
