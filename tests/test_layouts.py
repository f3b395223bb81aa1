"Every layout on a miniature of it: what is found, where its masks lie, and what is said of a layout that is another."
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from patchcore_nb import data
from patchcore_nb.cli import main
from patchcore_nb.core import ArgumentError, DataError, read_image
from patchcore_nb.data import DATASETS, TREES, Category, Preprocess, Sample, check_category, dataset_names, dataset_options, find_dataset, load_category, read_masks
from patchcore_nb.miniatures import make_layout

LAYOUTS = {'mvtec': 'spot', 'mpdd': 'spot', 'btad': 'ko', 'mvtec_loco': 'logical_anomalies', 'mvtec_ad2': 'bad', 'visa': 'anomaly',
           'mtd': 'MT_Crack', 'ksdd': 'defect', 'folder': 'bad', 'csv': 'scratch'} # name -> kind of defect in its miniature
MASKS = dict(masks='masks/{stem}*.png')
each_layout = pytest.mark.parametrize('name', LAYOUTS)


def load(name, where, **options): return load_category(name, *where, **(MASKS if name == 'folder' else {}), **options)

def refused(kind, f, *words):
    with pytest.raises(kind) as e: f()
    for o in words: assert o in str(e.value), str(e.value)
    return str(e.value)

def save(path, a=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((12, 10), np.uint8) if a is None else a).save(path, **options)
    return path


# What is found

@each_layout
def test_a_miniature(tmp_path, name):
    found = load(name, make_layout(tmp_path/'set', name))
    drawn = name in ('mtd', 'ksdd', 'folder') # where the split is ours
    assert (len(found.train), sum(not o.label for o in found.test), sum(o.label for o in found.test)) == ((4, 1, 2) if drawn else (5, 2, 2))
    assert {o.kind for o in found.test if o.label} == {LAYOUTS[name]} and {o.kind for o in found.test if not o.label} == {'good'}
    assert all(o == Sample(o.path) for o in [*found.train, *found.calibration])
    assert all(bool(o.mask) == o.label for o in found.test)
    assert len({o.path for o in [*found.train, *found.test, *found.calibration, *found.unlabelled]}) == sum(map(len, (found.train, found.test, found.calibration, found.unlabelled)))
    assert found.dataset == name and check_category(found) is found

@each_layout
@pytest.mark.parametrize('size', [(56, 44), (44, 56), (48, 48), (40, 90)])
def test_masks_lie_on_the_pixels_of_the_defect(tmp_path, name, size):
    "The square is bright in the image; after scaling and cropping the mask covers it, and nothing else."
    found, pre = load(name, make_layout(tmp_path/'set', name, size=size)), Preprocess(40, 32)
    masks = read_masks(found.test, pre).numpy()
    bright = np.stack([np.asarray(pre.crop(read_image(o.path)).convert('L')) > 180 for o in found.test])
    assert [m.any() for m in masks] == [o.label for o in found.test]
    assert (masks & ~bright).sum() == 0 and (masks & bright).sum() > .75*bright.sum() > 0

def test_what_is_put_aside_and_what_is_secret(tmp_path):
    loco, ad2 = (load(o, make_layout(tmp_path/o, o)) for o in ('mvtec_loco', 'mvtec_ad2'))
    assert {o.path.parent.parent.name for o in [*loco.calibration, *ad2.calibration]} == {'validation'} and len(loco.calibration) == len(ad2.calibration) == 2
    assert [(o.path.parent.name, o.kind) for o in ad2.unlabelled] == [('test_private', 'unknown')]*2+[('test_private_mixed', 'unknown')]*2
    assert '2 to calibrate, 4 unlabelled' in repr(ad2) and 'unlabelled' not in repr(loco)
    for group in ('calibration', 'unlabelled'):
        broken = Category(**vars(ad2) | {group: [Sample(tmp_path/'gone.png')]})
        refused(DataError, lambda: check_category(broken), 'gone.png is not there')

def test_several_masks_are_one(tmp_path):
    "And each of them must have the image's size."
    found, pre = load('mvtec_loco', make_layout(tmp_path, 'mvtec_loco')), Preprocess(44, 44)
    sample = found.test[3]
    left, right = (data.read_mask(o, sample.path, pre, True) for o in sample.mask)
    both = data.read_mask(sample.mask, sample.path, pre, True)
    assert left.any() and right.any() and not (left & right).any() and torch.equal(both & (left | right), left | right)
    save(sample.mask[1])
    for look in (lambda: check_category(found), lambda: read_masks(found.test, pre)): refused(DataError, look, '001.png is 10 x 12', 'give the mask the size')

@pytest.mark.parametrize('extension', ['.png', '.bmp', '.PNG'])
def test_btad_masks_of_any_format(tmp_path, extension):
    where = make_layout(tmp_path, 'btad')
    for p in [*(tmp_path/'01/ground_truth/ko').iterdir()]: Image.open(p).save(p.with_suffix('.x'), extension[1:].lower()); p.unlink(); p.with_suffix('.x').rename(p.with_suffix(extension))
    assert [o.mask.name for o in load('btad', where).test if o.label] == [f'000{extension}', f'001{extension}']

def test_visa_rearranged_as_mvtec(tmp_path):
    "With its numbered masks."
    for i in range(3): save(tmp_path/'candle/train/good'/f'{i}.JPG')
    for kind in ('good', 'bad'): save(tmp_path/'candle/test'/kind/'000.JPG', format='jpeg')
    save(tmp_path/'candle/ground_truth/bad/000.png', np.repeat(np.arange(12, dtype=np.uint8)[:, None], 10, 1))
    found = load_category('visa', tmp_path, 'candle')
    assert [(o.kind, o.any_value) for o in found.test] == [('bad', True), ('good', False)]
    assert read_masks(found.test, Preprocess(10, 10))[0].float().mean() > .8

def test_tiles_without_a_mask_or_with_an_empty_one(tmp_path):
    "They are sorted as defective, and stay it."
    where = make_layout(tmp_path, 'mtd')
    save(tmp_path/'MT_Crack/Imgs/exp2_0.png', np.zeros((56, 44), np.uint8))
    found = load('mtd', where)
    assert sum(o.label for o in found.test) == 2 and not read_masks(found.test, Preprocess(40, 32))[1].any()
    (tmp_path/'MT_Crack/Imgs/exp2_0.png').unlink()
    assert [bool(o.mask) for o in load('mtd', where).test if o.label] == [False, True]

@pytest.mark.parametrize('value', [1, 255])
def test_a_single_pixel_makes_a_part_defective(tmp_path, value):
    where = make_layout(tmp_path, 'ksdd')
    assert 'kos01/Part0.jpg' not in [o.path.relative_to(tmp_path).as_posix() for o in load('ksdd', where).test if o.label]
    label = np.zeros((56, 44), np.uint8)
    label[7, 9] = value
    save(tmp_path/'kos01/Part0_label.bmp', label)
    assert 'kos01/Part0.jpg' in [o.path.relative_to(tmp_path).as_posix() for o in load('ksdd', where).test if o.label]


# Splits by seed

@pytest.mark.parametrize('name', ['mtd', 'ksdd', 'folder'])
def test_the_split_goes_by_the_seed(tmp_path, name):
    where, before = make_layout(tmp_path/'set', name, n=20), torch.get_rng_state()
    found = [load(name, where, seed=s) for s in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert load(name, where) == found[0] == load(name, where, seed=0)
    assert len({tuple(o.path for o in f.train) for f in found}) == 4
    for f in found:
        held = [o for o in f.test if not o.label]
        assert (len(f.train), len(held)) == (16, 4) and f.train == sorted(f.train, key=lambda o: o.path) and not set(f.train) & set(held)
        assert {o.path for o in [*f.train, *held]} == {o.path for o in [*found[0].train, *found[0].test] if not o.label}

@each_layout
def test_a_seed_is_welcome_everywhere(tmp_path, name):
    assert load(name, make_layout(tmp_path/'set', name), seed=3).train


# Wrong layouts

def spoilt(*gone): return [(gone[0], path, says) for path, says in gone[1:]]

SPOILT = [*spoilt('mpdd', ('tubes/train/good', 'good is not there'), ('tubes/test', 'test holds no folders'), ('tubes/ground_truth', 'ground_truth holds no mask')),
          *spoilt('btad', ('01/train', 'ok is not there'), ('01/test', 'test holds no folders'), ('01/ground_truth/ko', 'ground_truth holds no mask')),
          *spoilt('mvtec_loco', ('pushpins/train', 'good is not there'), ('pushpins/validation', 'good is not there: put the good images'), ('pushpins/ground_truth', 'holds no mask')),
          *spoilt('mvtec_ad2', ('vial/validation/good', 'good is not there'), ('vial/test_public', 'test_public holds no folders'), ('vial/test_public/ground_truth', 'holds no mask')),
          *spoilt('visa', ('split_csv', '1cls.csv is not there'), ), *spoilt('mtd', ('MT_Free', 'holds no folder MT_Free'), ('MT_Free/Imgs', 'holds no .jpg images'), ('MT_Crack', 'holds no defective images')),
          *spoilt('ksdd', ('kos01/Part0_label.bmp', 'Part0_label.bmp is not there'), ), *spoilt('folder', ('good', "no image matches 'good/*'"), ('bad', "no image matches 'bad/*'"), ('masks', "no mask matches 'masks/{stem}*.png'"))]

@pytest.mark.parametrize('name, path, says', SPOILT, ids=lambda o: str(o).replace('/', '-')[:24])
def test_a_part_that_is_missing(tmp_path, name, path, says):
    where = make_layout(tmp_path, name)
    shutil.rmtree(tmp_path/path) if (tmp_path/path).is_dir() else (tmp_path/path).unlink()
    said = refused(DataError, lambda: load(name, where), says, f'{name} expects:', *map(str.strip, TREES[name].splitlines()))
    assert says in said.splitlines()[0] and len(said.splitlines()) == 1+len(TREES[name].splitlines())

@each_layout
@pytest.mark.parametrize('how', ['nothing there', 'empty'])
def test_not_this_set_at_all(tmp_path, name, how):
    if how == 'empty': (tmp_path/'set').mkdir()
    category = name if name in ('mtd', 'ksdd') else 'x'
    refused(DataError, lambda: load(name, (tmp_path/'set', category)), str(tmp_path/'set'), f'{name} expects:', *map(str.strip, TREES[name].splitlines()))

@pytest.mark.parametrize('name, asked, says', [('mpdd', 'tube', "did you mean 'tubes'"), ('visa', 'candel', "did you mean 'candle'"), ('csv', 'part', "did you mean 'parts'"), ('btad', '04', "did you mean '01'"),
    ('mtd', 'tiles', 'it holds mtd alone'), ('ksdd', 'kos01', 'it holds ksdd alone'), ('mvtec_ad2', 'vail', "did you mean 'vial'"), ('mvtec_loco', 'bottle', 'it holds pushpins'), ('folder', 'maks', "did you mean 'masks'")])
def test_a_category_that_is_not_there(tmp_path, name, asked, says):
    root, _ = make_layout(tmp_path, name)
    refused(DataError, lambda: load_category(name, root, asked), asked, says)

@pytest.mark.parametrize('name, inside', [('mpdd', 'tubes'), ('btad', '01'), ('mvtec_ad2', 'vial'), ('mtd', 'MT_Free'), ('ksdd', 'kos01')])
def test_a_root_one_folder_off(tmp_path, name, inside):
    root, category = make_layout(tmp_path/'here'/'set', name)
    for wrong in (root/inside, root.parent): refused(DataError, lambda: load_category(name, wrong, category), f'did you mean the folder {root}?')

def test_layouts_taken_for_each_other(tmp_path):
    "MVTec AD 2 has no folder test; VisA needs its table."
    make_layout(tmp_path, 'mpdd')
    refused(DataError, lambda: load_category('mvtec_ad2', tmp_path, 'tubes'), 'validation', 'DATA_PATH/vial/test_public/bad')
    refused(DataError, lambda: load_category('btad', tmp_path, 'tubes'), 'ok is not there', 'DATA_PATH/01/train/ok')


# Folders by patterns

@pytest.fixture
def parts(tmp_path):
    "normal/a, normal/b and deep below them, scratch, dent, other."
    for i in range(5): save(tmp_path/'normal'/f'{i}.png')
    for i in range(5): save(tmp_path/'normal/deep/er'/f'{i}.png')
    for kind in ('scratch', 'dent'):
        for i in (1, 10, 2): save(tmp_path/kind/f'{i}.jpg')
    (tmp_path/'scratch/notes.txt').write_text('x', encoding='utf-8')
    return tmp_path

def patterns(parts, normal='normal/*', abnormal='scratch/*, dent/*', **options): return load_category('folder', parts, '.', normal=normal, abnormal=abnormal, **options)

def test_patterns(parts):
    assert len(patterns(parts).train) == 4 and len(patterns(parts, 'normal/**/*.png').train) == 8
    found = patterns(parts, test_normal='normal/deep/**/*.png')
    assert len(found.train) == 5 and [o.kind for o in found.test] == ['good']*5+['dent']*3+['scratch']*3
    assert patterns(parts, abnormal='').test == [o for o in patterns(parts).test if not o.label]
    assert {o.kind for o in load_category('folder', parts.parent, parts.name, normal='normal/*', abnormal='scratch/*').test} == {'good', 'scratch'}
    assert load_category('folder', parts/'scratch', '.', normal='1.jpg', abnormal='2.jpg,10.jpg').test[0].kind == 'defect'

@pytest.mark.parametrize('pattern, names', [('masks/{stem}*.png', ['1.png', '1_b.png', '1_22.png']), ('masks/{stem}.png', ['1.png']), ('masks/{stem}_*', ['1_b.png', '1_22.png']), ('m*/{stem}*', ['1.png', '1_b.png', '1_22.png'])])
def test_masks_by_name(parts, pattern, names):
    for o in ('1', '10', '1_b', '1_22', '11'): save(parts/'masks'/f'{o}.png')
    (parts/'masks/1.json').write_text('{}', encoding='utf-8')
    found = {o.path.stem: o.mask for o in patterns(parts, abnormal='scratch/*', masks=pattern).test if o.label}
    got = found['1'] if isinstance(found['1'], tuple) else (found['1'],)
    assert sorted(p.name for p in got) == sorted(names) and found['2'] is None
    assert found['10'] == (None if '_*' in pattern else parts/'masks/10.png')

def test_masks_of_kinds(parts):
    for kind in ('scratch', 'dent'):
        for i in (1, 2, 10): save(parts/'gt'/kind/f'{i}.png')
    found = patterns(parts, masks='gt/{kind}/{stem}.png')
    assert all(o.mask == parts/'gt'/o.kind/f'{o.path.stem}.png' for o in found.test if o.label)
    save(parts/'flat/1.png')
    refused(DataError, lambda: patterns(parts, masks='flat/{stem}.png'), 'fits both', '{kind}')

def test_a_mask_goes_to_the_longer_name(parts):
    for o in ('part', 'part_b'): save(parts/'long'/f'{o}.jpg'); save(parts/'masks'/f'{o}_mask.png')
    found = {o.path.stem: o.mask for o in patterns(parts, abnormal='long/*', masks='masks/{stem}*').test if o.label}
    assert {k: v.name for k, v in found.items()} == {'part': 'part_mask.png', 'part_b': 'part_b_mask.png'}

@pytest.mark.parametrize('name', ['a[1]', 'x (2)', 'a*b', 'ÜBER'])
def test_names_that_look_like_patterns(parts, name):
    if sys.platform == 'win32' and '*' in name: pytest.skip('no such name on Windows')
    save(parts/'odd'/f'{name}.png')
    save(parts/'masks'/f'{name}.png')
    assert patterns(parts, abnormal='odd/*', masks='masks/{stem}.png').test[-1].mask == parts/'masks'/f'{name}.png'

@pytest.mark.parametrize('options, kind, says', [
    (dict(normal='gut/*'), DataError, ["no image matches 'gut/*'", 'folder expects:']), (dict(normal='normal/*, gut/*'), DataError, ["'gut/*'"]), (dict(abnormal='scratch/*.bmp'), DataError, ["'scratch/*.bmp'"]),
    (dict(test_normal='gut/*'), DataError, ["'gut/*'"]), (dict(abnormal='normal/*'), DataError, ['matched by normal and by abnormal']), (dict(test_normal='normal/1.png'), DataError, ['matched by normal and by test_normal']),
    (dict(normal=''), ArgumentError, ['normal must be a pattern']), (dict(normal='/x/*.png'), ArgumentError, ["'/x/*.png' cannot be used"]), (dict(masks='/x/{stem}.png'), ArgumentError, ['cannot be used']),
    (dict(masks='masks/*.png'), ArgumentError, ['masks must hold {stem}']), (dict(masks='masks/{stem}.png'), DataError, ['no mask matches', '6 defective images']),
    (dict(abnormal='scratch/*', masks='normal/{stem}.png'), DataError, ['matched by normal and by masks'])])
def test_patterns_that_cannot_be(parts, options, kind, says): refused(kind, lambda: patterns(parts, **options), *says)


# Tables

@pytest.fixture
def table(tmp_path):
    "Write a table beside five images a to e and two masks; read it."
    for o in ('a', 'b', 'c', 'd', 'e', 'm1', 'm2'): save(tmp_path/f'{o}.png')
    def read(text, category='x', encoding='utf-8', **options):
        (tmp_path/'t.csv').write_bytes(text.encode(encoding))
        return load_category('csv', tmp_path/'t.csv', category, **options)
    return read

def places(found): return [[o.path.stem for o in group] for group in (found.train, found.test, found.calibration)]

def test_a_table(table, tmp_path):
    found = table(f'path,label,mask,split\na.png,good,,train\nb.png,0,,calibration\n\nc.png,,,test\nd.png,Scratch,m1.png;m2.png,test\n{tmp_path}/e.png,1,m1.png,Test\n')
    assert places(found) == [['a'], ['c', 'd', 'e'], ['b']]
    assert [(o.kind, o.label, o.mask) for o in found.test] == [('good', False, None), ('Scratch', True, (tmp_path/'m1.png', tmp_path/'m2.png')), ('defect', True, tmp_path/'m1.png')]

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_tables_as_spreadsheets_write_them(table, encoding, end):
    assert places(table(end.join(['Path, Label ,comment', '"a.png",good,"x, y"', ' b.png ,0.0', 'c.png,1']), encoding=encoding)) in ([['a'], ['b', 'c'], []], [['b'], ['a', 'c'], []])

def test_a_table_without_a_split(table):
    text = 'path,label\n'+''.join(f'{o}.png,good\n' for o in 'abcde')+'m1.png,dent\n'
    found = [table(text, seed=s) for s in range(5)]
    assert all(len(f.train) == 4 and f.test[-1].kind == 'dent' and len(f.test) == 2 for f in found) and len({str(places(f)) for f in found}) > 1

def test_categories_of_a_table(table):
    text = 'category,path,label\nx,a.png,good\ny,b.png,good\ny,gone.png,good\n'
    assert places(table(text)) == [['a'], [], []]
    refused(DataError, lambda: table(text, 'z'), "no category 'z'", 'it holds x, y')
    refused(DataError, lambda: table(text, 'y'), "t.csv, row 4, column 'path' names 'gone.png'")
    assert table('path,label\na.png,good\n', 'any name').key == 'csv_any name'

@pytest.mark.parametrize('text, says', [
    ('', ["no column 'path'", 'row 1 names nothing', 'csv expects:']), ('path\na.png\n', ["no column 'label'", 'row 1 names path']), ('path;label\na.png;good\n', ["no column 'path'", 'path;label']),
    ('path,label\n', ['no good images']), ('path,label\na.png,dent\n', ['no good images']), ('path,label\na.png,good\nz.png,good\n', ["t.csv, row 3, column 'path'", 'z.png is not there']),
    ('path,label,mask\na.png,good,\nb.png,dent,m1.png;m9.png\n', ["row 3, column 'mask'", 'm9.png is not there']), ('path,label\n,good\n', ["row 2, column 'path'", 'name one']),
    ('path,label,split\na.png,good,train\nb.png,good,valid\n', ["row 3, column 'split' is 'valid'", 'train or test or calibration']), ('path,label,split\na.png,good,\n', ["row 2, column 'split' is ''"]),
    ('path,label,split\na.png,good,train\nb.png,dent,train\n', ["row 3, column 'split'", "labelled 'dent'", 'only good images']), ('path,label\na.png,good,more\n', ['row 2 has 3 cells']),
    ('path,label,split\na.png,good,test\n', ['no good images'])])
def test_tables_that_cannot_be(table, text, says): refused(DataError, lambda: table(text), *says)

def test_files_that_are_no_tables(table, tmp_path):
    refused(DataError, lambda: table('path,label\nü.png,good\n', encoding='latin-1'), 'save it as CSV in UTF-8')
    refused(DataError, lambda: load_category('csv', tmp_path/'none.csv', 'x'), 'none.csv', 'cannot be read', 'csv expects:')
    refused(DataError, lambda: load_category('csv', tmp_path, 'x'), 'is a folder', 't.csv')

def test_a_row_of_visa_that_is_wrong(tmp_path):
    where, table = make_layout(tmp_path, 'visa'), tmp_path/'split_csv/1cls.csv'
    text = table.read_text(encoding='utf-8')
    for old, new, says in [('Anomaly/001.JPG', 'Anomaly/9.JPG', "row 10, column 'image'"), ('Masks/Anomaly/001.png', 'Masks/9.png', "row 10, column 'mask'"), ('train', 'drain', "row 2, column 'split' is 'drain'"),
                           ('object,', 'subject,', "no column 'object'"), ('train', 'test', "no row of candle whose split is 'train'")]:
        table.write_text(text.replace(old, new), encoding='utf-8')
        refused(DataError, lambda: load('visa', where), '1cls.csv', says)


# Options, registration and entry points

def test_every_dataset_is_where_the_table_says():
    for name, module in DATASETS.ours.items(): assert find_dataset(name).__module__ == f'patchcore_nb.{module}'

def test_options():
    assert dataset_options('folder') == ['normal', 'abnormal', 'masks', 'test_normal', 'seed'] and dataset_options('ksdd') == ['seed'] and dataset_options('mpdd') == []
    refused(ArgumentError, lambda: load_category('folder', '.', 'x', mask='*'), "option of dataset folder 'mask'", "did you mean 'masks'", 'test_normal')
    refused(ArgumentError, lambda: load_category('mpdd', '.', 'x', masks='*'), 'mpdd takes no options, got masks')

@pytest.fixture
def registry():
    "Registrations that are forgotten afterwards."
    before = dict(DATASETS.found), dict(TREES)
    yield
    for table, o in zip((DATASETS.found, TREES), before):
        table.clear()
        table.update(o)

@pytest.fixture
def plugins(tmp_path, monkeypatch, registry):
    "A package that promises datasets by entry points."
    site = tmp_path/'site'
    meta = site/'line_sets-1.0.dist-info'
    meta.mkdir(parents=True)
    (meta/'METADATA').write_text('Metadata-Version: 2.1\nName: line-sets\nVersion: 1.0\n', encoding='utf-8')
    (meta/'entry_points.txt').write_text('[patchcore_nb.datasets]\nour_line = line_sets_of_ours:load\nbroken = line_sets_of_ours:gone\nhollow = line_sets_of_ours\nbtad = line_sets_of_ours:load\n', encoding='utf-8')
    (site/'line_sets_of_ours.py').write_text('from dataclasses import replace\nfrom patchcore_nb.mvtec import mvtec\n'
        "def load(root, category, normal='x', seed=-1): return replace(mvtec(root, category), dataset=f'our_line_{normal}_{seed}')\n", encoding='utf-8')
    monkeypatch.syspath_prepend(str(site))
    yield make_layout(tmp_path/'set', 'mvtec', size=(64, 64))
    sys.modules.pop('line_sets_of_ours', None)

def test_a_dataset_of_another_package(plugins):
    assert dataset_names()[-3:] == ['broken', 'hollow', 'our_line'] and 'line_sets_of_ours' not in sys.modules
    assert load_category('our_line', *plugins, normal='y', seed=3).dataset == 'our_line_y_3' and load_category('our_line', *plugins).dataset == 'our_line_x_-1'
    assert 'our_line' in data.DATASETS and find_dataset('our_line') is sys.modules['line_sets_of_ours'].load
    assert find_dataset('btad') is DATASETS['btad'] # what is ours stays ours

def test_entry_points_that_lead_nowhere(plugins):
    refused(DataError, lambda: load_category('broken', *plugins), "dataset 'broken'", 'line_sets_of_ours:gone', 'AttributeError')
    refused(DataError, lambda: load_category('hollow', *plugins), "dataset 'hollow'", 'which is no function')
    refused(ArgumentError, lambda: load_category('our_lin', *plugins), "did you mean 'our_line'", 'visa', 'btad')

def test_a_loader_of_ones_own(registry, tmp_path):
    @data.register_dataset('mine', '''
        DATA_PATH/a.png    anything
          DATA_PATH/b.png  more
    ''')
    def mine(root, category): raise data.wrong_layout('mine', f'{root} is empty')
    assert refused(DataError, lambda: load_category('mine', tmp_path, 'x')) == f'{tmp_path} is empty. mine expects:\n  DATA_PATH/a.png    anything;\n    DATA_PATH/b.png  more'
    assert str(data.wrong_layout('nobody', 'nothing')) == 'nothing'


# The command line

@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    "Run a part dataset on the command line; status, the error's line, the rows of the results."
    monkeypatch.delenv('PATCHCORE_NB_DEBUG', raising=False)
    def go(*words, seed=0):
        core = '-b filterbank -le layer2 -le layer3 --pretrain_embed_dimension 16 --target_embed_dimension 16 sampler -p 0.1 identity dataset --resize 64 --imagesize 64'
        with pytest.raises(SystemExit) as e: main(['--gpu', '-1', '--seed', str(seed), str(tmp_path/'results'), 'patch_core', *core.split(), *map(str, words)])
        errors = [o for o in capsys.readouterr().err.splitlines() if o.startswith('error: ')]
        tables = sorted((tmp_path/'results').rglob('results.csv'))
        return e.value.code, ' '.join(errors), pd.read_csv(tables[-1], index_col=0) if tables else None
    return go

def test_a_layout_end_to_end(call, tmp_path):
    root, category = make_layout(tmp_path/'set', 'mvtec_loco', size=(64, 56))
    status, error, table = call('-d', category, 'mvtec_loco', root)
    assert (status, error) == (0, '') and list(table.index) == ['mvtec_loco_pushpins', 'Mean']
    assert table.loc['Mean', 'instance_auroc'] == 1 and table.loc['Mean', 'full_pixel_auroc'] > .8

def test_folders_and_tables_end_to_end(call, tmp_path):
    root, _ = make_layout(tmp_path/'parts', 'folder', size=(64, 56))
    for p in ('good', 'bad', 'masks'): (root/p).rename(root/f'{p}_ones')
    status, error, table = call('--normal', 'good_ones/*', '--abnormal', 'bad_ones/*', '--masks', 'masks_ones/{stem}*.png', '-d', '.', 'folder', root)
    assert (status, error) == (0, '') and table.index[0] == 'folder_parts' and table['full_pixel_auroc'].notna().all()
    path, category = make_layout(tmp_path/'table', 'csv', size=(64, 56))
    status, error, table = call('-d', category, 'csv', path)
    assert (status, error) == (0, '') and table.index[0] == 'csv_parts' and table['full_pixel_auroc'].notna().all()

def test_the_command_line_finds_entry_points(call, plugins):
    root, category = plugins
    status, error, table = call('--normal', 'z', '-d', category, 'our_line', root, seed=5)
    assert (status, error, table.index[0]) == (0, '', 'our_line_z_5_bottle')
    assert call('-d', category, 'broken', root)[0] == 1

def test_what_the_command_line_refuses(call, tmp_path):
    root, category = make_layout(tmp_path/'set', 'btad')
    status, error, _ = call('--masks', '{stem}', '-d', category, 'btad', root)
    assert status == 2 and 'btad takes no options, got masks' in error
    status, error, _ = call('--masks', 'm/*', '--normal', 'train/ok/*', '--abnormal', 'test/ko/*', '-d', '.', 'folder', root/category)
    assert status == 2 and 'masks must hold {stem}' in error
    shutil.rmtree(root/category/'train')
    status, error, table = call('-d', category, 'btad', root)
    assert status == 1 and 'ok is not there' in error and 'DATA_PATH/01/train/ok/0000.bmp good images to learn from; DATA_PATH/01/test/ok' in error and table is None
    assert all(o in call('-d', 'x', 'vizza', root)[1] for o in ("did you mean 'visa'", 'mvtec_ad2', 'demo'))
