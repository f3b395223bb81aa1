"A busy neighbour takes its share of the machine, and no more: nobody spins while waiting for a thread whose turn it is not."
import runpy
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from patchcore_nb.core import generator
from patchcore_nb.samplers import coreset, farthest_points

BENCH = Path(__file__).resolve().parents[1]/'benchmarks'
with pytest.MonkeyPatch.context() as m:
    m.syspath_prepend(BENCH) # its scripts share a module
    bench = SimpleNamespace(**runpy.run_path(str(BENCH/'busy.py')))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

def work(run): # seconds of all threads of this process, which a neighbour only changes if they work more
    start = time.process_time()
    run()
    return time.process_time()-start

def test_picking_works_no_more_beside_busy_processes(two_threads):
    "The clock depends on whoever else uses the machine; the work does not."
    rows = torch.randn(10_000, 128, generator=generator(0))
    def run(): farthest_points(rows, 1500)
    run() # warm
    quiet = statistics.median(work(run) for _ in range(3))
    with bench.busy(2): beside = statistics.median(work(run) for _ in range(3))
    assert beside < 2*quiet+.1

def test_picks_do_not_depend_on_threads(two_threads):
    "In rows that need no projection: a map to fewer dimensions is another product with other threads."
    rows = torch.randn(5000, 128, generator=generator(1))
    found = []
    for n in (2, 1):
        torch.set_num_threads(n)
        found.append(coreset(rows, .05))
        assert torch.get_num_threads() == n
    two, one = found
    assert torch.equal(two.idxs, one.idxs) and torch.equal(two.anchor_dists, one.anchor_dists) and two.radii == one.radii
