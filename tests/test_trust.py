"Numbers that can be trusted: places in maps, searches, precision, kinds of input, memory."
import numpy as np
import pytest
import torch

from patchcore_nb.evidence import patch_box
from patchcore_nb.maps import Lattice, make_maps, naive_maps
from patchcore_nb.names import SEARCHES
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.reasons import middle_of, patch_at
from patchcore_nb.search import naive_neighbours


def noise(seed, h, w, dot=None):
    "Grey noise, with a white dot of five pixels perhaps."
    im = np.random.default_rng(seed).normal(128, 4, (h, w, 3)).clip(0, 255).astype(np.uint8)
    if dot is not None:
        y, x = dot
        im[y-2:y+3, x-2:x+3] = 255
    return im

def centre(m):
    "Where the middle of what stands out of a map lies."
    m = np.nan_to_num(m)
    m = (m-np.median(m)-.3*m.max()).clip(0)
    return [float((m*at).sum()/m.sum()) for at in np.mgrid[tuple(slice(n) for n in m.shape)]]


# Where things lie
SQUARE, CROPPED, WIDE = ((224, 224), dict(resize=224)), ((256, 256), dict(resize=256)), ((160, 240), dict(resize=(160, 240), imagesize=None))

@pytest.mark.parametrize('shape, size', [SQUARE, CROPPED, WIDE], ids=['square', 'cropped', 'rectangular'])
@pytest.mark.parametrize('p, t', [(3, 1), (3, 2), (3, 3), (5, 2), (5, 3), (2, 1), (4, 1), (2, 2)])
def test_planted_dots_come_out_where_they_are(shape, size, p, t):
    "Within a pixel (rms): 4 to 13 off before, for strides."
    h, w = shape
    model = PatchCore('filterbank', target_dim=128, patchsize=p, stride=t, false_alarms=None, device='cpu', **size)
    model.fit([noise(i, h, w) for i in range(3)])
    rng = np.random.default_rng(0)
    dots = [(int(rng.integers(h//3, 2*h//3)), int(rng.integers(w//3, 2*w//3))) for _ in range(10)]
    seen = model.predict([noise(100+i, h, w, dot) for i, dot in enumerate(dots)])
    off = np.array([centre(seen.original_map(i)) for i in range(10)])-dots
    assert (np.sqrt((off**2).mean(0)) <= 1).all()
    H, W = model.preprocess_.size
    rows, cols = model.grid_
    for r, c in [(0, 0), (rows//2, cols//3), (rows-1, cols-1)]: # boxes and clicks agree with the map
        one = torch.zeros(1, rows, cols)
        one[0, r, c] = 1
        top = model.make_maps(one)[0]
        y, x = middle_of(model, r, c)
        assert patch_at(model, x/W, y/H) == (r, c)
        if 0 < r < rows-1: assert max(abs(a+.5-b) for a, b in zip(divmod(int(top.argmax()), W), (y, x))) <= 1
        left, upper, right, lower = patch_box(model, r, c)
        assert (right-left)/p == pytest.approx(8) and (lower-upper)/p == pytest.approx(8)

@pytest.mark.parametrize('p, t', [(3, 1), (2, 1), (4, 3), (5, 4), (7, 2)])
def test_maps_agree_with_their_slow_twin(p, t):
    lattice = Lattice((28, 21), p, t)
    grid = [(n+2*lattice.before-p)//t+1 for n in lattice.cells]
    s = torch.rand(2, *grid, generator=torch.Generator().manual_seed(p))
    for size in ((224, 168), (227, 150)): torch.testing.assert_close(make_maps(s, size, 4, None, lattice), naive_maps(s, size, 4, lattice), rtol=0, atol=1e-5)

@pytest.mark.parametrize('p', [1, 3, 5])
def test_maps_of_stride_1_and_odd_patches_are_bilinear_to_the_byte(p):
    for n in range(1, 70, 4):
        for pixels in (9, 61, 224, 320, 518):
            s = torch.rand(1, n, n, generator=torch.Generator().manual_seed(n))
            u = torch.nn.functional.interpolate(torch.eye(n, dtype=torch.float64)[None], pixels, mode='linear', align_corners=False)[0].T.float()
            assert torch.equal(make_maps(s, (pixels, pixels), 0, None, Lattice((n, n), p)), u @ s @ u.T)


# Searches that say how often they are right
def alike(n, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=rng) @ torch.randn(12, 160, generator=torch.Generator().manual_seed(9))+.1*torch.randn(n, 160, generator=rng)

@pytest.mark.parametrize('name, off', [('fast', .01), ('fp16', .01), ('int8', .02), ('ivfpq', .2)])
@pytest.mark.parametrize('copies', [2, 9])
def test_twins_teach_a_search_nothing(name, off, copies):
    "A bank with duplicates, not quite to the byte, as those of another batch: what is said is what fresh queries find."
    if name == 'ivfpq': pytest.importorskip('faiss')
    class Found(SEARCHES[name]):
        def _suits(self): return True # with codes, slow as they may be here
    one, queries = alike(1200, 0), alike(300, 1)
    bank = one.repeat(copies, 1)
    bank += 1e-6*torch.randn(bank.shape, generator=torch.Generator().manual_seed(2))
    search = Found().fit(bank)
    true = naive_neighbours(queries, bank)[0][:, 0]
    found = (queries-bank[search(queries)[1][:, 0]]).square().sum(1)
    recall = float((found <= true*(1+1e-4)).float().mean())
    assert abs(search.recall_-recall) <= off
    if name == 'fast':
        assert search.targets_ and recall >= .99
        assert search.margin_ == pytest.approx(Found().fit(one).margin_, rel=.3)

def test_rows_that_are_all_one_have_no_others():
    assert SEARCHES['fp16']().fit(torch.ones(50, 8)).recall_ == 1
