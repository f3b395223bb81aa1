"Exports: the model's own answers in every format, a proof that cannot be talked out of, and nothing left behind by one that fails."
import json
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from networks import Tiny
from PIL import Image

from patchcore_nb import proof as proving, ways, whole_graph
from patchcore_nb.base import ArgumentError, DataError
from patchcore_nb.cache import digest_image
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.exported import export_main, fitted_images
from patchcore_nb.exporting import export
from patchcore_nb.extractor import register_backbone
from patchcore_nb.names import BACKBONES, BANKS, EXPORTS, PATCH_SCORES
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.proof import as_pixels, in_batches, in_two, said_by
from patchcore_nb.scorer import register_patch_score
from patchcore_nb.store import load, save
from patchcore_nb.ways import WAYS
from patchcore_nb.whole_graph import GraphBank, WholeGraph

SMALL = dict(resize=72, imagesize=64, pretrain_dim=32, target_dim=32, ratio=.2, device='cpu', num_workers=0, weights='random')
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 80, 64, 3), np.uint8) # 20 are enough for a threshold at 5%
IMAGES[:, 10:30] //= 4
THERE = {o: all(map(find_spec, WAYS[o].libraries)) for o in EXPORTS}
WAY = [pytest.param(o, marks=pytest.mark.skipif(not THERE[o], reason=f'what {o} needs is not installed')) for o in EXPORTS]
each_way = pytest.mark.parametrize('to', WAY)
onnx = pytest.mark.skipif(not THERE['onnx'], reason='what onnx needs is not installed')

def small(backbone='tiny', **kw): return PatchCore(backbone, **SMALL | kw)

@pytest.fixture(scope='module', autouse=True)
def tiny():
    register_backbone('tiny')(lambda weights='random', weights_dir=None: Tiny())
    yield
    del BACKBONES['tiny']

@pytest.fixture(autouse=True)
def as_in_a_new_process():
    "Nothing that was worked out before is at hand: exporting may be the first thing that a process does with a model."
    ours = [o for name, o in sys.modules.items() if name.startswith('patchcore_nb.')]
    kept = [x for o in ours for x in vars(o).values() if hasattr(x, 'cache_clear')]
    assert kept
    for o in kept: o.cache_clear()

@pytest.fixture(scope='module')
def fitted(): return small().fit(IMAGES)

@pytest.fixture(scope='module')
def resnet(): return small('resnet18').fit(IMAGES)

@pytest.fixture(scope='module')
def exported(resnet, tmp_path_factory):
    "The folder and the proof of a way, converted once; tests that change nothing in it share it."
    @cache
    def of(to):
        folder = tmp_path_factory.mktemp(to)/'out'
        return folder, export(resnet, folder, to, images=IMAGES[:4])
    return of

def compared(model, folder, to, bar=1e-4):
    "Hold what the files say against the model, image by image; the scores, p-values and verdicts."
    images = in_two(model, [*IMAGES[:5], np.full((80, 64, 3), 255, np.uint8)])
    found = in_batches(WAYS[to].open(folder), as_pixels(model, images), 3)
    want = said_by(model, images)
    assert ((found[0]-want[0]).abs() <= bar*want[0]).all()
    assert (found[1]-want[1]).abs().max() <= bar*want[1].abs().max()
    assert torch.equal(found[3], want[3])
    return found

def answers(folder, pixels, barred=('torch', 'patchcore_nb')):
    "Run the program that lies beside a graph, where some modules cannot be imported; a row for each image."
    np.save(folder.parent/'images.npy', pixels)
    code = f"import sys, runpy\nfor o in {barred!r}: sys.modules[o] = None\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0])"
    out = subprocess.run([sys.executable, '-c', code, folder/'run.py', folder.parent/'images.npy'], capture_output=True, text=True, encoding='utf-8')
    assert out.returncode == 0, out.stderr
    threshold, head, *rows = out.stdout.splitlines()
    assert threshold.startswith('threshold ') and head == 'image,score,p_value,verdict'
    return np.array([o.split(',')[1:] for o in rows], float)


# The same answers

@each_way
def test_all_ways_give_the_models_answers(resnet, exported, to):
    folder, proof = exported(to)
    assert proof.holds and proof.scores < 1e-5 and proof.images == 8
    found = compared(resnet, folder, to)
    assert set(found[3].tolist()) == {0, 1} # verdicts of both kinds
    said = json.loads((folder/'export.json').read_text(encoding='utf-8'))
    assert said['threshold'] == resnet.threshold_ and said['map_threshold'] == resnet.calibration_.map_threshold
    assert said['images']['shape'] == ['any', 64, 64, 3] and said['images']['resize'] == 72 and said['proof']['scores'] == proof.scores
    assert {*said['files'], 'export.json'} == {o.name for o in folder.iterdir()} == {*WAYS[to].files, 'run.py', 'export.json'}
    assert said['settings'] == (dict(INFERENCE_PRECISION_HINT='f32') if to == 'openvino' else {})

@each_way
def test_the_program_beside_it_needs_neither_torch_nor_this_package(resnet, exported, to):
    folder, _ = exported(to)
    lines = (folder/'run.py').read_text(encoding='utf-8').splitlines()
    assert len(lines) <= 30 and 'patchcore_nb' not in '\n'.join(lines)
    images = in_two(resnet, list(IMAGES[:3]))
    found = answers(folder, as_pixels(resnet, images), ('patchcore_nb',) if to == 'torch' else ('torch', 'patchcore_nb'))
    scores, _, chances, verdicts = said_by(resnet, images)
    np.testing.assert_allclose(found[:, 0], scores, rtol=1e-4)
    np.testing.assert_allclose(found[:, 1], chances, rtol=1e-5)
    np.testing.assert_array_equal(found[:, 2], verdicts)

@onnx
def test_weights_and_memory_lie_outside_of_the_onnx_graph(resnet, exported):
    files = {o.name: o.stat().st_size for o in exported('onnx')[0].iterdir()}
    needed = sum(o.numel()*4 for k, o in resnet.embedder_.backbone.state_dict().items() if not k.startswith(('layer4', 'fc')))
    assert files['model.onnx.data'] > needed*.9 and files['model.onnx'] < 5e5
    assert files['model.onnx.data'] < needed*1.1+1e5 # and not what lies behind the last layer

def test_a_torch_program_leaves_out_what_it_does_not_need(exported):
    assert (exported('torch')[0]/'model.pt2').stat().st_size < 15e6 # with layer4 it would be 47

@pytest.mark.parametrize('to', WAY[1:])
def test_ensembles_are_exported(tmp_path, to):
    pair = Ensemble([small(patch_score='relative'), small(layers=('layer2',), distance='cosine', k=2)]).fit(IMAGES)
    assert export(pair, tmp_path/'out', to, images=IMAGES[:4]).holds
    compared(pair, tmp_path/'out', to)

@onnx
def test_a_backbone_without_weights_is_exported(tmp_path):
    model = small('filterbank', weights='pretrained', distance='euclidean').fit(IMAGES)
    export(model, tmp_path/'out', images=IMAGES[:2])
    compared(model, tmp_path/'out', 'onnx')

@pytest.fixture
def second_highest():
    "A patch score of the user's own, for the length of a test."
    @register_patch_score('second highest')
    def second(patch_scores): return patch_scores.flatten(1).topk(2)[0][:, 1]
    yield
    del PATCH_SCORES['second highest']

@pytest.mark.usefixtures('second_highest')
@pytest.mark.parametrize('patch_score', [*PATCH_SCORES, 'second highest'])
@pytest.mark.parametrize('kw', [{}, dict(k=3, distance='cosine')], ids=['k=1', 'k=3, cosine'])
def test_the_graph_knows_every_patch_score(patch_score, kw):
    model = small('resnet18', patch_score=patch_score, **kw).fit(IMAGES[:6])
    images = in_two(model, list(IMAGES[:3]))
    graph = WholeGraph(model).eval()
    with torch.no_grad(): found = graph(torch.from_numpy(as_pixels(model, images)))
    for a, b in zip(found, said_by(model, images)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4*float(b.abs().max()), equal_nan=True)

@each_way
def test_the_most_demanding_score_goes_all_ways(tmp_path, to):
    model = small(patch_score='reweighted', k=2, reweight_k=4, stride=2, patchsize=2, smoothing=0, preprocessing='conv').fit(IMAGES)
    export(model, tmp_path/'out', to, images=IMAGES[:3])
    compared(model, tmp_path/'out', to)

@each_way
@pytest.mark.parametrize('bank', BANKS[1:])
def test_a_memory_bank_of_fewer_bits_is_near_enough(resnet, tmp_path, to, bank):
    proof = export(resnet, tmp_path/'out', to, bank, images=IMAGES[:4])
    assert 1e-6 < proof.scores < .02 and proof.maps < .02 and proof.bar == .02
    compared(resnet, tmp_path/'out', to, .02)

def test_fewer_bits_take_fewer_bytes():
    rows = torch.randn(100, 32)
    assert [GraphBank(rows, o).rows.nbytes for o in BANKS] == [12800, 6400, 3200]

@pytest.mark.parametrize('m', [1, 2, 70])
def test_a_bank_finds_what_measuring_finds(m):
    "Also far from the origin, where products round badly, and among twins."
    rows = torch.randn(m, 16, generator=torch.Generator().manual_seed(m))
    rows = torch.cat([rows, rows[:1]])+1000
    bank = GraphBank(rows)
    queries = torch.cat([rows, rows+.01])
    dists, idxs = bank(queries-bank.centre, 1)
    want = torch.cdist(queries.double(), rows.double()).square().amin(1)
    torch.testing.assert_close(dists[:, 0].double(), want, rtol=2e-2, atol=1e-6) # of .01 at 1000, float32 knows two digits
    assert (dists[:m+1] == 0).all()

def test_a_model_that_computes_elsewhere_is_not_changed(tmp_path):
    model = small(engine='onnxruntime' if THERE['onnx'] else 'torch', batch_size=3).fit(IMAGES[:6])
    before = model.get_params()
    export(model, tmp_path/'out', 'torch', images=IMAGES[:2])
    assert model.get_params() == before


# What is refused

def nothing_in(folder): return not list(folder.iterdir())

def shifted(bank, queries, k, real=GraphBank.forward):
    dists, idxs = real(bank, queries, k)
    return dists*1.001, idxs

BREAKS = dict(
    normalise=(whole_graph, 'normalise', lambda images, mean, std: images, 'backbone maps of layer2'),
    unit=(whole_graph.F, 'normalize', lambda patches, dim: patches*1.1, 'patch embeddings'),
    distances=(GraphBank, 'forward', shifted, 'distances'),
    scores=(whole_graph, 'score', lambda *args, real=whole_graph.score: real(*args)._replace(image_scores=real(*args).image_scores+.1), 'scores'))

@each_way
@pytest.mark.parametrize('what', BREAKS)
def test_a_broken_graph_is_refused_and_the_stage_is_named(tmp_path, monkeypatch, to, what):
    if to != 'torch' and what != 'distances': pytest.skip('one fault will do')
    model = small(distance='cosine').fit(IMAGES[:6])
    place, name, broken, stage = BREAKS[what]
    real = whole_graph.naive_stages
    if place is whole_graph: monkeypatch.setattr(proving, 'naive_stages', unbroken(real, name))
    if what == 'unit':
        own = whole_graph.F.normalize
        def only_in_graph(patches, dim): return patches*1.1 if torch.compiler.is_exporting() else own(patches, dim=dim)
        broken = only_in_graph
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(ArgumentError, match=f'to {to} gives other answers than the model, so nothing is written .* it begins with the {stage}\\)'):
        export(model, tmp_path/'out', to, images=IMAGES[:2])
    assert nothing_in(tmp_path)

def unbroken(f, name, real=vars(whole_graph).copy()):
    "A function of the whole graph in which a name means what it did."
    def g(*args):
        broken, now = vars(whole_graph)[name], vars(whole_graph)
        now[name] = real[name]
        try: return f(*args)
        finally: now[name] = broken
    return g

@each_way
def test_a_damaged_file_is_refused(fitted, tmp_path, monkeypatch, to):
    "The proof looks at what was written, not at what was meant."
    real = WAYS[to]
    def write(graph, images, names, folder):
        graph.members[0].bank.rows.mul_(1.01)
        real.write(graph, images, names, folder)
    monkeypatch.setitem(WAYS, to, real._replace(write=write))
    with pytest.raises(ArgumentError, match='gives other answers than the model'): export(fitted, tmp_path/'out', to, images=IMAGES[:2])
    assert nothing_in(tmp_path)

def test_an_older_export_stays_where_a_new_one_is_refused(fitted, tmp_path, monkeypatch):
    export(fitted, tmp_path/'out', 'torch', images=IMAGES[:2])
    before = {o.name: o.read_bytes() for o in (tmp_path/'out').iterdir()}
    monkeypatch.setattr(GraphBank, 'forward', shifted)
    with pytest.raises(ArgumentError): export(fitted, tmp_path/'out', 'torch', images=IMAGES[:2])
    assert {o.name: o.read_bytes() for o in (tmp_path/'out').iterdir()} == before and len(list(tmp_path.iterdir())) == 1

def test_too_few_bits_are_refused_with_the_remedy(tmp_path):
    rows = small().fit(IMAGES[:6])
    class Coarse(GraphBank):
        def __init__(self, rows, kind):
            super().__init__(rows, kind)
            self.rows = self.rows//32*32
    whole_graph.GraphBank = Coarse
    try:
        with pytest.raises(ArgumentError, match=r'0.02 is allowed; it begins with the distances\): pass bank float32'): export(rows, tmp_path/'out', 'torch', 'int8', images=IMAGES[:2])
    finally: whole_graph.GraphBank = GraphBank
    assert nothing_in(tmp_path)

def test_without_images_there_is_no_proof(fitted, tmp_path):
    with pytest.raises(ArgumentError, match='images are needed'): export(fitted, tmp_path/'out', 'torch')
    save(fitted, tmp_path/'m', 'ours')
    with pytest.raises(ArgumentError, match='pass images, a folder of good ones'): export(load(tmp_path/'m', device='cpu'), tmp_path/'out', 'torch')
    assert not (tmp_path/'out').exists()

def test_images_that_were_held_out_will_do(tmp_path):
    assert export(small(train_val_split=.5).fit(IMAGES[:8]), tmp_path/'out', 'torch').images == 8

@pytest.mark.parametrize('kw, said', [
    (dict(tile=64, resize=None, imagesize=None, batchnorm='trained'), 'tile 64'),
    (dict(search='fast'), 'search fast'),
    (dict(precision='bfloat16'), 'precision bfloat16')])
def test_what_a_graph_cannot_express_is_refused(tmp_path, kw, said):
    with pytest.raises(ArgumentError, match=f'{said}.* cannot be exported'): export(small(**kw).fit(IMAGES[:6]), tmp_path/'out', 'torch', images=IMAGES[:2])
    assert nothing_in(tmp_path)

def test_names_that_are_not_known_are_refused(fitted, tmp_path):
    with pytest.raises(ArgumentError, match="unknown to 'onx': did you mean 'onnx'"): export(fitted, tmp_path/'out', 'onx', images=IMAGES[:2])
    with pytest.raises(ArgumentError, match="unknown bank 'int4'"): export(fitted, tmp_path/'out', 'torch', 'int4', images=IMAGES[:2])
    with pytest.raises(ArgumentError, match='call fit before exporting'): export(small(), tmp_path/'out', 'torch', images=IMAGES[:2])

def test_a_library_that_is_missing_is_named(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(ways.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ArgumentError, match=r"to openvino needs the library openvino, which is not installed: pip install 'patchcore_nb\[openvino\]'"): export(fitted, tmp_path/'out', 'openvino', images=IMAGES[:2])

def test_a_folder_of_other_things_is_not_replaced(fitted, tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'thesis.docx').write_text('years')
    with pytest.raises(DataError, match=r'holds other things than an export \(thesis.docx\)'): export(fitted, tmp_path/'out', 'torch', images=IMAGES[:2])
    save(fitted, tmp_path/'m', 'ours')
    with pytest.raises(DataError, match='choose another folder'): export(fitted, tmp_path/'m', 'torch', images=IMAGES[:2])
    load(tmp_path/'m', device='cpu')

def test_a_score_at_the_threshold_may_fall_on_either_side():
    want = [torch.tensor([1., 2.]), torch.ones(2, 4, 4), torch.tensor([.5, .1]), torch.tensor([0, 1], dtype=torch.int32)]
    near = proving.compared([want[0]+1e-6, want[1], want[2], torch.tensor([1, 1], dtype=torch.int32)], want, 1., 1e-4)
    assert near.holds and near.close == 1
    wrong = proving.compared([*want[:3], torch.tensor([0, 0], dtype=torch.int32)], want, 1., 1e-4)
    assert not wrong.holds and wrong.verdicts == 1
    nan = proving.compared([want[0]*torch.nan, *want[1:]], want, 1., 1e-4)
    assert not nan.holds


# The program

@pytest.fixture(scope='module')
def in_a_run(tmp_path_factory):
    "A model where a run has saved it, and the images that it was fitted on."
    from patchcore_nb.data import Category, Sample
    from patchcore_nb.resume import inputs_of, write_inputs
    root = tmp_path_factory.mktemp('run')
    good = root/'data'/'part'/'train'/'good'
    good.mkdir(parents=True)
    for i, o in enumerate(IMAGES): Image.fromarray(o).save(good/f'{i:02}.png')
    paths = sorted(good.iterdir())
    save(small().fit(paths), root/'run'/'models'/'mvtec_part', 'ours')
    samples = [Sample(o) for o in paths]
    category = Category('mvtec', 'part', samples)
    write_inputs(root/'run', category.key, inputs_of(category))
    return root

def status(line):
    with pytest.raises(SystemExit) as e: export_main([str(o) for o in line])
    return e.value.code

def test_the_program_finds_the_images_of_the_fit(in_a_run, tmp_path, capsys):
    model = in_a_run/'run'/'models'/'mvtec_part'
    assert status([model, '--to', 'torch', tmp_path/'out']) == 0
    out = capsys.readouterr().out
    assert out.startswith('32 images: scores off by ') and 'bytes: ' in out and 'model.pt2' in out
    found = fitted_images(model, load(model, device='cpu'))
    assert len(found) == 16 and {digest_image(o) for o in found} <= set(load(model, device='cpu').digests_)

def test_images_that_have_changed_are_no_images_of_the_fit(in_a_run, tmp_path, capsys):
    shutil.copytree(in_a_run, tmp_path/'copy')
    model = tmp_path/'copy'/'run'/'models'/'mvtec_part' # whose inputs.csv names the files of the original
    shutil.move(in_a_run/'data', in_a_run/'gone')
    try:
        assert status([model, tmp_path/'out', '--to', 'torch']) == 2
        assert 'pass --images, a folder of good ones' in capsys.readouterr().err
        assert status([model, tmp_path/'out', '--to', 'torch', '--images', in_a_run/'gone'/'part'/'train'/'good']) == 0
    finally: shutil.move(in_a_run/'gone', in_a_run/'data')

def test_a_fault_is_told_in_flags(in_a_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(GraphBank, 'forward', shifted)
    assert status([in_a_run/'run'/'models'/'mvtec_part', tmp_path/'out', '--to', 'torch']) == 2
    said = capsys.readouterr().err
    assert 'it begins with the distances' in said and 'pass another --to, onnx or openvino' in said and nothing_in(tmp_path)

def test_nothing_imports_a_library_of_others_unasked():
    code = 'import sys, patchcore_nb.exporting, patchcore_nb.exported; from patchcore_nb import export; '
    code += "print([o for o in ('openvino', 'onnxruntime', 'onnx', 'onnxscript') if o in sys.modules])"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, encoding='utf-8')
    assert out.stdout.strip().splitlines()[-1] == '[]', out.stderr
