"""`predict`, and `fit` without its coreset, by every engine that is installed, against the bare backbone in torch.

`python benchmarks/engines.py` takes decoded images of the demo set, random weights, and a processor. The baseline is that of
pipeline.py: the backbone alone in torch, cut off after the last layer in use, in its fastest order in memory. Engines that
compute in bfloat16 on this processor do so in rows of their own. Conversions are timed apart. Prints a table and writes
results/engines.json.
"""
import time

import torch
from common import options, race, report, rows_of
from pipeline import Bare

from patchcore_nb.demo import demo_sample
from patchcore_nb.engines import convert, deviation, engaged, installed
from patchcore_nb.names import ENGINES
from patchcore_nb.patchcore import PatchCore

BARE = 'backbone alone, torch'


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
    for name in ['torch', *others]:
        twin = PatchCore(**model.get_params() | dict(engine=name, weights='random')).fit(train)
        part, extractor = images[:model.batch_size], engaged(plain, name)
        far[name] = deviation([*extractor(part).values()], [*plain(part).values()])
        runs |= {f'network, {name}': lambda e=extractor: [e(o) for o in images.split(model.batch_size)],
                 f'predict, {name}': lambda m=twin: m.predict(test),
                 f'fit without the coreset, {name}': lambda m=twin: [None for _ in m.embedder_(test)]}
    rows = rows_of(race(runs, rounds), BARE, backbone=backbone, precision='float32', device='cpu', rows=len(model.memory_bank_))
    def more(what):
        name = what.rpartition(', ')[2]
        return dict(deviation=far[name], converting=made.get(name)) if what.startswith('network') else {}
    return [r | dict(milliseconds_an_image=1e3*r['seconds']/n) | more(r['what']) for r in rows]


def main():
    args = options(__doc__)
    names = ['resnet18'] if args.quick else ['wide_resnet50_2', 'resnet18']
    rows = [row for o in names for row in compare(o, args.quick)]
    report(args, __file__, 'the network, predict and fit by engines, against the backbone in torch', rows)


if __name__ == '__main__': main()
