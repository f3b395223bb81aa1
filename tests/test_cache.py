"The cache of patch embeddings: what is found, what is missed, what is damaged, and who else writes."
import os
import shutil
import subprocess
import sys
import types
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image

from patchcore_nb import cache, embedder, filterbank
from patchcore_nb.cache import Cache
from patchcore_nb.cli import main
from patchcore_nb.core import ArgumentError, DataError
from patchcore_nb.data import TURNS, load_category, make_miniature
from patchcore_nb.extractor import Extractor
from patchcore_nb.names import BACKBONES
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.sweeping import sweep

SMALL = dict(pretrain_dim=64, target_dim=64, imagesize=64, resize=64, batch_size=2, device='cpu', ratio=.2)


@pytest.fixture
def data(tmp_path): return make_miniature(tmp_path/'data', n_train=6)

@pytest.fixture
def tile(data): return load_category('mvtec', data, 'tile')

@pytest.fixture
def kept(tmp_path): return tmp_path/'cache'

def model(kept=None, backbone='filterbank', **kw): return PatchCore(backbone, weights='random' if backbone == 'resnet18' else 'pretrained', cache=kept, **SMALL | kw)

def files(kept): return {p: p.stat().st_mtime_ns for p in kept.rglob('*.safetensors')}

@pytest.fixture
def no_backbone(monkeypatch):
    "From when this is called, no backbone may be used but for a dry run on zeros."
    def forward(self, images, real=Extractor.forward):
        assert not images.any(), 'the backbone was asked'
        return real(self, images)
    return lambda: monkeypatch.setattr(Extractor, 'forward', forward)

@pytest.fixture(params=['filterbank', 'resnet18'])
def backbone(request): return request.param


def same(a, b):
    for name in ('idxs_', 'memory_bank_', 'origin_'): assert torch.equal(getattr(a, name), getattr(b, name)), name

def test_a_sweep_never_runs_the_backbone_again(tile, kept, backbone, no_backbone):
    "Ratio, k, patch score, sampler and search may change; the results are those without a cache, to the last bit."
    first = model(kept, backbone).fit(tile)
    first.predict(tile.test)
    changed = [dict(ratio=.5), dict(k=3), dict(patch_score='mean'), dict(patch_score='reweighted', ratio=.4), dict(sampler='random'), dict(ratio=.1, num_workers=0)]
    wanted = [(m := model(None, backbone, **kw).fit(tile), m.predict(tile.test)) for kw in changed]
    before = files(kept)
    no_backbone()
    for kw, (m, p) in zip(changed, wanted):
        again = model(kept, backbone, **kw).fit(tile)
        same(again, m)
        assert torch.equal(again.predict(tile.test).anomaly_maps, p.anomaly_maps)
    assert files(kept) == before and len(before) == len(tile.train)+len(tile.test)+(backbone == 'filterbank')

@pytest.mark.parametrize('kw', [dict(layers=('layer2',)), dict(layers=('layer3', 'layer2')), dict(resize=72), dict(imagesize=56), dict(patchsize=5), dict(more_patchsizes=(5,)), dict(stride=2), dict(pretrain_dim=48),
                                dict(target_dim=48), dict(preprocessing='conv'), dict(aggregation='mlp'), dict(seed=1)])
def test_another_setting_misses(tile, kept, kw):
    "Each of these changes the embeddings of a random network, so nothing that is kept may be used."
    model(kept, 'resnet18').fit(tile)
    before = files(kept)
    same(model(kept, 'resnet18', **kw).fit(tile), model(None, 'resnet18', **kw).fit(tile))
    assert len(files(kept)) == 2*len(before)

def test_the_seed_counts_where_it_matters(tile, kept):
    "The filter bank has nothing random in it, but for the projections."
    for kw, n in ((dict(seed=1), 7), (dict(seed=2), 7), (dict(seed=1, preprocessing='conv'), 14), (dict(seed=2, preprocessing='conv'), 21)):
        model(kept, **kw).fit(tile)
        assert len(files(kept)) == n, kw

def test_a_changed_image_misses_and_a_renamed_one_does_not(tile, kept, no_backbone):
    paths = [o.path for o in tile.train]
    m = model(kept, 'resnet18').fit(paths)
    n = len(files(kept))
    Image.fromarray(255-np.asarray(Image.open(paths[1]))).save(paths[1])
    new = model(kept, 'resnet18').fit(paths)
    assert len(files(kept)) == n+1 and not torch.equal(new.idxs_, m.idxs_)
    paths[2] = paths[2].rename(paths[2].with_name('another name.png'))
    no_backbone()
    same(model(kept, 'resnet18').fit(paths), new)

def test_pictures_in_memory(kept, no_backbone):
    "Arrays, tensors and Pillow images by their pixels, shape and type."
    a = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), np.uint8)
    images = [*a, *(torch.from_numpy(o).permute(2, 0, 1) for o in a), *(Image.fromarray(o) for o in a), *(np.float32(o/255) for o in a)]
    m = model(kept, 'resnet18').fit(images)
    assert len(files(kept)) == 16
    no_backbone()
    same(model(kept, 'resnet18').fit([o.copy() if isinstance(o, np.ndarray) else o for o in images]), m)

def test_turned_images_have_their_own(tile, kept, no_backbone):
    m = model(kept, 'resnet18', augment=True).fit(tile)
    assert len(files(kept)) == 5*len(tile.train)
    no_backbone()
    same(model(kept, 'resnet18', augment=True).fit(tile), m)
    same(model(kept, 'resnet18').fit(tile), model(kept, 'resnet18').fit(tile)) # the unturned ones are there too

def test_another_weights_file_misses(tile, kept, tmp_path):
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        torch.save(torchvision.models.resnet18().state_dict(), tmp_path/'resnet18.pth')
        PatchCore('resnet18', weights_dir=tmp_path, cache=kept, **SMALL).fit(tile)
    assert len(files(kept)) == 2*len(tile.train)

def test_another_training_set_calibrates_anew(tile, kept):
    "The filter bank's scale belongs to its training images, so even the images of both sets are embedded twice."
    model(kept).fit(tile.train[:4])
    model(kept).fit(tile.train[:5])
    assert len(files(kept)) == 4+1+5+1

def test_changed_code_misses(tile, kept, monkeypatch):
    model(kept, 'resnet18').fit(tile)
    n = len(files(kept))
    monkeypatch.setattr(embedder, 'code_state', lambda files, real=cache.code_state: real(files)|{'patchcore_nb.aggregator.Aggregator': 'edited'})
    model(kept, 'resnet18').fit(tile)
    assert len(files(kept)) == 2*n and len({*kept.iterdir()}) == 2

def test_the_code_that_counts(tmp_path, backbone):
    "Every file of ours that an image goes through, from its bytes to its embedding."
    seen = set()
    def note(frame, event, arg):
        path = Path(frame.f_code.co_filename)
        if path.parent == Path(cache.__file__).parent: seen.add(path.stem)
    Image.fromarray(np.arange(80*80, dtype=np.uint16).reshape(80, 80)).save(tmp_path/'deep.png')
    e = model(None, backbone, value_range=(0, 4095), preprocessing='conv', aggregation='mlp', distance='cosine').check().embedder_
    images = [tmp_path/'deep.png', np.zeros((80, 80, 3), np.uint8), torch.zeros(1, 80, 80), Image.new('P', (80, 80))]
    sys.setprofile(note)
    try: e.forward(torch.stack([e.read((o, turn)) for o in images for turn in TURNS]))
    finally: sys.setprofile(None)
    code = e.recipe()['code']
    assert {'bit_depth', 'batching', 'core', 'crop', 'extractor', 'aggregator'} <= seen <= {o.split('.')[1] for o in code if o.startswith('patchcore_nb.')}
    assert {'torch', 'torchvision', 'pillow', 'pillow-heif'} <= code.keys()

class Bank(torch.nn.Module):
    "A backbone with what no state dict tells."
    def __init__(self, dilation=1, wavelength=4., hidden=1., plain=1., act=None):
        super().__init__()
        self.wavelength, self.plain, self.act = wavelength, torch.tensor(plain), act or (lambda x: x)
        self.register_buffer('hidden', torch.tensor(hidden), persistent=False)
        self.layer = torch.nn.Conv2d(3, 8, 3, 8, 2, dilation)
        torch.nn.init.constant_(self.layer.weight, .1), torch.nn.init.zeros_(self.layer.bias)
    def forward(self, x): return self.layer(self.act(x*self.hidden*self.plain)+torch.sin(x*self.wavelength))

@pytest.mark.parametrize('told', [dict(dilation=2), dict(wavelength=5.), dict(hidden=2.), dict(plain=2.), dict(act=torch.abs)])
def test_what_no_state_dict_tells_is_asked_for(tile, kept, monkeypatch, told):
    "Under the same name and with the same weights, another network: old embeddings are passed over, and models are not merged."
    def fitted(kept, told):
        monkeypatch.setitem(BACKBONES, 'bank', lambda: Bank(**told))
        return PatchCore('bank', ['layer'], target_dim=32, device='cpu', imagesize=64, resize=70, cache=kept).fit(tile)
    first, other, fresh = fitted(kept, {}), fitted(kept, told), fitted(None, told)
    same(other, fresh)
    assert not torch.equal(other.memory_bank_, first.memory_bank_)
    assert first.embedder_.identified.weights_sha256 == other.embedder_.identified.weights_sha256
    with pytest.raises(ArgumentError, match='network_sha256 differ'): first.merge(other)

def test_the_filters_of_a_filter_bank_count(tile, kept, monkeypatch):
    first = model(kept).fit(tile)
    monkeypatch.setattr(filterbank, 'gabors', lambda n, real=filterbank.gabors: real(n, wavelength=5.))
    other = model(kept).fit(tile)
    same(other, model(None).fit(tile))
    assert not torch.equal(first.memory_bank_, other.memory_bank_)

TELL = 'import json, sys; from patchcore_nb.build import create_backbone; from patchcore_nb.described import digest_network; print(json.dumps([digest_network(create_backbone(o, "random")) for o in sys.argv[1:]]))'

def test_what_a_network_is_is_said_alike_in_every_process():
    names = ['filterbank', 'resnet18', 'timm:vit_tiny_patch16_224', 'timm:efficientnet_b0', 'torchvision:swin_t']
    said = [subprocess.run([sys.executable, '-c', TELL, *names], capture_output=True, text=True, check=True, env=os.environ | dict(PYTHONHASHSEED=o)).stdout for o in '12']
    assert said[0] == said[1] and len(set(said[0].split(', '))) == len(names)

def test_a_backbone_from_a_notebook_that_has_changed_misses(tile, kept, monkeypatch):
    def banks(factor):
        space = dict(torch=torch, __name__='__main__')
        exec(f'''
class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.AvgPool2d(8)
    def forward(self, x): return self.layer(x*{factor})
''', space) # no file, as in a notebook
        monkeypatch.setitem(BACKBONES, 'plain', lambda *a, **kw: space['Plain']())
        return [PatchCore('plain', ['layer'], target_dim=32, device='cpu', imagesize=64, resize=70, cache=c).fit(tile).memory_bank_ for c in (kept, None)]
    for factor in (1, 5):
        kept_bank, fresh_bank = banks(factor)
        assert torch.equal(kept_bank, fresh_bank)

@pytest.mark.parametrize('kind', ['closure', 'default', 'method', 'slots', 'hook', 'attribute of its class', 'base class', 'patched forward', 'weights in a list', 'order', 'global'])
def test_what_a_network_holds_is_no_weight_and_counts(tile, kept, monkeypatch, kind):
    "Two networks that differ in this alone: no embedding of the one is taken for the other's."
    class Factor:
        __slots__ = 'n',
        def __init__(self, n): self.n = n
        def times(self, x): return x*self.n
    def scaled(n): return lambda x: x*n
    def by_default(n):
        def f(x, n=n): return x*n
        return f
    def network(n):
        class Base(torch.nn.Module):
            factor = n if kind == 'base class' else 1
        class Net(Base):
            own = n if kind == 'attribute of its class' else 1
            def __init__(self):
                super().__init__()
                self.layer, self.act, self.held = torch.nn.AvgPool2d(8), torch.abs, Factor(n if kind == 'slots' else 1)
            def forward(self, x): return self.layer(self.act(x)*self.factor*self.own*self.held.n)
        net = Net()
        if kind == 'patched forward': net.forward = types.MethodType(dict({1: lambda self, x: self.layer(x), 5: lambda self, x: self.layer(x*x)})[n], net)
        if kind == 'weights in a list':
            outer = torch.nn.Conv2d(3, 3, 1, bias=False)
            with torch.no_grad(): outer.weight.fill_(n)
            net.before, net.act = [outer], lambda x: net.before[0](x).detach()
        if kind == 'order':
            parts = [('one', torch.nn.ReLU()), ('two', torch.nn.Tanh())]
            net.layer = torch.nn.Sequential(OrderedDict([('pool', net.layer), *parts[::n if n == 1 else -1]]))
        if kind == 'global':
            space = dict(FACTOR=n, __name__='somewhere')
            exec('def act(x): return x*FACTOR', space)
            net.act = space['act']
        if kind == 'hook': net.layer.register_forward_hook(lambda m, args, out: out*n)
        act = dict(closure=scaled, default=by_default, method=lambda n: Factor(n).times).get(kind)
        if act: net.act = act(n)
        return net
    for n in (1, 5):
        monkeypatch.setitem(BACKBONES, 'held', lambda *a, **kw: network(n)) # noqa: B023
        banks = [PatchCore('held', ['layer'], target_dim=32, device='cpu', imagesize=64, resize=70, cache=c).fit(tile).memory_bank_ for c in (kept, None)]
        assert torch.equal(*banks)

def test_a_network_that_cannot_be_described_is_not_cached(tile, kept, monkeypatch):
    def network(*a, **kw):
        net = torch.nn.Sequential(torch.nn.AvgPool2d(8))
        net.source = (i for i in range(3))
        return net
    monkeypatch.setitem(BACKBONES, 'odd', network)
    odd = PatchCore('odd', ['0'], target_dim=32, device='cpu', imagesize=64, resize=70, cache=kept)
    with pytest.warns(UserWarning, match='it cannot be said what builtins.generator is in Sequential, so this network cannot be told from others: .* not cached'): odd.fit(tile)
    assert not kept.exists()

def test_threads_and_processor_count(tile, kept, monkeypatch):
    "Sums are rounded otherwise when they are shared otherwise."
    m = model(kept, 'resnet18').fit(tile)
    n = len(files(kept))
    model(kept, 'resnet18').fit(tile)
    assert len(files(kept)) == n
    model(kept, 'resnet18', num_threads=torch.get_num_threads()+1).fit(tile)
    assert len(files(kept)) == 2*n
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'ANOTHER')
    same(model(kept, 'resnet18').fit(tile), m)
    assert len(files(kept)) == 3*n

def test_many_threads_open_one_cache(tmp_path):
    def work(i):
        c = Cache(tmp_path, dict(a=1))
        c.put('x', dict(t=torch.ones(3)))
        return c.get('x')
    with ThreadPoolExecutor(8) as pool: assert all(torch.equal(o['t'], torch.ones(3)) for o in pool.map(work, range(100)))
    assert not [o for o in tmp_path.rglob('*') if 'tmp' in o.name]

@pytest.mark.parametrize('damage', [lambda b: b[:-100], lambda b: b'', lambda b: b[:300]+bytes([b[300] ^ 4])+b[301:], lambda b: b[:-1]+bytes([b[-1] ^ 128]), lambda b: b'\xff'*len(b), lambda b: b+b'x'])
def test_damage_is_found_and_mended(tile, kept, damage):
    m = model(kept, 'resnet18').fit(tile)
    whole = {p: p.read_bytes() for p in files(kept)}
    for p, b in whole.items(): p.write_bytes(damage(b))
    same(model(kept, 'resnet18').fit(tile), m)
    sizes = {p: len(b) for p, b in whole.items()}
    assert {p: p.stat().st_size for p in files(kept)} == sizes
    same(model(kept, 'resnet18').fit(tile), m)

def test_entries_of_an_older_format_are_passed_over(tmp_path, monkeypatch):
    "Where it left them, and also where a person has moved them to."
    ones = dict(t=torch.ones(3))
    with monkeypatch.context() as m:
        m.setattr(cache, 'FORMAT', 'patchcore_nb cache 1')
        old = Cache(tmp_path, dict(a=1))
        old.put('x', ones)
        assert torch.equal(old.get('x')['t'], ones['t'])
    new = Cache(tmp_path, dict(a=1))
    assert cache.FORMAT == 'patchcore_nb cache 2' and new.folder != old.folder and new.get('x') is None
    shutil.copy(old.path('x'), new.path('x'))
    assert new.get('x') is None
    new.put('x', ones)
    assert torch.equal(new.get('x')['t'], ones['t'])

def test_a_file_of_the_version_before_is_passed_over(tmp_path):
    "Its header said nothing of a format."
    c = Cache(tmp_path, dict(a=1))
    ones = dict(t=torch.ones(3))
    about = dict(key='x', shapes=str({'t': (3,)}), sha256=cache.digest_tensors(ones))
    c.path('x').write_bytes(safetensors.torch.save(ones, about))
    assert c.get('x') is None

def test_swapped_files_are_found(tile, kept):
    m = model(kept, 'resnet18').fit(tile)
    a, b = sorted(files(kept))[:2]
    first = a.read_bytes()
    a.write_bytes(b.read_bytes()), b.write_bytes(first)
    same(model(kept, 'resnet18').fit(tile), m)

def test_deleting_is_safe(tile, kept):
    m = model(kept).fit(tile)
    for p in sorted(files(kept))[::2]: p.unlink()
    same(model(kept).fit(tile), m)
    shutil.rmtree(kept)
    same(model(kept).fit(tile), m)

def test_however_much_is_there(tile, kept, backbone):
    "No cache, an empty one, one with any of the files, a full one: the same bytes of memory and of scores."
    train, test = tile.train[:4], tile.test[:2]
    wanted = model(None, backbone, batch_size=3).fit(train)
    scores = wanted.predict(test).anomaly_maps
    def agree():
        m = model(kept, backbone, batch_size=3).fit(train)
        same(m, wanted)
        assert torch.equal(m.predict(test).anomaly_maps, scores)
    agree()
    contents = {p: p.read_bytes() for p in files(kept)}
    for fill in range(0, 2**len(contents), 5): # of 128 ways, every fifth
        for i, (p, b) in enumerate(contents.items()):
            if fill >> i & 1: p.write_bytes(b)
            else: p.unlink(missing_ok=True)
        agree()

def test_what_was_computed_in_a_shorter_batch_is_not_handed_out_in_a_longer_one(tile, kept):
    for n in (1, 2, 3): same(model(kept, 'resnet18', ratio=1., sampler='identity').fit(tile.train[:n]), model(None, 'resnet18', ratio=1., sampler='identity').fit(tile.train[:n]))
    same(model(kept, 'resnet18', batch_size=3).fit(tile), model(None, 'resnet18', batch_size=3).fit(tile))

def test_a_folder_that_cannot_be(tile, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(DataError, match='cannot be written'): model(tmp_path/'file', 'resnet18').fit(tile)

BESIDE = '''
import sys
from patchcore_nb.data import load_category
from patchcore_nb.patchcore import PatchCore
m = PatchCore('filterbank', pretrain_dim=64, target_dim=64, imagesize=64, resize=64, batch_size=2, device='cpu', ratio=.2, cache=sys.argv[2]).fit(load_category('mvtec', sys.argv[1], 'tile'))
print(m.idxs_.tolist())
'''

def test_runs_side_by_side(data, tile, kept):
    runs = [subprocess.Popen([sys.executable, '-c', BESIDE, str(data), str(kept)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {o.communicate()[0] for o in runs}
    assert not any(o.returncode for o in runs) and found == {f'{model().fit(tile).idxs_.tolist()}\n'}
    assert len(files(kept)) == len(tile.train)+1 and not [p for p in kept.rglob('*') if '.tmp' in p.name]

def test_command_line(data, tmp_path, monkeypatch, no_backbone):
    monkeypatch.chdir(tmp_path)
    def call(*flags, sampler='-p 0.2 approx_greedy_coreset', core=''):
        line = f'results patch_core -b resnet18 -le layer2 --weights random --target_embed_dimension 64 {core} sampler {sampler} dataset --imagesize 64 --resize 64 -d tile mvtec {data}'
        with pytest.raises(SystemExit) as e: main(['--gpu', '-1', *flags, *line.split()])
        assert e.value.code == 0
        return max(tmp_path.glob('results/project/*/results.csv'), key=os.path.getmtime).read_bytes()
    plain, other = call(), call(sampler='-p 0.5 random', core='--anomaly_scorer_num_nn 3')
    assert call('--cache', 'kept') == plain and len(files(tmp_path/'kept')) == 10
    no_backbone()
    assert call('--cache', 'kept') == plain
    assert call('--cache', 'kept', sampler='-p 0.5 random', core='--anomaly_scorer_num_nn 3') == other

def test_sweeps_take_from_it(tile, kept, no_backbone):
    def swept(kept): return sweep(model(kept, 'resnet18'), tile, [.05, .2, .5], [1, 3], ['max', 'reweighted'], all_pixels=True)
    plain, first = swept(None), swept(kept)
    no_backbone()
    assert swept(kept).equals(first) and first.equals(plain) and len(plain) == 12
