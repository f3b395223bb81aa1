"Weights files as people have them, and backbones of both libraries; nothing is downloaded."
import copy
import gc
import io
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
import torch
from safetensors.torch import save_file

from patchcore_nb import build, extractor
from patchcore_nb.core import ArgumentError, DataError
from patchcore_nb.extractor import Extractor, create_backbone, find_backbone, find_weights, map_shapes, put_weights, read_weights
from patchcore_nb.patchcore import PatchCore

# name, layers, and (channels, cells) of their maps at 64 pixels
BACKBONES = {'resnet18': {'layer2': (128, 8), 'layer3': (256, 4)}, 'wideresnet50': {'layer2': (512, 8), 'layer3': (1024, 4)},
             'densenet121': {'features.denseblock2': (512, 8)}, 'efficientnet_b0': {'features.3': (40, 8), 'features.5': (112, 4)}, 'convnext_tiny': {'features.3': (192, 8)},
             'vgg11': {'features.10': (256, 8)}, 'mobilenet_v3_small': {'features.3': (24, 8)},
             'resnetv2_50': {'stages.1': (512, 8)}, 'convnext_atto': {'stages.1': (80, 8), 'stages.2': (160, 4)}, 'tf_efficientnet_b0': {'blocks.2': (40, 8)}, 'regnety_002': {'s2': (56, 8)},
             'filterbank': {'layer2': None, 'layer3': None}}


pytestmark = pytest.mark.usefixtures('offline')

@pytest.fixture(scope='module')
def state(): return create_backbone('resnet18', 'random', seed=3).state_dict()

@pytest.fixture(scope='module')
def built(): return create_backbone('resnet18', 'random', seed=4)

@pytest.fixture
def network(built):
    "A ResNet-18 that knows nothing: all weights are zero."
    for o in built.state_dict().values(): o.zero_()
    return built


@pytest.mark.parametrize('name', BACKBONES)
def test_backbones_give_maps(name):
    want, before = BACKBONES[name], torch.get_rng_state()
    backbone = create_backbone(name, 'random')
    got = map_shapes(Extractor(backbone, list(want)), 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert list(got) == list(want)
    if name == 'filterbank': assert [s[1:] for s in got.values()] == [(8, 8), (4, 4)]
    else: assert got == {k: (c, n, n) for k, (c, n) in want.items()}

def test_extractor_matches_the_network_run_whole():
    backbone, x, seen = create_backbone('resnet18', 'random'), torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)), {}
    hooks = [m.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out})) for name, m in backbone.named_children()]
    with torch.no_grad(): backbone(x)
    for o in hooks: o.remove()
    for layers in (['layer2', 'layer3'], ['layer3', 'layer1'], ['layer4']):
        got = Extractor(backbone, layers)(x)
        assert list(got) == layers and all(torch.allclose(got[o], seen[o], rtol=1e-4, atol=1e-5*float(seen[o].max())) for o in layers) # another order in memory, another order of sums

@pytest.mark.parametrize('layers, says', [(['layr2'], "did you mean 'layer"), ([], 'at least one'), (['layer2', 'layer2'], 'twice'), (['layer2', ''], 'unknown layer'), (['layer2', 'conv9'], 'layer3')])
def test_unknown_layers(layers, says):
    with pytest.raises(ArgumentError) as e: Extractor(create_backbone('resnet18', 'random'), layers)
    assert says in str(e.value) and len(str(e.value).splitlines()) == 1

@pytest.mark.parametrize('name, layer', [('resnet18', 'fc'), ('vit_b_32', 'heads')])
def test_layers_that_are_no_maps(name, layer):
    with pytest.raises(ArgumentError, match='yields .* not a map'): map_shapes(Extractor(create_backbone(name, 'random'), [layer]), 224)

def test_images_too_small_for_the_backbone():
    with pytest.raises(ArgumentError, match='imagesize'): PatchCore('densenet121', ['features.denseblock4'], weights='random', resize=8, imagesize=8, ratio=1).fit(torch.zeros(1, 3, 8, 8))

@pytest.mark.parametrize('name, near', [('resnet-18', 'resnet18'), ('wideresnet', 'wideresnet50'), ('filterbnk', 'filterbank'), ('resnetv2_50x', 'resnetv2_50')])
def test_unknown_backbones(name, near):
    with pytest.raises(ArgumentError) as e: create_backbone(name, 'random')
    assert near in str(e.value) and len(str(e.value).splitlines()) == 1


def wrapped(state, how):
    return {'plain': state, 'state_dict': {'state_dict': state, 'epoch': 3}, 'model': {'model': state}, 'module.': {f'module.{k}': v for k, v in state.items()},
            'both': {'state_dict': {f'module.{k}': v for k, v in state.items()}}, 'no head': {k: v for k, v in state.items() if not k.startswith('fc.')},
            'other head': state | {'fc.weight': torch.zeros(7, 512), 'fc.bias': torch.zeros(7)}, 'more': state | {'ema.decay': torch.zeros(1)}, 'half': {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
            'no counters': {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')}}[how]

@pytest.mark.parametrize('how, ending', [*((how, '.pth') for how in ['plain', 'state_dict', 'model', 'module.', 'both', 'no head', 'other head', 'more', 'half', 'no counters']),
                                         ('plain', '.pt'), ('plain', '.safetensors'), ('module.', '.safetensors'), ('no head', '.safetensors')])
def test_weights_files(tmp_path, state, network, how, ending):
    content = wrapped(state, how)
    (save_file if ending == '.safetensors' else torch.save)(content, tmp_path/f'resnet18{ending}')
    got = put_weights(network, find_weights(['resnet18'], tmp_path)).state_dict()
    for k, v in state.items():
        if not k.startswith('fc.'): assert torch.allclose(got[k].float(), v.float(), atol=2e-3 if how == 'half' else 0), k

def test_the_environment_names_the_folder(tmp_path, state, monkeypatch):
    torch.save(state, tmp_path/'resnet18.pth')
    monkeypatch.setenv('PATCHCORE_NB_WEIGHTS', str(tmp_path))
    assert torch.equal(create_backbone('resnet18').layer3[0].conv1.weight, state['layer3.0.conv1.weight'])
    assert find_weights(['none'], None) is None

def test_either_name_and_safetensors_first(tmp_path):
    assert find_backbone('wideresnet50') == find_backbone('wide_resnet50_2') == ('torchvision', 'wide_resnet50_2')
    for name in ('wide_resnet50_2.pth', 'wide_resnet50_2.safetensors', 'wideresnet50.pt'): (tmp_path/name).write_bytes(b'x')
    assert find_weights(['wideresnet50', 'wide_resnet50_2'], tmp_path).name == 'wideresnet50.pt'
    assert find_weights(['wide_resnet50_2'], tmp_path).name == 'wide_resnet50_2.safetensors'

class Evil:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.mkdir, (str(self.marker),)

@pytest.mark.parametrize('how', ['torch', 'pickle', 'inside'])
def test_weights_that_would_run_code(tmp_path, state, network, how):
    path, evil = tmp_path/'resnet18.pth', Evil(tmp_path/'ran')
    if how == 'pickle': path.write_bytes(pickle.dumps(evil))
    else: torch.save(state | {'fc.bias': evil} if how == 'inside' else evil, path)
    with pytest.raises(DataError) as e: put_weights(network, path)
    assert 'resnet18.pth' in str(e.value) and len(str(e.value).splitlines()) == 1
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('content', [b'', b'text', b'\x80\x04.', b'PK\x03\x04', b'\xff'*99, [1], {}, {'a': 1}, 5, torch.zeros(3), {'state_dict': 5}, {3: torch.zeros(1)}], ids=lambda o: str(o)[:16])
@pytest.mark.parametrize('ending', ['.pth', '.safetensors'])
def test_weights_that_are_none(tmp_path, content, ending):
    path = tmp_path/f'resnet18{ending}'
    if isinstance(content, bytes) or ending == '.safetensors': path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(str(content)))
    else: torch.save(content, path)
    with pytest.raises(DataError) as e: put_weights(torch.nn.Linear(2, 2), path)
    assert path.name in str(e.value) and len(str(e.value).splitlines()) == 1

@pytest.mark.parametrize('change', [lambda s: {k: v for k, v in s.items() if k != 'layer1.0.conv1.weight'}, lambda s: s | {'conv1.weight': torch.zeros(64, 1, 7, 7)}, lambda s: {f'net.{k}': v for k, v in s.items()}], ids=['missing', 'of another shape', 'of another name'])
def test_weights_of_another_network(tmp_path, state, network, change):
    torch.save(change(state), tmp_path/'resnet18.pth')
    with pytest.raises(DataError, match='do not fit the network'): put_weights(network, tmp_path/'resnet18.pth')
    assert not network.conv1.weight.any()

def test_cut_off_weights(tmp_path, state):
    for ending, write in (('.pth', torch.save), ('.safetensors', save_file)):
        path = tmp_path/f'w{ending}'
        write(state, path)
        raw = path.read_bytes()
        for n in (1, 9, 100, len(raw)//2, len(raw)-1):
            path.write_bytes(raw[:n])
            with pytest.raises(DataError, match='cannot be read'): read_weights(path)

def test_no_weights_to_be_had(tmp_path, monkeypatch):
    "What was tried, what to supply and where, and the way without."
    def no_network(*args, pretrained): raise OSError('<urlopen error [Errno 111] Connection refused>\nin two lines')
    monkeypatch.setattr(build, 'build_network', no_network)
    with pytest.raises(DataError) as e: create_backbone('wideresnet50', weights_dir=tmp_path)
    for part in ('wideresnet50.safetensors, .pth or .pt', 'Connection refused', 'weights_dir', 'PATCHCORE_NB_WEIGHTS', 'filterbank'): assert part in str(e.value)
    assert len(str(e.value).splitlines()) == 1
    with pytest.raises(DataError, match='weights folder .* is not there'): create_backbone('resnet18', weights_dir=tmp_path/'none')

def test_random_weights_go_by_their_seed(state):
    def first(name, seed): return create_backbone(name, 'random', seed=seed).conv1.weight
    assert torch.equal(first('resnet18', 3), state['conv1.weight']) and torch.equal(first('resnet18.seed-3', 8), state['conv1.weight'])
    assert not torch.equal(first('resnet18', 4), state['conv1.weight'])
    with pytest.raises(ArgumentError, match='unknown weights'): create_backbone('resnet18', 'pretraind')

def test_a_backbone_that_was_used_can_be_asked_for_gradients():
    backbone = create_backbone('resnet18', 'random')
    Extractor(backbone, ['layer2'])(torch.zeros(1, 3, 64, 64))
    backbone.requires_grad_(True)(torch.zeros(1, 3, 64, 64)).sum().backward()
    assert not any(o.is_inference() for o in backbone.parameters())


# Many threads, one network

THREADS, CALLS = 4, 200

def noise(seed, size=64): return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))

def same(got, want): return list(got) == list(want) and all(torch.allclose(got[k], want[k], rtol=1e-5, atol=1e-5*float(want[k].abs().max())) for k in want)

def in_pool(work, items):
    "As `map`, in threads that start together."
    gate = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS, initializer=gate.wait) as pool: return list(pool.map(work, items))

def plain(backbone, x):
    "What the network yields when it is called by itself."
    with torch.no_grad(): out = backbone(x)
    return out if isinstance(out, dict) else {'out': out}

SHARED = {'resnet18': (['layer1', 'layer2'], ['layer3', 'layer2']), 'filterbank': (['layer2', 'layer3'], ['layer2'])}

@pytest.fixture(params=SHARED)
def shared(request):
    "One network, as nobody used it before, and two extractors of different layers on it."
    backbone = create_backbone(request.param, 'random')
    first, second = SHARED[request.param]
    return backbone, [Extractor(backbone, first), Extractor(backbone, second)]

def test_threads_share_a_network(shared):
    "200 calls of two extractors from four threads, the very first ones included, yield what they yield one after the other."
    backbone, extractors = shared
    calls, alone = [(i%2, noise(i)) for i in range(CALLS)], copy.deepcopy(extractors)
    got = in_pool(lambda call: extractors[call[0]](call[1]), calls)
    assert all(same(o, alone[i](x)) for o, (i, x) in zip(got, calls))
    assert same(plain(backbone, noise(0)), plain(alone[0].backbone, noise(0)))

def test_whole_passes_beside_stopped_ones(shared):
    _, (first, second) = shared
    want = [first(noise(i)) for i in range(8)]
    got = in_pool(lambda i: second(noise(i), stop=False) if i%2 else first(noise(i//2), stop=i%4 == 0), range(16))
    assert all(same(got[2*i], want[i]) for i in range(8))

class Branching(torch.nn.Module):
    "A network with a layer that takes no part, another that fails on black images, and a last one."
    def __init__(self):
        super().__init__()
        self.body, self.idle, self.end = (torch.nn.Conv2d(c, 4, 3) for c in (3, 4, 4))
    def forward(self, x):
        if not x.any(): raise RuntimeError('black')
        return self.end(self.body(x))

def test_errors_in_one_thread_disturb_no_other():
    "A layer that takes no part, an image that the network refuses, a layer that is no map."
    backbone = Branching().eval().requires_grad_(False)
    good, idle = Extractor(backbone, ['body', 'end']), Extractor(backbone, ['body', 'idle'])
    def work(i):
        try: return good(noise(i)) if i%3 == 0 else idle(noise(i)) if i%3 == 1 else good(torch.zeros(1, 3, 64, 64))
        except (ArgumentError, RuntimeError) as e: return str(e)
    got = in_pool(work, range(CALLS))
    assert all(same(o, good(noise(i))) for i, o in enumerate(got) if i%3 == 0)
    assert {str(o) for o in got[1::3]} == {'layer idle takes no part in the forward pass: name another one'} and set(got[2::3]) == {'black'}
    assert torch.equal(backbone(noise(1)), backbone.end(backbone.body(noise(1))))

def test_calls_within_a_call_and_in_a_copied_context():
    "An extractor in the network of another one; a thread that is given the context of a running call."
    class Outer(torch.nn.Module):
        def __init__(self, inner): super().__init__(); self.inner, self.end = inner, torch.nn.Conv2d(64, 2, 1)
        def forward(self, x):
            with ThreadPoolExecutor(1) as pool: maps = pool.submit(copy_context().run, self.inner, x).result()
            assert torch.equal(maps['layer1'], self.inner(x)['layer1'])
            return self.end(maps['layer1'])
    inner = Extractor(create_backbone('resnet18', 'random'), ['layer1'])
    outer = Extractor(Outer(inner).requires_grad_(False), ['end'])
    want = outer.backbone.end(inner(noise(0))['layer1'])
    assert same(outer(noise(0)), {'end': want})

@pytest.mark.parametrize('how', [*range(2, pickle.HIGHEST_PROTOCOL+1), 'deepcopy', 'torch.save'])
@pytest.mark.parametrize('used', [False, True], ids=['fresh', 'used'])
def test_extractors_can_be_copied_and_stored(how, used):
    "Before and after their first call; a copy shares nothing with what it was copied from."
    extractor = Extractor(create_backbone('filterbank'), ['layer2', 'layer3'])
    want = extractor(noise(0)) if used else Extractor(create_backbone('filterbank'), ['layer2', 'layer3'])(noise(0))
    if how == 'deepcopy': other = copy.deepcopy(extractor)
    elif how == 'torch.save':
        buffer = io.BytesIO()
        torch.save(extractor, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else: other = pickle.loads(pickle.dumps(extractor, how))
    extractor.backbone.layer2.mean += 1
    assert same(other(noise(0)), want)
    for _ in range(3): assert same(in_pool(other, [noise(0)]*8)[-1], want)

def test_hooks_of_others_stay_and_ours_does_not_pile_up():
    "One hook a module, however many extractors listen there; networks can be let go."
    backbone, ran = create_backbone('filterbank'), []
    handle = backbone.layer2.register_forward_hook(lambda *args: ran.append(1))
    for layers in (['layer2'], ['layer2', 'layer3'], ['layer2']):
        for _ in range(3): Extractor(backbone, layers)(noise(0))
    assert len(ran) == 9 and len(backbone.layer2._forward_hooks) == 2 and len(backbone.layer3._forward_hooks) == 1
    handle.remove()
    backbone.layer2._forward_hooks.clear() # by somebody who cleans up
    assert list(Extractor(backbone, ['layer2'])(noise(0))) == ['layer2']
    layouts, before = extractor._LAYOUTS, len(extractor._LAYOUTS)
    del backbone
    gc.collect()
    assert len(layouts) < before
