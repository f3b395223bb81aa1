"Model folders after a kill, damaged and hostile files: the whole model, or one error that names the file."
import os
import pickle
import random
import re
import shutil
import socket
import struct
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from patchcore_nb import bounded, model_files, reference_files
from patchcore_nb.bounded import OWN, digest, read_json, write_json
from patchcore_nb.complete import LEFT, own_host, put_aside, replacing, replacing_folder, sweep_once
from patchcore_nb.core import ArgumentError, DataError
from patchcore_nb.demo import make_demo
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.model_files import TENSORS, VALUES
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.reference_files import REFERENCE_INDEX, REFERENCE_PARAMS
from patchcore_nb.saved import evaluate_main, predict_main
from patchcore_nb.store import ENSEMBLE, load, save

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
SMALL = dict(resize=64, imagesize=64, pretrain_dim=64, target_dim=64, ratio=.1, num_workers=0)
FILE_OPERATIONS = ('open', 'os.', 'shutil.')
forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='this operating system cannot fork, and so cannot be killed at a chosen operation')


@pytest.fixture(scope='module')
def older(): return PatchCore('filterbank', ['layer3'], **SMALL).fit(IMAGES[:2])

@pytest.fixture(scope='module')
def newer(): return PatchCore('filterbank', **SMALL).fit(IMAGES)

def scores(model): return model.predict(IMAGES[2:]).image_scores

def refused(f, *args, says='', kind=DataError, **kw):
    "One error of one line, not too long."
    with pytest.raises(kind) as e: f(*args, **kw)
    said = str(e.value)
    assert len(said.splitlines()) == 1 and says in said and len(said) < 900, said
    return said


# Killed at any operation

class Counter:
    "Counts what is asked of the file system within a folder, and does something at one of these operations."
    def __init__(self): self.at = None
    def start(self, folder, at, what): self.folder, self.at, self.what, self.n = str(folder), at, what, 0
    def __call__(self, event, args):
        if self.at is None or not event.startswith(FILE_OPERATIONS) or not any(self.folder in str(o) for o in args): return
        self.n += 1
        if self.n == self.at: self.what()

COUNTER = Counter()
sys.addaudithook(COUNTER)

def stop_at(k, folder, what, f):
    "Call f, and do something else at operation k; how many there were."
    COUNTER.start(folder, k, what)
    try: f()
    finally: COUNTER.at = None
    return COUNTER.n

def die_at(k, folder, f):
    "Call f in a child that dies at operation k; False if it came to its end before."
    pid = os.fork()
    if not pid:
        try: stop_at(k, folder, lambda: os._exit(9), f)
        except BaseException: os._exit(7)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9), status
    return status == 9

def fill(folder, text):
    with replacing_folder(folder) as temp:
        for name in 'ab': (temp/name).write_text(text, encoding='utf-8')

def held(folder):
    "What a loader finds: all files of one kind, or an error."
    there = folder if folder.is_dir() else put_aside(folder)
    texts = {o.name: o.read_text(encoding='utf-8') for o in there.iterdir()} if there else {}
    assert texts in ({}, dict(a='old', b='old'), dict(a='new', b='new')), texts
    return texts.get('a')

def left(folder): return [o.name for o in folder.iterdir() if LEFT.fullmatch(o.name)]

def kill_all(folder, f, check):
    "Kill f at every operation, and look at what is left each time; at how many."
    k = 1
    while die_at(k, folder.parent, f):
        check(k)
        k += 1
    return k-1

@forks
@pytest.mark.parametrize('before', ['', 'old', 'aside'])
def test_a_folder_is_whole_wherever_the_run_is_killed(tmp_path, before):
    "Before, there was none; an older one; an older one aside, whose run had been killed."
    found, folder = [], tmp_path/'deep'/'m'
    def begin():
        for o in (folder, *(folder.parent.iterdir() if folder.parent.is_dir() else ())):
            if o.is_dir(): shutil.rmtree(o)
        if before: fill(folder, 'old')
        if before == 'aside': folder.rename(folder.with_name(f'.m.old-999999999-{own_host()}00000'))
    def check(k):
        found.append(held(folder))
        if before == 'old': assert found[-1] == 'old' or folder.is_dir()
        fill(folder, 'new')
        assert held(folder) == 'new' and not left(folder.parent), 'the next run sweeps'
        begin()
    begin()
    n = kill_all(folder, lambda: fill(folder, 'new'), check)
    assert n > 8 and found[0] == (before and 'old' or None) and found[-1] == 'new'
    if before: assert set(found) == {'old', 'new'}

@pytest.mark.parametrize('error', [KeyboardInterrupt, MemoryError, OSError])
def test_a_folder_is_whole_whatever_is_raised(tmp_path, error):
    "At every operation, of which those that clean up are some too."
    folder = tmp_path/'m'
    def fail(): raise error
    k, n = 1, 10**6
    while k <= n:
        fill(folder, 'old')
        try: n = stop_at(k, tmp_path, fail, lambda: fill(folder, 'new'))
        except (error, DataError): pass
        assert held(folder) in ('old', 'new'), k
        k += 1
    assert k > 8

@forks
def test_a_model_is_whole_wherever_the_save_is_killed(tmp_path, older, newer):
    "Loaded each time: the older one or the newer one, with a word if it is the one aside."
    folder, want = tmp_path/'m', [scores(o) for o in (older, newer)]
    save(older, folder, 'ours')
    known = []
    def check(k):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            got = scores(load(folder))
        assert bool(said) == (not folder.is_dir()) and all('was cut short' in str(o.message) and str(folder) in str(o.message) for o in said)
        known.append([torch.equal(got, o) for o in want].index(True))
        save(older, folder, 'ours')
        assert not left(tmp_path)
    n = kill_all(folder, lambda: save(newer, folder, 'ours'), check)
    assert n > 12 and known == sorted(known) and set(known) == {0, 1}

def aside(older, tmp_path):
    "A model of which a killed save has left the older one alone."
    save(older, tmp_path/'m', 'ours')
    return (tmp_path/'m').rename(tmp_path/f'.m.old-999999999-{own_host()}12345')

def test_the_command_line_takes_the_one_aside(older, tmp_path, capsys):
    "And says so."
    aside(older, tmp_path)
    make_demo(tmp_path/'data', 'cog')
    words = f'--gpu -1 --no_report {tmp_path}/judged patch_core_loader -p {tmp_path}/m dataset -d cog demo {tmp_path}/data'
    with pytest.raises(SystemExit) as e: evaluate_main(words.split())
    err = capsys.readouterr().err
    assert e.value.code == 0 and 'a save was cut short' in err, err

def test_the_latest_of_several_asides(older, newer, tmp_path):
    "Each is whole."
    first = aside(older, tmp_path)
    os.utime(first, (1e9, 1e9))
    save(newer, tmp_path/'n', 'ours').rename(tmp_path/f'.m.old-999999998-{own_host()}12345')
    with pytest.warns(UserWarning, match='cut short'): assert torch.equal(scores(load(tmp_path/'m')), scores(newer))

def test_what_is_no_aside(tmp_path, older):
    "Somebody else's names, and temporary ones."
    save(older, tmp_path/'m', 'ours').rename(tmp_path/f'.m.tmp-999999999-{own_host()}12345')
    for name in ('.m.old', '.mm.old-1-00000000', 'm.old-1-00000000', '.m.old-1-0000000x', '.m.old-x-00000000'): (tmp_path/name).mkdir()
    refused(load, tmp_path/'m', says='is not there: check the path')


# Swept

def make_left(folder, name, pid, host):
    "What a dead run may leave."
    path = folder/f'.{name}.tmp-{pid}-{host}00000'
    path.mkdir(parents=True)
    (path/'x').write_bytes(b'x')
    return path

def test_what_dead_runs_left_is_swept(tmp_path):
    "Of this host, by the process; of another, once it is a day old; the living, and other people's files, stay."
    strange = 'f'*12 if own_host() != 'f'*12 else '0'*12
    dead, living, abroad, old = (make_left(tmp_path, 'm', *o) for o in ((999999999, own_host()), (os.getpid(), own_host()), (999999999, strange), (999999998, strange)))
    os.utime(old, (1e9, 1e9))
    for name in ('.m.tmp', '.tmp-1-00000000', 'm.tmp-999999999-00000000', '.bashrc'): (tmp_path/name).write_bytes(b'dear to me')
    fill(tmp_path/'other', 'new')
    assert not dead.exists() and not old.exists() and living.exists() and abroad.exists()
    assert {'.m.tmp', '.tmp-1-00000000', 'm.tmp-999999999-00000000', '.bashrc', 'other'} <= {o.name for o in tmp_path.iterdir()}

def test_a_link_is_swept_and_not_followed(tmp_path):
    (tmp_path/'dear').mkdir()
    (tmp_path/'dear'/'x').write_bytes(b'dear to me')
    (tmp_path/'in').mkdir()
    link = tmp_path/'in'/f'.m.tmp-999999999-{own_host()}00000'
    link.symlink_to(tmp_path/'dear')
    fill(tmp_path/'in'/'m', 'new')
    assert not link.is_symlink() and (tmp_path/'dear'/'x').exists()

def test_a_file_sweeps_once_a_folder(tmp_path):
    path = tmp_path/f'.a.txt.tmp-999999999-{own_host()}00000'
    path.write_bytes(b'half')
    with replacing(tmp_path/'b.txt') as temp: temp.write_bytes(b'whole')
    assert not path.exists() and sweep_once.cache_info().currsize

def test_an_aside_stays_while_its_place_is_empty(tmp_path, older):
    "Also when another model is saved beside it."
    path = aside(older, tmp_path)
    save(older, tmp_path/'other', 'ours')
    assert path.exists()
    save(older, tmp_path/'m', 'ours')
    assert not path.exists() and not left(tmp_path)


# Values with a digest of their own

@pytest.fixture(scope='module')
def calibrated():
    "With all that a file may say: a threshold, peaks, radii."
    kw = SMALL | dict(train_val_split=.5, false_alarms=.4, confidence=None, patch_score='reweighted')
    return PatchCore('filterbank', **kw).fit(np.concatenate([IMAGES, IMAGES[::-1]]))

@pytest.fixture(scope='module')
def pair(calibrated):
    kw = SMALL | dict(train_val_split=.5, false_alarms=.4, confidence=None)
    return Ensemble([PatchCore('filterbank', [o], **kw) for o in ('layer2', 'layer3')]).fit(np.concatenate([IMAGES, IMAGES[::-1]]))

def edits(text):
    "Alterations of a file of values: figures, letters, bytes, lines."
    rng, raw = random.Random(0), text.encode()
    for m in list(re.finditer(r'\d', text)):
        if rng.random() < .2: yield text[:m.start()]+str((int(m[0])+1) % 10)+text[m.end():]
    for i in rng.sample(range(len(raw)), 150): yield (raw[:i]+bytes([raw[i]^1 << rng.randrange(8)])+raw[i+1:])
    for i in rng.sample(range(len(raw)), 60): yield raw[:i]+raw[i+1:]
    lines = text.splitlines(keepends=True)
    for i in range(len(lines)): yield from (''.join(lines[:i]+lines[i+1:]), ''.join(lines[:i]+[lines[i]]*2+lines[i+1:]))
    for was, now in (('"threshold": ', '"threshold": 1'), ('"smoothing": 4', '"smoothing": 5'), ('"promise": "average"', '"promise": "confidence"'), (f'"{OWN}"', '"own"'), ('model 3', 'model 1'), ('model 3', 'model 2')): yield text.replace(was, now)

@pytest.mark.parametrize('kind', ['single', 'ensemble', 'member'])
def test_no_edit_goes_unseen(calibrated, pair, tmp_path, kind):
    "One error that names the file; nothing is computed before."
    folder = save(calibrated if kind == 'single' else pair, tmp_path/'m', 'ours')
    path = folder/dict(single=VALUES, ensemble=ENSEMBLE, member=f'Ensemble-2-2_{VALUES}')[kind]
    text, n = path.read_text(encoding='utf-8'), 0
    for edited in edits(text):
        edited = edited.encode() if isinstance(edited, str) else edited
        if edited == text.encode(): continue
        path.write_bytes(edited)
        refused(load, folder, says=path.name)
        n += 1
    assert n > 250
    path.write_text(text, encoding='utf-8', newline='\r\n')
    if kind == 'single': load(folder) # line ends may change on the way
    path.write_text(text, encoding='utf-8')
    load(folder)

@pytest.mark.parametrize('name', ['single', 'ensemble'])
def test_models_without_a_digest_of_their_own_load(name):
    folder = Path(__file__).parent/'data'/'model_1'/name
    assert not any(OWN in o.read_text() for o in folder.glob('*.json')) and load(folder).is_fitted

def test_a_key_that_stands_there_twice_is_named_in_old_files_too(tmp_path):
    shutil.copytree(Path(__file__).parent/'data'/'model_1'/'single', tmp_path/'m')
    path = tmp_path/'m'/VALUES
    path.write_text(path.read_text().replace('"params": {', '"params": {"k": 1, ', 1))
    refused(load, tmp_path/'m', says="'k' stands there twice")

CALIBRATIONS = [('threshold', True), ('threshold', '3'), ('threshold', float('nan')), ('threshold', 10**400), ('scores', [True, 2.]), ('scores', ['1', '2']), ('scores', [2., 1.]), ('scores', [float('nan')]),
                ('scores', {}), ('scores', [[1.]]), ('peaks', [True]), ('promise', True), ('promise', ['average']), ('promise', 'x'*100_000), ('map_threshold', False)]

@pytest.mark.parametrize('entry, value', CALIBRATIONS, ids=lambda o: str(o)[:12])
@pytest.mark.parametrize('kind', ['single', 'ensemble'])
def test_a_calibration_that_cannot_be_is_refused(calibrated, pair, tmp_path, kind, entry, value):
    "With a digest that fits: true is not 1, and what is no number is none."
    folder = save(calibrated if kind == 'single' else pair, tmp_path/'m', 'ours')
    path = folder/(VALUES if kind == 'single' else ENSEMBLE)
    values = read_json(path)
    (values['learned'] if kind == 'single' else values)['calibration'][entry] = value
    write_json(path, values)
    refused(load, folder, says=entry)

@pytest.mark.parametrize('change', [dict(n_patches=10**24), dict(n_images=10**24), dict(sizes=[10**24]), dict(size=[10**24, 64]), dict(grid=[8, 10**24]), dict(n_patches=True), dict(radii=[float('nan')]), dict(radii=[10**400])], ids=str)
def test_numbers_that_no_model_has(calibrated, tmp_path, change):
    path = save(calibrated, tmp_path/'m', 'ours')/VALUES
    values = read_json(path)
    values['learned'] |= change
    write_json(path, values)
    refused(load, tmp_path/'m', says=[*change][0])

@pytest.mark.parametrize('param, value', [('seed', 10**24), ('smoothing', 10**24), ('smoothing', True), ('ratio', float('nan')), ('k', 10**24), ('patchsize', 10**24), ('imagesize', [64, 10**24])], ids=str)
def test_parameters_that_no_model_has(calibrated, tmp_path, param, value):
    path = save(calibrated, tmp_path/'m', 'ours')/VALUES
    values = read_json(path)
    values['params'][param] = value
    write_json(path, values)
    refused(load, tmp_path/'m', says=param)

@pytest.fixture(scope='module')
def both(weights): return PatchCore('resnet18', weights_dir=weights, **SMALL | dict(resize=64, imagesize=56)).fit(IMAGES)

@pytest.mark.parametrize('model_format', ['both', 'ours'])
def test_a_model_that_has_lost_its_values(both, weights, tmp_path, model_format):
    "The reference's two files are a way out, and it is said that they are taken."
    folder = save(both, tmp_path/'m', model_format)
    (folder/VALUES).unlink()
    lost = f'{folder/VALUES} is not there, but {TENSORS} is'
    if model_format == 'ours': return refused(load, folder, weights_dir=weights, says=lost)
    with pytest.warns(UserWarning, match=re.escape(lost)): assert load(folder, weights_dir=weights, resize=64).threshold_ is None
    (folder/TENSORS).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load(folder, weights_dir=weights, resize=64).is_fitted

@pytest.mark.parametrize('gone', [[ENSEMBLE], [f'Ensemble-1-2_{VALUES}'], [f'Ensemble-{i}-2_{VALUES}' for i in (1, 2)], [f'Ensemble-2-2_{o}' for o in (VALUES, TENSORS)]], ids=str)
def test_an_ensemble_that_has_lost_a_part(both, weights, tmp_path, gone):
    folder = save(Ensemble([both, both]), tmp_path/'m', 'both')
    for o in gone: (folder/o).unlink()
    said = refused(load, folder, weights_dir=weights)
    assert str(folder) in said and any(o in said for o in gone)


# What is no file, and what is too large

NAMES = {'ours': [VALUES, TENSORS], 'reference': [REFERENCE_PARAMS, REFERENCE_INDEX], 'both': [REFERENCE_PARAMS, REFERENCE_INDEX], 'ensemble': [ENSEMBLE, f'Ensemble-1-2_{VALUES}', f'Ensemble-2-2_{TENSORS}']}

@pytest.fixture
def stored(both, pair, weights, tmp_path):
    "Save a model in a format."
    def go(kind): return save(pair, tmp_path/'m', 'ours') if kind == 'ensemble' else save(both, tmp_path/'m', kind)
    return go

def make_pipe(path): os.mkfifo(path)
def make_folder_of(path): path.mkdir()
def make_endless(path): path.symlink_to('/dev/zero')
def make_outside(path): path.symlink_to(Path(__file__))
def make_circle(path): path.symlink_to(path.name)
def make_dangling(path): path.symlink_to('nowhere')
def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent) # whose name may be too long for a socket
    try: socket.socket(socket.AF_UNIX).bind(path.name)
    finally: os.chdir(here)

ODD = [make_pipe, make_folder_of, make_endless, make_outside, make_circle, make_dangling, make_socket]

@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has neither pipes nor devices in a folder')
@pytest.mark.parametrize('make', ODD, ids=lambda f: f.__name__)
@pytest.mark.parametrize('kind, name', [(k, o) for k, v in NAMES.items() for o in v])
def test_what_is_no_file_of_the_folder_is_named(stored, weights, kind, name, make):
    "Before it is opened: a pipe would never end."
    folder = stored(kind)
    (folder/name).unlink()
    make(folder/name)
    gone = kind == 'both' and make in (make_dangling, make_circle) # the reference's files beside ours may be missing
    if not gone: assert name in refused(load, folder, weights_dir=weights)

def test_a_link_within_the_folder_is_followed(stored):
    folder = stored('ensemble')
    (folder/TENSORS.replace('.', '2.')).write_bytes((folder/f'Ensemble-1-2_{TENSORS}').read_bytes())
    (folder/f'Ensemble-1-2_{TENSORS}').unlink()
    (folder/f'Ensemble-1-2_{TENSORS}').symlink_to(TENSORS.replace('.', '2.'))
    assert load(folder).is_fitted

@pytest.mark.parametrize('gigabytes', [4, 8])
@pytest.mark.parametrize('grown', [True, False], ids=['grown', 'empty'])
@pytest.mark.parametrize('kind, name', [(k, o) for k, v in NAMES.items() for o in v])
def test_sparse_files_are_not_read(stored, weights, kind, name, grown, gigabytes):
    "One error, at once, and no memory taken: by their size, or by what their header says of it."
    folder = stored(kind)
    with open(folder/name, 'rb+' if grown else 'wb') as f: f.truncate(gigabytes << 30)
    tracemalloc.start()
    start = time.monotonic()
    try:
        said = refused(load, folder, weights_dir=weights)
        assert name in said and time.monotonic()-start < 5 and tracemalloc.get_traced_memory()[1] < 4e7
    finally: tracemalloc.stop()

@pytest.mark.parametrize('kind, name', [('ours', TENSORS), ('reference', REFERENCE_INDEX)])
def test_what_memory_does_not_hold_is_named(stored, weights, monkeypatch, kind, name):
    monkeypatch.setattr(bounded, 'free_memory', lambda: 1000)
    refused(load, stored(kind), weights_dir=weights, says='of memory are free')

@pytest.mark.parametrize('value', [1e16, -1e30, 3e38, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('kind', ['ours', 'reference'])
def test_numbers_whose_distances_are_infinite(stored, weights, kind, value):
    "In the memory bank of either format, with a digest that fits."
    folder = stored(kind)
    if kind == 'reference':
        raw = (folder/REFERENCE_INDEX).read_bytes()
        (folder/REFERENCE_INDEX).write_bytes(raw[:-4]+struct.pack('<f', value))
    else:
        tensors = load_file(folder/TENSORS)
        tensors['memory_bank'][-1, -1] = value
        save_file(tensors, folder/TENSORS)
        values = read_json(folder/VALUES)
        values['sha256'][TENSORS] = digest(folder/TENSORS)
        write_json(folder/VALUES, values)
    refused(load, folder, weights_dir=weights, says='finite')

def test_digests_of_many_files_are_not_worked_out(calibrated, tmp_path):
    folder = save(calibrated, tmp_path/'m', 'ours')
    values = read_json(folder/VALUES)
    values['sha256'] = {f'{i}/{TENSORS}': '0'*64 for i in range(1000)} | values['sha256']
    write_json(folder/VALUES, values)
    refused(load, folder, says='has digests of 1001 files')

@pytest.mark.parametrize('name', ['Ensemble-1-99999999999_', 'Ensemble-1-'+'9'*100+'_', 'Ensemble-2000-2000_'])
def test_ensembles_of_claimed_sizes(tmp_path, name):
    (tmp_path/f'{name}{VALUES}').touch()
    refused(load, tmp_path, says='incomplete ensemble')

def test_values_larger_than_is_ever_read_are_not_written(tmp_path): refused(write_json, tmp_path/'x.json', dict(a='x'*(1 << 25)), says='more than is ever read')

@pytest.mark.parametrize('shape', [(3, 65536, 65536), (3, 4000, 4000), (3, 224, 60000), (1, 56, 56), (3, 56), (3, 56, 56, 56)], ids=str)
def test_a_shape_in_a_pickle_is_checked_before_anything_of_that_size_is_computed(stored, weights, monkeypatch, shape):
    folder = stored('reference')
    values = pickle.loads((folder/REFERENCE_PARAMS).read_bytes())
    (folder/REFERENCE_PARAMS).write_bytes(pickle.dumps(values | dict(input_shape=shape)))
    monkeypatch.setattr(reference_files, 'wake', None)
    assert REFERENCE_PARAMS in refused(load, folder, weights_dir=weights)

@pytest.mark.parametrize('params', [dict(imagesize=[4000, 4000], resize=[4000, 4000]), dict(imagesize=None, resize=60000), dict(imagesize=None, resize=[60000, 300])], ids=str)
def test_a_size_in_our_values_likewise(calibrated, tmp_path, monkeypatch, params):
    path = save(calibrated, tmp_path/'m', 'ours')/VALUES
    values = read_json(path)
    values['params'] |= params
    values['learned']['size'] = None
    write_json(path, values)
    monkeypatch.setattr(model_files, 'wake', None)
    refused(load, tmp_path/'m', says='tells no size of images')


# Searches that are not there, and strings without end

@pytest.fixture
def by_faiss(tmp_path, monkeypatch):
    "A model that was saved with ivfpq, where faiss is not installed any more."
    kw = SMALL | dict(ratio=1., sampler='identity', train_val_split=.5, false_alarms=.4, confidence=None)
    m = PatchCore('filterbank', **kw).fit(np.concatenate([IMAGES, IMAGES[::-1]]*2))
    path = save(m, tmp_path/'m', 'ours')/VALUES
    values = read_json(path)
    values['params']['search'] = 'ivfpq'
    write_json(path, values)
    monkeypatch.setitem(sys.modules, 'faiss', None)
    return m, tmp_path/'m'

def test_a_search_that_cannot_be_used_here_offers_the_exact_one(by_faiss):
    m, folder = by_faiss
    said = refused(load, folder, says="which cannot be used here: pip install 'patchcore_nb[faiss]', or pass search='exact'")
    assert str(folder) in said and 'fit it again' not in said
    with pytest.warns(UserWarning, match='with exact scores are a little different'): again = load(folder, search='exact')
    assert again.search == 'exact' and again.threshold_ == m.threshold_ and torch.equal(scores(again), scores(m))
    refused(load, folder, search='exakt', says="unknown search 'exakt'", kind=ArgumentError)

def test_the_command_line_offers_it_too(by_faiss, tmp_path, capsys):
    folder = by_faiss[1]
    Image.fromarray(IMAGES[0]).save(tmp_path/'a.png')
    for more, status, words in (('', 1, "pip install 'patchcore_nb[faiss]', or pass --search exact"), ('--search exact', 0, 'with exact scores are a little different')):
        with pytest.raises(SystemExit) as e: predict_main(f'{folder} {tmp_path}/a.png -o {tmp_path}/out --gpu -1 {more}'.split())
        assert e.value.code == status and words in capsys.readouterr().err

LONG = 'x'*100_000

@pytest.mark.parametrize('where', [('params', o) for o in ('backbone', 'layers', 'sampler', 'patch_score', 'distance', 'search', 'weights', 'preprocessing', 'aggregation', 'precision', 'k', LONG)]
                         + [('learned', o) for o in ('backbone_sha256', 'digests', 'calibration', 'sizes')] + [('sha256', LONG), ('sha256', TENSORS), ('format', None), (LONG, None)], ids=lambda o: '.'.join(str(p)[:20] for p in o))
def test_a_string_without_end_is_not_echoed(calibrated, tmp_path, recwarn, where):
    "Nor does it take long to refuse; what means nothing may stay."
    path = save(calibrated, tmp_path/'m', 'ours')/VALUES
    values = read_json(path)
    part, name = where
    if name is None: values[part] = LONG
    else: values[part][name] = [LONG] if name in ('layers', 'digests') else LONG
    write_json(path, values)
    start = time.monotonic()
    if where in ((LONG, None), ('sha256', LONG), ('learned', 'backbone_sha256')): assert load(tmp_path/'m').is_fitted
    else:
        with pytest.raises(DataError) as e: load(tmp_path/'m')
        assert len(str(e.value)) < 1300
    assert time.monotonic()-start < 5 and all(len(str(o.message)) < 1000 for o in recwarn)

@pytest.mark.parametrize('key', ['backbone.name', 'layers_to_extract_from'])
def test_a_long_string_in_a_pickle_is_not_echoed(stored, weights, key):
    folder = stored('reference')
    values = pickle.loads((folder/REFERENCE_PARAMS).read_bytes())
    long = 'x'*60_000
    (folder/REFERENCE_PARAMS).write_bytes(pickle.dumps(values | {key: [long] if key.startswith('layers') else long}))
    assert len(refused(load, folder, weights_dir=weights)) < 900
