"""Mutated model files, ours and the reference's, single and ensembles: `python tests/campaigns/models.py`.

Every one is loaded and asked for scores in a process of its own. It must be refused by one line, or do what the model did:
no code is run, no file written, no signal, no hang, not twice the memory, no other exception, and where a file of ours
was damaged no other score without a word.
"""
import os
import random
import shutil
import tempfile
import warnings
from pathlib import Path

import attempts
import mutate
from attempts import End

os.environ.setdefault('OMP_NUM_THREADS', '1') # processes are forked, and threads do not survive that

GROUPS = ('ours', 'ours and theirs', 'theirs', 'ensemble of ours', 'ensemble of theirs')
TENSOR_FILE, PICKLE = '.safetensors', '.pkl'


def make_models(home):
    "One model of each group, and what it makes of some images."
    import encodings.raw_unicode_escape, timm # noqa: F401 - which a file would make it import
    import numpy as np
    import torch
    from patchcore_nb import PatchCore
    from patchcore_nb.ensemble import Ensemble
    from patchcore_nb.extractor import create_backbone
    from patchcore_nb.store import save
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (12, 73, 73, 3), np.uint8)
    weights = home/'weights'
    weights.mkdir()
    torch.save(create_backbone('resnet18', 'random', seed=7).state_dict(), weights/'resnet18.pth')
    small = dict(resize=73, imagesize=64, pretrain_dim=64, target_dim=64, ratio=.1, num_workers=0, train_val_split=.5, false_alarms=.4, confidence=None)
    def fit(backbone, layers=('layer2', 'layer3'), **kw): return PatchCore(backbone, list(layers), weights_dir=weights, **small | kw).fit(images)
    ours, theirs = fit('filterbank'), fit('resnet18')
    pair = Ensemble([PatchCore('filterbank', [o], **small) for o in ('layer2', 'layer3')]).fit(images)
    their_pair = Ensemble([PatchCore('resnet18', ['layer2', 'layer3'], weights_dir=weights, **small | dict(seed=i)) for i in range(2)]).fit(images)
    kinds = zip(GROUPS, (ours, theirs, theirs, pair, their_pair), ('ours', 'both', 'reference', 'ours', 'reference'))
    for group, model, kind in kinds: save(model, home/group, kind)
    return weights, images[:2]

def ask(folder, weights, images):
    "Load a model and ask it: scores, maps, what it holds them against, and whether it said anything."
    from patchcore_nb.store import load
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model = load(folder, weights_dir=weights)
        found = model.predict(images)
    verdicts = None if found.verdicts is None else found.verdicts.tolist()
    return found.image_scores, found.anomaly_maps, model.threshold_, verdicts, bool(said)

def is_same(a, b):
    "Whether two answers are one."
    import torch
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2:4] == b[2:4]

def damage(folder, rng):
    "Change a file of a model; (what was done, whether its digest was made to fit)."
    path = rng.choice(sorted(folder.iterdir()))
    if rng.random() < .05:
        done = rng.choice(mutate.WHOLE)
        done(path)
        return f'{path.name} {done.__name__}', False
    raw = path.read_bytes()
    special, sealed = rng.random() < .6, False
    if special and path.suffix == '.json': new, sealed = mutate.mutate_json(rng, raw)
    elif special and path.suffix == TENSOR_FILE: new = mutate.mutate_tensors(rng, raw)
    elif special and path.suffix == PICKLE: new = mutate.mutate_pickle(rng, raw)
    else: new = rng.choice(mutate.BYTES)(rng, raw)
    path.unlink() # it may be a link to the clean one
    path.write_bytes(new)
    return path.name, sealed or new == raw

class Work:
    "What is done with one case."
    def __init__(self, home, weights, images, clean, seed): self.home, self.weights, self.images, self.clean, self.seed = home, weights, images, clean, seed

    def prepare(self, case):
        "Make the damaged folder; (group, folder, what was done, whether another score is no wonder)."
        rng, group = random.Random(f'{self.seed}/{case}'), GROUPS[case % len(GROUPS)]
        folder = self.home/'cases'/f'{case}'
        shutil.copytree(self.home/group, folder, copy_function=os.link)
        done, sealed = damage(folder, rng)
        return group, folder, done, sealed or 'theirs' in group and not done.startswith('model.')

    def __call__(self, job):
        case, group, folder, done, free = job
        found = ask(folder, self.weights, self.images)
        if is_same(found, self.clean[group]): return End('same scores')
        if found[-1]: return End('said so')
        if free: return End('other scores')
        return End('SILENT', f'{float(found[0][0]-self.clean[group][0][0]):.3g} more for the first image')

def jobs(work, n):
    "Make the cases one by one, so that the disk does not hold them all."
    for case in range(n):
        group, folder, done, free = work.prepare(case)
        yield case, group, folder, done, free

def campaign(n, seed, workers, home):
    "Try n damaged models; how they ended."
    weights, images = make_models(home)
    clean = {o: ask(home/o, weights, images) for o in GROUPS}
    work = Work(home, weights, images, clean, seed)
    again = attempts.in_children(work, [(0, o, home/o, '', False) for o in GROUPS], 1)
    growth = {job[1]: end.growth for job, end in again if end.what == 'same scores'}
    assert growth.keys() == set(GROUPS), 'a clean model gives what it gave'
    tally = attempts.Tally()
    for (case, group, folder, done, _), end in attempts.in_children(work, jobs(work, n), workers):
        tally.add(group, f'case {case}, {done}', attempts.too_much(end, growth[group]))
        shutil.rmtree(folder, ignore_errors=True)
    return tally


if __name__ == '__main__':
    asked = attempts.arguments(10_000)
    with tempfile.TemporaryDirectory() as home: raise SystemExit(campaign(asked.n, asked.seed, asked.workers, Path(home)).tell('models', asked))
