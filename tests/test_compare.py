"Two runs side by side: `patchcore_nb_compare` and what is behind it, on folders made by hand and on those of real runs."
import importlib
import io
import json
import shutil
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from patchcore_nb import PatchCore
from patchcore_nb.compared import compare_main
from patchcore_nb.comparison import compare_runs, plot_comparison
from patchcore_nb.core import ArgumentError, DataError
from patchcore_nb.data import load_category
from patchcore_nb.experiment import run
from patchcore_nb.read_back import read_results
from patchcore_nb.results import add_rows, with_mean, write_results, write_table, write_tables
from patchcore_nb.results_folder import write_json
from patchcore_nb.seeds import run_seeds

KEYS = ['mvtec_bottle', 'mvtec_nut']


def report(bottle, nut, **more): return pd.DataFrame(dict(image_auroc=[bottle, nut], **more), KEYS)

def one(folder, table, half=.02):
    "The folder of one seed; with intervals unless `half` is None."
    write_tables(folder, table)
    if half is not None:
        for key, row in table.iterrows(): add_rows(folder/'intervals.csv', key, pd.DataFrame(dict(value=row, low=row-half, high=row+half)))
    return folder

def several(folder, tables):
    "The folder of several seeds, 0, 1 and so on."
    write_tables(folder, tables[0])
    write_table(pd.concat([with_mean(o).assign(seed=i) for i, o in enumerate(tables)]), folder/'seeds.csv', index_label='category')
    return folder

def asked(folder, complete=True, metrics=None, **settings):
    write_json(dict(settings=settings, surroundings=dict(torch='2.6'), complete=complete, metrics=metrics or {}), folder)

@pytest.fixture
def pair(tmp_path):
    a = one(tmp_path/'a', report(.90, .80, aupro=[.5, .6]))
    return a, one(tmp_path/'b', report(.91, .95, aupro=[.5, .6]))

@pytest.fixture
def call(capsys, monkeypatch):
    "Run the program; status, standard error, standard output."
    monkeypatch.delenv('PATCHCORE_NB_DEBUG', raising=False)
    def go(*words):
        with pytest.raises(SystemExit) as e: compare_main(list(map(str, words)))
        out = capsys.readouterr()
        return e.value.code, out.err, out.out
    return go

def refused(answer, status, *words):
    code, err, out = answer
    assert code == status and err.startswith('error: ') and err.count('\n') == 1 and not out, answer
    for o in words: assert o in err, err


# What is marked

def test_intervals_of_single_seeds(pair):
    found = compare_runs(*pair)
    table = found.of('image_auroc')
    assert table.beyond.tolist() == [False, True, True]
    assert np.allclose(table.high['mvtec_bottle']-.01, .02*2**.5) and np.allclose(table.low['Mean'], .08-.02*2**.5/2**.5)
    assert any("both 95% intervals put together" in o and 'of intervals.csv (A)' in o for o in found.notes)

def test_seeds(tmp_path):
    a = several(tmp_path/'a', [report(.90, .80), report(.91, .81), report(.92, .82)])
    b = several(tmp_path/'b', [report(.90, .85), report(.92, .86)])
    found = compare_runs(a, b)
    from scipy.stats import ttest_ind
    theirs = ttest_ind([.85, .86], [.80, .81, .82], equal_var=False).confidence_interval(.95)
    assert np.allclose(found.table.loc[('image_auroc', 'mvtec_nut'), ['low', 'high']].astype(float), theirs)
    assert found.of('image_auroc').beyond.tolist() == [False, True, False]
    assert 'only in A: seeds 2' in found.notes and any("Welch's" in o and 'from 3 seeds (A) and 2 seeds (B)' in o for o in found.notes)

def test_seeds_against_one(tmp_path):
    a = several(tmp_path/'a', [report(.90, .80), report(.91, .81), report(.92, .82)])
    found = compare_runs(a, one(tmp_path/'b', report(.91, .95)))
    reach = 4.302653*.01/3**.5
    assert np.allclose(found.table.low.iloc[1], .95-.81-(reach**2+.02**2)**.5) and found.of('image_auroc').beyond.tolist() == [False, True, True]
    assert any('from 3 seeds (A) and the intervals of intervals.csv (B)' in o for o in found.notes)

@pytest.mark.parametrize('bare', ['ab', 'b'])
def test_nothing_is_marked_without_a_spread(tmp_path, bare):
    a, b = (one(tmp_path/o, report(.9, i/2), None if o in bare else .02) for i, o in enumerate('ab'))
    found = compare_runs(a, b)
    assert found.table.beyond.isna().all() and '*' not in repr(found).split('\n\n')[1]
    assert f"spread: not known, and nothing is marked: {' and '.join(bare.upper())} with one seed and without intervals.csv" in found.notes

def test_a_lone_unknown_interval_stays_unmarked(tmp_path):
    a = one(tmp_path/'a', report(.9, .5, aupro=[.5, .5]))
    b = one(tmp_path/'b', report(.9, .9, aupro=[.9, .9]))
    table = pd.read_csv(b/'intervals.csv')
    table.loc[(table.name == 'aupro') & (table.category == 'mvtec_nut'), 'high'] = np.nan
    table.to_csv(b/'intervals.csv', index=False)
    found = compare_runs(a, b).of('aupro')
    assert found.beyond['mvtec_bottle'] and found.beyond[['mvtec_nut', 'Mean']].isna().all() and found.loc['mvtec_nut', ['low', 'high']].isna().all()

def test_metrics_that_are_missing_for_some(tmp_path):
    "The mean is over what both have; a metric that is empty in one of the two is not compared."
    a = one(tmp_path/'a', report(.9, .8, pixel_auroc=[.9, np.nan], aupro=[.1, .1]))
    b = one(tmp_path/'b', report(.9, .8, pixel_auroc=[.5, .7], aupro=[np.nan]*2))
    found = compare_runs(a, b)
    pixel = found.of('pixel_auroc')
    assert pixel.a['Mean'] == .9 and pixel.b['Mean'] == .5 and np.isnan(pixel.difference['mvtec_nut']) and pixel.b['mvtec_nut'] == .7
    assert 'only in A: metrics aupro' in found.notes and list(found.table.index.unique('metric')) == ['image_auroc', 'pixel_auroc']

def test_categories_that_one_has(tmp_path):
    a, b = one(tmp_path/'a', report(.9, .8)), one(tmp_path/'b', report(.9, .8).iloc[1:])
    found = compare_runs(a, b)
    assert found.of('image_auroc').index.tolist() == ['mvtec_nut', 'Mean'] and found.of('image_auroc').a['Mean'] == .8
    assert {'only in A: categories mvtec_bottle', 'Mean: over the categories that both have, 1 of 2'} <= {*found.notes}

def test_the_same_folder_twice(pair, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err, out = call('a', tmp_path/'b'/'..'/'a')
    assert code == 0 and not err and 'A and B are the same folder: nothing differs' in out and '0 of 3 differences' in out


# What differs beside the metrics

def test_settings(pair):
    a, b = pair
    files = dict(categories=KEYS, n_images=[[9, 9]]*2)
    asked(a, model=dict(ratio=.1, seed=0), weights=None, samples_sha256=['x', 'y'], **files)
    asked(b, model=dict(ratio=.01, seed=1), weights='w', samples_sha256=['x', 'z'], complete=False, **files)
    notes = compare_runs(a, b).notes
    assert "settings: model.ratio 0.1 -> 0.01, weights None -> 'w'" in notes and 'images: others, or elsewhere, in mvtec_nut' in notes
    assert notes[0].endswith('(2 categories, seed 0)') and notes[1].endswith('(2 categories, seed 1); the run has not come to its end')

@pytest.mark.parametrize('text', ['', '{', '[]', '{"complete": true}', '{"complete": true, "settings": [], "metrics": {}}'])
def test_settings_that_cannot_be_read(pair, call, text):
    (pair[0]/'run.json').write_text(text)
    asked(pair[1], model={})
    code, err, out = call(*pair)
    assert code == 0 and not err and 'settings: not compared, for want of a run.json that can be read in A' in out

@pytest.mark.parametrize('settings', [{}, dict(model=3), dict(model=[]), dict(model=[3, {}]), dict(model={}, categories=3, n_images={}), dict(categories=[[]], n_images=[[]], samples_sha256=[{}])])
def test_odd_settings(pair, settings):
    asked(pair[0], **settings)
    asked(pair[1], model=dict(k=1))
    assert compare_runs(*pair).notes

def test_a_folder_of_the_reference(tmp_path, pair):
    (tmp_path/'theirs').mkdir()
    write_results(with_mean(report(.91, .85, pixel_auroc=[.9, .8])), tmp_path/'theirs'/'results.csv')
    found = compare_runs(tmp_path/'theirs', pair[1])
    assert np.allclose(found.of('image_auroc').difference, [0, .1, .05]) and 'A with one seed' in found.notes[-1]

def test_a_spreadsheet_has_saved_it(pair):
    text = (pair[0]/'metrics.csv').read_text()
    (pair[0]/'metrics.csv').write_bytes(b'\xef\xbb\xbf'+text.replace('\n', '\r\n').encode())
    assert compare_runs(*pair).of('image_auroc').a.tolist()[:2] == [.9, .8]


# What is shown and written

def test_metrics_to_be_shown(pair, call):
    shown = call(*pair)[2]
    assert 'image_auroc ' in shown and '\naupro ' not in shown and 'more: aupro (--metric NAME, or --metric all)' in shown
    assert '\naupro ' in call(*pair, '-m', 'aupro')[2] and '\nimage_auroc ' not in call(*pair, '--metric', 'aupro')[2]
    for words in (['all'], ['aupro', '-m', 'image_auroc']): assert 'more:' not in call(*pair, '-m', *words)[2]
    refused(call(*pair, '-m', 'aurpo'), 2, "unknown metric 'aurpo': did you mean 'aupro'", 'known: image_auroc, aupro, all')

def test_the_file(pair, call, tmp_path):
    place = tmp_path/'new'/'compared.csv'
    code, _, out = call(*pair, '-o', place)
    table = pd.read_csv(place)
    assert code == 0 and out.rstrip().endswith(f'table: {place}') and len(table) == 6 and table.beyond.tolist() == [0, 1, 1, 0, 0, 0]
    assert np.allclose(table.difference, table.b-table.a) and not [o for o in place.parent.iterdir() if o != place]
    assert place.read_bytes() == (call(*pair, '-o', place, '-m', 'aupro'), place.read_bytes())[1] # whatever is shown

def test_a_run_is_not_written_over(pair, call):
    before = {o: o.read_bytes() for o in pair[0].iterdir()}
    for name in ('results.csv', 'metrics.csv', 'intervals.csv'): refused(call(*pair, '-o', pair[0]/name), 2, '-o must not replace what a run has written', 'pass another name')
    refused(call(*pair, '-o', pair[1]), 2, '-o must be a file, got the folder')
    refused(call(*pair, '-o', pair[0]/'metrics.csv'/'x.csv'), 1, 'cannot be written')
    assert {o: o.read_bytes() for o in pair[0].iterdir()} == before
    for _ in range(2): assert call(*pair, '-o', pair[0]/'compared.csv')[0] == 0 # its own is replaced

def test_nothing_is_written_if_it_fails(pair, call, tmp_path):
    for words in (['-m', 'nonsense'], []):
        if not words: (pair[1]/'metrics.csv').write_text('category\n')
        assert call(*pair, *words, '-o', tmp_path/'x.csv')[0] and not (tmp_path/'x.csv').exists()

def test_names_of_any_kind(tmp_path, call):
    "No formula in the file, no command to the terminal, no HTML in the page, and each name as it was."
    names = ['=1+1', 'a\x1b[31m', '<b>$x$', '\u202egnp', 'Mean?', 'a,"b"\nc']
    table = pd.DataFrame(dict(image_auroc=np.linspace(.5, .9, len(names))), names)
    a, b = one(tmp_path/'a', table), one(tmp_path/'b', table+.05)
    found = compare_runs(a, b)
    assert found.of('image_auroc').index.tolist() == [*names, 'Mean']
    code, _, out = call(a, b, '-o', tmp_path/'c.csv')
    written = (tmp_path/'c.csv').read_text(encoding='utf-8')
    assert code == 0 and '\x1b' not in out+written and ',=1' not in written and '\u202e' not in out+written
    assert '<b>$' not in found._repr_html_() and '&lt;b&gt;' in found._repr_html_()
    plot_comparison(found).figure.canvas.draw()

def test_a_narrow_terminal_of_ascii(tmp_path, monkeypatch):
    table = pd.DataFrame(dict(image_auroc=[.5, .9]), ['mvtec_\u87ba\u4e1d', 'mvtec_metal_nut'])
    a, b = one(tmp_path/'a', table), one(tmp_path/'b', table+.05)
    plain = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', plain)
    with pytest.raises(SystemExit) as e: compare_main([str(a), str(b)])
    plain.flush()
    out = plain.buffer.getvalue().decode('ascii')
    assert e.value.code == 0 and '\\u87ba' in out and max(map(len, out.split('\n\n')[1].splitlines())) < 80

def test_it_shows_itself(pair):
    found = compare_runs(*pair)
    assert repr(found).count('*') == 3 and found._repr_html_().count('</b> *') == 2 and 'aupro' not in repr(found)
    assert [o.get_text() for o in plot_comparison(found).get_yticklabels()] == [*KEYS, 'Mean']
    with pytest.raises(ArgumentError, match='unknown metric'): plot_comparison(found, 'nonsense')


# What is refused

@pytest.mark.parametrize('name, text, words', [
    ('metrics.csv', '', 'holds no rows'), ('metrics.csv', 'category,image_auroc\n', 'holds no rows'), ('metrics.csv', 'category,image_auroc\nMean,1\n', 'holds no category'),
    ('metrics.csv', 'category,image_auroc\nmvtec_nut,good\n', "must hold numbers, got 'good' as image_auroc in row 2"),
    ('metrics.csv', 'category,image_auroc\nmvtec_nut\n', 'must have 2 cells in each row, got 1 in row 2'), ('metrics.csv', 'category,image_auroc\nmvtec_nut,1,2\n', 'got 3 in row 2'),
    ('metrics.csv', 'category,a,a\nmvtec_nut,1,2\n', "must have the column 'a' once"), ('metrics.csv', 'category,image_auroc\nmvtec_nut,1\nmvtec_nut,1\n', "got 'mvtec_nut' twice"),
    ('metrics.csv', b'\xff\xfe\x00', 'cannot be read as a table'), ('metrics.csv', 'category,image_auroc\nmvtec_nut,"1', None),
    ('intervals.csv', 'category,name,value\nmvtec_nut,image_auroc,1\n', "must have the column 'high' once"), ('intervals.csv', 'category,name,low,high\nmvtec_nut,image_auroc,.8,x\n', "got 'x' as high in row 2"),
    ('intervals.csv', 'category,name,low,high\nmvtec_nut,image_auroc,.8,1\nmvtec_nut,image_auroc,.8,1\n', 'one row for each metric'),
    ('seeds.csv', 'category,image_auroc\nmvtec_nut,1\n', "must have the column 'seed' once"), ('seeds.csv', 'category,seed,image_auroc\nmvtec_nut,,1\n', 'must say the seed'),
    ('seeds.csv', 'category,seed,image_auroc\nmvtec_nut,0,1\nmvtec_bottle,1,1\n', 'the same categories for each seed')])
def test_broken_tables(pair, call, name, text, words):
    (pair[1]/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    answer = call(*pair)
    if words is None: assert answer[0] == 0 # a quotation that is open at the end of the file is closed there
    else: refused(answer, 1, str(pair[1]/name), words, 'restore the file, or run again')

def test_no_run_is_there(pair, call, tmp_path):
    refused(call(pair[0], tmp_path/'gone'), 1, f"{tmp_path/'gone'} is no folder, or not there: pass the folder of a run")
    refused(call(pair[0]/'results.csv', pair[1]), 1, 'is no folder')
    refused(call(tmp_path, pair[1]), 1, f"has no results.csv: pass the folder of a run, such as {pair[0]}")
    (tmp_path/'empty').mkdir()
    refused(call(tmp_path/'empty', pair[1]), 1, 'has no results.csv: pass the folder of a run\n')

def test_nothing_in_common(tmp_path, pair, call):
    other = one(tmp_path/'c', report(.9, .8).set_axis(['demo_cog', 'demo_sieve']))
    refused(call(pair[0], other), 1, 'have no category in common, got mvtec_bottle, mvtec_nut and demo_cog, demo_sieve')
    write_results(with_mean(pd.DataFrame(dict(pixel_auroc=[.9, .9]), KEYS)), tmp_path/'c'/'results.csv')
    (other/'metrics.csv').unlink()
    refused(call(pair[0], other), 1, 'have no metric in common, got image_auroc, aupro and pixel_auroc')

@pytest.mark.parametrize('words', [[], ['a'], ['a', 'b', 'c'], ['a', 'b', '--metrics', 'aupro'], ['a', 'b', '-o']])
def test_usage(call, words): refused(call(*words), 2)


# Real runs

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    "A run of one seed, and one of two, on a few images of the demo set."
    root = tmp_path_factory.mktemp('real')
    cog = load_category('demo', root/'data', 'cog')
    few = replace(cog, train=cog.train[:6], test=cog.test[::4])
    model = PatchCore('filterbank', ratio=.05, target_dim=64, resize=64, imagesize=64)
    first = run(model, [few], root/'r', 'p', 'one', report=False)
    return first, run_seeds(model.fresh().set_params(ratio=.1), lambda seed: [few], [0, 1], root/'r', 'p', 'two', report=False)

def test_real_runs(real, call):
    single, both = real
    found = compare_runs(single.folder, both.folder)
    assert list(found.table.index.unique('metric')) == [o for o in single.report if single.report[o].notna().any() and both.report[o].notna().any()]
    for o in found.table.index.unique('metric'):
        assert np.allclose(found.of(o).a['demo_cog'], single.report.loc['demo_cog', o]) and np.allclose(found.of(o).b['demo_cog'], both.report.loc['demo_cog', o])
    assert 'settings: model.ratio 0.05 -> 0.1' in found.notes and 'only in B: seeds 1' in found.notes and not [o for o in found.notes if o.startswith('images')]
    assert found.of('image_auroc').low.notna().all() and found.of('image_f1max_threshold').low.isna().all()
    code, err, out = call(single.folder, both.folder, '-m', 'all')
    assert code == 0 and not err and 'anomaly_aupro' in out

def test_a_run_against_one_of_its_seeds(real):
    both = real[1].folder
    assert np.allclose(compare_runs(both/'seed_0', both/'seed_1').of('image_auroc').a.iloc[0], read_results(both).reports[0].image_auroc)

def test_an_unfinished_run(real, tmp_path):
    shutil.copytree(real[0].folder, tmp_path/'run')
    state = json.loads((tmp_path/'run'/'run.json').read_text())
    (tmp_path/'run'/'run.json').write_text(json.dumps(state | dict(complete=False)))
    assert compare_runs(tmp_path/'run', real[0].folder).notes[0].endswith('; the run has not come to its end')
    (tmp_path/'run'/'results.csv').unlink()
    with pytest.raises(DataError, match='has no results.csv'): compare_runs(tmp_path/'run', real[0].folder)


# The program

def test_help_imports_nothing_heavy():
    code = "from patchcore_nb.compared import compare_cli as f; f.main(['--help'], standalone_mode=False)"
    heavy = "sorted({'torch', 'numpy', 'pandas', 'matplotlib', 'PIL', 'scipy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, '-c', f'import sys; {code}; print({heavy}, file=sys.stderr)'], capture_output=True, text=True, encoding='utf-8')
    assert done.stderr.strip() == '[]' and '--metric' in done.stdout and 'RESULTS_A' in done.stdout

def test_it_is_a_program():
    "Under its name in the metadata, and found by what the name stands for."
    config = ConfigParser(delimiters=['='])
    config.read(Path(__file__).resolve().parents[1]/'settings.ini', encoding='utf-8')
    scripts = dict(o.split('=') for o in config['DEFAULT']['console_scripts'].split())
    module, name = scripts['patchcore_nb_compare'].split(':')
    code = f"import sys; sys.argv = ['x', '--help']; from {module} import {name}; {name}()"
    assert callable(getattr(importlib.import_module(module), name))
    assert '--output' in subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, encoding='utf-8').stdout

def test_the_front_door_keeps_its_compare():
    "`patchcore_nb.compare` holds two models' scores against each other; no module of that name may take its place."
    import patchcore_nb
    from patchcore_nb import comparison, intervals
    assert patchcore_nb.compare is intervals.compare and comparison.compare_runs
