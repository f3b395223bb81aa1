"Model folders after a kill, damaged and hostile files: the whole model, or one error that names the file."
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from patchcore_nb.complete import LEFT, own_host, put_aside, replacing, replacing_folder, sweep_once
from patchcore_nb.core import DataError
from patchcore_nb.demo import make_demo
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.saved import evaluate_main
from patchcore_nb.store import load, save

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
    strange = 'fff' if own_host() != 'fff' else '000'
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
