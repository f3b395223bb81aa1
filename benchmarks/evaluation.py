"""All pixel metrics against scikit-learn's AUROC and precision-recall curve alone; two thousand large maps, one by one.

`python benchmarks/evaluation.py` judges 83 maps of 224 x 224 pixels, 20 of them good, by turns with scikit-learn on the
same pixels, and looks at memory in a process of its own. Then 2,000 maps of 512 x 512 are handed to a `Tally` as they
are made. Prints two tables and writes results/evaluation.json.
"""
import numpy as np
from common import fresh, options, race, report, rows_of, seconds, watch
from scipy.ndimage import gaussian_filter
from sklearn import metrics

from patchcore_nb.evaluation import evaluate
from patchcore_nb.pixels import Tally

SKLEARN, OURS, ONE_BY_ONE = 'scikit-learn: AUROC, curve', 'evaluate: all metrics', 'Tally: all metrics'


def stains(
    rng:np.random.Generator,
    size:int, # of a side
)->np.ndarray: # (size, size) bool
    "One to three defects, from a pinhole to a seventh of the image."
    rows, cols = np.mgrid[:size, :size]
    spots = [(*rng.uniform(.1*size, .9*size, 2), *rng.uniform(2, size/7, 2)) for _ in range(rng.integers(1, 4))]
    return np.any([((rows-y)/a)**2+((cols-x)/b)**2 <= 1 for y, x, a, b in spots], axis=0)


def made(
    n_good:int,
    n_bad:int,
    size:int, # of a side
    seed:int=0,
)->tuple[np.ndarray, np.ndarray]: # (n, size, size) float32, bool; the good ones first
    "Smooth noise, higher at defects."
    rng, n = np.random.default_rng(seed), n_good+n_bad
    maps, masks = np.empty((n, size, size), np.float32), np.zeros((n, size, size), bool)
    for i in range(n):
        if i >= n_good: masks[i] = stains(rng, size)
        maps[i] = 1+8*gaussian_filter(rng.standard_normal((size, size), np.float32), 4)+2*gaussian_filter(masks[i].astype(np.float32), 4)
    return maps, masks


def judged(maps:np.ndarray, masks:np.ndarray)->dict:
    "All metrics of pixels."
    return {k: v for k, v in evaluate(np.zeros(len(maps)), masks.any((1, 2)), maps, masks).items() if not k.startswith('image')}


def tallied(maps:np.ndarray, masks:np.ndarray)->dict:
    "The same by a tally, one by one."
    tally = Tally()
    for m, mask in zip(maps, masks): tally.add(m[None], mask[None])
    return tally.metrics()


def theirs(maps:np.ndarray, masks:np.ndarray):
    "Two metrics, by scikit-learn."
    truth, scores = masks.ravel(), maps.ravel()
    return metrics.roc_auc_score(truth, scores), metrics.precision_recall_curve(truth, scores)


RUNS = {SKLEARN: theirs, OURS: judged, ONE_BY_ONE: tallied}

def watched(
    name:str, # in `RUNS`
    *args,    # for `made`
)->int: # bytes; None where the system does not tell
    "Peak memory on top of the maps; for `fresh`."
    maps, masks = made(*args)
    RUNS[name](*made(2, 2, 32)) # libraries take memory of their own as they start
    found = {}
    with watch(found, .002): RUNS[name](maps, masks)
    return found['peak']


def stream(
    n:int,     # how many maps
    size:int,  # of a side
    seed:int=0,
):
    "(map, mask) by (map, mask): sixteen good and sixteen defective ones, again and again, each time another piece of them on another scale."
    rng, (maps, masks) = np.random.default_rng(seed), made(16, 16, size, seed)
    for i in range(n):
        shift, j = rng.integers(size, size=2), i % len(maps)
        m, mask = (np.roll(o[j], shift, (0, 1)) for o in (maps, masks))
        yield (m*np.float32(rng.uniform(.8, 1.25)))[None], mask[None] if mask.any() else None


def many(
    n:int,
    size:int,
)->dict: # a row
    "Count maps under watch; for `fresh`."
    found, tally = {}, Tally()
    def run():
        for m, mask in stream(n, size): tally.add(m, mask)
        found['metrics'] = tally.metrics()
    with watch(found):
        making = seconds(lambda: [None for _ in stream(n, size)])
        taken = seconds(run)
    metrics, rows = found['metrics'], tally.rows()['good']
    return dict(maps=n, size=size, gigabytes=n*size**2*4/1e9, seconds=taken, making=making, megabytes=None if found['peak'] is None else found['peak']/1e6,
                pixel_auroc=metrics['pixel_auroc'], bound=tally.bounds()['pixel_auroc'], aupimo=metrics['aupimo'], columns=rows.shape[1])


def main():
    args = options(__doc__)
    shape = (3, 5, 64) if args.quick else (20, 63, 224)
    maps, masks = made(*shape)
    times = race({name: lambda f=f: f(maps, masks) for name, f in RUNS.items()}, 1 if args.quick else 7)
    exact, tally = judged(maps, masks), tallied(maps, masks)
    off = {SKLEARN: 0, OURS: abs(exact['pixel_auroc']-theirs(maps, masks)[0]), ONE_BY_ONE: max(abs(tally[k]-v) for k, v in exact.items() if 'threshold' not in k)}
    rows = rows_of(times, SKLEARN, maps=len(maps), size=shape[2])
    for r in rows:
        peak = fresh(watched, r['what'], *shape)
        r |= dict(memory=None if peak is None else peak/maps.nbytes, megabytes=None if peak is None else peak/1e6, off=off[r['what']])
    large = [fresh(many, *o) for o in ([(20, 64)] if args.quick else [(500, 512), (1000, 512), (2000, 512)])]
    report(args, __file__, f'all pixel metrics of {len(maps)} maps of {shape[2]} x {shape[2]}; memory on top of the maps, as a multiple of them', rows, large=large, metrics=[exact])


if __name__ == '__main__': main()
