"""Each stage on a quiet machine, and beside one and two busy processes: what does a neighbour cost?

`python benchmarks/busy.py` times picking a coreset, searching it, embedding images and judging maps, by turns alone and
beside processes of two torch threads that multiply matrices without a pause. A fair share of a machine of two cores is
a half beside one such process, a third beside two. Threads wait as those of the command line do, which see to it before
torch is imported. Prints a table and writes results/busy.json.
"""
# ruff: noqa: E402
from patchcore_nb.answers import sleep_early

sleep_early() # before torch is imported

import contextlib
import statistics
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch
from common import decaying, isotropic, options, report, seconds
from scipy.ndimage import gaussian_filter

from patchcore_nb.aggregator import Aggregator
from patchcore_nb.core import generator
from patchcore_nb.evaluation import evaluate
from patchcore_nb.extractor import Extractor, create_backbone
from patchcore_nb.samplers import farthest_points
from patchcore_nb.search import Exact

QUIET = 'on a quiet machine'
NEIGHBOURS = {QUIET: 0, 'beside one busy process': 1, 'beside two busy processes': 2}
AT_MOST = {QUIET: 1, 'beside one busy process': 1.8, 'beside two busy processes': 3} # what is aimed at

BUSY = '''
import torch
torch.set_num_threads(2)
a, b, out = (torch.randn(1024, 1024) for _ in range(3))
torch.mm(a, b, out=out)
print('busy', flush=True)
while True: torch.mm(a, b, out=out)
'''


@contextlib.contextmanager
def busy(
    n:int, # how many
):
    "Have some busy processes beside this one."
    children = [subprocess.Popen([sys.executable, '-c', BUSY], stdout=subprocess.PIPE) for _ in range(n)]
    try:
        for o in children: o.stdout.readline() # it has begun
        yield
    finally:
        for o in children: o.kill()
        for o in children: o.communicate()


def coreset_stage(quick:bool)->Callable: # () -> anything
    "4,000 picks of 40,000 projected patches."
    rows = isotropic(2000 if quick else 40_000, 128)
    return lambda: farthest_points(rows, len(rows)//10)


def search_stage(quick:bool)->Callable:
    "The patches of ten images in a memory bank of 4,000."
    n, d = (500, 128) if quick else (4000, 1024)
    rows = decaying(n+(200 if quick else 7840), d)
    search, queries = Exact().fit(rows[:n].clone()), rows[n:].clone()
    return lambda: search(queries)


def embedding_stage(quick:bool)->Callable:
    "Eight images, from pixels to patch embeddings."
    side = 64 if quick else 224
    images = torch.randn(8, 3, side, side, generator=generator(0))
    extract = Extractor(create_backbone('resnet18', weights='random'), ['layer2', 'layer3'])
    with torch.inference_mode(): channels = [o.shape[1] for o in extract(images[:1]).values()]
    aggregate = Aggregator().fit(channels, 'cpu')
    def run():
        with torch.inference_mode(): return aggregate(extract(images))
    return run


def evaluation_stage(quick:bool)->Callable:
    "All metrics of forty maps."
    n, side = (6, 48) if quick else (40, 224)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((n, side, side), np.float32)
    maps = np.stack([gaussian_filter(o, 4) for o in noise])
    masks = np.zeros(maps.shape, bool)
    masks[n//2:, side//4:side//2, side//4:side//2] = True
    maps[masks] += .1
    return lambda: evaluate(maps.max((1, 2)), masks.any((1, 2)), maps, masks)


STAGES = dict(coreset=coreset_stage, search=search_stage, embedding=embedding_stage, evaluation=evaluation_stage)


def main():
    args = options(__doc__)
    runs = {name: make(args.quick) for name, make in STAGES.items()}
    for run in runs.values(): run() # warm
    times = {(name, where): [] for name in runs for where in NEIGHBOURS}
    for _ in range(1 if args.quick else 9): # rounds, so that whatever else slows the machine down slows all of them
        for where, n in NEIGHBOURS.items():
            with busy(n):
                for name, run in runs.items(): times[name, where].append(seconds(run))
    rows = []
    for (name, where), taken in times.items():
        ratios = [a/b for a, b in zip(taken, times[name, QUIET])]
        rows.append(dict(stage=name, what=where, baseline=QUIET, seconds=statistics.median(taken), ratio=statistics.median(ratios), worst=max(ratios), at_most=AT_MOST[where]))
    report(args, __file__, 'the stages, alone and beside busy processes of two torch threads each; the ratio is the median over the rounds, worst the largest', rows)


if __name__ == '__main__': main()
