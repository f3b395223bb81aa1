"""Forty hostile names, each for an image, a kind of defect, a category and a model: `python tests/campaigns/names.py`.

Each goes through a run, an evaluation and a prediction, in processes of their own. All three must end with status 0, give the
name back from their tables, and leave pictures that open and pages and a terminal without a character that acts.
"""
import csv
import os
import re
import sys
import tempfile
from pathlib import Path

import attempts
from attempts import End

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hostile import NAMES  # noqa: E402

os.environ.setdefault('OMP_NUM_THREADS', '1')

ACTS = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]') # tabs and line ends may be there
PARTS = 'image', 'kind of defect', 'category', 'model'
LONG = 240 # seconds that three programs may take on a machine with others at work
CORE = '-b filterbank -le layer2 --pretrain_embed_dimension 32 --target_embed_dimension 32 sampler -p 0.1 approx_greedy_coreset'


def make_set(home, category, kind, name):
    "A few small images, one of them called so."
    import numpy as np
    from PIL import Image
    for i, where in enumerate([*['train/good']*4, 'test/good', f'test/{kind}']):
        path = home/'data'/category/where
        path.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(90, 130, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(path/(name if i == 5 else f'{i}.png'), 'PNG')

def programs():
    "The three programs, which the processes to come have loaded then."
    from patchcore_nb import cli, experiment, report, saved, store # noqa: F401
    return dict(run=cli.main, evaluate=saved.evaluate_main, predict=saved.predict_main)

def call(program, home, *words):
    "Run a program in this process; what is wrong with how it ended and what it said."
    os.chdir(home)
    with open(home/f'{program}.said', 'wb') as f:
        for i in (1, 2): os.dup2(f.fileno(), i)
    try: programs()[program](list(words))
    except SystemExit as e: status = e.code or 0
    for o in (sys.stdout, sys.stderr): o.flush()
    said = (home/f'{program}.said').read_bytes().decode('utf-8', 'surrogateescape')
    if status: return End('OTHER STATUS', f'{program} {status}: {said[-300:]!r}')
    if ACTS.search(said.replace('\r\n', '\n').replace('\r', '')): return End('ACTED ON THE TERMINAL', f'{program}: {said[-300:]!r}')

def look(folder):
    "What is wrong with the files of a folder."
    from PIL import Image
    for p in folder.rglob('*'):
        if p.suffix in ('.csv', '.json', '.html'):
            text = p.read_bytes().decode('utf-8')
            if ACTS.search(text.replace('\r\n', '\n')): return End('ACTS IN A FILE', p.name)
        if p.suffix in ('.png', '.tiff') and p.is_file():
            with Image.open(p) as im: im.load()

def names_in(path, column):
    "The names that a table gives back."
    from patchcore_nb.characters import from_cell
    with open(path, encoding='utf-8', newline='') as f: return {from_cell(o[column]) for o in csv.DictReader(f)}

def work(job):
    home, part, name = job
    category, kind, image, model = (name if o == part else usual for o, usual in zip(('category', 'kind of defect', 'image', 'model'), ('cat', 'bad', 'odd.png', 'model')))
    make_set(home, category, kind, image)
    data = ['dataset', '--resize', '64', '--imagesize', '64', '-d', category, 'mvtec', 'data']
    wrong = call('run', home, '--gpu', '-1', '--save_segmentation_images', '--save_patchcore_model', '--model_format', 'ours', 'results', 'patch_core', *CORE.split(), *data)
    if wrong: return wrong
    group = home/'results'/'project'/'group'
    saved, = (group/'models').iterdir()
    saved.rename(home/model)
    wrong = call('evaluate', home, '--gpu', '-1', '--save_segmentation_images', 'judged', 'patch_core_loader', '-p', f'./{model}', *data[:1], *data[5:])
    wrong = wrong or call('predict', home, f'./{model}', f'data/{category}/test/{kind}', '-o', 'out', '--maps', 'both', '--gpu', '-1')
    wrong = wrong or next((o for o in map(look, (group, home/'judged', home/'out')) if o), None)
    if wrong: return wrong
    path = f'data/{category}/test/{kind}/{image}'
    scores = [*(group/'scores').iterdir(), *(home/'judged'/'scores').iterdir()]
    tables = [*((o, 'image') for o in scores), (home/'out'/'scores.csv', 'image'), (group/'kinds.csv', 'name')]
    for table, column in tables:
        if (kind if column == 'name' else path) not in names_in(table, column): return End('NOT GIVEN BACK', f'{table.name}: {sorted(names_in(table, column))}')
    if (group/'results.csv').read_bytes() != (home/'judged'/'results.csv').read_bytes(): return End('OTHER TABLES')
    return End('given back')

def campaign(asked, home):
    "Try each name in each part; how it ended."
    tally, jobs = attempts.Tally(), []
    attempts.EXECUTES = () # programs write
    import torch
    torch.set_num_threads(1)
    programs()
    for i, name in enumerate(NAMES[:asked.n]):
        for part in PARTS:
            place = home/f'{i}_{part.split()[0]}'
            place.mkdir()
            jobs.append((place, part, name))
    for (_, part, name), end in attempts.in_children(work, jobs, asked.workers, LONG): tally.add(part, repr(os.fsencode(name)), end)
    return tally


if __name__ == '__main__':
    asked = attempts.arguments(len(NAMES))
    with tempfile.TemporaryDirectory() as home: raise SystemExit(campaign(asked, Path(home)).tell('names', asked))
