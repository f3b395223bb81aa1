"""What the benchmarks share: turns on the clock, memory in a process of its own, data, tables and files."""
import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from patchcore_nb.brushes import photograph
from patchcore_nb.budget import release
from patchcore_nb.cog import draw_cog
from patchcore_nb.core import generator
from patchcore_nb.data import Category, load_category
from patchcore_nb.demo import DEMO_CATEGORIES, demo_files # the import registers the set
from patchcore_nb.denim import draw_denim
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.png import png_bytes
from patchcore_nb.portable import Dice
from patchcore_nb.samplers import farthest_points
from patchcore_nb.sieve import draw_sieve

HERE = Path(__file__).resolve().parent
DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]


def options(
    doc:str, # of the script
)->argparse.Namespace: # quick, out
    "The flags that every script has."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='small sizes: does everything work? The numbers mean nothing')
    parser.add_argument('--out', type=Path, default=HERE/'results', metavar='FOLDER', help='where the JSON file goes')
    return parser.parse_args()


# Time

def race(
    runs:dict[str,Callable], # name -> what to time
    rounds:int,              # how often
    warm:bool=True,          # one round more at the beginning, which does not count
)->dict[str,list[float]]: # name -> seconds, a number a round
    "Time things by turns, so that whatever slows the machine down slows all of them."
    times = {name: [] for name in runs}
    for i in range(-warm, rounds):
        for name, run in runs.items():
            taken = seconds(run)
            if i >= 0: times[name].append(taken)
    return times


def seconds(
    run:Callable, # what to time; what it returns is dropped
)->float:
    "How long something takes."
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter()-start


def wait():
    "Let the GPU come to an end, where there is one."
    if torch.cuda.is_available(): torch.cuda.synchronize()


def rows_of(
    times:dict[str,list[float]], # name -> seconds, a number a round
    baseline:str,                # one of the names
    **more,                      # further columns, the same in all rows; those that differ are put in later
)->list[dict]: # what, baseline, seconds (median), ratio (median over the rounds)
    "Times as rows of a table."
    base = times[baseline]
    return [dict(more, what=name, baseline=baseline, seconds=statistics.median(o), ratio=statistics.median(a/b for a, b in zip(o, base)))
            for name, o in times.items()]


# Memory

def anonymous()->int: # bytes
    "Memory of this process that belongs to no file. Linux only."
    return 1024*int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text(encoding='ascii'))[1])


@contextlib.contextmanager
def watch(
    found:dict, # gets "peak": bytes above what the process has now; None where the system does not tell
    step:float=.005, # seconds between two looks
):
    "Look at this process's memory all the time."
    release()
    linux, over, found['peak'] = Path('/proc/self/status').exists(), threading.Event(), None
    base = anonymous() if linux else 0
    def look():
        while not over.wait(step): found['peak'] = max(found['peak'] or 0, anonymous()-base)
    thread = threading.Thread(target=look)
    if linux: thread.start()
    try: yield
    finally:
        over.set()
        if linux: thread.join()


def fresh(
    f:Callable, # a function of a module
    *args,      # for it
):
    "Run a function in a process of its own, and return what it returns."
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool: return pool.submit(f, *args).result()


def pick_watched(
    path:Path|str,   # a tensor's file
    n:int,           # how many to pick
    device:str='cpu',
    threads:int|None=None, # None: torch's own number
)->dict: # seconds; peak: bytes on top of the input
    "Pick a coreset under watch; for `fresh`."
    if threads: torch.set_num_threads(threads)
    bank, found = torch.load(path).to(device), {}
    farthest_points(torch.randn(4096, bank.shape[1], generator=generator(0)).to(device), 2048) # libraries take memory of their own as they start
    if device == 'cuda':
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with watch(found): found['seconds'] = seconds(lambda: farthest_points(bank, n))
    if device == 'cuda': found['peak'] = torch.cuda.max_memory_allocated()-base
    return found


@contextlib.contextmanager
def on_disk(
    x:Tensor, # any
):
    "A tensor's file, for another process."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'x.pt'
        torch.save(x, path)
        yield path


# Data

def isotropic(n:int, d:int, seed:int=0)->Tensor: # (n, d)
    "Gaussian noise, the same in all directions: the worst case, all rows are about equally far from one another."
    return torch.randn(n, d, generator=generator(seed))


def clusters(n:int, d:int, seed:int=0)->Tensor: # (n, d)
    "Three hundred tight clusters."
    g = generator(seed)
    return torch.randn(300, d, generator=g)[torch.randint(300, (n,), generator=g)]+.03*torch.randn(n, d, generator=g)


def decaying(n:int, d:int, seed:int=0)->Tensor: # (n, d)
    "Gaussian noise whose deviation falls from one direction to the next, as in the features of networks."
    return torch.randn(n, d, generator=generator(seed)) @ (torch.arange(1, d+1)**-.75*torch.randn(d, d, generator=generator(99))).T/d**.5


def subject(
    folder:Path, # for the demo set
)->tuple[str,Category,dict]: # name, category, arguments of the model
    "Bottle with ResNet-18, if PATCHCORE_NB_TESTDATA names a folder with data/ and weights/; else a demo category with the filter bank."
    root = os.environ.get('PATCHCORE_NB_TESTDATA')
    if not root: return f'demo {DEMO_CATEGORIES[-1]}', load_category('demo', folder, DEMO_CATEGORIES[-1]), dict(backbone='filterbank')
    return 'bottle', load_category('mvtec', Path(root)/'data'/'mvtec256', 'bottle'), dict(backbone='resnet18', weights_dir=Path(root)/'weights')


def larger_demo(
    folder:Path,   # where the images go
    name:str,      # one of `DEMO_CATEGORIES`
    n_train:int,   # training images
    n_good:int,    # good test images
    n_each:int,    # test images of each kind of defect, from slight to plain; at least 2
)->Category:
    "A category of the demo set with as many images as are wanted, drawn by the same functions from other dice."
    draw, unsteady = dict(denim=(draw_denim, .22), sieve=(draw_sieve, .18), cog=(draw_cog, .14))[name]
    kinds = sorted({o.split('/')[1] for o in demo_files(name)}-{'good'})
    wanted = [('train', 'good', i, 0) for i in range(n_train)]+[('test', 'good', i, 0) for i in range(n_good)]
    wanted += [('test', kind, i, i/(n_each-1)) for kind in kinds for i in range(n_each)]
    for split, kind, i, size in wanted:
        dice = Dice(f'larger/{name}/{split}/{kind}/{i}')
        scene, mask = draw(dice, kind, size)
        files = {f'{split}/{kind}/{i:03}.png': photograph(dice, scene, unsteady)}
        if kind != 'good': files[f'ground_truth/{kind}/{i:03}_mask.png'] = mask.astype('uint8')*255
        for path, image in files.items():
            (folder/name/path).parent.mkdir(parents=True, exist_ok=True)
            (folder/name/path).write_bytes(png_bytes(image))
    return load_category('mvtec', folder, name)


def bottle()->tuple[Category,dict]|None: # category, arguments of the model; None: not at hand
    "Bottle with ResNet-18, where PATCHCORE_NB_TESTDATA names a folder with data/ and weights/."
    if not (root := os.environ.get('PATCHCORE_NB_TESTDATA')): return None
    return load_category('mvtec', Path(root)/'data'/'mvtec256', 'bottle'), dict(backbone='resnet18', weights_dir=Path(root)/'weights')


def real_patches(
    quick:bool, # few images, short embeddings?
)->tuple[str,Tensor,Tensor]: # name; (N, D) of training images; (Q, D) of test images, in random order
    "Patch embeddings of real images, or of the demo set where there are none."
    with tempfile.TemporaryDirectory() as temp:
        name, category, kw = subject(Path(temp))
        train, test = ([s.path for s in o] for o in (category.train, category.test))
        if quick: train, test = train[:8], test[:4]
        model = PatchCore(**kw, device='cpu', target_dim=128 if quick else 1024).check()
        embedder = model.embedder_.calibrated(train)
        return name, embedder.rows(train), embedder.rows(test)


# Tables and files

def machine()->dict:
    "What the numbers were measured on."
    cpu = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.exists(): cpu = next((o.split(':')[1].strip() for o in info.read_text(encoding='utf-8').splitlines() if o.startswith('model name')), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu, system=platform.system(), python=platform.python_version(), torch=torch.__version__.split('+')[0])


def report(
    args:argparse.Namespace, # of `options`
    script:str,              # __file__
    what:str,                # a line on what was measured
    rows:list[dict],         # any columns
    **more,                  # further tables
):
    "Print a table and write the JSON file."
    for name, table in dict(rows=rows, **more).items():
        if any(isinstance(v, list) for o in table for v in o.values()): continue # a curve, to be drawn
        print(f'\n{what if name == "rows" else name}\n', pd.DataFrame(table).to_string(index=False, na_rep='-', float_format=lambda v: f'{v:.4g}'), sep='\n')
    args.out.mkdir(parents=True, exist_ok=True)
    out = dict(what=what, quick=args.quick, machine=machine(), rows=rows, **more)
    text = json.dumps(json.loads(json.dumps(out), parse_float=lambda v: float(f'{float(v):.6g}')), indent=1)
    (args.out/f'{Path(script).stem}.json').write_text(text+'\n', encoding='utf-8')
