"Memory budgets: the plan, the spilled bank, what is left behind, and what a run really takes."
import dataclasses
import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import trapezoid

from patchcore_nb import budget, changes, combined, ensemble, experiment, fitting, judging, prediction
from patchcore_nb.cli import main
from patchcore_nb.core import ArgumentError, DataError
from patchcore_nb.data import load_category, make_miniature
from patchcore_nb.demo import demo_sample
from patchcore_nb.embedder import Embedder
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.intervals import is_metric
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.pixels import Tally

BENCH = Path(__file__).resolve().parents[1]/'benchmarks'
with pytest.MonkeyPatch.context() as m:
    m.syspath_prepend(BENCH) # its scripts share a module
    bench = SimpleNamespace(**runpy.run_path(str(BENCH/'memory.py')))
CORE = 'patch_core -b resnet18 -le layer2 -le layer3 --weights random --pretrain_embed_dimension 64 --target_embed_dimension 64 sampler -p 0.1 approx_greedy_coreset'
posix = pytest.mark.skipif(os.name != 'posix', reason='POSIX alone has files without names')
linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')


def small(**kw): return PatchCore('filterbank', ratio=.05, target_dim=64, imagesize=96, resize=96, device='cpu', **kw)

def large(**kw): return PatchCore('filterbank', ratio=.05, batch_size=1, device='cpu', **kw)

@pytest.fixture(scope='module')
def cogs(): return [demo_sample('cog', 'train', i)[0] for i in range(8)]

@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    "Run the command line on a miniature; status, standard error."
    monkeypatch.chdir(tmp_path)
    data = make_miniature(tmp_path/'data', n_train=6)
    def go(flags=''):
        with pytest.raises(SystemExit) as e: main(['--gpu', '-1', *flags.split(), 'results', *CORE.split(), *'dataset --imagesize 64 --resize 64 -d tile mvtec'.split(), str(data)])
        return e.value.code, capsys.readouterr().err.replace('\r', '\n')
    return go

def spilling(model, n): # bytes
    "The smallest budget that a fit on n images can have, which spills."
    plan = model.plan(n)
    assert plan.where == 'memory'
    return dataclasses.replace(plan, where='file').peak


# Plans

def test_a_budget_in_between_spills(tmp_path):
    least = spilling(large(), 40)
    plan = large(memory_budget=least, spill_dir=tmp_path).plan(40)
    assert plan.where == 'file' and plan.peak <= least < large().plan(40).peak and f'in {tmp_path}' in str(plan)
    with pytest.raises(ArgumentError, match='too small: about .* even with'): large(memory_budget=least-1).plan(40)

def test_errors_name_arguments():
    "The command line translates them; who calls from Python has no flags."
    load = budget.Load(209, 163_856, 1024, 16_385, 47*10**6, 50*10**6)
    with pytest.raises(ArgumentError, match='pass a memory_budget of .*MB, a smaller ratio or a smaller batch_size$') as e: budget.make_plan(load, '100MB')
    assert '--' not in str(e.value) and ' -p' not in str(e.value)

def test_without_a_budget_what_is_free_counts(cogs, monkeypatch):
    free = spilling(large(), 40)
    monkeypatch.setattr(budget, 'free_memory', lambda: free)
    assert large().plan(40).where == 'file'
    monkeypatch.setattr(budget, 'free_memory', lambda: free//2)
    with pytest.raises(DataError, match='close other programs'): large().fit(cogs)

def test_more_test_images_take_more(cogs):
    few, many = (small().plan(8, n_test=n) for n in (10, 10_000))
    assert many.peak-few.peak > 9000*96*96*4 and '8 images' in str(few)

def test_a_gpu_takes_the_bank(monkeypatch):
    "What is on the GPU does not count, and what it has no room for stays off it."
    load = budget.Load(209, 163_856, 1024, 16_385, 47*10**6, 50*10**6)
    for free, where in ((8*10**9, 'gpu'), (10**9, 'file')):
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free, free))
        assert budget.make_plan(load, '600MB', device='cuda').where == where

@pytest.mark.parametrize('files, left', [
    ({'memory.max': '1000\n', 'memory.current': '700\n', 'memory.stat': 'file 9\ninactive_file 150\n'}, 450), ({'memory.max': 'max\n', 'memory.current': '7'}, None),
    ({'memory/memory.limit_in_bytes': '1000', 'memory/memory.usage_in_bytes': '900', 'memory/memory.stat': 'inactive_file 1\ntotal_inactive_file 50'}, 150),
    ({'memory.max': '10', 'memory.current': '70', 'memory.stat': ''}, 0), ({'memory.max': '10', 'memory.current': ''}, None), ({}, None)])
def test_limits_of_containers(tmp_path, files, left):
    for name, text in files.items():
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(text)
    assert budget.container_free(tmp_path) == left


# Spilling

@pytest.mark.parametrize('sampler', ['approx_greedy_coreset', 'greedy_coreset', 'random', 'identity'])
def test_spilled_is_the_same(cogs, tmp_path, sampler):
    plain, tight = small(sampler=sampler), small(sampler=sampler, spill_dir=tmp_path)
    plan = dataclasses.replace(tight.plan(len(cogs)), where='file')
    plain.fit(cogs), tight.fit(cogs, plan=plan)
    for name in ('idxs_', 'anchor_dists_', 'memory_bank_', 'origin_'): assert torch.equal(getattr(plain, name).nan_to_num(), getattr(tight, name).nan_to_num()), name
    assert plain.radii_ == tight.radii_
    assert torch.equal(plain.predict(cogs[:3]).anomaly_maps, tight.predict(cogs[:3]).anomaly_maps)

@pytest.fixture
def no_room(monkeypatch):
    "A machine on which nothing but spilling is possible; what a miniature takes is too little to tell."
    def make(): monkeypatch.setattr(budget.Plan, 'peak', property(lambda self: 10**3 if self.where == 'file' else 10**12))
    return make

def test_command_line_spills_to_the_same_results(call, tmp_path, no_room):
    assert call()[0] == 0
    no_room()
    code, err = call('--memory_budget 1MB --log_group tight')
    said = [o for o in err.splitlines() if o.startswith('plan for mvtec_tile')]
    assert code == 0 and len(said) == 1 and 'spilled to a file in' in said[0] and 'tight' in said[0], err
    first, second = (tmp_path/'results'/'project'/o for o in ('group', 'tight'))
    assert (first/'results.csv').read_bytes() == (second/'results.csv').read_bytes()
    assert sorted(o.name for o in second.iterdir()) == sorted(o.name for o in first.iterdir())

@pytest.mark.parametrize('size, word', [('100MB', 'too small: about'), ('lots', 'pass 2GB'), ('-5', 'pass 2GB'), ('0', 'pass 2GB')])
def test_budgets_that_cannot_be(call, tmp_path, size, word):
    code, err = call(f'--memory_budget {size}')
    errors = [o for o in err.splitlines() if o.startswith('error: ')]
    assert code == 2 and len(errors) == 1 and word in errors[0] and 'memory_budget' in errors[0], err
    assert not (tmp_path/'results').exists()

def test_a_full_disk_is_one_line(call, tmp_path, monkeypatch, no_room):
    def full(*a): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(budget, '_reserve', full)
    no_room()
    code, err = call()
    errors = [o for o in err.splitlines() if o.startswith('error: ')]
    assert code == 1 and len(errors) == 1 and 'for the patch embeddings cannot be written (No space left' in errors[0] and 'free some space' in errors[0], err

LIMITED = '''
import resource, signal, sys
from patchcore_nb.core import DataError
from patchcore_nb.embedder import Embedder
from patchcore_nb.budget import spilled
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
try: spilled(1000, 1000, sys.argv[1])
except DataError as e: print(e)
'''

@posix
def test_a_file_that_may_not_grow(tmp_path):
    out = subprocess.run([sys.executable, '-c', LIMITED, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert 'a file of 4 MB for the patch embeddings cannot be written' in out and not list(tmp_path.iterdir())

def test_where_space_cannot_be_reserved_zeros_are_written(tmp_path, monkeypatch):
    monkeypatch.delattr(os, 'posix_fallocate', raising=False)
    bank = budget.spilled(5000, 1000, tmp_path)
    assert bank.shape == (5000, 1000) and not bank.any()

@posix
def test_nothing_is_left_after_an_error(cogs, tmp_path, monkeypatch):
    model = small(spill_dir=tmp_path)
    plan = dataclasses.replace(model.plan(len(cogs)), where='file')
    seen = []
    def break_off(self, items, word=''):
        seen.append(list(tmp_path.iterdir()))
        raise DataError('an image is broken')
        yield
    monkeypatch.setattr(Embedder, '__call__', break_off)
    with pytest.raises(DataError, match='is broken'): model.fit(cogs, plan=plan)
    assert seen == [[]] and not list(tmp_path.iterdir())

KILLED = '''
import sys, time
from patchcore_nb.budget import spilled
bank = spilled(1000, 1000, sys.argv[1]).fill_(1)
print('there', flush=True)
time.sleep(60)
'''

@posix
def test_nothing_is_left_after_a_kill(tmp_path):
    child = subprocess.Popen([sys.executable, '-c', KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'there\n'
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(.1)
    assert not list(tmp_path.iterdir())


# Measured

@linux
def test_a_plan_is_kept(demo_root, tmp_path):
    "In memory and in a file: no more than was planned, and the file saves what the bank takes."
    found = {}
    tail = f'patch_core -b filterbank -le layer2 -le layer3 sampler -p 0.05 approx_greedy_coreset dataset --batch_size 2 -d cog demo {demo_root}'.split()
    for name, flags in dict(free=[], tight=['--memory_budget', '340MB']).items():
        found[name] = bench.watch(['--gpu', '-1', '--log_group', name, *flags, 'results', *tail], tmp_path)
        found[name]['csv'] = (tmp_path/'results'/'project'/name/'results.csv').read_bytes()
    assert 'in memory' in found['free']['plan'] and 'spilled' in found['tight']['plan']
    assert found['tight']['csv'] == found['free']['csv']
    assert found['tight']['peak'] <= 340e6, found['tight']
    assert found['free']['peak'] <= planned(found['free']['plan']), found['free']

def planned(line): return budget.parse_size(line.split('peak about ')[1].split(' of ')[0])

@linux
def test_the_references_script(testdata, tmp_path, monkeypatch):
    "Its metrics and its files; 1.2 GB where there is room, 600 MB where there is not, and the same bytes in the next free folder."
    monkeypatch.setenv('PATCHCORE_NB_WEIGHTS', str(testdata/'weights'))
    script = f'''--save_patchcore_model --log_group G --log_project P {tmp_path} patch_core -b resnet18 -le layer2 -le layer3
        --pretrain_embed_dimension 1024 --target_embed_dimension 1024 --anomaly_scorer_num_nn 1 --patchsize 3
        sampler -p 0.01 approx_greedy_coreset dataset --resize 256 --imagesize 224 -d bottle mvtec {testdata}/data/mvtec256'''.split()
    for flags, most in (([], 1.2e9), (['--memory_budget', '600MB'], 600e6)):
        found = bench.watch(['--gpu', '-1', '--seed', '0', *flags, *script], tmp_path)
        assert found['peak'] <= min(most, 1.05*planned(found['plan'])), found # a plan says "about"
    first, second = (tmp_path/'P'/o/'results.csv' for o in ('G', 'G_0'))
    assert first.read_bytes() == second.read_bytes()
    row = pd.read_csv(first).iloc[0]
    assert row['Row Names'] == 'mvtec_bottle' and row['instance_auroc'] >= .998 and abs(row['full_pixel_auroc']-.9763) < .002
    assert sorted(p.name for p in (tmp_path/'P'/'G'/'models'/'mvtec_bottle').iterdir()) == ['model.json', 'model.safetensors', 'nnscorer_search_index.faiss', 'patchcore_params.pkl']


# Maps that memory does not hold

@pytest.fixture(scope='module')
def tile(tmp_path_factory): return load_category('mvtec', make_miniature(tmp_path_factory.mktemp('tiles'), n_train=6), 'tile')

def close(name): return dict(abs=1e-4) if is_metric(name) else dict(rel=1e-4) # a score is as fine as its bin

@pytest.mark.parametrize('members', [1, 2])
def test_counted_metrics_are_the_exact_ones(tile, tmp_path, members):
    "Metrics, kinds and intervals with the maps in a file, against all in memory; 1e-4 is the promise for metrics, and rows are coarser."
    kw = dict(spill_dir=tmp_path, false_alarms=.3) # a rate that six images allow
    model = Ensemble([small(seed=i, **kw) for i in range(members)]).fit(tile) if members > 1 else small(**kw).fit(tile)
    sorted_ = model.predict(tile.test)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fitting, 'too_many', lambda *args: True)
        m.setattr(judging, 'CHUNK', 3)
        counted = model.predict(tile.test)
        assert counted.counted and not sorted_.counted and torch.equal(counted.anomaly_maps, sorted_.anomaly_maps)
        trials = [judging.Trial(o, tile.test) for o in (sorted_, counted)]
        metrics = [o.metrics for o in trials]
        details = [(o.intervals, o.by_kind) for o in trials]
    assert trials[0].masks is not None and trials[1].masks is None and trials[1].curves
    assert metrics[0].keys() == metrics[1].keys() and 'seg_f1' in metrics[0]
    for k, v in metrics[0].items(): assert metrics[1][k] == pytest.approx(v, **close(k), nan_ok=True), k
    for a, b in zip(*details):
        assert list(a.index) == list(b.index)
        for k in a: assert b[k].tolist() == pytest.approx(a[k].tolist(), abs=5e-3, nan_ok=True), k
    assert not list(tmp_path.iterdir()) # the files have no names

def test_a_run_that_counts_writes_the_same_report(tile, tmp_path, monkeypatch):
    runs = [experiment.run(small(false_alarms=None), [tile], tmp_path, group='sorted', pictures=True)]
    monkeypatch.setattr(fitting, 'too_many', lambda *args: True)
    runs += [experiment.run(small(false_alarms=None), [tile], tmp_path, group='counted', pictures=True)]
    names = [sorted(p.relative_to(o.folder).as_posix() for p in o.folder.rglob('*') if p.is_file()) for o in runs]
    assert names[0] == names[1] and 'report.html' in names[0]
    a, b = (json.loads((o.folder/'report'/f'{tile.key}.json').read_text(encoding='utf-8')) for o in runs)
    assert a['pictures'] == b['pictures'] and a['curves']['image_roc'] == b['curves']['image_roc']
    for k, v in a['metrics'].items(): assert b['metrics'][k] == pytest.approx(v, **close(k)), k
    for k in ('pixel_roc', 'pro'): assert abs(trapezoid(*a['curves'][k][::-1])-trapezoid(*b['curves'][k][::-1])) < 5e-3

def test_the_plan_says_that_pixels_are_counted():
    many = small().plan(8, n_test=20_000)
    assert not many.counted
    tight = small(memory_budget='2GB').plan(8, n_test=20_000)
    assert tight.counted and tight.peak < 2*10**9 and 'their pixels counted' in str(tight)
    model = small(memory_budget='1GB').fit([demo_sample('cog', 'train', i)[0] for i in range(3)])
    fitted = model.fitted_
    assert [fitting.counts_maps(fitted.embedder, fitted.recipe, len(fitted.bank), n) for n in (20_000, 2000)] == [True, False]

def test_what_counted_images_leave_is_planned():
    "Their bins and quantiles are as many as the images."
    one, many = (small(memory_budget='20GB').plan(8, n_test=n).load for n in (20_000, 40_000))
    judge = [budget.stages(o, counted=True)['judge']['metrics'] for o in (one, many)]
    tally = Tally()
    rng = np.random.default_rng(0)
    for _ in range(20): tally.add(rng.gamma(2, 2, (1, 96, 96)).astype(np.float32), rng.random((1, 96, 96)) < .1)
    kept = sum(a.nbytes for o in tally.counted_.rows for a in o)+sum(o.nbytes for o in tally.counted_.sketches)
    assert kept/20 < (judge[1]-judge[0])/20_000 < 5*kept/20

@pytest.mark.parametrize('members', [2, 3])
def test_an_ensemble_has_one_set_of_maps(tile, monkeypatch, members):
    "However many members there are; and one more for what the reference would make of the set."
    made = []
    def counting(*args, real=prediction.empty_maps): return made.append(args) or real(*args)
    for o in (ensemble, combined, prediction): monkeypatch.setattr(o, 'empty_maps', counting)
    model = Ensemble([small(seed=i, false_alarms=None) for i in range(members)]).fit(tile)
    seen = model.predict(tile.test)
    assert len(made) == 1 and not [o for m in seen.members for o in vars(m).values() if torch.is_tensor(o) and o.shape[1:] == seen.anomaly_maps.shape[1:]]
    whole = [o.predict(tile.test) for o in model.members]
    made.clear()
    over = seen.normalised_over_set()
    assert len(made) == 1
    assert torch.allclose(seen.anomaly_maps, sum(o.anomaly_maps/u for o, u in zip(whole, model.units_))/members, rtol=1e-5)
    assert torch.allclose(over.anomaly_maps, sum(combined.min_max(o.anomaly_maps) for o in whole)/members, atol=1e-6)

def test_looking_back_takes_a_batch_at_a_time(cogs, monkeypatch):
    model = small(batch_size=3).fit(cogs)
    wanted, sizes = model.suspects(), []
    def judged(bank, scorer, numbers, patches, grid, real=changes.judge_left_out):
        sizes.append(len(patches))
        return real(bank, scorer, numbers, patches, grid)
    monkeypatch.setattr(changes, 'judge_left_out', judged)
    model.adopt(dataclasses.replace(model.fitted_, left_out=None))
    again = model.suspects(cogs)
    assert sizes == [3, 3, 2] and list(again.image) == list(wanted.image)
    assert again.score.to_numpy() == pytest.approx(wanted.score.to_numpy(), rel=1e-6)

@pytest.mark.parametrize('mounts, said', [({'/': 'ext4'}, False), ({'/': 'tmpfs'}, True), ({'/': 'tmpfs', 'own': 'ext4'}, False), ({'/': 'ext4', 'own': 'ramfs'}, True), ({}, False)])
def test_a_folder_in_memory_is_said(tmp_path, monkeypatch, mounts, said):
    places = [SimpleNamespace(mountpoint=str(tmp_path) if k == 'own' else tmp_path.anchor, fstype=v) for k, v in mounts.items()]
    monkeypatch.setattr(budget.psutil, 'disk_partitions', lambda all: places)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        budget.spilled(3, 4, tmp_path/'here')
    assert [str(o.message).split(': ')[-1] for o in found] == ['pass a spill_dir, or a folder for results, on a disk']*said
