"What lies in a set's folders is used or named: masks, images that are not read, names in two forms, images that are learnt and judged."
import shutil
import sys
import types
import unicodedata
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from patchcore_nb import categories, data
from patchcore_nb.cli import main
from patchcore_nb.core import DataError, read_image
from patchcore_nb.data import Preprocess, load_category, read_masks
from patchcore_nb.folders import find_entry, part_masks
from patchcore_nb.items import as_items
from patchcore_nb.miniatures import make_layout
from patchcore_nb.names import MASK_THRESHOLDS
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.resume import digest_category

TESTDATA = pytest.mark.skipif('PATCHCORE_NB_TESTDATA' not in __import__('os').environ, reason='PATCHCORE_NB_TESTDATA is not set')
WHOLE = Preprocess((72, 72), None)
S = 72


def photo(seed, size=(S, S)): return np.random.default_rng(seed).integers(90, 130, (*size, 3), np.uint8)

def spot(i, size=(S, S)):
    at = np.zeros(size, bool)
    at[18+3*i:32+3*i, 18+2*i:32+2*i] = True
    return at

def put(a, path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    (a if isinstance(a, Image.Image) else Image.fromarray(a)).save(path, **how)
    return path

def white(at): return at*np.uint8(255)

def draw(root, mask=white, kind='scratch', truth='ground_truth', of_kind=None, name='{:03}_mask.png', **how):
    "A plain set, its masks perhaps otherwise."
    home = root/'part'
    for i in range(6): put(photo(i), home/f'train/good/{i:03}.png')
    for i in range(2): put(photo(50+i), home/f'test/good/{i:03}.png')
    for i in range(3):
        put(np.where(spot(i)[..., None], np.uint8(240), photo(90+i)), home/f'test/{kind}/{i:03}.png')
        if mask: put(mask(spot(i)), home/truth/(of_kind or kind)/name.format(i), **how)
    return home

def load(root, name='mvtec', category='part', **options):
    "The category, and the lines that were said."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        found = load_category(name, root, category, **options)
    lines = [str(o.message) for o in said]
    assert all('\n' not in o for o in lines)
    return found, lines

def masks_of(found, pre=WHOLE):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        masks = read_masks(found.test, pre)
    return masks, [str(o.message) for o in said]

def holds(line, *words): assert all(o in line for o in words), line

def only(lines, *words):
    assert len(lines) == 1, lines
    holds(lines[0], *words)


# Nothing is said where nothing is wrong

@pytest.mark.parametrize('name', ['mvtec', 'mpdd', 'btad', 'mvtec_loco', 'mvtec_ad2', 'visa', 'mtd', 'ksdd', 'folder', 'csv'])
def test_well_formed_sets_are_passed_in_silence(tmp_path, name):
    where = make_layout(tmp_path/'set', name)
    found, said = load(*where[:1], name, where[1], **(dict(masks='masks/{stem}*.png') if name == 'folder' else {}))
    assert not said and not masks_of(found, Preprocess(40, 32))[1]

@TESTDATA
def test_real_and_generated_sets_are_passed_in_silence(tmp_path):
    import os
    found, said = load(os.path.join(os.environ['PATCHCORE_NB_TESTDATA'], 'data', 'mvtec256'), 'mvtec', 'bottle')
    assert not said and not masks_of(found, Preprocess(256, 224))[1]
    found, said = load(tmp_path, 'demo', 'cog')
    assert not said and not masks_of(found, Preprocess(256, 224))[1]

def test_notes_and_what_systems_scatter(tmp_path):
    home = draw(tmp_path)
    for folder in (home, home/'train/good', home/'test', home/'test/scratch', home/'ground_truth/scratch'):
        for name in ('Thumbs.db', '.DS_Store', '._000.png', 'notes.txt', 'README', 'license.md'): (folder/name).write_bytes(b'x')
    assert not load(tmp_path)[1]


# Masks that fit no image

@pytest.mark.parametrize('how, example', [
    (dict(name='{:03}_gt.png'), '000_gt.png fits no image'), (dict(name='{:03}_Mask.png'), '000_Mask.png fits no image'), (dict(name='{:03}-mask.png'), '000-mask.png'),
    (dict(name='mask_{:03}.png'), 'mask_000.png'), (dict(of_kind='Scratch'), 'Scratch'), (dict(of_kind='scratches'), 'scratches'),
    *((dict(truth=o), f'{o}/scratch/000_mask.png' if '/' not in o else o) for o in ('groundtruth', 'Ground-Truth', 'masks', 'GT', 'label'))])
def test_masks_that_fit_no_image(tmp_path, how, example):
    home = draw(tmp_path, **how)
    found, said = load(tmp_path)
    assert not any(o.mask for o in found.test)
    only(said, 'of 3 masks 0 are used', example.replace('/', __import__('os').sep), f"call the mask of {home/'test/scratch/000.png'} {home/'ground_truth/scratch/000_mask.png'}")

def test_masks_straight_in_the_folder(tmp_path):
    home = draw(tmp_path)
    for p in [*(home/'ground_truth/scratch').iterdir()]: p.rename(home/'ground_truth'/p.name)
    only(load(tmp_path)[1], 'of 3 masks 0 are used')

def test_some_masks_fit(tmp_path):
    home = draw(tmp_path)
    (home/'ground_truth/scratch/001_mask.png').rename(home/'ground_truth/scratch/1_mask.png')
    only(load(tmp_path)[1], 'of 3 masks 2 are used', '1_mask.png fits no image', 'scratch/001_mask.png')

def test_two_masks_for_one_image(tmp_path):
    home = draw(tmp_path)
    put(white(spot(0)), home/'ground_truth/scratch/000.png')
    only(load(tmp_path)[1], 'of 4 masks 3 are used', 'is a second mask of its image')

def test_masks_of_good_images_are_no_news(tmp_path):
    home = draw(tmp_path)
    put(white(spot(0) & False), home/'ground_truth/good/000_mask.png')
    assert not load(tmp_path)[1]

@pytest.mark.parametrize('name', ['mpdd', 'btad', 'mvtec_ad2', 'visa'])
def test_a_published_set_whose_masks_fit_none(tmp_path, name):
    root, category = tmp_path, 'part'
    good, bad = ('ok', 'ko') if name == 'btad' else ('good', 'bad')
    home, test = root/category, 'test_public' if name == 'mvtec_ad2' else 'test'
    for folder in (f'train/{good}', f'{test}/{good}', f'{test}/{bad}', *(['validation/good'] if name == 'mvtec_ad2' else [])): put(photo(len(folder)), home/folder/'000.png')
    put(white(spot(0)), home/(f'{test}/ground_truth' if name == 'mvtec_ad2' else 'ground_truth')/bad/'000_gt.png')
    with pytest.raises(DataError) as e: load_category(name, root, category)
    holds(str(e.value), 'of 1 masks 0 are used', '000_gt.png fits no image', '000_mask.png')

def test_masks_by_pattern(tmp_path):
    where = make_layout(tmp_path/'set', 'folder')
    home = where[0]
    put(white(spot(0, (56, 44))), home/'masks/17_mask.png')
    put(white(spot(0, (56, 44)) & False), home/'masks/003_mask.png') # a good image's
    found, said = load(*where[:1], 'folder', where[1], masks='masks/{stem}*.png')
    only(said, "of 3 masks that match 'masks/{stem}*.png' 2 are used", '17_mask.png fits no defective image')
    assert sum(bool(o.mask) for o in found.test) == 2


# Names that look the same

COMPOSED = unicodedata.normalize('NFC', 'Prüfköper é')
PARTED = unicodedata.normalize('NFD', COMPOSED)

@pytest.mark.parametrize('typed, stored', [(COMPOSED, PARTED), (PARTED, COMPOSED)])
def test_names_in_two_forms(tmp_path, typed, stored):
    "The category, the folder of a kind, and a mask."
    home = draw(tmp_path, kind=stored, of_kind=typed)
    for i in range(3):
        (home/'test'/stored/f'{i:03}.png').rename(home/'test'/stored/f'{stored}{i}.png')
        (home/'ground_truth'/typed/f'{i:03}_mask.png').rename(home/'ground_truth'/typed/f'{typed}{i}_mask.png')
    home.rename(tmp_path/stored)
    found, said = load(tmp_path, category=typed)
    assert not said and sum(bool(o.mask) for o in found.test) == 3 and masks_of(found)[0].any()
    assert find_entry(tmp_path/typed/'test'/typed).samefile(tmp_path/stored/'test'/stored) and find_entry(tmp_path/typed/'none') == tmp_path/typed/'none'

@pytest.mark.parametrize('typed, stored', [(COMPOSED, PARTED), (PARTED, COMPOSED)])
def test_names_in_two_forms_by_patterns_and_in_tables(tmp_path, typed, stored):
    for i in range(5): put(photo(i), tmp_path/stored/'good'/f'{i}.png')
    put(photo(9), tmp_path/stored/'bad'/f'{stored}.png')
    put(white(spot(0)), tmp_path/stored/'masks'/f'{typed}_mask.png')
    found, said = load(tmp_path, 'folder', typed, masks='masks/{stem}*.png')
    assert not said and found.test[-1].mask.is_file()
    rows = [f'{typed}/good/{i}.png,good,,{stored}' for i in range(5)] + [f'{typed}/bad/{typed}.png,scratch,{typed}/masks/{typed}_mask.png,{stored}']
    (tmp_path/'t.csv').write_text('\n'.join(['path,label,mask,category', *rows]), encoding='utf-8')
    found, said = load(tmp_path/'t.csv', 'csv', typed)
    assert not said and found.test[-1].mask.is_file() and len(found.train) == 4


# Masks among the images

@pytest.mark.parametrize('name', ['{:03}_mask.png', '{:03}_gt.png', '{:03}-Mask.bmp', '{:03}.mask.png', '{:03} label.png', '{:03}_ground_truth.png'])
def test_masks_beside_images(tmp_path, name):
    home = draw(tmp_path, mask=None)
    for i in range(3): put(white(spot(i)), home/'test/scratch'/name.format(i))
    found, said = load(tmp_path)
    assert [o.path.name for o in found.test if o.label] == ['000.png', '001.png', '002.png']
    only(said, 'masks lie among the test images (3, ', name.format(0), 'used as masks and not judged')
    assert torch.equal(masks_of(found)[0][2:], torch.from_numpy(np.stack([spot(i) for i in range(3)])))

def test_masks_beside_good_images(tmp_path):
    "Nobody learns them, nor judges them."
    home = draw(tmp_path)
    for folder in ('train/good', 'test/good'): put(white(spot(0) & False), home/folder/'001_mask.png')
    found, said = load(tmp_path)
    assert len(found.train) == 6 and sum(not o.label for o in found.test) == 2
    only(said, 'not read', 'train/good, such as 001_mask.png (called like a mask)'.replace('/', __import__('os').sep))

def test_masks_that_are_none():
    "A name alone does not do."
    names = ['face_mask.png', 'mask.png', '7_mask_9.png', 'weight.png', 'wei.png', '1.png', '1_masked.png']
    images, beside = part_masks([categories.Path(o) for o in names])
    assert [p.name for p in images] == names and not beside

def test_masks_in_two_places(tmp_path):
    "Those in their own folder count."
    home = draw(tmp_path)
    put(white(~spot(0)), home/'test/scratch/000_mask.png')
    found, said = load(tmp_path)
    assert all('ground_truth' in str(o.mask) for o in found.test if o.label)
    only(said, '000_mask.png (called like a mask)')

def test_masks_beside_by_patterns(tmp_path):
    for i in range(5): put(photo(i), tmp_path/f'good/{i}.png')
    put(photo(9), tmp_path/'bad/9.png')
    put(white(spot(0)), tmp_path/'bad/9_mask.png')
    found, said = load(tmp_path, 'folder', '.')
    assert [o.path.name for o in found.test if o.label] == ['9.png'] and found.test[-1].mask.name == '9_mask.png'
    only(said, 'masks lie among the test images (1, ')
    assert load(tmp_path, 'folder', '.', masks='bad/{stem}_*.png')[0] == found


# Masks of more than two values

CLASSES = lambda at: at*(1+np.arange(S, dtype=np.uint8)[:, None] % 2)
def blurred(at):
    from scipy.ndimage import gaussian_filter
    return gaussian_filter(white(at).astype(float), 1.5).astype(np.uint8)

@pytest.mark.parametrize('mask, how', [(CLASSES, {}), (blurred, {}), (white, dict(name='{:03}_mask.jpg', quality=60))])
def test_masks_that_lose_part_of_the_defect(tmp_path, mask, how):
    home = draw(tmp_path, mask, **how)
    found, said = load(tmp_path)
    masks, told = masks_of(found)
    assert not said
    only(told, 'of 3 masks hold more than two values', str(next((home/'ground_truth/scratch').glob('000*'))), 'pixels above zero are defect', "mask_threshold='max'")
    assert not masks_of(load(tmp_path, mask_threshold='any')[0])[1]
    for threshold in ('max', 'any'):
        more, _ = masks_of(load(tmp_path, mask_threshold=threshold)[0])
        assert (more | ~masks).all() and more.sum() > 1.05*masks.sum()
    if how: assert (masks_of(load(tmp_path, mask_threshold='half')[0])[0][2:] == torch.from_numpy(np.stack([spot(i) for i in range(3)]))).all()

def test_thresholds_by_hand(tmp_path):
    "0, 1, 64, 127, 128 and 200 of 8 bits; the same shares of 16 and of floats."
    values = np.array([[0, 1, 100, 127, 128, 200]], np.float64)
    want = dict(full=[5], any=[1, 2, 3, 4, 5], half=[4, 5], max=[2, 3, 4, 5])
    kinds = {'a.png': np.uint8, 'b.tif': np.float32, 'c.png': np.uint16}
    put(np.zeros((1, 6, 3), np.uint8), tmp_path/'image.png')
    for name, kind in kinds.items():
        scale = {np.uint8: 1, np.float32: 1/255, np.uint16: 257}[kind]
        put((values*scale).astype(kind), tmp_path/name)
        for threshold, at in want.items():
            seen = data.white_mask(tmp_path/name, tmp_path/'image.png', mask_threshold=threshold)
            assert np.flatnonzero(seen[0] == 255).tolist() == at, (name, threshold)
    assert set(want) == set(MASK_THRESHOLDS)

def test_the_default_is_as_it_was(tmp_path):
    "Without a word about it; and with it, a set whose makers number the defects does as it is told."
    draw(tmp_path, blurred)
    found = load(tmp_path)[0]
    full = load(tmp_path, mask_threshold='full')[0]
    assert torch.equal(masks_of(found)[0], masks_of(full)[0])
    root, category = make_layout(tmp_path/'visa', 'visa')
    usual, highest = (load(root, 'visa', category, mask_threshold=o)[0] for o in (None, 'full'))
    assert masks_of(usual, Preprocess(40, 32))[0].sum() > 1.5*masks_of(highest, Preprocess(40, 32))[0].sum()
    assert digest_category(usual) != digest_category(highest)

@pytest.mark.parametrize('mask, words', [(lambda at: white(at & False), 'of defective images mark nothing'), (lambda at: white(~at), 'mark more than half of their image')])
def test_masks_that_are_black_or_inverted(tmp_path, mask, words):
    draw(tmp_path, mask)
    only(masks_of(load(tmp_path)[0])[1], f'3 of 3 masks {words}', '000_mask.png the first', f'of {S*S} in all')

def test_of_masks_it_is_said_once_a_category(tmp_path, monkeypatch):
    "Also where they are read a few at a time; and none is decoded for it."
    from patchcore_nb import judging
    draw(tmp_path, CLASSES)
    found = load(tmp_path)[0]
    opened = []
    monkeypatch.setattr(data, 'read_image', lambda path, *how: opened.append(path) or read_image(path, *how))
    model = PatchCore('filterbank', ratio=.1, resize=64, imagesize=64, target_dim=32, device='cpu').fit(found)
    prediction = model.predict(found.test)
    for count in (judging.sort_pixels, judging.count_pixels):
        monkeypatch.setattr(judging, 'CHUNK', 2)
        opened.clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            count(prediction, found.test)
        only([str(o.message) for o in said], '3 of 3 masks hold more than two values')
        assert len(opened) == 3


# Images that are not read

def test_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(categories.importlib.util, 'find_spec', lambda name: None)
    home = draw(tmp_path)
    for name in ('x.heic', 'y.npy', 'z.dng'): (home/'test/scratch'/name).write_bytes(b'\0'*64)
    for i in range(4): put(photo(60+i), home/f'train/good/more/{i}.png')
    put(photo(70), home/'test/.later/0.png')
    put(photo(71), home/'test/1.png')
    put(photo(72), home/'spare/1.png')
    found, said = load(tmp_path)
    assert (len(found.train), len(found.test)) == (6, 5)
    only(said, '4 in train', 'no images are looked for there', 'and others', 'x.heic', 'pip install patchcore_nb[heic]')
    for p in (home/'train/good/more', home/'test/1.png', home/'test/scratch/x.heic'): shutil.rmtree(p) if p.is_dir() else p.unlink()
    only(load(tmp_path)[1], 'y.npy (.npy is no image format', 'z.dng', '(hidden)', 'in spare')

@pytest.mark.parametrize('name', ['mtd', 'ksdd', 'folder', 'btad', 'mvtec_ad2', 'mvtec_loco'])
def test_what_is_left_out_of_other_layouts(tmp_path, name):
    root, category = make_layout(tmp_path/'set', name)
    found = load(root, name, category)[0]
    folder = found.train[0].path.parent
    np.save(folder/'x.npy', np.zeros((4, 4)))
    put(photo(1, (56, 44)), folder/'more/1.png')
    again, said = load(root, name, category)
    assert again == found
    only(said, 'x.npy (.npy is no image format that is read)', 'more, such as 1.png (no images are looked for there)')

def test_heic_without_pillow_heif_and_with(tmp_path, monkeypatch):
    "The package is imported once a HEIC is met, and not before."
    home, registered = draw(tmp_path), []
    fake = types.ModuleType('pillow_heif')
    fake.register_heif_opener = lambda: registered.append(1)
    monkeypatch.setitem(sys.modules, 'pillow_heif', fake)
    monkeypatch.setattr(categories.importlib.util, 'find_spec', lambda name: fake)
    load(tmp_path)
    assert not registered
    (home/'test/scratch/x.HEIC').write_bytes(b'\0')
    load(tmp_path)
    assert registered

def test_a_heic_that_is_named(tmp_path, monkeypatch):
    "By its path, or by a table: an error that says what is missing."
    monkeypatch.setattr(categories.importlib.util, 'find_spec', lambda name: None)
    path = tmp_path/'x.HEIC'
    path.write_bytes(b'\0'*64)
    (tmp_path/'t.csv').write_text('path,label\nx.HEIC,good\n', encoding='utf-8')
    for read in (lambda: as_items(path), lambda: as_items([str(path)]), lambda: load_category('csv', tmp_path/'t.csv', 'x')):
        with pytest.raises(DataError) as e: read()
        holds(str(e.value), 'x.HEIC is HEIC', 'pip install patchcore_nb[heic]')

def test_a_plain_folder(tmp_path):
    "What is in it and not read is said; an own format, a folder below, a mask."
    for name in ('0.png', '1.png', 'more/2.png'): put(photo(1), tmp_path/name)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        as_items(tmp_path/'more')
    (tmp_path/'x.npy').write_bytes(b'')
    with pytest.warns(UserWarning, match=r'x.npy \(.npy is no image format.*2.png \(no images are looked for there\)'): items = as_items(tmp_path)
    assert [p.name for p in items] == ['0.png', '1.png']

@pytest.mark.skipif(not categories.importlib.util.find_spec('pillow_heif'), reason='pillow-heif is not installed')
def test_heic_is_read(tmp_path):
    home = draw(tmp_path)
    import pillow_heif
    pillow_heif.register_heif_opener()
    put(photo(3), home/'train/good/006.heic', quality=95)
    found, said = load(tmp_path)
    assert not said and len(found.train) == 7 and read_image(found.train[-1].path).size == (S, S)


# Good images with another name, and images that are learnt and judged

@pytest.mark.parametrize('kind', ['OK', 'Good', 'normal', 'no-defect'])
def test_kinds_that_sound_good(tmp_path, kind):
    home = draw(tmp_path)
    put(photo(80), home/'test'/kind/'000.png')
    only(load(tmp_path)[1], f"1 test images '{kind}' are judged as a kind of defect", "call them 'good'")

def test_the_good_ones_of_a_layout(tmp_path):
    root, category = make_layout(tmp_path/'set', 'btad')
    put(photo(1, (56, 44)), root/category/'test/good/000.png')
    only(load(root, 'btad', category)[1], "test images 'good'", "call them 'ok'")

@pytest.mark.parametrize('name', ['mvtec', 'visa', 'csv', 'ksdd', 'mvtec_loco'])
def test_test_images_that_are_training_images(tmp_path, name):
    root, category = make_layout(tmp_path/'set', name)
    found = load(root, name, category)[0]
    twin, learnt = found.test[0].path, found.train[0].path
    shutil.copy(learnt, twin)
    only(load(root, name, category)[1], f'1 of {len(found.test)} test images are training images too', f'{twin} is {learnt}')

def test_few_files_are_read_in_search_of_twins(tmp_path, monkeypatch):
    "Not even where all are of one size."
    for i in range(20): put(photo(i), tmp_path/f'part/train/good/{i}.bmp')
    for i in range(20): put(photo(99+i), tmp_path/f'part/test/good/{i}.bmp')
    read = []
    monkeypatch.setattr(categories, 'digest_image', lambda p: read.append(p) or str(p))
    assert not load(tmp_path)[1] and not read
    shutil.copy(tmp_path/'part/train/good/3.bmp', tmp_path/'part/test/good/7.bmp')
    load(tmp_path)
    assert len(read) == 2


# The command line

def call(capsys, *args):
    with pytest.raises(SystemExit) as e: main([str(o) for o in args])
    return e.value.code, capsys.readouterr().err

def test_several_seeds_say_it_once(tmp_path, capsys):
    home = draw(tmp_path/'set', CLASSES)
    np.save(home/'test/scratch/x.npy', np.zeros((4, 4)))
    status, error = call(capsys, '--gpu', '-1', '--seed', 0, '--seed', 1, '--no_report', tmp_path/'out', 'patch_core', '-b', 'filterbank', '-le', 'layer2', '--faiss_num_workers', 1, 'sampler', '-p', .1, 'approx_greedy_coreset',
                         'dataset', '--num_workers', 0, '--resize', 64, '--imagesize', 64, '-d', 'part', 'mvtec', tmp_path/'set')
    assert status == 0 and error.count('x.npy') == 1 and error.count('more than two values') == 1, error

def test_the_terminal_says_each_in_a_line(tmp_path, capsys):
    home = draw(tmp_path/'set', CLASSES)
    shutil.copy(home/'train/good/000.png', home/'test/good/000.png')
    (home/'test/scratch/x.npy').write_bytes(b'')
    put(white(spot(0)), home/'ground_truth/scratch/9_gt.png')
    def run(*flags): return call(capsys, '--gpu', '-1', '--log_group', 'x', tmp_path/'out', 'patch_core', '-b', 'filterbank', '-le', 'layer2', '--faiss_num_workers', 1, 'sampler', '-p', .1, 'approx_greedy_coreset',
                                 'dataset', '--num_workers', 0, '--resize', 64, '--imagesize', 64, *flags, '-d', 'part', 'mvtec', tmp_path/'set')
    status, error = run()
    lines = [o for o in error.splitlines() if o.startswith('warning: ')]
    assert status == 0 and len(lines) == 4, error
    for words in ('9_gt.png fits no image', 'x.npy', 'training images too', '--mask_threshold max'): assert sum(words in o for o in lines) == 1, (words, lines)
    assert run()[1].count('9_gt.png') == 1 # which is another run
    status, error = run('--mask_threshold', 'any')
    assert status == 0 and 'more than two values' not in error
    assert run('--mask_threshold', 'hlaf')[0] == 2
