"""`predict`, `fit` without its coreset, and whole commands by every engine that is installed, against the bare backbone in torch.

`python benchmarks/engines.py` takes decoded images of the demo set, random weights, and a processor. The baseline is that of
pipeline.py: the backbone alone in torch, cut off after the last layer in use, in its fastest order in memory. Conversions are
timed apart. Engines that can compute in bfloat16 here do so as well. Then come whole commands, with the AUROC that they find, from the start of the program to the report, conversion included, on bottle where
PATCHCORE_NB_TESTDATA names a folder with data/ and weights/, else on a category of the demo set; their baseline is the backbone
alone on as many images. Prints tables and writes results/engines.json.
"""
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from common import options, race, report, rows_of, subject
from pipeline import Bare

from patchcore_nb.demo import demo_sample
from patchcore_nb.engines import convert, deviation, engaged, installed
from patchcore_nb.names import ENGINES
from patchcore_nb.patchcore import PatchCore

BARE = 'backbone alone, torch'


def ways_of(
    names:list[str], # of engines
)->dict[str,dict]: # label -> arguments of `PatchCore`
    "List engines and precisions."
    found = [('torch', 'float32'), *((o, p) for o in names for p in ENGINES[o].precisions())]
    labels = [o if p == 'float32' else f'{o} {p}' for o, p in found]
    return {label: dict(engine=o, precision=p) for label, (o, p) in zip(labels, found)}


def converting(
    model:PatchCore,
    names:list[str], # of engines
)->dict[str,float]: # engine -> seconds
    "Time conversions."
    times = {}
    for o in names:
        start = time.perf_counter()
        convert(o, model.extractor_, model.preprocess_.size)
        times[o] = time.perf_counter()-start
    return times


def compare(
    backbone:str,
    quick:bool,
)->list[dict]:
    "All rows for one backbone."
    n, n_train, rounds = (2, 2, 1) if quick else (16, 21, 5)
    kw = dict(imagesize=64, resize=64) if quick else {}
    train, test = ([demo_sample('cog', split, i)[0] for i in range(m)] for split, m in (('train', n_train), ('test', n)))
    model = PatchCore(backbone, ratio=1, weights='random', device='cpu', **kw).fit(train)
    images = torch.stack([model.embedder_.read(o) for o in test])
    others = [o for o in ENGINES if installed(o)]
    runs, far = {BARE: Bare(model, images, torch.channels_last, 'float32')}, {}
    plain, made = model.extractor_, converting(model, others)
    for label, how in ways_of(others).items():
        twin = PatchCore(**model.get_params() | dict(how, weights='random')).fit(train)
        asked = copy.copy(plain)
        asked.precision = how['precision']
        part, extractor = images[:model.batch_size], engaged(asked, how['engine'])
        far[label] = deviation([*extractor(part).values()], [*plain(part).values()])
        runs |= {f'network, {label}': lambda e=extractor: [e(o) for o in images.split(model.batch_size)],
                 f'predict, {label}': lambda m=twin: m.predict(test),
                 f'fit without the coreset, {label}': lambda m=twin: [None for _ in m.embedder_(test)]}
    rows = rows_of(race(runs, rounds), BARE, backbone=backbone, device='cpu', rows=len(model.memory_bank_))
    def more(what):
        label = what.rpartition(', ')[2]
        return dict(deviation=far[label], converting=made.get(label)) if what.startswith('network') else {}
    return [r | dict(milliseconds_an_image=1e3*r['seconds']/n) | more(r['what']) for r in rows]


# Whole commands

CHILD = 'from patchcore_nb.start import run; run()'
OURS = 'leave out', 'threshold', 'evaluate' # stages that the reference has not; intervals are part of the last

def command(
    line:list[str], # of the program
    folder:Path,    # to run in
    into:list,      # gets the seconds of each stage
):
    "Run the program from its start to its report."
    out = subprocess.run([sys.executable, '-c', CHILD, *line], cwd=folder, capture_output=True, text=True, encoding='utf-8')
    if out.returncode: sys.exit(out.stderr[-2000:])
    newest = max(folder.glob('results/project/*/report/*.json'), key=lambda o: o.stat().st_mtime)
    into.append({o['stage']: o['seconds'] for o in json.loads(newest.read_text(encoding='utf-8'))['stages']})
    into[-1] |= pd.read_csv(newest.parents[1]/'metrics.csv', index_col=0).loc['Mean', ['image_auroc', 'pixel_auroc']]


def compare_commands(
    backbone:str,
    ratio:float,
    quick:bool,
)->list[dict]:
    "Whole commands with each engine, against the bare backbone on the same images."
    with tempfile.TemporaryDirectory() as temp:
        what, category, kw = subject(Path(temp)/'data')
        n = len(category.train)+len(category.test)
        own = kw.get('weights_dir') if backbone == kw['backbone'] else None
        weights = ['--weights_dir', str(own)] if own else ['--weights', 'random']
        size = ['--resize', '64', '--imagesize', '64'] if quick else []
        root = category.train[0].path.parents[3]
        layout = 'mvtec' if own or what == 'bottle' else 'demo'
        tail = ['-b', backbone, '-le', 'layer2', '-le', 'layer3', *weights, 'sampler', '-p', str(ratio), 'approx_greedy_coreset',
                'dataset', *size, '-d', category.name, layout, str(root)]
        model = PatchCore(backbone, weights='random', device='cpu')
        bare = Bare(model, torch.rand(n, 3, *(64, 64) if quick else (224, 224)), torch.channels_last, 'float32')
        stages, ways = {}, ways_of([] if quick else [o for o in ENGINES if installed(o)])
        def run(label, how):
            line = ['--gpu', '-1', '--seed', '0', '--engine', how['engine'], 'results', 'patch_core', '--precision', how['precision'], *tail]
            return lambda: command(line, Path(temp), stages.setdefault(label, []))
        times = race({BARE: bare, **{f'the whole command, {o}': run(o, how) for o, how in ways.items()}}, 1 if quick else 3, warm=False)
        rows = rows_of(times, BARE, backbone=backbone, data=what, coreset=ratio, device='cpu', images=n)
        for row, label in zip(rows[1:], ways):
            took = stages[label][-1]
            row |= dict(leaving_out=took.get('leave out'), of_ours=sum(took.get(o, 0) for o in OURS)/row['seconds'])
            row |= {o: took[o] for o in ('image_auroc', 'pixel_auroc')}
        return rows


def main():
    args = options(__doc__)
    names = ['resnet18'] if args.quick else ['wide_resnet50_2', 'resnet18']
    rows = [row for o in names for row in compare(o, args.quick)]
    whole = [('resnet18', .1)] if args.quick else [('resnet18', .1), ('wide_resnet50_2', .01)]
    commands = [row for o in whole for row in compare_commands(*o, args.quick)]
    report(args, __file__, 'the network, predict and fit by engines, against the backbone in torch', rows, commands=commands)


if __name__ == '__main__': main()
