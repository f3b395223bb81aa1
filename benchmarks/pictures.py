"""How fast the pictures of a run are drawn and saved, against matplotlib drawing the same four panels.

`python benchmarks/pictures.py` fits the filter bank to a category of the demo set, and draws its test images at 224 x 224
pixels: image, mask, map and overlay, each saved as a PNG file. The files of a run are drawn by `save_pictures` in as many
threads as there are cores; the panel alone, in one thread, is timed beside it. Prints a table and writes results/pictures.json.
"""
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt
from common import options, race, report, rows_of

from patchcore_nb.core import read_image
from patchcore_nb.data import load_category, read_masks
from patchcore_nb.demo import DEMO_CATEGORIES  # the import registers the set
from patchcore_nb.judging import judge
from patchcore_nb.panels import draw_panel
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.plots import colour_range, plot_prediction
from patchcore_nb.results import save_pictures
from patchcore_nb.sections import section

USUAL = 'matplotlib, one thread'


def main():
    args = options(__doc__)
    with tempfile.TemporaryDirectory() as temp:
        temp = Path(temp)
        category = load_category('demo', temp/'demo', DEMO_CATEGORIES[-1])
        if args.quick: category = replace(category, train=category.train[:4], test=category.test[::8])
        model = PatchCore('filterbank', ratio=.02, target_dim=128, device='cpu').fit(category)
        seen, samples = model.predict(category.test), category.test
        metrics, masks, pre = judge(seen, samples), read_masks(samples, model.preprocess_), model.preprocess_
        low, top = colour_range(seen.anomaly_maps, [o.label for o in samples])
        def usual():
            for i in range(len(samples)):
                axs = plot_prediction(seen, i, masks[i], (low, top))
                axs[0].figure.savefig(temp/f'{i}.png')
                plt.close(axs[0].figure)
        def panels():
            for i, o in enumerate(samples):
                draw_panel(pre.crop(read_image(o.path)), masks[i], seen.anomaly_maps[i], float(seen.image_scores[i]), top, o.kind, low=low).save(temp/f'{i}.png')
        runs = {USUAL: usual, 'panels, one thread': panels, f'panels as a run saves them, {os.cpu_count()} cores': lambda: save_pictures(seen, samples, temp/'pictures'),
                'a section of the report': lambda: section(model, category, seen, metrics, masks=masks)}
        times = race(runs, 1 if args.quick else 5)
        size = len(json.dumps(section(model, category, seen, metrics, masks=masks)))/1e6
    rows = [r | dict(images_a_second=None if 'report' in r['what'] else len(samples)/r['seconds'], megabytes=size if 'report' in r['what'] else None) for r in rows_of(times, USUAL, device='cpu')]
    report(args, __file__, f'{len(samples)} test images of {category.name}, 224 x 224 pixels: four panels each, drawn and saved as PNG', rows)


if __name__ == '__main__': main()
