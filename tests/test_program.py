"Batch norms as the reference's program moves them; mean and deviation as the weights were trained with; Lite0 from the package index."
import copy
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from patchcore_nb import lite
from patchcore_nb.base import ArgumentError, DataError
from patchcore_nb.bounded import write_json
from patchcore_nb.build import create_backbone
from patchcore_nb.cli import main
from patchcore_nb.demo import make_demo
from patchcore_nb.embedder import Embedder
from patchcore_nb.embedding import Compute, Embedding, differences
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.model_files import FIRST, FORMAT, SECOND, THIRD
from patchcore_nb.names import KNOWN, PRESETS
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.program import Norm, batch_norms, choose_batchnorm, choose_mean_std, habits_of, move_batch_norms, norm_of
from patchcore_nb.reference_files import seen_otherwise
from patchcore_nb.saved import evaluate_main, predict_main
from patchcore_nb.store import load, save

SMALL = dict(resize=64, imagesize=64, pretrain_dim=32, target_dim=32, ratio=.2, device='cpu', num_workers=0)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)

def resnet(**kw): return PatchCore('resnet18', weights='random', **SMALL | kw)

@pytest.fixture(scope='module')
def program(): return resnet().fit(IMAGES)

@pytest.fixture(scope='module')
def trained(): return resnet(batchnorm='trained').fit(IMAGES)


# The pass

def slow_twin(backbone, last, size):
    "As the reference's program does it: a forward hook that ends the pass, in training mode, on a copy."
    class Stop(Exception): pass
    def stop(*args): raise Stop
    twin = copy.deepcopy(backbone).train()
    twin.get_submodule(last).register_forward_hook(stop)
    try:
        with torch.no_grad(): twin(torch.ones(1, 3, *size))
    except Stop: pass
    return twin.eval()

@pytest.mark.parametrize('name, layers', [('resnet18', ['layer2', 'layer3']), ('densenet121', ['features.denseblock2']), ('mnasnet_100', ['blocks.2', 'blocks.4']), ('vgg11', ['features.14'])])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_the_slow_twin_moves_the_same(name, layers, layout):
    net = create_backbone(name, 'random')
    want = slow_twin(net, layers[-1], (96, 80)).state_dict()
    net = net.to(memory_format=layout)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    got = move_batch_norms(net, layers, (96, 80)).state_dict()
    for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-5, atol=1e-6)
    for k, v in net.state_dict().items(): assert torch.equal(v, before[k]), k

def test_dropout_does_not_touch_the_generator():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(.5), nn.BatchNorm2d(4)).eval()
    torch.manual_seed(3); want = torch.rand(2)
    torch.manual_seed(3); move_batch_norms(net, ['2'], (8, 8))
    assert torch.equal(torch.rand(2), want) and not any(o.training for o in net.modules())
    assert torch.equal(move_batch_norms(net, ['2'], (8, 8))[2].running_mean, move_batch_norms(net, ['2'], (8, 8))[2].running_mean)

def test_the_pass_disturbs_no_building_in_another_thread():
    want = create_backbone('resnet18', 'random').conv1.weight
    net = create_backbone('resnet18', 'random')
    with ThreadPoolExecutor(3) as pool:
        moving = [pool.submit(move_batch_norms, net, ['layer2'], (64, 64)) for _ in range(12)]
        assert all(torch.equal(create_backbone('resnet18', 'random').conv1.weight, want) for _ in range(6))
        for o in moving: o.result()

def test_another_size_at_load_is_said(tmp_path, program, trained):
    with pytest.warns(UserWarning, match='image of ones of the new size'): load(save(program, tmp_path/'a', 'ours'), resize=96, imagesize=96, device='cpu')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load(save(trained, tmp_path/'b', 'ours'), resize=96, imagesize=96, device='cpu')

@pytest.mark.parametrize('wrong', [3, None])
def test_a_backbone_without_a_name(wrong):
    with pytest.raises(ArgumentError, match='backbone'): Embedding(wrong)

def test_weights_are_there_once(program):
    e = program.embedder_
    used, kept = dict(e.backbone.named_parameters()), dict(e.trained_.named_parameters())
    assert e.backbone is not e.trained_ and all(used[k] is kept[k] for k in kept)
    assert not torch.equal(e.backbone.bn1.running_var, e.trained_.bn1.running_var)

def test_too_small_an_image_of_ones():
    with pytest.raises(ArgumentError, match="batchnorm='trained'"): Embedder(Embedding('resnet18', weights='random', resize=16, imagesize=16, patchsize=1))
    Embedder(Embedding('resnet18', weights='random', resize=16, imagesize=16, patchsize=1, batchnorm='trained'))

def test_the_image_of_ones_has_the_size_of_the_crop():
    by_crop, uncut = Embedder(Embedding('resnet18', weights='random', resize=128, imagesize=96)), Embedder(Embedding('resnet18', weights='random', resize=(96, 96), imagesize=None))
    want = [move_batch_norms(by_crop.trained_, ['layer2', 'layer3'], o).layer3[1].bn2.running_var for o in ((96, 96), (224, 224))]
    assert torch.equal(by_crop.backbone.layer3[1].bn2.running_var, want[0]) and torch.equal(uncut.backbone.layer3[1].bn2.running_var, want[1])
    assert not torch.equal(*want)

def test_threads_and_another_device_description_see_the_same(program):
    moved = program.embedder_.with_compute(Compute(batch_size=1, device='cpu'))
    assert moved.backbone is program.embedder_.backbone
    for own, other in zip(batch_norms(copy.deepcopy(program).embedder_.backbone), batch_norms(moved.backbone)): assert torch.equal(own.running_mean, other.running_mean)


# Which rule

@pytest.mark.parametrize('name', KNOWN)
def test_names_of_the_reference(name): assert (choose_batchnorm(name), choose_mean_std(f'{name}.seed-3')) == ('program', 'imagenet')

@pytest.mark.parametrize('name', ['timm:resnet18', 'torchvision:resnet18', 'torchvision:wide_resnet50_2', 'wide_resnet50_2', 'filterbank', 'efficientnet_lite0'])
def test_other_names(name): assert (choose_batchnorm(name), choose_mean_std(name)) == ('trained', 'weights')

def test_presets_take_trained():
    assert {k: v['batchnorm'] for k, v in PRESETS.items()} == {k: 'program' if k == 'reference' else 'trained' for k in PRESETS}

def test_arguments():
    assert resnet(batchnorm='trained').embedding.batchnorm == 'trained' and resnet().embedding.mean_std == 'imagenet'
    for wrong in (dict(batchnorm='eval'), dict(mean_std='inception')):
        with pytest.raises(ArgumentError, match=f'unknown {[*wrong][0]}'): resnet(**wrong).check()
    model = resnet().fit(IMAGES)
    model.batchnorm = 'trained'
    assert not model.is_fitted

def test_the_two_are_no_one_model(program, trained):
    assert not torch.equal(program.memory_bank_, trained.memory_bank_)
    assert differences(program.embedder_.identified, trained.embedder_.identified) == ['batchnorm']
    with pytest.raises(ArgumentError, match='batchnorm'): program.merge(trained)

def test_the_cache_knows(tmp_path, program, trained):
    for want, kw in [(program, {}), (trained, dict(batchnorm='trained')), (program, {})]:
        assert torch.equal(resnet(cache=tmp_path, **kw).fit(IMAGES).memory_bank_, want.memory_bank_)
    assert len([o for o in tmp_path.iterdir() if o.is_dir()]) == 2

def test_an_ensemble_shares_weights():
    pair = Ensemble([resnet(layers=['layer1']), resnet(layers=['layer3'])]).fit(IMAGES)
    a, b = (o.embedder_ for o in pair.members)
    assert a.trained_ is b.trained_ and a.backbone.conv1.weight is b.backbone.conv1.weight
    assert torch.equal(a.backbone.layer3[0].bn1.running_var, a.trained_.layer3[0].bn1.running_var) # the pass of the first ends before
    assert not torch.equal(b.backbone.layer3[0].bn1.running_var, b.trained_.layer3[0].bn1.running_var)

def test_a_line_is_said(capsys):
    resnet(show=True).fit(IMAGES)
    assert "batch norms are moved by an image of ones, as the reference's program does" in ''.join(capsys.readouterr())
    resnet(show=True, batchnorm='trained').fit(IMAGES)
    assert 'batch norms' not in ''.join(capsys.readouterr())


# Files

def test_saved_and_loaded(tmp_path, program, trained):
    for name, model in dict(program=program, trained=trained).items():
        folder = save(model, tmp_path/name, 'ours')
        values = json.loads((folder/'model.json').read_text())
        assert values['format'] == FORMAT and (values['params']['batchnorm'], values['params']['mean_std']) == (name, 'imagenet')
        again = load(folder, device='cpu')
        assert torch.equal(again.predict(IMAGES).image_scores, model.predict(IMAGES).image_scores)
        assert load(folder, batchnorm=name, device='cpu').embedding == again.embedding
        other = dict(program='trained', trained='program')[name]
        with pytest.raises(ArgumentError, match=f'was fitted with batchnorm {name}'): load(folder, batchnorm=other, device='cpu')

@pytest.mark.parametrize('older', [FIRST, SECOND, THIRD])
def test_older_files_are_as_trained(tmp_path, trained, older):
    folder = save(trained, tmp_path/'m', 'ours')
    values = json.loads((folder/'model.json').read_text())
    for o in ('batchnorm', 'mean_std'): del values['params'][o]
    if older == FIRST: values['params']['b'] = values['params'].pop('reweight_k')
    write_json(folder/'model.json', values | dict(format=older))
    again = load(folder, device='cpu')
    assert (again.embedding.batchnorm, again.embedding.mean_std) == ('trained', 'imagenet')
    assert torch.equal(again.predict(IMAGES).image_scores, trained.predict(IMAGES).image_scores)

def test_a_third_without_its_seal_is_refused(tmp_path, trained):
    folder = save(trained, tmp_path/'m', 'ours')
    values = json.loads((folder/'model.json').read_text())
    del values['own_sha256']
    (folder/'model.json').write_text(json.dumps(values | dict(format=THIRD)))
    with pytest.raises(DataError, match='not as it was saved'): load(folder, device='cpu')

def test_an_odd_value_in_a_file(tmp_path, trained):
    folder = save(trained, tmp_path/'m', 'ours')
    values = json.loads((folder/'model.json').read_text())
    write_json(folder/'model.json', values | dict(params=values['params'] | dict(batchnorm='moved')))
    with pytest.raises(DataError, match='unknown batchnorm'): load(folder, device='cpu')

@pytest.fixture(scope='module')
def of_reference(tmp_path_factory):
    "A model in the reference's format, and the folder of its weights."
    folder = tmp_path_factory.mktemp('theirs')
    torch.save(create_backbone('resnet18', 'random').state_dict(), folder/'resnet18.pth')
    model = PatchCore('resnet18', weights_dir=folder, **SMALL | dict(imagesize=56)).fit(IMAGES)
    return model, save(model, folder/'m', 'reference'), folder

def test_the_references_files(of_reference):
    model, folder, weights = of_reference
    again = load(folder, weights_dir=weights, device='cpu')
    assert (again.embedding.batchnorm, again.embedding.mean_std) == ('program', 'imagenet')
    torch.testing.assert_close(again.predict(IMAGES).image_scores, model.predict(IMAGES).image_scores, rtol=1e-5, atol=1e-5)
    asked = load(folder, weights_dir=weights, batchnorm='trained', mean_std='weights', device='cpu')
    assert (asked.embedding.batchnorm, asked.embedding.mean_std) == ('trained', 'weights')
    assert not torch.allclose(asked.predict(IMAGES).image_scores, model.predict(IMAGES).image_scores, rtol=1e-3)
    with pytest.raises(ArgumentError, match='unknown batchnorm'): load(folder, batchnorm='eval')

def test_trained_in_their_format_warns(of_reference, tmp_path):
    _, _, weights = of_reference
    model = PatchCore('resnet18', weights_dir=weights, batchnorm='trained', **SMALL | dict(imagesize=56)).fit(IMAGES)
    for kind in ('reference', 'both'):
        with pytest.warns(UserWarning, match="the reference's program will move them"): save(model, tmp_path/kind, kind)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        save(model, tmp_path/'ours', 'ours')
        save(of_reference[0], tmp_path/'both2', 'both')
        none = PatchCore('vgg11', ['features.14'], weights='random', batchnorm='trained', **SMALL).fit(IMAGES)
    assert seen_otherwise(model) and not seen_otherwise(of_reference[0]) and not seen_otherwise(none) # which has no batch norms at all

def test_other_colours_are_not_in_their_format(tmp_path):
    model = PatchCore('inception_v4', ['features.9'], weights='random', mean_std='weights', **SMALL | dict(resize=96, imagesize=84))
    with pytest.raises(ArgumentError, match="mean_std 'weights'"): save(model, tmp_path/'m', 'reference')
    save(PatchCore('torchvision:resnet18', weights='random', **SMALL | dict(imagesize=56)).set_params(weights='random').fit(IMAGES), tmp_path/'m', 'ours')


# Mean and deviation

FAMILIES = ['timm:vit_small_patch16_224.augreg_in21k_ft_in1k', 'timm:resnetv2_50x1_bit.goog_in21k_ft_in1k', 'timm:inception_v4.tf_in1k',
            'timm:tf_efficientnet_b0.aa_in1k', 'timm:vit_base_patch16_clip_224.openai', 'timm:convnext_tiny.fb_in1k', 'vit_small']

@pytest.mark.parametrize('name', FAMILIES)
def test_what_enters_is_what_timm_makes(name, monkeypatch):
    "At the same size, scaled in the same way."
    import timm
    from timm.data import create_transform
    cfg = timm.get_pretrained_cfg(name.rpartition(':')[2] if ':' in name else 'vit_small_patch16_224.augreg_in21k_ft_in1k')
    tiny = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Conv2d(8, 8, 2, 2))
    what = Embedding(name, ['0', '1'], mean_std='weights', weights='random')
    embedder = Embedder(what, Compute(device='cpu'), tiny)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 280, 3), np.uint8))
    want = create_transform((3, 224, 224), is_training=False, mean=cfg.mean, std=cfg.std, crop_pct=224/256, interpolation='bilinear')(image)
    torch.testing.assert_close(embedder.read(image), want, rtol=1e-5, atol=1e-5)
    assert (embedder.norm_ == Norm()) == (cfg.mean == Norm().mean)

def test_torchvisions_are_its_own():
    import torchvision.models as tv
    for name in ('resnet18', 'vit_b_16', 'efficientnet_b0'):
        how = tv.get_model_weights(name).DEFAULT.transforms()
        assert norm_of(f'torchvision:{name}', 'weights') == Norm(tuple(how.mean), tuple(how.std))

def test_a_network_of_ones_own_may_say():
    own = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 2, 2))
    own.pretrained_cfg = dict(mean=(.1, .2, .3), std=(.5, .5, .5), interpolation='bicubic')
    assert habits_of('filterbank', own).norm == Norm((.1, .2, .3), (.5, .5, .5))
    assert Embedder(Embedding('filterbank', ['0', '1']), Compute(device='cpu'), own).remarks == ['images are scaled bilinearly, but those of filterbank were bicubic']

def test_the_file_says_the_colours(tmp_path, program):
    said = json.loads((save(program, tmp_path/'m', 'ours')/'model.json').read_text())['images']
    assert said.endswith('ImageNet mean and deviation')


# The command line

@pytest.fixture
def demo(tmp_path, monkeypatch):
    make_demo(tmp_path/'data', 'cog')
    monkeypatch.chdir(tmp_path)
    return tmp_path

SIZES = '--pretrain_embed_dimension 32 --target_embed_dimension 32'
DATA = 'dataset --resize 64 --imagesize 56 -d cog demo data'

@pytest.fixture
def call(demo, capsys):
    "Run a program; status, and what it said."
    def go(program, words):
        with pytest.raises(SystemExit) as e: program(words.split())
        return e.value.code, ''.join(capsys.readouterr())
    return go

def fitted(call, core, group, status=0):
    "Fit on the cogs; the parameters in the saved model, its folder, and what was said."
    code, said = call(main, f'--gpu -1 --no_report --save_patchcore_model --log_group {group} results patch_core {core} {SIZES} sampler -p 0.02 approx_greedy_coreset {DATA}')
    assert code == status, said
    if status: return said
    folder = next(Path('results').rglob(f'{group}/models/*'))
    return json.loads((folder/'model.json').read_text())['params'], folder, said

def test_flags_of_the_commands(call):
    core = '-b resnet18 -le layer2 -le layer3 --weights random'
    params, _, said = fitted(call, core, 'a')
    assert params['batchnorm'] == 'program' and 'moved by an image of ones' in said
    params, folder, said = fitted(call, f'{core} --batchnorm trained --mean_std weights', 'b')
    assert (params['batchnorm'], params['mean_std']) == ('trained', 'weights') and 'moved by an image' not in said
    loader = f'patch_core_loader -p {folder}'
    assert call(evaluate_main, f'--gpu -1 --no_report again {loader} --batchnorm trained {DATA}')[0] == 0
    code, said = call(evaluate_main, f'--gpu -1 --no_report again2 {loader} --batchnorm program {DATA}')
    assert code == 2 and 'was fitted with' in said and 'leave --batchnorm out' in said
    code, said = call(predict_main, f'--gpu -1 {folder} data/cog/test/good --mean_std imagenet')
    assert code == 2 and 'was fitted with' in said and 'leave --mean_std out' in said

# Lite0

needs_lite = pytest.mark.skipif(lite.package_file() is None, reason='the package that carries Lite0 is not installed')

@needs_lite
def test_lite0_from_the_package(tmp_path):
    model = PatchCore('efficientnet_lite0', ['blocks.2', 'blocks.4'], **SMALL).fit(IMAGES)
    assert model.embedder_.norm_ == Norm((.5,)*3, (.5,)*3) and model.embedding.batchnorm == 'trained'
    again = load(save(model, tmp_path/'m'), device='cpu')
    assert torch.equal(again.predict(IMAGES).image_scores, model.predict(IMAGES).image_scores)

@needs_lite
def test_a_package_with_another_file(tmp_path, monkeypatch):
    other = tmp_path/'other.pth'
    other.write_bytes(lite.package_file().read_bytes()+b'\0')
    monkeypatch.setattr(lite, 'package_file', lambda: other)
    with pytest.raises(DataError, match='SHA-256'): create_backbone('efficientnet_lite0')

def test_lite0_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(lite, 'PACKAGE', 'no_such_package')
    monkeypatch.delenv('PATCHCORE_NB_WEIGHTS', raising=False)
    with pytest.raises(DataError, match=r'patchcore_nb\[lite\]'): create_backbone('efficientnet_lite0')
    net = create_backbone('efficientnet_lite0', 'random', seed=3)
    torch.save(net.state_dict(), tmp_path/'efficientnet_lite0.pth')
    assert torch.equal(create_backbone('efficientnet_lite0', weights_dir=tmp_path).conv_stem.weight, net.conv_stem.weight)

def test_weights_of_lite0_are_asked_for(call):
    params, _, _ = fitted(call, '-b efficientnet_lite0 -le blocks.2 --weights random', 'a')
    assert (params['batchnorm'], params['mean_std']) == ('trained', 'weights')
    assert 'has no weights' in fitted(call, '-b filterbank -le layer2 --weights random', 'b', 2)
