"The campaigns, which are run by hand: they run, they see what they look for, and what they found is in the repository and on the page."
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patchcore_nb.core import DataError

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT/'tests'/'campaigns'
sys.path.insert(0, str(HOME))
import attempts  # noqa: E402
from attempts import End  # noqa: E402

NAMES = sorted(o.stem for o in HOME.glob('*.py') if 'attempts.arguments(' in o.read_text(encoding='utf-8'))
FEW = dict(models='--n 10', images='--n 16', kills='--every 90', names='--n 1')
linux = pytest.mark.skipif(not Path('/proc/self/status').exists() or not hasattr(os, 'fork'), reason='forks, and reads /proc')


def refuse(job): raise DataError(job)

def grow(job):
    held = b'x'*(200 << 20)
    return End(f'well {len(held) >> 20}')

def write(job):
    open(job, 'w').close()
    return End('well')

def execute(job):
    exec('1')
    return End('well')

def start(job):
    subprocess.Popen(['true'])
    return End('well')

def crash(job): os.kill(os.getpid(), signal.SIGSEGV)
def sleep(job): time.sleep(60)
def fail(job): return 1/0

@linux
@pytest.mark.parametrize('work, job, what', [(refuse, 'a.json is damaged', 'refused'), (refuse, 'two\nlines', 'LONG ERROR'), (fail, 'x', 'RAISED'), (crash, 'x', 'SIGNAL'), (sleep, 'x', 'HANG'), (execute, 'x', 'RAN CODE'), (start, 'x', 'RAN CODE'), (grow, 'x', 'MEMORY'), (write, '{}/x', 'RAN CODE')], ids=lambda o: getattr(o, '__name__', None))
def test_a_campaign_sees_what_it_looks_for(tmp_path, work, job, what):
    "Each by a case that does it."
    (_, end), = attempts.in_children(work, [job.format(tmp_path)], seconds=1 if work is sleep else 60)
    end = attempts.too_much(end, 10 << 20)
    assert end.what == what and end.is_bad == (what != 'refused'), end

@linux
@pytest.mark.parametrize('name', NAMES)
def test_campaigns_run(name):
    done = subprocess.run([sys.executable, str(HOME/f'{name}.py'), '--dry', *FEW[name].split()], capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 0 and '0 did not hold' in done.stdout, done.stdout+done.stderr

@pytest.mark.parametrize('name', NAMES)
def test_what_they_found_is_at_hand(name):
    "Nothing that did not hold, and no machine's path."
    text = (HOME/'results'/f'{name}.json').read_text(encoding='utf-8')
    found = json.loads(text)
    assert found['command'].startswith(f'python tests/campaigns/{name}.py') and not found['did_not_hold']
    assert not [o for ends in found['figures'].values() for o in ends if o.isupper()]
    assert not re.search(r'(?<![\w.~])/(?:home|Users|root|work|tmp)/\w', text)

def test_no_results_without_a_campaign(): assert {o.stem for o in (HOME/'results').iterdir()} == set(NAMES)

def test_the_page_shows_them_all():
    text = (ROOT/'nbs'/'tried.ipynb').read_text(encoding='utf-8')
    assert not [o for o in NAMES if f"found('{o}')" not in text]
