"Tasks: what is done by processes is what is done here, also where one of them dies."
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import psutil
import pytest

from patchcore_nb.base import ArgumentError, DataError
from patchcore_nb.categories import Category
from patchcore_nb.cli import main
from patchcore_nb.data import load_category
from patchcore_nb.demo import DEMO_CATEGORIES
from patchcore_nb.experiment import run
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.results import with_row
from patchcore_nb.seeds import run_seeds
from patchcore_nb.tasks import TRIES, Local, Processes, ended


def die(note, times, seconds=0):
    "Kill this process so many times; a letter in a file for each."
    with open(note, 'a', encoding='utf-8') as f: f.write('x')
    if os.path.getsize(note) <= times: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    return os.path.getsize(note)

def slow(i):
    time.sleep(.05*i)
    return i

@pytest.fixture(scope='module')
def pool():
    with Processes(2, threads=1) as pool: yield pool


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no such signal here')
def test_a_task_whose_process_was_killed_is_done_again(pool, tmp_path):
    jobs = [(tmp_path/'note', 1)]+[(tmp_path/f'other{i}', 0) for i in range(4)]
    assert {o.number: o.future.result() for o in ended(pool, die, jobs)}[0] == 2
    assert pool.submit(slow, 0).result() == 0

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no such signal here')
def test_one_that_always_dies_is_given_up(pool, tmp_path):
    jobs = [(tmp_path/'note', 99), *((tmp_path/f'sound{i}', 0, .3) for i in range(3))]
    found = {o.number: o.future for o in ended(pool, die, jobs)}
    assert 'terminated' in str(found[0].exception()) and os.path.getsize(tmp_path/'note') == TRIES
    assert all(found[i].result() for i in (1, 2, 3)) # its neighbours are not given up with it

def test_a_pool_that_breaks_for_good_loses_no_answer(tmp_path):
    with ProcessPoolExecutor(1, get_context('spawn')) as plain:
        found = {o.number: o.future for o in ended(plain, die, [(tmp_path/'sound', 0), (tmp_path/'note', 99)])}
    assert found[0].result() == 1 and isinstance(found[1].exception(), BrokenExecutor)

def test_whoever_stops_asking_leaves_no_task_behind(tmp_path):
    with Processes(2, threads=1) as pool:
        tasks = ended(pool, die, [(tmp_path/'a', 0), (tmp_path/'b', 0, 60)])
        next(tasks)
        start = time.monotonic()
        tasks.close()
        assert time.monotonic()-start < 20 and pool.submit(slow, 0).result() == 0

def test_all_are_done_whatever_the_order(pool):
    for executor in (Local(), pool):
        found = {o.number: o.future.result() for o in ended(executor, slow, [(3-i,) for i in range(4)])}
        assert found == {0: 3, 1: 2, 2: 1, 3: 0}

def test_no_more_are_handed_in_than_can_be_at_work():
    class Counting(Local):
        at_once, taken = 2, 0
        def submit(self, *args):
            self.taken += 1
            return super().submit(*args)
    counting = Counting()
    for i, _ in enumerate(ended(counting, slow, [(0,)]*7)): assert counting.taken <= i+3
    assert counting.taken == 7

def test_a_fresh_model_travels_without_a_backbone():
    model = PatchCore('resnet18', weights='random', device='cpu').check()
    assert len(pickle.dumps(model.fresh())) < 10_000


# Runs

@pytest.fixture(scope='module')
def few(tmp_path_factory):
    "Two categories of few images."
    found = [load_category('demo', tmp_path_factory.mktemp('data'), o) for o in DEMO_CATEGORIES[:2]]
    return [Category(o.dataset, o.name, o.train[:8], o.test[::4]) for o in found]

def small(**kw): return PatchCore('filterbank', ratio=.05, target_dim=64, resize=64, imagesize=64, device='cpu', num_threads=1, num_workers=0, **kw)

def files_of(folder):
    "What a run left, but for the times in the report."
    left = [o for o in sorted(folder.rglob('*')) if o.is_file() and o.name not in ('report.html', 'run.json') and o.parent.name != 'report']
    return {o.relative_to(folder).as_posix(): o.read_bytes() for o in left}

@pytest.fixture(scope='module')
def here(few, tmp_path_factory):
    results = tmp_path_factory.mktemp('here')
    return run(small(), few, results, 'p', 'g', save_model=True, pictures=True, model_format='ours')

def at_work(pid):
    "The processes of a pool that are in the middle of something."
    def busy(o):
        try: return o.cpu_times().user > 1.5 and 'spawn_main' in ' '.join(o.cmdline())
        except psutil.Error: return False
    return [o for o in psutil.Process(pid).children(recursive=True) if busy(o)]

def killed_meanwhile(stop, killed):
    "Kill a process of the pool in the middle of its task."
    while not stop.wait(.01):
        if found := at_work(os.getpid()):
            found[0].kill()
            killed.append(found[0].pid)
            return

@pytest.mark.parametrize('kill', [False, True])
def test_a_run_by_processes_leaves_the_same_bytes(few, here, tmp_path, kill):
    stop, killed = threading.Event(), []
    watcher = threading.Thread(target=killed_meanwhile, args=(stop, killed))
    if kill: watcher.start()
    try:
        with Processes(2, threads=1) as pool: there = run(small(), few, tmp_path, 'p', 'g', save_model=True, pictures=True, model_format='ours', executor=pool)
    finally: stop.set()
    if kill: assert killed
    want, found = files_of(here.folder), files_of(there.folder)
    assert want.keys() == found.keys()
    assert not [k for k in want if want[k] != found[k]]
    assert there.report.equals(here.report)
    assert 'demo_cog' not in (there.folder/'report.html').read_text(encoding='utf-8') # which was not among them
    assert all(o.key in (there.folder/'report.html').read_text(encoding='utf-8') for o in few)

def test_one_that_fails_is_named_and_the_others_are_kept(few, tmp_path, pool):
    broken = Path(few[0].test[0].path)
    whole = broken.read_bytes()
    broken.write_bytes(whole[:len(whole)//2])
    try:
        with pytest.raises(DataError, match=rf'1 of 2 categories could not be done: {few[0].key}: .*cannot be read.*what else was asked for is done .1.'):
            run(small(), few, tmp_path, 'p', 'g', executor=pool)
    finally: broken.write_bytes(whole)
    done = run(small(), few, tmp_path, 'p', 'g', executor=pool, resume=True)
    assert (done.folder.name, done.done_before, list(done.report.index)) == ('g', 1, [*(o.key for o in few), 'Mean'])
    want = run(small(), few, tmp_path, 'p', 'here')
    assert files_of(done.folder).keys() == files_of(want.folder).keys()
    assert [(done.folder/o).read_bytes() == (want.folder/o).read_bytes() for o in ('results.csv', 'metrics.csv', 'intervals.csv', 'kinds.csv')] == [True]*4

def test_columns_do_not_depend_on_who_comes_first():
    rows = dict(a=dict(x=1., missed=2.), b=dict(x=3., y=4., missed=5.))
    for keys in ('ab', 'ba'):
        table = pd.DataFrame()
        for k in keys: table = with_row(table, k, rows[k], ['a', 'b'])
        assert (list(table), list(table.index)) == (['x', 'missed', 'y'], ['a', 'b'])

def test_warnings_are_passed_on(few, tmp_path, pool):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        run(small(), [Category(few[0].dataset, few[0].name, few[0].train, few[0].test[:3])], tmp_path, executor=pool)
    assert any(str(o.message).startswith(f'{few[0].key}: ') and 'are all' in str(o.message) for o in heard)

def test_warnings_of_one_that_fails_are_passed_on(few, tmp_path, pool):
    broken = Path(few[0].test[2].path)
    whole = broken.read_bytes()
    found = Category(few[0].dataset, few[0].name, few[0].train, few[0].test[:3])
    broken.write_bytes(whole[:len(whole)//2])
    try:
        with warnings.catch_warnings(record=True) as heard, pytest.raises(DataError, match='1 of 1 categories could not be done'):
            warnings.simplefilter('always')
            run(small().set_params(resize=128), [found], tmp_path, executor=pool)
    finally: broken.write_bytes(whole)
    assert any('the network sees' in str(o.message) and few[0].key in str(o.message) for o in heard)

def test_a_share_of_the_memory_that_is_too_small_is_refused_before_the_work(few, tmp_path, pool):
    def fits(budget):
        try: return small(memory_budget=budget).plan(len(few[0].train), len(few[0].test))
        except ArgumentError: return None
    least = next(2**i for i in range(20, 34) if fits(2**i))
    with pytest.raises(ArgumentError, match=f'{few[0].key}, with one of 2 shares of the memory: .*too small.*for each share; or do fewer at a time'):
        run(small(memory_budget=least), few, tmp_path, executor=pool)
    run(small(memory_budget=least), few[:1], tmp_path, executor=pool) # alone it has all of it

def test_seeds_by_processes(few, tmp_path, pool):
    want = run_seeds(small(), lambda _: few, [0, 1], tmp_path, 'p', 'here')
    found = run_seeds(small(), lambda _: few, [0, 1], tmp_path, 'p', 'there', executor=pool)
    assert found.report.equals(want.report) and files_of(found.folder) == files_of(want.folder)


# The command line

PROGRAM = 'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from patchcore_nb.cli import main; main(sys.argv[1:])'

def words(results, data, *more):
    return [*more, '--gpu', '-1', str(results), 'patch_core', '-b', 'filterbank', '-le', 'layer2', 'sampler', '-p', '0.01', 'approx_greedy_coreset',
            'dataset', '--resize', '64', '--imagesize', '64', '-d', DEMO_CATEGORIES[0], '-d', DEMO_CATEGORIES[1], 'demo', str(data)]

@pytest.fixture(scope='module')
def data(few): return few[0].train[0].path.parents[3]

def test_the_command_by_processes(data, tmp_path):
    found = {}
    for on in ('local', 'processes'):
        threads = '--num_threads' if on == 'local' else '--cpus_per_task'
        line = words(tmp_path/on, data, '--on', on, threads, '1')
        out = subprocess.run([sys.executable, '-c', PROGRAM, *line], capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        found[on] = files_of(tmp_path/on)
    assert found['local'] == found['processes']

def test_a_thread_count_for_nobody_is_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as left: main(words(tmp_path, data, '--cpus_per_task', '2'))
    assert left.value.code == 2 and '--on processes' in capsys.readouterr().err

@pytest.mark.skipif(os.name == 'nt', reason='Windows has no such signal')
def test_processes_end_with_the_one_that_they_work_for(data, tmp_path):
    run = subprocess.Popen([sys.executable, '-c', PROGRAM, *words(tmp_path, data, '--on', 'processes')], stderr=subprocess.DEVNULL)
    deadline = time.monotonic()+60
    while not (theirs := at_work(run.pid)): assert time.monotonic() < deadline and run.poll() is None
    run.kill()
    run.wait()
    assert not psutil.wait_procs(theirs, timeout=20)[1]

@pytest.mark.skipif(os.name == 'nt', reason='Windows has no such signal')
def test_ctrl_c_ends_the_processes_too(data, tmp_path):
    run = subprocess.Popen([sys.executable, '-c', PROGRAM, *words(tmp_path, data, '--on', 'processes')], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic()+60
    while not (theirs := at_work(run.pid)): assert time.monotonic() < deadline and run.poll() is None
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and 'interrupted: --resume goes on with this run' in said and 'Traceback' not in said
    assert not psutil.wait_procs(theirs, timeout=20)[1]
