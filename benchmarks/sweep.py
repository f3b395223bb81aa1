"""What a sweep over ratio and k costs when the patch embeddings are cached, against one full run from images.

`python benchmarks/sweep.py` works on bottle with ResNet-18, if PATCHCORE_NB_TESTDATA names a folder with data/ and
weights/, else on a category of the demo set. It prints two tables and writes results/sweep.json.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from common import options, race, report, rows_of, seconds, subject

from patchcore_nb.judging import judge
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.sweeping import sweep

RATIOS, KS = (.005, .01, .02, .05, .1), (1, 3, 9)


def main():
    args, tables, metrics = options(__doc__), [], []
    with tempfile.TemporaryDirectory() as temp:
        name, category, kw = subject(Path(temp))
        if args.quick: category, kw = replace(category, train=category.train[:6], test=category.test[::6]), kw | dict(target_dim=128)
        def full():
            model = PatchCore(**kw, ratio=RATIOS[-1], k=KS[-1], device='cpu')
            metrics.append(judge(model.fit(category).predict(category.test), category.test))
        def swept(): tables.append(sweep(PatchCore(**kw, device='cpu', cache=Path(temp)/'cache'), category, RATIOS, KS))
        filling = seconds(swept)
        cached = sum(p.stat().st_size for p in (Path(temp)/'cache').rglob('*.safetensors'))
        one, many = 'one full run from images', f'sweep of {len(RATIOS)*len(KS)}, embeddings cached'
        times = race({one: full, many: swept}, 1 if args.quick else 3, warm=False)
    times['sweep that fills the cache'] = [filling]*len(times[one])
    last = tables[-1].iloc[-1]
    alone = {k: metrics[-1][k] for k in ('image_auroc', 'pixel_auroc')}
    if any(abs(last[k]-v) > 1e-6 for k, v in alone.items()): raise SystemExit(f'the sweep and a run of its own disagree: {dict(last)}, {alone}')
    rows = rows_of(times, one, data=name, device='cpu')
    report(args, __file__, f'{name}: {len(RATIOS)} ratios up to {RATIOS[-1]} x {len(KS)} values of k; the cache takes {cached/1e6:.0f} MB', rows, table=tables[-1].astype(object).where(tables[-1].notna(), None).to_dict('records'))


if __name__ == '__main__': main()
