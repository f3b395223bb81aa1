"The widgets without a browser: controls are set and pictures clicked from Python. And what they show, without widgets."
import io
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from patchcore_nb import Category, PatchCore, load_category
from patchcore_nb.board import counts_html, outcomes, roc_point, roc_svg, tally
from patchcore_nb.explore import draw_seen
from patchcore_nb.plots import plot_prediction
from patchcore_nb.reasons import explain, layer_parts, layer_spans, patch_at

ROOT = Path(__file__).resolve().parents[1]


def fresh(code:str)->list[str]:
    "What a new Python prints."
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()

def timed(f): # seconds
    start = time.perf_counter()
    f()
    return time.perf_counter()-start

def test_widgets_are_loaded_when_asked_for():
    watched = '*[o for o in ("torch", "numpy", "pandas", "matplotlib", "ipywidgets", "anywidget", "IPython") if o in sys.modules]'
    assert fresh(f'import sys, patchcore_nb; print({watched})') == []
    assert 'ipywidgets' not in fresh(f'import sys; from patchcore_nb import *; import patchcore_nb.cli, patchcore_nb.explore, patchcore_nb.reasons, patchcore_nb.playground, patchcore_nb.verdicts; print({watched})')
    assert fresh('import sys; from patchcore_nb import explorer, why, coreset_playground, feature_lab, labeller; print("ipywidgets" in sys.modules)') == ['True']

def test_the_front_door_is_light():
    "Python with the package is up before Python with NumPy alone."
    assert min(timed(lambda: fresh('import patchcore_nb')) for _ in range(3)) < min(timed(lambda: fresh('import numpy')) for _ in range(3))

def test_what_is_shown_needs_no_widgets():
    "Every computation, with ipywidgets out of reach."
    code = '''
import sys
for o in ("ipywidgets", "anywidget"): sys.modules[o] = None
import tempfile, numpy as np
from PIL import Image
from patchcore_nb import PatchCore
from patchcore_nb.demo import demo_sample
from patchcore_nb.explore import *
from patchcore_nb.reasons import *
from patchcore_nb.verdicts import *
images = [demo_sample("cog", "train", i)[0] for i in range(4)]
model = PatchCore("filterbank", ratio=.01, target_dim=64, false_alarms=.3).fit(images)
seen = model.predict([demo_sample("cog", "test", i)[0] for i in (0, 13)])
shown = exhibit(seen, [False, True])
print(draw_seen(shown, 1, 5.).size, len(explain(model, seen, 1, 3, 3)), explain_html(model, seen, 1, 3, 3, images).count("<img"), tally(outcomes(shown.scores, shown.labels, -1))["caught"])
'''
    assert fresh(code) == ['(448,', '448)', '4', '5', '1']


@pytest.fixture(scope='module')
def category(demo_root): return load_category('demo', demo_root, 'sieve')

@pytest.fixture(scope='module')
def fitted(category):
    "A model, the images that it was fitted on, and what it says of the test images."
    train = category.train[:20]
    model = PatchCore('filterbank', ratio=.02, target_dim=128, k=2).fit(train)
    return model, train, model.predict(category.test)

def read(b:bytes)->np.ndarray: return np.asarray(Image.open(io.BytesIO(b)).convert('RGB'))


def test_the_explorer_follows_the_threshold(category, fitted):
    from patchcore_nb import explorer
    _, _, seen = fitted
    view = explorer(seen, category.test).view
    labels = np.array([o.label for o in category.test])
    for t in np.quantile(seen.image_scores, (.1, .4, .8)):
        view.p['threshold'].value = float(t)
        counts = tally(outcomes(seen.image_scores, labels, view.p['threshold'].value))
        assert view.p['counts'].value == counts_html(counts)
        assert view.p['roc'].value == roc_svg(view.curve, roc_point(counts), view.area)
        picture = read(view.p['picture'].value)
        wanted = np.asarray(draw_seen(view.shown, view.image, view.p['threshold'].value))
        assert picture.shape == wanted.shape and abs(picture.astype(int)-wanted).mean() < 4 # a JPEG of it

def test_a_change_is_shown_at_once(category, fitted):
    "All views worked out and written, in half the time of one matplotlib figure."
    from patchcore_nb import explorer
    p = explorer(fitted[2], category.test).view.p
    def figure():
        plot_prediction(fitted[2], 0)
        plt.savefig(io.BytesIO(), format='png')
        plt.close()
    changes = [timed(lambda: p['threshold'].set_trait('value', float(t))) for t in np.linspace(p['threshold'].min, p['threshold'].max, 21)]
    assert np.median(changes) < .5*np.median([timed(figure) for _ in range(5)])

def test_the_strip_and_the_keys_walk_through_the_order(category, fitted):
    from patchcore_nb import explorer
    view = explorer(fitted[2], category.test).view
    ranked = fitted[2].image_scores.argsort(descending=True, stable=True).tolist()
    view.p['strip'].clicked = dict(x=.99, y=.5, n=1)
    assert view.image == ranked[8]
    view.p['strip'].clicked = dict(x=.99, y=.5, n=2) # the strip has moved on
    assert view.image == ranked[12]
    view.p['picture'].pressed = dict(key='ArrowLeft', n=1)
    assert view.image == ranked[11]
    view.p['order'].value = 'lowest score first'
    assert view.image == ranked[-1] and view.p['at'].value == 0

def test_opacity_and_mask_are_drawn(category, fitted):
    from patchcore_nb import explorer
    p = explorer(fitted[2], category.test).view.p
    before = p['picture'].value
    p['mask'].value = False
    without = p['picture'].value
    p['opacity'].value = 0
    assert len({before, without, p['picture'].value}) == 3

def test_a_click_on_the_map_asks_why(category, fitted):
    from patchcore_nb import why
    model, train, seen = fitted
    view = why(model, seen, 5, train, category.test).view
    view.picture.clicked = dict(x=.3, y=.8, n=1)
    row, col = patch_at(model, .3, .8)
    assert (view.row.value, view.col.value) == (row, col)
    table = explain(model, seen, 5, row, col)
    assert all(f'training image {i}<br>row {r}, column {c}' in view.reason.value for i, r, c in table[['image', 'row', 'col']].values.tolist())
    assert view.reason.value.count('<img') == 5
    assert table.distance[:2].mean() == pytest.approx(float(seen.patch_scores[5, row, col]), rel=1e-3)

@pytest.mark.parametrize('settings', [{}, dict(distance='euclidean'), dict(distance='cosine', k=3), dict(patchsize=4), dict(more_patchsizes=(5,)), dict(stride=2), dict(imagesize=(192, 224)), dict(pretrain_dim=None, target_dim=None), dict(aggregation='mlp')], ids=str)
def test_why_agrees_with_the_score(category, settings):
    "Whatever the model is like, its score is explained: the parts add up to the distances, and these to the score."
    from patchcore_nb.scorer import DISTANCES
    model = PatchCore(**dict(backbone='filterbank', ratio=.02, target_dim=100, false_alarms=None) | settings).fit(category.train[:3])
    seen = model.predict(category.test[:1])
    h, w = model.grid_
    table = explain(model, seen, 0, h-1, w//2, n=3)
    assert table.iloc[:, 5:].sum(axis=1).to_numpy() == pytest.approx(table.distance.to_numpy(), rel=1e-3, abs=1e-4)
    assert float(DISTANCES[model.distance](torch.tensor(table.distance[:model.k].to_numpy())).mean()) == pytest.approx(float(seen.patch_scores[0, h-1, w//2]), rel=1e-2)
    assert patch_at(model, 1, 1) == (h-1, w-1) and patch_at(model, 0, 0) == (0, 0)
    spans = layer_spans(model)
    assert min(a for a, _ in spans.values()) == 0 and max(b for _, b in spans.values()) == model.dim_
    assert sum(layer_parts(torch.ones(1, model.dim_), spans).values()).item() == model.dim_

def test_one_image_and_no_truth(category, fitted):
    from patchcore_nb import explorer
    for samples in (None, [True], [False]):
        view = explorer(fitted[0].predict(category.test[:1]), samples).view
        view.p['threshold'].value = view.p['threshold'].min
        assert view.p['roc'].value == ''


def test_the_playground_shows_every_size(category):
    from patchcore_nb import coreset_playground
    view = coreset_playground(PatchCore('filterbank', target_dim=64), Category('demo', 'sieve', category.train[:4], category.test[::3]), (.002, .01, .03)).view
    seen = set()
    for i in range(3):
        view['ratio'].value = i
        seen.add((view['said'].value, view['radius'].value, view['picture'].value))
    assert len(seen) == 3

def test_the_lab_is_what_a_model_gives(category):
    from patchcore_nb.playground import Lab, Setting, judge_setting
    small = Category('demo', 'sieve', category.train[:4], category.test[::4])
    lab = Lab(small, PatchCore(target_dim=64, ratio=.05, false_alarms=None), ('layer2', 'layer3'))
    for s in (Setting(), Setting(layers=('layer3',), patchsize=5, k=4, patch_score='mean', smoothing=0.), Setting(layers=('layer2',), k=2, patch_score='reweighted')):
        model = PatchCore(s.backbone, s.layers, patchsize=s.patchsize, k=s.k, patch_score=s.patch_score, smoothing=s.smoothing, target_dim=64, ratio=.05, false_alarms=None).fit(small)
        want, got = model.predict(small.test), judge_setting(lab, s).prediction
        assert torch.allclose(got.image_scores, want.image_scores, rtol=1e-3) and torch.allclose(got.anomaly_maps, want.anomaly_maps, rtol=1e-3, atol=1e-3)


def test_what_is_labelled_is_what_is_read(tmp_path):
    from patchcore_nb import labeller
    for i in range(7): Image.new('RGB', (40, 30+i), (20*i, 80, 80)).save(tmp_path/f'p{i}.png')
    view = labeller(tmp_path).view
    for key in 'ggggg': view.picture.pressed = dict(key=key, n=view.at.value)
    view.kind.value = 'loose, thread'
    view.picture.pressed = dict(key='d', n='x')
    read = load_category('csv', tmp_path/'verdicts.csv', 'p')
    assert {o.path.name: o.kind for o in [*read.train, *read.test]} == {**{f'p{i}.png': 'good' for i in range(5)}, 'p5.png': 'loose, thread'}
    assert view.at.value == 6 and labeller(tmp_path).view.at.value == 6 # where one goes on
    assert 'loose, thread' in labeller(tmp_path).view.kind.options

def test_an_image_that_cannot_be_read_is_said_to_be_so(tmp_path):
    from patchcore_nb import labeller
    Image.new('RGB', (40, 30)).save(tmp_path/'a.png')
    (tmp_path/'b.png').write_bytes(b'no image')
    view = labeller(tmp_path).view
    view.at.value = 1
    assert 'b.png is not an image' in view.error.value
    view.at.value = 0
    assert view.error.value == ''

def test_an_order_by_outcome_follows_the_threshold(category, fitted):
    from patchcore_nb import explorer
    view = explorer(fitted[2], category.test).view
    view.p['threshold'].value = view.p['threshold'].max
    view.p['order'].value = 'missed'
    missed = sum(o.label for o in category.test)
    assert len(view.order) == missed and view.p['at'].max == missed-1
    view.p['at'].value = 3
    image = view.image
    view.p['threshold'].value = float(view.shown.scores[image]) # it is missed still
    assert view.image == image and 'missed' in view.p['title'].value and all(view.found[i] == 'missed' for i in view.order)
    view.p['threshold'].value = view.p['threshold'].min
    assert view.order == [] and view.image is None and 'no such image' in view.p['title'].value

def test_a_laboratory_refuses_what_it_would_ignore(category):
    from patchcore_nb.core import ArgumentError
    from patchcore_nb.playground import Lab
    for kw in (dict(denoise=.1), dict(augment=True), dict(train_val_split=.5), dict(search='fast')):
        with pytest.raises(ArgumentError, match='leave it out'): Lab(category, PatchCore(**kw))


def test_old_names_are_found_with_a_word():
    import patchcore_nb.explore
    from patchcore_nb import reasons
    with pytest.warns(DeprecationWarning, match='reasons.explain'): assert patchcore_nb.explore.explain is reasons.explain
    assert patchcore_nb.explore.tally is tally

def test_a_page_without_python_shows_the_pictures(category, fitted):
    "Each of the instruments is HTML as well, for whoever opens the notebook and runs nothing."
    from patchcore_nb import explorer, why
    model, train, seen = fitted
    looking, asking = explorer(seen, category.test), why(model, seen, 5, train, category.test)
    for widget, pictures in ((looking, 2), (asking, 6)):
        shown = widget._repr_mimebundle_()
        assert shown['text/html'].count('<img') == pictures and len(shown['text/html']) < 200_000 and len(shown['text/plain']) < 200
        assert 'application/vnd.jupyter.widget-view+json' in shown
    assert f"threshold: {looking.view.p['threshold'].value:.4g}" in looking._repr_mimebundle_()['text/html']
