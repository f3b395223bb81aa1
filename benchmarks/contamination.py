"""What defective images among the training images cost, what `denoise` regains, and where `suspects` lists them.

`python benchmarks/contamination.py` mixes defective test images into the training sets of the categories of the demo set,
which are larger than usual, and draws four times which ones. The images mixed in are then judged as well (overlap), or
taken out of the test set (apart). It prints tables and writes results/contamination.json.
"""
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import larger_demo, options, race, report, rows_of
from torch import Tensor

from patchcore_nb.data import Category, read_masks
from patchcore_nb.demo import DEMO_CATEGORIES
from patchcore_nb.embedder import Embedder
from patchcore_nb.evaluation import auroc
from patchcore_nb.patchcore import PatchCore

SHARES, AMOUNTS, DRAWS = (.025, .05, .1), (0., .02, .05, .1, .15), 4
FIRST, EVERY = .1, 4 # part of the list of suspects that is looked at; pixels from one that is judged to the next
NOISE = .005 # a loss of AUROC that another seed could bring about
METRICS = 'image_auroc', 'pixel_auroc'


class KeptEmbedder(Embedder):
    "Embeddings that are at hand; the backbone has seen the good images already, and is the same for all mixtures."
    kept:dict # path -> (h, w, D)

    def calibrated(self, items): return self

    def __call__(self, items:Sequence, word:str='')->Iterator[Tensor]: # (B, h, w, D)
        "Look embeddings up, batch by batch."
        paths = [o[0] if isinstance(o, tuple) else o for o in items]
        size = self.how.batch_size
        for i in range(0, len(paths), size): yield torch.stack([self.kept[o] for o in paths[i:i+size]])


class Kept(PatchCore):
    "A model that begins where embeddings end, and does from there what every model does."
    _kept = None # what `embed` returned

    def check(self, images=None, twin=None):
        "Take the embedder that knows them."
        self._checked = KeptEmbedder(self.embedding, self.compute)
        self._checked.kept = self._kept
        return self


def embed(
    category:Category,
    **kw,             # arguments of the model
)->dict[Path,Tensor]: # (h, w, D) of each image
    "Patch embeddings of all images, by a backbone that was calibrated on the good ones."
    paths = [o.path for o in (*category.train, *category.test)]
    embedder = PatchCore(**kw).check().embedder_.calibrated([o.path for o in category.train])
    return dict(zip(paths, (p for batch in embedder(paths) for p in batch)))


def ready(
    kept:dict,        # what `embed` returned
    **kw,             # arguments of the model
)->Kept: # not fitted
    "A model that takes its embeddings from memory."
    model = Kept(**kw)
    model._kept = kept
    return model


def mix(
    category:Category,
    share:float, # of the training set, [0, 1)
    draw:int,    # which of the defective images; a larger share holds those of a smaller one
)->tuple[list[Path],np.ndarray]: # the training set; indices of the test images that are in it
    "Mix defective images into the training set."
    bad = np.flatnonzero([o.label for o in category.test])
    chosen = np.random.default_rng(draw).permutation(bad)[:round(share*len(category.train)/(1-share))]
    return [o.path for o in category.train]+[category.test[i].path for i in chosen], chosen


def judged(
    model:PatchCore, # fitted
    category:Category,
    masks:Tensor,    # (B, H, W) of the test images
    settings:dict[str,np.ndarray], # name -> (B,) which test images count
)->dict[str,dict[str,float]]: # name -> metrics
    "Image and pixel AUROC."
    seen, labels = model.predict([o.path for o in category.test]), np.array([o.label for o in category.test])
    maps, masks = seen.anomaly_maps[:, ::EVERY, ::EVERY].numpy(), masks[:, ::EVERY, ::EVERY].numpy()
    return {name: dict(zip(METRICS, (auroc(seen.image_scores.numpy()[of], labels[of]), auroc(maps[of], masks[of])))) for name, of in settings.items()}


def listed(
    model:PatchCore, # fitted, on a mixture
    n_good:int,      # how many good images the mixture begins with
)->float: # in [0, 1]; NaN if all are good
    "The part of the images mixed in that are in the first tenth of the list of suspects."
    table = model.suspects()
    first = table.image[:math.ceil(FIRST*len(table))]
    return float((first >= n_good).sum()/(len(table)-n_good)) if len(table) > n_good else np.nan


def tried(
    name:str,      # of the category
    category:Category,
    kept:dict,     # what `embed` returned
    kw:dict,       # arguments of the model
    shares:Sequence[float], amounts:Sequence[float],
    draw:int,      # also the models' seed
)->list[dict]: # a row for each share, amount and setting, with the metrics of a model that saw good images alone
    "Every combination, for one draw."
    n, mixtures = len(category.test), {share: mix(category, share, draw) for share in (0., *shares)}
    settings = {'overlap': np.ones(n, bool)} | {share: ~np.isin(np.arange(n), chosen) for share, (_, chosen) in mixtures.items()}
    rows, good = [], None
    for share, (train, chosen) in mixtures.items():
        for amount in amounts:
            model = ready(kept, **kw, denoise=amount, seed=draw, false_alarms=None if amount else .05).fit(train)
            metrics = judged(model, category, read_masks(category.test, model.preprocess_), settings)
            good = good or metrics
            found = np.nan if amount else listed(model, len(category.train))
            rows += [dict(data=name, setting=setting, share=share, mixed=len(chosen), draw=draw, denoise=amount, listed=found, **metrics[key], **{f'good_{k}': v for k, v in good[key].items()})
                     for setting, key in (('overlap', 'overlap'), ('apart', share))]
    return rows


def regained(
    table:pd.DataFrame, # what `tried` returned
    by:list[str],       # columns whose values are told apart
)->pd.DataFrame: # of both metrics: lost, back, and as a part of what was lost; no part of a loss that may be noise
    "What the images mixed in cost, and what `denoise` wins back of it, over all draws."
    base = [o for o in table if o in ('data', 'setting', 'share', 'draw')]
    table = table[table.share > 0].merge(table[table.denoise == 0][base+[*METRICS]], on=base, suffixes=('', '_mixed'))
    for o in METRICS: table = table.assign(**{f'lost_{o}': table[f'good_{o}']-table[f'{o}_mixed'], f'back_{o}': table[o]-table[f'{o}_mixed']})
    means = table.groupby(by, sort=False)[[f'{k}_{o}' for o in METRICS for k in ('lost', 'back')]].mean().reset_index()
    for o in METRICS: means[f'regained_{o}'] = (means[f'back_{o}']/means[f'lost_{o}']).where(means[f'lost_{o}'] > NOISE)
    return means


def main():
    args, rows = options(__doc__), []
    shares, amounts, draws = ((.1,), (0., .05), 1) if args.quick else (SHARES, AMOUNTS, DRAWS)
    kw = dict(backbone='filterbank', target_dim=256, ratio=.02, device='cpu')
    with tempfile.TemporaryDirectory() as temp:
        for name in DEMO_CATEGORIES[-1:] if args.quick else DEMO_CATEGORIES:
            category = larger_demo(Path(temp), name, *((9, 3, 2) if args.quick else (80, 40, 20)))
            kept = embed(category, **kw)
            for draw in range(draws): rows += tried(name, category, kept, kw, shares, amounts, draw)
        train, _ = mix(category, shares[-1], 0)
        fits = {what: lambda amount=amount: ready(kept, **kw, denoise=amount).fit(train) for what, amount in (('fit', 0.), ('fit, denoise 0.05', .05))}
        times = race(fits, 1 if args.quick else 5)
    table = pd.DataFrame(rows)
    means = table.groupby(['data', 'setting', 'share', 'denoise'], sort=False)[['mixed', 'listed', *METRICS, *(f'good_{o}' for o in METRICS)]].mean().reset_index()
    spread = table.groupby(['data', 'setting', 'share', 'denoise'], sort=False)[[*METRICS]].std().reset_index(drop=True).add_suffix('_std')
    plain = {k: o.astype(object).where(o.notna(), None).to_dict('records') for k, o in dict(
        regained=regained(table, ['setting', 'share', 'denoise']), of_each=regained(table, ['data', 'setting', 'share', 'denoise']), means=means.join(spread)).items()}
    report(args, __file__, f'{len(table)//2} models of training sets with 0% to {max(shares):.0%} of defective images; seconds of a fit on {name} whose embeddings are at hand', rows_of(times, 'fit', device='cpu'), **plain)


if __name__ == '__main__': main()
