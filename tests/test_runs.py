"""Runs: one process to a folder, what has changed since is said, and what is missing in the end; threads."""
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from patchcore_nb import PatchCore, embedder, experiment, results, rounds, resume, seeds
from patchcore_nb.base import ArgumentError, DataError
from patchcore_nb.batching import read_ahead
from patchcore_nb.cli import main
from patchcore_nb.concurrency import own_cores
from patchcore_nb.data import load_category, make_miniature
from patchcore_nb.experiment import judge_saved, run
from patchcore_nb.locks import LOCK, Lock, this_process
from patchcore_nb.results_folder import new_folder
from patchcore_nb.seeds import run_seeds

forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='Windows has no forks')
SMALL = dict(ratio=.1, target_dim=16, resize=64, imagesize=64, num_workers=0, device='cpu')
PARTS = 'patch_core -b filterbank -le layer2 --target_embed_dimension 16 sampler -p 0.1 approx_greedy_coreset dataset --resize 64 --imagesize 64 -d tile -d second mvtec'


def small(**more): return PatchCore('filterbank', ['layer2'], **SMALL | more)


@pytest.fixture(scope='module')
def died(tmp_path_factory):
    "A run of two categories that died in the second, whose first image was broken and is whole again; its data."
    root = tmp_path_factory.mktemp('died')
    data = make_miniature(root/'data', n_train=4)
    shutil.copytree(data/'tile', data/'second')
    broken = data/'second'/'train'/'good'/'003.png'
    whole = broken.read_bytes()
    broken.write_bytes(whole[:2000])
    with pytest.raises(DataError): run(small(), both(data), root/'results', 'p', 'g', report=False)
    broken.write_bytes(whole)
    return root


def both(data): return [load_category('mvtec', data, o) for o in ('tile', 'second')]


@pytest.fixture
def again(died, tmp_path):
    "Go on with that run, in copies of its results and its data."
    root = tmp_path/'died'
    shutil.copytree(died, root, copy_function=shutil.copy2)
    state = root/'results'/'p'/'g'/'run.json'
    inputs = state.with_name('inputs.csv')
    for o in (state, inputs): o.write_text(o.read_text().replace(died.as_posix(), root.as_posix()))
    known = json.loads(state.read_text())
    known['settings']['samples_sha256'] = [resume.digest_category(o) for o in both(root/'data')]
    state.write_text(json.dumps(known))
    def go(how=True, **more): return run(small(**more), both(root/'data'), root/'results', 'p', 'g', report=False, resume=how)
    go.root = root
    return go


def command(root, *words): return [*words, '--gpu', '-1', '--no_report', '--log_project', 'p', '--log_group', 'g', str(root/'results'), *PARTS.split(), str(root/'data')]


def call(words, capfd):
    "Status and lines of the command line."
    with pytest.raises(SystemExit) as e: main([*map(str, words)])
    return e.value.code, [o for o in capfd.readouterr().err.replace('\r', '\n').splitlines() if 'error: ' in o or 'warning: ' in o] # after a progress bar perhaps


# One process to a folder

def test_a_run_that_died_goes_on(again):
    done = again()
    assert done.done_before == 1 and done.folder.name == 'g' and not (done.folder/LOCK).exists()


def test_nobody_goes_on_with_a_run_that_is_alive(again, capfd):
    with Lock(again.root/'results'/'p'/'g'):
        status, lines = call(command(again.root, '--resume'), capfd)
        assert status == 1 and f'is in use by process {os.getpid()} of this machine since' in lines[-1] and 'wait until it ends' in lines[-1]
        assert not (again.root/'results'/'p'/'g_0').exists()
    assert again().done_before == 1


def leave_lock(folder, **changed): (folder/LOCK).write_text(json.dumps(asdict(replace(this_process(), **changed))))


def test_a_lock_of_a_process_that_is_gone_is_taken_over(again):
    leave_lock(again.root/'results'/'p'/'g', pid=999_999_999)
    with pytest.warns(UserWarning, match='left behind by process 999999999'): assert again().done_before == 1


def test_a_number_that_another_process_has_now_means_nothing(again):
    leave_lock(again.root/'results'/'p'/'g', born=this_process().born-10_000)
    with pytest.warns(UserWarning, match='taken over'): assert again().done_before == 1


def test_a_lock_of_another_host_is_refused_with_the_remedy(again):
    folder = again.root/'results'/'p'/'g'
    leave_lock(folder, host='0'*12, name='lab-3')
    with pytest.raises(DataError, match='of lab-3 since .*: delete .*run.lock if that run is surely dead'): again()
    (folder/LOCK).unlink()
    assert again().done_before == 1


def test_new_runs_hold_their_folder(tmp_path, monkeypatch):
    data = make_miniature(tmp_path/'data', n_train=4)
    seen = []
    forward = embedder.Embedder.forward
    monkeypatch.setattr(embedder.Embedder, 'forward', lambda *a, **kw: seen.append(len([*tmp_path.rglob(LOCK)])) or forward(*a, **kw))
    tile = [load_category('mvtec', data, 'tile')]
    run(small(), tile, tmp_path/'r', report=False)
    assert set(seen) == {1}
    seen.clear()
    run_seeds(small(), lambda seed: tile, [0, 1], tmp_path/'r', group='seeds', report=False)
    assert set(seen) == {2} and not [*tmp_path.rglob(LOCK)] # the folder of all seeds, and that of one


def test_seeds_are_resumed_by_one(tmp_path):
    data = make_miniature(tmp_path/'data', n_train=4)
    tile = [load_category('mvtec', data, 'tile')]
    def find(seed):
        if seed == 1 and not (tmp_path/'whole').exists(): raise DataError('no such images')
        return tile
    with pytest.raises(DataError): run_seeds(small(), find, [0, 1], tmp_path/'r', report=False)
    (tmp_path/'whole').touch()
    with Lock(tmp_path/'r'/'project'/'group'), pytest.raises(DataError, match='in use'): run_seeds(small(), find, [0, 1], tmp_path/'r', report=False, resume=True)
    os.utime(tile[0].test[0].path, (1, 1))
    with pytest.raises(ArgumentError, match='tile/test/.* bytes of .* -> '): run_seeds(small(), find, [0, 1], tmp_path/'r', report=False, resume=True)
    with pytest.warns(UserWarning, match='going on all the same'): done = run_seeds(small(), find, [0, 1], tmp_path/'r', report=False, resume='anyway')
    assert done.done_before == 1


def test_a_seed_that_was_done_but_not_counted_is_counted(tmp_path, monkeypatch):
    "Killed between the run of a seed and the table of all seeds."
    tile = [load_category('mvtec', make_miniature(tmp_path/'data', n_train=4), 'tile')]
    def go(**how): return run_seeds(small(), lambda seed: tile, [0, 1], tmp_path/'r', report=False, **how)
    def dies(folder, asked, done, complete, real=seeds.write_seeds):
        if complete: raise KeyboardInterrupt
        return real(folder, asked, done, complete)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(seeds, 'write_seeds', dies)
        go()
    with monkeypatch.context() as m:
        m.setattr(embedder.Embedder, 'forward', lambda *a, **kw: pytest.fail('a seed that was done ran again'))
        again = go(resume=True)
    assert sorted(o.name for o in again.folder.glob('seed_*')) == ['seed_0', 'seed_1']
    whole = run_seeds(small(), lambda seed: tile, [0, 1], tmp_path/'r', group='whole', report=False)
    for o in ('results.csv', 'seeds.csv', 'metrics.csv'): assert (again.folder/o).read_bytes() == (whole.folder/o).read_bytes(), o


def test_an_unfinished_run_is_found_behind_a_gap(again):
    "Somebody has deleted the folders before it."
    home = again.root/'results'/'p'
    (home/'g').rename(home/'g_7')
    (home/'g_007').mkdir()
    assert again().folder == home/'g_7'


@forks
@pytest.mark.parametrize('path', ['data/../data', 'link'])
def test_the_same_data_by_another_path_is_the_same(again, monkeypatch, path):
    monkeypatch.chdir(again.root)
    Path('link').symlink_to('data')
    done = run(small(), both(Path(path)), 'results', 'p', 'g', report=False, resume=True)
    assert done.done_before == 1


def test_of_several_the_last_at_work_goes_on(again):
    "Its number need not be the highest, since new runs fill gaps."
    home = again.root/'results'/'p'
    shutil.copytree(home/'g', home/'g_5')
    os.utime(home/'g_5'/'run.json', (1, 1))
    assert again().folder == home/'g'


def test_a_run_whose_outputs_are_removed_still_says_what_was_skipped(tmp_path, monkeypatch):
    data = make_miniature(tmp_path/'data', n_train=4)
    tile = load_category('mvtec', data, 'tile')
    broken = tile.train[0].path
    broken.write_bytes(broken.read_bytes()[:1000])
    def removes(*args, real=experiment.check_outputs):
        shutil.rmtree(args[0]/'scores')
        return real(*args)
    monkeypatch.setattr(experiment, 'check_outputs', removes)
    with pytest.warns(UserWarning, match='cannot be read'), pytest.raises(DataError, match='are missing'): run(small(), [tile], tmp_path/'r', report=False, on_error='skip')
    state = json.loads(next(tmp_path.rglob('run.json')).read_text())
    assert [o['image'] for o in state['skipped']] == [broken.as_posix()] and not state['complete']


def test_a_folder_is_judged_into_by_one(tmp_path):
    with Lock(tmp_path), pytest.raises(DataError, match='in use'): judge_saved([lambda: 0], [load_category('mvtec', make_miniature(tmp_path/'data'), 'tile')], tmp_path)


def race(folder, start, wins):
    start.wait()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            Lock(folder).take()
        wins.put(os.getpid())
        time.sleep(2) # alive, until all have tried
    except DataError: wins.put(None)


@forks
@pytest.mark.parametrize('left', [False, True])
def test_one_of_many_wins(tmp_path, left):
    "Of processes that begin together, also where all find the lock of a dead one."
    context = multiprocessing.get_context('fork')
    for i in range(4):
        folder = tmp_path/str(i)
        folder.mkdir()
        if left: leave_lock(folder, pid=999_999_999)
        start, wins = context.Barrier(5), context.Queue()
        crowd = [context.Process(target=race, args=(folder, start, wins)) for _ in range(5)]
        for o in crowd: o.start()
        found = [wins.get(timeout=60) for _ in crowd]
        for o in crowd: o.kill()
        for o in crowd: o.join()
        assert len([o for o in found if o]) == 1


# A folder is whole from its first moment

def begin_and_die(home, n):
    "Begin a run, and die before the operation on files number n."
    count = iter(range(10**6))
    def die(event, args):
        is_change = event in ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.link') or event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wxa+')
        if is_change and str(home) in str(args[0]) and next(count) == n: os._exit(9)
    sys.addaudithook(die)
    with new_folder(home, 'p', 'g', dict(settings={}, complete=False, metrics={})): os._exit(0)


@forks
def test_a_kill_at_the_start_leaves_no_empty_group(tmp_path):
    context = multiprocessing.get_context('fork')
    for n in range(100):
        home = tmp_path/str(n)
        p = context.Process(target=begin_and_die, args=(home, n))
        p.start()
        p.join()
        group = home/'p'/'g'
        assert not group.exists() or (group/'run.json').is_file(), n
        if p.exitcode == 0: break
        with new_folder(home, 'p', 'g') as folder: assert folder.name == ('g_0' if group.exists() and folder != group else 'g')
        assert not [o for o in (home/'p').iterdir() if '.tmp-' in o.name]
    assert n > 5


# What has changed is said

def touched(path): os.utime(path, (1, 1))


@pytest.mark.parametrize('where', ['train/good/001.png', 'test/spot/000.png', 'ground_truth/spot/000_mask.png'])
def test_an_image_or_mask_that_was_changed_is_named(again, where):
    touched(again.root/'data'/'tile'/where)
    with pytest.raises(ArgumentError, match=f"tile/{where} .* bytes of .* -> .* bytes of 1970.*pass resume='anyway'"): again()
    with pytest.warns(UserWarning, match=where): assert again('anyway').done_before == 1


def test_images_that_came_and_went_are_named(again):
    folder = again.root/'data'/'tile'/'train'/'good'
    shutil.copy(folder/'001.png', folder/'more.png')
    with pytest.raises(ArgumentError, match='more.png none -> '): again()
    (folder/'more.png').unlink()
    (folder/'001.png').unlink()
    with pytest.raises(ArgumentError, match='001.png .* -> none'): again()


def test_what_is_not_done_may_change(again):
    touched(again.root/'data'/'second'/'train'/'good'/'001.png')
    (again.root/'data'/'second'/'train'/'good'/'002.png').unlink()
    assert again().done_before == 1


def test_all_that_differs_is_one_line(again, monkeypatch, capfd):
    touched(again.root/'data'/'tile'/'train'/'good'/'001.png')
    real = resume.versions()
    monkeypatch.setattr(resume, 'versions', lambda: real | dict(torch='9.9.1', patchcore_nb='7.0'))
    monkeypatch.setattr(resume, 'devices_of', lambda model: 'cuda')
    status, lines = call(command(again.root, '--resume'), capfd)
    assert status == 2 and len(lines) == 1
    for o in ("patchcore_nb '", "-> '7.0'", "-> '9.9'", "device 'cpu' -> 'cuda'", '001.png', 'pass --resume_anyway', 'or no --resume'): assert o in lines[0]
    status, lines = call(command(again.root, '--resume_anyway'), capfd)
    assert status == 0 and 'going on all the same' in lines[0]


def test_other_weights_are_named(tmp_path, monkeypatch):
    data = make_miniature(tmp_path/'data', n_train=4)
    tile = [load_category('mvtec', data, 'tile'), load_category('mvtec', data, 'tile')]
    tile[1] = replace(tile[1], name='second', train=tile[1].train[:3])
    def model(): return small().set_params(backbone='resnet18', weights_dir=tmp_path/'w')
    import torchvision
    (tmp_path/'w').mkdir()
    def write(seed):
        torch.manual_seed(seed)
        torch.save(torchvision.models.resnet18().state_dict(), tmp_path/'w'/'resnet18.pth')
    write(0)
    real = experiment.one_category
    monkeypatch.setattr(experiment, 'one_category', lambda m, o, *a: (_ for _ in ()).throw(DataError('dies')) if o.name == 'second' else real(m, o, *a))
    with pytest.raises(DataError, match='dies'): run(model(), tile, tmp_path/'r', report=False)
    write(1)
    with pytest.raises(ArgumentError, match='weights_sha256'): run(model(), tile, tmp_path/'r', report=False, resume=True)
    write(0) # the same content, at another time
    with pytest.raises(DataError, match='dies'): run(model(), tile, tmp_path/'r', report=False, resume=True)


def test_a_run_that_was_asked_for_something_else_is_passed_over_with_a_line(again):
    with pytest.warns(UserWarning, match=r'g is unfinished, but was asked for something else \(model.ratio 0.1 -> 0.2\): a new run begins'): done = again(ratio=.2)
    assert done.folder.name == 'g_0' and done.done_before == 0


def test_resume_swallows_no_argument(again, capfd):
    "The flag, wherever it stands, leaves its neighbours alone."
    words = command(again.root)
    i = words.index(str(again.root/'results'))
    assert call([*words[:i], '--resume', *words[i:]], capfd)[0] == 0
    assert len(list((again.root/'results').rglob('run.json'))) == 1


# What is missing in the end

@pytest.mark.parametrize('gone', ['models', 'scores', 'segmentation_images'])
def test_what_was_removed_meanwhile_is_missed(tmp_path, monkeypatch, gone):
    data = make_miniature(tmp_path/'data', n_train=4)
    shutil.copytree(data/'tile', data/'second')
    real = experiment.write_state
    def clear(folder, asked, done, complete, **how):
        real(folder, asked, done, complete, **how)
        if len(done) == 1 and not how: # after the first category, and not once more at the end
            shutil.rmtree(folder/gone, ignore_errors=True)
    monkeypatch.setattr(experiment, 'write_state', clear)
    def go(**more): return run(small(), both(data), tmp_path/'r', report=False, save_model=True, pictures=True, model_format='ours', **more)
    with pytest.raises(DataError, match=f'{gone}.*mvtec_tile.* missing: somebody has removed them'): go()
    folder = tmp_path/'r'/'project'/'group'
    table = (folder/'results.csv').read_bytes()
    assert b'mvtec_tile' in table and b'mvtec_second' in table
    monkeypatch.setattr(experiment, 'write_state', real)
    done = go(resume=True)
    assert done.done_before == 1 and done.folder == folder
    assert sorted((folder/'results.csv').read_bytes().split()) == sorted(table.split())


# A cache whose disk is full

@pytest.mark.skipif(os.name == 'nt', reason='Windows has no such limit')
def test_a_full_cache_is_said_once_and_gone_without(tmp_path, capfd):
    import resource
    shutil.copytree(make_miniature(tmp_path/'data', n_train=4)/'tile', tmp_path/'data'/'second')
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, usual[1])) # bytes of any file: an image's embeddings take more
    words = [o if o != '16' else '128' for o in command(tmp_path, '--cache', tmp_path/'kept')]
    try: status, lines = call(words, capfd)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert status == 0 and len([o for o in lines if 'no room is left for the cache' in o]) == 1, lines
    assert not [o for o in tmp_path.rglob('kept/*/*.safetensors') if o.stat().st_size > 20_000] and not [*tmp_path.rglob('*.tmp-*')]


# Ctrl-C from the first moment on

@pytest.mark.skipif(os.name == 'nt', reason='Windows sends it otherwise')
@pytest.mark.parametrize('after', [0, .01, .03, .06, .1, .2, .4, .8, 1.2, 1.6])
def test_ctrl_c_while_a_program_is_loaded(tmp_path, after):
    code = '''
from patchcore_nb import start
real = start.importlib.import_module
def loud(name):
    start.importlib.import_module = real
    print('begins', flush=True)
    return real(name)
start.importlib.import_module = loud
start.run()
'''
    words = f'--gpu -1 {tmp_path}/r patch_core -b filterbank -le layer2 sampler -p .5 greedy_coreset dataset -d cog demo {tmp_path}/data'
    p = subprocess.Popen([sys.executable, '-c', code, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.readline()
    time.sleep(after)
    p.send_signal(2)
    said = p.communicate()[1]
    assert p.returncode == 130 and 'Traceback' not in said and said.splitlines()[-1].startswith('interrupted'), said


# Threads

def test_threads_are_those_that_were_asked_for(tmp_path, monkeypatch, capfd):
    shutil.copytree(make_miniature(tmp_path/'data', n_train=4)/'tile', tmp_path/'data'/'second')
    before = torch.get_num_threads()
    seen, drawing = set(), set()
    forward, ahead, judged = embedder.Embedder.forward, results.read_ahead, rounds.Trial
    monkeypatch.setattr(embedder.Embedder, 'forward', lambda *a, **kw: seen.add(torch.get_num_threads()) or forward(*a, **kw))
    monkeypatch.setattr(results, 'read_ahead', lambda f, jobs, n, depth: drawing.add(n) or ahead(f, jobs, n, depth))
    monkeypatch.setattr(rounds, 'Trial', lambda *a: seen.add(torch.get_num_threads()) or judged(*a))
    status, lines = call(command(tmp_path, '--num_threads', before+2, '--save_segmentation_images'), capfd)
    assert status == 0, lines
    assert seen == drawing == {before+2} and torch.get_num_threads() == before


def test_threads_change_no_score():
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)).numpy().transpose(1, 2, 0) for i in range(6)]
    images = [(255*o).astype('uint8') for o in images]
    scores = [small(num_threads=n).fit(images[:4]).predict(images).image_scores for n in (None, 1, 3)]
    for o in scores[1:]: assert torch.allclose(o, scores[0], rtol=1e-4)


def test_threads_that_read_are_alone():
    "A reader has no further torch threads of its own."
    assert set(read_ahead(lambda i: torch.get_num_threads(), range(8), 2, 4)) == {1}


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    for name, said in (('process_cpu_count', lambda: 3), ('sched_getaffinity', lambda pid: {0, 5, 7})):
        monkeypatch.setattr(os, name, said, raising=False)
        assert own_cores() == 3
        monkeypatch.delattr(os, name)
    monkeypatch.delattr(os, 'process_cpu_count', raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: None)
    assert own_cores() == 1
