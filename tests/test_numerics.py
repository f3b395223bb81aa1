"Right, not only fast: large offsets, batches, threads, what is not finite, nested picks, and machines that cannot multiply eight bits."
import pytest
import torch

from patchcore_nb import samplers, search
from patchcore_nb.core import DataError, generator
from patchcore_nb.data import load_category
from patchcore_nb.extractor import BACKBONES, create_backbone
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.samplers import coreset, farthest_points, project, shortfall
from patchcore_nb.search import ByProduct, Exact, Fast


@pytest.fixture(scope='module')
def sieve(demo_root): return load_category('demo', demo_root, 'sieve')

@pytest.fixture(scope='module')
def fitted(sieve): return PatchCore('filterbank', target_dim=256, device='cpu').fit(sieve.train[:20])

@pytest.fixture(scope='module')
def patches(fitted, sieve):
    "(N, D) of good images, (Q, D) of test images."
    return tuple(torch.cat([p.flatten(0, 2) for p in fitted._embed([s.path for s in o], '')]) for o in (sieve.train[:12], sieve.test[::4]))

@pytest.fixture
def no_codes(monkeypatch):
    "A machine that cannot multiply matrices of int8."
    def take(): [monkeypatch.setattr(o, 'int8_works', lambda device='cpu': False) for o in (search, samplers)]
    return take

def true_neighbours(queries, bank):
    "Smallest distances, and a function that measures others, in double precision."
    least = torch.cat([torch.cdist(q.double(), bank.double(), compute_mode='donot_use_mm_for_euclid_dist').amin(1) for q in queries.split(256)])
    return least, lambda idxs: (queries.double()-bank[idxs].double()).norm(dim=1)

def scores(p): return p.image_scores, p.patch_scores, p.anomaly_maps

def agree(a, b, rel=1e-5):
    for x, y in zip(a, b): assert float(((x-y).abs()/y.abs().clamp(min=float(y.abs().max())*1e-6)).max()) <= rel


@pytest.mark.parametrize('how', [Exact, ByProduct])
@pytest.mark.parametrize('codes', [True, False])
@pytest.mark.parametrize('offset', [0., 1e4])
def test_an_offset_costs_no_digits(patches, no_codes, how, codes, offset):
    "Distances within 1e-4 of float64's on the same rounded rows, and the same neighbours but for ties."
    if not codes: no_codes()
    bank, queries = (o+offset for o in (patches[0][::4], patches[1][::5]))
    found = how().fit(bank)
    if how is Exact: assert bool(found.targets_) == (codes and search.int8_works()), 'the way that is to be tested is not taken'
    dists, idxs = found(queries)
    least, measure = true_neighbours(queries, bank)
    assert (least > 0).all()
    assert float((dists[:, 0].double()/least.square()-1).abs().max()) <= 1e-4
    assert (measure(idxs[:, 0]) <= least*(1+1e-6)).all()

@pytest.mark.parametrize('codes', [True, False])
def test_an_offset_does_not_mislead_the_coreset(patches, no_codes, codes):
    if not codes: no_codes()
    low = project(patches[0][::4])+1e4
    picks = farthest_points(low, 200)
    assert shortfall(low, picks.idxs) <= 1e-5
    true = torch.cdist(low.double(), low[picks.idxs].double(), compute_mode='donot_use_mm_for_euclid_dist').amin(1)
    rest = picks.anchors >= 0
    assert float((picks.anchors[rest].double()/true[rest]-1).abs().max()) <= 1e-4


@pytest.mark.parametrize('size', [1, 7, 32])
def test_batches_do_not_matter(fitted, sieve, size):
    "In any size and any order."
    items = [s.path for s in sieve.test]
    order = torch.randperm(len(items), generator=generator(size))
    first = fitted.predict(items)
    before = fitted.batch_size
    try:
        fitted.batch_size = size
        other = fitted.predict([items[i] for i in order])
    finally: fitted.batch_size = before
    agree(scores(other), [o[order] for o in scores(first)])

def test_threads_do_not_matter(fitted, sieve):
    items, threads = [s.path for s in sieve.test[::3]], torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(scores(fitted.predict(items)))
    finally: torch.set_num_threads(threads)
    agree(*found)


@pytest.fixture
def broken():
    "A backbone whose maps hold NaN: the logarithm of what is below zero."
    def make():
        net = create_backbone('filterbank')
        net.layer3.register_forward_hook(lambda m, args, out: out.log())
        return net
    BACKBONES['broken'] = make
    yield 'broken'
    del BACKBONES['broken']

def test_what_is_not_finite_is_an_error(fitted, sieve, broken):
    with pytest.raises(DataError, match='NaN or infinity'): PatchCore(broken, device='cpu').fit(sieve.train[:2])
    x = torch.zeros(1, 2, 2, 256)
    for bad in (torch.nan, torch.inf):
        x[0, 1, 1, 7] = bad
        with pytest.raises(DataError, match='NaN or infinity'): fitted.scorer_(x)


@pytest.mark.parametrize('sampler', ['approx_greedy_coreset', 'greedy_coreset', 'random'])
def test_a_coreset_begins_with_the_smaller_one(patches, sampler):
    large, small = (coreset(patches[0], ratio, sampler) for ratio in (.1, .02))
    n = len(small.idxs)
    assert n == int(len(patches[0])*.02) and torch.equal(large.idxs[:n], small.idxs)
    assert torch.equal(large.anchor_dists[:n].nan_to_num(), small.anchor_dists.nan_to_num())

def test_without_eight_bits_all_is_the_same(fitted, sieve, no_codes):
    "Picks, radii, scores and maps."
    no_codes()
    plain = PatchCore('filterbank', target_dim=256, device='cpu').fit(sieve.train[:20])
    assert torch.equal(plain.idxs_, fitted.idxs_) and plain.radii_ == pytest.approx(fitted.radii_, rel=1e-5)
    assert not getattr(plain.scorer_.search_, 'targets_')
    items = [s.path for s in sieve.test[::2]]
    agree(scores(plain.predict(items)), scores(fitted.predict(items)))

@pytest.mark.parametrize('codes', [True, False])
def test_the_nearly_exact_search(patches, fitted, no_codes, codes):
    "On a coreset, for which it is made."
    if not codes: no_codes()
    bank, queries = fitted.memory_bank_, patches[1][::5]
    least, measure = true_neighbours(queries, bank)
    found = Fast().fit(bank)
    assert bool(found.targets_) == (codes and search.int8_works())
    assert float((measure(found(queries)[1][:, 0]) <= least*(1+1e-5)).float().mean()) >= .9999
