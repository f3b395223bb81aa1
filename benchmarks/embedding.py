"""Feature maps to patch embeddings: `Aggregator` against its twin `unfold_and_pool`, the reference's recipe.

`python benchmarks/embedding.py` times both on the maps of three backbones, 8 images at a time, and takes their largest
difference as a part of the largest value. Prints a table and writes results/embedding.json.
"""
import torch
from common import DEVICES, options, race, report, rows_of

from patchcore_nb.aggregator import Aggregator, unfold_and_pool
from patchcore_nb.core import generator

BACKBONES = {'resnet18': [(128, 28), (256, 14)], 'wide_resnet50_2': [(512, 28), (1024, 14)], 'densenet201': [(512, 28), (1792, 14), (1920, 7)]} # channels, cells


def compare(
    name:str,   # a name in `BACKBONES`
    device:str,
    quick:bool,
)->list[dict]:
    "All rows for the maps of one backbone."
    shapes, g = BACKBONES[name], generator(0)
    plain = {str(i): torch.randn(1 if quick else 8, c, s, s, generator=g).relu_().to(device) for i, (c, s) in enumerate(shapes)}
    last = {k: v.contiguous(memory_format=torch.channels_last) for k, v in plain.items()}
    aggregate, found = Aggregator().fit([c for c, _ in shapes], device), {}
    def run(what, f, maps): return lambda: found.update({what: f(maps).contiguous()})
    with torch.inference_mode():
        times = race({'unfold_and_pool': run('unfold_and_pool', unfold_and_pool, plain), 'Aggregator': run('Aggregator', aggregate, last),
                      'Aggregator, channels first': run('Aggregator, channels first', aggregate, plain)}, 1 if quick else 5)
    rows, twin = rows_of(times, 'unfold_and_pool', maps=name, channels='+'.join(str(c) for c, _ in shapes), device=device), found['unfold_and_pool']
    return [r | dict(faster=1/r['ratio'], deviation=float((found[r['what']]-twin).abs().max()/twin.abs().max())) for r in rows]


def main():
    args = options(__doc__)
    rows = [row for device in DEVICES for name in list(BACKBONES)[:1 if args.quick else None] for row in compare(name, device, args.quick)]
    report(args, __file__, 'patch embeddings of 1,024 values from the maps of 8 images, 28 x 28 patches each', rows)


if __name__ == '__main__': main()
