"""How many good images a memory needs.

`python benchmarks/learning.py` draws learning curves, three orders of the images each, with and without turned and
mirrored copies: the demo set with the filter bank, and where PATCHCORE_NB_TESTDATA names a folder with data/ and weights/
bottle with ResNet-18 and, if its package is installed, EfficientNet-Lite0. Prints tables and writes results/learning.json.
"""
import tempfile
from pathlib import Path

import pandas as pd
from common import bottle, options, race, report, rows_of

from patchcore_nb.data import load_category
from patchcore_nb.demo import DEMO_CATEGORIES
from patchcore_nb.learning_curve import FIGURES, learning_curve
from patchcore_nb.lite import package_file
from patchcore_nb.patchcore import PatchCore


def subjects(
    folder:Path, # for the demo set
    quick:bool,
)->list[tuple]: # name of the data, category, arguments of the model, numbers of images
    "What curves are drawn of."
    names = DEMO_CATEGORIES[-1:] if quick else DEMO_CATEGORIES
    found = [(o, load_category('demo', folder, o), dict(backbone='filterbank', ratio=.05), [1, 2, 5, 10, 20, 40]) for o in names]
    if quick: return [(name, category, kw, [1, 2]) for name, category, kw, _ in found]
    if real := bottle():
        category, kw = real
        found.append(('bottle', category, kw | dict(ratio=.02), [1, 2, 5, 10, 20, 50, 100]))
        lite = dict(backbone='efficientnet_lite0', layers=['blocks.2', 'blocks.4'], ratio=.02)
        if package_file(): found.append(('bottle', category, lite, [1, 2, 5, 10, 20, 50, 100]))
    return found


def main():
    args, found = options(__doc__), []
    seeds = [0] if args.quick else [0, 1, 2]
    with tempfile.TemporaryDirectory() as temp:
        for name, category, kw, sizes in subjects(Path(temp), args.quick):
            for augment in (False, True):
                most = sizes if not augment else [o for o in sizes if o <= 20] # five times as many patches
                curve = learning_curve(PatchCore(**kw, augment=augment, device='cpu'), category, most, seeds)
                found.append(curve.assign(data=name, backbone=kw['backbone'], augment=augment))
        name, category, kw, sizes = subjects(Path(temp), args.quick)[0]
        kw = dict(backbone='resnet18', weights='random', ratio=.05, device='cpu', num_workers=0) # which need not be embedded anew for every number
        one, many = f'{sizes[-1]} images', f'{len(sizes)} numbers, {len(seeds)} orders'
        times = race({one: lambda: learning_curve(PatchCore(**kw), category, sizes[-1:], [0]), many: lambda: learning_curve(PatchCore(**kw), category, sizes, seeds)}, 1, warm=False)
    frame = pd.concat(found)
    means = frame.groupby(['data', 'backbone', 'augment', 'n_images'], sort=False)[[*FIGURES]].agg(['mean', 'std'])
    means.columns = [f'{a}_{b}' for a, b in means.columns]
    table = means.reset_index().astype(object)
    report(args, __file__, f'learning curves; seconds on {name}', rows_of(times, one, device='cpu'), means=table.where(table.notna(), None).to_dict('records'))


if __name__ == '__main__': main()
