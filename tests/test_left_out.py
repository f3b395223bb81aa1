"Training images judged by their strangest patches alone: what judging all patches says, to the last bit, after a look at few."
import numpy as np
import pytest
import torch

from patchcore_nb import left_out, strangest
from patchcore_nb.demo import demo_sample
from patchcore_nb.fitting import judge_left
from patchcore_nb.names import DISTANCES, PATCH_SCORES
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.scorer import highest, register_distance, register_patch_score, squared

SMALL = dict(resize=72, imagesize=64, pretrain_dim=32, target_dim=32, ratio=.1, device='cpu', num_workers=0)

@pytest.fixture(scope='module')
def cogs(): return [demo_sample('cog', 'train', i)[0] for i in range(24)]

def alike(images, **kw):
    "Both ways, held against one another; the model that looked at few."
    few, all_ = PatchCore(**SMALL | kw).fit(images), PatchCore(**SMALL | kw).fit(images, whole=True)
    a, b = few.left_out_, all_.left_out_
    assert a.patch_scores is None and b.patch_scores is not None and b.map_tops is None
    for name in ('numbers', 'image_scores', 'places', 'patches', 'nn_idxs'): assert torch.equal(getattr(a, name), getattr(b, name)), name
    tops = judge_left(all_.embedder_, all_.recipe, b)[1]
    assert torch.equal(a.map_tops, tops)
    assert few.calibration_ == all_.calibration_
    assert few.suspects().equals(all_.suspects())
    return few

@pytest.mark.parametrize('kw', [
    dict(), dict(distance='euclidean'), dict(distance='cosine', sampler='greedy_coreset'), dict(augment=True), dict(denoise=.1),
    dict(denoise=.1, augment=True), dict(sampler='random'), dict(sampler='identity'), dict(ratio=.01), dict(smoothing=0), dict(smoothing=20),
    dict(sampler='single_start_coreset', ratio=.3), dict(stride=2, patchsize=2), dict(resize=96, imagesize=(64, 88))], ids=str)
def test_few_patches_say_what_all_do(cogs, kw): alike(cogs, backbone='filterbank', **kw)

def test_noise_is_judged_alike():
    "Where nothing is like anything, and no bound is worth much."
    images = np.random.default_rng(0).integers(0, 256, (21, 64, 64, 3), np.uint8)
    alike(images, backbone='resnet18', weights='random')

def test_twins_are_judged_alike(cogs):
    "Each image twice: every patch is explained by the other."
    alike([*cogs[:12], *cogs[:12]], backbone='filterbank')

def test_of_a_large_memory_a_hundred_images_are_judged(cogs, monkeypatch):
    monkeypatch.setattr(left_out, 'MANY', 100)
    monkeypatch.setattr(left_out.torch, 'linspace', lambda first, last, n, real=torch.linspace: real(first, last, 20)) # twenty are a hundred
    assert len(alike(cogs, backbone='filterbank').left_out_.numbers) == 20

def test_few_are_few(cogs, monkeypatch):
    asked = []
    def counted(search, patches, *args, real=strangest.find_strangers):
        asked.append(len(patches))
        return real(search, patches, *args)
    monkeypatch.setattr(strangest, 'find_strangers', counted)
    m = PatchCore('filterbank', **SMALL | dict(resize=256, imagesize=224)).fit(cogs)
    assert len(m.memory_bank_) < sum(asked) < .25*m.bank_.n_patches

@pytest.mark.parametrize('kw', [dict(k=2), dict(patch_score='relative'), dict(patch_score='top1%'), dict(search='fast')], ids=str)
def test_what_needs_every_patch_gets_every_patch(cogs, kw):
    m = PatchCore('filterbank', **SMALL | kw).fit(cogs[:20])
    assert m.left_out_.patch_scores is not None and m.left_out_.map_tops is None

def test_what_is_registered_under_an_old_name_gets_every_patch(cogs):
    register_distance('squared')(lambda dists: -dists)
    register_patch_score('max')(lambda patch_scores: patch_scores.flatten(1)[:, 3])
    try:
        for kw in (dict(distance='squared', patch_score='mean'), dict(distance='euclidean')): assert PatchCore('filterbank', **SMALL | kw).fit(cogs[:6]).left_out_.patch_scores is not None
    finally: DISTANCES['squared'], PATCH_SCORES['max'] = squared, highest

def test_a_sampler_without_guesses_is_no_hindrance(cogs):
    from patchcore_nb.names import SAMPLERS
    from patchcore_nb.samplers import Sampled, register_sampler
    @register_sampler('every tenth')
    def every_tenth(rows, sizes, seed, show):
        none = torch.full((len(rows),), -1, dtype=torch.int32)
        return Sampled(torch.arange(sizes[-1])*(len(rows)//sizes[-1]), torch.full((sizes[-1],), torch.nan), [none]*len(sizes))
    try: alike(cogs, backbone='filterbank', sampler='every tenth')
    finally: del SAMPLERS['every tenth']
