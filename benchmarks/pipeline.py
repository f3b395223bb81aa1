"""`predict`, and `fit` without its coreset, on images in memory, against the bare backbone.

`python benchmarks/pipeline.py` takes decoded images of the demo set and random weights. The baseline is the backbone
alone, cut off after the last layer in use, on tensors that are ready, in the same batches, type and order in memory. The
stages are timed one after the other, each on what the one before it made. Prints a table and writes results/pipeline.json.
"""
import torch
from common import DEVICES, options, race, report, rows_of, wait
from torch import Tensor, nn

from patchcore_nb.core import full_precision
from patchcore_nb.demo import demo_sample
from patchcore_nb.extractor import create_backbone
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.maps import make_maps

PATHS = 'conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2', 'layer3' # of a ResNet, as far as it is used


class Bare:
    "A ResNet up to layer3."
    def __init__(self, model:PatchCore, images:Tensor, layout:torch.memory_format, precision:str):
        net = create_backbone(model.backbone, 'random')
        self.net = nn.Sequential(*(getattr(net, o) for o in PATHS)).to(images.device, memory_format=layout)
        self.batches, self.precision = [o.contiguous(memory_format=layout) for o in images.split(model.batch_size)], precision

    @torch.inference_mode()
    def __call__(self):
        for o in self.batches:
            with full_precision(), torch.autocast(o.device.type, torch.bfloat16, enabled=self.precision == 'bfloat16'): self.net(o)


def stages(
    model:PatchCore, # fitted
    images:Tensor,   # (n, 3, H, W)
)->dict: # stage -> what to time
    "The stages of `predict`, each on what the one before it made."
    size, made = tuple(images.shape[2:]), {'images': images.split(model.batch_size)}
    def stage(name, before, f):
        @torch.inference_mode()
        def run(): made[name] = [f(o) for o in made[before]]
        return run
    return {'1 extract': stage('maps', 'images', model.extractor_), '2 embed': stage('patches', 'maps', lambda o: model.aggregator_(o).contiguous()),
            '3 search': stage('scores', 'patches', model.scorer_), '4 maps': stage('anomaly maps', 'scores', lambda o: make_maps(o.patch_scores, size).cpu())}


def compare(
    backbone:str,
    precision:str, # "float32" or "bfloat16"
    device:str,
    quick:bool,
)->list[dict]:
    "All rows for one backbone."
    n, n_train, rounds = (2, 2, 1) if quick else (16, 21, 4)
    kw = dict(imagesize=64, resize=64) if quick else {}
    train, test = ([demo_sample('cog', split, i)[0] for i in range(m)] for split, m in (('train', n_train), ('test', n)))
    model = PatchCore(backbone, ratio=1, weights='random', device=device, **kw).fit(train)
    model.extractor_.precision = precision
    images = torch.stack([model.embedder_.read(o) for o in test]).to(device)
    usual = torch.channels_last if device == 'cpu' else torch.contiguous_format
    bare = 'backbone alone'
    runs = {bare: Bare(model, images, usual, precision), 'predict': lambda: model.predict(test), 'fit without the coreset': lambda: [wait() for _ in model.embedder_(test)]}
    if device == 'cpu': runs['backbone alone, channels first'] = Bare(model, images, torch.contiguous_format, precision)
    times = race(runs | stages(model, images), rounds)
    return [r | dict(milliseconds_an_image=1e3*r['seconds']/n) for r in rows_of(times, bare, backbone=backbone, precision=precision, device=device, rows=len(model.memory_bank_))]


def main():
    args = options(__doc__)
    subjects = [('resnet18', 'float32')] if args.quick else [(b, p) for b in ('wide_resnet50_2', 'resnet18') for p in ('float32', 'bfloat16')]
    rows = [row for device in DEVICES for b, p in subjects for row in compare(b, p, device, args.quick)]
    report(args, __file__, 'predict and fit on 224 x 224 pixels, 8 images at a time, against the backbone up to layer3', rows)


if __name__ == '__main__': main()
