"""What a run does when it is asked to end: a line that says how to go on, and the status of the signal."""
import os
import signal
import subprocess
import sys

import pytest

from patchcore_nb.demo import make_demo

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='Windows has no such signals')

PROGRAM = '''
import os, signal, sys
import patchcore_nb.cli as cli
ignored, number = (int(o) for o in sys.argv[1:3])
usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL # whatever the tests are run under: nohup, a background
signal.signal(number, signal.SIG_IGN if ignored else usual)
import patchcore_nb.embedder as embedder
forward = embedder.Embedder.forward
def asked(self, *args, **kw): # the signal comes while images are embedded
    os.kill(os.getpid(), number)
    return forward(self, *args, **kw)
embedder.Embedder.forward = asked
cli.main(sys.argv[3:])
'''


def run(data, results, number, ignored=False, *more, program=PROGRAM):
    words = ['--gpu', '-1', '--no_report', *more, str(results), 'patch_core', '-b', 'filterbank', '-le', 'layer2', 'sampler', '-p', '0.01', 'approx_greedy_coreset',
             'dataset', '--resize', '64', '--imagesize', '64', '-d', 'cog', 'demo', str(data)]
    return subprocess.run([sys.executable, '-c', program, str(int(ignored)), str(int(number)), *words], capture_output=True, text=True)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('signals')
    make_demo(root, 'cog')
    return root


def test_a_signal_that_comes_where_nothing_can_be_raised_is_not_lost(data, tmp_path):
    program = PROGRAM.replace("    os.kill(os.getpid(), number)\n    return", """    class Last:
        def __del__(self): os.kill(os.getpid(), number) # what is raised here, Python passes over
    Last()
    return""")
    assert program != PROGRAM
    done = run(data, tmp_path/'r', signal.SIGINT, program=program)
    assert done.returncode == 130 and 'Exception ignored' not in done.stderr, done.stderr


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (getattr(signal, 'SIGHUP', 1), 129)])
def test_a_signal_ends_a_run(data, tmp_path, number, status):
    done = run(data, tmp_path/'r', number)
    assert done.returncode == status, done.stderr
    assert 'interrupted: --resume goes on with this run' in done.stderr and 'Traceback' not in done.stderr
    assert not [o for o in tmp_path.rglob('*.tmp-*')]


def test_nohup_is_obeyed(data, tmp_path):
    done = run(data, tmp_path/'r', signal.SIGHUP, True)
    assert done.returncode == 0, done.stderr
