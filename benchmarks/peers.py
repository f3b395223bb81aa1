"""This package beside its peers, on the same images, weights and share of the patches.

`python benchmarks/peers.py` fits and judges bottle with ResNet-18 where PATCHCORE_NB_TESTDATA names a folder with data/ and
weights/, else cogs of the demo set with random weights. The reference's stages are those of our slow twins: unfold and pool,
one pick after the other, faiss's flat index, interpolate and filter. anomalib's Patchcore runs where it is installed, which
`make peers` does in an environment of its own. Each runs in a process of its own, whose memory is watched, beside this package
with the settings of that peer. Prints a table and writes results/peers.json.
"""
import logging
import tempfile
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from common import bottle, fresh, options, report, seconds, watch
from torch import Tensor

from patchcore_nb.aggregator import unfold_and_pool
from patchcore_nb.auc import auroc
from patchcore_nb.core import generator
from patchcore_nb.data import Category, load_category
from patchcore_nb.extractor import create_backbone
from patchcore_nb.maps import naive_maps
from patchcore_nb.presets import preset
from patchcore_nb.projection import project


class Task(NamedTuple):
    "What all are given."
    root:Path      # folder of the category: train/good and test/KIND
    train:list     # files
    test:list      # files
    labels:list    # whether each is defective
    ratio:float    # share of the patches to keep
    network:dict   # arguments of `PatchCore`


def task_of(
    category:Category,
    network:dict,
    quick:bool,
)->Task:
    "Take a category, or a few images of it."
    train, test = category.train, category.test
    if quick: train, test = train[:4], test[::6]
    paths = [[str(s.path) for s in o] for o in (train, test)]
    return Task(category.train[0].path.parents[2], *paths, [s.label for s in test], .01, network)


@contextmanager
def clocked(
    owner:object, # that has the function
    name:str,
    into:list,    # gets the seconds of each call
):
    "Time calls of a function that somebody else calls."
    inner = getattr(owner, name)
    def outer(*args, **kw): into.append(seconds(lambda: inner(*args, **kw)))
    setattr(owner, name, outer)
    try: yield
    finally: setattr(owner, name, inner)


def measured(fit, predict)->dict: # seconds of both, peak of both in bytes, scores
    "Run both, once, under watch."
    found, scores = {}, []
    with watch(found):
        fitting = seconds(fit)
        judging = seconds(lambda: scores.extend(predict()))
    return dict(fit=fitting, predict=judging, peak=found['peak'], scores=scores)


# This package

def ours(
    task:Task,
    name:str, # of a preset
)->dict:
    "Fit and judge with the settings of a peer."
    model = preset(name, ratio=task.ratio, device='cpu', **task.network)
    found = measured(lambda: model.fit(task.train), lambda: model.predict(task.test).image_scores.tolist())
    return found | dict(coreset=next(o.seconds for o in model.stages_ if o.stage == 'coreset'))


# The reference, stage by stage

def pick_one_by_one(
    rows:Tensor, # (N, D)
    n:int,       # how many to pick
)->Tensor: # (n,) int64
    "Pick the row that is farthest from all picks, and measure all rows against it, again and again."
    low = project(rows)
    sq = low.square().sum(1)
    def far(i): return (sq+sq[i]-2*(low @ low[i])).clamp_(min=0).sqrt_()
    some = torch.randperm(len(low), generator=generator(0))[:10]
    anchors, picks = torch.stack([far(i) for i in some]).mean(0), []
    for _ in range(n):
        picks.append(int(anchors.argmax()))
        anchors = torch.minimum(anchors, far(picks[-1]))
    return torch.tensor(picks)


class Reference:
    "The reference's stages, as our twins have them."
    def __init__(self, task:Task):
        self.task, self.took = task, []
        self.embedder = preset('reference', device='cpu', **task.network).check().embedder_

    @torch.inference_mode()
    def embed(self, paths)->Tensor: # (n*h*w, D)
        "Embed images, eight at a time."
        parts = []
        for i in range(0, len(paths), 8):
            images = torch.stack([self.embedder.read(o) for o in paths[i:i+8]])
            parts.append(unfold_and_pool(self.embedder.extractor_(images)))
        self.grid = parts[0].shape[1:3]
        return torch.cat(parts).flatten(0, 2)

    def fit(self):
        "Embed, pick, index."
        import faiss
        rows = self.embed(self.task.train)
        picks = []
        self.took.append(seconds(lambda: picks.append(pick_one_by_one(rows, int(len(rows)*self.task.ratio)))))
        self.index = faiss.IndexFlatL2(rows.shape[1])
        self.index.add(rows[picks[0]].numpy())

    def predict(self)->list: # a score each
        "Embed, search, draw maps."
        dists, _ = self.index.search(self.embed(self.task.test).numpy(), 1)
        patch_scores = torch.from_numpy(dists).view(len(self.task.test), *self.grid)
        naive_maps(patch_scores, self.embedder.preprocess_.size)
        return patch_scores.amax((1, 2)).tolist()


def reference(task:Task)->dict:
    "The reference's stages one after the other."
    it = Reference(task)
    return measured(it.fit, it.predict) | dict(coreset=it.took[0])


# anomalib

def anomalib(task:Task)->dict:
    "anomalib's own engine, without what it need not do: no validation, no figures, no pictures."
    for o in ('lightning', 'lightning.pytorch', 'anomalib'): logging.getLogger(o).setLevel(logging.ERROR)
    warnings.simplefilter('ignore')
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Patchcore
    kinds = sorted(o.name for o in (task.root/'test').iterdir() if o.is_dir() and o.name != 'good')
    data = Folder('it', 'train/good', task.root, [f'test/{o}' for o in kinds], 'test/good', num_workers=0, val_split_mode='same_as_test', seed=0)
    model = Patchcore('resnet18', pre_trained=False, coreset_sampling_ratio=task.ratio, post_processor=False, evaluator=False, visualizer=False)
    weights = create_backbone('resnet18', task.network.get('weights', 'pretrained'), task.network.get('weights_dir')).state_dict()
    missing = model.model.feature_extractor.feature_extractor.load_state_dict(weights, strict=False).missing_keys
    if missing: raise SystemExit(f'anomalib has weights of which we know nothing: {missing[:3]}')
    took, found = [], {}
    with tempfile.TemporaryDirectory() as temp, clocked(model.model, 'subsample_embedding', took):
        engine = Engine(default_root_dir=temp, logger=False, accelerator='cpu', devices=1, enable_progress_bar=False, limit_val_batches=0)
        def predict():
            for batch in engine.predict(model=model, datamodule=data):
                for path, score in zip(batch.image_path, batch.pred_score.flatten().tolist()): found[str(path)] = score
            return [found[o] for o in task.test]
        return measured(lambda: engine.fit(model=model, datamodule=data), predict) | dict(coreset=took[0])


# Side by side

def row(
    what:str,
    baseline:str, # the name of what it is compared with
    found:dict,
    base:dict,    # what was found of that
    task:Task,
)->dict:
    "A row of the table: seconds, and time as a multiple of ours."
    def both(o): return o['fit']+o['predict']
    peak = found['peak'] and found['peak']/1e6
    times = dict(seconds=both(found), ratio=both(found)/both(base)) | {k: found[k] for k in ('fit', 'coreset', 'predict')}
    figures = dict(peak_MB=peak, image_auroc=float(auroc(found['scores'], task.labels)))
    return dict(what=what, baseline=baseline, images=len(task.train)+len(task.test)) | times | figures


def agreement(
    peer:str,
    one:list,   # scores
    other:list, # of the same images
)->dict:
    "How far two kinds of scores agree."
    a, b = torch.tensor(one).double(), torch.tensor(other).double()
    ranks = torch.stack([o.argsort().argsort().double() for o in (a, b)])
    return dict(peer=peer, median_of_ratios=float((a/b).median()), correlation_of_ranks=float(torch.corrcoef(ranks)[0, 1]))


def main():
    args = options(__doc__)
    peers = dict(reference=(reference, "the reference's stages", 'faiss'), anomalib=(anomalib, 'anomalib', 'anomalib'))
    with tempfile.TemporaryDirectory() as temp:
        real = None if args.quick else bottle()
        category, network = real or (load_category('demo', Path(temp), 'cog'), dict(backbone='resnet18', weights='random'))
        task, rows, agree = task_of(category, network, args.quick), [], []
        for name, (run, label, library) in peers.items():
            if find_spec(library) is None:
                print(f'{label}: left out, since {library} is not installed')
                continue
            if library == name: label += f' {version(library)}'
            theirs, own = fresh(run, task), fresh(ours, task, name)
            us = f'patchcore_nb --preset {name}'
            rows += [row(us, us, own, own, task), row(label, us, theirs, own, task)]
            agree.append(agreement(label, own['scores'], theirs['scores']))
    if len(rows) < 4 and not args.quick: raise SystemExit('nothing is written, since not all peers are here: make peers')
    report(args, __file__, f'fit and predict of {category.name} with {network["backbone"]}, a hundredth of the patches', rows, agreement=agree)


if __name__ == '__main__': main()
