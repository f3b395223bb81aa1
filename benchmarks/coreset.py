"""Greedy picking against the floor: one matrix product of the same size, at the block size that suits it best.

`python benchmarks/coreset.py` picks a tenth of 163,856 rows of 128 values: projected patches of real images, isotropic
noise, tight clusters. Every pick is certified in double precision. The twin and, where it is installed, torch_quickfps
are timed on their first picks and scaled up. Prints a table and writes results/coreset.json.
"""

import torch
from common import (
    DEVICES,
    clusters,
    fresh,
    isotropic,
    on_disk,
    options,
    pick_watched,
    race,
    real_patches,
    report,
    rows_of,
    seconds,
)
from torch import Tensor

from patchcore_nb.core import generator, in_threads
from patchcore_nb.samplers import (
    farthest_points,
    naive_farthest_points,
    project,
    start_mean,
)

try: import torch_quickfps
except ImportError: torch_quickfps = None

BLOCKS = (1024, 512), (2048, 1024), (4096, 1024), (8192, 512), (2048, 4096) # rows of the bank, picks


def floor(
    bank:Tensor,    # (N, d)
    n:int,          # M, picks
    part:float=.05, # of all the work is done for each block size
)->float: # seconds for all of it
    "How long the matrix product (N, d) x (d, M) takes, thrown away block by block."
    N, found = len(bank), []
    for rows, cols in BLOCKS:
        rows, cols = min(rows, N), min(cols, n)
        picks, out = bank[:cols].T.contiguous(), torch.empty(rows, cols, device=bank.device)
        starts = [i*rows % (N-rows+1) for i in range(max(2, round(part*N*n/(rows*cols))))]
        torch.mm(bank[:rows], picks, out=out)
        taken = seconds(lambda: [torch.mm(bank[i:i+rows], picks, out=out) for i in starts])
        found.append(taken*N*n/(len(starts)*rows*cols))
    return min(found)


def certificate(
    bank:Tensor,  # (N, d)
    idxs:Tensor,  # (M,) picks in order
    start:Tensor, # (N,) anchor distances that the picking started from
)->float: # 0 for a perfect run
    "Largest relative amount by which any pick's anchor distance, in float64, is below the largest of its step: `samplers.shortfall`, for many picks."
    x = bank.double()-bank.double().mean(0)
    sq, one = x.square().sum(1, keepdim=True), torch.ones(len(x), 1, dtype=torch.float64)
    right, x = torch.cat([-2*x, one, sq], 1), torch.cat([x, sq, one], 1) # so that a product of their rows is all of |x|^2-2xp+|p|^2
    anchors, worst, n, nothing = start.double().square(), 0., 16, 1e-12*float(sq.max())
    while len(idxs): # n picks at a time
        some, idxs, n = idxs[:n], idxs[n:], min(2*n, 256)
        picks = right[some].T.contiguous()
        def before(r): return torch.cat([anchors[r, None], x[r] @ picks[:, :-1]], 1).cummin(1)[0] # (R, n) squared anchor distances before each pick
        own = before(some).diagonal().clamp(min=0) # (n,)
        top = own.clone()
        for r in (anchors > own.min()).nonzero()[:, 0].split(4096): top = torch.maximum(top, before(r).amax(0)) # the other rows are below all of these picks
        worst = max(worst, float(torch.where(top > nothing, 1-(own/top.clamp(min=nothing)).sqrt(), 0).max()))
        def lower(share):
            for a, y in zip(anchors[share].split(1024), x[share].split(1024)): torch.minimum(a, (y @ picks).amin(1), out=a)
        in_threads(lower, len(x))
    return worst


def compare(
    name:str,    # of the data
    bank:Tensor, # (N, d), on any device
    quick:bool,
)->list[dict]:
    "All rows for one bank."
    n, device, picks = len(bank)//10, bank.device.type, 4 if quick else 16
    start = start_mean(bank, torch.randperm(len(bank), generator=generator(0))[:10].to(bank.device))
    found, floors = [], []
    farthest_points(bank[:5000], min(n, 500)) # warm
    times = race({'the floor': lambda: floors.append(floor(bank, n)), 'farthest_points': lambda: found.append(farthest_points(bank, n, start))}, 2 if quick else 3, warm=False)
    times['the floor'] = floors
    rows = rows_of(times, 'the floor', data=name, device=device, scaled_from=None)
    def scaled(what, run, k):
        base, taken = floor(bank, n), (seconds(lambda: run(k+1))-seconds(lambda: run(1)))*n/k
        rows.append(dict(data=name, device=device, what=what, baseline='the floor', seconds=taken, ratio=taken/base, scaled_from=k))
    scaled('naive_farthest_points', lambda k: naive_farthest_points(bank, k, start), picks)
    if torch_quickfps and device == 'cpu': scaled('torch_quickfps', lambda k: torch_quickfps.sample_idx(bank, k), 16*picks)
    if not all(torch.equal(o.idxs, found[0].idxs) for o in found): raise SystemExit('farthest_points picked differently the second time')
    with on_disk(bank.cpu()) as path: peak = fresh(pick_watched, path, n, device)['peak']
    rows[1] |= dict(shortfall=certificate(bank.cpu(), found[0].idxs.cpu(), start.cpu()), extra_memory=None if peak is None else peak/bank.nbytes)
    return rows


def main():
    args = options(__doc__)
    name, bank, _ = real_patches(args.quick)
    n, bank = len(bank), project(bank)
    if args.quick: n, bank = 3000, bank[:3000].clone()
    banks = {name: bank}
    if not args.quick: banks |= {'isotropic': isotropic(n, 128), 'clusters': clusters(n, 128)}
    rows = [row for device in DEVICES for name, bank in banks.items() for row in compare(name, bank.to(device), args.quick)]
    report(args, __file__, f'{n//10:,} picks of {n:,} rows of 128 values; the floor is one matrix product of that size; memory on top of the input, as a part of it', rows)


if __name__ == '__main__': main()
