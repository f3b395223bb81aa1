"Right, not only fast: large offsets, batches, threads, what is not finite, nested picks, and machines that cannot multiply eight bits."
import pytest
import torch

from patchcore_nb import anchors, samplers, search
from patchcore_nb.approximate import Fast
from patchcore_nb.auc import auroc, tied
from patchcore_nb.core import DataError, generator, limit_threads
from patchcore_nb.data import load_category
from patchcore_nb.extractor import create_backbone
from patchcore_nb.names import BACKBONES, SEARCHES
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.samplers import coreset, farthest_points, project, shortfall
from patchcore_nb.search import ByProduct, Exact


@pytest.fixture(scope='module')
def sieve(demo_root): return load_category('demo', demo_root, 'sieve')

@pytest.fixture(scope='module')
def fitted(sieve): return PatchCore('filterbank', target_dim=256, device='cpu').fit(sieve.train[:20])

@pytest.fixture(scope='module')
def patches(fitted, sieve):
    "(N, D) of good images, (Q, D) of test images."
    return tuple(fitted.embedder_.rows([s.path for s in o]) for o in (sieve.train[:12], sieve.test[::4]))

@pytest.fixture
def no_codes(monkeypatch):
    "A machine that cannot multiply matrices of int8."
    def take(): [monkeypatch.setattr(o, 'int8_works', lambda device='cpu': False) for o in (search, anchors)]
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

@pytest.mark.parametrize('how', ['exact', 'fast'])
@pytest.mark.parametrize('backbone', ['filterbank', 'resnet18'])
def test_an_image_has_one_score_in_every_batch(sieve, backbone, how):
    "Among others, at any place, left over for the last batch: to a millionth, so that copies of it are ties. Where batches are of one, to four."
    small = dict(weights='random', resize=64, imagesize=64, target_dim=256, device='cpu', search=how)
    m = PatchCore(backbone, ratio=.5, **small).fit([s.path for s in sieve.train[:8]])
    a, b, c = (s.path for s in sieve.test[::6][:3])
    items = [a, b, c, a, c, a, b, a, a] # of which the last is alone in a batch of 8, or of 2
    found = []
    for size in (1, 2, 7, 8):
        m.batch_size = size
        found.append(m.predict(items).image_scores.double())
    scores = torch.stack(found)
    for kind in (a, b, c):
        own = scores[:, [o == kind for o in items]]
        alone = m.predict([kind]).image_scores.double()
        assert float(own[1:].max()/own[1:].min()-1) <= 1e-6 and float(own[0].max()/own[0].min()-1) <= 1e-6
        assert float((own.flatten()/alone-1).abs().max()) <= 4e-6
    assert len(set(tied(scores[1:].flatten().numpy()))) == 3
    assert auroc(scores[:, 0].repeat(2)*(1+1e-7*torch.arange(8)), [True]*4+[False]*4) == .5 # copies of one image

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


def far_apart(n, d, far, seed=0):
    "Two clouds about which no mean is any good."
    x = torch.randn(n, d, generator=generator(seed))*.1
    x[n//2:] += far
    return x

@pytest.mark.parametrize('far', [30., 300., 3000.])
@pytest.mark.parametrize('n', [600, 3000])
@pytest.mark.parametrize('k', [1, 4])
def test_exact_is_exact_where_the_product_has_no_digits_left(far, n, k):
    bank, queries = far_apart(n, 64, far), far_apart(200, 64, far, 1)
    truth = torch.cdist(queries.double(), bank.double(), compute_mode='donot_use_mm_for_euclid_dist').topk(k, largest=False)[0]
    for way in (Exact, ByProduct):
        found, idxs = way().fit(bank)(queries, k)
        assert float((found.double().sqrt()/truth-1).abs().max()) < (1e-5 if way is Exact else 1e-2) # rows as they are; rows about their mean, rounded
    radius = samplers.cover_radii(bank, torch.arange(0, n, 7), [len(range(0, n, 7))], [torch.zeros(n, dtype=torch.int32)])[0]
    assert radius == pytest.approx(float(torch.cdist(bank.double(), bank[::7].double()).amin(1).max()), rel=1e-2 if far > 300 else 1e-4)

@pytest.mark.parametrize('k', [1, 3])
def test_one_row_or_query_far_out_costs_time_not_truth(k):
    mix = torch.randn(512, 512, generator=generator(0))*torch.arange(1, 513)**-.75
    bank, queries = (torch.randn(n, 512, generator=generator(s)) @ mix for n, s in ((4000, 1), (300, 2)))
    bank[7] *= 1000
    queries = torch.cat([queries, queries[:50]*10, torch.randn(50, 512, generator=generator(3))*queries.std()])
    truth = torch.cdist(queries.double(), bank.double(), compute_mode='donot_use_mm_for_euclid_dist').topk(k, largest=False)[0]
    found, _ = Exact().fit(bank)(queries, k)
    assert float((found.double().sqrt()/truth-1).abs().max()) < 1e-5

@pytest.mark.parametrize('eps', [1e-2, 1e-4, 1e-5])
def test_picks_in_tight_clusters_are_greedy(eps):
    bank = torch.randn(20, 32, generator=generator(0))[torch.randint(20, (1500,), generator=generator(1))]+eps*torch.randn(1500, 32, generator=generator(2))
    assert shortfall(bank, farthest_points(bank, 400).idxs) < 1e-6

def test_other_types_and_shapes(no_codes):
    x = torch.randn(3000, 24, generator=generator(0))
    assert torch.equal(farthest_points(x.double(), 50).idxs, farthest_points(x, 50).idxs)
    assert torch.equal(coreset(x.double(), .01).idxs, coreset(x, .01).idxs)
    assert torch.equal(Exact().fit(x.double())(x[:9].double())[1][:, 0], torch.arange(9))
    for way in (Exact, Fast):
        assert way().fit(x)(x[:0])[0].shape == (0, 1)
        assert torch.equal(way().fit(x[:, :5].contiguous())(x[:9, :5].contiguous())[1][:, 0], torch.arange(9)) # fewer values than a sketch has
    for bad in (torch.nan, torch.inf):
        y = x.clone()
        y[5, 3] = bad
        with pytest.raises(DataError, match='NaN or infinity'): coreset(y, .1)
    with pytest.raises(samplers.ArgumentError, match='pool'): farthest_points(x, 3, pool=0)

def test_all_tiles_know_enough_rows_for_k(monkeypatch):
    monkeypatch.setattr(Exact, 'tile', 2000)
    x = torch.randn(4020, 16, generator=generator(0)) @ torch.randn(16, 64, generator=generator(1))
    way = Exact().fit(x)
    assert not way.targets_ or [len(o.rows) for o in way.targets_] == [1340]*3
    truth = torch.cdist(x[:99].double(), x.double(), compute_mode='donot_use_mm_for_euclid_dist').topk(5, largest=False)[0]
    assert float((way(x[:99], 5)[0].double().sqrt()-truth).abs().max()) < 1e-4

def test_ivfpq_tells_the_recall_that_it_has():
    pytest.importorskip('faiss')
    x, q = (torch.randn(n, 64, generator=generator(s)) for n, s in ((8000, 0), (1000, 1)))
    way, right = SEARCHES['ivfpq']().fit(x), Exact().fit(x)(q)[1]
    assert abs(way.recall_-float((way(q)[1] == right).float().mean())) < .1
    repeated = SEARCHES['ivfpq']().fit(torch.randn(3, 64, generator=generator(2)).repeat(500, 1)) # most lists are empty
    assert repeated(q, 1)[1].min() >= 0 and repeated(q, 7)[1].min() >= 0

def test_a_bank_of_one_has_a_recall(): assert SEARCHES['fp16']().fit(torch.ones(1, 8)).recall_ == 1

class Coded(Exact):
    "Whole numbers, however slow they may be on this machine."
    def _suits(self): return True

class CodedTiles(Coded): tile = 700

@pytest.mark.parametrize('way', [Exact, Coded, CodedTiles, ByProduct])
@pytest.mark.parametrize('k', [1, 5])
def test_real_patches_by_any_number_of_threads(patches, way, k):
    "The same bits in one thread and in three, and the truth."
    rows, queries = patches[0][::4], patches[1][::3]
    found = way().fit(rows)
    one, three = [], []
    for n, o in ((1, one), (3, three)):
        with limit_threads(n): o += found(queries, k)
    assert all(torch.equal(a, b) for a, b in zip(one, three))
    truth = torch.cdist(queries.double(), rows.double(), compute_mode='donot_use_mm_for_euclid_dist').topk(k, largest=False)[0]
    assert float((one[0].double().sqrt()/truth-1).abs().max()) < 1e-4

def test_old_names_of_the_search_still_work():
    with pytest.warns(DeprecationWarning, match='approximate.Fast'): assert search.Fast is Fast
    from patchcore_nb import core
    with pytest.warns(DeprecationWarning, match='first_line'): assert core.why(ValueError('one\ntwo')) == 'one'
    assert search.nearest_neighbours and search.Codes and search.GROUP == 32
