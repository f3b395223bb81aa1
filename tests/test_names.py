"Any file name goes through every table, picture, map and page, and comes back; no terminal and no spreadsheet decides anything."
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hostile import NAMES
from patchcore_nb import complete, results, saved
from patchcore_nb.characters import as_cell, from_cell, legal_name, printable, say, size_of_name
from patchcore_nb.cli import main
from patchcore_nb.data import Category, Sample
from patchcore_nb.report import render

KIND, CATEGORY = (os.fsdecode(o) for o in (b'+\x1b[31m\xfe', b'=\xff\x1b[2Jc\r'))
CORE = '-b filterbank -le layer2 -le layer3 --pretrain_embed_dimension 32 --target_embed_dimension 32'
ACTS = re.compile('[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')


def photo(seed, bad=False):
    a = np.random.default_rng(seed).integers(90, 130, (64, 64, 3), np.uint8)
    if bad: a[10:20, 12:24] = 240
    return Image.fromarray(a)

def call(program, words, capsys):
    with pytest.raises(SystemExit) as e: program(['--gpu', '-1', *words] if program is not saved.predict_main else [*words, '--gpu', '-1'])
    out = capsys.readouterr()
    assert not ACTS.search(out.out+out.err.replace('\r', '')), 'the terminal gets a command'
    return e.value.code, out.out, out.err

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A set whose category, kind of defect and test images are called so."
    home = tmp_path_factory.mktemp('names')
    bad = home/'data'/CATEGORY/'test'/KIND
    for i, folder in enumerate(['train/good']*6+['test/good']*2):
        path = home/'data'/CATEGORY/folder/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(path)
    try:
        bad.mkdir(parents=True)
        for i, name in enumerate(NAMES): photo(100+i, True).save(bad/name)
    except (OSError, ValueError): pytest.skip('this file system takes no such names')
    if {p.name for p in bad.iterdir()} != set(NAMES): pytest.skip('this file system changes names')
    return home

@pytest.fixture
def there(home, monkeypatch):
    monkeypatch.chdir(home)
    for o in ('PATCHCORE_NB_DEBUG', 'PATCHCORE_NB_WEIGHTS'): monkeypatch.delenv(o, raising=False)
    return home

def cells(path):
    with open(path, encoding='utf-8', newline='') as f: rows = list(csv.DictReader(f))
    for row in rows:
        for o in row.values(): assert not re.match(r'\s*[=@+\t\r]|\s*-\D', o), o
    return rows

def wanted(prefix=''): return {f'{prefix}data/{CATEGORY}/test/{KIND}/{o}' for o in NAMES}

def looks_well(folder):
    "Every text is UTF-8 and does nothing, every picture can be opened, every name is legal."
    for p in folder.rglob('*'):
        assert size_of_name(p.name) <= 210 and not ACTS.search(p.name), p
        if p.suffix in ('.csv', '.json', '.html'): assert not ACTS.search(p.read_bytes().decode('utf-8').replace('\r\n', '\n').replace('\t', '')), p
        if p.suffix in ('.png', '.tiff'):
            with Image.open(p) as im: im.load()

def test_run_and_evaluate(there, capsys):
    words = ['--save_segmentation_images', '--save_patchcore_model', '--model_format', 'ours', 'results', 'patch_core', *CORE.split(), 'sampler', '-p', '0.1', 'approx_greedy_coreset',
             'dataset', '--resize', '64', '--imagesize', '64', '-d', CATEGORY, 'mvtec', 'data']
    status, _, err = call(main, words, capsys)
    assert status == 0, err
    home = there/'results'/'project'/'group'
    key = Category('mvtec', CATEGORY, []).key
    def holds(folder, pictures):
        looks_well(folder)
        rows = cells(folder/'scores'/f'{key}.csv')
        assert {from_cell(o['image']) for o in rows if o['label'] == '1'} == wanted() and {from_cell(o['kind']) for o in rows} == {'good', KIND}
        assert len({o['image'] for o in rows}) == len(rows) == 42
        assert {from_cell(o['name']) for o in cells(folder/'kinds.csv')} == {KIND}
        assert len([*pictures.glob('*.png')]) == 42
        page = (folder/'report.html').read_text(encoding='utf-8')
        assert printable(KIND) in page and '<b>&amp;😀' not in page
    holds(home, home/'segmentation_images'/key)
    words = ['--save_segmentation_images', 'judged', 'patch_core_loader', '-p', str(home/'models'/key), 'dataset', '-d', CATEGORY, 'mvtec', 'data']
    status, _, err = call(saved.evaluate_main, words, capsys)
    assert status == 0, err
    holds(there/'judged', there/'judged')
    assert (there/'judged'/'results.csv').read_bytes() == (home/'results.csv').read_bytes()

@pytest.fixture
def model(there):
    from patchcore_nb import PatchCore, store
    if not (there/'model').exists(): store.save(PatchCore('filterbank', ratio=.1, target_dim=32, resize=64, imagesize=64, device='cpu').fit(there/'data'/CATEGORY/'train'/'good'), there/'model', 'ours')
    return there/'model'

def test_predict(there, model, capsys):
    status, _, err = call(saved.predict_main, [str(model), f'data/{CATEGORY}/test/{KIND}', '-o', 'out', '--maps', 'both'], capsys)
    assert status == 0, err
    looks_well(there/'out')
    rows = cells(there/'out'/'scores.csv')
    found = json.loads((there/'out'/'scores.json').read_text(encoding='utf-8'))['images']
    assert {from_cell(o['image']) for o in rows} == wanted() == {o['image'] for o in found}
    maps = [p for o in rows for p in o['maps'].split(';')]
    assert len(set(maps)) == 80 and all((there/'out'/o).is_file() for o in maps)

def test_predict_of_bare_names(there, model, monkeypatch, capsys):
    "Cells that begin as a formula does."
    monkeypatch.chdir(there/'data'/CATEGORY/'test'/KIND)
    names = [o for o in NAMES if o[0] not in '~-']
    status, _, err = call(saved.predict_main, [str(model), *names, '-o', str(there/'bare'), '--maps', 'none'], capsys)
    assert status == 0, err
    assert {from_cell(o['image']) for o in cells(there/'bare'/'scores.csv')} == set(names)

def test_an_error_and_a_warning_show_a_name(there, model, capsys):
    name = 'gone\x1b[2J\nerror: all is well\u202e.png'
    status, _, err = call(saved.predict_main, [str(model), name, '-o', 'lost'], capsys)
    assert status == 1 and [o for o in err.splitlines() if o.startswith('error')] == [r'error: gone\x1b[2J\x0aerror: all is well\u202e.png is not there: check the path']
    status, _, err = call(saved.predict_main, [str(model), name, f'data/{CATEGORY}/test/good', '-o', 'lost'], capsys)
    assert status == 1 and sum(o.startswith(('error', 'warning')) for o in err.splitlines()) == 1
    rows = cells(there/'lost'/'scores.csv')
    assert from_cell(rows[0]['image']) == name and len(rows) == 3

@pytest.mark.parametrize('program', ['cli.main', 'saved.predict_main'])
def test_a_terminal_of_few_letters_decides_nothing(there, model, program):
    "Nor does one that takes only ASCII."
    words = ['--help'] if program == 'cli.main' else [str(model), f'data/{CATEGORY}/test/{KIND}', '-o', '名\udcff', '--gpu', '-1', '--maps', 'none']
    env = os.environ | dict(PYTHONIOENCODING='ascii:strict', LANG='C', LC_ALL='C')
    done = subprocess.run([sys.executable, '-c', f'from patchcore_nb import cli, saved; {program}()', *words], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not ACTS.search((done.stdout+done.stderr).decode('ascii').replace('\r', ''))

def test_a_sign_that_ascii_has_not():
    "As in the table of several seeds."
    out = io.TextIOWrapper(io.BytesIO(), 'ascii')
    say('0.9 ± 0.1', out)
    out.flush()
    assert out.buffer.getvalue().startswith(rb'0.9 \xb1 0.1')

def test_a_cell_that_was_read_is_written_as_it_was(tmp_path):
    "A table that grows is read and written again and again."
    import pandas as pd
    for key in ('a', 'b', 'c'): results.add_rows(tmp_path/'kinds.csv', key, pd.DataFrame(dict(aupro=[-.5]*40), NAMES))
    rows = cells(tmp_path/'kinds.csv')
    assert [from_cell(o['name']) for o in rows] == NAMES*3 and {o['aupro'] for o in rows} == {'-0.5'}

def test_numbers_stay_numbers():
    assert [as_cell(o) for o in ('-0.5', '+3', '-1e-05', '-inf', '.5')] == ['-0.5', '+3', '-1e-05', '-inf', '.5']
    assert as_cell('-1+2') == r'\x2d1+2' and as_cell('+') == r'\x2b'

@pytest.mark.parametrize('name', NAMES, ids=lambda o: ascii(o)[:20])
def test_files_of_any_name_are_replaced_whole(tmp_path, name):
    "A temporary name fits beside the longest."
    for text in ('one', 'two'): complete.write_text(tmp_path/name, text)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path/name).read_text() == 'two'

def test_an_old_folder_of_a_long_name_is_found(tmp_path):
    path = tmp_path/('n'*250)
    path.mkdir()
    old = complete.beside(path, 'old')
    path.rename(old)
    assert complete.put_aside(path) == old

def test_pictures_of_one_name_are_two():
    "The parts of a path are joined by what may be in them."
    samples = [Path('s/tile/test')/o for o in ('a/b_c.png', 'a_b/c.png', 'A/b_c.PNG', 'x/y.bmp', 'x/y.bmp.png')]
    names = results.picture_names(samples)
    assert names[0] == 'tile_test_a_b_c.png' and len({o.lower() for o in names}) == 5

def test_a_category_of_any_name_has_a_key_that_is_a_file():
    keys = [Category('csv', o, []).key for o in (*NAMES, CATEGORY, 'screw', 'a/b')]
    assert len(set(keys)) == 43 and keys[-2:] == ['csv_screw', 'csv_a/b']
    assert all(size_of_name(o) <= 200 and not ACTS.search(o) for o in keys)
    assert legal_name('x.png') == 'x.png' and {'.', '..'}.isdisjoint(map(legal_name, ('.', '..')))
    assert '..' not in Path(Category('mvtec', 'a/../..', []).key).parts

def test_what_a_run_was_asked_for_may_hold_any_name(tmp_path):
    "It is told apart, and written as ASCII."
    digests = {results.digest_category(Category('csv', 'x', [Sample(Path(o))])) for o in NAMES}
    assert len(digests) == 40

def test_a_report_of_any_command():
    page = render([], dict(command=f'patchcore_nb_run {CATEGORY}\u202e', settings=dict(folders=[CATEGORY])))
    page.encode('utf-8')
    assert not ACTS.search(page) and printable(CATEGORY) in page
