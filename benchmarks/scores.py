"""How much the image score, the distance and the ratio matter, against how much the seed does.

`python benchmarks/scores.py` sweeps all image scores over four ratios with five seeds, on the categories of the demo set
with more test images than usual; two of the seeds with all distances. Where PATCHCORE_NB_TESTDATA names a folder with
data/ and weights/, bottle with ResNet-18 follows, by the margin between its classes too. Prints tables and writes
results/scores.json.
"""
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from common import bottle, larger_demo, options, race, report, rows_of

from patchcore_nb.data import Category
from patchcore_nb.demo import DEMO_CATEGORIES
from patchcore_nb.evaluation import auroc, average_precision
from patchcore_nb.items import as_items
from patchcore_nb.names import DISTANCES, PATCH_SCORES
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.prediction import score_images
from patchcore_nb.scorer import Scorer
from patchcore_nb.sweeping import sweep

RATIOS, SEEDS, HOWS = [.01, .02, .05, .1], range(5), list(PATCH_SCORES)
COLUMNS = ['data', 'distance', 'seed', 'ratio', 'patch_score', 'image_auroc']


def tables(
    data:str,          # its name
    category:Category,
    kw:dict,           # arguments of the model
    ratios:list,
    seeds:list,
)->pd.DataFrame:
    "All image scores at all ratios: squared distances with every seed, the others with the first two."
    runs = [(d, s) for d in DISTANCES for s in (seeds if d == 'squared' else seeds[:2])]
    return pd.concat([sweep(PatchCore(**kw, distance=d, seed=s), category, ratios, patch_scores=HOWS).assign(data=data, distance=d, seed=s) for d, s in runs])[COLUMNS]


def margins(
    category:Category,
    kw:dict,      # arguments of the model
    ratios:list,  # the largest last
    seeds:list,
)->list[dict]: # a row for each ratio, image score and seed
    "How far the classes are apart where no AUROC tells: from the highest good score to the lowest defective one, as a part of the former."
    labels, rows = np.array([o.label for o in category.test]), []
    for seed in seeds:
        model = PatchCore(**kw, ratio=ratios[-1], seed=seed, false_alarms=None).fit(category)
        for ratio in ratios:
            one = model.shrink(ratio)
            for how in HOWS:
                parts = one.fitted_
                scorer = Scorer(patch_score=how).fit(parts.bank.rows)
                scores = score_images(parts.embedder, scorer, as_items(category.test)).image_scores.numpy()
                good, bad = scores[~labels], scores[labels]
                rows.append(dict(data='bottle', seed=seed, ratio=ratio, patch_score=how, image_auroc=auroc(scores, labels), image_ap=average_precision(scores, labels),
                                 margin=float(bad.min()/good.max()-1), effect=float((bad.mean()-good.mean())/np.sqrt((bad.var()+good.var())/2))))
    return rows


def main():
    args, found, apart = options(__doc__), [], []
    ratios, seeds = (RATIOS[2:], [0]) if args.quick else (RATIOS, [*SEEDS])
    with tempfile.TemporaryDirectory() as temp:
        kw = dict(backbone='filterbank', target_dim=256, device='cpu', cache=Path(temp)/'cache')
        for name in DEMO_CATEGORIES[-1:] if args.quick else DEMO_CATEGORIES:
            category = larger_demo(Path(temp), name, *((6, 4, 2) if args.quick else (40, 40, 20)))
            found.append(tables(name, category, kw, ratios, seeds))
        one, many = f'max, ratio {ratios[-1]}', f'{len(HOWS)} scores, {len(ratios)} ratios'
        times = race({one: lambda: sweep(PatchCore(**kw), category, ratios[-1:]), many: lambda: sweep(PatchCore(**kw), category, ratios, patch_scores=HOWS)}, 1 if args.quick else 3)
        if (real := bottle()) and not args.quick: apart = margins(real[0], kw | real[1], [.01, .02], seeds[:2])
    frame = pd.concat(found)
    spread = frame.groupby(['data', 'distance', 'ratio', 'patch_score'], sort=False).image_auroc.agg(['mean', 'std', 'count']).reset_index()
    lists = frame.groupby(COLUMNS[:2]+COLUMNS[3:5], sort=False)[['seed', 'image_auroc']].agg(list).reset_index()
    report(args, __file__, f'{len(HOWS)} image scores, {len(ratios)} ratios, embeddings cached; seconds on {name}', rows_of(times, one, device='cpu'),
           means=spread.astype(object).where(spread.notna(), None).to_dict('records'), margins=apart, seeds=lists.to_dict('records'))


if __name__ == '__main__': main()
