"Folders as people really have them: what is read, what is passed over, what is refused and in which words."
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from patchcore_nb.core import ArgumentError, DataError, to_pil
from patchcore_nb.data import Preprocess, batches, hold_out, load_category, make_miniature, read_mask, read_masks
from patchcore_nb.evaluation import evaluate
from patchcore_nb.patchcore import PatchCore

PRE = Preprocess(40, 32)


@pytest.fixture
def root(tmp_path): return make_miniature(tmp_path/'set')

def tile(root): return load_category('mvtec', root, 'tile')

def save(a, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path, **options)
    return path

def drop(path): shutil.rmtree(path) if path.is_dir() else path.unlink()

def grey(*size): return np.random.default_rng(0).integers(90, 130, (*size, 3), np.uint8)


def renamed(root): (root/'tile').rename(root/'floor')
def nothing(root): drop(root/'tile')
def a_file(root): drop(root/'tile'); (root/'tile').write_text('', encoding='utf-8')
def no_good(root): drop(root/'tile/train/good')
def no_train(root): drop(root/'tile/train')
def no_images(root): [drop(p) for p in (root/'tile/train/good').iterdir()]
def notes_only(root): no_images(root); [(root/'tile/train/good'/o).write_text('x', encoding='utf-8') for o in ('Thumbs.db', 'notes.txt', '.000.png')]
def folders_only(root): no_images(root); (root/'tile/train/good/000.png').mkdir()

@pytest.mark.parametrize('spoil, says', [
    (drop, "set is not there: pass the folder that holds tile/train/good"), (renamed, "no category 'tile': it holds floor"),
    (nothing, 'it holds no folders'), (a_file, "no category 'tile'"), (no_good, 'good is not there'), (no_train, 'good is not there'),
    (no_images, 'good holds no images: put'), (notes_only, 'good holds no images: put'), (folders_only, 'good holds no images: put')])
def test_bad_set(root, spoil, says):
    spoil(root)
    with pytest.raises(DataError) as e: tile(root)
    first, *tree = str(e.value).splitlines()
    assert says in first and 'DATA_PATH/bottle/train/good/000.png' in tree[0]

def test_root_that_is_a_file(tmp_path):
    (tmp_path/'set').write_text('', encoding='utf-8')
    with pytest.raises(DataError, match='set is not there'): tile(tmp_path/'set')

def test_unknown_names(root):
    with pytest.raises(ArgumentError, match="did you mean 'mvtec'"): load_category('mvtech', root, 'tile')
    with pytest.raises(DataError, match="did you mean 'tile'"): load_category('mvtec', root, 'Tile_')

def test_what_is_passed_over(root):
    before, home = tile(root), root/'tile'
    for folder in (home/'train/good', home/'test/spot', home/'ground_truth/spot'):
        for name in ('Thumbs.db', '.DS_Store', '._000.png', 'notes.txt'): (folder/name).write_bytes(b'x')
        (folder/'more.png').mkdir()
    (home/'test/.cache').mkdir()
    (home/'test/readme.png').write_bytes(b'')
    assert tile(root) == before

def test_images_of_any_kind_and_name(root):
    good = root/'tile/train/good'
    for name in ('ÜBER ALL.JPG', 'a.b.TIFF', '瓶.webp'): save(grey(48, 40), good/name)
    assert {p.path.name for p in tile(root).train} == {'000.png', '001.png', '002.png', '003.png', 'ÜBER ALL.JPG', 'a.b.TIFF', '瓶.webp'}
    assert [o.path for o in tile(root).train] == sorted(o.path for o in tile(root).train)

@pytest.mark.parametrize('gone, kinds', [('test', []), ('test/spot', ['good', 'good']), ('test/good', ['spot', 'spot'])])
def test_without_test_images(root, gone, kinds):
    drop(root/'tile'/gone)
    found = tile(root)
    assert [o.kind for o in found.test] == kinds and len(found.train) == 4


def of_mask(root, name='001_mask.png'):
    "The mask of the second defective image, as it is found by name."
    sample = tile(root).test[3]
    assert sample.mask and sample.mask.name == name
    return read_mask(sample.mask, sample.path, PRE)

def again(root, a, name='001_mask.png', **options):
    "The mask, stored otherwise."
    folder = root/'tile/ground_truth/spot'
    drop(folder/'001_mask.png')
    save(a, folder/name, **options)
    return of_mask(root, name)

def stored(root): return np.asarray(Image.open(root/'tile/ground_truth/spot/001_mask.png')) > 0

@pytest.mark.parametrize('name', ['001_mask.png', '001.png', '001_mask.bmp', '001.TIF', '001_mask.gif', '001_mask.webp'])
@pytest.mark.parametrize('high', [255, 1, 128])
def test_mask_of_any_name_format_and_height(root, name, high):
    want, options = of_mask(root), dict(lossless=True) if name.endswith('webp') else {}
    assert want.any() and not want.all()
    assert torch.equal(again(root, stored(root).astype(np.uint8)*np.uint8(high), name, **options), want)

@pytest.mark.parametrize('kind', [bool, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize('high', [1, 255, 65535])
def test_mask_of_any_depth(root, kind, high):
    if kind is bool and high > 1: pytest.skip('one bit holds no more')
    want = of_mask(root)
    assert torch.equal(again(root, stored(root).astype(kind)*kind(high), '001_mask.tif'), want)

def test_mask_in_colour(root):
    "Any colour on black; a defect drawn on a transparent layer."
    want, at = of_mask(root), stored(root)
    assert torch.equal(again(root, at[..., None]*np.uint8([200, 0, 0])), want)
    assert torch.equal(again(root, at[..., None]*np.uint8([255, 255, 255, 255])), want)
    assert torch.equal(again(root, np.dstack([at*np.uint8(255)]*3+[np.full(at.shape, 255, np.uint8)])), want)

def test_mask_of_a_turned_photograph(root):
    "The image is upright by its EXIF orientation, the mask was drawn on what a person sees."
    want, e, image = of_mask(root), Image.Exif(), root/'tile/test/spot/001.png'
    e[0x0112] = 6
    with Image.open(image) as im: turned = np.rot90(np.asarray(im))
    for name in ('001.png', '001.tif', '001.webp'):
        drop(image)
        image = save(np.ascontiguousarray(turned), root/'tile/test/spot'/name, exif=e)
        assert torch.equal(of_mask(root), want)

def test_mask_of_a_png_that_tells_late(root):
    "Some write the orientation after the pixels."
    want, image, e = of_mask(root), root/'tile/test/spot/001.png', Image.Exif()
    e[0x0112] = 3
    with Image.open(image) as im: Image.fromarray(np.asarray(im)[::-1, ::-1].copy()).save(image, exif=e)
    for orientation in (3, 6):
        raw = image.read_bytes()
        at = raw.index(b'eXIf')-4
        end = at+12+int.from_bytes(raw[at:at+4], 'big')
        image.write_bytes(raw[:at]+raw[end:-12]+raw[at:end]+raw[-12:])
        assert torch.equal(of_mask(root), want)
        e[0x0112] = 6
        with Image.open(root/'tile/test/spot/000.png') as im: Image.fromarray(np.rot90(np.asarray(im)).copy()).save(image, exif=e)

def test_masks_lie_where_the_defects_are(root):
    maps = torch.stack([PRE(to_pil(o.path)).mean(0) for o in tile(root).test])
    masks = read_masks(tile(root).test, PRE)
    assert evaluate([0, 0, 1, 1], [False, False, True, True], maps, masks)['pixel_auroc'] > .99

def test_mask_of_another_size(root):
    save(np.zeros((40, 48), np.uint8), root/'tile/ground_truth/spot/000_mask.png')
    with pytest.raises(DataError) as e: read_masks(tile(root).test, PRE)
    for part in ('000_mask.png', '48 x 40', '000.png', '40 x 48', 'give the mask the size'): assert part in str(e.value)
    assert len(str(e.value).splitlines()) == 1

@pytest.mark.parametrize('content', [b'', b'text', b'\x89PNG\r\n\x1a\n'])
def test_unreadable_mask(root, content):
    (root/'tile/ground_truth/spot/001_mask.png').write_bytes(content)
    with pytest.raises(DataError, match='001_mask.png'): read_masks(tile(root).test, PRE)

def test_masks_missing_in_part(root):
    "Left out, and said; the image metrics stay."
    drop(root/'tile/ground_truth/spot/000_mask.png')
    samples = tile(root).test
    assert [bool(o.mask) for o in samples] == [False, False, False, True]
    with pytest.warns(UserWarning, match='1 defective images have no mask.*000.png.*left out'): assert read_masks(samples, PRE) is None

@pytest.mark.parametrize('how', ['none', 'no folder', 'no defects', 'no samples'])
@pytest.mark.filterwarnings('error')
def test_masks_that_nobody_drew(root, how):
    "No word about masks where there are none at all."
    if how == 'none': [drop(p) for p in (root/'tile/ground_truth/spot').iterdir()]
    if how == 'no folder': drop(root/'tile/ground_truth')
    samples = {'no defects': tile(root).test[:2], 'no samples': []}.get(how, tile(root).test)
    masks = read_masks(samples, PRE)
    if how == 'no defects': assert masks.shape == (2, 32, 32) and not masks.any()
    else: assert masks is None


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (5, 3), (31, 500), (700, 30), (33, 32)])
def test_images_smaller_or_longer_than_the_crop(size):
    x = PRE(Image.fromarray(grey(*size)))
    assert x.shape == (3, 32, 32) and x.isfinite().all()
    if size == (1, 1): assert torch.equal(x, x[:, :1, :1].expand_as(x))

def test_an_image_like_a_thread(monkeypatch):
    "One pixel wide and 50,000 long: scaling its shorter side to 256 would ask for 10 GB."
    resize = Image.Image.resize
    def modest(self, size, *args, **kw):
        assert size[0]*size[1] < 2e8, f'{size} asked for'
        return resize(self, size, *args, **kw)
    monkeypatch.setattr(Image.Image, 'resize', modest)
    try: assert Preprocess(256, 224)(Image.new('RGB', (50_000, 1))).shape == (3, 224, 224)
    except DataError as e: assert '50000 x 1' in str(e)

def test_a_set_of_odd_sizes_is_learnt_and_judged(tmp_path):
    for i, size in enumerate([(1, 1), (300, 20), (20, 300), (64, 64)]): save(grey(*size), tmp_path/'x/train/good'/f'{i}.png')
    found = load_category('mvtec', tmp_path, 'x')
    model = PatchCore('filterbank', ratio=.5, resize=72, imagesize=64, target_dim=64).fit(found)
    assert model.predict(found).anomaly_maps.shape == (4, 64, 64)

@pytest.mark.parametrize('resize, imagesize', [(224, 256), (10, 0), (0, 0), (-1, -1), (224, (100, 300, 5)), (224, (225, 300)), ((100, 200), (120, 100))])
def test_sizes_that_cannot_be(resize, imagesize):
    with pytest.raises(ArgumentError, match='imagesize|resize must be'): Preprocess(resize, imagesize)


@pytest.mark.parametrize('f', [lambda: Preprocess(224, 256), lambda: Preprocess((100, 200), (120, 100)), lambda: Preprocess(64, (64, 96))(Image.fromarray(grey(64, 90))), lambda: hold_out(1, .5)])
def test_errors_name_arguments_and_no_flags(f):
    with pytest.raises((ArgumentError, DataError)) as e: f()
    assert '--' not in str(e.value) and any(o in str(e.value) for o in ('imagesize', 'train_val_split'))

def test_names_that_moved():
    "What the parts of the data were split into is still had from `data`; what is MVTec AD's alone, with a warning."
    from patchcore_nb import batching, categories, crop, data, mvtec
    for module in (batching, categories, crop):
        for name in set(module.__all__) & set(data.__all__): assert getattr(data, name) is getattr(module, name)
    for name in ('mvtec', 'read_layout', 'find_home', 'list_good', 'meant_root'):
        with pytest.warns(DeprecationWarning, match=f'called mvtec.{name} now'): assert getattr(data, name) is getattr(mvtec, name)
    with pytest.raises(AttributeError, match='no attribute'): data.nothing


def number(i): return torch.full((3, 1, 1), float(i))

@pytest.mark.parametrize('workers', [0, 1, 3])
@pytest.mark.parametrize('n, size', [(0, 4), (1, 4), (10, 4), (12, 4), (5, 1)])
def test_batches_come_in_order(n, size, workers):
    def slow(i):
        time.sleep(.002*(n-i) if workers else 0) # the later, the sooner done
        return number(i)
    got = list(batches(range(n), slow, size, workers))
    assert [len(b) for b in got] == [min(size, n-i) for i in range(0, n, size)]
    assert [int(b) for batch in got for b in batch[:, 0, 0, 0]] == list(range(n))

@pytest.mark.parametrize('workers', [0, 2])
def test_batches_hand_errors_over(workers):
    "As they were raised, in their turn, and nobody goes on reading afterwards."
    class Odd(Exception): pass
    read = []
    def load(i):
        read.append(i)
        if i == 5: raise Odd('five')
        return number(i)
    got, threads = [], threading.active_count()
    with pytest.raises(Odd, match='five'):
        for b in batches(range(1000), load, 2, workers): got.append(b)
    assert len(got) == 2 and len(read) < 20
    assert threading.active_count() == threads

def test_batches_read_ahead_but_not_everything():
    read = []
    def load(i): read.append(i); return number(i)
    it = batches(range(1000), load, 4, 2)
    next(it)
    time.sleep(.1)
    assert 4 < len(read) <= 16
    it.close()
    time.sleep(.05)
    assert len(read) <= 16

@pytest.mark.parametrize('size, workers', [(0, 2), (-1, 0), (4, -1)])
def test_batches_that_cannot_be(size, workers):
    with pytest.raises(ArgumentError): next(batches([1], number, size, workers))


@pytest.mark.parametrize('n, fraction, keep', [(10, .8, 8), (10, 1, 10), (3, .99, 2), (1, 1., 1), (7, .5, 3)])
def test_hold_out(n, fraction, keep):
    train, held = hold_out(n, fraction, 3)
    assert len(train) == keep and train == sorted(train) and held == sorted(held) and sorted(train+held) == list(range(n))
    assert hold_out(n, fraction, 3) == (train, held)

def test_hold_out_goes_by_its_seed():
    before = torch.get_rng_state()
    assert len({tuple(hold_out(50, .5, seed)[0]) for seed in range(5)}) == 5
    assert torch.equal(torch.get_rng_state(), before)

@pytest.mark.parametrize('n, fraction', [(10, 0), (10, -.1), (10, 1.1), (10, float('nan')), (1, .5), (3, .1)])
def test_hold_out_that_leaves_nothing(n, fraction):
    with pytest.raises(ArgumentError, match='train_val_split'): hold_out(n, fraction)
