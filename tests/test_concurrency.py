"Settings of the process end as they began, and shares of work come to their end, however calls overlap."
import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from patchcore_nb.concurrency import full_precision, in_new_thread, in_threads, limit_threads, set_own_threads
from patchcore_nb.core import generator
from patchcore_nb.nearest import naive_neighbours, nearest_neighbours


@pytest.fixture(params=[2, 5])
def threads(request):
    "So many torch threads here and in new threads."
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)

def settings():
    "What must not change: here, in a new thread, in the process."
    return torch.get_num_threads(), in_new_thread(torch.get_num_threads), torch.backends.cudnn.allow_tf32

def nap(chance): time.sleep(chance.random()*.003)

def wander(seed):
    "Go in and out of all settings in some order, some inside others; tells what was not as it should be."
    chance, wrong = random.Random(seed), []
    own = torch.get_num_threads()
    def deeper(level, expected):
        for _ in range(2):
            nap(chance)
            n = chance.choice([1, 3, 4, 7, None])
            with limit_threads(n), full_precision():
                if torch.get_num_threads() != (n or expected): wrong.append(('inside', n, torch.get_num_threads()))
                if torch.backends.cudnn.allow_tf32: wrong.append('lower precision inside')
                if sum(in_threads(lambda share: share.stop-share.start, 500)) != 500: wrong.append('a share is missing')
                if level: deeper(level-1, n or expected)
            if torch.get_num_threads() != expected: wrong.append(('after', expected, torch.get_num_threads()))
    deeper(2, own)
    return wrong


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('allow', [True, False])
def test_settings_end_as_they_began(threads, seed, allow, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', allow)
    before = settings()
    with ThreadPoolExecutor(4) as pool: wrong = sum(pool.map(wander, range(seed*10, seed*10+8)), [])
    assert not wrong and settings() == before == (threads, threads, allow)

def test_a_thread_that_began_before_is_not_changed(threads):
    go, done, seen = threading.Event(), threading.Event(), []
    def other():
        seen.append(torch.get_num_threads())
        go.wait(10)
        seen.append(torch.get_num_threads())
        done.set()
    thread = threading.Thread(target=other)
    thread.start()
    with limit_threads(1):
        in_threads(lambda share: None, 1000)
        go.set()
        done.wait(10)
        assert in_new_thread(torch.get_num_threads) == threads # nor one that begins meanwhile
    thread.join()
    assert seen == [threads, threads]

def test_an_error_restores_all(threads):
    before = settings()
    with pytest.raises(ZeroDivisionError), limit_threads(1), full_precision(): 1/0
    with pytest.raises(ZeroDivisionError): in_threads(lambda share: 1/0, 1000)
    assert settings() == before

def test_own_threads(threads):
    assert in_new_thread(lambda: (set_own_threads(3), torch.get_num_threads())[1]) == 3
    assert settings()[:2] == (threads, threads)


def test_a_share_runs_on_one_thread(threads):
    found = in_threads(lambda share: (torch.get_num_threads(), threading.current_thread().name), 1000)
    assert len(found) == threads and {n for n, _ in found} == {1} and all(name.startswith('share') for _, name in found)

def test_all_callers_share_the_same_threads(threads):
    at_work, most, lock = set(), [], threading.Lock()
    def work(share):
        with lock:
            at_work.add(threading.get_ident())
            most.append(len(at_work))
        time.sleep(.002)
        with lock: at_work.discard(threading.get_ident())
    with ThreadPoolExecutor(6) as users: list(users.map(lambda i: in_threads(work, 1000), range(24)))
    assert max(most) <= threads and len(most) == 24*threads

def test_shares_may_share_with_a_limit_of_their_own(threads):
    def work(share):
        with limit_threads(4): return in_threads(lambda s: s.stop-s.start, share.stop-share.start)
    assert sum(sum(in_threads(work, 1000), [])) == 1000

def test_in_inference_mode_too(threads):
    with torch.inference_mode(): assert all(in_threads(lambda share: torch.is_inference_mode_enabled(), 1000))
    assert not any(in_threads(lambda share: torch.is_inference_mode_enabled(), 1000))

def forked(queue): queue.put((sum(in_threads(lambda share: share.stop-share.start, 1000)), in_new_thread(torch.get_num_threads)))

@pytest.mark.skipif(sys.platform != 'linux', reason='forks')
@pytest.mark.filterwarnings('ignore:.*fork')
def test_a_forked_process_has_threads_of_its_own(threads):
    with ThreadPoolExecutor(1) as other: # which sets its number all the time
        busy = [other.submit(set_own_threads, 1+i % 3) for i in range(20)]
        in_threads(lambda share: None, 1000) # the parent's threads are there
        context = multiprocessing.get_context('fork')
        queue = context.Queue()
        child = context.Process(target=forked, args=[queue])
        child.start()
        assert queue.get(timeout=60) == (1000, 1) # it works alone
        child.join(60)
        assert child.exitcode == 0 and not [o.result() for o in busy if o.result()]

FORKS = """
import multiprocessing, os, sys
import numpy as np, torch
from patchcore_nb.patchcore import PatchCore
images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
model = PatchCore(sys.argv[1], weights=sys.argv[2], imagesize=64, resize=64, target_dim=64, ratio=.5, device='cpu', num_threads=int(sys.argv[4]) or None).fit(images)
wanted = model.predict(images).image_scores
def ask(i=0): return torch.allclose(model.predict(images).image_scores, wanted, rtol=1e-5)
if sys.argv[3] == 'pool':
    with multiprocessing.get_context('fork').Pool(2) as pool: print(torch.get_num_threads(), all(pool.map_async(ask, range(3)).get(100)))
else:
    child = os.fork()
    if not child: os._exit(0 if ask() else 1)
    print(torch.get_num_threads(), os.waitpid(child, 0)[1] == 0)
"""

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this operating system cannot fork')
@pytest.mark.parametrize('backbone, weights, how, threads', [('filterbank', 'pretrained', 'fork', '0'), ('resnet18', 'random', 'pool', '0'), ('filterbank', 'pretrained', 'fork', '2')])
def test_a_forked_process_predicts(backbone, weights, how, threads):
    "The parent has used several threads, which the child does not have; it would wait for them for ever."
    with subprocess.Popen([sys.executable, '-W', 'ignore', '-c', FORKS, backbone, weights, how, threads], stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='2'), start_new_session=True) as run:
        try: assert run.communicate(timeout=300)[0] == '2 True\n'
        finally:
            with contextlib.suppress(ProcessLookupError): os.killpg(run.pid, signal.SIGKILL) # the child, too

def test_the_plain_product_in_threads(threads):
    "The same bits for any number of threads, also from several threads at once."
    rows, queries = (torch.randn(n, 24, generator=generator(n)) for n in (3000, 1100))
    with limit_threads(1): alone = nearest_neighbours(queries, rows, 3)
    with ThreadPoolExecutor(3) as users: found = list(users.map(lambda i: nearest_neighbours(queries, rows, 3), range(6)))
    assert all(torch.equal(a, b) for o in found for a, b in zip(o, alone))
    slow = naive_neighbours(queries[::50], rows, 3)
    assert torch.equal(alone[1][::50], slow[1])
