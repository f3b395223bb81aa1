"Numbers that can be trusted: places in maps, searches, precision, kinds of input, memory."
import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from PIL import Image

from patchcore_nb import answers, concurrency, store
from patchcore_nb.core import ArgumentError, DataError, PatchCoreError, read_image
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.evidence import patch_box
from patchcore_nb.memory_bank import cover
from patchcore_nb.maps import Lattice, make_maps, naive_maps
from patchcore_nb.names import SEARCHES
from patchcore_nb.nested_search import Nested
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.reasons import middle_of, patch_at
from patchcore_nb.samplers import coreset
from patchcore_nb.scorer import Scorer
from patchcore_nb.search import naive_neighbours, nearest_neighbours


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

@pytest.mark.parametrize('name, off', [('fast', .01), ('fp16', .01), ('int8', .02), ('ivfpq', .25)]) # an index is trained on the rows that it is asked for
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


# Full precision
def words():
    "What torch is set to: words, and switches as far as it says."
    def asked(read):
        try: return read()
        except RuntimeError: return 'refused'
    b = torch.backends
    parts = [b, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn, b.mkldnn.conv, b.mkldnn.matmul] if hasattr(b, 'fp32_precision') else []
    return [o.fp32_precision for o in parts], asked(lambda: b.cudnn.allow_tf32), asked(torch.get_float32_matmul_precision), asked(lambda: b.cuda.matmul.allow_tf32)

PRECISIONS = {'as it is': '0', 'high': "torch.set_float32_matmul_precision('high')", 'medium': "torch.set_float32_matmul_precision('medium')", 'switched off': 'b.cudnn.allow_tf32 = False',
              'conv ieee': "b.cudnn.conv.fp32_precision = 'ieee'", 'all tf32': "b.fp32_precision = 'tf32'", 'products tf32': "b.cuda.matmul.fp32_precision = 'tf32'", 'all bf16': "b.fp32_precision = 'bf16'"}
ASK = """
import sys, torch
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, {tests!r})
from test_trust import words
from patchcore_nb.concurrency import full_precision
b = torch.backends
new = hasattr(b, 'fp32_precision')
if new or 'fp32' not in {how!r}:
    {how}
before = words()
def come_and_go(_):
    for _ in range(20):
        with full_precision(), full_precision():
            parts = [b.cudnn.conv, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.matmul] if new else []
            assert {{o.fp32_precision for o in parts}} <= {{'ieee'}}, 'not full precision'
            assert new or (not b.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == 'highest')
    try:
        with full_precision(): 1/0
    except ZeroDivisionError: pass
come_and_go(0)
assert words() == before, (before, words())
with ThreadPoolExecutor(4) as pool: list(pool.map(come_and_go, range(8)))
assert words() == before, (before, words())
if new: # what is wider is still listened to
    b.fp32_precision = 'ieee'
    assert b.mkldnn.matmul.fp32_precision == before[0][-1] or before[0][-1] == before[0][0]
"""

@pytest.mark.parametrize('how', PRECISIONS.values(), ids=PRECISIONS)
def test_full_precision_whatever_was_set_and_as_it_was_afterwards(how):
    "In a process of its own: torch does not forget which way was used."
    code = ASK.format(how=how, tests=str(Path(__file__).parent))
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr

def test_full_precision_by_switches_alone(monkeypatch):
    "As with a torch that has no words."
    monkeypatch.setattr(concurrency, '_parts', lambda: [])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    try:
        with concurrency.full_precision(): inside = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        assert inside == (False, 'highest') and torch.get_float32_matmul_precision() == 'high'
    finally: torch.set_float32_matmul_precision(before)

@pytest.mark.parametrize('ask', [lambda x: nearest_neighbours(x, x), lambda x: SEARCHES['exact']().fit(x)(x), lambda x: coreset(x, .5), lambda x: Scorer().fit(x)(x[:, None, None]), lambda x: make_maps(x[:2, :, None], (9, 9)),
                                 lambda x: Nested().fit(x, [9, 40])(x), lambda x: cover(x, torch.full((40,), 9.), 1.), lambda x: SEARCHES['fp16']().fit(x)(x)], ids=['plain', 'exact', 'coreset', 'scorer', 'maps', 'nested', 'cover', 'fp16'])
def test_products_are_computed_in_full_precision(ask, monkeypatch):
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(o in str(func) for o in ('mm', 'convolution')): seen.append(torch.get_float32_matmul_precision())
            return func(*args, **(kwargs or {}))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('medium')
    try:
        with Watch(): ask(x)
    finally: torch.set_float32_matmul_precision(before)
    assert seen and set(seen) == {'highest'}


# What comes in, and the state that torch is in
SMALL = dict(target_dim=64, resize=64, imagesize=64, batch_size=4, device='cpu')
GOOD = [np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8) for i in range(4)]
TEST = [*GOOD, 255-GOOD[0]]

def small(**more): return PatchCore('filterbank', **SMALL | more)

@pytest.fixture(scope='module')
def usual(): return small().fit(GOOD)

@pytest.fixture(scope='module')
def wanted(usual): return usual.predict(TEST).image_scores

def as_tensors(dtype): return [torch.from_numpy(o).permute(2, 0, 1).to(dtype)/255 for o in TEST]

def test_numbers_of_numpy_will_do(wanted):
    found = small(k=np.int64(1), seed=np.int32(0), resize=np.int64(64), imagesize=(np.int16(64), np.int64(64)), patchsize=np.uint8(3), stride=np.int64(1), target_dim=np.int64(64), batch_size=np.int64(4), num_workers=np.int8(1), ratio=np.float64(.1)).fit(GOOD).predict(TEST)
    assert torch.equal(found.image_scores, wanted)

@pytest.mark.parametrize('make', [lambda: as_tensors(torch.bfloat16), lambda: as_tensors(torch.float16), lambda: as_tensors(torch.float64), lambda: [o.to_sparse() for o in as_tensors(torch.float32)],
                                  lambda: [torch.quantize_per_tensor(o, 1/255, 0, torch.quint8) for o in as_tensors(torch.float32)], lambda: [o.requires_grad_() for o in as_tensors(torch.float32)]], ids=['bfloat16', 'float16', 'float64', 'sparse', 'quantised', 'with a gradient'])
def test_tensors_of_any_kind_are_images(usual, wanted, make):
    torch.testing.assert_close(usual.predict(make()).image_scores, wanted, rtol=1e-5, atol=1e-6)
    assert small().fit(make()[:4]).n_images_ == 4

def closed():
    im = Image.fromarray(GOOD[0])
    im.close()
    return im

@pytest.mark.parametrize('make, word', [(lambda: [o.astype(object) for o in TEST], 'got object'), (lambda: [o.astype(str) for o in TEST], 'got <U3'), (lambda: [o.astype('S') for o in TEST], 'got'), (lambda: [o+0j for o in as_tensors(torch.float32)], 'got complex'),
                                        (lambda: [o.to('meta') for o in as_tensors(torch.float32)], 'meta'), (lambda: [(o, 0) for o in TEST], 'pass the labels apart'), (lambda: [[o, 1] for o in TEST], 'number 0 is a list'), (lambda: [GOOD[0], ('x.png', 1)], 'number 1 is a tuple'), (lambda: [closed()], 'pass it open')])
def test_what_is_no_image_is_named(usual, make, word):
    for ask in (usual.predict, small().fit):
        with pytest.raises(PatchCoreError, match=word): ask(make())

@pytest.mark.parametrize('device', ['cuda', torch.device('cuda'), 'meta'])
def test_a_device_that_is_not_there_is_named(device):
    if 'cuda' in str(device) and torch.cuda.is_available(): pytest.skip('it is there')
    with pytest.raises(ArgumentError, match=f"device '{device}' cannot be used"): small(device=device).fit(GOOD)

STATES = {'autocast': lambda: torch.autocast('cpu', torch.bfloat16), 'inference': torch.inference_mode, 'no gradients': torch.no_grad, 'another device': lambda: torch.device('meta')}

@pytest.mark.parametrize('state', STATES.values(), ids=STATES)
def test_the_state_of_torch_does_not_matter(usual, wanted, state, tmp_path):
    "Around fit, around predict, around all that a model does; and what was made inside works outside."
    with state():
        assert torch.equal(usual.predict(TEST).image_scores, wanted)
        inside = small().fit(GOOD)
        both = Ensemble([small(), small(k=2)]).fit(GOOD)
        more = both.predict(TEST)
        store.save(inside, tmp_path/'m')
        loaded = store.load(tmp_path/'m', device='cpu')
        grown = small().fit(GOOD[:2]).partial_fit(GOOD[2:])
    for o in (inside, loaded): assert torch.equal(o.predict(TEST).image_scores, wanted)
    assert torch.equal(more.image_scores, Ensemble([small(), small(k=2)]).fit(GOOD).predict(TEST).image_scores)
    inside.partial_fit([255-GOOD[1]])
    assert torch.equal(grown.predict(TEST).image_scores, small().fit(GOOD[:2]).partial_fit(GOOD[2:]).predict(TEST).image_scores)
    assert not inside.memory_bank_.is_inference()

@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_another_default_type_is_named(usual, dtype):
    torch.set_default_dtype(dtype)
    try:
        for ask in (lambda: usual.predict(TEST), lambda: small().fit(GOOD)):
            with pytest.raises(ArgumentError, match='set_default_dtype'): ask()
    finally: torch.set_default_dtype(torch.float32)


# Memory that ran out
@pytest.mark.parametrize('e', [MemoryError(), MemoryError('std::bad_alloc'), RuntimeError('std::bad_alloc'), OSError(errno.ENOMEM, 'Cannot allocate memory'), torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError('[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: not enough memory: you tried to allocate 400 bytes.'), RuntimeError('CUDA error: out of memory\nCUDA kernel errors might be reported later'),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), RuntimeError('MPS backend out of memory (MPS allocated: 8 GB)'),
    RuntimeError("Error in virtual void* faiss::gpu::StandardGpuResourcesImpl::allocMemory: Error: 'err == cudaSuccess' failed: cudaMalloc error out of memory [2]"), RuntimeError('unable to mmap 400 bytes from file <x>: Cannot allocate memory (12)'),
    RuntimeError('bad allocation'), RuntimeError('HIP out of memory.'), ImportError('DLL load failed: The paging file is too small for this operation to complete.')], ids=lambda e: str(e)[:24])
def test_memory_that_ran_out_is_told_as_such(e, tmp_path):
    "By any library, and if somebody took it for another fault."
    assert answers.message(e, {}).startswith('out of memory (')
    def broken(im): raise e
    path = tmp_path/'a.png'
    Image.fromarray(GOOD[0]).save(path)
    with pytest.raises(PatchCoreError) as caught: read_image(path, broken)
    assert answers.message(caught.value, {}).startswith('out of memory (')

@pytest.mark.parametrize('e', [DataError('pictures/out of memory.png is not there: check the path'), FileNotFoundError(errno.ENOENT, 'No such file', 'cannot allocate.png'), ArgumentError('memory_budget is too small'), ValueError('a memory bank')])
def test_what_only_sounds_like_it_is_not(e): assert not answers.message(e, {}).startswith('out of memory')
