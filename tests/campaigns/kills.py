"""Kills at every file operation of a run and of saving a model: `python tests/campaigns/kills.py`.

A run of two categories dies at its first operation on a file or folder below the results, goes on with `--resume`, and
must come to the bytes of the run that nobody killed; then another one dies at the second, and so on to the last. A
model that is saved over an older one dies likewise: what is loaded is the older one or the newer one, whole.
`--every 10` kills at each tenth operation only.
"""
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import attempts
from attempts import End

os.environ.setdefault('OMP_NUM_THREADS', '1') # processes are forked, and threads do not survive that

OPERATIONS = ('open', 'os.', 'shutil.')
LONG = 120 # seconds that a run may take here
TOLD = ('run.json', 'report.html') # hold dates, or times that steps took
SMALL = dict(resize=64, imagesize=64, pretrain_dim=64, target_dim=64, ratio=.1, num_workers=0, show=False)


class Counter:
    "Counts what is asked of the file system within a folder, and dies at one of these operations."
    def __init__(self): self.at, self.folder, self.n = 0, None, 0
    def __call__(self, event, args):
        if not self.folder or not event.startswith(OPERATIONS) or not any(self.folder in str(o) for o in args): return
        self.n += 1
        if self.n == self.at: os._exit(9)

COUNTER = Counter()

def die(f, folder, at):
    "Call f in a child that dies at an operation, 0: at none; how many there were, None if it died."
    into, out = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            sys.addaudithook(COUNTER)
            COUNTER.n, COUNTER.at, COUNTER.folder = 0, at, str(folder)
            f()
            COUNTER.folder = None
            os.write(out, str(COUNTER.n).encode())
            os._exit(0)
        except BaseException as e:
            print(f'{type(e).__name__}: {e}', file=sys.stderr)
            os._exit(7)
    os.close(out)
    said = os.read(into, 100)
    os.close(into)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, 9): raise RuntimeError(f'the child that was to die ended with {status}')
    return int(said) if said else None

def digests(folder):
    "The SHA-256 of each file of a run, by its path; of the sections of a report nothing, since they tell of times."
    found = {}
    for o in sorted(folder.rglob('*')):
        name = o.relative_to(folder).as_posix()
        if o.is_file(): found[name] = '' if name in TOLD or name.startswith('report/') else hashlib.sha256(o.read_bytes()).hexdigest()
    return found

def make_parts(home):
    "Two small categories, and a model."
    from patchcore_nb import PatchCore
    from patchcore_nb.data import Category, load_category
    found = [load_category('demo', home/'data', o) for o in ('cog', 'sieve')]
    few = [Category(o.dataset, o.name, o.train[:4], o.test[::9]) for o in found]
    return PatchCore('filterbank', **SMALL), few

class Runs:
    "A run that dies at an operation, and goes on."
    def __init__(self, home): self.home, (self.model, self.few) = home, make_parts(home)

    def run(self, results, **how):
        from patchcore_nb.experiment import run
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return run(self.model, self.few, results, 'project', 'group', save_model=True, pictures=True, model_format='ours', **how)

    def begin(self):
        "Nobody kills it: what it leaves, and at how many operations others may be killed."
        self.want = digests(self.run(self.home/'whole').folder)
        return die(lambda: self.run(self.home/'counted'), self.home/'counted', 0)

    def __call__(self, job):
        results = self.home/f'results_{job[1]}'
        died = die(lambda: self.run(results), results, job[1]) is None
        state = results/'project'/'group'/'run.json'
        complete = state.is_file() and json.loads(state.read_text(encoding='utf-8'))['complete']
        again = self.run(results, resume=True).folder
        found, groups = digests(again), sorted(o.name for o in (results/'project').iterdir())
        shutil.rmtree(results)
        if not died: return End('NOT KILLED')
        if found.keys() != self.want.keys(): return End('OTHER FILES', str(sorted(found.keys() ^ self.want.keys()))[:300])
        if found != self.want: return End('OTHER BYTES', str([k for k in found if found[k] != self.want[k]])[:300])
        if complete and groups == ['group', 'group_0']: return End('it was complete, and another was made')
        if groups != ['group']: return End('OTHER FOLDERS', str(groups))
        return End('same bytes')

class Saves:
    "A save over an older model that dies at an operation."
    def __init__(self, home):
        from patchcore_nb.ensemble import Ensemble
        import numpy as np
        from patchcore_nb import PatchCore
        self.home, self.images = home, np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
        self.older = PatchCore('filterbank', ['layer3'], **SMALL).fit(self.images[:2])
        self.newer = Ensemble([PatchCore('filterbank', [o], **SMALL) for o in ('layer2', 'layer3')]).fit(self.images)

    def scores(self, model): return model.predict(self.images[2:]).image_scores

    def begin(self):
        from patchcore_nb.store import save
        self.want = [self.scores(o) for o in (self.older, self.newer)]
        self.save_older(self.home/'counted')
        return die(lambda: save(self.newer, self.home/'counted'/'m', 'ours'), self.home/'counted', 0)

    def save_older(self, home):
        from patchcore_nb.store import save
        home.mkdir()
        save(self.older, home/'m', 'ours')

    def __call__(self, job):
        import torch
        from patchcore_nb.store import load, save
        home = self.home/f'saved_{job[1]}'
        self.save_older(home)
        died = die(lambda: save(self.newer, home/'m', 'ours'), home, job[1]) is None
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            got = self.scores(load(home/'m'))
        save(self.newer, home/'m', 'ours')
        left = [o.name for o in home.iterdir() if o.name != 'm']
        shutil.rmtree(home)
        if not died: return End('NOT KILLED')
        if left: return End('LEFT BEHIND', str(left))
        found = [torch.equal(got, o) for o in self.want]
        return End(('the older one', 'the newer one')[found.index(True)]) if any(found) else End('NEITHER')

def campaign(asked, home):
    "Kill at every operation; how it ended."
    import torch
    torch.set_num_threads(1)
    tally = attempts.Tally()
    attempts.EXECUTES = () # a run imports what it needs
    for group, cls in (('a save', Saves), ('a run', Runs)):
        place = home/group.replace(' ', '_')
        place.mkdir()
        work = cls(place)
        n = work.begin()
        print(f'{group}: {n} operations', file=sys.stderr)
        jobs = ((group, k) for k in range(1, n+1, asked.every))
        for (_, k), end in attempts.in_children(work, jobs, asked.workers, LONG): tally.add(group, f'killed at operation {k} of {n}', end)
    return tally


if __name__ == '__main__':
    asked = attempts.arguments(0, every=1)
    with tempfile.TemporaryDirectory() as home: raise SystemExit(campaign(asked, Path(home)).tell('kills', asked))
