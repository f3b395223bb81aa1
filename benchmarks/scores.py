"""How much the choice of image score and of distance matters, over ratios and seeds.

`python benchmarks/scores.py` judges every patch score, distance, ratio and seed on the categories of the demo set with the
filter bank, and on bottle with ResNet-18, if PATCHCORE_NB_TESTDATA names a folder with data/ and weights/. It prints tables
and writes results/scores.json. The patch embeddings are cached, so that a seed costs a coreset and a search.
"""

import tempfile
from pathlib import Path

import pandas as pd
from common import options, report, rows_of, seconds, subject

from patchcore_nb.data import Category, load_category
from patchcore_nb.demo import DEMO_CATEGORIES
from patchcore_nb.experiment import sweep
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.scorer import PATCH_SCORES

RATIOS, DISTANCES, SEEDS = (.01, .03, .1), ('squared', 'euclidean', 'cosine'), 5


def judged(
    name:str,          # of the data
    category:Category,
    kw:dict,           # arguments of the model
    ratios:tuple, seeds:int,
    times:dict,        # seconds of sweeps, for each distance
)->list[dict]: # a row for each distance, seed, ratio and patch score
    "Sweep over everything."
    rows = []
    for distance in DISTANCES:
        for seed in range(seeds):
            found = []
            times.setdefault(distance, []).append(seconds(lambda: found.append(sweep(PatchCore(**kw, distance=distance, seed=seed, device='cpu'), category, ratios, patch_scores=list(PATCH_SCORES)))))
            rows += found[0].drop(columns='pixel_auroc').assign(data=name, distance=distance, seed=seed).to_dict('records')
    return rows


def main():
    args, times = options(__doc__), {}
    ratios, seeds = ((.05, .1), 1) if args.quick else (RATIOS, SEEDS)
    with tempfile.TemporaryDirectory() as temp:
        rows, kw = [], dict(backbone='filterbank', target_dim=128 if args.quick else 256, cache=Path(temp)/'cache')
        for name in DEMO_CATEGORIES[:1] if args.quick else DEMO_CATEGORIES:
            category = load_category('demo', temp, name)
            if args.quick: category = Category('demo', name, category.train[:6], category.test[::4])
            rows += judged(name, category, kw, ratios, seeds, times)
        name, category, kw = subject(Path(temp))
        if name == 'bottle' and not args.quick: rows += judged(name, category, kw | dict(cache=Path(temp)/'cache'), (.01,), 2, {})
    table = pd.DataFrame(rows)
    means = table.groupby(['data', 'distance', 'patch_score', 'ratio'], sort=False).image_auroc.agg(['mean', 'min', 'max']).reset_index()
    costs = rows_of({f'sweep, {k}': v for k, v in times.items()}, f'sweep, {DISTANCES[0]}', device='cpu')
    report(args, __file__, f'{len(table)} models: {len(PATCH_SCORES)} image scores x {len(DISTANCES)} distances x {len(ratios)} ratios x {seeds} seeds', costs, table=means.to_dict('records'))


if __name__ == '__main__': main()
