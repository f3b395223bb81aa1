"The benchmarks: every script runs, says what it measured, and has its results in the repository and on the page."
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patchcore_nb.core import generator
from patchcore_nb.samplers import farthest_points, shortfall, start_mean

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT/'benchmarks'
SCRIPTS = sorted(p.stem for p in BENCH.glob('*.py') if p.stem != 'common')
QUICK = [o for o in SCRIPTS if "'--quick'" in (BENCH/'common.py').read_text(encoding='utf-8') and 'options(__doc__)' in (BENCH/f'{o}.py').read_text(encoding='utf-8')]


def check_rows(rows):
    "Every row says what, and against what; a row that is its own baseline has the ratio 1."
    assert rows
    for r in rows:
        assert r['what'] and r['seconds'] > 0 and math.isfinite(r['ratio']) and r['ratio'] > 0
        if r['baseline'] == r['what']: assert r['ratio'] == 1

@pytest.mark.parametrize('name', QUICK)
def test_scripts_run(name, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'PATCHCORE_NB_TESTDATA'}
    if name == 'memory' and not Path('/proc/self/status').exists(): pytest.skip('reads /proc')
    out = subprocess.run([sys.executable, str(BENCH/f'{name}.py'), '--quick', '--out', str(tmp_path)], capture_output=True, text=True, encoding='utf-8', env=env)
    assert out.returncode == 0, out.stderr
    found = json.loads((tmp_path/f'{name}.json').read_text(encoding='utf-8'))
    assert found['quick'] and found['what'] in out.stdout and found['machine']['torch'] in torch.__version__
    check_rows(found['rows'])

def test_there_is_something_to_run(): assert {'coreset', 'search', 'embedding', 'pipeline', 'growth', 'memory', 'sweep', 'pictures', 'evaluation', 'scores', 'relative', 'contamination', 'busy', 'backbones', 'learning', 'engines', 'peers'} == set(QUICK)


@pytest.mark.parametrize('name', sorted(SCRIPTS))
def test_results_are_at_hand(name):
    found = json.loads((BENCH/'results'/f'{name}.json').read_text(encoding='utf-8'))
    assert found['what'] and not found.get('quick'), f'results/{name}.json is of a quick run, whose numbers mean nothing: run `make bench`'
    if name in QUICK: check_rows(found['rows'])

def test_no_results_without_a_script(): assert {p.stem for p in (BENCH/'results').iterdir()} == {*SCRIPTS}

def test_results_name_no_machine():
    for path in (BENCH/'results').glob('*.json'):
        machine = json.loads(path.read_text(encoding='utf-8')).get('machine', {})
        assert set(machine) <= {'cpu', 'cores', 'threads', 'gpu', 'system', 'python', 'torch'}
        assert not re.search(r'(?<![\w.~])/(?:home|Users|root|work|tmp)/\w', path.read_text(encoding='utf-8'))

def test_make_bench_runs_them_all():
    recipes = re.findall(r'^(?:bench|peers):.*\n((?:\t.*\n)+)', (ROOT/'Makefile').read_text(encoding='utf-8'), re.MULTILINE)
    assert sorted(re.findall(r'benchmarks/(\w+)\.py', ''.join(recipes))) == SCRIPTS

def test_the_page_shows_them_all():
    text = (ROOT/'nbs'/'benchmarks.ipynb').read_text(encoding='utf-8')
    assert not [o for o in sorted(SCRIPTS) if f"'{o}'" not in text]


def test_the_certificate(monkeypatch):
    "It is the shortfall, and finds the picks that are wrong."
    monkeypatch.syspath_prepend(BENCH)
    bench = runpy.run_path(str(BENCH/'coreset.py'))
    bank = bench['clusters'](2000, 64)
    start = start_mean(bank, torch.randperm(2000, generator=generator(0))[:10])
    idxs = farthest_points(bank, 300, start).idxs
    wrong = idxs.clone()
    wrong[[40, 250]] = idxs[[250, 40]]
    for picks in (idxs, wrong, torch.randperm(2000, generator=generator(1))[:300]):
        assert bench['certificate'](bank, picks, start) == pytest.approx(shortfall(bank, picks, start), rel=1e-3, abs=1e-7)
    assert bench['certificate'](bank, idxs, start) < 1e-4 < bench['certificate'](bank, wrong, start)
