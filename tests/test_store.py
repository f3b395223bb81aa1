"Models on disk: what comes back is what was saved, half a model is never there, and files from elsewhere cannot harm."
import copyreg
import errno
import hashlib
import json
import os
import pickle
import pickletools
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from patchcore_nb import build, model_files, reference_files
from patchcore_nb.bounded import write_json
from patchcore_nb.demo import demo_sample
from patchcore_nb.embedding import RUNTIME
from patchcore_nb.core import ArgumentError, DataError
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.extractor import create_backbone
from patchcore_nb.names import DISTANCES, PATCH_SCORES, SAMPLERS, SEARCHES
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.model_files import TENSORS, VALUES
from patchcore_nb.reference_files import (
    HEADER, REFERENCE_INDEX as INDEX, REFERENCE_PARAMS as PARAMS, not_in_reference, read_faiss_flat, read_reference_params, write_faiss_flat)
from patchcore_nb.store import load, save

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
SMALL = dict(resize=64, imagesize=64, pretrain_dim=64, target_dim=64, ratio=.1)
PLAIN = {'backbone.name': 'resnet18', 'layers_to_extract_from': ['layer2', 'layer3'], 'input_shape': (3, 56, 56), 'pretrain_embed_dimension': 64,
         'target_embed_dimension': 64, 'patchsize': 3, 'patchstride': 1, 'anomaly_scorer_num_nn': 1}
quiet = pytest.mark.filterwarnings("ignore:the reference's files cannot express")


@pytest.fixture(scope='module')
def model(weights): return PatchCore('resnet18', weights_dir=weights, **SMALL | dict(resize=64, imagesize=56)).fit(IMAGES)

@pytest.fixture(scope='module')
def other(): return PatchCore('filterbank', **SMALL).fit(IMAGES[:2])

@pytest.fixture
def saved(model, tmp_path): return save(model, tmp_path/'model')

def scores(model): return model.predict(IMAGES[3:]).image_scores

def refused(f, *args, says=''):
    "A DataError of one line."
    with pytest.raises(DataError) as e: f(*args)
    assert len(str(e.value).splitlines()) == 1 and says in str(e.value)

def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


@pytest.mark.parametrize('more', [{}, dict(k=3), dict(patch_score='reweighted'), dict(patch_score='smoothed', stride=2), dict(more_patchsizes=(1, 5)), dict(sampler='identity', ratio=1),
                                  dict(preprocessing='conv', aggregation='mlp'), dict(train_val_split=.5, false_alarms=.4), dict(augment=True, sampler='random'), dict(backbone='resnet18.seed-5', weights='random')], ids=str)
@quiet
def test_there_and_back(tmp_path, more):
    "Every parameter, every figure, every bit of every score."
    first = PatchCore(**dict(backbone='filterbank', seed=3) | SMALL | more).fit(IMAGES[:4])
    second = load(save(first, tmp_path/'model'))
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in first.get_params().items()} == {k: list(v) if isinstance(v, tuple) else v for k, v in second.get_params().items()}
    a, b = first.predict(IMAGES), second.predict(IMAGES)
    for name in ('image_scores', 'anomaly_maps', 'patch_scores', 'nn_idxs'): assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.threshold == b.threshold and (first.threshold_ is None) == ('train_val_split' not in more)
    for name in ('memory_bank_', 'origin_', 'idxs_'): assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert (first.n_images_, first.n_patches_, first.sizes_, first.radii_) == (second.n_images_, second.n_patches_, second.sizes_, second.radii_)
    assert repr(first) == repr(second)

@pytest.mark.parametrize('model_format, files', [('both', {TENSORS, VALUES, PARAMS, INDEX}), ('ours', {TENSORS, VALUES}), ('reference', {PARAMS, INDEX})])
def test_formats(model, weights, tmp_path, model_format, files):
    folder = save(model, tmp_path/'deep'/'er', model_format)
    assert {p.name for p in folder.iterdir()} == files
    assert torch.equal(scores(load(folder, weights_dir=weights, **dict(resize=64) if model_format == 'reference' else {})), scores(model))

def test_reference_cannot_express_it(other, tmp_path):
    with pytest.raises(ArgumentError, match='pass model_format ours'): save(other, tmp_path/'m', 'reference')
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match='filterbank.*our format alone'): save(other, tmp_path/'m')
    assert {p.name for p in (tmp_path/'m').iterdir()} == {TENSORS, VALUES}

def test_digests(saved):
    noted = json.loads((saved/VALUES).read_text(encoding='utf-8'))['sha256']
    assert noted == {o: hashlib.sha256((saved/o).read_bytes()).hexdigest() for o in (TENSORS, PARAMS, INDEX)}

@pytest.mark.parametrize('name', [TENSORS, PARAMS, INDEX])
@pytest.mark.parametrize('where', [0, .5, 1])
def test_a_flipped_bit_is_found(saved, weights, name, where):
    raw = bytearray((saved/name).read_bytes())
    raw[int(where*(len(raw)-1))] ^= 4
    (saved/name).write_bytes(raw)
    with pytest.raises(DataError, match=f'{name} is not the file that was saved'): load(saved, weights_dir=weights)

def test_other_weights_are_noticed(saved, tmp_path):
    torch.save(create_backbone('resnet18', 'random', seed=8).state_dict(), tmp_path/'resnet18.pth')
    with pytest.warns(UserWarning, match='not those that this model was fitted with'): load(saved, weights_dir=tmp_path)

@pytest.mark.parametrize('model_format', ['ours', 'reference'])
def test_missing_weights_are_named(model, tmp_path, monkeypatch, model_format):
    "As on another machine, without a network."
    def no_network(*args, pretrained): raise OSError('no route to host\nat all')
    monkeypatch.setattr(build, 'build_network', no_network)
    monkeypatch.delenv('PATCHCORE_NB_WEIGHTS', raising=False)
    folder = save(model, tmp_path/'m', model_format)
    refused(lambda: load(folder), says='resnet18.safetensors, .pth or .pt')
    (tmp_path/'empty').mkdir()
    refused(lambda: load(folder, weights_dir=tmp_path/'empty'), says='put resnet18.pth into')


def full(*args, **kw): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def stopped(*args, **kw): raise KeyboardInterrupt

def rename_fails(path, target, rename=Path.rename):
    "Only the last step fails: the new model into its place."
    if '.tmp-' in path.name: full()
    return rename(path, target)

BREAKS = {'fsync': (os, 'fsync', full), 'tensors': (model_files, 'save_tensors', full), 'index': (reference_files, 'write_faiss_flat', full), 'bytes': (Path, 'write_bytes', full), 'text': (Path, 'write_text', full),
          'rename': (Path, 'rename', rename_fails), 'stopped early': (reference_files, 'write_faiss_flat', stopped), 'stopped late': (os, 'fsync', stopped)}

@pytest.mark.parametrize('how', BREAKS)
@pytest.mark.parametrize('older', [True, False])
def test_all_or_nothing(model, other, tmp_path, monkeypatch, how, older):
    "Whatever fails, the older model stays as it was, nothing else is left, and the next try succeeds."
    if older: save(other, tmp_path/'m', 'ours')
    before = contents(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(*BREAKS[how])
        with pytest.raises(KeyboardInterrupt if 'stopped' in how else DataError) as e: save(model, tmp_path/'m')
    if 'stopped' not in how: assert str(e.value) == f'{tmp_path/"m"} cannot be written ({os.strerror(errno.ENOSPC)}): free some space or choose another folder'
    assert contents(tmp_path) == before and {p.name for p in tmp_path.iterdir()} == ({'m'} if older else set())
    save(model, tmp_path/'m')
    assert {p.name for p in tmp_path.iterdir()} == {'m'} and {p.name for p in (tmp_path/'m').iterdir()} == {TENSORS, VALUES, PARAMS, INDEX}

REFIT = '''
import os, sys, numpy as np
from patchcore_nb.store import load, save
model = load(sys.argv[1], weights_dir=sys.argv[2])
print(*[float(s).hex() for s in model.predict(np.load(sys.argv[3])).image_scores], flush=True)
{}
try: save(model, sys.argv[1])
except Exception as e: print(type(e).__name__, e); sys.exit(1)
'''

def refit(saved, model, weights, code):
    "In another process, which must find the same scores to the last bit: load the model, and save it again under a difficulty."
    np.save(saved.parent/'images.npy', IMAGES[3:])
    before = contents(saved.parent)
    out = subprocess.run([sys.executable, '-c', REFIT.format(code), str(saved), str(weights), str(saved.parent/'images.npy')], capture_output=True, text=True, timeout=120)
    first, *rest = out.stdout.splitlines() or [out.stderr]
    assert first.split() == [float(s).hex() for s in scores(model)]
    return out.returncode, rest, before

@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no limit on the size of files to try this with')
def test_a_file_that_cannot_grow(saved, model, weights):
    "The operating system itself refuses to write any further."
    status, said, before = refit(saved, model, weights, f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({(saved/TENSORS).stat().st_size-100},)*2)')
    assert status == 1 and len(said) == 1 and said[0].startswith(f'DataError {saved} cannot be written')
    assert contents(saved.parent) == before

def test_killed_while_saving(saved, model, weights):
    "The older model is as it was, and a later save succeeds."
    status, said, before = refit(saved, model, weights, 'os.fsync = lambda f: os._exit(9)')
    assert status == 9 and not said and before.items() <= contents(saved.parent).items()
    assert contents(save(model, saved)) == {k.removeprefix('model'+os.sep): v for k, v in before.items() if k != 'images.npy'}

def test_a_file_in_the_way(model, tmp_path):
    (tmp_path/'m').write_text('mine', encoding='utf-8')
    for folder in (tmp_path/'m', tmp_path/'m'/'n'): refused(save, model, folder, says='cannot be written')
    assert contents(tmp_path) == {'m': b'mine'}

def test_a_folder_of_other_things_is_not_replaced(model, tmp_path):
    (tmp_path/'home/photos').mkdir(parents=True)
    (tmp_path/'home/photos/1.jpg').write_bytes(b'dear to me')
    before = contents(tmp_path)
    refused(save, model, tmp_path/'home', says='home')
    assert contents(tmp_path) == before

@pytest.mark.parametrize('name', ['best_model.json', 'my_ensemble.json', 'Ensemble-1-2_ensemble.json', 'Ensemble-1_model.json', 'Ensemble-a-2_model.json', 'old model.safetensors', 'model.json.bak', 'Model.json', '.model.json', 'xpatchcore_params.pkl'])
def test_a_file_that_only_sounds_like_a_model_is_not_deleted(saved, other, name):
    (saved/name).write_bytes(b'dear to me')
    before = contents(saved)
    refused(save, other, saved, 'ours', says=name)
    assert contents(saved) == before

def test_a_folder_that_is_called_like_a_file_of_a_model(saved, other):
    (saved/'ensemble.json').mkdir()
    (saved/'ensemble.json'/'1.jpg').write_bytes(b'dear to me')
    refused(save, other, saved, 'ours', says='ensemble.json')

def test_any_model_takes_the_place_of_any_other(saved, other):
    "Single or an ensemble, ours or the reference's."
    pair = Ensemble([other, other])
    for o, n in ((pair, 5), (other, 2), (pair, 5)): assert len(contents(save(o, saved, 'ours'))) == n

def test_what_was_never_fitted_is_not_saved(tmp_path):
    with pytest.raises(ArgumentError, match='call fit'): save(PatchCore('filterbank'), tmp_path/'m')
    assert not list(tmp_path.iterdir())


def test_our_pickle_is_the_references(saved, weights):
    "Read by Python's own unpickler: the eight keys, in their types, and no instruction that reaches code."
    raw = (saved/PARAMS).read_bytes()
    assert pickle.loads(raw) == PLAIN and list(pickle.loads(raw)) == list(PLAIN)
    assert [type(o) for o in pickle.loads(raw).values()] == [type(o) for o in PLAIN.values()]
    assert not {op.name for op, *_ in pickletools.genops(raw)} & {'GLOBAL', 'STACK_GLOBAL', 'INST', 'REDUCE', 'BUILD', 'OBJ', 'NEWOBJ', 'EXT1'}

def read(raw, folder):
    (folder/'p.pkl').write_bytes(raw)
    return read_reference_params(folder/'p.pkl')

@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL+1))
@pytest.mark.parametrize('kind', [list, tuple])
def test_plain_pickles_are_read(tmp_path, protocol, kind):
    d = PLAIN | {'layers_to_extract_from': kind(PLAIN['layers_to_extract_from']), 'input_shape': kind((3, 224, 224)), 'anomaly_scorer_num_nn': 60000}
    assert read(pickle.dumps(d, protocol), tmp_path) == d | {'layers_to_extract_from': ['layer2', 'layer3'], 'input_shape': [3, 224, 224]}

def attacks(code):
    "Pickles that would run `code`, one for each way by which an unpickler comes by a callable and calls it."
    text, exec_ = b'X'+struct.pack('<I', len(code))+code.encode(), b'cbuiltins\nexec\n'
    stack = b'\x8c\x08builtins\x8c\x04exec\x93'
    return {'GLOBAL REDUCE': exec_+text+b'\x85R.', 'STACK_GLOBAL REDUCE': b'\x80\x04'+stack+text+b'\x85R.', 'INST': b'('+text+b'ibuiltins\nexec\n.', 'OBJ': b'('+exec_+text+b'o.',
            'NEWOBJ': b'\x80\x02'+exec_+text+b'\x85\x81.', 'NEWOBJ_EX': b'\x80\x04'+exec_+text+b'\x85}\x92.', 'BUILD': b'\x80\x02'+exec_+b'}X\x01\0\0\0a'+text+b'sb.',
            'EXT1': b'\x80\x02\x82\xf0'+text+b'\x85R.', 'EXT2': b'\x80\x02\x83\xf0\x00'+text+b'\x85R.', 'EXT4': b'\x80\x02\x84\xf0\x00\x00\x00'+text+b'\x85R.',
            'PERSID': b'P1\n.', 'BINPERSID': b'\x80\x01K\x01Q.', 'a dotted name': b'\x80\x04\x8c\x02os\x8c\x0bpath.os.nul\x93.',
            'inside the dict': pickle.dumps(PLAIN, 4)[:-2]+b'\x8c\x09patchsize'+stack+text+b'\x85Rsu.'}

@pytest.mark.parametrize('way', attacks(''))
def test_pickles_that_would_run_code(tmp_path, way):
    "Refused without running; even a callable that the program itself has registered as an extension is not called."
    marker = tmp_path/'ran'
    raw = attacks(f'open({str(marker)!r}, "w").close()')[way]
    copyreg.add_extension('builtins', 'exec', 0xf0)
    try:
        copyreg._extension_cache[0xf0] = exec
        refused(read, raw, tmp_path, says='is refused')
    finally: copyreg.remove_extension('builtins', 'exec', 0xf0)
    assert not marker.exists()

def test_the_attacks_are_real(tmp_path):
    "With Python's own unpickler most of them do run, so the test above can fail."
    ran = set()
    copyreg.add_extension('builtins', 'exec', 0xf0)
    for way, raw in attacks(f'open({str(tmp_path/"ran")!r}, "w").close()').items():
        try: pickle.loads(raw)
        except Exception: pass
        if (tmp_path/'ran').exists(): ran.add(way); (tmp_path/'ran').unlink()
    copyreg.remove_extension('builtins', 'exec', 0xf0)
    assert {'GLOBAL REDUCE', 'STACK_GLOBAL REDUCE', 'INST', 'OBJ', 'EXT1', 'EXT2', 'EXT4', 'inside the dict'} <= ran

@pytest.mark.parametrize('change', [
    {'patchsize': True}, {'patchsize': 3.}, {'patchsize': 0}, {'patchsize': -3}, {'patchsize': None}, {'patchsize': '3'}, {'patchsize': [3]}, {'patchsize': 10**9}, {'patchsize': 10**300},
    {'pretrain_embed_dimension': 2**40}, {'target_embed_dimension': 2**40}, {'patchstride': 0}, {'anomaly_scorer_num_nn': 0}, {'input_shape': (3, 10**9, 10**9)}, {'input_shape': (3, -1, -1)},
    {'input_shape': ()}, {'input_shape': {3, 224}}, {'input_shape': 'abc'}, {'input_shape': (3, 224., 224.)}, {'input_shape': (3, (224,), 224)}, {'layers_to_extract_from': []}, {'layers_to_extract_from': 'layer2'},
    {'layers_to_extract_from': [b'layer2']}, {'layers_to_extract_from': ['layer2', 3]}, {'layers_to_extract_from': ['x']*2000}, {'backbone.name': b'resnet18'}, {'backbone.name': ['resnet18']},
    {'backbone.name': 'x'*70000}, {'extra': 1}, {1: 1}, {'patchsize': bytearray(3)}, {'patchsize': 3j}], ids=lambda c: str(c)[:40])
def test_pickles_of_odd_values(tmp_path, change): refused(read, pickle.dumps(PLAIN | change), tmp_path, says='is refused')

@quiet
def test_a_model_of_the_reference_with_a_stride_is_refused(model, tmp_path):
    save(model, tmp_path/'model', 'reference')
    path = tmp_path/'model'/'patchcore_params.pkl'
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | dict(patchstride=2)))
    refused(load, tmp_path/'model', says='patchstride 2')

def test_a_search_that_takes_more_patches_is_no_damage(saved):
    least = SEARCHES['ivfpq'].least
    assert least > 1
    with pytest.raises(ArgumentError, match=f'search ivfpq takes a memory bank of at least {least} patches.*or search exact'): load(saved, search='ivfpq')

def test_no_threshold_is_not_warned_of(saved, model, weights):
    assert model.calibration_ is not None and model.threshold_ is None # six images are too few
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load(saved, search='fast', weights_dir=weights)

@pytest.mark.parametrize('what', [*PLAIN, [], None, 'abc', [PLAIN], list(PLAIN.items()), {}], ids=lambda o: str(o)[:30])
def test_pickles_of_other_things(tmp_path, what):
    d = {k: v for k, v in PLAIN.items() if k != what} if what in [*PLAIN] else what
    refused(read, pickle.dumps(d), tmp_path, says='is refused')

@pytest.mark.parametrize('raw', [
    b'', b'.', b'\x80\x04.', b'\x80\xff}.', b'N'*1000, b'N.', b'}'+b'K\x01'*3+b's.', b'(((((.', b'\x80\x04}\x94(h\x00h\x00u.', b'}\x94h\x07.', b'I'+b'9'*60000+b'\n.', b'L'+b'9'*5000+b'L\n.',
    b'\x80\x05\x96'+struct.pack('<Q', 2**50)+b'ab.', b'\x80\x05\x8d'+struct.pack('<Q', 2**60)+b'ab.', b'\x80\x04\x95'+struct.pack('<Q', 2**60)+b'ab.', b'\x80\x02\x8b'+struct.pack('<I', 2**30)+b'ab.',
    b'Nr'+struct.pack('<I', 2**22)+b'.', b'Np4194304\n.', b'\x80\x05]\x97.', b'\x80\x05\x98.', b'\xff'*50, b'X\xff\xff\xff\xffabc.', b'T\xff\xff\xff\x7fabc.', b"S'abc\n.", b'V\\ud800\n.', b'0'*100+b'.', b'e.', b'\x90.'], ids=lambda r: repr(r[:14]))
def test_pickles_that_are_broken_or_greedy(tmp_path, raw):
    "A claim of any size costs nothing."
    tracemalloc.start()
    try:
        refused(read, raw, tmp_path, says='is refused')
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally: tracemalloc.stop()

def test_pickles_nested_deep(tmp_path):
    "Read in a thread with the small stack that macOS gives it: nothing recurses until the process dies."
    nests = {'tuple as key': b'\x80\x02})'+b'\x85'*64000+b'K\x01s.', 'tuple as value': b'\x80\x02}U\x09patchsize)'+b'\x85'*64000+b's.', 'lists': b'\x80\x02'+b']'*32000+b'a'*31999+b'.', 'marks': b'('*64000+b't'*64000+b'.'}
    for name, raw in nests.items(): (tmp_path/f'{name}.pkl').write_bytes(raw)
    code = '''
import sys, threading
from pathlib import Path
from patchcore_nb.core import DataError
from patchcore_nb.reference_files import read_reference_params
def go():
    for p in Path(sys.argv[1]).glob('*.pkl'):
        try: read_reference_params(p)
        except DataError: print('refused')
threading.stack_size(512*1024)
t = threading.Thread(target=go); t.start(); t.join()
'''
    out = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (out.returncode, out.stdout.split()) == (0, ['refused']*len(nests)), out.stderr[-300:]

@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_damaged_pickles(tmp_path, protocol):
    "Cut off anywhere, or with bytes changed: refused, or still eight plain values."
    raw, rng = pickle.dumps(PLAIN, protocol), random.Random(0)
    for n in range(len(raw)): refused(read, raw[:n], tmp_path)
    for _ in range(500):
        spoiled = bytearray(raw)
        for _ in range(rng.choice([1, 1, 2, 5])): spoiled[rng.randrange(len(raw))] = rng.randrange(256)
        try: got = read(spoiled, tmp_path)
        except DataError as e: assert len(str(e).splitlines()) == 1
        else: assert list(got) == list(PLAIN) and [type(o) for o in got.values()] == [str, list, list, int, int, int, int, int]


BANK = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))

@pytest.fixture(scope='module')
def faiss(): return pytest.importorskip('faiss')

def test_faiss_reads_what_we_write(faiss, tmp_path):
    write_faiss_flat(tmp_path/'ours', BANK)
    index = faiss.read_index(str(tmp_path/'ours'))
    assert type(index).__name__ == 'IndexFlatL2' and (index.ntotal, index.d, index.is_trained) == (200, 16, True)
    assert np.array_equal(index.reconstruct_n(0, 200), BANK.numpy())
    dists, rows = index.search(BANK[:20].numpy()+.1, 3)
    want, nearest = torch.cdist((BANK[:20]+.1).double(), BANK.double()).square().topk(3, largest=False)
    assert np.array_equal(rows, nearest) and np.allclose(dists, want, rtol=1e-4)

def test_we_read_what_faiss_writes(faiss, tmp_path):
    index = faiss.IndexFlatL2(16)
    index.add(BANK.numpy())
    faiss.write_index(index, str(tmp_path/'theirs'))
    assert torch.equal(read_faiss_flat(tmp_path/'theirs'), BANK)
    write_faiss_flat(tmp_path/'ours', BANK)
    assert (tmp_path/'ours').read_bytes() == (tmp_path/'theirs').read_bytes()

@pytest.mark.parametrize('kind', ['IVF4,Flat', 'PQ4x4', 'HNSW8', 'SQ8', 'IDMap,Flat', 'PCA8,Flat', 'LSH', 'Flat inner product', 'Flat empty', 'Flat L1'])
def test_other_indexes_are_refused(faiss, tmp_path, kind):
    if kind == 'Flat empty': index = faiss.IndexFlatL2(16)
    elif kind == 'Flat L1': index = faiss.IndexFlat(16, faiss.METRIC_L1)
    elif kind == 'Flat inner product': index = faiss.IndexFlatIP(16)
    else: index = faiss.index_factory(16, kind)
    if kind != 'Flat empty':
        index.train(BANK.numpy())
        if kind.startswith('IDMap'): index.add_with_ids(BANK.numpy(), np.arange(200))
        else: index.add(BANK.numpy())
    faiss.write_index(index, str(tmp_path/'x'))
    refused(read_faiss_flat, tmp_path/'x', says='IndexFlatL2')

@pytest.fixture
def flat(tmp_path):
    write_faiss_flat(tmp_path/'flat', BANK)
    return tmp_path/'flat'

@pytest.mark.parametrize('change', [dict(d=0), dict(d=-1), dict(d=2**31-1), dict(m=0), dict(m=-200), dict(m=2**60), dict(m=2**58, n=2**62), dict(m=2**60, n=2**64-2**60), dict(d=2**30, m=2**34, n=0), dict(n=2**60), dict(n=0),
                                    dict(m=400, d=8), dict(m=100), dict(metric=0), dict(metric=23), dict(trained=0), dict(kind=b'IxFI'), dict(kind=b'IwFl')], ids=str)
def test_false_headers(flat, change):
    names, raw = ['kind', 'd', 'm', 'a', 'b', 'trained', 'metric', 'n'], flat.read_bytes()
    flat.write_bytes(HEADER.pack(*(dict(zip(names, HEADER.unpack(raw[:45])))|change).values())+raw[45:])
    tracemalloc.start()
    try:
        if change == dict(m=400, d=8): assert read_faiss_flat(flat).shape == (400, 8) # as good a bank as any
        else:
            refused(read_faiss_flat, flat, says='IndexFlatL2')
            assert tracemalloc.get_traced_memory()[1] < 1e6
    finally: tracemalloc.stop()

def test_damaged_indexes(flat):
    raw, rng = flat.read_bytes(), random.Random(0)
    for n in [*range(60), *(rng.randrange(len(raw)) for _ in range(40))]:
        flat.write_bytes(raw[:n])
        refused(read_faiss_flat, flat)
    flat.write_bytes(raw+b'x')
    refused(read_faiss_flat, flat)
    tracemalloc.start()
    for _ in range(500):
        spoiled = bytearray(raw)
        for _ in range(rng.choice([1, 3])): spoiled[rng.randrange(50)] = rng.randrange(256)
        flat.write_bytes(spoiled)
        try: assert read_faiss_flat(flat).numel() == BANK.numel()
        except DataError as e: assert len(str(e).splitlines()) == 1
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()

@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_indexes_that_are_not_finite(flat, value):
    flat.write_bytes(flat.read_bytes()[:-4]+struct.pack('<f', value))
    refused(read_faiss_flat, flat, says='not finite')

def test_files_that_are_folders_or_not_there(tmp_path):
    for f in (read_faiss_flat, read_reference_params):
        for path in (tmp_path, tmp_path/'none'): refused(f, path, says='cannot be read')


def test_members_of_an_ensemble(model, weights, tmp_path):
    "By their prefix; without one, the folder says what it holds."
    folder = save(model, tmp_path/'m', 'reference')
    for i in (1, 2):
        for name in (PARAMS, INDEX): shutil.copy(folder/name, folder/f'Ensemble-{i}-2_{name}')
    for name in (PARAMS, INDEX): (folder/name).unlink()
    assert torch.equal(scores(load(folder, prefix='Ensemble-2-2_', weights_dir=weights, resize=64)), scores(model))
    both = load(folder, weights_dir=weights, resize=64)
    assert len(both) == 2 and both.threshold_ is None and torch.equal(both.predict(IMAGES[3:]).members[1].image_scores, scores(model))
    (folder/f'Ensemble-1-2_{PARAMS}').rename(folder/f'Ensemble-1-3_{PARAMS}')
    refused(load, folder, says='incomplete ensemble')

@pytest.fixture(scope='module')
def pair():
    "Two members with a threshold each, and one together; nothing is cut."
    kw = SMALL | dict(imagesize=None, resize=64, train_val_split=.5, false_alarms=.3, confidence=None)
    wide = np.random.default_rng(1).integers(0, 256, (8, 64, 128, 3), np.uint8)
    return Ensemble([PatchCore('filterbank', **kw), PatchCore('filterbank', ['layer3'], **kw)]).fit(wide)

def thresholds(folder, **sizes): return [load(folder, **sizes).threshold_, *(load(folder, f'Ensemble-{i}-2_', **sizes).threshold_ for i in (1, 2))]

@pytest.mark.parametrize('sizes', [{}, dict(resize=64), dict(resize=(64, 128)), dict(imagesize='whole'), dict(resize=64, imagesize='whole'), dict(imagesize='whole', shape=(200, 100))], ids=str)
def test_at_its_own_size_a_model_keeps_its_threshold(pair, tmp_path, recwarn, sizes):
    "However the size was said: as a shorter side, as a rectangle, by an image."
    want = [pair.threshold_, *(o.threshold_ for o in pair.members)]
    assert None not in want and thresholds(save(pair, tmp_path/'m', 'ours'), **sizes) == want and not recwarn
    assert load(tmp_path/'m', **sizes).calibration_ == pair.calibration_

@pytest.mark.parametrize('sizes', [dict(resize=80), dict(resize=(128, 64)), dict(imagesize=64), dict(imagesize=(64, 128)), dict(imagesize='whole', shape=(100, 200))], ids=str)
def test_at_another_size_it_has_none(pair, tmp_path, sizes):
    save(pair, tmp_path/'m', 'ours')
    with pytest.warns(UserWarning, match='at another size it has none'): assert thresholds(tmp_path/'m', **sizes) == [None]*3

def test_a_square_may_be_said_as_a_rectangle(tmp_path):
    kw = SMALL | dict(train_val_split=.5, false_alarms=.3, confidence=None)
    m = Ensemble([PatchCore('filterbank', **kw), PatchCore('filterbank', **kw | dict(imagesize=(64, 64)))]).fit(IMAGES)
    assert load(save(m, tmp_path/'m', 'ours'), imagesize=64).threshold_ == m.threshold_ is not None

@pytest.mark.parametrize('sizes, words', [(dict(imagesize='whole'), 'pass resize=\\(height, width\\)'), (dict(imagesize=65), 'larger than resize'), (dict(imagesize=0), 'at least 1 pixel')], ids=str)
@pytest.mark.parametrize('model_format', ['ours', 'reference'])
def test_a_size_that_cannot_be_is_an_argument_of_the_caller(model, weights, tmp_path, sizes, words, model_format):
    "Not the fault of the model's files."
    if model_format == 'reference' and 'imagesize' in sizes and sizes['imagesize'] == 65: sizes = sizes | dict(resize=64)
    save(model, tmp_path/'m', model_format)
    with pytest.raises(ArgumentError, match=words): load(tmp_path/'m', weights_dir=weights, **sizes)

@pytest.mark.parametrize('model_format', ['ours', 'reference'])
def test_an_image_settles_what_is_not_cut(model, weights, tmp_path, model_format):
    save(model, tmp_path/'m', model_format)
    for sizes, want in ((dict(shape=(200, 100)), (64, 128)), (dict(shape=(100, 150), resize=32), (48, 32)), (dict(shape=(100, 150), resize=(40, 40)), (40, 40))):
        assert load(tmp_path/'m', weights_dir=weights, imagesize='whole', **sizes).preprocess_.size == want
    assert load(tmp_path/'m', weights_dir=weights, shape=(200, 100)).preprocess_.size == (56, 56) # which is cut

def test_members_of_another_ensemble(pair, tmp_path):
    "By the digests of their values; a changed one is none of them either."
    save(pair, tmp_path/'m', 'ours')
    twin = Ensemble([pair.members[1], pair.members[0]])
    save(twin, tmp_path/'n', 'ours')
    for name in (TENSORS, VALUES): shutil.copy(tmp_path/'n'/f'Ensemble-1-2_{name}', tmp_path/'m')
    refused(load, tmp_path/'m', says='Ensemble-1-2_model.json is not the member that it was saved with')
    save(pair, tmp_path/'m', 'ours')
    for change in [('sha256', 'Ensemble-2-2_', '0'*64), ('sha256', 'Ensemble-2-2_', None), ('sha256', None), ('calibration', 'promise', 'sure'), ('calibration', 'scores', None), ('calibration', {}), ('calibration', None), ('members', ['a'])]:
        before = (tmp_path/'m'/'ensemble.json').read_bytes()
        values(tmp_path/'m'/'ensemble.json', change)
        refused(load, tmp_path/'m', says='ensemble.json cannot be read')
        (tmp_path/'m'/'ensemble.json').write_bytes(before)
    assert load(tmp_path/'m').threshold_ == pair.threshold_

def test_an_ensemble_whose_member_has_changed_is_saved_without_its_threshold(tmp_path):
    kw = SMALL | dict(train_val_split=.5, false_alarms=.3, confidence=None)
    m = Ensemble([PatchCore('filterbank', **kw), PatchCore('filterbank', ['layer3'], **kw)]).fit(IMAGES)
    assert m.threshold_
    m.members[0].forget(int(m.members[0].origin_[0, 0]))
    with pytest.warns(UserWarning, match='has changed since its threshold was found'): save(m, tmp_path/'m', 'ours')
    again = load(tmp_path/'m')
    assert again.threshold_ is None and again.units_ == m.units_ and torch.equal(again.predict(IMAGES[:2]).image_scores, m.predict(IMAGES[:2]).image_scores)

def test_an_ensemble_of_fitted_models_has_no_threshold_of_its_own(other, tmp_path):
    "It judges as its members do; one that holds an unfitted model is not saved."
    m = Ensemble([other, PatchCore('filterbank', ['layer3'], **SMALL).fit(IMAGES[:2])])
    again = load(save(m, tmp_path/'m', 'ours'))
    assert again.calibration_ is None and torch.equal(again.predict(IMAGES).anomaly_maps, m.predict(IMAGES).anomaly_maps)
    with pytest.raises(ArgumentError, match='call fit before saving'): save(Ensemble([other, PatchCore('filterbank')]), tmp_path/'n', 'ours')
    assert not (tmp_path/'n').exists()

@pytest.mark.parametrize('kw, said', [({}, []), (dict(imagesize=320, resize=366), []), (dict(resize=300), ['resize 300']), (dict(imagesize=256), ['resize 256']), (dict(resize=(256, 256)), ['resize (256, 256)']), (dict(imagesize=None), ['imagesize None'])], ids=str)
def test_a_scale_that_the_reference_would_not_know(kw, said): assert not_in_reference(PatchCore('wideresnet50', **kw)) == said

@pytest.mark.parametrize('gone', [TENSORS, VALUES, INDEX, PARAMS])
def test_missing_files(saved, weights, gone):
    "Ours needs its two files, the reference's its two; what is whole is read."
    for name in {TENSORS: [TENSORS], VALUES: [VALUES, PARAMS], INDEX: [VALUES, INDEX], PARAMS: [VALUES, TENSORS, PARAMS]}[gone]: (saved/name).unlink()
    refused(lambda: load(saved, weights_dir=weights), says=str(saved))

def test_folders_without_a_model(tmp_path):
    refused(load, tmp_path, says='holds no model')
    refused(load, tmp_path/'none', says='is not there')
    (tmp_path/'file').write_bytes(b'')
    refused(load, tmp_path/'file', says='file')

def test_reference_files_that_do_not_fit(model, weights, tmp_path):
    folder = save(model, tmp_path/'m', 'reference')
    def change(**values): (folder/PARAMS).write_bytes(pickle.dumps(PLAIN | {k.replace('_name', '.name'): v for k, v in values.items()}))
    def refuses(says): refused(lambda: load(folder, weights_dir=weights), says=says)
    change(target_embed_dimension=32); refuses('do not belong together')
    for shape in [(56, 56), (3, 56)]: change(input_shape=shape); refuses('three numbers')
    change(layers_to_extract_from=['layer9']); refuses('layer9')
    change(backbone_name='resnet-eighteen'); refuses('resnet-eighteen')
    change(anomaly_scorer_num_nn=10**4); refuses('10000')
    change(); write_faiss_flat(folder/INDEX, torch.randn(5, 32)); refuses('do not belong together')


def values(path, change):
    "Rewrite the JSON with a change somewhere inside: a path of keys, and the new value (or None: away with it); its own digest fits."
    d = json.loads(path.read_text(encoding='utf-8'))
    at = d
    for key in change[:-2]: at = at[key]
    if change[-1] is None and change[-2] in at: del at[change[-2]]
    else: at[change[-2]] = change[-1]
    write_json(path, d)

@pytest.mark.parametrize('change', [
    ('format', 'patchcore_nb model 99'), ('format', None), ('params', None), ('params', []), ('params', 5), ('learned', None), ('learned', 'x'), ('learned', [1]), ('sha256', None), ('sha256', 5), ('sha256', []),
    ('sha256', [TENSORS]), ('sha256', {}), ('sha256', TENSORS, 7), ('sha256', TENSORS, '0'*64), ('sha256', TENSORS), ('params', 'target_dim', None), ('params', 'target_dim', 65), ('params', 'target_dim', 'x'), ('params', 'backbone', 'resnet-eighteen'),
    ('params', 'backbone', 5), ('params', 'layers', ['layer9']), ('params', 'layers', 7), ('params', 'layers', []), ('params', 'nonsense', 1), ('params', 'k', 0), ('params', 'k', 10**6), ('params', 'k', 'x'),
    ('params', 'patchsize', 0), ('params', 'patchsize', 3.5), ('params', 'stride', -1), ('params', 'imagesize', 0), ('params', 'imagesize', 500), ('params', 'imagesize', 'x'), ('params', 'patch_score', 'y'), ('params', 'preprocessing', 5),
    ('params', 'weights', 'z'), ('params', 'false_alarms', 7), ('params', 'seed', 'x')], ids=str)
def test_damaged_values(saved, weights, change):
    change = (*change, None) if change == ('sha256', TENSORS) else change
    values(saved/VALUES, change)
    refused(lambda: load(saved, weights_dir=weights))

@pytest.mark.parametrize('raw', [b'', b'{', b'[]', b'null', b'5', b'"x"', b'\xff\xfe', b'[' * 100_000, b'{"a":' * 50_000, b'{"format": "patchcore_nb model 1"}', b'{"format": "patchcore_nb model 2"}', b'{"format": ["patchcore_nb model 2"]}', b'9'*10_000, b'\x00'*100], ids=lambda r: repr(r[:12]))
def test_values_that_are_no_json(saved, weights, raw):
    (saved/VALUES).write_bytes(raw)
    refused(lambda: load(saved, weights_dir=weights), says=VALUES)

def test_values_cut_off_anywhere(saved, weights):
    raw = (saved/VALUES).read_bytes().rstrip()
    for n in random.Random(0).sample(range(len(raw)), 60):
        (saved/VALUES).write_bytes(raw[:n])
        refused(lambda: load(saved, weights_dir=weights), says=VALUES)

SPOILT_BANKS = {'none': lambda b: {}, 'narrow': lambda b: {'memory_bank': b[:, :9].contiguous()}, 'flat': lambda b: {'memory_bank': b[0]}, 'empty': lambda b: {'memory_bank': b[:0]},
                'whole numbers': lambda b: {'memory_bank': b.int()}, 'nan': lambda b: {'memory_bank': b*np.nan}}

@pytest.mark.parametrize('how', SPOILT_BANKS)
def test_banks_that_do_not_fit(saved, weights, how):
    "With a digest that does: whoever made this meant it."
    tensors = load_file(saved/TENSORS)
    save_file(tensors | SPOILT_BANKS[how](tensors.pop('memory_bank')), saved/TENSORS)
    values(saved/VALUES, ('sha256', TENSORS, hashlib.sha256((saved/TENSORS).read_bytes()).hexdigest()))
    refused(lambda: load(saved, weights_dir=weights))

@pytest.mark.parametrize('runtime', [dict(ratio=.5), dict(seed=1)], ids=str)
def test_only_what_costs_time_can_be_changed(saved, weights, runtime):
    with pytest.raises(ArgumentError, match='cannot be changed'): load(saved, weights_dir=weights, **runtime)


# A model file says what the model is, and nothing else

def says(path, param, value, version=2):
    "Let a model file say another parameter, as somebody who works out its digest can."
    values(path, ('params', param, value))
    values(path, ('format', f'patchcore_nb model {version}'))

SETTINGS = dict(weights_dir='/any/folder', device='cuda:7', search_device='cuda:7', search_threads=10**6, num_threads=10**6, batch_size=10**9, num_workers=10**6,
                show=True, memory_budget='1TB', spill_dir='/any/folder', cache='/any/folder', engine='auto')

def test_no_setting_is_left_out(): assert set(SETTINGS) == set(RUNTIME)

@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('param', SETTINGS)
def test_a_model_file_does_not_choose_how_it_is_computed(other, tmp_path, param, version):
    "Neither where predict writes, nor what it takes: nothing is made, nothing begins."
    save(other, tmp_path/'m', 'ours')
    value, threads = SETTINGS[param], torch.get_num_threads()
    if value == '/any/folder': value = str(tmp_path/'made')
    says(tmp_path/'m'/VALUES, param, value, version)
    before = contents(tmp_path)
    refused(load, tmp_path/'m', says=f"{tmp_path/'m'/VALUES}: the model says {param}=")
    assert contents(tmp_path) == before and not (tmp_path/'made').exists() and torch.get_num_threads() == threads

@pytest.mark.parametrize('param, value', [
    ('nonsense', 1), ('__class__', 'x'), ('self', 1), ('scale_to', 64), ('embedder_', 1), ('k', '1'), ('k', 1.5), ('k', True), ('k', [1]), ('ratio', '0.1'), ('ratio', True), ('ratio', float('nan')), ('ratio', 1e999),
    ('layers', 'layer2'), ('layers', [2]), ('layers', {'layer2': 1}), ('augment', 1), ('augment', 'yes'), ('resize', '64'), ('resize', [64]), ('resize', 64.), ('imagesize', [64, 64, 64]), ('imagesize', [64, '64']),
    ('seed', 'x'), ('seed', 1.), ('backbone', 5), ('more_patchsizes', 3), ('more_patchsizes', [3.5]), ('weights', 0), ('distance', ['squared']), ('smoothing', '4'), ('confidence', '0.9'),
    ('target_dim', 10**12), ('imagesize', 10**7), ('resize', [10**6, 64]), ('k', 10**9), ('more_patchsizes', [3]*10_000), ('layers', ['layer2']*10_000), ('stride', -10**12)], ids=lambda o: str(o)[:20])
def test_a_parameter_that_cannot_be_is_named(other, tmp_path, param, value):
    "With the file that it stands in; a claim of any size costs nothing."
    save(other, tmp_path/'m', 'ours')
    says(tmp_path/'m'/VALUES, param, value)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=f'{VALUES}: .*{param}'): load(tmp_path/'m')
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally: tracemalloc.stop()

def test_a_member_does_not_choose_either(pair, tmp_path):
    folder, name = save(pair, tmp_path/'m', 'ours'), f'Ensemble-2-2_{VALUES}'
    says(folder/name, 'cache', str(tmp_path/'made'))
    values(folder/'ensemble.json', ('sha256', 'Ensemble-2-2_', hashlib.sha256((folder/name).read_bytes()).hexdigest()))
    refused(load, folder, says=f"{folder/name}: the model says cache=")
    assert not (tmp_path/'made').exists()

def test_whoever_loads_a_model_chooses(other, tmp_path):
    again = load(save(other, tmp_path/'m', 'ours'), cache=tmp_path/'kept', batch_size=1, search_threads=1)
    assert torch.equal(scores(again), scores(load(tmp_path/'m', batch_size=1))) and list((tmp_path/'kept').rglob('*.safetensors'))
    save(again, tmp_path/'n', 'ours')
    assert not set(json.loads((tmp_path/'n'/VALUES).read_text())['params']) & set(RUNTIME)

@pytest.mark.parametrize('runtime', [dict(batch_size=0), dict(search_threads=10**6), dict(num_workers=-1), dict(device=-7), dict(search_device=-7), dict(memory_budget='lots')], ids=str)
def test_a_setting_that_cannot_be_is_an_argument_of_the_caller(other, tmp_path, runtime):
    save(other, tmp_path/'m', 'ours')
    with pytest.raises(ArgumentError): load(tmp_path/'m', **runtime)

@pytest.mark.parametrize('given', [dict(resize='72', imagesize='64'), dict(k=np.int64(2), ratio=np.float64(.1)), dict(augment=1), dict(resize=np.int64(64)),
                                   dict(resize=(np.int64(64), 64), more_patchsizes=np.array([1]), layers=np.array(['layer2', 'layer3']), seed=np.int64(3), smoothing=np.float32(4))], ids=str)
def test_what_fit_takes_can_be_read_again(tmp_path, given):
    m = PatchCore('filterbank', **SMALL | given).fit(IMAGES[:2])
    assert torch.equal(scores(load(save(m, tmp_path/'m', 'ours'))), scores(m))

def test_what_could_not_be_read_again_is_not_written(tmp_path):
    m = PatchCore('filterbank', **SMALL).fit(IMAGES[:2])
    m.__dict__['more_patchsizes'] = m._asked['more_patchsizes'] = object() # behind the model's back
    with pytest.raises(DataError, match='more_patchsizes'): save(m, tmp_path/'m', 'ours')
    assert not list(tmp_path.iterdir())


# What was learned is held against the rest, entry by entry

LIES = [('n_images', -1), ('n_images', True), ('n_images', 3), ('n_patches', -1), ('n_patches', 2.5), ('digests', [1]), ('digests', []), ('grid', 'anything'), ('grid', [8]), ('grid', [0, 8]), ('size', [64, -1]), ('size', [10**9, 64]),
        ('backbone_sha256', 3), ('calibration', 0), ('calibration', []), ('sizes', [9, 3]), ('sizes', [10**6]), ('sizes', ['3']), ('radii', [1.]), ('radii', [-1.]), ('radii', 7)]

@pytest.mark.parametrize('entry, value', LIES, ids=str)
def test_a_lie_about_what_was_learned_is_named(other, tmp_path, entry, value):
    save(other, tmp_path/'m', 'ours')
    values(tmp_path/'m'/VALUES, ('learned', entry, value))
    with pytest.raises(DataError, match=entry) as e: load(tmp_path/'m')
    assert str(tmp_path/'m') in str(e.value) and len(str(e.value).splitlines()) == 1

SPOILT_ROWS = {'origin': [lambda o: o[:3], lambda o: o[:, :2].contiguous(), lambda o: o+1000, lambda o: -o-1, lambda o: o.float()], 'idxs': [lambda o: o[:2], lambda o: o*0, lambda o: -o-1, lambda o: o.int()],
               'anchor_dists': [lambda o: o[:2], lambda o: o.long(), lambda o: o[:, None].contiguous()]}

@pytest.mark.parametrize('name, i', [(k, i) for k, v in SPOILT_ROWS.items() for i in range(len(v))])
def test_tensors_that_speak_of_other_rows_are_named(other, tmp_path, name, i):
    "With a digest that fits, as for the bank."
    folder = save(other, tmp_path/'m', 'ours')
    tensors = load_file(folder/TENSORS)
    save_file(tensors | {name: SPOILT_ROWS[name][i](tensors[name])}, folder/TENSORS)
    values(folder/VALUES, ('sha256', TENSORS, hashlib.sha256((folder/TENSORS).read_bytes()).hexdigest()))
    refused(load, folder, says=f'{folder/TENSORS}: {name} must')

def test_a_parameter_under_two_names(other, tmp_path):
    "The old one is read in old files alone, and there beside the new one no more."
    path = save(other, tmp_path/'m', 'ours')/VALUES
    says(path, 'b', 3, 2); refused(load, tmp_path/'m', says=f"{path}: the model has an unknown parameter 'b'")
    says(path, 'b', 3, 1); refused(load, tmp_path/'m', says=f'{path}: the model says b and reweight_k')
    values(path, ('params', 'reweight_k', None))
    assert load(tmp_path/'m').reweight_k == 3

def test_a_seed_that_is_too_large_is_named(other, tmp_path):
    says(save(other, tmp_path/'m', 'ours')/VALUES, 'seed', 10**30)
    refused(load, tmp_path/'m', says='seed')

OWN = dict(patch_score=(PATCH_SCORES, lambda s: s.flatten(1).topk(2)[0].mean(1)), distance=(DISTANCES, lambda d: d+1), search=(SEARCHES, lambda: SEARCHES['exact']()), sampler=(SAMPLERS, lambda *a: SAMPLERS['random'](*a)))

@pytest.mark.parametrize('what', OWN)
def test_a_part_of_ones_own_that_is_not_registered_where_the_model_is_loaded(tmp_path, monkeypatch, what):
    table, own = OWN[what]
    with monkeypatch.context() as patch:
        patch.setitem(table.found, 'top2', own)
        m = PatchCore('filterbank', **SMALL | {what: 'top2'}).fit(IMAGES[:2])
        save(m, tmp_path/'m', 'ours')
        assert torch.equal(scores(load(tmp_path/'m')), scores(m))
    refused(load, tmp_path/'m', says=f"the model uses {what} 'top2', which nothing here registers: import or install what registers it")


# Models of the version before

OLD = Path(__file__).parent/'data'/'model_1' # written by version 0.1.0, from drawn images

@pytest.mark.parametrize('name', ['single', 'ensemble'])
def test_a_model_of_the_version_before(name):
    "Its scores, its maps, its threshold; `b` is what `reweight_k` was called."
    noted = json.loads((OLD/'scores.json').read_text(encoding='utf-8'))
    m, want = load(OLD/name, num_workers=0), noted[name]
    p = m.predict([demo_sample('cog', 'test', i)[0] for i in noted['test']])
    assert np.allclose(p.image_scores, want['image_scores'], rtol=1e-5, atol=0)
    assert np.allclose(p.anomaly_maps.amax((1, 2)), want['tops'], rtol=1e-5, atol=0)
    assert m.threshold_ == want['threshold'] and p.verdicts.tolist() == want['verdicts']
    assert [o.reweight_k for o in m.members] == dict(single=[3], ensemble=[5, 9])[name]
    assert not any(hasattr(o, 'b') for o in m.members)

@pytest.mark.parametrize('name', ['single', 'ensemble'])
def test_a_model_of_the_version_before_is_saved_as_one_of_this(name, tmp_path):
    m = load(OLD/name, num_workers=0)
    folder = save(m, tmp_path/'m', 'ours')
    for o in folder.glob(f'*{VALUES}'):
        found = json.loads(o.read_text(encoding='utf-8'))
        assert found['format'] == 'patchcore_nb model 4' and 'reweight_k' in found['params'] and 'b' not in found['params']
    again, images = load(folder), [demo_sample('cog', 'test', i)[0] for i in (0, 12)]
    assert torch.equal(again.predict(images).anomaly_maps, m.predict(images).anomaly_maps) and again.threshold_ == m.threshold_

def test_the_models_of_the_version_before_are_small(): assert sum(len(o) for o in contents(OLD).values()) < 100_000


# What is written is one moment of a model

def test_saved_beside_partial_fit(tmp_path):
    "Files that belong together: the model before, or after."
    m = PatchCore('filterbank', **SMALL | dict(num_workers=0)).fit(IMAGES[:2])
    lone = m.memory_bank_
    thread = Thread(target=m.partial_fit, args=(IMAGES[2:],))
    thread.start()
    banks = []
    while thread.is_alive() or not banks: banks.append(load(save(m, tmp_path/'m', 'ours')).memory_bank_)
    thread.join()
    assert all(torch.equal(o, lone) or torch.equal(o, m.memory_bank_) for o in banks)
