"The relative score: by hand, at the limits, after every change of the memory, in company, and from a file."
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from patchcore_nb.budget import make_plan
from patchcore_nb.cli import main
from patchcore_nb.core import ArgumentError, DataError, generator
from patchcore_nb.data import Category, load_category
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.names import DISTANCES, PATCH_SCORES, PRESETS
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.playground import Lab, Setting, judge_setting
from patchcore_nb.presets import preset
from patchcore_nb.relative import measure_spread, naive_spread, plain_distance
from patchcore_nb.scorer import Rule, Scorer, register_patch_score, smooth_grid
from patchcore_nb.state import from_state, get_state
from patchcore_nb.store import load, save
from patchcore_nb.sweeping import sweep

WAYS = 'squared', 'euclidean', 'cosine'
SMALL = dict(target_dim=64, ratio=.05, imagesize=64, resize=64, device='cpu')


@pytest.fixture(scope='module')
def cog(demo_root): return load_category('demo', demo_root, 'cog')

@pytest.fixture(scope='module')
def fitted(cog): return model().fit(cog.train[:8])

def model(**kw): return PatchCore('filterbank', **dict(patch_score='relative', false_alarms=None) | SMALL | kw)

def naive_scores(patches, bank, distance='squared', k=1, b=None):
    "Image scores by the definition, patch by patch."
    way = DISTANCES[plain_distance(distance)]
    b = naive_spread(bank, distance) if b is None else b
    grids = []
    for image in patches:
        s = []
        for x in image.flatten(0, 1):
            squared, order = (bank-x).square().sum(1).sort()
            usual = b[order[0]]+b.mean()
            s.append(way(squared[:k]).mean()/(usual if usual > 0 else 1))
        grids.append(torch.stack(s).view(image.shape[:2]))
    return smooth_grid(torch.stack(grids)).amax((1, 2))

def some(distance, n=120, d=8, seed=0):
    rng = generator(seed)
    bank, patches = torch.randn(n, d, generator=rng)+3, torch.randn(2, 5, 4, d, generator=rng)+3
    bank[:n//2] *= .2 # half of it is crowded
    if distance != 'cosine': return bank, patches
    return torch.nn.functional.normalize(bank, dim=1), torch.nn.functional.normalize(patches, dim=-1)

def spread_by_hand(bank, distance='squared'):
    "From the table of all distances, in double precision."
    d = torch.cdist(bank.double(), bank.double(), compute_mode='donot_use_mm_for_euclid_dist').fill_diagonal_(torch.inf)
    near = d.sort(1)[0][:, :min(3, len(bank)-1)]
    return (near.square()/2 if distance == 'cosine' else near).mean(1).float()


# The formula

def test_by_hand():
    "Four stored patches on a line, one image of one patch."
    bank = torch.tensor([[0.], [1], [3], [10]])
    b = torch.tensor([14/3, 4, 4, 26/3]) # (1+3+10)/3, (1+2+9)/3, (3+2+7)/3, (10+9+7)/3
    assert torch.allclose(measure_spread(bank), b)
    seen = Scorer(patch_score='relative').fit(bank)(torch.tensor([[[[5.]]]]))
    assert seen.nn_idxs.item() == 2 and seen.patch_scores.item() == 4 # squared, as ever
    assert seen.image_scores.item() == pytest.approx(2/(4+b.mean().item()), rel=1e-6)

@pytest.mark.parametrize('distance', WAYS)
@pytest.mark.parametrize('k', [1, 4])
def test_as_the_slow_twin(distance, k):
    bank, patches = some(distance)
    seen = Scorer(k, 'relative', distance=distance).fit(bank)(patches)
    assert torch.allclose(seen.image_scores, naive_scores(patches, bank, distance, k), rtol=1e-4)

@pytest.mark.parametrize('distance', WAYS)
def test_spread(distance):
    bank, _ = some(distance, 2000, 48)
    for o in (measure_spread(bank, Rule(distance=distance)), naive_spread(bank, distance)): assert torch.allclose(o, spread_by_hand(bank, distance), rtol=1e-4)

def test_squared_and_euclidean_are_one():
    bank, patches = some('squared')
    a, b = (Scorer(patch_score='relative', distance=o).fit(bank)(patches) for o in WAYS[:2])
    assert torch.equal(a.image_scores, b.image_scores) and not torch.equal(a.patch_scores, b.patch_scores)

def test_it_does_not_depend_on_scale():
    bank, patches = some('squared')
    a, b = (Scorer(patch_score='relative').fit(f*bank)(f*patches).image_scores for f in (1, 1024.))
    assert torch.allclose(a, b, rtol=1e-5)


# At the limits

@pytest.mark.parametrize('m', [2, 3, 4])
def test_few_patches(m):
    "As many neighbours as there are, at least one."
    bank, patches = some('squared', m)
    assert torch.allclose(measure_spread(bank), spread_by_hand(bank), rtol=1e-5)
    assert torch.allclose(Scorer(patch_score='relative').fit(bank)(patches).image_scores, naive_scores(patches, bank), rtol=1e-4)

def test_one_patch_is_refused(cog):
    for ask in (lambda: Scorer(patch_score='relative').fit(torch.ones(1, 4)), lambda: model(ratio=1e-9).fit(cog.train[:2]), lambda: measure_spread(torch.ones(1, 4))):
        with pytest.raises(ArgumentError, match='there is only 1: pass a larger ratio'): ask()

def test_all_alike():
    "Nothing to be in relation to: the distance itself."
    seen = Scorer(patch_score='relative').fit(torch.ones(9, 4))(torch.full((1, 3, 3, 4), 3.))
    assert seen.image_scores.item() == pytest.approx(4)

def test_twins_are_neighbours():
    "Four of a kind lie at no distance from one another; a lone row is far from all."
    bank = torch.cat([torch.zeros(4, 3), torch.tensor([[3., 4, 0]])])
    assert measure_spread(bank).tolist() == [0, 0, 0, 0, 5]
    s = Scorer(patch_score='relative').fit(bank)(torch.tensor([[[[0., 0, 2]]]])).image_scores.item()
    assert s == pytest.approx(2) # c = 1

@pytest.mark.parametrize('search', ['fast', 'fp16', 'int8', 'faiss', 'ivfpq'])
def test_approximate_searches_measure_exactly(search):
    if search in ('faiss', 'ivfpq'): pytest.importorskip('faiss')
    bank, patches = some('squared', 3000, 64)
    exact, other = (Scorer(patch_score='relative', search=o).fit(bank) for o in ('exact', search))
    assert torch.equal(exact.spread_, other.spread_) and other(patches).image_scores.isfinite().all()

def test_nobody_pays_who_does_not_ask(monkeypatch, cog):
    def never(*args, **kw): raise AssertionError('measured')
    monkeypatch.setattr(PATCH_SCORES['relative'], 'measure', never)
    for how in ('max', 'mean', 'top1%', 'smoothed', 'reweighted'):
        m = model(patch_score=how).fit(cog.train[:3])
        assert m.spread_ is None and m.scorer_.spread_ is None and 'spread' not in get_state(m)[1]
        m.partial_fit(cog.train[3:5])
        assert m.spread_ is None

def test_maps_are_as_they_were(cog, fitted):
    a, b = (m.predict(cog.test[::4]) for m in (fitted, model(patch_score='max').fit(cog.train[:8])))
    for name in ('anomaly_maps', 'patch_scores', 'nn_idxs'): assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert not torch.equal(a.image_scores, b.image_scores) and (a.same_scale, b.same_scale) == (False, True)

def test_alone_and_in_company(cog, fitted):
    alone = torch.cat([fitted.predict([o]).image_scores for o in cog.test[:5]])
    assert torch.allclose(alone, fitted.predict(cog.test[:5]).image_scores, rtol=1e-5)

def test_the_plan_says_it():
    a, b = (model(patch_score=o, memory_budget='8GB').plan(200) for o in ('max', 'relative'))
    assert 'compared with one another' in str(b) and 'compared' not in str(a) and b.peak >= a.peak
    whole = model(ratio=1, sampler='identity', memory_budget='8GB').plan(200).load
    assert make_plan(whole, '8GB').peak-make_plan(replace(whole, compared=False), '8GB').peak <= 64*whole.n_kept # by blocks, never M x M


# After a change of the memory

def fresh_spread(m): assert torch.allclose(m.spread_, naive_spread(m.memory_bank_), rtol=1e-4) and len(m.spread_) == len(m.memory_bank_) and torch.equal(m.scorer_.spread_, m.spread_)

def test_changes(cog, fitted):
    fresh_spread(fitted)
    m = model(ratio=.02).fit(cog.train[:6])
    before = len(m.memory_bank_)
    m.partial_fit(cog.train[6:12])
    assert len(m.memory_bank_) > before
    fresh_spread(m)
    m.forget(0, 3)
    fresh_spread(m)
    small = fitted.shrink(.02)
    fresh_spread(small)
    assert torch.equal(small.predict(cog.test[:3]).image_scores, model(ratio=.02).fit(cog.train[:8]).predict(cog.test[:3]).image_scores)

def test_merge(cog):
    kw = dict(weights='random', target_dim=32)
    a, b = (PatchCore('resnet18', patch_score='relative', **SMALL | kw).fit(o) for o in (cog.train[:3], cog.train[3:5]))
    fresh_spread(a.merge(b))

def test_elsewhere_nothing_is_measured_again(cog, monkeypatch):
    m = model().fit(cog.train[:4])
    b = m.spread_
    monkeypatch.setattr(PATCH_SCORES['relative'], 'measure', lambda *args: 1/0)
    m.search_threads = 1 # another scorer
    assert m.predict(cog.test[:1]).image_scores.isfinite().all() and torch.equal(m.scorer_.spread_, b)


# Left out

@pytest.mark.parametrize('distance', WAYS)
def test_left_out_as_the_slow_twin(cog, distance):
    "An image's distances are to what is stored of others; how sparse memory is, the whole of it says."
    m = model(distance=distance, false_alarms=.3).fit(cog.train[:6])
    patches = torch.cat(list(m.embedder_([o.path for o in cog.train[:6]])))
    b, owner = naive_spread(m.memory_bank_, distance), m.origin_[:, 0]
    for i, got in enumerate(m.left_out_.image_scores):
        rest = (owner != i).nonzero()[:, 0]
        way = DISTANCES[plain_distance(distance)]
        squared = torch.cdist(patches[i].flatten(0, 1).double(), m.memory_bank_[rest].double(), compute_mode='donot_use_mm_for_euclid_dist').square().float()
        d, at = squared.min(1)
        s = way(d)/(b[rest[at]]+b.mean())
        assert float(got) == pytest.approx(float(smooth_grid(s.view(1, *m.grid_)).max()), rel=1e-3)

def test_suspects_and_threshold(cog):
    bad = [o for o in cog.test if o.label][3]
    m = model(imagesize=224, resize=256, ratio=.02, false_alarms=.05, target_dim=128).fit([*cog.train[:19], bad])
    assert m.suspects().image[0] == 19 and m.calibration_.promise == 'approximate'
    seen = m.predict(cog.test[:12])
    assert seen.verdicts.equal(seen.image_scores > m.threshold_) and ((seen.p_values > 0) & (seen.p_values <= 1)).all()
    again = m.suspects([*cog.train[:19], bad])
    assert np.allclose(again.score, m.suspects().score)

def test_held_out(cog):
    m = model(train_val_split=.5, false_alarms=.4, confidence=None).fit(cog.train[:12])
    held = m.predict(m.held_)
    assert m.calibration_.promise == 'average' and held.verdicts.float().mean() <= .4

def test_a_score_of_ones_own_that_measures_and_asks(cog):
    "Left out, it gets what was measured of the rows that are left."
    def measure(bank, rule, search): return bank.norm(dim=1)
    seen = []
    @register_patch_score('ours', memory=True, measure=measure)
    def ours(patch_scores, matches):
        seen.append((len(matches.neighbours.memory_bank), len(matches.neighbours.spread)))
        return patch_scores.amax((1, 2))
    try:
        m = model(patch_score='ours', false_alarms=.3).fit(cog.train[:5])
        assert all(a == b for a, b in seen) and len({a for a, _ in seen}) > 1
        assert torch.allclose(m.spread_, m.memory_bank_.norm(dim=1))
    finally: del PATCH_SCORES['ours']

def test_a_wrong_measure_is_named():
    register_patch_score('ours', measure=lambda *args: 3)(lambda s, m: s.amax((1, 2)))
    try:
        with pytest.raises(ArgumentError, match="'ours' measures must be"): Scorer(patch_score='ours').fit(torch.ones(5, 3))
    finally: del PATCH_SCORES['ours']


# In company

def test_ensemble(cog):
    kw = SMALL | dict(false_alarms=None)
    members = [PatchCore('filterbank', [layer], patch_score=how, **kw) for layer, how in (('layer2', 'relative'), ('layer3', 'relative'), ('layer2', 'max'))]
    both = Ensemble(members).fit(cog.train[:6])
    seen = both.predict(cog.test[:6])
    units = both.fitted_.score_units
    assert units == (.5, .5, both.units_[2])
    assert torch.allclose(seen.image_scores, sum(o.image_scores/u for o, u in zip(seen.members, units))/3, rtol=1e-5)
    assert torch.allclose(seen.anomaly_maps, sum(o.anomaly_maps/u for o, u in zip(seen.members, both.units_))/3, rtol=1e-4)
    assert not seen.members[0].same_scale and seen.members[2].same_scale

def test_sweep(cog):
    few = Category(cog.dataset, cog.name, cog.train[:8], cog.test[::3])
    table = sweep(model(), few, [.01, .05], [1, 3], ['relative', 'max', 'reweighted'])
    for row in table[table.patch_score == 'relative'].itertuples():
        m = model(ratio=row.ratio, k=row.k).fit(few)
        assert row.image_auroc == pytest.approx(m.score(few.test, [o.label for o in few.test]), abs=1e-6)

def test_playground(cog):
    few = Category(cog.dataset, cog.name, cog.train[:6], cog.test[::4])
    lab = Lab(few, model(patch_score='max'))
    for k, how in ((1, 'max'), (1, 'relative'), (3, 'relative')):
        judged = judge_setting(lab, Setting(k=k, patch_score=how)).prediction
        assert torch.allclose(judged.image_scores, model(k=k, patch_score=how).fit(few).predict(few.test).image_scores, rtol=1e-3), (k, how)
        assert judged.same_scale == (how == 'max')
    assert len(lab.kept['spread']) == 1


# From a file

def test_there_and_back_in_another_process(tmp_path, cog):
    "To the last bit, with what was measured in the file."
    m = model().fit(cog.train[:6])
    save(m, tmp_path/'m')
    np.save(tmp_path/'scores.npy', m.predict([o.path for o in cog.test[:4]]).image_scores.numpy())
    (tmp_path/'paths.json').write_text(json.dumps([str(o.path) for o in cog.test[:4]]))
    code = ('import json, sys, numpy as np\nfrom pathlib import Path\nfrom patchcore_nb.names import PATCH_SCORES\nfrom patchcore_nb.store import load\n'
            'where = Path(sys.argv[1])\nPATCH_SCORES["relative"].measure = lambda *args: 1/0\nm = load(where/"m", device="cpu")\n'
            'assert m.predict(json.loads((where/"paths.json").read_text())).image_scores.numpy().tobytes() == np.load(where/"scores.npy").tobytes()')
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

def test_a_file_that_lacks_it(fitted, cog):
    state, tensors = get_state(fitted)
    lacks = {k: v for k, v in tensors.items() if k != 'spread'}
    again = from_state(state, lacks, device='cpu')
    assert torch.equal(again.spread_, fitted.spread_) and torch.equal(again.predict(cog.test[:2]).image_scores, fitted.predict(cog.test[:2]).image_scores)

@pytest.mark.parametrize('wrong', [lambda b: b[:-1], lambda b: b[:, None], lambda b: b.double(), lambda b: b.long(), lambda b: -b-1, lambda b: b*torch.nan, lambda b: b*torch.inf])
def test_a_wrong_one_is_refused(fitted, wrong):
    state, tensors = get_state(fitted)
    with pytest.raises(DataError, match='^spread must be') as e: from_state(state, tensors | dict(spread=wrong(tensors['spread'])), device='cpu')
    assert len(str(e.value).splitlines()) == 1

def test_the_reference_cannot_say_it(tmp_path, fitted):
    m = PatchCore('resnet18', patch_score='relative', weights='random', **SMALL)
    with pytest.raises(ArgumentError, match='patch_score'): save(m.fit([np.zeros((64, 64, 3), np.uint8)+i for i in (0, 90, 180)]), tmp_path/'m', 'reference')


# On the command line

@pytest.mark.parametrize('flags, core', [('', '--patchscore relative'), ('--preset steady', '')])
def test_the_command_line(tmp_path, monkeypatch, demo_root, flags, core, capsys):
    monkeypatch.chdir(tmp_path)
    words = (f'--gpu -1 {flags} --save_patchcore_model --model_format ours --no_report results patch_core -b filterbank -le layer2 -le layer3 {core} '
             f'--pretrain_embed_dimension 32 --target_embed_dimension 32 sampler -p 0.01 approx_greedy_coreset dataset --resize 64 --imagesize 64 -d cog demo {demo_root}')
    with pytest.raises(SystemExit) as e: main(words.split())
    assert e.value.code == 0, capsys.readouterr().err
    m = load(next(Path('results').rglob('model.json')).parent, device='cpu')
    assert (m.patch_score, m.distance) == ('relative', 'squared')
    fresh_spread(m)

def test_the_preset():
    assert {k: v for k, v in PRESETS['steady'].items() if v != PRESETS['reference'].get(k)}['patch_score'] == 'relative'
    assert preset('steady', k=3).patch_score == 'relative'
