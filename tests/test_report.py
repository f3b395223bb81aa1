"The report of a run: one file that needs no other, in two languages, whatever the run was like."
import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from string import Formatter

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from patchcore_nb.core import ArgumentError
from patchcore_nb.data import load_category, make_miniature, read_masks
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.evaluation import evaluate
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.report import SIDE, TEXTS, metric_name, metric_text, render, section, svg_histogram, texts
from patchcore_nb.thresholds import Calibration

VOID = {'meta', 'img', 'br', 'hr', 'link', 'input', 'path', 'rect'}
HEAD = dict(command='patchcore_nb_run ...', date='2026-01-31', device='cpu', versions=dict(torch='2.9'), settings=dict(model=dict(k=1, layers=['a', 'b']), seed=0))
each_language = pytest.mark.parametrize('lang', TEXTS)


class Page(HTMLParser):
    "Tags with their attributes, the text; raises where tags do not close as they opened."
    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f'{self.open} were never closed'
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_endtag(self, tag):
        if tag in VOID: return
        assert self.open and self.open[-1] == tag, f'</{tag}> within {self.open}'
        self.open.pop()
    def handle_data(self, data):
        if not self.open or self.open[-1] != 'style': self.text.append(data)
    def all(self, tag): return [a for t, a in self.tags if t == tag]
    def words(self): return re.sub(r'\s+', ' ', ' '.join(self.text))


def metrics_of(seen, category, masks):
    labels = np.array([o.label for o in category.test])
    metrics = evaluate(seen.normalised_over_set().image_scores, labels, *((seen.normalised_over_set().anomaly_maps, masks) if masks is not None else ()))
    if seen.threshold is None: return metrics
    called = seen.verdicts.numpy()
    return metrics | dict(threshold=seen.threshold, false_alarms=called[~labels].mean(), missed=(~called[labels]).mean())

def judged(category, model=None, **kw):
    "A section of a small model."
    model = (model or PatchCore('filterbank', ratio=.05, target_dim=64, resize=64, imagesize=64, device='cpu')).fit(category)
    seen, masks = model.predict(category.test), read_masks(category.test, model.preprocess_)
    return section(model, category, seen, metrics_of(seen, category, masks), **kw)

@pytest.fixture(scope='module')
def cog(demo_root): return load_category('demo', demo_root, 'cog')

@pytest.fixture(scope='module')
def fitted(cog):
    model = PatchCore('filterbank', ratio=.02, target_dim=64, train_val_split=.5, device='cpu').fit(cog)
    return model, model.predict(cog.test), read_masks(cog.test, model.preprocess_)

@pytest.fixture(scope='module')
def full(cog, fitted):
    "A section in which nothing is left out."
    model, seen, masks = fitted
    metrics = metrics_of(seen, cog, masks) | dict(search_recall=.99987, my_own_metric=3.5, nothing=float('nan'))
    intervals = pd.DataFrame([dict(low=.81, high=.95)], ['image_auroc'])
    kinds = pd.DataFrame(dict(image_auroc=[.93, .92, .91]), ['broken_tooth', 'corrosion', 'scratch'])
    suspects = pd.DataFrame([dict(image=cog.train[2].path, score=12.25, row=3, col=4)])
    stages = [dict(stage='fit', seconds=1.5, peak_mb=100.), dict(stage='a stage', seconds=.5, peak_mb=None)]
    return section(model, cog, seen, metrics, masks=masks, intervals=intervals, kinds=kinds, suspects=suspects, stages=stages)

@pytest.fixture(scope='module')
def tile(tmp_path_factory): return load_category('mvtec', make_miniature(tmp_path_factory.mktemp('tile'), n_train=3), 'tile')


def fields(text): return sorted(name for _, name, _, _ in Formatter().parse(text) if name)

def test_languages_say_the_same_things():
    first, *others = TEXTS.values()
    for o in others: assert {k: fields(v) for k, v in o.items()} == {k: fields(v) for k, v in first.items()}
    for o in TEXTS.values(): assert not [k for k, v in o.items() if not isinstance(v, str) or not v and k != 'gap']
    assert [k for k, v in TEXTS['zh'].items() if v == TEXTS['en'][k]] == ['metric_aupro', 'metric_aupimo', 'metric_seg_f1'] # all the rest is translated
    assert not [v for v in TEXTS['zh'].values() if re.search(r'[一-鿿][,;:?!]', v)], 'Chinese takes full-width punctuation'

def test_a_language_may_be_added(full):
    TEXTS['xx'] = texts('en')|dict(title='Rapport')
    try: assert '<title>Rapport</title>' in render([full], {}, 'xx')
    finally: del TEXTS['xx']

def test_an_unknown_language_is_refused(full):
    with pytest.raises(ArgumentError, match=r"unknown lang 'cn'.*en, zh"): render([full], HEAD, 'cn')


@each_language
def test_a_page_needs_no_other_file(full, lang):
    html = render([full, full], HEAD, lang)
    page = Page(html)
    assert html.startswith('<!DOCTYPE html>') and page.all('html')[0]['lang'] == texts(lang)['tag'] and page.all('title')
    assert not page.all('script') and not page.all('link') and "default-src 'none'" in html
    links = [a[k] for _, a in page.tags for k in ('src', 'href') if k in a]
    ids = {a['id'] for _, a in page.tags if 'id' in a}
    assert links and not [o[:80] for o in links if not o.startswith('data:image/jpeg;base64,') and o.lstrip('#') not in ids]
    assert not re.search(r'url\(|@import', html)
    assert {o.replace('http://www.w3.org/2000/svg', '') for o in re.findall(r'https?://[^"\s<]*', html)} <= {''} # the name of SVG is no address

@each_language
def test_pictures_open_and_say_what_they_are(full, lang):
    page = Page(render([full], HEAD, lang))
    pictures = page.all('img')
    assert len(pictures) == 1 + 4*sum(map(len, full['pictures'].values())) + 4*len(full['matches']) + len(full['suspects'])
    for o in pictures:
        im = Image.open(io.BytesIO(base64.b64decode(o['src'].partition(',')[2], validate=True)))
        im.load()
        assert max(im.size) <= SIDE and 'alt' in o
    assert [o['alt'] for o in pictures].count('') == 1 # the scale of colours, between its two numbers
    assert len(page.all('svg')) == 3 + len(full['kinds']) + len(full['stages'])
    assert all(o.get('aria-label') or o.get('aria-hidden') for o in page.all('svg'))

@each_language
def test_every_metric_is_there(full, lang):
    t, words = texts(lang), Page(render([full], HEAD, lang)).words()
    for k, v in full['metrics'].items(): assert f'{metric_name(k, t)} {metric_text(k, v)}' in words
    for o in ('0.8100 – 0.9500', 'my own metric 3.5', 'nothing –', '99.987%', '0.9300', '12.25', 'a stage', 'patchcore_nb_run ...', 'torch 2.9', 'model.layers', 'demo_cog'): assert o in words
    assert 'nan' not in words.lower() and 'None' not in words
    assert t['promise_average'].format(rate=5.) in words
    good, bad = [o for o in full['kinds'] if not o['label']], [o for o in full['kinds'] if o['label']]
    assert t['false_alarms'].format(k=good[0]['called'], n=9) in words
    assert t['missed'].format(k=15-sum(o['called'] for o in bad), n=15) in words

def test_the_mean_is_over_those_that_have_the_metric(full):
    other = json.loads(json.dumps(full)) | dict(category='other')
    other['metrics'] |= dict(image_auroc=.5, pixel_auroc=None)
    words = Page(render([full, other], HEAD)).words()
    mean = re.search(r'Mean ([\d.]+) ([\d.]+) ', words)
    assert mean[1] == f"{(full['metrics']['image_auroc']+.5)/2:.4f}" and mean[2] == f"{full['metrics']['pixel_auroc']:.4f}"

def test_a_section_is_json(full):
    text = json.dumps(full, allow_nan=False)
    assert json.loads(text) == full and len(text) < 1_000_000
    assert all(len(o[0]) <= 400 for o in full['curves'].values())
    assert render([json.loads(text)], HEAD) == render([full], HEAD)

def test_a_section_of_the_version_before_is_still_read(full):
    old = full|dict(pictures={{'false_alarms': 'rings'}.get(k, k): v for k, v in full['pictures'].items()})
    assert 'rings' in old['pictures'] and render([old], HEAD) == render([full], HEAD)

def test_what_predictions_may_say(cog, fitted):
    model, seen, masks = fitted
    told = replace(seen, calibration=Calibration([1., 2.], None, 'confidence', 5., 77.25))
    words = Page(render([section(model, cog, told, {}, masks=masks)], HEAD, 'en')).words()
    assert 'with a confidence of 90%' in words and 'at or below 5%' in words and 'Pixels above 77.25' in words and '· p ' in words
    told = replace(told, calibration=replace(told.calibration, promise='one of its {own}'))
    assert 'one of its {own}' in Page(render([section(model, cog, told, {}, masks=masks)], {}, 'zh')).words()


@each_language
def test_whatever_is_given_is_escaped(full, lang):
    bad = '</script><img src=x onerror=alert(1)>&"\'齿轮{{ 7*7 }}'
    def spoil(o):
        if isinstance(o, dict): return {bad if k == 'my_own_metric' else k: spoil(v) for k, v in o.items()}
        if isinstance(o, list): return [spoil(v) for v in o]
        return bad if isinstance(o, str) and not o.startswith('data:') and o != 'good' else o
    page = Page(render([spoil(full)], dict(command=bad, title=bad, device=bad, settings={bad: [bad]}) | {bad: bad}, lang))
    assert not page.all('script') and not [o for o in page.all('img') if not o['src'].startswith('data:') or 'onerror' in o]
    assert page.words().count(bad) > 20 and '49' not in re.findall(r'齿轮(\S+)', page.words())


@each_language
def test_a_category_of_good_images_alone(tile, lang):
    only = replace(tile, test=[o for o in tile.test if not o.label])
    s = judged(only)
    words = Page(render([s], {}, lang)).words()
    assert s['curves'] == dict(image_roc=None, pixel_roc=None, pro=None) and not s['pictures']['hits'] and len(s['pictures']['false_alarms']) == 2
    assert texts(lang)['no_threshold'] in words and texts(lang)['curves'] not in words.split()

@each_language
def test_a_category_without_masks(tile, lang):
    s = judged(replace(tile, test=[replace(o, mask=None) for o in tile.test]))
    page = Page(render([s], {}, lang))
    assert s['curves']['image_roc'] and not s['curves']['pro'] and s['metrics']['aupro'] is None
    assert page.words().count(texts(lang)['no_mask']) == 2 and texts(lang)['pro'] not in page.words()

def test_some_masks_are_shown_where_others_are_missing(tile):
    bad = [o for o in tile.test if o.label]
    with pytest.warns(UserWarning, match='have no mask') as said: s = judged(replace(tile, test=[replace(o, mask=None) if o == bad[0] else o for o in tile.test]))
    assert len([o for o in said if 'no mask' in str(o.message)]) == 1 # said by whoever judges, and not again
    assert sum(o['squares'][1] is None for k in ('faint', 'hits') for o in s['pictures'][k]) == 1

@each_language
def test_an_ensemble(tile, lang):
    kw = dict(ratio=.1, target_dim=32, resize=64, imagesize=64, device='cpu')
    s = judged(tile, Ensemble([PatchCore('filterbank', ['layer2'], **kw), PatchCore('filterbank', ['layer3'], **kw)]), suspects=pd.DataFrame([dict(image=tile.train[0].path, score=1., row=1, col=1)]))
    assert s['matches'] == [] and len(s['model']['patches']) == 2
    assert texts(lang)['matches'] not in Page(render([s], {}, lang)).words()

@pytest.mark.parametrize('value', [0., 1e-30, 1e17])
def test_scores_that_are_all_alike(value):
    assert 'nan' not in svg_histogram({'good': [value]*3, 'defective': [value]}, value, 'threshold')

def test_nothing_at_all():
    assert Page(render([], {})).words()

def test_large_pictures_come_out_small(tmp_path):
    category = load_category('mvtec', make_miniature(tmp_path, n_train=2, size=(700, 500)), 'tile')
    s = judged(category, PatchCore('filterbank', ratio=.01, target_dim=16, resize=(560, 400), imagesize=None, device='cpu'), suspects=pd.DataFrame([dict(image=category.train[0].path, score=1.)]))
    assert s['model']['size'] == [560, 400] and len(json.dumps(s)) < 1_000_000
    for o in re.findall(r'data:image/jpeg;base64,([^"]*)', json.dumps(s)): assert max(Image.open(io.BytesIO(base64.b64decode(o))).size) <= SIDE

def test_fifteen_categories_can_be_mailed(full):
    html = render([full]*15, HEAD)
    assert len(html) < 12_000_000
    assert len(Page(html).all('section')) == 17 # with summary and settings


@pytest.fixture(scope='module')
def browser():
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: the page is not looked at in a browser')
    with sync.sync_playwright() as p:
        own = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None) # None: the one that playwright installs
        try: found = p.chromium.launch(executable_path=own)
        except Exception as e: pytest.skip(f'playwright finds no Chromium ({str(e).splitlines()[0]}): the page is not looked at in a browser')
        yield found
        found.close()

@pytest.mark.parametrize('width,scheme', [(1200, 'light'), (1200, 'dark'), (390, 'light')])
@each_language
def test_in_a_browser(full, browser, tmp_path, lang, width, scheme):
    (tmp_path/'report.html').write_text(render([full, full], HEAD, lang), encoding='utf-8')
    page, said, fetched = browser.new_page(viewport=dict(width=width, height=800), color_scheme=scheme), [], []
    page.on('console', lambda o: said.append(o.text))
    page.on('request', lambda o: fetched.append(o.url))
    page.goto((tmp_path/'report.html').as_uri())
    assert not said and not [o for o in fetched if not o.startswith(('data:', 'file:'))]
    assert page.evaluate('[...document.images].every(o => o.complete && o.naturalWidth)')
    assert page.evaluate('document.documentElement.scrollWidth') <= width # only tables scroll sideways
    light = page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
    assert light == (scheme == 'light')
    page.emulate_media(media='print', color_scheme=scheme)
    assert page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)' # paper is white
    page.close()
