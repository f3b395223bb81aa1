"""What a sweep over ratio and k costs when the patch embeddings are cached, against one full run from images.

`python benchmarks/sweep.py` works on bottle with ResNet-18, if PATCHCORE_NB_TESTDATA names a folder with data/ and
weights/, else on a category of the demo set. It prints two tables and writes results/sweep.json.
"""
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd

from patchcore_nb.data import load_category
from patchcore_nb.demo import DEMO_CATEGORIES # the import registers the set
from patchcore_nb.experiment import judge, sweep
from patchcore_nb.patchcore import PatchCore

HERE = Path(__file__).resolve().parent
RATIOS, KS, TIMES = (.005, .01, .02, .05, .1), (1, 3, 9), 3


def subject(
    temp:Path, # for the demo set
)->tuple: # what it is, the category, arguments of the model
    "What is swept."
    root = os.environ.get('PATCHCORE_NB_TESTDATA')
    if not root: return f'demo {DEMO_CATEGORIES[-1]}, filterbank', load_category('demo', temp, DEMO_CATEGORIES[-1]), dict(backbone='filterbank')
    return 'bottle, ResNet-18', load_category('mvtec', Path(root)/'data'/'mvtec256', 'bottle'), dict(backbone='resnet18', weights_dir=Path(root)/'weights')


def seconds(
    f, # nothing -> anything
)->tuple[float,object]: # median of several times; the last result
    "How long something takes."
    taken = []
    for _ in range(TIMES):
        start = time.perf_counter()
        result = f()
        taken.append(time.perf_counter()-start)
    return statistics.median(taken), result


def main():
    with tempfile.TemporaryDirectory() as temp:
        what, category, kw = subject(Path(temp))
        def full(k=1):
            model = PatchCore(**kw, ratio=RATIOS[-1], k=k, device='cpu')
            return judge(model.fit(category).predict(category.test), category.test, model.preprocess_)
        def swept(): return sweep(PatchCore(**kw, device='cpu', cache=Path(temp)/'cache'), category, RATIOS, KS)
        start = time.perf_counter()
        swept() # fills the cache
        filling = time.perf_counter()-start
        size = sum(p.stat().st_size for p in (Path(temp)/'cache').rglob('*.safetensors'))
        (one, _), (all_of_them, table), figures = seconds(full), seconds(swept), full(KS[-1])
    rows = {'one full run from images': one, f'sweep of {len(table)}, embeddings cached': all_of_them, 'sweep that fills the cache': filling}
    times = pd.DataFrame({'s': rows, 'times a full run': {k: v/one for k, v in rows.items()}})
    last = table.iloc[-1]
    print(f'{what}: {len(RATIOS)} ratios up to {RATIOS[-1]} x {len(KS)} values of k; cache {size/1e6:.0f} MB\n', times.round(2).to_string(), '', table.round(4).to_string(index=False, na_rep='-'),
          f"\nthe last row by a run of its own: image AUROC {figures['image_auroc']:.4f}, pixel AUROC {figures['pixel_auroc']:.4f}", sep='\n')
    (HERE/'results').mkdir(exist_ok=True)
    out = dict(what=what, cache_bytes=size, seconds=rows, ratio=all_of_them/one, table=json.loads(table.to_json(orient='records')), last_by_itself={k: figures[k] for k in ('image_auroc', 'pixel_auroc')})
    (HERE/'results'/'sweep.json').write_text(json.dumps(out, indent=1)+'\n', encoding='utf-8')
    assert abs(last.image_auroc-figures['image_auroc']) < 1e-6 and abs(last.pixel_auroc-figures['pixel_auroc']) < 1e-6, 'the sweep and the full run disagree'


if __name__ == '__main__': main()
