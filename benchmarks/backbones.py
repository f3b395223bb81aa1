"""What three backbones that need no download are worth, and what they cost.

`python benchmarks/backbones.py` fits and judges the filter bank, EfficientNet-Lite0 from the package index (two pairs of
layers) and, where PATCHCORE_NB_TESTDATA names a folder with weights/, ResNet-18, on the demo set and on bottle if it is at
hand, with three seeds. Prints tables and writes results/backbones.json.
"""
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
from common import bottle, options, race, report, rows_of

from patchcore_nb.data import Category, load_category
from patchcore_nb.demo import DEMO_CATEGORIES
from patchcore_nb.judging import judge
from patchcore_nb.lite import package_file
from patchcore_nb.patchcore import PatchCore

FIGURES = 'image_auroc', 'pixel_auroc', 'aupro'


def candidates()->dict[str,dict]: # name -> arguments of the model
    "The backbones that can be had here."
    found = dict(filterbank=dict(backbone='filterbank'))
    if package_file():
        for pair in ((2, 4), (2, 3)): found[f'Lite0, blocks {pair[0]} and {pair[1]}'] = dict(backbone='efficientnet_lite0', layers=[f'blocks.{o}' for o in pair])
    if root := os.environ.get('PATCHCORE_NB_TESTDATA'): found['ResNet-18'] = dict(backbone='resnet18', weights_dir=Path(root)/'weights')
    return found


def judged(
    category:Category,
    kw:dict, # arguments of the model
    ratios:list,
    seeds:list,
)->list[dict]: # a row for each ratio and seed
    "Fit and judge at several ratios, of which the smaller are in the larger."
    rows = []
    for seed in seeds:
        model = PatchCore(**kw, ratio=ratios[-1], seed=seed, false_alarms=None).fit(category)
        for ratio in ratios:
            metrics = judge(model.shrink(ratio).predict(category.test), category.test)
            rows.append(dict(seed=seed, ratio=ratio) | {o: metrics[o] for o in FIGURES})
    return rows


def main():
    args, found = options(__doc__), []
    ratios, seeds = [.01], [0] if args.quick else [0, 1, 2]
    with tempfile.TemporaryDirectory() as temp:
        categories = {o: load_category('demo', temp, o) for o in (DEMO_CATEGORIES[-1:] if args.quick else DEMO_CATEGORIES)}
        if args.quick: categories = {o: replace(c, train=c.train[:8], test=c.test[::4]) for o, c in categories.items()}
        first = next(iter(categories.values()))
        if (real := bottle()) and not args.quick: categories['bottle'] = real[0]
        models = candidates()
        for data, category in categories.items():
            for name, kw in models.items():
                rows = judged(category, kw | dict(device='cpu'), ratios, seeds)
                found += [dict(data=data, backbone=name) | o for o in rows]
        fitted = {name: PatchCore(**kw, ratio=.01, device='cpu', false_alarms=None).fit(first) for name, kw in models.items()}
        images = [o.path for o in first.test]
        times = race({name: (lambda m=m: m.predict(images)) for name, m in fitted.items()}, 1 if args.quick else 5)
    frame = pd.DataFrame(found)
    means = frame.groupby(['data', 'ratio', 'backbone'], sort=False)[[*FIGURES]].agg(['mean', 'std'])
    means.columns = [f'{a}_{b}' for a, b in means.columns]
    table = means.reset_index().astype(object)
    rows = [o | dict(milliseconds_an_image=1e3*o['seconds']/len(images)) for o in rows_of(times, 'filterbank', device='cpu')]
    report(args, __file__, f'predict, {len(images)} images', rows, means=table.where(table.notna(), None).to_dict('records'))


if __name__ == '__main__': main()
