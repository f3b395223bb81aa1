"PatchCore as an estimator: any images, any size, more of them, fewer of them, threads, copies, and what scikit-learn expects."
import copy
import dataclasses
import importlib
import inspect
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.validation import check_is_fitted
from torch.utils.data import DataLoader, Dataset, TensorDataset

from patchcore_nb import changes, fitting, left_out
from patchcore_nb.core import ArgumentError, DataError
from patchcore_nb.data import Category, Preprocess, Sample, load_category, make_miniature, read_masks
from patchcore_nb.embedder import Embedder
from patchcore_nb.embedding import RUNTIME
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.evaluation import auroc
from patchcore_nb.items import as_items
from patchcore_nb.names import DISTANCES, PATCH_SCORES, SAMPLERS, SEARCHES
from patchcore_nb.patchcore import PARAMS, PatchCore
from patchcore_nb.samplers import Sampled
from patchcore_nb.search import register_search
from patchcore_nb.store import load, save
from patchcore_nb.thresholds import calibrate

SMALL = dict(resize=64, imagesize=64, pretrain_dim=64, target_dim=64, ratio=.1, device='cpu')
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)


def model(**kw): return PatchCore('resnet18', weights='random', **SMALL | kw)

def embeddings(m, images): return torch.cat([p.flatten(0, 2) for p in m.embedder_(as_items(images))])

def reach(m, images): return float(torch.cdist(embeddings(m, images), m.memory_bank_, compute_mode='donot_use_mm_for_euclid_dist').amin(1).max())


# What scikit-learn's own checks ask of an estimator, as far as it makes sense for images

def test_clone_and_params():
    a = model(layers=('layer1', 'layer2'), k=3).fit(IMAGES[:2])
    b = clone(a)
    assert b.get_params() == a.get_params() and not hasattr(b, 'memory_bank_') and repr(b) == repr(a).split('):')[0]+')'
    assert list(a.get_params()) == [o for o in inspect.signature(PatchCore.__init__).parameters if o != 'self']
    assert b.set_params(k=5, resize=80) is b and (b.get_params()['k'], b.get_params()['resize'], a.k) == (5, 80, 3)
    with pytest.raises(ArgumentError, match="did you mean 'layers'"): b.set_params(layer=3)

def test_the_constructor_only_stores():
    for name, p in inspect.signature(PatchCore.__init__).parameters.items():
        if name == 'self': continue
        odd = object()
        assert PatchCore(**{name: odd}).get_params()[name] is odd, name
        assert p.default is inspect.Parameter.empty or isinstance(p.default, (type(None), bool, int, float, str, tuple)), name

def test_fit_returns_itself_and_learns_anew():
    m = model()
    assert m.fit(IMAGES[:3], None) is m
    first = m.memory_bank_.clone()
    assert torch.equal(m.fit(IMAGES[:3]).memory_bank_, first) and not torch.equal(m.fit(IMAGES[3:6]).memory_bank_, first)
    with pytest.raises(ArgumentError, match='call fit'): model().predict(IMAGES)


# Anything that holds images

class Pairs(Dataset):
    "Images with labels, as torch's datasets have them."
    def __len__(self): return len(IMAGES)
    def __getitem__(self, i):
        if not 0 <= i < len(IMAGES): raise IndexError(i)
        return torch.from_numpy(IMAGES[i]).permute(2, 0, 1), 0

def sources(folder):
    tensors = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    return {'paths': sorted(folder.iterdir()), 'names': [str(p) for p in sorted(folder.iterdir())], 'folder': folder, 'arrays': IMAGES, 'list of arrays': list(IMAGES), 'floats': IMAGES/255, 'tensors': tensors,
            'pillow': [Image.fromarray(o) for o in IMAGES], 'loader': DataLoader(Pairs(), batch_size=3), 'loader of tuples': DataLoader(TensorDataset(tensors), batch_size=3),
            'dicts': DataLoader([dict(image=o, label=0) for o in tensors], batch_size=4), 'dataset': Pairs(), 'generator': (o for o in IMAGES), 'samples': [Sample(p) for p in sorted(folder.iterdir())]}

SOURCES = list(sources(__import__('pathlib').Path('.')))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp('images')
    for i, o in enumerate(IMAGES): Image.fromarray(o).save(home/f'{i}.png')
    return home

@pytest.fixture(scope='module')
def fitted(): return model().fit(IMAGES)

@pytest.mark.parametrize('name', SOURCES)
def test_images_of_any_kind_give_one_model(folder, fitted, name):
    assert torch.equal(model().fit(sources(folder)[name]).memory_bank_, fitted.memory_bank_)
    assert torch.equal(fitted.predict(sources(folder)[name]).image_scores, fitted.predict(IMAGES).image_scores)

def test_one_image_is_a_batch_of_one(fitted):
    for one in (IMAGES[0], torch.from_numpy(IMAGES[0]).permute(2, 0, 1), Image.fromarray(IMAGES[0])): assert fitted.predict(one).image_scores.shape == (1,)

def test_loaders_that_cannot_be():
    with pytest.raises(ArgumentError, match="must hold an 'image', got pixels"): as_items(DataLoader([dict(pixels=torch.zeros(3, 4, 4))]))
    with pytest.raises(ArgumentError, match='float in \\[0, 1\\]'): model().fit(DataLoader(torch.randn(4, 3, 64, 64)))
    with pytest.raises(DataError, match='no images'): model().fit(DataLoader([]))


# Any size

@pytest.mark.parametrize('kw, grid', [(dict(imagesize=(48, 64)), (6, 8)), (dict(resize=(64, 96), imagesize=(64, 96)), (8, 12)), (dict(resize=(70, 96), imagesize=64), (8, 8)),
                                      (dict(imagesize=None), (8, 12)), (dict(resize=(48, 40), imagesize=None), (6, 5)), (dict(imagesize=60), (8, 8))])
@pytest.mark.parametrize('augment', [False, True])
def test_sizes(kw, grid, augment):
    wide = np.random.default_rng(1).integers(0, 256, (3, 80, 120, 3), np.uint8)
    m = model(**kw, augment=augment).fit(wide)
    p = m.predict(wide)
    assert m.grid_ == grid and p.patch_scores.shape[1:] == grid and p.anomaly_maps.shape[1:] == m.preprocess_.size
    assert m.n_patches_ == 3*(5 if augment else 1)*grid[0]*grid[1]
    back = p.original_map(0)
    assert back.shape == (80, 120) and (np.isnan(back).any() == (kw.get('imagesize', 64) is not None and m.preprocess_.size != (64, 96)))
    assert m.check(wide).grid_ == grid

def test_the_first_image_tells_the_shape_where_nothing_is_cut(tmp_path):
    shapes = [(80, 120), (120, 80), (64, 64)]
    m = model(imagesize=None).fit([np.zeros((*o, 3), np.uint8) for o in shapes])
    assert m.preprocess_ == Preprocess((64, 96), None) and m.predict(np.zeros((30, 30, 3), np.uint8)).anomaly_maps.shape == (1, 64, 96)
    again = load(save(m, tmp_path/'m', 'ours'), device='cpu')
    assert again.preprocess_ == m.preprocess_ and again.imagesize is None
    other = load(tmp_path/'m', device='cpu', resize=32)
    assert other.preprocess_ == Preprocess((32, 48), None)

def test_images_too_small_for_a_rectangle():
    with pytest.raises(DataError, match='90 x 64 when scaled.*imagesize=None'): model(imagesize=(64, 96)).fit(np.zeros((2, 64, 90, 3), np.uint8))

@pytest.mark.parametrize('kw', [dict(), dict(imagesize=(224, 300)), dict(imagesize=None), dict(resize=(256, 256)), dict(resize=(250, 180), imagesize=(240, 170))])
def test_a_defect_comes_back_where_it_was_drawn(kw):
    "On a photograph of 700 x 500."
    rng = np.random.default_rng(0)
    def photo(): return np.clip(rng.normal(120, 6, (500, 700, 1)).repeat(3, 2), 0, 255).astype(np.uint8)
    good, bad = [photo() for _ in range(4)], photo()
    bad[230:262, 400:440] = 250
    p = PatchCore('filterbank', ratio=.05, target_dim=128, device='cpu', **kw).fit(good).predict(bad)
    m, (w, h) = p.original_map(0), p.preprocess.scaled_size((700, 500))
    cell = np.array([8*500/h, 8*700/w]) # a patch's step, in the photograph
    assert m.shape == (500, 700)
    row, col = np.unravel_index(np.nanargmax(m), m.shape)
    hot = np.argwhere(m > .5*np.nanmax(m))
    assert (np.abs([row-246, col-420]) < cell).all() and (np.abs(hot.mean(0)-(246, 420)) < .75*cell).all()

def test_maps_lie_over_masks(tmp_path):
    "The same cut for image and mask, at rectangles too."
    tile = load_category('mvtec', make_miniature(tmp_path, size=(60, 90)), 'tile')
    for pre in (Preprocess(48, (40, 64)), Preprocess(48, None), Preprocess((33, 70), (30, 64))):
        masks = read_masks(tile.test, pre)
        assert masks.shape[1:] == pre.settle((90, 60)).size
        for o, mask in zip(tile.test[2:], masks[2:]):
            bright = torch.from_numpy(np.asarray(pre.crop(Image.open(o.path)))[..., 0] > 185)
            assert (bright & mask).sum() > .9*mask.sum() > 0 and (bright & ~mask).sum() < .5*mask.sum()


# More images, fewer images, other people's images

@pytest.mark.parametrize('kw', [dict(), dict(augment=True), dict(imagesize=(48, 64)), dict(sampler='identity'), dict(k=3), dict(search='fast'), dict(patch_score='reweighted')])
def test_partial_fit_covers_the_new_images(kw):
    m = model(**kw).fit(IMAGES[:3])
    before, r = len(m.memory_bank_), m.radii_[-1]
    assert m.partial_fit(IMAGES[3:]) is m
    assert m.n_images_ == 8 and m.radii_ == [r] and m.sizes_ == [len(m.memory_bank_)] and len(m.origin_) == len(m.memory_bank_) > before
    if not m.augment: assert reach(m, IMAGES) <= r*(1+1e-4)+1e-4
    for j in (before, len(m.memory_bank_)-1): # each new row is the patch that it says it is
        i, row, col = m.origin_[j].tolist()
        assert i >= 3
        if not m.augment: assert torch.allclose(next(m.embedder_([IMAGES[i]]))[0, row, col], m.memory_bank_[j], rtol=1e-3, atol=1e-4)

def test_partial_fit_of_an_unfitted_model_is_fit(fitted): assert torch.equal(model().partial_fit(IMAGES).memory_bank_, fitted.memory_bank_)

def test_one_image_more_than_k_allows_a_fit():
    "A single image has too few patches for k at this ratio, the model has enough."
    m = model(ratio=.02, k=5).fit(IMAGES[:6])
    assert m.partial_fit(IMAGES[6]).n_images_ == 7

def fresh_calibration(m):
    "What the images held out say of the model as it is."
    p = m.predict(m.held_)
    return calibrate(p.image_scores, p.anomaly_maps.amax((1, 2)), m.false_alarms, m.confidence)

@pytest.mark.parametrize('n, confidence, promise', [(45, .9, 'confidence'), (44, .9, 'average'), (44, None, 'average'), (19, .9, 'average'), (18, .9, None)])
def test_what_a_number_of_held_out_images_promises(n, confidence, promise, recwarn):
    rng = np.random.default_rng(4)
    m = model(train_val_split=4.5/(n+4), confidence=confidence).fit(rng.integers(0, 256, (n+4, 64, 64, 3), np.uint8))
    assert len(m.held_) == n and m.calibration_.promise == promise and (m.threshold_ is None) == (promise is None)
    assert bool([o for o in recwarn if 'held-out images are too few' in str(o.message)]) == (promise != 'confidence' and confidence is not None)

def test_an_approximate_threshold_goes_with_a_word():
    "The patches of the images that set it are gone."
    many = np.random.default_rng(6).integers(0, 256, (20, 64, 64, 3), np.uint8)
    fitted = model().fit(many[:19])
    assert fitted.calibration_.promise == 'approximate' and fitted.threshold_ > 0 and model().fit(many[:18]).threshold_ is None
    for change in (lambda: fitted.shrink(.05), lambda: copy.deepcopy(fitted).forget(0), lambda: copy.deepcopy(fitted).partial_fit(many[19:]), lambda: fitted.merge(fitted)):
        with pytest.warns(UserWarning, match='approximate one, which only fit finds: the model has none now'): assert change().calibration_ is None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert model().fit(many[:18]).shrink(.05).threshold_ is None # there was none

def test_what_cannot_be_learned_on_is_refused():
    m = model(denoise=.1).fit(IMAGES[:4])
    before = m.fitted_
    with pytest.raises(ArgumentError, match=r'denoise=0.1: fit anew'): m.partial_fit(IMAGES[4:6])
    assert m.fitted_ is before
    assert model(denoise=.1).partial_fit(IMAGES[:4]).is_fitted # which is a fit

@pytest.mark.parametrize('name, values', [('false_alarms', (.05, .1)), ('false_alarms', (.05, None)), ('confidence', (.9, None))])
def test_members_that_wish_for_different_thresholds_are_refused(name, values):
    apart = Ensemble([model(**{name: o}) for o in values])
    for ask in (apart.check, lambda: apart.fit(IMAGES)):
        with pytest.raises(ArgumentError, match=f'{name} of the members differ'): ask()
    assert not any(o.is_fitted for o in apart.members) and apart.set_params(**{name: values[0]}).check()

def test_filters_are_not_multiplied_by_eight_bits():
    with pytest.raises(ArgumentError, match='FilterBank is not computed in bfloat16.*pass precision float32'): PatchCore('filterbank', ['layer2'], precision='bfloat16', **SMALL).check()

def test_thresholds_follow_the_memory():
    rng = np.random.default_rng(2)
    many = rng.integers(0, 256, (116, 64, 64, 3), np.uint8)
    m = model(train_val_split=.5).fit(many[:100])
    first, held = m.calibration_, len(m.held_)
    assert first == fresh_calibration(m) and first.promise == 'confidence' and len(first) == held == 50
    m.partial_fit(many[100:])
    assert len(m.held_) == held+8 and m.n_images_ == 58
    assert m.calibration_ == fresh_calibration(m) and m.threshold_ == m.calibration_.threshold and len(m.calibration_) == 58
    m.forget(int(m.origin_[0, 0]))
    assert len(m.held_) == held+8 and m.calibration_ == fresh_calibration(m)

def test_held_out_images_that_are_gone(tmp_path):
    rng = np.random.default_rng(2)
    m = load(save(model(train_val_split=.5).fit(rng.integers(0, 256, (50, 64, 64, 3), np.uint8)), tmp_path/'m', 'ours'), device='cpu')
    assert m.threshold_ > 0 and m.calibration_.promise == 'average'
    with pytest.warns(UserWarning, match='the model has none now'): m.forget(int(m.origin_[0, 0]))
    assert m.threshold_ is None
    with pytest.warns(UserWarning, match='4 held-out images are too few'): m.partial_fit(IMAGES)
    assert m.partial_fit(rng.integers(0, 256, (50, 64, 64, 3), np.uint8)).threshold_ > 0 # enough new ones were held out

def test_a_saved_model_goes_on_learning_and_forgetting(folder, tmp_path):
    paths = sorted(folder.iterdir())
    m = load(save(model().fit(paths[:5]), tmp_path/'a', 'ours'), device='cpu').partial_fit(paths[5:])
    m = load(save(m, tmp_path/'b', 'ours'), device='cpu')
    assert m.idxs_ is None and m.n_images_ == 8
    kept = m.memory_bank_[~torch.isin(m.origin_[:, 0], torch.tensor([2, 6]))]
    m.forget(paths[2], str(paths[6]))
    assert torch.equal(m.memory_bank_, kept) and not {2, 6} & set(m.origin_[:, 0].tolist()) and m.n_images_ == 6
    assert reach(m, [p for i, p in enumerate(paths) if i not in (2, 6)]) <= m.radii_[-1]
    with pytest.raises(DataError, match='none of the images'): m.forget(paths[2])
    again = load(save(m, tmp_path/'c', 'ours'), device='cpu')
    assert torch.equal(again.predict(paths).anomaly_maps, m.predict(paths).anomaly_maps)
    with pytest.raises(ArgumentError, match='put together'): again.shrink(.01)

def test_forgetting_what_was_never_learned(fitted):
    for image, error in [(8, 'not in memory'), (-1, 'not in memory')]:
        with pytest.raises(ArgumentError, match=error): clone(fitted).fit(IMAGES).forget(image)
    with pytest.raises(DataError, match='none of the images'): clone(fitted).fit(IMAGES).forget(np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ArgumentError, match='call fit before forget'): model().forget(0)

def test_one_image_twice():
    m = model().fit(IMAGES[[0, 1, 0]])
    assert set(m.forget(IMAGES[0]).origin_[:, 0].tolist()) == {1}

def test_merge():
    a, b = model().fit(IMAGES[:3]), model().fit(IMAGES[3:5])
    c = a.merge(b, model().fit(IMAGES[5:]))
    assert c.radii_ == [max(o.radii_[-1] for o in (a, b, model().fit(IMAGES[5:])))] and a.radii_[-1] != b.radii_[-1]
    assert (c.n_images_, c.n_patches_) == (8, 8*64) and reach(c, IMAGES) <= c.radii_[-1]*(1+1e-4)
    assert torch.equal(c.predict(IMAGES).patch_scores, torch.stack([o.predict(IMAGES).patch_scores for o in (a, b, model().fit(IMAGES[5:]))]).amin(0))
    assert len(a.memory_bank_)+len(b.memory_bank_) < len(c.memory_bank_) and len(a.memory_bank_) == 19 # a itself is as it was
    for kw, word in [(dict(seed=1), 'weights_sha256'), (dict(patchsize=5), 'patchsize'), (dict(imagesize=56), 'imagesize')]:
        with pytest.raises(ArgumentError, match=word): a.merge(model(**kw).fit(IMAGES[3:5]))

def test_models_of_different_ranges_are_told_what_to_do():
    deep = np.random.default_rng(1).integers(0, 4000, (6, 64, 64), np.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        one, other = model().fit(list(deep[:3])), model().fit(list(deep[3:]//2))
        with pytest.raises(ArgumentError, match='different value_range.*fit both with the same one'): one.merge(other)
        pair = [model(value_range=(0, 4095)).fit(list(o)) for o in (deep[:3], deep[3:]//2)]
        assert pair[0].merge(pair[1]).n_images_ == 6

def test_merged_models_are_calibrated_by_what_all_held_out():
    many = np.random.default_rng(7).integers(0, 256, (100, 64, 64, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # which would say that half of them promise less
        a, b = (model(train_val_split=.5).fit(o) for o in (many[:50], many[50:]))
    c = a.merge(b)
    assert len(c.held_) == 50 and all(np.array_equal(x, y) for x, y in zip(c.held_, a.held_+b.held_))
    assert c.calibration_ == fresh_calibration(c) and c.calibration_.promise == 'confidence' and a.calibration_.promise == b.calibration_.promise == 'average'

def test_half_of_the_held_out_images_is_no_calibration(tmp_path):
    "A model from disk has its threshold but not the images that set it; its partner's alone would promise too much."
    many = np.random.default_rng(8).integers(0, 256, (140, 64, 64, 3), np.uint8)
    a, b = model(train_val_split=.45).fit(many[:90]), model(train_val_split=.5).fit(many[90:])
    away = load(save(a, tmp_path/'a', 'ours'), device='cpu')
    assert away.held_ is None and away.threshold_ == a.threshold_ > 0 and len(b.held_) == 25
    for first, second in ((away, b), (b, away)):
        with pytest.warns(UserWarning, match='the model has none now'): c = first.merge(second)
        assert c.threshold_ is None and not c.held_

def test_models_of_the_reference_neither_learn_nor_forget(testdata):
    m = load(testdata/'golden'/'model_single', weights_dir=testdata/'weights')
    for f in (lambda: m.partial_fit(IMAGES), lambda: m.forget(0), lambda: m.merge(m)):
        with pytest.raises(ArgumentError, match="reference's files do not tell"): f()

def test_half_and_the_other_half_of_bottle(testdata):
    "As good as all at once, and covered at most half as well."
    from patchcore_nb.evaluation import auroc
    bottle = load_category('mvtec', testdata/'data'/'mvtec256', 'bottle')
    bottle = dataclasses.replace(bottle, train=bottle.train[::3], test=bottle.test[::2]) # for the sake of time
    labels = [o.label for o in bottle.test]
    kw = dict(backbone='resnet18', ratio=.02, weights_dir=testdata/'weights', device='cpu')
    whole, parts = PatchCore(**kw).fit(bottle), PatchCore(**kw).fit(bottle.train[::2]).partial_fit(bottle.train[1::2])
    assert parts.n_images_ == whole.n_images_ == 70
    assert auroc(parts.predict(bottle.test).image_scores, labels) >= auroc(whole.predict(bottle.test).image_scores, labels)-.005
    assert parts.radii_[-1] <= 2*whole.radii_[-1]
    path = bottle.train[7].path
    number = [i for i, o in enumerate(bottle.train[::2]+bottle.train[1::2]) if o.path == path]
    assert not torch.isin(parts.forget(path).origin_[:, 0], torch.tensor(number)).any()


# In a new process

RUN = 'import sys; import numpy as np, torch; from patchcore_nb.store import load; x = np.load(sys.argv[2]); p = load(sys.argv[1], device="cpu").predict(x); torch.save([p.image_scores, p.anomaly_maps], sys.argv[3])'

@pytest.mark.parametrize('make', [lambda: model(), lambda: Ensemble([model(layers=('layer2',)), model(layers=('layer3',), target_dim=32), model(seed=3)]), lambda: PatchCore('filterbank', **SMALL)], ids=['single', 'ensemble', 'filterbank'])
def test_a_saved_model_in_a_new_process_is_the_same_to_the_bit(make, tmp_path):
    m = make().fit(IMAGES)
    np.save(tmp_path/'x.npy', IMAGES[4])
    save(m, tmp_path/'m', 'ours')
    subprocess.run([sys.executable, '-c', RUN, str(tmp_path/'m'), str(tmp_path/'x.npy'), str(tmp_path/'out.pt')], check=True)
    p = m.predict(IMAGES[4])
    for got, want in zip(torch.load(tmp_path/'out.pt'), (p.image_scores, p.anomaly_maps)): assert torch.equal(got, want)

def test_good_images_set_aside_by_a_dataset_set_the_threshold(tmp_path):
    paths = []
    for i, o in enumerate(np.random.default_rng(5).integers(0, 256, (51, 64, 64, 3), np.uint8)):
        Image.fromarray(o).save(tmp_path/f'{i}.png')
        paths.append(Sample(tmp_path/f'{i}.png'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        m = model().fit(Category('x', 'y', paths[:6], [], calibration=paths[6:]))
    assert m.n_images_ == 6 and m.calibration_.promise == 'confidence' and m.calibration_ == fresh_calibration(m) and (m.predict([o.path for o in paths[6:]]).image_scores > m.threshold_).float().mean() <= .05


def test_all_suspects_of_a_large_memory(monkeypatch):
    "Fit judges a hundred images of a large memory; whoever hands over the images gets all."
    monkeypatch.setattr(left_out, 'MANY', 1)
    images = np.random.default_rng(1).integers(0, 256, (104, 64, 64, 3), np.uint8)
    m = model().fit(images)
    assert [len(o) for o in (m.suspects(), m.suspects(images), m.suspects())] == [100, 104, 104]

def test_a_loaded_model_does_not_keep_half_a_calibration(tmp_path):
    "Its held-out images are not at hand; those of `partial_fit` alone would be another promise."
    images = np.random.default_rng(2).integers(0, 256, (40, 64, 64, 3), np.uint8)
    m = model(train_val_split=.5, false_alarms=.3, confidence=.9).fit(images[:24])
    assert m.calibration_.promise == 'confidence' and len(m.calibration_) == 12
    save(m, tmp_path/'m', 'ours')
    again = load(tmp_path/'m', device='cpu')
    with pytest.warns(UserWarning, match='not at hand'): again.partial_fit(images[24:])
    assert again.threshold_ is None and len(m.partial_fit(images[24:]).calibration_) == 20


# scikit-learn takes it

@pytest.fixture(scope='module')
def cogs(demo_root): # paths, and labels: 1 = defective
    "Good cogs to learn from, and cogs of both kinds to judge, as scikit-learn wants them: together."
    cog = load_category('demo', demo_root, 'cog')
    samples = [*cog.train[:12], *cog.test]
    return [str(o.path) for o in samples], np.array([int(o.label) for o in samples])

QUICK = dict(backbone='filterbank', resize=96, imagesize=96, target_dim=64, ratio=.1, device='cpu', num_workers=0, false_alarms=None)

def folds(): return StratifiedKFold(2, shuffle=True, random_state=0)

def test_a_grid_search_over_k_and_ratio(cogs):
    "Labels tell fit which images to leave out, and score which ones to find."
    paths, labels = cogs
    grid = GridSearchCV(PatchCore(**QUICK), dict(k=[1, 3], ratio=[.02, .1]), cv=folds(), error_score='raise').fit(paths, labels)
    best, table = grid.best_estimator_, grid.cv_results_
    assert best.is_fitted and best.n_images_ == (labels == 0).sum() and (best.k, best.ratio) == (grid.best_params_['k'], grid.best_params_['ratio'])
    assert len(table['params']) == 4 and grid.best_score_ == table['mean_test_score'].max() > .6
    learn, judge = next(folds().split(paths, labels))
    alone = PatchCore(**QUICK | dict(k=3, ratio=.02)).fit([paths[i] for i in learn if not labels[i]])
    seen = alone.predict([paths[i] for i in judge])
    column = table['params'].index(dict(k=3, ratio=.02))
    assert table['split0_test_score'][column] == pytest.approx(auroc(seen.image_scores, labels[judge]), abs=1e-9)

def test_a_grid_search_over_an_ensemble(cogs):
    "An argument of the ensemble is one of all its members."
    paths, labels = cogs
    pair = Ensemble([PatchCore(**QUICK, layers=[o]) for o in ('layer2', 'layer3')])
    grid = GridSearchCV(pair, dict(k=[1, 2]), cv=folds(), error_score='raise').fit(np.array(paths), labels)
    assert [o.k for o in grid.best_estimator_.members] == [grid.best_params_['k']]*2 and not pair.is_fitted
    assert grid.best_estimator_.members[0].n_images_ == (labels == 0).sum()

def test_cross_validation(cogs):
    paths, labels = cogs
    found = cross_val_score(PatchCore(**QUICK), paths, labels, cv=folds(), error_score='raise')
    assert found.shape == (2,) and (found > .5).all()
    for images in (np.array(paths), [np.asarray(Image.open(o)) for o in paths]):
        assert np.array_equal(cross_val_score(PatchCore(**QUICK), images, labels, cv=folds(), error_score='raise'), found)

def read_all(paths): return [np.asarray(Image.open(o)) for o in paths]

def test_a_pipeline(cogs):
    "Alone in it, and behind a step that reads the images."
    paths, labels = cogs
    steps = [('read', FunctionTransformer(read_all)), ('detector', PatchCore(**QUICK))]
    pipe = clone(Pipeline(steps)).set_params(detector__k=2, detector__ratio=.02).fit(paths, labels)
    alone = Pipeline([('detector', PatchCore(**QUICK | dict(k=2, ratio=.02)))]).fit(paths, labels)
    assert torch.equal(pipe.predict(paths).anomaly_maps, alone.predict(paths).anomaly_maps)
    assert pipe.get_params()['detector__k'] == 2 and steps[1][1].k == 1 and not steps[1][1].is_fitted
    assert pipe.score(paths, labels) == alone.score(paths, labels) == auroc(pipe.predict(paths).image_scores, labels)
    grid = GridSearchCV(Pipeline(steps), {'detector__k': [1, 2]}, cv=folds(), error_score='raise').fit(paths, labels)
    assert grid.best_estimator_['detector'].k == grid.best_params_['detector__k']

@pytest.mark.parametrize('make', [lambda: PatchCore(**QUICK), lambda: Ensemble([PatchCore(**QUICK), PatchCore(**QUICK)])], ids=['single', 'ensemble'])
def test_what_is_not_fitted_says_so_to_both(make):
    "An error of scikit-learn's that is one of ours, from whatever asks."
    m = make()
    for ask in (lambda: check_is_fitted(m), lambda: m.predict(IMAGES), lambda: m.threshold_, lambda: m.score(IMAGES, [0, 1]*4)):
        with pytest.raises(NotFittedError, match='call fit') as e: ask()
        assert isinstance(e.value, ArgumentError) and isinstance(e.value, AttributeError)
    for protocol in range(6):
        again = pickle.loads(pickle.dumps(e.value, protocol))
        assert isinstance(again, NotFittedError) and isinstance(again, ArgumentError) and str(again) == str(e.value)
    assert not hasattr(m, 'threshold_') and not Pipeline([('m', m)]).__sklearn_is_fitted__()
    check_is_fitted(m.fit(IMAGES[:2]))

def test_clones(cogs):
    a = Ensemble([model(k=2).fit(IMAGES[:2]), model(layers=['layer1']).fit(IMAGES[:2])])
    b = clone(a)
    assert b is not a and not b.is_fitted and all(x is not y for x, y in zip(a.members, b.members))
    assert [o.get_params() for o in b.members] == [o.get_params() for o in a.members]

def test_labels_that_cannot_be():
    for y, word in (([0]*7, 'shape'), ([0]*7+[2], 'got 2'), ([1]*8, 'all images are labelled defective')):
        with pytest.raises((ArgumentError, DataError), match=word): model().fit(IMAGES, y)


# Copies

@pytest.fixture(scope='module')
def pair(): return Ensemble([model(layers=('layer2',)), PatchCore('filterbank', **SMALL)]).fit(IMAGES)

@pytest.fixture(params=['single', 'ensemble'])
def either(request, fitted, pair): return fitted if request.param == 'single' else pair

def as_good(again, m):
    "The same answers to the last bit, and able to go on."
    assert torch.equal(again.predict(IMAGES).anomaly_maps, m.predict(IMAGES).anomaly_maps) and again.threshold_ == m.threshold_
    before = m.predict(IMAGES).image_scores
    again.members[0].forget(0)
    assert again.members[0].n_images_ == m.members[0].n_images_-1 and torch.equal(m.predict(IMAGES).image_scores, before)

@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL+1))
def test_pickles(either, protocol): as_good(pickle.loads(pickle.dumps(either, protocol)), either)

def test_copies(either): as_good(copy.deepcopy(either), either)

def test_joblib(either, tmp_path):
    joblib.dump(either, tmp_path/'m')
    as_good(joblib.load(tmp_path/'m'), either)

def test_torch_save(either, tmp_path):
    torch.save(either, tmp_path/'m')
    as_good(torch.load(tmp_path/'m', weights_only=False), either)

@pytest.mark.parametrize('search', ['exact', 'fast', 'fp16', 'int8'])
def test_pickles_of_every_search(search):
    m = model(search=search).fit(IMAGES)
    assert torch.equal(pickle.loads(pickle.dumps(m)).predict(IMAGES).anomaly_maps, m.predict(IMAGES).anomaly_maps)

def test_a_spawned_pool(either):
    "Another process, which begins with nothing."
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        found = [pool.submit(either.predict, o) for o in (IMAGES, IMAGES[:3])]
        assert torch.equal(found[0].result(timeout=300).anomaly_maps, either.predict(IMAGES).anomaly_maps)
        assert len(found[1].result(timeout=300)) == 3
        with pytest.raises(ArgumentError, match='call fit'): pool.submit(model().predict, IMAGES).result(timeout=300)


# Set by hand

OTHERS = dict(backbone='resnet34', layers=('layer1',), ratio=.2, sampler='random', k=3, patch_score='mean', patchsize=5, more_patchsizes=(1,), stride=2, pretrain_dim=32, target_dim=32,
              preprocessing='conv', aggregation='mlp', resize=32, imagesize=56, augment=True, train_val_split=.5, false_alarms=None, confidence=None, denoise=.1, weights='pretrained', seed=5, search='fast',
              precision='bfloat16', distance='cosine', reweight_k=3, smoothing=2, value_range=(0, 4095), batchnorm='trained', mean_std='weights', tile=32, tile_overlap=.5)

def test_no_argument_is_left_out(): assert {*OTHERS, *RUNTIME} == {*PARAMS}

@pytest.mark.parametrize('by', ['hand', 'set_params'])
@pytest.mark.parametrize('name', OTHERS)
def test_another_model_is_not_fitted(fitted, name, by):
    "What says what the model is takes all that was fitted with it."
    m = copy.deepcopy(fitted)
    value = getattr(m, name)
    setattr(m, name, value)
    assert m.is_fitted # it is as it was
    if by == 'hand': setattr(m, name, OTHERS[name])
    else: m.set_params(**{name: OTHERS[name]})
    assert getattr(m, name) == OTHERS[name] and not m.is_fitted
    with pytest.raises(ArgumentError, match='call fit'): m.predict(IMAGES)

def test_what_was_set_is_what_is_fitted(fitted):
    m = copy.deepcopy(fitted)
    m.k, m.distance, m.resize, m.imagesize = 3, 'cosine', 70, 64
    want = model(k=3, distance='cosine', resize=70).fit(IMAGES)
    assert torch.equal(m.fit(IMAGES).predict(IMAGES).anomaly_maps, want.predict(IMAGES).anomaly_maps)

@pytest.mark.parametrize('name, value', [('batch_size', 2), ('num_workers', 0), ('search_threads', 1), ('show', True), ('memory_budget', '4GB'), ('device', 'cpu'), ('search_device', 'cpu')])
def test_the_same_model_elsewhere(fitted, name, value):
    "Where and how it is computed takes effect at once, and changes no score."
    m = copy.deepcopy(fitted)
    setattr(m, name, value)
    assert m.is_fitted and getattr(m.embedder_.how, name) == value
    assert torch.allclose(m.predict(IMAGES).image_scores, fitted.predict(IMAGES).image_scores, rtol=1e-5, atol=0)

def test_a_cache_and_a_folder_take_effect(fitted, tmp_path):
    m = copy.deepcopy(fitted)
    m.cache, m.spill_dir = tmp_path/'cache', tmp_path
    m.predict(IMAGES[:2])
    assert len(list((tmp_path/'cache').rglob('*.safetensors'))) == 2

def test_a_setting_that_cannot_be_is_refused_and_can_be_mended(fitted):
    m = copy.deepcopy(fitted)
    m.batch_size = 0
    with pytest.raises(ArgumentError, match='batch_size'): m.predict(IMAGES)
    m.batch_size = 8
    assert torch.equal(m.predict(IMAGES).image_scores, fitted.predict(IMAGES).image_scores)

VIEWS = [o for o, v in vars(PatchCore).items() if o.endswith('_') and not o.startswith('_') and isinstance(v, property)]

def test_there_are_views(): assert {'memory_bank_', 'threshold_', 'radii_', 'origin_', 'grid_', 'fitted_', 'calibration_', 'pace_'} <= set(VIEWS)

@pytest.mark.parametrize('name', [*VIEWS, 'members', 'is_fitted', 'embedding', 'recipe', 'compute'])
def test_views_are_read_only(fitted, name):
    with pytest.raises(AttributeError): setattr(fitted, name, 1)

@pytest.mark.parametrize('name, near', [('nonsense', 'unknown argument'), ('ration', "did you mean 'ratio'"), ('batchsize', "'batch_size'"), ('b', 'is called reweight_k now'), ('scale_to', 'unknown argument'), ('threshold', 'unknown argument')])
def test_what_does_not_exist_is_refused(fitted, name, near):
    for how in (lambda: setattr(fitted, name, 1), lambda: fitted.set_params(**{name: 1})):
        with pytest.raises(ArgumentError, match=near): how()
    with pytest.raises(ArgumentError, match=near): fitted.set_params(k=3, **{name: 1})
    assert fitted.is_fitted and fitted.k == 1 # nothing was changed before the refusal

def test_an_ensemble_by_hand(pair):
    for name in ('k', 'nonsense', 'threshold_', 'units_', 'members'):
        with pytest.raises((ArgumentError, AttributeError)): setattr(pair, name, 3)
    m = copy.deepcopy(pair)
    m.models = m.models[:1]
    assert len(m) == 1 and torch.equal(m.predict(IMAGES).members[0].image_scores, pair.predict(IMAGES).members[0].image_scores)
    m.set_params(k=2)
    assert not m.is_fitted and m.members[0].k == 2


# Arguments that cannot be are named, numbers of numpy are numbers

WRONG = [('ratio', ['x', None, '0.1', True, float('nan')]), ('train_val_split', ['x', None, True]), ('denoise', ['x', None, True]), ('stride', ['1', 1.5, None]), ('patchsize', ['3', 3., None, True]), ('pretrain_dim', ['x', 1.5]), ('target_dim', ['x', 1.5]),
         ('more_patchsizes', [3, None, ['3'], [99]]), ('resize', [(64,), 64., 'x', True]), ('imagesize', [(64,), 'x', 64.]), ('layers', [3, None, 'layer2', [3]]), ('backbone', [3, None]), ('seed', ['x', None, 2**80, 1.5, True]), ('cache', [3]), ('spill_dir', [3]),
         ('weights_dir', [3]), ('device', ['x', 1.5, True, [0]]), ('search_device', ['x', 1.5]), ('augment', ['no', 2]), ('smoothing', [True, '4', -1]), ('show', ['yes']), ('k', ['1', True, 1.]), ('patch_score', [3, 'maks']), ('sampler', [3]), ('search', [3]), ('distance', [None]),
         ('weights', [3]), ('batch_size', ['x', 2.5]), ('num_workers', [None]), ('search_threads', ['x']), ('memory_budget', [3.5, 'lots']), ('false_alarms', ['x', True]), ('confidence', [[1]])]

@pytest.mark.parametrize('name, value', [(k, o) for k, v in WRONG for o in v], ids=str)
def test_an_argument_of_a_wrong_type_is_named(name, value):
    with pytest.raises(ArgumentError) as e: PatchCore(**dict(backbone='filterbank') | SMALL | {name: value}).fit(IMAGES[:3])
    assert name in str(e.value) and len(str(e.value).splitlines()) == 1

def test_what_a_wrong_argument_is_told():
    for name, value, said in [('layers', 'layer2', "layers must be a list, got 'layer2': pass ['layer2']"), ('more_patchsizes', 3, 'more_patchsizes must be a list, got 3: pass [3]'), ('ratio', 'x', "ratio must be a number, got 'x': pass 0.1"),
                              ('patchsize', None, 'patchsize must be a whole number, got None: pass 3'), ('cache', 3, 'cache must be a path or None, got 3: leave it out')]:
        with pytest.raises(ArgumentError) as e: model(**{name: value}).check()
        assert str(e.value) == said

@pytest.mark.parametrize('kw', [dict(k=np.int64(1), seed=np.int64(0), batch_size=np.int64(2), num_workers=np.int32(0), search_threads=np.int64(1), smoothing=np.float32(4), false_alarms=np.float64(.05), ratio=np.float64(.1), memory_budget=np.int64(4e9)),
                                dict(resize=np.int64(64), imagesize=(np.int64(64), 64), patchsize=np.int64(3), target_dim=np.int64(64), layers=np.array(['layer2', 'layer3']), device=np.int64(-1), show=np.bool_(False))], ids=['recipe', 'embedding'])
def test_numbers_of_numpy_are_numbers(fitted, kw, tmp_path):
    m = model(**kw, cache=tmp_path).fit(IMAGES)
    assert torch.equal(m.predict(IMAGES).image_scores, fitted.predict(IMAGES).image_scores)

def test_an_array_as_an_argument_is_compared_by_its_values(fitted):
    m = copy.deepcopy(fitted)
    m.layers = np.array(['layer2', 'layer3'])
    m.layers = np.array(['layer2', 'layer3'])
    m.fit(IMAGES[:2]).layers = np.array(['layer2', 'layer3'])
    assert m.is_fitted
    m.layers = np.array(['layer2'])
    assert not m.is_fitted

@pytest.mark.parametrize('ask, word', [(lambda m: m.view(IMAGES[0], 'upside'), 'unknown turn'), (lambda m: m.make_maps(torch.zeros(8, 8)), r'patch_scores must be \(B, h, w\)'), (lambda m: m.predict(IMAGES).original_map(8), 'one of the 8 images'),
                                       (lambda m: m.plan('x'), 'n_images must be'), (lambda m: m.plan(4, 'x'), 'n_test must be'), (lambda m: m.shrink('.1'), 'ratio must be'), (lambda m: m.shrink(None), 'ratio must be')])
def test_a_question_that_cannot_be_is_told_why(fitted, ask, word):
    with pytest.raises(ArgumentError, match=word): ask(fitted)

@pytest.mark.parametrize('images', [[2, 3], (2,), torch.tensor(2), torch.tensor([2, 3]), np.array([2, 3]), np.array(2), 2., True, None, range(2), {2, 3}], ids=str)
def test_numbers_to_forget_come_one_by_one(fitted, images):
    with pytest.raises(ArgumentError, match=r'pass numbers one by one, forget\(2, 3\)'): copy.deepcopy(fitted).forget(images)

def test_suspects_of_other_images(fitted):
    "Also where the answer is known since the fit."
    known = fitted.suspects()
    assert fitted.suspects(IMAGES).equals(known) and fitted.suspects(o for o in IMAGES).equals(known)
    with pytest.raises(DataError, match='image 0 is not the one that was given to fit'): fitted.suspects(IMAGES[::-1])
    with pytest.raises(ArgumentError, match='takes the 8 images'): fitted.suspects(IMAGES[:3])

OWN = {'patch_score': [lambda s: s, lambda s: [1.]*len(s), lambda s: s.amax()], 'distance': [lambda d: d[:, 0], lambda d: d.numpy(), lambda d: d.T],
       'sampler': [lambda r, s, *_: torch.arange(s[-1]), lambda r, s, *_: Sampled(torch.arange(3), torch.zeros(3), []), lambda r, s, *_: Sampled(torch.zeros(s[-1]).long(), torch.zeros(s[-1]), [])]}

@pytest.mark.parametrize('what, i', [(k, i) for k, v in OWN.items() for i in range(len(v))])
def test_a_part_of_ones_own_that_returns_something_else(monkeypatch, what, i):
    table = dict(patch_score=PATCH_SCORES, distance=DISTANCES, sampler=SAMPLERS)[what]
    monkeypatch.setitem(table.found, 'mine', OWN[what][i])
    with pytest.raises(ArgumentError, match=f"{what} 'mine' must return"): PatchCore('filterbank', **SMALL | {what: 'mine', 'k': 3}).fit(IMAGES).predict(IMAGES)

def test_a_search_that_is_none(monkeypatch):
    with pytest.raises(ArgumentError, match="search 'mine' must be a class with fit"): register_search('mine')(lambda queries, k: None)
    assert 'mine' not in SEARCHES
    monkeypatch.setitem(SEARCHES.found, 'mine', type('Mine', (), dict(fit=lambda self, bank: self)))
    with pytest.raises(ArgumentError, match="search 'mine' must be a class with fit"): model(search='mine').check()


# What fails, changes nothing

def broken(*args, **kw): raise OSError('the disk is full')
def stopped(*args, **kw): raise KeyboardInterrupt
ODD = np.full((1, 64, 64, 3), np.nan) # an image that cannot be read, behind some that can

FAILURES = {
    'fit on nothing': lambda m: m.fit([]), 'fit on too few': lambda m: m.fit([IMAGES[0]]*3, [1, 1, 1]), 'fit on odd images': lambda m: m.fit([*IMAGES[:5], ODD[0]]), 'fit on a path that is not there': lambda m: m.fit(['no/such/image.png']),
    'fit with odd labels': lambda m: m.fit(IMAGES, [3]*8), 'partial_fit on odd images': lambda m: m.partial_fit([*IMAGES[:5], ODD[0]]), 'partial_fit on nothing': lambda m: m.partial_fit([]),
    'forget of a stranger': lambda m: m.forget(0, 99), 'forget of another image': lambda m: m.forget(0, np.zeros((9, 9, 3), np.uint8)), 'merge': lambda m: m.merge(model(patchsize=5)), 'shrink': lambda m: m.shrink(.5),
    'predict': lambda m: m.predict([*IMAGES[:5], ODD[0]]), 'set_params': lambda m: m.set_params(k=3, nonsense=1)}

def unchanged(m, before, want):
    assert m.fitted_ is before and torch.equal(m.predict(IMAGES).anomaly_maps, want.anomaly_maps) and m.threshold_ == want.threshold
    assert m.embedder_ is before.embedder and m.get_params()['k'] == 1

@pytest.mark.parametrize('how', FAILURES)
def test_a_failure_leaves_a_fitted_model_as_it_was(fitted, how):
    m = copy.deepcopy(fitted)
    before, want = m.fitted_, m.predict(IMAGES)
    with pytest.raises((ArgumentError, DataError)): FAILURES[how](m)
    unchanged(m, before, want)

def test_a_check_that_fails_leaves_a_fitted_model_as_it_was(fitted):
    m = copy.deepcopy(fitted)
    before, want = m.fitted_, m.predict(IMAGES)
    m.batch_size = 0
    with pytest.raises(ArgumentError, match='batch_size'): m.check()
    with pytest.raises(ArgumentError, match='batch_size'): m.fit(IMAGES[:3])
    m.batch_size = 8
    unchanged(m, before, want)

PLACES = {'embedding': (Embedder, 'rows'), 'picking': (fitting, 'coreset'), 'the search': (fitting, 'make_scorer'), 'leaving out': (fitting, 'judge_without')}

@pytest.mark.parametrize('error', [broken, stopped])
@pytest.mark.parametrize('place', PLACES)
def test_a_fit_that_is_broken_off_leaves_a_fitted_model_as_it_was(fitted, monkeypatch, place, error):
    "Anywhere on the way, by an error or by the user."
    m = copy.deepcopy(fitted)
    before, want = m.fitted_, m.predict(IMAGES)
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[place], error)
        with pytest.raises((OSError, KeyboardInterrupt)): m.fit(IMAGES[:6])
    unchanged(m, before, want)
    assert m.fit(IMAGES[:6]).n_images_ == 6

@pytest.mark.parametrize('change', ['partial_fit', 'forget', 'shrink'])
def test_a_change_that_is_broken_off_leaves_a_fitted_model_as_it_was(fitted, monkeypatch, change):
    m = copy.deepcopy(fitted)
    before, want = m.fitted_, m.predict(IMAGES)
    with monkeypatch.context() as patch:
        patch.setattr(changes, 'make_scorer', broken)
        with pytest.raises(OSError): dict(partial_fit=lambda: m.partial_fit(IMAGES[::-1]+1), forget=lambda: m.forget(2), shrink=lambda: m.shrink(.01))[change]()
    unchanged(m, before, want)
    assert m.forget(2).n_images_ == 7

def test_an_ensemble_of_which_one_member_fails_is_as_it_was(pair):
    m = copy.deepcopy(pair)
    before, want = [o.fitted_ for o in m.members], m.predict(IMAGES)
    with pytest.raises(ArgumentError): m.fit([*IMAGES[:5], ODD[0]])
    calls, fit = [], PatchCore.fit
    def second_fails(self, *args, **kw):
        calls.append(self)
        return fit(self, *args, **kw) if len(calls) < 2 else broken()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PatchCore, 'fit', second_fails)
        with pytest.raises(OSError): m.fit(IMAGES[:6])
    assert all(o.fitted_ is p for o, p in zip(m.members, before)) and m.threshold_ == pair.threshold_
    assert torch.equal(m.predict(IMAGES).anomaly_maps, want.anomaly_maps)
    assert [o.n_images_ for o in m.fit(IMAGES[:6]).members] == [6, 6]

def test_an_ensemble_learns_from_what_can_be_read_once(pair):
    assert [o.n_images_ for o in clone(pair).fit(o for o in IMAGES).members] == [8, 8]


# Several threads, one model

def settings(): return torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

@pytest.fixture
def tf32(monkeypatch):
    "Settings as a user may have them, which no call may leave changed."
    threads, before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision('high')
    yield
    torch.set_float32_matmul_precision(before)
    torch.set_num_threads(threads)

KINDS = {'filterbank': lambda: PatchCore('filterbank', **SMALL | dict(num_workers=0, search_threads=1)), 'ResNet-18': lambda: model(num_workers=0), 'ensemble': lambda: Ensemble([model(layers=('layer2',), num_workers=0), PatchCore('filterbank', **SMALL)])}

def close(a, b): return torch.allclose(a.image_scores, b.image_scores, rtol=1e-5, atol=0) and (a.patch_scores is None or torch.allclose(a.patch_scores, b.patch_scores, rtol=1e-4, atol=1e-4))

@pytest.mark.parametrize('kind', KINDS)
def test_two_hundred_predictions_in_four_threads(kind, tf32):
    "As one after the other; and all that belongs to the process ends as it began."
    m, began = KINDS[kind]().fit(IMAGES[:5]), settings()
    alone = [m.predict(IMAGES[i]) for i in range(8)]
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda i: m.predict(IMAGES[i%8]), range(200)))
    assert len(found) == 200 and all(close(o, alone[i%8]) for i, o in enumerate(found))
    assert settings() == began

@pytest.mark.parametrize('kind', KINDS)
def test_predictions_beside_partial_fit_are_before_or_after(kind, tf32):
    "Never between: of a model that learns again and again, each answer is that of one moment."
    new = np.random.default_rng(9).integers(0, 256, (3, 64, 64, 3), np.uint8)
    m, twin, began = KINDS[kind]().fit(IMAGES[:5]), KINDS[kind]().fit(IMAGES[:5]), settings()
    moments = [[twin.predict(o) for o in IMAGES]]
    for o in new:
        twin.members[0].partial_fit(o)
        moments.append([twin.predict(o) for o in IMAGES])
    with ThreadPoolExecutor(5) as pool, warnings.catch_warnings():
        warnings.simplefilter('ignore') # that an ensemble's threshold is gone
        answers = [pool.submit(lambda i: (i, m.predict(IMAGES[i%8])), i) for i in range(60)]
        for o in new: m.members[0].partial_fit(o)
        answers += [pool.submit(lambda i: (i, m.predict(IMAGES[i%8])), i) for i in range(40)]
        found = [o.result() for o in answers]
    for i, o in found: assert any(close(o, at[i%8]) for at in moments)
    for i, o in found[60:]: assert close(o, moments[-1][i%8])
    assert settings() == began

def test_fit_beside_fit(tf32):
    "Two models in two threads are the models that they are alone."
    began, kinds = settings(), [KINDS['filterbank'], KINDS['ResNet-18']]*2
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda make: make().fit(IMAGES), kinds))
    for o, make in zip(found, kinds): assert close(o.predict(IMAGES), make().fit(IMAGES).predict(IMAGES))
    assert settings() == began


# What is set while a model learns, or changed in place

@pytest.mark.parametrize('learn, patched', [('fit', 'fit_parts'), ('partial_fit', 'learn_more')])
def test_what_is_set_while_a_model_learns_waits(monkeypatch, learn, patched):
    from patchcore_nb import patchcore
    m, began, go_on = model().fit(IMAGES[:3]), threading.Event(), threading.Event()
    def slowly(*args, work=getattr(patchcore, patched)):
        began.set()
        assert go_on.wait(60)
        return work(*args)
    monkeypatch.setattr(patchcore, patched, slowly)
    with ThreadPoolExecutor(3) as pool:
        learning = pool.submit(getattr(m, learn), IMAGES[3:6])
        assert began.wait(60)
        setting = pool.submit(setattr, m, 'k', 3)
        assert len(pool.submit(m.predict, IMAGES[:1]).result(60)) == 1 # a prediction does not wait
        go_on.set()
        learning.result(60), setting.result(60)
    assert m.k == 3 and not m.is_fitted

@pytest.mark.parametrize('name, value', [('layers', ['layer1', 'layer2']), ('more_patchsizes', [5]), ('resize', [64, 64])])
def test_a_list_changed_in_place_is_noticed(tmp_path, name, value):
    m = model(**{name: value}).fit(IMAGES[:3])
    value.pop()
    assert not m.is_fitted
    for use in (lambda: m.predict(IMAGES), lambda: save(m, tmp_path/'m'), lambda: m.memory_bank_):
        with pytest.raises(NotFittedError, match='call fit'): use()

def test_what_was_checked_belongs_to_its_arguments():
    m = model().check()
    backbone = m.embedder_.trained_
    m.imagesize = m.resize = 96
    with pytest.raises(NotFittedError): m.grid_
    assert m.plan(20).peak == model(imagesize=96, resize=96).plan(20).peak and m.grid_ == (12, 12)
    assert m.embedder_.trained_ is backbone # which serves every size
    m.fit(IMAGES[:2]).target_dim = 32
    with pytest.raises(NotFittedError): m.view(IMAGES[0])

def test_weights_of_another_folder_are_read_anew(tmp_path):
    m = model(weights_dir=tmp_path/'a').check()
    backbone = m.embedder_.trained_
    assert m.check().embedder_.trained_ is backbone
    m.weights_dir = tmp_path/'b'
    assert m.check().embedder_.trained_ is not backbone

def test_an_ensemble_is_fitted_as_one(monkeypatch):
    pair = Ensemble([model(layers=[o], false_alarms=.3) for o in ('layer1', 'layer2')]).fit(IMAGES[:3])
    assert pair.members[0].embedder_.trained_ is pair.members[1].embedder_.trained_
    before, adopt = pair.predict(IMAGES).image_scores, PatchCore.adopt
    def slowly(self, fitted):
        time.sleep(.2)
        return adopt(self, fitted)
    monkeypatch.setattr(PatchCore, 'adopt', slowly)
    with ThreadPoolExecutor(3) as pool:
        learning = pool.submit(pair.fit, IMAGES[3:])
        answers = []
        while not learning.done(): answers.append(pair.predict(IMAGES))
        learning.result()
    after = pair.predict(IMAGES)
    assert after.threshold is not None and len(answers) > 1
    for o in answers:
        assert any(torch.allclose(o.image_scores, x, rtol=1e-5) for x in (before, after.image_scores))

def test_what_is_remembered_sets_no_threshold():
    m = model(train_val_split=.5, confidence=None, false_alarms=.3).fit(IMAGES)
    held = m.held_[0]
    m.partial_fit([held])
    assert len(m.held_) == 3 and not any(np.array_equal(o, held) for o in m.held_)

def test_a_promise_is_not_lost_in_a_merge_without_a_word(tmp_path):
    kw = dict(confidence=None, false_alarms=.3)
    promised = load(save_of(model(train_val_split=.5, **kw).fit(IMAGES), tmp_path/'m'))
    about = model(**kw).fit(IMAGES[:4])
    for first, second in ((promised, about), (about, promised)):
        with pytest.warns(UserWarning, match='the model has none now'): assert first.merge(second).threshold_ is None

def save_of(m, folder):
    save(m, folder, 'ours')
    return folder

@pytest.mark.parametrize('name', ['fit', 'shrink', 'score', 'runtime', 'params'])
def test_a_method_is_not_set_over(fitted, name):
    with pytest.raises(ArgumentError, match='unknown argument'): setattr(copy.copy(fitted), name, 3)

def test_an_ensemble_refuses_what_is_no_model():
    for wrong in ([1, 2], [Ensemble([model()])]):
        with pytest.raises(ArgumentError, match='takes PatchCore models, got'): Ensemble(wrong).check()
    assert len(Ensemble(o for o in (model(), model(k=2)))) == 2
    pair = Ensemble([model(), model()])
    with pytest.raises(ArgumentError, match='unknown argument'): pair.set_params(models=[model()], kk=1)
    assert len(pair) == 2
    with pytest.raises(ArgumentError, match='one plan a member, 2, got 1'): pair.fit(IMAGES[:2], plan=[None])

class Own(PatchCore):
    "A model with a name of its own."

def test_a_model_of_ones_own_stays_one(): assert type(Own('filterbank', **SMALL).fit(IMAGES[:3]).shrink(.05)) is Own


# Names of 0.1

OLD = {'search': 'smallest look SEARCHES Fast', 'experiment': 'CHUNK judge Nested SETTINGS', 'extractor': 'Known', 'patchcore': 'LeftOut TURNS grow',
       'report': 'figure_name figure_text share', 'store': 'PARAMS', 'demo': 'SIZE wave frame clip01 photograph yarn draw_denim PITCH nearest_hole draw_sieve teeth draw_cog',
       'memory': 'parse_size say_size make_plan Plan Load FIGURES spilled stage'}

@pytest.mark.parametrize(('module', 'name'), [(module, name) for module, names in OLD.items() for name in names.split()])
def test_an_old_name_is_found_and_says_the_new_one(module, name):
    home = importlib.import_module(f'patchcore_nb.{module}')
    with pytest.warns(DeprecationWarning, match='is called'): assert getattr(home, name) is not None

def test_the_module_memory_is_called_budget():
    import patchcore_nb
    from patchcore_nb import budget
    with pytest.warns(DeprecationWarning, match='memory is called budget now'): from patchcore_nb.memory import Plan
    assert Plan is budget.Plan and importlib.util.find_spec('patchcore_nb.memory') and inspect.getmodule(Plan) is budget
    with pytest.raises(AttributeError, match='nothing_of_the_kind'): patchcore_nb.memory.nothing_of_the_kind

def test_a_prediction_had_over_set(fitted):
    seen = fitted.predict(IMAGES[:1])
    with pytest.warns(DeprecationWarning, match='normalised_over_set'): assert seen.over_set() is seen

def test_b_is_called_reweight_k():
    for change in (lambda m: setattr(m, 'b', 9), lambda m: m.set_params(b=9)):
        with pytest.raises(ArgumentError, match='argument b of PatchCore is called reweight_k now'): change(model())
