"Saved models at work, and ensembles: `patch_core_loader`, `patchcore_nb_evaluate`, `patchcore_nb_predict`."
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from patchcore_nb import files, saved, store
from patchcore_nb.cli import main
from patchcore_nb.core import DataError
from patchcore_nb.data import load_category, make_miniature, read_masks
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.evaluation import evaluate
from patchcore_nb.layouts import make_layout
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.names import PRESETS

SMALL = '--imagesize 64 --resize 64'
DIMS = '--pretrain_embed_dimension 64 --target_embed_dimension 64'
ONE = f'-b filterbank -le layer2 -le layer3 {DIMS}'
TWO = f'-b resnet18.seed-5 -b resnet18.seed-3 -b resnet18 -le 0.layer2 -le 1.layer2 -le 1.layer3 -le 2.layer1 --weights random {DIMS}'
PROGRAMS = {'run': main, 'evaluate': saved.evaluate_main, 'predict': saved.predict_main}


@pytest.fixture
def data(tmp_path):
    make_miniature(tmp_path/'data', n_train=6)
    make_miniature(tmp_path/'data', 'other', n_train=6, seed=1)
    return tmp_path/'data'

@pytest.fixture
def call(tmp_path, data, capsys, monkeypatch):
    "Run a program in a fresh folder; status, lines on stderr that matter, stdout."
    monkeypatch.chdir(tmp_path)
    for o in ('PATCHCORE_NB_DEBUG', 'PATCHCORE_NB_WEIGHTS'): monkeypatch.delenv(o, raising=False)
    def go(program, words):
        with pytest.raises(SystemExit) as e: PROGRAMS[program](words.split() if isinstance(words, str) else words)
        out = capsys.readouterr()
        return e.value.code, [o for o in out.err.replace('\r', '\n').splitlines() if o.startswith(('error', 'warning')) or 'Traceback' in o], out.out
    return go

def fit(call, core=ONE, group='', dataset=f'{SMALL} -d tile', more=''):
    answer = call('run', f'--gpu -1 --save_patchcore_model --model_format ours {group} results patch_core {core} sampler -p 0.1 approx_greedy_coreset dataset {dataset} {more} mvtec data')
    assert answer[0] == 0, answer
    return max(Path('results/project').iterdir(), key=lambda p: p.stat().st_mtime_ns)

def evaluate_on(call, models, categories, sizes='', folder='judged', dataset='mvtec data'):
    "Judge models; lines on stderr, stdout, and the scores of each category."
    paths, names = (' '.join(f'{flag} {o}' for o in what) for flag, what in (('-p', models), ('-d', categories)))
    code, lines, said = call('evaluate', f'--gpu -1 {folder} patch_core_loader {paths} dataset {names} {sizes} {dataset}')
    assert code == 0, lines
    return lines, said, {o: pd.read_csv(f'{folder}/scores/{dataset.split()[0]}_{o}.csv') for o in categories}

def refused(answer, status, *words):
    code, lines, _ = answer
    errors = [o for o in lines if o.startswith('error: ')]
    assert code == status and len(errors) == 1 and not any('Traceback' in o for o in lines), answer
    for o in words: assert o in errors[0], errors[0]


# Evaluate

@pytest.mark.parametrize('core', [ONE, TWO], ids=['single', 'ensemble'])
def test_evaluate_repeats_the_run(call, core):
    run = fit(call, core, '--save_segmentation_images')
    code, _, said = call('evaluate', f'--gpu -1 --save_segmentation_images judged patch_core_loader -p {run}/models/mvtec_tile dataset -d tile mvtec data')
    assert code == 0 and 'results.csv' in said
    judged = Path('judged')
    assert (judged/'results.csv').read_bytes() == (run/'results.csv').read_bytes()
    assert sorted(p.name for p in judged.glob('*.png')) == sorted(p.name for p in (run/'segmentation_images'/'mvtec_tile').iterdir())
    for o in ('scores', 'metrics.csv'): assert (judged/o).exists()
    was, now = (pd.read_csv(o/'scores'/'mvtec_tile.csv') for o in (run, judged))
    assert np.allclose(was.score, now.score, rtol=1e-5) and was.drop(columns='score').equals(now.drop(columns='score'))
    assert was.columns.tolist() == ['image', 'kind', 'label', 'score', 'p_value'] and was.label.tolist() == [0, 0, 1, 1]

def test_the_loader_in_the_place_of_patch_core(call):
    run = fit(call, dataset=f'{SMALL} -d tile -d other')
    words = f'--gpu -1 --save_segmentation_images --log_group again results patch_core_loader -p {run}/models/mvtec_tile -p {run}/models/mvtec_other dataset -d tile -d other mvtec data'
    code, _, said = call('run', words)
    again = Path('results/project/again')
    assert code == 0 and (again/'results.csv').read_bytes() == (run/'results.csv').read_bytes()
    assert len([*(again/'segmentation_images'/'mvtec_other').iterdir()]) == 4 and 'pictures' in said
    scores = {o: [pd.read_csv(x/'scores'/f'mvtec_{o}.csv').score for x in (run, again)] for o in ('tile', 'other')}
    for was, now in scores.values(): assert np.allclose(was, now, rtol=1e-5)
    assert not np.allclose(scores['tile'][0], scores['other'][0], rtol=1e-2) # each model on its own category

def test_one_model_for_all_categories(call):
    model = [fit(call)/'models'/'mvtec_tile']
    _, _, both = evaluate_on(call, model, ['tile', 'other'])
    assert pd.read_csv('judged/results.csv', index_col=0).index.tolist() == ['mvtec_tile', 'mvtec_other', 'Mean']
    for o in both: assert both[o].equals(evaluate_on(call, model, [o], folder=f'alone_{o}')[2][o])
    assert not np.allclose(both['tile'].score, both['other'].score, rtol=1e-2)

def test_another_image_size(call):
    run = fit(call, dataset='-d tile --imagesize 80 --resize 96')
    model, seen = f'{run}/models/mvtec_tile', {}
    for sizes, shape in {'': (80, 80), '--imagesize 96': (96, 96), '--resize 128 --imagesize 112x128': (112, 128), '--no_crop --resize 96': (115, 96)}.items():
        assert call('evaluate', f'--gpu -1 judged patch_core_loader -p {model} dataset -d tile {sizes} mvtec data')[0] == 0
        seen[sizes] = pd.read_csv('judged/scores/mvtec_tile.csv').score
    assert len({tuple(o) for o in seen.values()}) == 4
    refused(call('evaluate', f'--gpu -1 judged patch_core_loader -p {model} dataset -d tile --imagesize 100 mvtec data'), 2, '--imagesize 100 is larger than --resize 96')

def test_where_nothing_is_cut_each_category_has_its_own_size(call, data):
    "Whatever the order, at the model's own scale, settled by a training image before a test image."
    make_miniature(data, 'wide', n_train=2, size=(40, 64), seed=2)
    make_miniature(data, 'turned', n_train=2, size=(64, 40), seed=3) # whose training images are wide
    shutil.rmtree(data/'turned'/'train'); shutil.copytree(data/'wide'/'train', data/'turned'/'train')
    make_miniature(data, 'bare', n_train=0, size=(40, 64), seed=4)
    model = [fit(call, dataset='-d tile --imagesize 64 --resize 72')/'models'/'mvtec_tile']
    sizes = {'tile': (86, 72), 'wide': (72, 115), 'turned': (72, 115), 'bare': (72, 115)}
    want = {o: store.load(model[0], device='cpu', resize=size, imagesize='whole', batch_size=2).predict(load_category('mvtec', data, o, need_train=False).test).image_scores.numpy() for o, size in sizes.items()}
    for i, names in enumerate((list(sizes), list(sizes)[::-1])):
        _, _, scores = evaluate_on(call, model, names, '--no_crop', f'judged{i}')
        for o in names: assert np.allclose(scores[o].score, want[o], rtol=1e-5), o
    _, _, scores = evaluate_on(call, model, ['wide'], '--no_crop --resize 80', 'larger')
    assert np.allclose(scores['wide'].score, store.load(model[0], device='cpu', resize=(80, 128), imagesize='whole').predict(load_category('mvtec', data, 'wide').test).image_scores, rtol=1e-5)

def test_a_threshold_stays_where_the_size_does(call, data):
    make_miniature(data, 'many', n_train=44, size=(40, 80))
    model = [fit(call, dataset='-d many --no_crop --resize 64', more='--train_val_split 0.5')/'models'/'mvtec_many']
    for i, sizes in enumerate(('', '--no_crop', '--no_crop --resize 64', '--resize 64', '--resize 64x128')):
        lines, said, _ = evaluate_on(call, model, ['many'], sizes, f'judged{i}')
        assert 'false alarms' in said and not any('threshold' in o for o in lines), sizes
    lines, said, _ = evaluate_on(call, model, ['many'], '--no_crop --resize 80')
    assert 'false alarms' not in said and any('threshold belongs to images of the size' in o for o in lines)

def test_evaluate_needs_no_training_images(call, data):
    "Nor does it look at them."
    model = [fit(call)/'models'/'mvtec_tile']
    _, _, want = evaluate_on(call, model, ['tile', 'other'])
    shutil.rmtree(data/'tile'/'train')
    (data/'other'/'train'/'good'/'000.png').write_bytes(b'no image')
    _, _, got = evaluate_on(call, model, ['tile', 'other'], folder='again')
    assert all(got[o].equals(want[o]) for o in want)
    words = f'--gpu -1 results patch_core {ONE} sampler -p 0.1 approx_greedy_coreset dataset {SMALL} -d tile mvtec data'
    refused(call('run', words), 1, 'train', 'put the good training images into it')

@pytest.mark.parametrize('layout', ['mpdd', 'btad', 'mvtec_loco', 'mvtec_ad2'])
def test_layouts_whose_tests_are_enough(tmp_path, layout):
    root, name = make_layout(tmp_path, layout)
    want = load_category(layout, root, name)
    for o in ('train', 'validation'): shutil.rmtree(root/name/o, ignore_errors=True)
    with pytest.raises(DataError, match='put the good training images into it'): load_category(layout, root, name)
    got = load_category(layout, root, name, need_train=False)
    assert (got.test, got.unlabelled, got.train, got.calibration) == (want.test, want.unlabelled, [], [])

def test_pictures_of_one_name(call, data):
    "Two categories whose images are called alike have a folder each; one alone has none."
    rows = ['category,split,label,path']
    for name in ('tile', 'other'):
        shutil.copytree(data/name/'test', Path('set')/name/'line'/'test')
        rows += [f'{name},train,good,{data.as_posix()}/{name}/train/good/000.png']
        rows += [f'{name},test,{p.parent.name},{p.relative_to("set").as_posix()}' for p in sorted(Path('set', name).rglob('*.png'))]
    Path('set/table.csv').write_text('\n'.join(rows)+'\n')
    model = fit(call)/'models'/'mvtec_tile'
    def pictures(categories, folder):
        assert call('evaluate', f'--gpu -1 --save_segmentation_images {folder} patch_core_loader -p {model} dataset {categories} csv set/table.csv')[0] == 0
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('*.png')}
    both, alone = pictures('-d tile -d other', 'both'), pictures('-d tile', 'alone')
    names = [f'line_test_{kind}_00{i}.png' for kind in ('good', 'spot') for i in (0, 1)]
    assert sorted(both) == sorted(f'csv_{o}/{n}' for o in ('tile', 'other') for n in names) and sorted(alone) == names
    for n in names: assert both[f'csv_tile/{n}'] == alone[n] != both[f'csv_other/{n}']

def test_evaluate_names_the_search_of_the_model(call):
    run = fit(call, f'{ONE} --search fp16')
    _, said, _ = evaluate_on(call, [run/'models'/'mvtec_tile'], ['tile'])
    assert 'search:   fp16 finds' in said and 'exact finds' not in said

def test_unlabelled_images_have_scores(call, tmp_path):
    "As MVTec AD 2's private parts: scored, not judged, by a run and by an evaluation."
    root, name = make_layout(tmp_path/'ad2', 'mvtec_ad2')
    home = call('run', f'--gpu -1 --save_patchcore_model --model_format ours results patch_core {ONE} sampler -p 0.1 approx_greedy_coreset dataset {SMALL} -d {name} mvtec_ad2 {root}')
    assert home[0] == 0, home
    run = Path('results/project/group')
    _, _, judged = evaluate_on(call, [run/'models'/f'mvtec_ad2_{name}'], [name], dataset=f'mvtec_ad2 {root}')
    table = pd.read_csv(run/'scores'/f'mvtec_ad2_{name}.csv')
    others = load_category('mvtec_ad2', root, name).unlabelled
    want = store.load(run/'models'/f'mvtec_ad2_{name}', device='cpu').predict([o.path for o in others]).image_scores
    for o in (table, judged[name]):
        assert o.label.tolist()[:4] == [1, 1, 0, 0] and o.label[4:].isna().all() and o.kind[4:].isna().all() and len(o) == 4+len(others) == 8
        assert o.image.tolist()[4:] == [x.path.as_posix() for x in others] and np.allclose(o.score[4:], want, rtol=1e-4)

def test_a_threshold_belongs_to_its_size(call, data):
    make_miniature(data, 'many', n_train=44)
    run = fit(call, dataset=f'{SMALL} -d many', more='--train_val_split 0.5')
    model = f'{run}/models/mvtec_many'
    code, _, said = call('evaluate', f'--gpu -1 judged patch_core_loader -p {model} dataset -d many mvtec data')
    assert code == 0 and 'false alarms' in said and 'anomalous' in pd.read_csv('judged/scores/mvtec_many.csv')
    code, lines, said = call('evaluate', f'--gpu -1 judged patch_core_loader -p {model} dataset -d many --resize 80 mvtec data')
    assert code == 0 and 'false alarms' not in said and any('threshold belongs to images of the size' in o for o in lines)

@pytest.mark.parametrize('program, words, status, says', [
    ('evaluate', 'judged patch_core_loader -p none dataset -d tile mvtec data', 1, ['none is not there', '-p']),
    ('evaluate', 'judged patch_core_loader dataset -d tile mvtec data', 2, ['patch_core_paths']),
    ('evaluate', 'judged dataset -d tile mvtec data', 2, ['patch_core_loader', 'missing']),
    ('evaluate', 'judged patch_core_loader -p data dataset -d tile mvtec data', 1, ['holds no model']),
    ('evaluate', 'judged patch_core_loader -p data -p data dataset -d tile mvtec data', 2, ['2 models for 1 categories', 'one for each']),
    ('evaluate', 'judged patch_core_loader -p data dataset -d tile --train_val_split 1 mvtec data', 2, ['train_val_split']),
    ('evaluate', 'judged patch_core_loader -p data dataset -d tile --no_crop --imagesize 20 mvtec data', 2, ['--no_crop', '--imagesize']),
    ('evaluate', 'judged patch_core_loader -p data -p data dataset -d tile --no_crop mvtec data', 2, ['2 models for 1 categories', 'one for each']),
    ('run', 'results patch_core_loader -p data dataset -d tile --augment mvtec data', 2, ['--augment is for fitting']),
    ('run', '--save_patchcore_model results patch_core_loader -p data dataset -d tile mvtec data', 2, ['--save_patchcore_model is for fitting']),
    ('run', '--preset paper results patch_core_loader -p data dataset -d tile mvtec data', 2, ['--preset is for fitting']),
    ('run', 'results patch_core_loader -p data sampler identity dataset -d tile mvtec data', 2, ['sampler has nothing to say']),
    ('predict', 'data', 2, ['IMAGES']), ('predict', 'data data/tile/test/good', 1, ['holds no model']), ('predict', 'data data/none.png', 1, ['none.png']),
    ('predict', 'data data', 1, ['no images']), ('predict', 'data data/tile/test/good --maps gif', 2, ['gif'])])
def test_what_is_refused(call, program, words, status, says):
    refused(call(program, f'--gpu -1 {words}'), status, *says)
    assert not Path('predictions').exists()

def test_what_is_left_of_an_evaluation_that_dies(call, data):
    "The categories before the one that failed have their metrics."
    run = fit(call, dataset=f'{SMALL} -d tile')
    shutil.copytree(f'{run}/models/mvtec_tile', 'broken')
    with open('broken/model.safetensors', 'r+b') as f: f.seek(-1, 2); f.write(b'\1')
    refused(call('evaluate', f'--gpu -1 judged patch_core_loader -p {run}/models/mvtec_tile -p broken dataset -d tile -d other mvtec data'), 1, 'SHA-256 differs')
    assert pd.read_csv('judged/results.csv', index_col=0).index.tolist() == ['mvtec_tile', 'Mean']

def test_tables_of_an_earlier_evaluation_are_replaced(call):
    model = [fit(call)/'models'/'mvtec_tile']
    for o in ('tile', 'other'): evaluate_on(call, model, [o])
    assert [set(pd.read_csv(f'judged/{o}.csv').category) for o in ('metrics', 'intervals', 'kinds')] == [{'mvtec_other', 'Mean'}, {'mvtec_other'}, {'mvtec_other'}]


# Predict

def test_predict(call, data):
    make_miniature(data, 'many', n_train=44)
    run = fit(call, dataset='-d many --imagesize 80 --resize 96', more='--train_val_split 0.5')
    images = 'data/many/test/good data/many/test/spot/000.png data/many/test/spot/001.png'
    code, _, said = call('predict', f'{run}/models/mvtec_many {images} --gpu -1 -o out --maps both')
    assert code == 0 and '4 images' in said and 'called anomalous' in said
    table, found = pd.read_csv('out/scores.csv'), json.loads(Path('out/scores.json').read_text())
    assert [Path(o).parent.name for o in table.image] == ['good', 'good', 'spot', 'spot'] and table.anomalous.tolist()[2:] == [True, True]
    assert np.allclose(table.score, [o['score'] for o in found['images']]) and found['threshold'] > 0
    was = pd.read_csv(run/'scores'/'mvtec_many.csv')
    assert np.allclose(was.score, table.score, rtol=1e-5)
    names = [o.split(';') for o in table.maps]
    assert names == [[f'maps/{o}.tiff', f'maps/{o}.png'] for o in ('000', '001', '000_1', '001_1')]
    m = np.asarray(Image.open('out/maps/000_1.tiff'))
    assert m.shape == (48, 40) and m.dtype == np.float32 and np.isnan(m[0]).all() and np.isnan(m[:, 0]).all() and not np.isnan(m[9:39, 4:36]).any() # of 115 x 96 scaled pixels the middle 80 x 80 were seen
    assert Image.open('out/maps/000_1.png').size == (40, 48)
    row, col = np.unravel_index(np.nanargmax(m), m.shape)
    assert np.hypot(row-48*.3, col-20) < 10

@pytest.mark.parametrize('maps, name', [('png', '000.png'), ('both', '000.png'), ('tiff', '000.tiff'), ('both', '000.tiff')])
@pytest.mark.parametrize('how', ['copied', 'linked'])
def test_predict_overwrites_no_image(call, maps, name, how):
    "Not even by another path to it; and it says so before it looks for a model."
    Path('out/maps').mkdir(parents=True)
    Image.open('data/tile/test/good/000.png').save(f'out/maps/{name}')
    before, given = Path(f'out/maps/{name}').read_bytes(), 'out/../out/maps'
    if how == 'linked':
        given = 'photo'
        Path('photo').mkdir()
        os.link(f'out/maps/{name}', f'photo/{name}')
    refused(call('predict', f'no_model {given} --gpu -1 -o out --maps {maps}'), 2, name, 'would be overwritten', '--output')
    assert Path(f'out/maps/{name}').read_bytes() == before and not Path('out/scores.csv').exists()
    model = fit(call)/'models'/'mvtec_tile'
    assert call('predict', f'{model} {given} --gpu -1 -o elsewhere --maps {maps}')[0] == 0
    assert call('predict', f'{model} {given} --gpu -1 -o out --maps none')[0] == 0 and Path(f'out/maps/{name}').read_bytes() == before

def test_predict_with_one_patch_in_memory(call):
    "There is no distance between neighbours to colour a map by."
    m = PatchCore('filterbank', ratio=1e-6, target_dim=32, resize=64, imagesize=64, device='cpu').fit('data/tile/train/good')
    assert len(m.memory_bank_) == 1
    store.save(m, 'one', 'ours')
    refused(call('predict', 'one data/tile/test/good --gpu -1'), 2, 'one patch', '--maps tiff')
    assert call('predict', 'one data/tile/test/good --gpu -1 --maps tiff')[0] == 0

def test_predict_chooses_what_to_write(call):
    run = fit(call)
    assert call('predict', f'{run}/models/mvtec_tile data/tile/test/good --gpu -1 --format json --maps none')[0] == 0
    assert [p.name for p in Path('predictions').iterdir()] == ['scores.json']
    assert all(o['anomalous'] is None and o['maps'] == [] for o in json.loads(Path('predictions/scores.json').read_text())['images'])

def test_predict_in_chunks(call, monkeypatch):
    run = fit(call)
    call('predict', f'{run}/models/mvtec_tile data/tile/train/good --gpu -1 -o whole --maps none')
    monkeypatch.setattr(files, 'CHUNK', 4)
    call('predict', f'{run}/models/mvtec_tile data/tile/train/good --gpu -1 -o parts --maps none --batch_size 1')
    whole, parts = (pd.read_csv(f'{o}/scores.csv') for o in ('whole', 'parts'))
    assert len(whole) == 6 and whole.image.equals(parts.image) and np.allclose(whole.score, parts.score, rtol=1e-5)

def test_a_good_image_is_not_made_to_look_bad(call):
    "One scale for all: the overlay of a good image stays the image."
    run = fit(call, dataset='-d tile --imagesize 80 --resize 96')
    call('predict', f'{run}/models/mvtec_tile data/tile/test/good/000.png data/tile/test/spot/000.png --gpu -1')
    def change(kind, name): return np.abs(np.asarray(Image.open(f'predictions/maps/{name}.png'), int)-np.asarray(Image.open(f'data/tile/test/{kind}/000.png').convert('RGB'), int)).max()
    assert change('good', '000') < change('spot', '000_1')

def test_an_ensemble_predicts_one_image(call):
    run = fit(call, TWO)
    assert call('predict', f'{run}/models/mvtec_tile data/tile/test/spot/001.png --gpu -1 --maps tiff')[0] == 0
    (row,) = json.loads(Path('predictions/scores.json').read_text())['images']
    model = store.load(run/'models'/'mvtec_tile', device='cpu')
    assert isinstance(model, Ensemble) and len(model) == 3 and row['score'] == pytest.approx(float(model.predict('data/tile/test/spot/001.png').image_scores[0]), rel=1e-6)


# Ensembles

def test_an_ensemble_of_the_command_line(call, data):
    run = fit(call, TWO)
    model = store.load(run/'models'/'mvtec_tile', device='cpu')
    assert [(o.backbone, o.layers) for o in model.models] == [('resnet18.seed-5', ('layer2',)), ('resnet18.seed-3', ('layer2', 'layer3')), ('resnet18', ('layer1',))]
    assert len({float(o.memory_bank_.sum()) for o in model.models}) == 3
    tile = load_category('mvtec', data, 'tile')
    members = [o.predict(tile.test) for o in model.models]
    def mean(name): return sum((x-x.min())/(x.max()-x.min()) for x in (getattr(o, name) for o in members))/3
    want = evaluate(mean('image_scores'), [o.label for o in tile.test], mean('anomaly_maps'), read_masks(tile.test, model.preprocess_))
    row = pd.read_csv(run/'results.csv', index_col=0).loc['mvtec_tile']
    assert row.tolist() == pytest.approx([want['image_auroc'], want['pixel_auroc'], want['anomaly_pixel_auroc']], abs=1e-6)

def test_members_in_the_references_format(call, tmp_path):
    import torchvision
    torch.manual_seed(0)
    (tmp_path/'w').mkdir()
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path/'w'/'resnet18.pth')
    core = f'-b resnet18 -b resnet18 -le 0.layer2 -le 1.layer3 --weights_dir w {DIMS}'
    code, lines, _ = call('run', f'--gpu -1 --save_patchcore_model results patch_core {core} sampler -p 0.1 approx_greedy_coreset dataset --imagesize 56 --resize 64 -d tile mvtec data')
    home = Path('results/project/group/models/mvtec_tile')
    assert code == 0 and sorted(p.name for p in home.iterdir()) == sorted(['ensemble.json', *(f'Ensemble-{i}-2_{o}' for i in (1, 2) for o in ('model.json', 'model.safetensors', 'nnscorer_search_index.faiss', 'patchcore_params.pkl'))])
    ours = store.load(home, device='cpu', weights_dir='w').predict('data/tile/test/spot/000.png')
    for p in [*home.glob('*model.json'), home/'ensemble.json']: p.unlink()
    theirs = store.load(home, device='cpu', weights_dir='w', resize=64).predict('data/tile/test/spot/000.png')
    assert torch.equal(ours.anomaly_maps, theirs.anomaly_maps) and torch.equal(ours.image_scores, theirs.image_scores)

def test_the_threshold_of_an_ensemble_is_saved(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (44, 64, 64, 3), np.uint8)
    kw = dict(weights='random', train_val_split=.5, target_dim=32, resize=64, imagesize=64, device='cpu')
    pair = Ensemble([PatchCore('resnet18', ['layer2'], **kw), PatchCore('resnet18', ['layer3'], **kw)]).fit(images)
    again = store.load(store.save(pair, tmp_path/'m', 'ours'), device='cpu')
    assert again.threshold_ == pair.threshold_ > 0 and pair.predict(images[:3]).normalised_over_set().verdicts is None
    assert again.calibration_ == pair.calibration_ and len(again.calibration_) == 22 and again.calibration_.promise == 'average'
    held = pair.predict(pair.models[0].held_)
    assert held.verdicts.float().mean() <= .05 and again.predict(images[:3]).p_values.equal(pair.predict(images[:3]).p_values)
    text = (tmp_path/'m'/'ensemble.json').read_text()
    (tmp_path/'m'/'ensemble.json').write_text(text.replace('-1-2_', '-1-3_'))
    with pytest.raises(Exception, match='belongs to other members'): store.load(tmp_path/'m', device='cpu')

def test_the_references_ensemble(testdata):
    "Each member's scores, the combined metrics, and one image for itself."
    z = np.load(testdata/'golden'/'predict_ensemble.npz')
    model = store.load(testdata/'golden'/'model_ensemble', weights_dir=testdata/'weights', batchnorm='trained', device='cpu')
    bottle = load_category('mvtec', testdata/'data'/'mvtec256', 'bottle')
    seen = model.predict(bottle.test)
    for o, want in zip(seen.members, z['member_scores']): assert np.abs(o.image_scores.numpy()/want-1).max() < 1e-3
    whole, labels, masks = seen.normalised_over_set(), [o.label for o in bottle.test], read_masks(bottle.test, model.preprocess_)
    got = evaluate(whole.image_scores, labels, whole.anomaly_maps, masks)
    for name, want in (('image_auroc', .9992), ('pixel_auroc', .9716), ('anomaly_pixel_auroc', .9621)): assert got[name] == pytest.approx(want, abs=.001), name
    alone = evaluate(seen.image_scores, labels, seen.anomaly_maps, masks)
    assert alone['image_auroc'] > .998 and alone['pixel_auroc'] > .97
    assert torch.allclose(model.predict(bottle.test[5].path).image_scores, seen.image_scores[5], rtol=1e-4)


# Presets

@pytest.mark.parametrize('name', PRESETS)
def test_presets(call, name):
    core, sampler = '-b resnet18 -le layer2 -le layer3 --weights random', '-p 0.05 preset'
    assert call('run', f'--gpu -1 --preset {name} --save_patchcore_model --model_format ours results patch_core {core} sampler {sampler} dataset -d tile mvtec data')[0] == 0
    params = json.loads(next(Path('results').rglob('model.json')).read_text())['params']
    for k, v in PRESETS[name].items(): assert params[k] == (list(v) if isinstance(v, tuple) else v), k

def test_a_flag_beats_the_preset(call):
    words = f'--gpu -1 --preset anomalib --save_patchcore_model --model_format ours results patch_core {ONE} --patchscore mean --smoothing 2 sampler -p 0.05 greedy_coreset dataset {SMALL} -d tile mvtec data'
    assert call('run', words)[0] == 0
    params = json.loads(next(Path('results').rglob('model.json')).read_text())['params']
    got = {k: params[k] for k in ('patch_score', 'smoothing', 'sampler', 'resize', 'imagesize', 'pretrain_dim', 'target_dim', 'distance')}
    assert got == dict(patch_score='mean', smoothing=2, sampler='greedy_coreset', resize=64, imagesize=64, pretrain_dim=64, target_dim=64, distance='euclidean')

def test_smoothing_changes_maps_and_not_scores(call):
    runs = [fit(call, f'{ONE} --smoothing {o}', f'--log_group s{o}') for o in (0, 4)]
    a, b = (store.load(o/'models'/'mvtec_tile', device='cpu').predict('data/tile/test/spot/000.png') for o in runs)
    assert torch.equal(a.image_scores, b.image_scores) and a.anomaly_maps.max() > b.anomaly_maps.max()
