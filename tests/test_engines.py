"Engines: the same scores as torch's, whichever way a network is used; what is kept, what is refused, what is said."
import copy
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from patchcore_nb import engines
from patchcore_nb.base import ArgumentError
from patchcore_nb.build import create_backbone
from patchcore_nb.cli import main
from patchcore_nb.data import load_category
from patchcore_nb.described import digest_tensors
from patchcore_nb.engines import Engine, candidates, engaged, installed, noise, say_engines
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.experiment import run
from patchcore_nb.extractor import Extractor
from patchcore_nb.model_files import VALUES
from patchcore_nb.names import ENGINES, KNOWN
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.resume import read_run
from patchcore_nb.saved import evaluate_main, predict_main
from patchcore_nb.store import load, save

SMALL = dict(resize=64, imagesize=64, pretrain_dim=32, target_dim=32, ratio=.2, device='cpu', num_workers=0, weights='random')
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
NAMES = [pytest.param(o, marks=pytest.mark.skipif(not installed(o), reason=f'{o} is not installed')) for o in ENGINES]
each = pytest.mark.parametrize('name', NAMES)

_MADE = {} # converted networks: to convert one takes seconds

@pytest.fixture(autouse=True)
def converted_once(monkeypatch):
    def convert(name, extractor, size, real=engines.convert):
        key = name, extractor.layers, size, type(extractor.backbone), digest_tensors(extractor.backbone.state_dict())
        if key not in _MADE: _MADE[key] = real(name, extractor, size)
        return _MADE[key]
    monkeypatch.setattr(engines, 'convert', convert)

def small(backbone='resnet18', **kw): return PatchCore(backbone, **SMALL | kw)

def same(found, wanted): torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4*float(wanted.abs().max()))

@pytest.fixture(scope='module')
def fitted(): return small().fit(IMAGES)

@pytest.fixture(scope='module')
def wanted(fitted): return fitted.predict(IMAGES)


# The same numbers

@each
def test_a_fitted_model_scores_the_same_by_any_engine(fitted, wanted, name):
    m = copy.deepcopy(fitted).set_params(engine=name)
    found = m.predict(IMAGES)
    assert m.is_fitted and m.embedder_.engine == name
    same(found.image_scores, wanted.image_scores)
    same(found.anomaly_maps, wanted.anomaly_maps)
    assert torch.equal(m.set_params(engine='torch').predict(IMAGES).image_scores, wanted.image_scores)

@each
def test_a_fit_by_any_engine_finds_the_same(wanted, name):
    same(small(engine=name).fit(IMAGES).predict(IMAGES).image_scores, wanted.image_scores)

@each
def test_a_calibrated_backbone_is_converted_as_calibrated(name):
    found, want = (small('filterbank', engine=o, weights='pretrained').fit(IMAGES).predict(IMAGES[:2]).image_scores for o in (name, 'torch'))
    same(found, want)

@each
def test_tiles_go_through_an_engine(name):
    large = np.random.default_rng(1).integers(0, 256, (2, 160, 128, 3), np.uint8)
    kw = dict(resize=None, imagesize=None, tile=64, batchnorm='trained')
    found, want = (small(engine=o, **kw).fit(large).predict(large).image_scores for o in (name, 'torch'))
    same(found, want)

@each
@pytest.mark.slow
@pytest.mark.parametrize('backbone', [k for k, o in KNOWN.items() if o.library])
def test_every_network_of_the_table_converts(name, backbone):
    try: check_converted(name, backbone, KNOWN[backbone].layers, (224, 224))
    finally: _MADE.clear()

@each
@pytest.mark.parametrize('backbone, layers, size', [('timm:vit_tiny_patch16_224', ['blocks.2'], (224, 224)), ('timm:efficientnet_lite0', ['blocks.2', 'blocks.4'], (64, 96))])
def test_other_kinds_of_networks_convert(name, backbone, layers, size): check_converted(name, backbone, layers, size)

def check_converted(name, backbone, layers, size):
    extractor = Extractor(create_backbone(backbone, 'random'), layers)
    for n in (1, 3):
        images = noise(n, size)
        for a, b in zip(engaged(extractor, name)(images).values(), extractor(images).values()): same(a, b)

@each
def test_members_of_an_ensemble_have_engines(name):
    def ensemble(o): return Ensemble([small(engine=o), small('filterbank', engine=o, weights='pretrained')])
    found, want = (ensemble(o).fit(IMAGES).predict(IMAGES).image_scores for o in (name, 'torch'))
    same(found, want)

@each
def test_threads_share_an_engine(fitted, wanted, name):
    m = copy.deepcopy(fitted).set_params(engine=name)
    def score(i): return m.predict(IMAGES[i:i+1]).image_scores
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(score, [*range(6)]*5))
    for i, o in enumerate(found): same(o, wanted.image_scores[i%6][None])

@each
@pytest.mark.parametrize('twin', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['copy', 'pickle'])
def test_a_copy_works(fitted, wanted, name, twin):
    m = copy.deepcopy(fitted).set_params(engine=name)
    m.predict(IMAGES[:1])
    same(twin(m).predict(IMAGES).image_scores, wanted.image_scores)

@each
def test_a_saved_model_knows_no_engine(fitted, wanted, tmp_path, name):
    save(copy.deepcopy(fitted).set_params(engine=name), tmp_path/'m')
    assert '"engine"' not in (tmp_path/'m'/VALUES).read_text(encoding='utf-8')
    assert load(tmp_path/'m').engine == 'torch'
    same(load(tmp_path/'m', engine=name).predict(IMAGES).image_scores, wanted.image_scores)


# Threads

@each
def test_an_engine_obeys_num_threads(monkeypatch, name):
    asked, real = [], ENGINES[name]
    monkeypatch.setitem(ENGINES, name, real._replace(start=lambda network, precision, threads: asked.append(threads) or real.start(network, precision, threads)))
    m = small(engine=name, num_threads=1).fit(IMAGES)
    m.set_params(num_threads=2).predict(IMAGES[:1])
    assert asked == [1, 2]


# Kept

@each
def test_a_conversion_is_kept_beside_the_cache(tmp_path, monkeypatch, name):
    first = small(engine=name, cache=tmp_path).fit(IMAGES).predict(IMAGES).image_scores
    def forbidden(*args): raise AssertionError('converted twice')
    monkeypatch.setattr(engines, 'convert', forbidden)
    other = np.random.default_rng(7).integers(0, 256, (2, 64, 64, 3), np.uint8) # not in the cache
    m = small(engine=name, cache=tmp_path).fit(IMAGES)
    assert torch.equal(m.predict(IMAGES).image_scores, first) and len(m.predict(other).image_scores) == 2
    with pytest.raises(AssertionError, match='converted twice'): small(engine=name, cache=tmp_path, seed=5).fit(other) # other weights

@each
def test_the_cache_does_not_mix_engines(tmp_path, name):
    for o in ('torch', name): small(engine=o, cache=tmp_path).fit(IMAGES)
    recipes = [json.loads(o.read_text(encoding='utf-8')) for o in tmp_path.glob('*/recipe.json')]
    assert sorted(o['engine'].split()[0] for o in recipes if 'embedding' in o) == sorted(['torch', name])

@each
def test_a_damaged_conversion_is_made_anew(fitted, wanted, tmp_path, name):
    def score(): return copy.deepcopy(fitted).set_params(engine=name, cache=tmp_path).embedder_.rows(list(IMAGES[:2]))
    score()
    kept = [p for p in tmp_path.rglob('*.safetensors') if b'embedding' not in (p.parent/'recipe.json').read_bytes()]
    assert len(kept) == 1
    content = bytearray(kept[0].read_bytes())
    content[len(content)//2] ^= 255
    kept[0].write_bytes(content)
    for p in tmp_path.rglob('*.safetensors'):
        if p != kept[0]: p.unlink()
    want = copy.deepcopy(fitted).embedder_.rows(list(IMAGES[:2]))
    same(score(), want)


# Refused

def test_an_unknown_engine_is_named():
    with pytest.raises(ArgumentError, match="unknown engine 'openvio': did you mean 'openvino'"): small(engine='openvio').check()

def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(engines, 'installed', lambda name: False)
    with pytest.raises(ArgumentError, match=r"needs the library openvino, which is not installed: pip install 'patchcore_nb\[openvino\]'"): small(engine='openvino').check()
    assert candidates() == ['torch'] and small(engine='auto').check().embedder_.engine == 'torch'

@each
def test_a_gpu_is_refused(name):
    with pytest.raises(ArgumentError, match='computes on the CPU'): engines.check_engine(name, 'float32', torch.device('cuda'))

@each
def test_half_precision_is_refused_where_it_cannot_be(name):
    if 'bfloat16' in ENGINES[name].precisions(): pytest.skip('this processor has bfloat16')
    with pytest.raises(ArgumentError, match='does not compute in bfloat16'): small(engine=name, precision='bfloat16').check()

class Odd(nn.Module):
    "A network that does to many images at once what it does not do to few."
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, images): return self.conv(images*(2. if len(images) > 2 else 1.))

@each
def test_a_conversion_that_computes_something_else_is_refused(name):
    extractor = Extractor(Odd(), ['conv'])
    with pytest.raises(ArgumentError, match=f'engine {name} (computes other maps than torch|cannot evaluate this network)'): engaged(extractor, name)(noise(3, (64, 64)))

def test_an_engine_of_ones_own_is_held_against_torch():
    def start(network, precision, threads):
        def run(images): return [np.zeros((len(images), 8, 8, 128), np.float32), np.zeros((len(images), 4, 4, 256), np.float32)]
        return run
    ENGINES['zeros'] = Engine('torch', 'zeros', True, lambda: ['float32'], lambda graph, images: {}, start)
    try:
        with pytest.raises(ArgumentError, match='engine zeros computes other maps than torch, off by 1'): small(engine='zeros').fit(IMAGES)
    finally: del ENGINES['zeros']


# The fastest

def test_auto_takes_the_fastest_and_says_it(monkeypatch, capfd):
    monkeypatch.setattr(engines, '_CHOSEN', {})
    times = {o: i for i, o in enumerate(reversed(candidates()), 1)}
    monkeypatch.setattr(engines, 'time_engines', lambda extractors, images: {o: times[o] for o in extractors})
    m = small(engine='auto', show=True).fit(IMAGES)
    assert m.embedder_.engine == min(times, key=times.get) and m.engine == 'auto'
    assert capfd.readouterr().err.count(say_engines(dict(sorted(times.items(), key=lambda o: o[1])))) == 1

def test_auto_really_times_them():
    found = engines.time_engines({o: engaged(Extractor(create_backbone('resnet18', 'random'), ['layer2']), o) for o in candidates()}, noise(2, (64, 64)))
    assert found.keys() == {*candidates()} and min(found.values()) > 0

def test_a_resumed_run_keeps_its_engine(demo_root, tmp_path, monkeypatch):
    if len(candidates()) < 2: pytest.skip('no other engine is installed')
    cats = [load_category('mvtec', demo_root, o) for o in ('cog', 'sieve')]
    def fastest(name):
        monkeypatch.setattr(engines, '_CHOSEN', {})
        monkeypatch.setattr(engines, 'time_engines', lambda extractors, images: {o: 1.+(o != name) for o in extractors})
    def go(categories, **how): return run(small('filterbank', layers=['layer2'], engine='auto', weights='pretrained'), categories, tmp_path, report=False, **how)
    class Stop(Exception): pass
    import patchcore_nb.experiment as experiment
    real, seen = experiment.one_category, []
    def once(model, category, *rest):
        if len(seen) == 1 and len(rest) == 2 and not resumed: raise Stop
        seen.append(model.check().embedder_.engine)
        return real(model, category, *rest)
    monkeypatch.setattr(experiment, 'one_category', once)
    resumed, second = False, candidates()[1]
    fastest(second)
    with pytest.raises(Stop): go(cats)
    resumed = True
    fastest('torch')
    done = go(cats, resume=True)
    assert seen == [second, second] and done.done_before == 1
    assert read_run(done.folder)['surroundings']['engines'] == [second]
    with pytest.raises(ArgumentError, match='engine'): # and another one that is asked for is another circumstance
        resumed, seen = False, []
        fastest(second)
        with pytest.raises(Stop): go(cats)
        run(small('filterbank', layers=['layer2'], weights='pretrained'), cats, tmp_path, report=False, resume=True)


# The commands

@each
def test_the_commands_take_engines(demo_root, tmp_path, name, capfd):
    parts = f'patch_core -b filterbank -le layer2 --target_embed_dimension 32 sampler -p .05 approx_greedy_coreset dataset --resize 80 --imagesize 64 -d cog demo {demo_root}'
    how = f'--gpu -1 --no_report --engine {name}'
    def status(command, line):
        with pytest.raises(SystemExit) as e: command(line.split())
        assert e.value.code in (0, None), capfd.readouterr().err
    status(main, f'{how} --save_patchcore_model --log_project p --log_group g {tmp_path}/r {parts}')
    assert capfd.readouterr().err.count(f'engine {name}: converting the network, for images of 64 x 64\n') == 1
    assert json.loads((tmp_path/'r/p/g/run.json').read_text(encoding='utf-8'))['surroundings']['engines'] == [name]
    model = next((tmp_path/'r/p/g/models').iterdir())
    status(evaluate_main, f'{how} {tmp_path}/e patch_core_loader -p {model} dataset -d cog --resize 80 --imagesize 64 demo {demo_root}')
    scores = [(tmp_path/o).read_text(encoding='utf-8').splitlines()[1].split(',')[1:3] for o in ('r/p/g/results.csv', 'e/results.csv')]
    assert np.allclose(np.array(scores[0], float), np.array(scores[1], float), atol=1e-3)
    status(predict_main, f'{model} {demo_root}/cog/test/good -o {tmp_path}/o --gpu -1 --engine {name} --maps none')

def test_nothing_imports_an_engine_unasked():
    code = 'import sys, patchcore_nb; from patchcore_nb import PatchCore; import numpy as np; '
    code += "PatchCore('filterbank', imagesize=64, resize=64, device='cpu').fit(np.zeros((3, 64, 64, 3), np.uint8)+np.arange(3, dtype=np.uint8)[:, None, None, None]); "
    code += "print([o for o in ('openvino', 'onnxruntime', 'onnx', 'onnxscript') if o in sys.modules])"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, encoding='utf-8')
    assert out.stdout.strip().splitlines()[-1] == '[]', out.stderr
