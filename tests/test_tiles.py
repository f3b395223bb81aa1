"Large images, tile by tile: the numbers of the whole picture, its files, its flags, and what it takes in memory."
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from patchcore_nb.base import ArgumentError, DataError
from patchcore_nb.bounded import write_json
from patchcore_nb.build import create_backbone
from patchcore_nb.cli import main
from patchcore_nb.demo import demo_sample
from patchcore_nb.embedder import Embedder
from patchcore_nb.embedding import Compute, Embedding, differences, settle
from patchcore_nb.extractor import Extractor
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.png import png_bytes
from patchcore_nb.reach import grain_of, reach, reaches
from patchcore_nb.reference_files import not_in_reference
from patchcore_nb.store import load, save
from patchcore_nb.tiles import Tiled, joined_shapes, seen_at_once

LAYERS = 'layer2', 'layer3'
OWN = dict(resize=None, imagesize=None)


def picture(seed, h=500, w=460):
    "Four cogs on one picture."
    cogs = [demo_sample('cog', 'train', 4*seed+i)[0] for i in range(4)]
    return np.vstack([np.hstack(cogs[:2]), np.hstack(cogs[2:])])[:h, :w]

IMAGES = [picture(i) for i in range(4)]

def batch(h, w, seed=0): return torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(seed))

@pytest.fixture(scope='module')
def networks(): return {o: create_backbone(o, 'random') for o in ('filterbank', 'resnet18')}

def model(backbone='filterbank', tile=112, **kw):
    usual = dict(layers=['layer2'], weights='random', batchnorm='trained', sampler='random', ratio=.01, target_dim=32, device='cpu', num_workers=0, batch_size=2)
    return PatchCore(backbone, **usual | dict(tile=tile) | OWN | kw)

@pytest.fixture(scope='module')
def fitted(): return model().fit(IMAGES[:3])


# The same numbers

@pytest.mark.parametrize('size, tile', [((480, 480), 224), ((501, 467), 224), ((333, 700), (224, 240)), ((230, 470), 224), ((64, 100), 224), ((471, 300), (240, 300))], ids=str)
@pytest.mark.parametrize('name', ['filterbank', 'resnet18'])
def test_cells_are_those_of_the_whole_picture(networks, name, size, tile):
    "At its edges, too, and where its sides are no multiple of a cell."
    whole = Extractor(networks[name], LAYERS)
    tiled, images = Tiled(whole, tile), batch(*size)
    want, found = whole(images), tiled(images)
    for o in LAYERS:
        assert want[o].shape == found[o].shape
        assert (want[o]-found[o]).abs().max() < 1e-4
        assert joined_shapes(tiled, size)[o] == tuple(want[o].shape[1:])

def test_the_reach_of_known_networks(networks):
    "A cell of a ResNet-18's layer3 depends on 211 pixels: 105 to each side, in whole cells of 16 pixels 112."
    assert reaches(Extractor(networks['resnet18'], LAYERS)) == dict(layer2=56, layer3=112)
    assert grain_of(Extractor(networks['filterbank'], LAYERS)) == (16, 112)

def test_a_halo_that_is_too_small_is_told(networks):
    "What is left is little, and lies at the seams."
    whole = Extractor(networks['resnet18'], ['layer3'])
    images = torch.from_numpy(IMAGES[0].copy()).permute(2, 0, 1)[None]/64-2
    want = whole(images)['layer3']
    off = {o: (Tiled(whole, o, 0)(images)['layer3']-want).abs()/want.std() for o in (96, 160)}
    assert .001 < off[96].mean() < .1 and off[160].mean() < off[96].mean()/5
    assert (off[160].amax((0, 1)) < 1e-4).float().mean() > .3

@pytest.mark.parametrize('net', [nn.Sequential(nn.Conv2d(3, 4, 5, 2), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 3)), nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1))], ids=['valid', 'lopsided'])
def test_other_paddings(net):
    whole, images = Extractor(net, [str(len(net)-1)]), batch(203, 150)
    want, found = (o(images)[whole.layers[0]] for o in (whole, Tiled(whole, 48)))
    assert want.shape == found.shape and (want-found).abs().max() < 1e-5

def test_networks_that_look_everywhere():
    "Squeeze and excitation has no end of its reach."
    timm = pytest.importorskip('timm')
    net = timm.create_model('efficientnet_b0', pretrained=False)
    assert reach(Extractor(net, ['blocks.2'])) == float('inf')
    tiled = Tiled(Extractor(net, ['blocks.2']), 96)
    assert tiled.halo == (48, 48) and tiled(batch(250, 203))['blocks.2'].shape == net.blocks[:3](net.bn1(net.conv_stem(batch(250, 203)))).shape

def test_a_transformer_takes_each_tile_as_a_picture():
    timm = pytest.importorskip('timm')
    net = timm.create_model('vit_tiny_patch16_224', pretrained=False, dynamic_img_size=True).eval()
    whole = Extractor(net, ['blocks.1'])
    tiled, images = Tiled(whole, 64, 0), batch(128, 250)
    found = tiled(images)['blocks.1']
    assert found.shape == (2, 192, 8, 16) == (2, *joined_shapes(tiled, (128, 250))['blocks.1'])
    assert torch.allclose(found[..., 4:, 4:8], whole(images[..., 64:, 64:128])['blocks.1'], atol=1e-4)
    with pytest.raises(ArgumentError, match='multiple of 16 pixels'): Tiled(whole, 100)

def test_maps_and_scores_are_those_of_the_whole_picture():
    "Of a network that needs no calibration: memory, coreset, scores, maps."
    kw = dict(backbone='resnet18', layers=list(LAYERS), sampler='approx_greedy_coreset', ratio=.01)
    one, other = (model(tile=o, **kw).fit(IMAGES[:2]) for o in (None, 224))
    assert torch.allclose(one.memory_bank_, other.memory_bank_, atol=1e-4) and torch.equal(one.idxs_, other.idxs_)
    want, found = one.predict(IMAGES[2:]), other.predict(IMAGES[2:])
    assert found.anomaly_maps.shape == (2, 500, 460) and torch.allclose(want.anomaly_maps, found.anomaly_maps, atol=1e-3)
    assert torch.allclose(want.image_scores, found.image_scores, atol=1e-3)
    assert found.original_map(0).shape == (500, 460)


# Its own resolution

def test_the_first_image_tells_the_size(fitted):
    assert fitted.preprocess_.size == (500, 460) and fitted.grid_ == (62, 57)
    other = fitted.predict([picture(3, 400, 300)])
    assert other.anomaly_maps.shape == (1, 500, 460) and other.original_map(0).shape == (400, 300)
    small = model(tile=None, **OWN).fit([o[:96, :128] for o in IMAGES])
    assert small.grid_ == (12, 16) and small.predict([IMAGES[0][:96, :128]]).anomaly_maps.shape == (1, 96, 128)

def test_what_cannot_be_is_refused():
    for kw, words in [(dict(tile=448), 'imagesize=None to cut nothing and resize=None'), (dict(tile=0), 'tile must be at least 1'), (dict(tile='big'), 'tile must be pixels'), (dict(tile=(300, 200), imagesize=256), 'larger than imagesize'),
                      (dict(tile=64, tile_overlap=.6), 'tile_overlap must be in'), (dict(tile=64, tile_overlap=float('nan')), 'tile_overlap')]:
        with pytest.raises(ArgumentError, match=words): PatchCore('filterbank', **kw).check()
    assert PatchCore('filterbank', tile=112, device='cpu').check().grid_ == (28, 28) # as large as the crop, or smaller

def test_what_makes_two_embeddings_differ():
    one = Embedding('filterbank', tile=96, **OWN)
    assert differences(one, Embedding('filterbank', tile=96, tile_overlap=.5, **OWN)) == ['tile_overlap']
    assert differences(Embedding('filterbank'), Embedding('filterbank', tile_overlap=.5)) == []
    assert 'tile' in differences(one, Embedding('filterbank', tile=(96, 64), **OWN))

def test_batch_norms_are_moved_at_the_size_of_a_tile():
    assert Embedding('resnet18', tile=(96, 128), **OWN).ones == (96, 128)

def test_the_remarks_say_how_it_is_cut(fitted):
    said = ' '.join(fitted.embedder_.tiles_said)
    assert 'tiles of 112 x 112' in said and 'looks further than the halo' not in said
    assert 'looks further than the halo' in ' '.join(model('resnet18', layers=['layer3'], tile=64).check(IMAGES).embedder_.tiles_said)


# Saved, cached, shared

def test_saved_and_loaded(fitted, tmp_path):
    save(fitted, tmp_path/'m')
    again, want = load(tmp_path/'m', device='cpu'), fitted.predict(IMAGES[3:])
    assert again.tile == 112 and again.preprocess_.size == (500, 460)
    assert torch.equal(again.predict(IMAGES[3:]).image_scores, want.image_scores)
    params = json.loads((tmp_path/'m'/'model.json').read_text(encoding='utf-8'))['params']
    assert (params['tile'], params['tile_overlap'], params['resize'], params['imagesize']) == (112, .25, None, None)
    assert load(tmp_path/'m', device='cpu', shape=(300, 200)).preprocess_.size == (500, 460) # it was not asked for another size
    scaled = load(tmp_path/'m', device='cpu', resize=(250, 230))
    assert scaled.preprocess_.size == (250, 230) and scaled.predict(IMAGES[3:]).anomaly_maps.shape == (1, 250, 230)

def test_a_file_with_odd_tiles_is_refused(fitted, tmp_path):
    save(fitted, tmp_path/'m', 'ours')
    path = tmp_path/'m'/'model.json'
    text = path.read_text(encoding='utf-8')
    for odd in (dict(tile='96'), dict(tile=-5), dict(tile=[1, 2, 3]), dict(tile_overlap=.9), dict(tile_overlap='x'), dict(tile=10**9)):
        values = json.loads(text)
        values['params'] |= odd
        write_json(path, values) # as somebody who works out its digest can
        with pytest.raises(DataError, match=next(iter(odd))): load(tmp_path/'m')

def test_the_reference_knows_no_tiles():
    kw = dict(resize=512, imagesize=448)
    assert not_in_reference(PatchCore('resnet18', **kw)) == []
    assert not_in_reference(PatchCore('resnet18', tile=224, **kw)) == ['tile 224']
    assert not_in_reference(PatchCore('resnet18', tile=224, **OWN)) == ['tile 224', 'imagesize None', 'resize None']

def test_the_cache_tells_tiles_apart(tmp_path):
    images = [o[:200, :200] for o in IMAGES[:2]]
    def made(tile):
        what = settle(Embedding('filterbank', ('layer2',), target_dim=32, tile=tile, **OWN), (200, 200))
        return list(Embedder(what, Compute(device='cpu', num_workers=0, cache=tmp_path))(images))[0]
    first, n = made(64), len(list(tmp_path.rglob('*.safetensors'))) or len(list(tmp_path.rglob('*')))
    assert torch.equal(made(64), first)
    assert (len(list(tmp_path.rglob('*.safetensors'))) or len(list(tmp_path.rglob('*')))) == n
    made(None)
    assert (len(list(tmp_path.rglob('*.safetensors'))) or len(list(tmp_path.rglob('*')))) > n

def test_many_threads_at_once(fitted):
    want = [fitted.predict([o]).image_scores for o in IMAGES]
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda o: fitted.predict([o]).image_scores, IMAGES))
    assert all(map(torch.equal, want, found))


# The command line

def write_set(root, n_train=3):
    "Good cogs and one with a black dot, four to a picture."
    names = [f'train/good/{i}.png' for i in range(n_train)]+['test/good/0.png', 'test/bad/0.png', 'ground_truth/bad/0_mask.png']
    for i, name in enumerate(names):
        path = root/'large'/name
        path.parent.mkdir(parents=True, exist_ok=True)
        image, mask = picture(i % 4, 300, 260).copy(), np.zeros((300, 260), np.uint8)
        if 'bad' in name: image[150:156, 100:106] = 0
        mask[150:156, 100:106] = 255
        path.write_bytes(png_bytes(mask if 'mask' in name else image))
    return root

def run(tmp_path, capsys, *flags, preset=()):
    core = ('patch_core', '-b', 'filterbank', '-le', 'layer2', '--target_embed_dimension', '32', 'sampler', '-p', '0.02', 'random')
    with pytest.raises(SystemExit) as e: main(['--gpu', '-1', '--no_report', '--save_patchcore_model', *preset, str(tmp_path/'out'), *core, 'dataset', '-d', 'large', *flags, 'mvtec', str(tmp_path)])
    return e.value.code, capsys.readouterr().err

@pytest.mark.parametrize('flags, want', [(['--tile', '96'], (300, 260)), (['--tile', '96x64', '--tile_overlap', '.5', '--resize', '200'], (230, 200)), (['--tile', '96', '--imagesize', '128'], (128, 128))], ids=lambda o: '_'.join(map(str, o)))
def test_the_flags(tmp_path, capsys, flags, want):
    write_set(tmp_path)
    code, said = run(tmp_path, capsys, *flags, preset=('--preset', 'anomalib'))
    assert code == 0, said
    saved = next((tmp_path/'out').rglob('model.json'))
    values = json.loads(saved.read_text(encoding='utf-8'))
    assert tuple(values['learned']['size']) == want
    assert values['params']['tile'] == (96 if flags[1] == '96' else [96, 64])
    table = pd.read_csv(next((tmp_path/'out').rglob('results.csv')))
    assert len(table) == 2 and table.iloc[0].filter(like='auroc').notna().all()

@pytest.mark.parametrize('flags, words', [(['--tile_overlap', '.3'], '--tile_overlap is for --tile'), (['--tile', '96', '--tile_overlap', '.7'], '--tile_overlap'), (['--tile', 'x'], 'HEIGHTxWIDTH'), (['--tile', '448', '--imagesize', '224'], 'pass --no_crop to cut nothing and no --resize')], ids=str)
def test_usage_errors(tmp_path, capsys, flags, words):
    write_set(tmp_path)
    code, said = run(tmp_path, capsys, *flags)
    assert code == 2 and words in said, said
    assert not (tmp_path/'out').exists()


# Memory

CHILD = '''
import sys
import psutil, torch
from patchcore_nb.budget import stage
from patchcore_nb.build import create_backbone
from patchcore_nb.extractor import Extractor
from patchcore_nb.tiles import Tiled
torch.set_num_threads(1)
whole = Extractor(create_backbone('resnet18', 'random'), ['layer2', 'layer3'])
one = Tiled(whole, int(sys.argv[1])) if len(sys.argv) > 1 else whole
picture, log = torch.zeros(1, 3, 1536, 1536), []
before = psutil.Process().memory_info().rss
with stage(log, 'maps'): maps = one(picture)
print(log[0].peak_mb-before/1e6)
'''

def test_the_tile_sets_the_peak():
    "Of what the network takes on top of the picture; the joined maps are 28 MB of it."
    def taken(*tile): return float(subprocess.run([sys.executable, '-c', CHILD, *tile], capture_output=True, text=True, check=True).stdout)
    whole, tiled = taken(), taken('448')
    assert tiled < whole/2, (whole, tiled)

def test_the_plan_knows_the_tile():
    def planned(tile): return Embedder(settle(Embedding('resnet18', LAYERS, 'random', target_dim=32, tile=tile, **OWN), (1024, 1024)), Compute(device='cpu', batch_size=1)).batch_bytes()
    whole = Extractor(create_backbone('resnet18', 'random'), LAYERS)
    assert seen_at_once(Tiled(whole, 224), (1024, 1024)) == (448, 448)
    assert planned(224) < planned(None)/2


# What it is good for

@pytest.mark.slow
@pytest.mark.parametrize('backbone', ['filterbank', 'resnet18'])
def test_tiles_find_what_scaling_loses(tmp_path, testdata, backbone):
    "Image AUROC of the plates, in their own resolution and scaled to 256."
    from patchcore_nb.categories import load_category
    category = load_category('demo', tmp_path, 'plate')
    labels = ['/good/' not in o.path.as_posix() for o in category.test]
    usual = dict(layers=LAYERS, target_dim=256, weights_dir=testdata/'weights', device='cpu', batch_size=1, false_alarms=None)
    def auroc(**kw): return PatchCore(backbone, **usual | OWN | kw).fit([o.path for o in category.train]).score([o.path for o in category.test], labels)
    scaled, tiled = auroc(resize=256, ratio=.1), auroc(tile=448, ratio=.005)
    assert tiled > scaled+.15 and tiled > .9, (scaled, tiled)
