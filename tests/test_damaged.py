"One image that cannot be read costs itself: it is named in the tables, the others are judged, and the status says so at the end."
import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from patchcore_nb import PatchCore, experiment, files, rounds, saved, skipping, store
from patchcore_nb.cli import main
from patchcore_nb.core import ArgumentError, DataError
from patchcore_nb.data import load_category, make_miniature
from patchcore_nb.items import as_items

CORE = '-b filterbank -le layer2 -le layer3 --pretrain_embed_dimension 32 --target_embed_dimension 32'
FIT = f'patch_core {CORE} sampler -p 0.1 approx_greedy_coreset dataset --resize 64 --imagesize 64 -d tile mvtec data'
PROGRAMS = {'run': main, 'evaluate': saved.evaluate_main, 'predict': saved.predict_main}


def cut(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole)*3//5])
def headless(path): path.write_bytes(b'no image at all')
def emptied(path): path.write_bytes(b'')
def gone(path):
    path.unlink()
    path.symlink_to('nowhere.png')
def folder(path):
    path.unlink()
    path.mkdir()
def huge(path):
    head = Image.new('1', (30000, 30000))
    head.save(path)
def locked(path): path.chmod(0)

DAMAGE = dict(cut=cut, headless=headless, emptied=emptied, gone=gone, folder=folder, huge=huge)
if hasattr(os, 'geteuid') and os.geteuid(): DAMAGE['locked'] = locked


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A set, and a model of it."
    home = tmp_path_factory.mktemp('made')
    make_miniature(home/'data', n_train=6)
    m = PatchCore('filterbank', ratio=.1, target_dim=32, resize=64, imagesize=64, device='cpu').fit(home/'data'/'tile'/'train'/'good')
    store.save(m, home/'model', 'ours')
    return home

@pytest.fixture
def there(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for o in ('PATCHCORE_NB_DEBUG', 'PATCHCORE_NB_WEIGHTS'): monkeypatch.delenv(o, raising=False)
    return tmp_path

@pytest.fixture
def call(there, capsys):
    "Status, lines on stderr that matter, stdout."
    def go(program, words):
        with pytest.raises(SystemExit) as e: PROGRAMS[program](words.split())
        out = capsys.readouterr()
        return e.value.code, [o for o in out.err.replace('\r', '\n').splitlines() if o.startswith(('error', 'warning', 'interrupted')) or 'Traceback' in o], out.out
    return go

def table(path):
    with open(path, encoding='utf-8', newline='') as f: return {Path(o['image']).name: o for o in csv.DictReader(f)}


# Predict

@pytest.fixture
def photos(there):
    "Sixteen images."
    (there/'photos').mkdir()
    good = there/'data'/'tile'/'train'/'good'
    for i in range(16): shutil.copy(good/f'00{i % 6}.png', there/'photos'/f'{i:02}.png')
    return there/'photos'

def test_predict_names_what_it_cannot_read(call, photos, there):
    "Whatever is wrong, and wherever it is found; the others are scored as ever."
    assert call('predict', 'model photos --gpu -1 -o all --maps none')[0] == 0
    lost = {f'{i+3:02}.png': spoil for i, spoil in enumerate(DAMAGE.values())}
    for name, spoil in lost.items(): spoil(photos/name)
    status, lines, said = call('predict', 'model photos --gpu -1 -o some')
    assert status == 1 and len(lines) == 1 and f'{len(lost)} of 16 images cannot be read' in lines[0] and '03.png' in lines[0], lines
    assert f'{16-len(lost)} of 16 images' in said
    before, after = table('all/scores.csv'), table('some/scores.csv')
    assert list(before) == list(after)
    for name, row in after.items():
        if name in lost: assert not row['score'] and not row['maps'] and name in row['error'] and '\n' not in row['error']
        else: assert float(row['score']) == pytest.approx(float(before[name]['score'])) and not row['error'] and (there/'some'/row['maps']).is_file()
    found = {Path(o['image']).name: o for o in json.loads(Path('some/scores.json').read_text(encoding='utf-8'))['images']}
    assert all((found[o]['score'] is None) == (found[o]['error'] is not None) == (o in lost) for o in found) and len(found) == 16
    assert not Path('some/scores.partial.csv').exists()

@pytest.mark.parametrize('kind', DAMAGE)
def test_predict_may_stop(call, photos, kind):
    DAMAGE[kind](photos/'03.png')
    status, lines, _ = call('predict', 'model photos --gpu -1 --on_error stop')
    assert status == 1 and len(lines) == 1 and lines[0].startswith('error: ') and '03.png' in lines[0]
    assert not Path('predictions/scores.csv').exists()

def test_what_was_scored_before_the_end_is_kept(call, photos, monkeypatch):
    "An image that turns out to be damaged at the end, with --on_error stop."
    monkeypatch.setattr(files, 'CHUNK', 4)
    cut(photos/'13.png')
    assert call('predict', 'model photos --gpu -1 --on_error stop --maps none')[0] == 1
    rows = table('predictions/scores.partial.csv')
    assert list(rows) == [f'{i:02}.png' for i in range(12)] and all(float(o['score']) >= 0 for o in rows.values())

def test_ctrl_c_leaves_what_was_scored(call, photos, monkeypatch):
    monkeypatch.setattr(files, 'CHUNK', 4)
    chunks = []
    def predict(self, images, real=PatchCore.predict):
        chunks.append(images)
        if len(chunks) == 3: raise KeyboardInterrupt
        return real(self, images)
    monkeypatch.setattr(PatchCore, 'predict', predict)
    status, lines, _ = call('predict', 'model photos --gpu -1 --maps none')
    assert status == 130 and 'scores.partial.csv' in lines[-1] and len(table('predictions/scores.partial.csv')) == 8

def test_a_row_is_on_the_disk_before_the_next_is_made(tmp_path):
    "So that a kill at any moment leaves all rows that were made."
    path = tmp_path/'out'/'scores.partial.csv'
    rows = [dict(image=f'{i}.png', score=float(i), p_value=None, anomalous=None, maps=[], error=None) for i in range(3)]
    for i, _ in enumerate(files.grow_table(rows, path)): assert list(table(path)) == [f'{j}.png' for j in range(i+1)]

def test_an_earlier_table_stays_until_the_next_is_whole(call, photos, monkeypatch):
    call('predict', 'model photos --gpu -1 --maps none')
    before = Path('predictions/scores.csv').read_bytes()
    monkeypatch.setattr(files, 'write_predictions', lambda *a, **kw: (_ for _ in ()).throw(DataError('the disk is full')))
    assert call('predict', 'model photos/01.png --gpu -1 --maps none')[0] == 1
    assert Path('predictions/scores.csv').read_bytes() == before and len(table('predictions/scores.partial.csv')) == 1

def test_an_image_that_vanishes(call, photos, monkeypatch):
    "Between listing and reading, and between its score and its map."
    def predict(self, images, real=PatchCore.predict):
        (photos/'05.png').unlink(missing_ok=True)
        found = real(self, images)
        (photos/'09.png').unlink(missing_ok=True)
        return found
    monkeypatch.setattr(PatchCore, 'predict', predict)
    status, lines, _ = call('predict', 'model photos --gpu -1')
    rows = table('predictions/scores.csv')
    assert status == 1 and {o for o, row in rows.items() if row['error']} == {'05.png', '09.png'} and len(rows) == 16

def test_a_name_that_looks_like_an_argument(call, there):
    "A warning names flags where the library names arguments, but no file is called otherwise."
    shutil.copy('data/tile/test/good/000.png', 'good.png')
    Path('resize=3.png').touch()
    status, lines, _ = call('predict', 'model resize=3.png good.png --gpu -1 --maps none')
    assert status == 1 and len(lines) == 1 and 'resize=3.png is empty' in lines[0] and '--resize' not in lines[0]

def test_all_images_are_damaged(call, photos):
    for o in photos.iterdir(): emptied(o)
    status, lines, _ = call('predict', 'model photos --gpu -1')
    assert status == 1 and len(lines) == 1 and '00.png is empty' in lines[0]

def test_an_error_that_is_no_images_ends_it(call, photos, monkeypatch):
    def full(*a, **kw): raise DataError('the disk is full: free some space')
    monkeypatch.setattr(files, 'write_map', full)
    status, lines, _ = call('predict', 'model photos --gpu -1')
    assert status == 1 and lines == ['error: the disk is full: free some space']

def test_in_python(there, photos):
    "The rows say it; how it is to be can be said."
    cut(photos/'03.png')
    model = store.load(there/'model', device='cpu')
    rows = list(files.predict_files(model, sorted(photos.iterdir()), there/'out', 'none'))
    assert [i for i, o in enumerate(rows) if o['error']] == [3] and rows[3]['score'] is None
    with pytest.raises(DataError, match='03.png'): list(files.predict_files(model, sorted(photos.iterdir()), there/'out', 'none', 'stop'))
    with pytest.raises(ArgumentError, match='on_error'): list(files.predict_files(model, [], there/'out', on_error='pass'))

def test_a_folder_called_as_an_image_is_listed(photos):
    (photos/'x.png').mkdir()
    assert photos/'x.png' in as_items(photos)
    with pytest.raises(DataError, match='is a folder'): as_items(photos) and skipping.read_image(photos/'x.png')


# Run and evaluate

def files_of(part): return {'train': 'train/good/002.png', 'test': 'test/spot/001.png', 'mask': 'ground_truth/spot/001_mask.png'}[part]

@pytest.fixture
def without(there, call):
    "Results of the set without the images that the tests damage."
    def go(*parts):
        shutil.copytree('data', 'fewer')
        for o in parts: (there/'fewer'/'tile'/files_of(o).replace('ground_truth/spot/001_mask', 'test/spot/001')).unlink()
        if {'test', 'mask'} & {*parts}: (there/'fewer/tile/ground_truth/spot/001_mask.png').unlink()
        assert call('run', f'--gpu -1 --log_group fewer results {FIT}'.replace('mvtec data', 'mvtec fewer'))[0] == 0
        return Path('results/project/fewer/results.csv').read_bytes()
    return go

@pytest.mark.parametrize('kind', ['cut', 'emptied', 'gone'])
@pytest.mark.parametrize('part', ['train', 'test', 'mask'])
def test_a_run_stops_unless_it_is_told(call, there, kind, part):
    path = there/'data'/'tile'/files_of(part)
    DAMAGE[kind](path)
    status, lines, _ = call('run', f'--gpu -1 results {FIT}')
    assert status == 1 and sum(o.startswith('error: ') for o in lines) == 1 and path.name in lines[-1], lines

def test_a_run_goes_on_without_them(call, there, without):
    want = without('train', 'test')
    for o in ('train', 'test'): cut(there/'data'/'tile'/files_of(o))
    status, lines, said = call('run', f'--gpu -1 --save_segmentation_images --on_error skip results {FIT}')
    home = there/'results'/'project'/'group'
    assert status == 1 and [o for o in lines if 'cannot be read' in o] == lines and len(lines) == 1 and '2 of 10 images' in lines[0], lines
    assert 'skipped:  2 images' in said and (home/'results.csv').read_bytes() == want
    rows = table(home/'scores'/'mvtec_tile.csv')
    scores = pd.read_csv(home/'scores'/'mvtec_tile.csv')
    assert len(scores) == 4 and scores.score.isna().tolist() == scores.error.notna().tolist() == [False, False, False, True] and scores.label.tolist() == [0, 0, 1, 1]
    assert 'spot/001.png' in rows['001.png']['image'] and 'truncated' in rows['001.png']['error']
    assert [(o['part'], Path(o['image']).name) for o in json.loads((home/'run.json').read_text())['skipped']] == [('train', '002.png'), ('test', '001.png')]
    assert '2 images could not be read' in (home/'report.html').read_text(encoding='utf-8')
    assert len([*(home/'segmentation_images').rglob('*.png')]) == 3 and len(pd.read_csv(home/'suspects'/'mvtec_tile.csv')) == 5

@pytest.mark.parametrize('kind', ['headless', 'gone'])
def test_damage_that_shows_at_the_start(call, there, without, kind):
    want = without('train', 'test')
    for o in ('train', 'test'): DAMAGE[kind](there/'data'/'tile'/files_of(o))
    assert call('run', f'--gpu -1 --on_error skip results {FIT}')[0] == 1
    assert Path('results/project/group/results.csv').read_bytes() == want

def test_a_damaged_mask_costs_its_image(call, there, without):
    want = without('mask')
    cut(there/'data'/'tile'/files_of('mask'))
    status, lines, _ = call('run', f'--gpu -1 --on_error skip results {FIT}')
    assert status == 1 and '001_mask.png cannot be read' in lines[0] and Path('results/project/group/results.csv').read_bytes() == want

def test_an_image_that_vanishes_before_its_picture(call, there, monkeypatch, without):
    want = without('test')
    def pictures(*args, real=rounds.save_pictures):
        (there/'data'/'tile'/files_of('test')).unlink(missing_ok=True)
        return real(*args)
    monkeypatch.setattr(rounds, 'save_pictures', pictures)
    assert call('run', f'--gpu -1 --on_error skip --save_segmentation_images results {FIT}')[0] == 1
    assert Path('results/project/group/results.csv').read_bytes() == want

def test_nothing_is_left(call, there):
    for o in (there/'data'/'tile'/'train'/'good').iterdir(): cut(o)
    status, lines, _ = call('run', f'--gpu -1 --on_error skip results {FIT}')
    assert status == 1 and '6 of 10 images cannot be read' in lines[-1] and 'no image is left to train' in lines[-1]

def test_what_was_skipped_is_known_to_a_run_that_goes_on(call, there, monkeypatch):
    "And to one over several seeds."
    shutil.copytree('data/tile', 'data/other')
    cut(there/'data'/'tile'/files_of('test'))
    two = FIT.replace('-d tile', '-d tile -d other')
    def fail(model, category, folder, real=rounds.fit_category):
        if category.name == 'other': raise KeyboardInterrupt
        real(model, category, folder)
    monkeypatch.setattr(rounds, 'fit_category', fail)
    assert call('run', f'--gpu -1 --on_error skip results {two}')[0] == 130
    monkeypatch.undo()
    monkeypatch.chdir(there)
    status, _, said = call('run', f'--gpu -1 --on_error skip --resume results {two}')
    assert status == 1 and 'resumed:  1' in said and 'skipped:  1 images' in said
    status, _, said = call('run', f'--gpu -1 --on_error skip --no_report --seed 0 --seed 1 --log_group seeds results {FIT}')
    assert status == 1 and 'skipped:  2 images' in said

def test_a_run_that_stopped_goes_on_with_skip(call, there):
    "What was done before the damaged image is not done again."
    shutil.copytree('data/tile', 'data/other')
    cut(there/'data'/'other'/'train'/'good'/'002.png')
    two = FIT.replace('-d tile', '-d tile -d other')
    assert call('run', f'--gpu -1 --no_report results {two}')[0] == 1
    status, _, said = call('run', f'--gpu -1 --no_report --resume --on_error skip results {two}')
    assert status == 1 and 'resumed:  1' in said and 'skipped:  1 images' in said

def test_evaluate_goes_on_without_them(call, there):
    "Training images are not looked at."
    words = '--gpu -1 {} {} patch_core_loader -p model dataset -d tile mvtec data'
    shutil.copytree('data', 'fewer')
    for o in ('test/spot/001.png', 'ground_truth/spot/001_mask.png'): (there/'fewer'/'tile'/o).unlink()
    assert call('evaluate', words.format('', 'fewer_judged').replace('mvtec data', 'mvtec fewer'))[0] == 0
    for o in ('train', 'test'): cut(there/'data'/'tile'/files_of(o))
    status, lines, _ = call('evaluate', words.format('', 'judged'))
    assert status == 1 and lines[-1].startswith('error: ') and 'spot/001.png' in lines[-1].replace('\\', '/')
    status, lines, said = call('evaluate', words.format('--on_error skip --save_segmentation_images', 'judged'))
    assert status == 1 and 'skipped:  1 images' in said and 'spot/001.png' in ''.join(lines).replace('\\', '/') and 'train' not in ''.join(lines).replace('training', '')
    assert Path('judged/results.csv').read_bytes() == Path('fewer_judged/results.csv').read_bytes()
    assert pd.read_csv('judged/scores/mvtec_tile.csv').error.notna().sum() == 1 and len(pd.read_csv('judged/skipped.csv')) == 1
    status, *_ = call('evaluate', words.format('--on_error skip', 'judged').replace('mvtec data', 'mvtec fewer'))
    assert status == 0 and not Path('judged/skipped.csv').exists() # of an earlier evaluation

def test_run_in_python(there):
    tile = load_category('mvtec', there/'data', 'tile')
    model = PatchCore('filterbank', ratio=.1, target_dim=32, resize=64, imagesize=64, device='cpu')
    with pytest.raises(ArgumentError, match='on_error'): experiment.run(model, [tile], there/'r', on_error='ignore')
    cut(tile.train[2].path)
    with pytest.raises(DataError, match='002.png'): experiment.run(model, [tile], there/'r')
    with pytest.warns(UserWarning, match='1 of 10 images cannot be read'): done = experiment.run(model, [tile], there/'r', on_error='skip')
    assert done.skipped == 1 and np.isfinite(done.report.image_auroc['mvtec_tile'])

def test_a_link_that_leads_nowhere_is_listed(there):
    "It was passed over in silence."
    gone(there/'data'/'tile'/files_of('test'))
    assert len(load_category('mvtec', there/'data', 'tile').test) == 4

def test_a_folder_among_the_images_of_a_set_is_named(there):
    folder(there/'data'/'tile'/files_of('train'))
    with pytest.warns(UserWarning, match=r'002.png \(a folder\)'): load_category('mvtec', there/'data', 'tile')
