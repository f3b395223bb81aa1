"""What defective images among the training images cost, what `suspects` finds of them, and what `denoise` regains.

`python benchmarks/contamination.py` mixes defective test images into the training set of each category of the demo set,
and, if PATCHCORE_NB_TESTDATA names a folder with data/ and weights/, of bottle with ResNet-18. The images mixed in are
then judged as well (overlap) or left out of the test set (apart). It prints tables and writes results/contamination.json.
"""

import math
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from common import options, report, rows_of, seconds, subject

from patchcore_nb.data import Category, load_category
from patchcore_nb.demo import DEMO_CATEGORIES
from patchcore_nb.evaluation import auroc
from patchcore_nb.patchcore import PatchCore

SHARES, AMOUNTS, DRAWS = (0, .025, .05, .1, .2), (0., .02, .05, .1), 3


def mix(
    category:Category,
    share:float, # of the training set, [0, 1)
    draw:int,    # which of the defective images
)->tuple[list,np.ndarray]: # the training set; indices of the test images that are in it
    "Mix defective images into the training set."
    bad = np.flatnonzero([o.label for o in category.test])
    n = min(len(bad)-2, round(share*len(category.train)/(1-share)))
    chosen = np.random.default_rng(draw).permutation(bad)[:n]
    return [o.path for o in category.train]+[category.test[i].path for i in chosen], chosen


def tried(
    name:str,           # of the data
    category:Category,
    kw:dict,            # arguments of the model
    shares:tuple, amounts:tuple, draws:int,
    times:dict,         # seconds of fits, for each amount
)->list[dict]: # a row for each share, draw, amount and setting
    "Fit and judge every combination."
    labels, rows = np.array([o.label for o in category.test]), []
    for share in shares:
        for draw in range(draws if share else 1):
            train, chosen = mix(category, share, draw)
            for amount in amounts:
                model = PatchCore(**kw, denoise=amount, device='cpu')
                times.setdefault(amount, []).append(seconds(lambda: model.fit(train)))
                scores = model.predict(category.test).image_scores.numpy()
                first = set(model.suspects().image[:math.ceil(.1*len(train))])
                found = np.mean([i in first for i in range(len(category.train), len(train))]) if len(chosen) else np.nan
                for setting, of in (('overlap', np.ones(len(labels), bool)), ('apart', ~np.isin(np.arange(len(labels)), chosen))):
                    rows.append(dict(data=name, setting=setting, share=share, mixed=len(chosen), draw=draw, denoise=amount, image_auroc=auroc(scores[of], labels[of]), found=found))
    return rows


def main():
    args, times = options(__doc__), {}
    shares, amounts, draws = ((0, .1), (0., .05), 1) if args.quick else (SHARES, AMOUNTS, DRAWS)
    with tempfile.TemporaryDirectory() as temp:
        rows = []
        for name in DEMO_CATEGORIES[:1] if args.quick else DEMO_CATEGORIES:
            category = load_category('demo', temp, name)
            if args.quick: category = Category('demo', name, category.train[:9], category.test[::4])
            rows += tried(name, category, dict(backbone='filterbank', target_dim=256), shares, amounts, draws, times)
        name, category, kw = subject(Path(temp))
        if name == 'bottle' and not args.quick: rows += tried(name, category, kw | dict(ratio=.01), (0, .05), (0., .05), 2, {})
    table = pd.DataFrame(rows)
    means = table.groupby(['data', 'setting', 'share', 'denoise'], sort=False)[['mixed', 'image_auroc', 'found']].mean().reset_index()
    what = {f'fit, denoise {k:g}' if k else 'fit': v for k, v in times.items()}
    costs = rows_of(what, 'fit', device='cpu')
    report(args, __file__, f'{len(table)} models: training sets with {min(shares):.0%} to {max(shares):.0%} of defective images; {draws} draws', costs,
           table=means.astype(object).where(means.notna(), None).to_dict('records'))


if __name__ == '__main__': main()
