"How many good images: nested subsets, embedded once, judged as a fit of its own would be."
import numpy as np
import pytest

from patchcore_nb.base import ArgumentError, DataError
from patchcore_nb.data import Category
from patchcore_nb.embedder import Embedder
from patchcore_nb.judging import judge
from patchcore_nb.learning_curve import FIGURES, draw_orders, learning_curve, plot_curve
from patchcore_nb.mvtec import mvtec
from patchcore_nb.patchcore import PatchCore

SMALL = dict(resize=64, imagesize=64, pretrain_dim=32, target_dim=32, ratio=.2, num_workers=0, device='cpu')

@pytest.fixture(scope='module')
def cog(demo_root):
    whole = mvtec(demo_root, 'cog')
    return Category(whole.dataset, whole.name, whole.train[:10], whole.test[::3])

@pytest.fixture
def seen(monkeypatch):
    "How many images every call of the network was given."
    counts = []
    def counting(self, images, least=1, real=Embedder.forward):
        counts.append(len(images))
        return real(self, images, least)
    monkeypatch.setattr(Embedder, 'forward', counting)
    return counts

def slow(kw, category, n, seed):
    "The metrics of a fit of its own."
    order = draw_orders(len(category.train), n, [seed])[seed]
    model = PatchCore(**kw | dict(seed=seed, false_alarms=None)).fit([category.train[i].path for i in order])
    return judge(model.predict(category.test), category.test), len(model.memory_bank_)

@pytest.mark.parametrize('kw', [dict(backbone='filterbank'), dict(backbone='resnet18'), dict(backbone='resnet18', augment=True), dict(backbone='resnet18', denoise=.1), dict(backbone='resnet18', preprocessing='conv')])
def test_each_row_is_that_of_a_fit(kw, cog, weights):
    kw = SMALL | kw | (dict(weights_dir=weights) if kw['backbone'] == 'resnet18' else {})
    for row in learning_curve(PatchCore(**kw), cog, [2, 5], [0, 3]).itertuples():
        want, n = slow(kw, cog, row.n_images, row.seed)
        assert n == row.n_patches
        for o in FIGURES: assert getattr(row, o) == pytest.approx(want[o], abs=1e-6), o

def test_every_image_is_embedded_once(cog, weights, seen):
    learning_curve(PatchCore('resnet18', weights_dir=weights, **SMALL), cog, [1, 2, 4], [0, 1, 2])
    wanted = set().union(*draw_orders(10, 4, [0, 1, 2]).values())
    assert sum(seen) == len(wanted)+len(cog.test)

def test_a_calibrated_backbone_sees_no_other_images(cog, seen):
    learning_curve(PatchCore('filterbank', **SMALL), cog, [1, 3], [0])
    assert sum(seen) == 1+3+2*len(cog.test)

def test_prefixes():
    assert draw_orders(30, 9, [4])[4][:5] == draw_orders(30, 5, [4])[4]
    assert draw_orders(30, 30, [4])[4] != draw_orders(30, 30, [5])[5] and sorted(draw_orders(30, 30, [4])[4]) == [*range(30)]

def test_model_is_not_changed(cog):
    model = PatchCore('filterbank', **SMALL)
    before = model.get_params()
    learning_curve(model, cog, [1], [7])
    assert not model.is_fitted and model.get_params() == before

@pytest.mark.parametrize('sizes, seeds, kw, says', [
    ([], [0], {}, 'at least one number'), ([11], [0], {}, 'from 1 to 10'), ([0], [0], {}, 'from 1'), ([1.5], [0], {}, 'whole number'), ([2], [], {}, 'seeds must name'),
    ([2], [0], dict(train_val_split=.5), 'train_val_split'), ([1, 9], [0], dict(denoise=.1), 'denoise'), ([1, 9], [0], dict(k=99), 'k')])
def test_what_cannot_be_had_is_refused_before_anything_is_embedded(cog, seen, sizes, seeds, kw, says):
    with pytest.raises(ArgumentError, match=says): learning_curve(PatchCore('filterbank', **SMALL | kw), cog, sizes, seeds)
    assert not seen

def test_no_test_images(cog):
    with pytest.raises(DataError, match='no test images'): learning_curve(PatchCore('filterbank', **SMALL), Category('mvtec', 'x', cog.train, []), [1])

def test_plot(cog):
    import matplotlib.pyplot as plt
    curve = learning_curve(PatchCore('filterbank', **SMALL), cog, [1, 2], [0, 1])
    axs = plot_curve(curve, 'a')
    plot_curve(curve, 'b', axs)
    assert [o.get_label() for o in axs[0].lines] == ['a', 'b'] and np.allclose(axs[0].lines[0].get_xdata(), [1, 2])
    plt.close('all')
