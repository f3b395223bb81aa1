"The reference's names, one by one; transformers at sizes that they were not made for; nothing is downloaded."
import numpy as np
import pytest
import timm
import torch

from patchcore_nb import build, extractor, filterbank, filters # filterbank registers itself
from patchcore_nb.aggregator import Aggregator
from patchcore_nb.backbones import KNOWN, backbone_table, describe_backbone, known_layers, reference_name
from patchcore_nb.cache import code_state
from patchcore_nb.core import ArgumentError, DataError
from patchcore_nb.demo import demo_sample
from patchcore_nb.extractor import Extractor, create_backbone, find_backbone, map_shapes, pad_images, weights_names
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.reference_files import not_in_reference

REFERENCE = '''alexnet bninception resnet18 resnet50 resnet101 resnext101 resnet200 resnest50 resnetv2_50_bit resnetv2_50_21k resnetv2_101_bit
resnetv2_101_21k resnetv2_152_bit resnetv2_152_21k resnetv2_152_384 resnetv2_101 vgg11 vgg19 vgg19_bn wideresnet50 wideresnet101 mnasnet_100 mnasnet_a1
mnasnet_b1 densenet121 densenet201 inception_v4 vit_small vit_base vit_large vit_r50 vit_deit_base vit_deit_distilled vit_swin_base vit_swin_large
efficientnet_b7 efficientnet_b5 efficientnet_b3 efficientnet_b1 efficientnetv2_m efficientnetv2_l efficientnet_b3a'''.split()

# (channels, stride) of the two layers
PROMISED = {**dict.fromkeys(['resnet50', 'resnet101', 'resnext101', 'wideresnet50', 'wideresnet101', 'resnet200', 'resnest50', 'resnetv2_101'], [(512, 8), (1024, 16)]),
            **dict.fromkeys(['vgg11', 'vgg19', 'vgg19_bn'], [(512, 8), (512, 16)]), **dict.fromkeys(['mnasnet_100', 'mnasnet_b1'], [(40, 8), (96, 16)]),
            **dict.fromkeys(['resnetv2_50_bit', 'resnetv2_50_21k', 'resnetv2_101_bit', 'resnetv2_101_21k'], [(1536, 8), (3072, 16)]),
            **dict.fromkeys(['resnetv2_152_bit', 'resnetv2_152_21k'], [(2048, 8), (4096, 16)]), **dict.fromkeys(['efficientnet_b3', 'efficientnet_b3a'], [(48, 8), (136, 16)]),
            **dict.fromkeys(['vit_base', 'vit_deit_base', 'vit_deit_distilled'], [(768, 16), (768, 16)]),
            'alexnet': [(192, 8), (256, 16)], 'resnet18': [(128, 8), (256, 16)], 'resnetv2_152_384': [(1024, 8), (2048, 16)], 'mnasnet_a1': [(40, 8), (112, 16)],
            'densenet121': [(512, 8), (1024, 16)], 'densenet201': [(512, 8), (1792, 16)], 'inception_v4': [(384, 8), (1024, 16)], 'vit_small': [(384, 16), (384, 16)],
            'vit_large': [(1024, 16), (1024, 16)], 'vit_r50': [(1024, 32), (1024, 32)], 'vit_swin_base': [(256, 8), (512, 16)], 'vit_swin_large': [(384, 8), (768, 16)],
            'efficientnet_b1': [(40, 8), (112, 16)], 'efficientnet_b5': [(64, 8), (176, 16)], 'efficientnet_b7': [(80, 8), (224, 16)],
            'efficientnetv2_m': [(80, 8), (176, 16)], 'efficientnetv2_l': [(96, 8), (224, 16)]}
CELLS = {'alexnet': (27, 13), 'inception_v4': (25, 12)} # at 224 pixels, of those that trim their edges
SMALL = ['alexnet', 'resnet18', 'resnest50', 'resnetv2_101', 'mnasnet_100', 'mnasnet_a1', 'densenet121', 'inception_v4', 'vit_small', 'efficientnet_b1', 'efficientnet_b3a']
TRANSFORMERS = {'vit_small': 'blocks.7', 'vit_deit_distilled': 'blocks.7', 'vit_swin_base': 'layers.2', 'vit_r50': 'blocks.11', 'timm:vit_small_patch14_dinov2': 'blocks.7',
                'timm:vit_small_patch14_reg4_dinov2': 'blocks.7', 'timm:vit_small_patch16_dinov3': 'blocks.7'}
CELL = {'vit_swin_base': 16, 'vit_r50': 32, 'timm:vit_small_patch14_dinov2': 14, 'timm:vit_small_patch14_reg4_dinov2': 14} # pixels of a cell, where it is not 16
TINY = {'timm:vit_tiny_patch16_224': ['blocks.3', 'blocks.5'], 'timm:deit_tiny_distilled_patch16_224': ['blocks.3', 'blocks.5'], 'timm:swin_tiny_patch4_window7_224': ['layers.1', 'layers.2'],
        'timm:vit_tiny_r_s16_p8_224': ['blocks.3', 'blocks.5'], 'timm:vit_small_patch14_reg4_dinov2': ['blocks.1', 'blocks.3'], 'timm:vit_small_patch16_dinov3': ['blocks.1', 'blocks.3']} # one of each kind

standing = [o for o in REFERENCE if o != 'bninception']


pytestmark = pytest.mark.usefixtures('offline')

def noise(*size, seed=0): return torch.randn(*size, generator=torch.Generator().manual_seed(seed))

def on_meta(name, layers):
    "An extractor that has shapes and no numbers."
    with torch.device('meta'): return Extractor(create_backbone(name, 'random'), layers)


def test_the_table_has_the_names_of_the_reference():
    assert len(REFERENCE) == 42 and set(REFERENCE) == set(KNOWN) == {*PROMISED, 'bninception'}

@pytest.mark.parametrize('name', standing)
def test_timm_still_has_the_weights(name):
    "A tag that timm drops shows here."
    known = KNOWN[name]
    if known.library == 'torchvision': assert not known.tag and find_backbone(f'torchvision:{known.name}') == find_backbone(name)
    elif name == 'resnet200': assert not known.tag and not timm.list_pretrained('resnet200.*')
    else: assert f'{known.name}.{known.tag}' in timm.list_pretrained(f'{known.name}.*')

@pytest.mark.parametrize('name', standing)
def test_maps_and_embedding_are_as_promised(name):
    layers = known_layers(name)
    maps = on_meta(name, layers)(torch.zeros(2, 3, 224, 224, device='meta'))
    channels, strides = zip(*PROMISED[name])
    cells = CELLS.get(name, [224//s for s in strides])
    assert {k: tuple(o.shape) for k, o in maps.items()} == {k: (2, c, n, n) for k, c, n in zip(layers, channels, cells)}
    assert Aggregator().fit(channels, 'meta')(maps).shape == (2, cells[0], cells[0], 1024)

@pytest.mark.parametrize('name', [pytest.param(o, marks=() if o in SMALL else pytest.mark.slow) for o in standing])
def test_really_built(name):
    "With random numbers, at the smallest size that fills the layers."
    layers = known_layers(name)
    maps = Extractor(create_backbone(name, 'random'), layers)(noise(1, 3, 96, 96))
    assert list(maps) == list(layers) and [o.shape[1] for o in maps.values()] == [c for c, _ in PROMISED[name]]
    assert all(o.isfinite().all() and o.std() > 0 for o in maps.values())

def test_the_table_shows_what_was_measured():
    table = backbone_table(['resnet18', 'bninception', 'vit_small.seed-3'])
    assert list(table.index) == ['resnet18', 'bninception', 'vit_small.seed-3'] and table.loc['bninception'].notna().sum() == 1
    row = table.loc['vit_small.seed-3']
    assert (row.constructor, row.layers, row.channels, row.strides) == ('timm: vit_small_patch16_224.augreg_in21k_ft_in1k', ['blocks.5', 'blocks.7'], [384, 384], [16, 16])
    assert abs(row.parameters-22.05) < .01 and abs(row.whole-4.6) < .05 and .6 < row.cost/row.whole < .7 # eight blocks of twelve

def test_one_size_alone_is_described_too():
    row = describe_backbone('torchvision:vit_b_16', ['encoder.layers.encoder_layer_5'])
    assert (row['channels'], row['strides']) == ([768], [16])
    with pytest.raises(ArgumentError, match='cannot take images of 256 x 256'): describe_backbone('torchvision:vit_b_16', ['encoder.layers.encoder_layer_5'], size=256)


# Names

@pytest.mark.parametrize('name, there', {'densenet121': ('timm', 'densenet121.ra_in1k'), 'torchvision:densenet121': ('torchvision', 'densenet121'), 'timm:densenet121.tv_in1k': ('timm', 'densenet121.tv_in1k'),
                                         'efficientnet_b0': ('torchvision', 'efficientnet_b0'), 'timm:efficientnet_b0': ('timm', 'efficientnet_b0'), 'mnasnet_b1': ('timm', 'mnasnet_100.rmsp_in1k'),
                                         'wide_resnet50_2': ('torchvision', 'wide_resnet50_2'), 'convnext_atto': ('timm', 'convnext_atto')}.items())
def test_what_a_name_means(name, there): assert find_backbone(name) == there

@pytest.mark.parametrize('name, says', {'bninception': 'torchvision:googlenet', 'timm:vit_smal_patch16_224': "unknown backbone of timm 'vit_smal_patch16_224': did you mean 'vit_small_patch16_224'",
                                        'torchvision:vit_small': 'backbone of torchvision', 'timm:efficientnet-b3': 'efficientnet_b3', 'timm:resnet50.a99_in1k': 'resnet50.a1_in1k',
                                        'keras:resnet50': "unknown library 'keras'", 'vit_smal': "did you mean 'vit_small'", 'timm:': 'backbone of timm'}.items())
def test_names_that_mean_nothing(name, says):
    with pytest.raises(ArgumentError) as e: create_backbone(name, 'random')
    assert says in str(e.value) and len(str(e.value).splitlines()) == 1

def test_what_stands_in_for_the_lost_ones():
    for name in ('torchvision:googlenet', 'timm:resnet200d.ra2_in1k'):
        assert any(name in o.lost for o in KNOWN.values()) and find_backbone(name)
    assert 'resnet200d.ra2_in1k' in timm.list_pretrained('resnet200d.*')

@pytest.mark.parametrize('name, says', [('resnet200', 'timm:resnet200d.ra2_in1k'), ('timm:resnet200', 'timm has none')])
def test_weights_that_never_were(name, says, tmp_path):
    "An error before any download, and no random numbers instead; a file of the user's is taken."
    with pytest.raises(DataError, match='no weights for') as e: create_backbone(name, weights_dir=tmp_path)
    assert says in str(e.value) and 'put resnet200.safetensors' in str(e.value) and len(str(e.value).splitlines()) == 1

@pytest.mark.parametrize('name, back', {'wide_resnet50_2': 'wideresnet50', 'torchvision:resnet50': 'resnet50', 'timm:vit_small_patch16_224.augreg_in21k_ft_in1k': 'vit_small', 'densenet201': 'densenet201',
                                        'torchvision:densenet201': None, 'timm:vit_small_patch16_224': None, 'filterbank': None, 'convnext_tiny': None}.items())
def test_back_to_the_reference(name, back): assert reference_name(name) == back

@pytest.mark.parametrize('name, written', {'densenet201': True, 'timm:densenet201.tv_in1k': True, 'torchvision:resnet50.seed-3': True, 'torchvision:densenet201': False, 'timm:densenet201': False}.items())
def test_a_saved_name_keeps_the_meaning_of_the_reference(name, written):
    "What the reference would take for another network is not written in its format."
    assert not_in_reference(PatchCore(name)) == ([] if written else [f'the backbone {name}'])

def test_seeds_go_with_every_name():
    def first(name, seed=0): return create_backbone(name, 'random', seed=seed).patch_embed.proj.weight
    a, b = 'vit_small.seed-3', 'timm:vit_small_patch16_224.seed-3'
    assert torch.equal(first(a), first(b, seed=9)) and not torch.equal(first(a), first('vit_small'))

@pytest.mark.parametrize('asked, files', {'vit_small': ['vit_small', 'vit_small_patch16_224.augreg_in21k_ft_in1k', 'vit_small_patch16_224'], 'timm:resnet18.a1_in1k': ['resnet18.a1_in1k'],
                                          'wideresnet50': ['wideresnet50', 'wide_resnet50_2'], 'torchvision:resnet18': ['resnet18'], 'mnasnet_b1': ['mnasnet_b1', 'mnasnet_100.rmsp_in1k', 'mnasnet_100']}.items())
def test_weights_files_by_name(asked, files, tmp_path):
    assert weights_names(asked) == files and not any(':' in o for o in files) # which Windows would not have
    if asked != 'mnasnet_b1': return
    model = create_backbone(asked, 'random', seed=5)
    for file in files:
        torch.save(model.state_dict(), tmp_path/f'{file}.pth')
        assert torch.equal(create_backbone(asked, weights_dir=tmp_path).conv_stem.weight, model.conv_stem.weight)
        (tmp_path/f'{file}.pth').unlink()

def test_weights_of_a_transformer_fit_a_file_without_heads(tmp_path):
    "DeiT has two classifiers; a network of any size reads the weights of one size."
    name = 'timm:deit_tiny_distilled_patch16_224'
    model = timm.create_model('deit_tiny_distilled_patch16_224')
    torch.save({k: v for k, v in model.state_dict().items() if not k.startswith('head')}, tmp_path/'deit_tiny_distilled_patch16_224.pth')
    assert torch.equal(create_backbone(name, weights_dir=tmp_path).pos_embed, model.pos_embed)


# Transformers

@pytest.mark.parametrize('size', [(224, 224), (280, 280), (224, 448), (250, 250), (97, 300)], ids=lambda o: f'{o[0]}x{o[1]}')
@pytest.mark.parametrize('name', TRANSFORMERS)
def test_transformers_at_any_size(name, size):
    "On `meta`: the grid covers the padded image, whose sides are the next multiples."
    layer, cell = TRANSFORMERS[name], CELL.get(name, 16)
    whole = 32 if name == 'vit_swin_base' else cell
    extractor = on_meta(name, [layer])
    padded = extractor.padded_size(size)
    assert padded == tuple(next(n for n in range(s, s+whole) if n % whole == 0) for s in size)
    assert map_shapes(extractor, size)[layer][1:] == tuple(s//cell for s in padded)

@pytest.fixture(scope='module', params=TINY)
def transformer(request): return Extractor(create_backbone(request.param, 'random'), TINY[request.param])

def by_timm(model, images, layers):
    "The same maps by timm's own method."
    with torch.inference_mode(): return model.forward_intermediates(images, [int(o.split('.')[1]) for o in layers], output_fmt='NCHW', norm=False, intermediates_only=True)

@pytest.mark.parametrize('size', [(224, 224), (448, 224)], ids=lambda o: f'{o[0]}x{o[1]}')
def test_maps_are_those_of_timm(transformer, size):
    x = noise(2, 3, *size)
    for ours, theirs in zip(transformer(x).values(), by_timm(transformer.backbone, x, transformer.layers)):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)

def test_padding_repeats_the_edge(transformer):
    x = noise(1, 3, 224, 230)
    h, w = transformer.padded_size((224, 230))
    assert h == 224 and w > 230
    padded = torch.cat([x, x[..., -1:].expand(-1, -1, -1, w-230)], -1)
    for a, b in zip(transformer(x).values(), transformer(padded).values()): assert torch.equal(a, b)
    assert torch.equal(pad_images(x, h, w), padded)

def test_bfloat16_and_batches(transformer):
    "Half the digits, the same map; an image's map does not depend on its company."
    x = noise(2, 3, 112, 112)
    full, half = (Extractor(transformer.backbone, transformer.layers, o)(x) for o in ('float32', 'bfloat16'))
    alone = transformer(x[1:])
    for k in transformer.layers:
        assert half[k].dtype == torch.float32 and 0 < (full[k]-half[k]).norm()/full[k].norm() < .05
        assert torch.allclose(full[k][1:], alone[k], atol=1e-4)

def test_the_order_in_memory_changes_nothing():
    "Weights and images channels last, as on a CPU, or contiguous, as elsewhere; maps come channels last for the convolutions that follow."
    model, x = create_backbone('timm:vit_tiny_patch16_224', 'random'), noise(2, 3, 64, 96)
    contiguous = by_timm(model.to(memory_format=torch.contiguous_format), x, ['blocks.3'])[0]
    maps = Extractor(model, ['blocks.3'])(x)['blocks.3']
    assert model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last) and maps.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(maps, contiguous, atol=1e-5)

def test_nothing_runs_after_the_last_block():
    model = create_backbone('timm:vit_tiny_patch16_224', 'random')
    ran = []
    for i, block in enumerate(model.blocks): block.register_forward_hook(lambda *args, i=i: ran.append(i))
    images = noise(1, 3, 32, 32)
    assert list(Extractor(model, ['blocks.5', 'blocks.2'])(images)) == ['blocks.5', 'blocks.2'] and ran == [0, 1, 2, 3, 4, 5]
    ran.clear()
    Extractor(model, ['blocks.5'])(images, stop=False)
    assert ran == list(range(12))

@pytest.mark.parametrize('name, layer, shape', [('torchvision:vit_b_32', 'encoder.layers.encoder_layer_5', (768, 7, 7)), ('torchvision:swin_t', 'features.3', (192, 28, 28)), ('torchvision:swin_t', 'features.0.0', (96, 56, 56)),
                                                ('timm:beit_base_patch16_224', 'blocks.7', (768, 14, 14)), ('timm:convnext_atto', 'stages.1', (80, 28, 28)), ('timm:eva02_tiny_patch14_224', 'blocks.7', (192, 16, 16))])
def test_other_networks(name, layer, shape): assert map_shapes(on_meta(name, [layer]), 224) == {layer: shape}

@pytest.mark.parametrize('name, layer, size, says', [('vit_small', 'head', 224, "a transformer's block such as blocks.7"), ('vit_small', 'block.7', 224, "did you mean 'blocks.7'"), ('torchvision:vit_b_32', 'encoder.ln', (64, 96), 'cannot take images of 64 x 96'),
                                                     ('timm:cait_xxs24_224', 'blocks.7', 256, 'cannot take images of 256 x 256'), ('torchvision:swin_t', 'head', 224, 'not a map')])
def test_layers_and_sizes_that_cannot_be(name, layer, size, says):
    with pytest.raises(ArgumentError) as e: map_shapes(Extractor(create_backbone(name, 'random'), [layer]), size)
    assert says in str(e.value) and len(str(e.value).splitlines()) == 1

@pytest.mark.parametrize('resize, imagesize', [(256, 224), (288, 280), (448, (224, 448)), (256, 250)])
@pytest.mark.parametrize('name', ['vit_small', 'timm:vit_small_patch14_dinov2'])
def test_transformers_fit_and_predict(name, resize, imagesize):
    good, odd = ([demo_sample('denim', split, i)[0] for i in range(2)] for split in ('train', 'test'))
    model = PatchCore(name, ('blocks.1', 'blocks.3'), weights='random', resize=resize, imagesize=imagesize, target_dim=64).fit(good)
    h, w = size = imagesize if isinstance(imagesize, tuple) else (imagesize, imagesize)
    cell = 14 if 'dinov2' in name else 16
    found = model.predict(odd)
    assert model.grid_ == (-(-h//cell), -(-w//cell)) and found.anomaly_maps.shape == (2, *size)
    assert found.anomaly_maps.isfinite().all() and (found.image_scores > 0).all()

@pytest.mark.parametrize('imagesize', [224, 250, (160, 230)])
def test_maps_of_padded_images_lie_where_the_defect_is(imagesize):
    "What was padded is cut off again, not squeezed in: a spot near the far corner stays there."
    size = np.array(imagesize if isinstance(imagesize, tuple) else (imagesize, imagesize))
    rng = np.random.default_rng(0)
    good, odd = [rng.normal(.5, .02, (*size, 3)).clip(0, 1) for _ in range(3)], rng.normal(.5, .02, (*size, 3)).clip(0, 1)
    row, col = size-26
    odd[row-10:row+10, col-10:col+10] = 1
    model = PatchCore('vit_small', ('blocks.0',), weights='random', resize=tuple(map(int, size)), imagesize=None, target_dim=64, patchsize=1, ratio=1).fit(good)
    m = model.predict(odd).original_map(0)
    got = np.argwhere(m > .6*m.max()).mean(0)
    assert m.shape == tuple(size) and np.abs(got-(row, col)).max() < 9


def test_a_cache_depends_on_the_filters_too():
    "Whatever the filter bank computes with stands in a file that is looked at when a cache is asked."
    parts = code_state([type(o) for o in create_backbone('filterbank').modules()])
    used = {f.__module__ for f in (filters.gabors, filters.modulus, filters.halve, filters.soften, filterbank.cascade, filterbank.join)}
    assert used <= {o.rpartition('.')[0] for o in parts}

@pytest.mark.parametrize('name', ['create_backbone', 'find_backbone', 'find_layers', 'find_weights', 'library_names', 'map_shapes', 'put_weights', 'read_weights', 'register_backbone', 'split_seed', 'weights_names', 'Extractor', 'PRECISIONS', 'BACKBONES', 'KNOWN'])
def test_the_extractor_offers_what_makes_a_backbone(name): assert getattr(extractor, name) is getattr(build, name, getattr(extractor, name))
