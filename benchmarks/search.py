"""Ways of finding the nearest neighbour, against faiss IndexFlatL2.

`python benchmarks/search.py` searches a memory bank for all patches of the test images, in batches of 8 images, and for
those of every fourth image in further ways, which save memory or were tried and dropped; then in synthetic rows, and in
banks that grow. A neighbour counts as right if its distance, in double precision, is within 1e-5 of the smallest. Prints two tables and
writes results/search.json.
"""
import faiss
import torch
from common import (
    DEVICES,
    decaying,
    isotropic,
    options,
    race,
    real_patches,
    report,
    rows_of,
)
from torch import Tensor

from patchcore_nb.core import generator
from patchcore_nb.names import SEARCHES
from patchcore_nb.samplers import coreset
from patchcore_nb.search import (
    ByProduct,
    Exact,
    Sketch,
    pair_dists,
    principal_axes,
    product,
    sketch,
)

BATCH, SIZES = 8*784, (1024, 4096, 16384, 65536)


# What else was tried

class Flat:
    "faiss, the baseline."
    def make(self, d): return faiss.IndexFlatL2(d)
    def seen(self, rows): return rows

    def fit(self, bank):
        self.index_ = self.make(bank.shape[1])
        self.index_.add(self.seen(bank).numpy())
        return self

    def __call__(self, queries, k=1):
        faiss.omp_set_num_threads(torch.get_num_threads())
        d, i = self.index_.search(self.seen(queries).contiguous().numpy(), k)
        return torch.from_numpy(d), torch.from_numpy(i)


class Panorama(Flat):
    "faiss on principal coordinates: partial distances with bounds for the rest, level by level."
    levels = 8
    def make(self, d): return faiss.IndexFlatL2Panorama(d, self.levels)
    def seen(self, rows): return product(rows-self.centre_, self.basis_)

    def fit(self, bank):
        self.centre_ = bank.mean(0)
        self.basis_ = principal_axes(bank, self.centre_).T.contiguous()
        return super().fit(bank)


class Partial:
    "The first principal coordinates by a product in float32; all of them where the bound asks for it."
    dims, block = 256, 512

    def fit(self, bank):
        centre = bank.mean(0)
        self.bank_, self.sketch_ = bank, Sketch(centre, principal_axes(bank, centre)[:, :self.dims].T.contiguous())
        self.y_ = self.seen(bank)
        self.sq_ = self.y_.square().sum(1)
        return self

    def seen(self, rows): # (n, dims+1): what is left out is one coordinate more, its length
        y, rest = sketch(rows, self.sketch_)
        return torch.cat([y, rest.sqrt()[:, None]], 1)

    def __call__(self, queries, k=1): # k = 1 alone
        found = [self.search(q) for q in queries.split(self.block)]
        return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])

    def search(self, q):
        y = self.seen(q)
        bound = torch.addmm(self.sq_[None], y, self.y_.T, alpha=-2).add_(y.square().sum(1)[:, None]) # (n, M) squared
        first = bound.argmin(1)
        far = pair_dists(q, torch.arange(len(q), device=q.device), self.bank_, first)
        r, j = (bound <= far.square()[:, None]*(1+1e-4)).nonzero(as_tuple=True)
        d = pair_dists(q, r, self.bank_, j)
        best = far.scatter_reduce(0, r, d, 'amin')
        hit = d == best[r]
        return best.square()[:, None], first.scatter(0, r[hit], j[hit])[:, None]


class AllDims(Exact):
    "Eight bits for every dimension, no sketch."
    def _choose(self, rows, m): return rows.shape[1], 0


MAIN = {'faiss flat': Flat, 'product': ByProduct, **{o: SEARCHES[o] for o in ('exact', 'fast')}}
MORE = {'faiss flat': Flat, 'faiss panorama': Panorama, 'partial': Partial, 'no sketch': AllDims, **{o: SEARCHES[o] for o in ('fp16', 'int8', 'ivfpq')}}
if not hasattr(faiss, 'IndexFlatL2Panorama'): del MORE['faiss panorama']
ON_GPU = dict(list(MAIN.items())[1:]), {o: (MAIN | MORE)[o] for o in ('product', 'partial', 'no sketch', 'fp16', 'int8')} # the product is the baseline there


# Measuring

def size(
    o, # a fitted search, or anything in it
)->dict[int,int]: # storage -> bytes
    "Memory that a search holds on to, the bank included."
    if isinstance(o, Tensor): return {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes()}
    if isinstance(o, faiss.Index): return {id(o): faiss.serialize_index(o).nbytes}
    inside = o if isinstance(o, list|tuple) else getattr(o, '__dict__', {}).values()
    return {k: v for x in inside for k, v in size(x).items()}


def true_dists(
    queries:Tensor, # (Q, D)
    bank:Tensor,    # (M, D)
)->Tensor: # (Q,) float64
    "Smallest distances, by product in double precision."
    centre = bank.double().mean(0)
    x = bank.double()-centre
    sq = x.square().sum(1)
    def least(q): return torch.addmm(sq[None], q, x.T, alpha=-2).amin(1).add_(q.square().sum(1)).clamp_(min=0).sqrt_()
    return torch.cat([least(q.double()-centre) for q in queries.split(1024)])


def share_right(
    queries:Tensor, # (Q, D)
    bank:Tensor,    # (M, D)
    idxs:Tensor,    # (Q,) what was found
    true:Tensor,    # (Q,) smallest distances
)->float: # 0 to 1
    "Share of queries whose neighbour is as near as the nearest, within 1e-5."
    parts = zip(*(o.split(1024) for o in (queries, idxs, true)))
    return sum(int(((q.double()-bank[i].double()).norm(dim=1) <= t*(1+1e-5)).sum()) for q, i, t in parts)/len(queries)


def compare(
    data:str,       # name
    bank:Tensor,    # (M, D)
    queries:Tensor, # (Q, D)
    ways:dict,      # name -> class, the baseline first
    device:str,
    rounds:int=1,   # through all batches
    check:bool=True, # whether neighbours are right?
)->list[dict]: # seconds are for all queries
    "All rows for one bank: every batch is searched in all ways before the next one is."
    bank, queries = bank.to(device), queries.to(device)
    fitted, times, found, batches = {o: c().fit(bank) for o, c in ways.items()}, {o: [] for o in ways}, {o: [] for o in ways}, queries.split(BATCH)
    for s in fitted.values(): s(batches[0][:1000]) # warm
    for q in batches*rounds:
        took = race({o: lambda o=o: found[o].append(fitted[o](q)[1][:, 0]) for o in ways}, 1, warm=False)
        for o in ways: times[o] += took[o]
    true = true_dists(queries, bank) if check else None
    rows = rows_of(times, list(ways)[0], data=data, device=device, rows=len(bank), queries=len(queries))
    for row in rows:
        o = row['what']
        row |= dict(seconds=sum(times[o])/rounds, faster=1/row['ratio'], megabytes=sum(size(fitted[o]).values())/1e6)
        if check: row['right'] = share_right(queries, bank, torch.cat(found[o][:len(batches)]), true)
    return rows


def main():
    args = options(__doc__)
    name, patches, queries = real_patches(args.quick)
    fourth = queries.view(-1, 784, queries.shape[1])[::4].flatten(0, 1)
    if args.quick: patches, queries, fourth = patches[:6272], queries[:1000], fourth[:500]
    order = torch.randperm(len(patches), generator=generator(0))
    bank = patches[coreset(patches, .3 if args.quick else .1).idxs]
    m, some, rows, growth = len(bank), fourth[:BATCH], [], []
    for device in DEVICES:
        first, more = (MAIN, MORE) if device == 'cpu' else ON_GPU
        rows += compare(name, bank, queries, first, device)
        rows += compare(name, bank, fourth, more, device)[1:] # its baseline is there already
        for data, make in (('decaying', decaying), ('isotropic', isotropic)):
            rows += compare(data, *(o.clone() for o in make(m+len(some), bank.shape[1]).split([m, len(some)])), first, device, 2)
        for n in [o for o in SIZES if o <= len(patches)]: growth += compare(name, patches[order[:n]], some, first, device, 2, check=False)
    report(args, __file__, f'nearest neighbours in {m:,} rows of {bank.shape[1]:,} values, {BATCH:,} queries at a time; growth: {len(some):,} queries in random training patches', rows, growth=growth)


if __name__ == '__main__': main()
