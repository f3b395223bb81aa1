"Every way through the package on a GPU that is not there: the same numbers as on the CPU, nothing on two devices, few waits."
import copy
import functools
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from networks import Tiny
from pretend import Away, Refused, pretend, unusable

from patchcore_nb import embedder, greedy, nearest, quantised, search
from patchcore_nb.approximate import Fast
from patchcore_nb.base import ArgumentError
from patchcore_nb.cli import main
from patchcore_nb.core import generator
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.every_size import nested
from patchcore_nb.extractor import Extractor, register_backbone
from patchcore_nb.learning_curve import learning_curve
from patchcore_nb.mvtec import mvtec
from patchcore_nb.names import BACKBONES, SAMPLERS, SEARCHES
from patchcore_nb.nearest import naive_neighbours, nearest_neighbours
from patchcore_nb.nested_search import Nested
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.playground import Lab, Setting, judge_setting
from patchcore_nb.reasons import explain
from patchcore_nb.samplers import coreset
from patchcore_nb.search import Exact
from patchcore_nb.store import load, save
from patchcore_nb.sweeping import sweep

pytestmark = pytest.mark.skipif(bool(unusable()), reason=unusable() or 'it can be used')
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
GOOD, BAD = IMAGES[:6], IMAGES[6:]
GPU = 'cuda:1' # where there is a cuda:0, too

@pytest.fixture(scope='module', autouse=True)
def tiny():
    register_backbone('tiny')(lambda weights='random', weights_dir=None: Tiny())
    yield
    del BACKBONES['tiny']

def model(backbone='tiny', device='cpu', **kw):
    usual = dict(resize=64, imagesize=64, pretrain_dim=32, target_dim=32, ratio=.1, num_workers=0, batch_size=2, weights='random')
    return PatchCore(backbone, device=device, **usual | kw)

@functools.cache
def wanted_of_usual(): return model().fit(GOOD).predict(BAD)

def same(found, wanted, far=1e-4): torch.testing.assert_close(found, wanted, rtol=far, atol=far*float(wanted.abs().max()))

def same_prediction(found, wanted, far=1e-4):
    same(found.image_scores, wanted.image_scores, far)
    same(found.anomaly_maps, wanted.anomaly_maps, far)
    if wanted.threshold is not None: assert found.threshold == pytest.approx(wanted.threshold, rel=far)

def on_both(work, far=1e-4): # device -> a prediction
    "Do something on both, and compare; nothing may lie on another GPU."
    wanted = work('cpu')
    with pretend() as gpu: found = work(GPU)
    same_prediction(found, wanted, far)
    assert gpu.devices == {GPU}
    return gpu


# What the pretended GPU does

def test_a_tensor_says_where_it_is():
    with pretend() as gpu:
        x = torch.arange(6., device=1)
        assert isinstance(x, Away) and str(x.device) == GPU and x.cpu().tolist() == [0, 1, 2, 3, 4, 5] and gpu.devices == {GPU}
        assert str((x.view(2, 3) @ torch.ones(3, 2, device=GPU)).device) == GPU and isinstance(x[x > 2], Away)
        assert float(x.sum()) == 15 and str(torch.ones(2, device='cuda').device) == 'cuda:0'

def refusals(): # name -> what a GPU does not do
    x, here, ints = torch.ones(32, 32, device=GPU), torch.ones(32, 32), torch.ones(32, 32, dtype=torch.int8, device=GPU)
    return dict(
        devices=lambda: x+here, gpus=lambda: x+torch.ones(32, device='cuda:0'), matrix=lambda: x @ here, generator=lambda: torch.rand(3, device=GPU, generator=generator()),
        filling=lambda: x.normal_(generator=generator()), index=lambda: here[torch.zeros(2, dtype=torch.int64, device=GPU)], put=lambda: x.__setitem__(torch.tensor([0, 2]), here[:2]),
        where=lambda: torch.where(x > 0, x, here), rows=lambda: torch._int_mm(ints[:16], ints), columns=lambda: torch._int_mm(ints, ints[:, :20]),
        out=lambda: torch._int_mm(ints, ints, out=torch.empty(32, 64, dtype=torch.int32, device=GPU)[:, ::2]))

@pytest.mark.parametrize('name', ['devices', 'gpus', 'matrix', 'generator', 'filling', 'index', 'put', 'where', 'rows', 'columns', 'out'])
def test_it_refuses_what_a_gpu_refuses(name):
    with pretend(), pytest.raises(Refused): refusals()[name]()

def test_numpy_cannot_see_it():
    with pretend():
        x = torch.ones(3, device=GPU)
        for f in (x.numpy, lambda: np.asarray(x), lambda: torch.from_numpy(x)):
            with pytest.raises(TypeError): f()

def test_it_allows_what_a_gpu_allows():
    with pretend() as gpu:
        x = torch.ones(4, 4, device=GPU)
        x[torch.tensor([0, 2])] = 2. # indices of the CPU are brought over
        assert (x*torch.tensor(3.)).sum() == 72 and gpu.uploads.total() == 1
        x.copy_(torch.zeros(4, 4))
        assert torch.zeros(4, 4).copy_(x).sum() == 0 and (gpu.uploads.total(), gpu.downloads.total()) == (2, 1)

def test_waits_are_counted():
    waits = [lambda x: x.nonzero(), lambda x: float(x[0]), lambda x: x[x > 0], lambda x: x.tolist(), lambda x: bool((x > 0).any()), lambda x: x.unique(), torch.equal]
    with pretend() as gpu:
        x = torch.ones(3, device=GPU)
        for f in waits:
            gpu.reset()
            f(x, x) if f is torch.equal else f(x)
            assert gpu.syncs.total() == 1
        gpu.reset()
        (x*2).topk(2)[0].sum().to(torch.float64)
        assert gpu.syncs.total() == 0 and gpu.doubles.total() == 1


# Fit and predict

WAYS = [dict(), dict(k=3), dict(patch_score='reweighted'), dict(patch_score='relative'), dict(patch_score='smoothed'), dict(patch_score='top1%'), dict(distance='euclidean'), dict(distance='cosine'),
        dict(augment=True), dict(train_val_split=.5, false_alarms=.4, confidence=None), dict(denoise=.1), dict(stride=2), dict(more_patchsizes=(5,)), dict(preprocessing='conv', aggregation='mlp'),
        dict(batchnorm='program', mean_std='imagenet'), dict(tile=64, resize=128, imagesize=128), dict(num_workers=2, seed=5)]
WAYS += [dict(sampler=o) for o in SAMPLERS if o != 'approx_greedy_coreset']+[dict(search=o, ratio=.3) for o in SEARCHES if o != 'exact']

def said(kw): return ' '.join(f'{k}={v}' for k, v in kw.items()) or 'as usual'

def need_faiss(kw):
    if kw.get('search') in ('faiss', 'ivfpq'): pytest.importorskip('faiss')

@pytest.mark.filterwarnings('ignore:search .* is done on the CPU')
@pytest.mark.parametrize('kw', WAYS, ids=said)
def test_a_model_is_the_same(kw):
    need_faiss(kw)
    on_both(lambda device: model(device=device, **kw).fit(GOOD).predict(BAD))

@pytest.mark.parametrize('backbone', ['filterbank', 'resnet18'])
def test_a_network_is_the_same(backbone):
    on_both(lambda device: model(backbone, device, weights='pretrained' if backbone == 'filterbank' else 'random').fit(GOOD).predict(BAD))

def test_half_the_digits():
    on_both(lambda device: model(device=device, precision='bfloat16').fit(GOOD).predict(BAD), .05)

def test_the_search_may_be_elsewhere():
    for own, other in (('cpu', GPU), (GPU, 'cpu')):
        with pretend() as gpu: same_prediction(model(device=own, search_device=other).fit(GOOD).predict(BAD), wanted_of_usual())
        assert gpu.devices == {GPU}

def test_patches_that_the_gpu_has_no_space_for():
    with pretend(free=10**6): same_prediction(model(device=GPU).fit(GOOD).predict(BAD), wanted_of_usual()) # they lie here

def test_by_its_number_and_from_a_cache(tmp_path):
    with pretend() as gpu:
        for _ in range(2): same_prediction(model(device=1, cache=tmp_path).fit(GOOD).predict(BAD), wanted_of_usual())
        assert gpu.devices == {GPU}

def test_from_one_device_to_the_other(tmp_path):
    m = model(patch_score='relative').fit(GOOD)
    wanted = m.predict(BAD)
    save(m, tmp_path)
    with pretend() as gpu:
        same_prediction(copy.deepcopy(m).set_params(device=GPU).predict(BAD), wanted)
        there = load(tmp_path, device=GPU)
        same_prediction(there.predict(BAD), wanted)
        save(there, tmp_path/'again')
        assert gpu.devices == {GPU}
    same_prediction(load(tmp_path/'again', device='cpu').predict(BAD), wanted)

@pytest.mark.parametrize('engine', ['openvino', 'onnxruntime'])
def test_engines_do_not_compute_on_a_gpu(engine):
    with pretend(), pytest.raises(ArgumentError, match='computes on the CPU'): model(device=GPU, engine=engine).fit(GOOD)


def test_a_whole_command_on_the_second_gpu(noise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = '--gpu {} --seed 0 --no_report results patch_core -b tiny -le layer2 -le layer3 --faiss_on_gpu sampler -p 0.1 approx_greedy_coreset dataset --resize 64 --imagesize 64 --batch_size 2 -d noise mvtec {}'
    def scores(number):
        with pytest.raises(SystemExit) as end: main(words.format(number, Path(noise.train[0].path).parents[3]).split())
        assert end.value.code == 0
        return pd.read_csv(max(Path('results').rglob('results.csv'), key=os.path.getmtime), index_col=0).loc['mvtec_noise']
    wanted = scores(-1)
    with pretend() as gpu: found = scores(1)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert gpu.devices == {GPU}


# Learning on

def learned_on(change):
    def work(device): return change(model(device=device, patch_score='relative').fit(GOOD), device).predict(BAD)
    return work

CHANGES = dict(
    partial_fit=lambda m, device: m.partial_fit(BAD[:1]), forget=lambda m, device: m.forget(2), shrink=lambda m, device: m.shrink(.05),
    merge=lambda m, device: m.merge(model(device=device, patch_score='relative').fit(BAD[:2])))

@pytest.mark.filterwarnings('ignore:the threshold belongs to')
@pytest.mark.parametrize('name', CHANGES)
def test_a_changed_model_is_the_same(name): on_both(learned_on(CHANGES[name]))

def test_suspects_are_the_same():
    tables = [model().fit(GOOD).suspects(GOOD)]
    with pretend(): tables += [model(device=GPU).fit(GOOD).suspects(), model(device=GPU, false_alarms=None).fit(GOOD).suspects(GOOD)]
    for o in tables[1:]: np.testing.assert_allclose(o.score, tables[0].score, rtol=1e-4)


# Several models, several settings

def test_an_ensemble_is_the_same():
    on_both(lambda device: Ensemble([model(device=device), model(device=device, seed=1, k=2)]).fit(GOOD).predict(BAD).normalised_over_set())

@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    "A category of noise, in which a defect is a patch that has fewer greys."
    root = tmp_path_factory.mktemp('noise')/'noise'
    def put(folder, name, image):
        (root/folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root/folder/f'{name}.png')
    for i, image in enumerate(IMAGES):
        put('train/good' if i < 5 else 'test/good', f'{i:03}', image)
        odd, mask = image.copy(), np.zeros((64, 64), np.uint8)
        odd[8:24, 8:24], mask[8:24, 8:24] = odd[8:24, 8:24]//128*128, 255
        put('test/odd', f'{i:03}', odd)
        put('ground_truth/odd', f'{i:03}_mask', mask)
    return mvtec(root.parent, 'noise')

def test_a_sweep_is_the_same(noise):
    def work(device): return sweep(model(device=device), noise, [.02, .1], [1, 2], ['max', 'reweighted', 'relative'])
    wanted = work('cpu')
    with pretend() as gpu: found = work(GPU)
    np.testing.assert_allclose(found[['image_auroc', 'pixel_auroc']], wanted[['image_auroc', 'pixel_auroc']], atol=1e-3)
    assert gpu.devices == {GPU}

def test_a_learning_curve_is_the_same(noise):
    def work(device): return learning_curve(model(device=device), noise, [1, 3], [0])
    wanted = work('cpu')
    with pretend() as gpu: np.testing.assert_allclose(work(GPU).aupro, wanted.aupro, atol=1e-3)
    assert gpu.devices == {GPU}

def test_the_playground_of_sizes_is_the_same(noise):
    wanted = nested(model(), noise, [.02, .1])
    with pretend() as gpu: found = nested(model(device=GPU), noise, [.02, .1])
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)
    np.testing.assert_allclose(found.radii, wanted.radii, rtol=1e-4)
    assert gpu.devices == {GPU}

@pytest.mark.parametrize('patch_score', ['reweighted', 'relative'])
def test_the_laboratory_is_the_same(noise, patch_score):
    setting = Setting('tiny', k=2, patch_score=patch_score)
    def work(device): return judge_setting(Lab(noise, model(device=device, false_alarms=None)), setting).prediction
    wanted = work('cpu')
    with pretend() as gpu: same(work(GPU).image_scores.cpu(), wanted.image_scores)
    assert gpu.devices == {GPU}

def test_why_is_the_same():
    def work(device):
        m = model(device=device).fit(list(GOOD))
        return explain(m, m.predict(list(BAD)), 1, 3, 3)
    wanted = work('cpu')
    with pretend(): found = work(GPU)
    assert list(found.image) == list(wanted.image) and list(found.distance) == pytest.approx(list(wanted.distance), rel=1e-4)


# The stages alone, in all their ways

ROWS = torch.randn(3000, 128, generator=generator(0))*torch.linspace(3, .02, 128) # as features are: a few directions matter
QUERIES = ROWS[::20]+.05*torch.randn(150, 128, generator=generator(1))

@pytest.fixture
def coded(monkeypatch):
    "Whole numbers are taken where they would not pay."
    monkeypatch.setattr(search, 'MIX', 10**6)
    monkeypatch.setattr(quantised, '_int8_pays', lambda: True)
    quantised.int8_works.cache_clear()
    yield
    quantised.int8_works.cache_clear()

@pytest.mark.parametrize('kind', [Exact, Fast])
@pytest.mark.parametrize('k', [1, 4])
def test_short_lists_are_the_same(coded, kind, k):
    true = naive_neighbours(QUERIES, ROWS, k)[0]
    with pretend() as gpu:
        asked = kind().fit(ROWS.to(GPU))
        assert asked.targets_
        for some in (QUERIES, QUERIES[:3]): same(asked(some.to(GPU), k)[0].cpu(), true[:len(some)])
    assert gpu.devices == {GPU}

def test_nested_short_lists_are_the_same(coded):
    with pretend():
        found = Nested().fit(ROWS.to(GPU), [300, 1000, 3000])(QUERIES.to(GPU), 2)
        for m, (dists, _) in zip([300, 1000, 3000], found): same(dists.cpu(), naive_neighbours(QUERIES, ROWS[:m], 2)[0])

@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_coreset_is_the_same(coded, sampler):
    wanted = coreset(ROWS, .2, sampler)
    with pretend() as gpu: found = coreset(ROWS.to(GPU), .2, sampler)
    assert torch.equal(found.idxs.cpu(), wanted.idxs) and found.radii == pytest.approx(wanted.radii, rel=1e-5)
    assert gpu.devices <= {GPU}

def test_without_float64(monkeypatch):
    "As on a GPU of Apple."
    monkeypatch.setattr(quantised, 'WITHOUT_DOUBLE', ['cuda'])
    quantised.int8_works.cache_clear()
    kw = dict(patch_score='relative', denoise=.1)
    wanted = model(**kw).fit(GOOD).predict(BAD)
    with pretend(doubles=False):
        same_prediction(model(device=GPU, **kw).fit(GOOD).predict(BAD), wanted)
        for name in SAMPLERS: coreset(ROWS[:400].to(GPU), .2, name)
        for name in ('exact', 'fast', 'fp16', 'int8'): SEARCHES[name]().fit(ROWS[:1100].to(GPU))(QUERIES.to(GPU), 2)
    quantised.int8_works.cache_clear()


# How often the host waits

def test_a_batch_waits_twice_and_brings_its_images_alone():
    with pretend() as gpu:
        m = model(device=GPU).fit(GOOD)
        m.predict(BAD)
        gpu.reset()
        m.predict(GOOD)
    n = len(GOOD)//2
    assert gpu.syncs.total() <= 2*n, gpu.syncs # are all numbers finite, and which pairs are in question
    assert gpu.uploads.total() <= n, gpu.uploads
    assert gpu.downloads.total() <= 4*n, gpu.downloads # scores of images and of patches, rows, maps
    assert not gpu.doubles

@pytest.mark.parametrize('kw', [dict(patch_score='smoothed'), dict(backbone='filterbank', weights='pretrained')], ids=said)
def test_constants_are_brought_once(kw):
    with pretend() as gpu:
        m = model(device=GPU, **kw).fit(GOOD)
        m.predict(BAD)
        gpu.reset()
        m.predict(GOOD)
    assert gpu.uploads.total() <= len(GOOD)//2, gpu.uploads

def test_a_search_by_short_lists_waits_thrice(coded):
    with pretend() as gpu:
        asked, queries = Exact().fit(ROWS.to(GPU)), QUERIES.to(GPU)
        asked(queries)
        gpu.reset()
        asked(queries)
    assert gpu.syncs.total() <= 3 and not gpu.uploads and not gpu.downloads, gpu.syncs

def test_a_step_of_the_coreset_waits_seldom(coded, monkeypatch):
    steps = []
    def counting(*args, real=greedy.next_picks):
        steps.append(1)
        return real(*args)
    monkeypatch.setattr(greedy, 'next_picks', counting)
    with pretend() as gpu:
        rows = ROWS.to(GPU)
        gpu.reset()
        greedy.farthest_points(rows, 600)
    waits = gpu.syncs.total()+gpu.downloads.total()+gpu.uploads.total()
    assert 600/len(steps) > 100 and waits <= 12*len(steps)+10, (len(steps), gpu.syncs, gpu.downloads, gpu.uploads)

def test_tiles_are_large_on_a_gpu(monkeypatch):
    seen = []
    def noting(*args, real=nearest._in_question):
        seen.append(1)
        return real(*args)
    monkeypatch.setattr(nearest, '_in_question', noting)
    rows, queries = torch.randn(9000, 4), torch.randn(1000, 4)
    nearest_neighbours(queries, rows)
    assert len(seen) == 6
    seen.clear()
    with pretend(): nearest_neighbours(queries.to(GPU), rows.to(GPU))
    assert len(seen) == 1


# When its memory is full

def test_a_memory_bank_that_is_too_large_stays_here():
    wanted = model(patch_score='relative').fit(GOOD)
    with pretend() as gpu:
        m = model(device=GPU, patch_score='relative').fit(GOOD)
        gpu.room = m.memory_bank_.nbytes-1
        with pytest.warns(UserWarning, match='the memory of cuda:1 is too small for the memory bank'): m = m.shrink(.1)
        assert m.scorer_.memory_bank_.device.type == 'cpu'
        gpu.room = None
        same_prediction(m.predict(BAD), wanted.predict(BAD))

def test_a_search_that_takes_too_much_is_brought_here():
    with pretend() as gpu:
        there = model(device=GPU).fit(GOOD)
        gpu.room = 2*256*len(there.memory_bank_)*4-1 # of distances of a batch
        with pytest.warns(UserWarning, match='too small for the search'): same_prediction(there.predict(BAD), wanted_of_usual())
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            same_prediction(there.predict(BAD), wanted_of_usual()) # from now on, without a word

def test_patches_that_are_too_many_after_all():
    wanted = model(false_alarms=None).fit(GOOD).predict(BAD)
    with pretend(room=6*256*32*4-1), pytest.warns(UserWarning, match='too small for all patch embeddings'):
        same_prediction(model(device=GPU, false_alarms=None).fit(GOOD).predict(BAD), wanted)


# The test of the tests: faults that are planted are found

def on_the_cpu(x): return x.cpu()

def plant_a_copy(monkeypatch):
    "A stage that leaves its result on the CPU."
    monkeypatch.setattr(Extractor, 'forward', lambda self, images, stop=True, real=Extractor.forward: {k: on_the_cpu(o) for k, o in real(self, images, stop).items()})

def plant_a_generator(monkeypatch):
    "Starting rows that are drawn where the rows are, by the seed of the CPU."
    from patchcore_nb import samplers
    monkeypatch.setattr(samplers, '_some_rows', lambda rows, n, seed: torch.randperm(len(rows), generator=generator(seed), device=rows.device)[:n])

def plant_an_index(monkeypatch):
    "Neighbours that are looked up in a table of the CPU."
    monkeypatch.setattr(embedder, 'make_maps', lambda patch_scores, real=embedder.make_maps, **kw: real(torch.zeros(9)[patch_scores.long()*0], **kw))

@pytest.mark.parametrize('plant, says', [(plant_a_copy, 'tensors of cpu and cuda:1'), (plant_a_generator, 'a generator of the cpu'), (plant_an_index, 'indices on a GPU into a tensor of the CPU')])
def test_planted_faults_are_found(monkeypatch, plant, says):
    plant(monkeypatch)
    model().fit(GOOD).predict(BAD) # on a CPU nobody would notice
    with pretend(), pytest.raises(Exception, match=says) as found: model(device=GPU).fit(GOOD).predict(BAD)
    assert isinstance(found.value, Refused) or 'cannot take images' in str(found.value)
