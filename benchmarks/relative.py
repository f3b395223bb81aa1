"""What the image score `relative` gains over the reference's `max`, and what it costs.

`python benchmarks/relative.py` sweeps three image scores over two ratios with three seeds, on the categories of the demo
set with more test images than usual, by the filter bank; where PATCHCORE_NB_TESTDATA names a folder with weights/, by
ResNet-18 as well. Then fit and predict take turns with `max` and `relative`, on every fourth image of bottle if it is at
hand. Prints tables and writes results/relative.json.
"""
import os
import tempfile
from pathlib import Path

import pandas as pd
from common import larger_demo, options, race, report, rows_of, subject

from patchcore_nb.data import Category
from patchcore_nb.demo import DEMO_CATEGORIES
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.sweeping import sweep

RATIOS, SEEDS, HOWS = [.01, .1], range(3), ['max', 'smoothed', 'relative']


def networks()->dict[str,dict]: # backbone -> arguments of the model
    "The filter bank, and ResNet-18 where its weights are at hand."
    root, found = os.environ.get('PATCHCORE_NB_TESTDATA'), dict(filterbank=dict(target_dim=256))
    return found | (dict(resnet18=dict(weights_dir=Path(root)/'weights')) if root else {})


def costs(
    folder:Path, # for the demo set
    ratio:float,
    rounds:int,
)->list[dict]: # rows of a table
    "Time fit and predict with both scores by turns."
    data, category, kw = subject(folder)
    few = Category(category.dataset, category.name, category.train[::4], category.test[::4])
    models = {how: PatchCore(**kw, ratio=ratio, patch_score=how, false_alarms=None, device='cpu').check(few) for how in HOWS[::2]}
    rows = []
    for what, runs in (('fit', {k: lambda m=m: m.fit(few) for k, m in models.items()}), ('predict', {k: lambda m=m: m.predict(few.test) for k, m in models.items()})):
        times = {f'{what}, {k}': o for k, o in race(runs, rounds, warm=what == 'predict').items()}
        rows += rows_of(times, f'{what}, max', device='cpu', data=data, at=ratio)
    return rows


def main():
    args, found = options(__doc__), []
    sizes, seeds, names = ((6, 4, 2), [0], DEMO_CATEGORIES[-1:]) if args.quick else ((40, 40, 20), SEEDS, DEMO_CATEGORIES)
    with tempfile.TemporaryDirectory() as temp:
        for name in names:
            category = larger_demo(Path(temp), name, *sizes)
            for net, kw in networks().items():
                model = dict(backbone=net, device='cpu', cache=Path(temp)/'cache') | kw
                found += [sweep(PatchCore(**model, seed=s), category, RATIOS, patch_scores=HOWS).assign(data=name, net=net, seed=s) for s in seeds]
        rows = costs(Path(temp)/'demo', .1, 1 if args.quick else 3)
    groups = pd.concat(found).groupby(['net', 'data', 'ratio', 'patch_score'], sort=False).image_auroc
    spread = groups.agg(['mean', 'std', 'min', 'max', 'count']).reset_index()
    report(args, __file__, f'{len(HOWS)} image scores, {len(RATIOS)} ratios; seconds of fit and predict on {rows[0]["data"]}', rows,
           means=spread.astype(object).where(spread.notna(), None).to_dict('records'))


if __name__ == '__main__': main()
