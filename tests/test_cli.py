"The command line, end to end on miniatures: the reference's flags and files, and every bad input with its one line."
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from patchcore_nb import PatchCore, build, complete, core, experiment, results, scorer, store
from patchcore_nb.cli import main
from patchcore_nb.data import make_miniature

SMALL = '--imagesize 64 --resize 64'
CORE = '-b resnet18 -le layer2 -le layer3 --weights random --pretrain_embed_dimension 64 --target_embed_dimension 64'


@pytest.fixture
def data(tmp_path): return make_miniature(tmp_path/'data', n_train=4)


@pytest.fixture
def call(tmp_path, data, capsys, monkeypatch):
    "Run the command line in a fresh folder; parts not given are the usual ones. Returns status, lines on stderr, stdout."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('PATCHCORE_NB_DEBUG', raising=False)
    monkeypatch.delenv('PATCHCORE_NB_WEIGHTS', raising=False)
    def go(group='', core=CORE, sampler='-p 0.1 approx_greedy_coreset', dataset=f'{SMALL} -d tile', name='mvtec', path=None, args=None):
        words = args if args is not None else ['--gpu', '-1', *group.split(), 'results', 'patch_core', *core.split(), 'sampler', *sampler.split(), 'dataset', *dataset.split(), name, str(path or data)]
        with pytest.raises(SystemExit) as e: main(words)
        out = capsys.readouterr()
        return e.value.code, [o for o in out.err.replace('\r', '\n').splitlines() if o.startswith(('error', 'warning')) or 'Traceback' in o], out.out
    return go


def refused(answer, status, *words):
    "One line, this status, all of these words, no traceback."
    code, lines, _ = answer
    assert code == status, answer
    errors = [o for o in lines if o.startswith('error: ')]
    assert len(errors) == 1 and not any('Traceback' in o for o in lines), lines
    for o in words: assert o in errors[0], errors[0]


def only(folder, pattern): return sorted(str(p.relative_to(folder)).replace(os.sep, '/') for p in Path(folder).rglob(pattern))


# The reference's files

def test_files_of_a_run(call, tmp_path):
    code, _, out = call('--seed 3 --save_patchcore_model --save_segmentation_images --log_group G --log_project P')
    assert code == 0
    home = tmp_path/'results'/'P'/'G'
    lines = (home/'results.csv').read_bytes().decode().split('\r\n')
    assert lines[0] == 'Row Names,instance_auroc,full_pixel_auroc,anomaly_pixel_auroc'
    assert [o.split(',')[0] for o in lines[1:]] == ['mvtec_tile', 'Mean', '']
    assert only(home/'segmentation_images', '*.png') == [f'mvtec_tile/tile_test_{k}_{i:03}.png' for k in ('good', 'spot') for i in (0, 1)]
    suspects = pd.read_csv(home/'suspects'/'mvtec_tile.csv')
    assert list(suspects) == ['image', 'score', 'row', 'col'] and suspects.score.is_monotonic_decreasing and suspects.image.str.contains('/train/good/').all()
    assert str(home/'results.csv').endswith(out.split('results:')[1].split()[0]) and 'segmentation_images' in out and 'models' in out


def test_a_second_run_goes_beside_the_first_and_is_the_same(call, tmp_path):
    for _ in range(2): assert call('--log_group G')[0] == 0
    assert only(tmp_path/'results'/'project', 'results.csv') == ['G/results.csv', 'G_0/results.csv']
    assert len({p.read_bytes() for p in tmp_path.rglob('results.csv')}) == 1


def test_models_in_both_formats(call, tmp_path):
    weights = tmp_path/'weights'
    weights.mkdir()
    import torchvision
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), weights/'resnet18.pth')
    core_args = CORE.replace('--weights random', f'--weights_dir {weights}')
    assert call('--save_patchcore_model', core_args, dataset='--imagesize 56 --resize 64 -d tile')[0] == 0
    home = tmp_path/'results'/'project'/'group'/'models'/'mvtec_tile'
    assert only(home, '*') == ['model.json', 'model.safetensors', 'nnscorer_search_index.faiss', 'patchcore_params.pkl']
    params = pickle.loads((home/'patchcore_params.pkl').read_bytes())
    assert list(params) == ['backbone.name', 'layers_to_extract_from', 'input_shape', 'pretrain_embed_dimension', 'target_embed_dimension', 'patchsize', 'patchstride', 'anomaly_scorer_num_nn']
    (home/"model.json").rename(home/"x")
    ours = json.loads((home/'x').read_text())
    assert ours['params']['resize'] == 64 and ours['params']['seed'] == 0 and set(ours['sha256']) == {'model.safetensors', 'nnscorer_search_index.faiss', 'patchcore_params.pkl'}
    image = tmp_path/'data'/'tile'/'test'/'spot'/'000.png'
    theirs = store.load(home, weights_dir=weights, device='cpu').predict(image).image_scores
    (home/'x').rename(home/'model.json')
    assert torch.equal(theirs, store.load(home, weights_dir=weights, device='cpu').predict(image).image_scores)


def test_what_the_reference_cannot_express(call, tmp_path):
    _, lines, _ = call('--save_patchcore_model')
    assert sum('our format alone' in o for o in lines) == 1
    refused(call('--save_patchcore_model --model_format reference'), 2, 'cannot express', '--model_format ours')


def test_without_masks_the_pixel_columns_are_empty(call, tmp_path):
    path = make_miniature(tmp_path/'bare', masks=False)
    assert call(path=path)[0] == 0
    row = pd.read_csv(next((tmp_path/'results').rglob('results.csv'))).iloc[0]
    assert 0 <= row['instance_auroc'] <= 1 and np.isnan(row['full_pixel_auroc']) and np.isnan(row['anomaly_pixel_auroc'])


def test_resume(call, tmp_path, data, monkeypatch):
    shutil.copytree(data/'tile', data/'second')
    broken = data/'second'/'train'/'good'/'003.png'
    whole = broken.read_bytes()
    broken.write_bytes(whole[:2000])
    both = f'{SMALL} -d tile -d second'
    refused(call('--no_report', dataset=both), 1, '003.png', 'cannot be read')
    broken.write_bytes(whole)
    code, lines, out = call('--resume', dataset=both)
    assert code == 0 and 'resumed:  1' in out and any('mvtec_tile was done without a report' in o for o in lines)
    resumed = tmp_path/'results'/'project'/'group'/'results.csv'
    assert call(dataset=both)[0] == 0
    assert resumed.read_bytes() == (tmp_path/'results'/'project'/'group_0'/'results.csv').read_bytes()


def test_resume_takes_no_other_data_for_its_own(call, tmp_path, data):
    other = make_miniature(tmp_path/'other')
    shutil.copytree(other/'tile', other/'second')
    (other/'second'/'train'/'good'/'003.png').write_bytes((other/'second'/'train'/'good'/'003.png').read_bytes()[:2000])
    both = f'{SMALL} -d tile -d second'
    refused(call(dataset=both, path=other), 1, 'cannot be read')
    shutil.copytree(data/'tile', data/'second')
    code, _, out = call('--resume', dataset=both)
    assert code == 0 and 'resumed' not in out and (tmp_path/'results'/'project'/'group_0').is_dir()


@pytest.mark.parametrize('text', ['', '[]', '{"complete": false}', '{"complete": false, "settings": {}, "metrics": 3}'])
def test_resume_beside_an_odd_run(call, tmp_path, text):
    home = tmp_path/'results'/'project'/'group'
    home.mkdir(parents=True)
    (home/'run.json').write_text(text)
    assert call('--resume')[0] == 0 and (home.with_name('group_0')/'results.csv').exists()


# Flags

SEED_COMMAND = '''--gpu 0 --seed 0 --save_patchcore_model --log_group IM224_WR50_L2-3_P01_D1024-1024_PS-3_AN-1_S0 --log_project MVTecAD_Results results patch_core
-b wideresnet50 -le layer2 -le layer3 --pretrain_embed_dimension 1024 --target_embed_dimension 1024 --anomaly_scorer_num_nn 1 --patchsize 3
sampler -p 0.1 approx_greedy_coreset dataset --resize 256 --imagesize 224 -d cable mvtec'''.split()


@pytest.mark.parametrize('path', ['DATA', 'F:/data/mvtec_anomaly_detection', r'F:\data\mvtec_anomaly_detection', '/data/mvtec anomaly'])
def test_the_seed_command_parses_to_the_letter(call, path, monkeypatch, tmp_path):
    "With a small stand-in for the download it gets as far as the data, which is not there."
    from patchcore_nb import parts
    built = []
    monkeypatch.setattr(parts, 'create_backbone', lambda name, *a, real=parts.create_backbone, **kw: built.append(name) or real('resnet18', 'random'))
    refused(call(args=[*SEED_COMMAND, path]), 1, str(Path(path)), 'is not there')
    assert built == ['wideresnet50'] and not (tmp_path/'results').exists()


def test_any_order_of_the_parts(call, data):
    words = ['--gpu', '-1', 'r', 'dataset', *f'{SMALL} -d tile mvtec'.split(), str(data), 'sampler', 'identity', 'patch_core', *CORE.split()]
    assert call(args=words)[0] == 0


PLAIN = []

def plain_scores(tmp_path, call):
    "Image scores without any further flag; worked out once, since every test has the same images."
    if not PLAIN: PLAIN.append(scores(tmp_path, call)[1])
    return PLAIN[0]


def scores(tmp_path, call, **kw):
    "The newest model and its image scores on the test images."
    code, lines, _ = call('--save_patchcore_model --model_format ours', **kw)
    assert code == 0, lines
    newest = max((tmp_path/'results').rglob('model.json'), key=lambda p: p.stat().st_mtime_ns)
    model = store.load(newest.parent, device='cpu')
    return model, model.predict(sorted((tmp_path/'data'/'tile'/'test'/'spot').iterdir())).image_scores


@pytest.mark.parametrize('flag, check', [
    ('--anomaly_scorer_num_nn 3', lambda m: m.k == 3), ('--patchscore mean', None), ('--patchscore smoothed', None), ('--patchscore reweighted', None),
    ('--patchoverlap 0', lambda m: m.stride == 3 and m.grid_ == (3, 3)), ('-pa 5', lambda m: m.more_patchsizes == (5,)), ('--preprocessing conv', None), ('--aggregation mlp', None),
    ('--precision bfloat16', lambda m: m.precision == 'bfloat16'), ('--distance euclidean', None), ('--pretrain_embed_dimension all --target_embed_dimension all', lambda m: m.memory_bank_.shape[1] == 384), ('--patchsize 5', None), ('--pretrain_embed_dimension 48', None), ('--target_embed_dimension 32', lambda m: m.memory_bank_.shape[1] == 32)])
def test_flags_of_patch_core_do_something(call, tmp_path, flag, check):
    model, got = scores(tmp_path, call, core=f'{CORE} {flag}')
    assert check is None or check(model)
    assert not torch.allclose(got, plain_scores(tmp_path, call))


@pytest.mark.parametrize('flag, check', [
    ('--train_val_split 0.5', lambda m: m.n_images_ == 2), ('--resize 80', None), ('--resize 80x90', None), ('--imagesize 48', lambda m: m.grid_ == (6, 6)), ('--imagesize 48x64', lambda m: m.grid_ == (6, 8))])
def test_flags_of_dataset_do_something(call, tmp_path, flag, check):
    args = f'{SMALL} -d tile {flag}'
    model, got = scores(tmp_path, call, dataset=args)
    assert check is None or check(model)
    assert not torch.allclose(got, plain_scores(tmp_path, call))


@pytest.mark.parametrize('search', ['fast', 'fp16', 'int8', 'ivfpq'])
def test_approximate_searches_say_how_well_they_do(call, tmp_path, search):
    if search == 'ivfpq': pytest.importorskip('faiss')
    code, _, out = call('--save_patchcore_model --model_format ours', core=f'{CORE} --search {search}', sampler='-p 1 approx_greedy_coreset')
    assert code == 0 and f'search:   {search} finds' in out
    values = json.loads(next((tmp_path/'results').rglob('model.json')).read_text())
    table = pd.read_csv(next((tmp_path/'results').rglob('metrics.csv')), index_col=0)
    assert values['params']['search'] == search and 0 < table.loc['mvtec_tile', 'search_recall'] <= 1


def test_the_references_own_index_finds_the_same(call, tmp_path):
    pytest.importorskip('faiss')
    found = []
    for o in ('exact', 'faiss'):
        code, _, out = call(f'--log_group {o}', core=f'{CORE} --search {o}')
        assert code == 0 and 'search:' not in out # there is no recall to tell
        found.append(pd.read_csv(next((tmp_path/'results').rglob(f'{o}/results.csv'))))
    assert found[0].equals(found[1])

def test_ivfpq_is_refused_before_any_image_is_read(call, monkeypatch):
    pytest.importorskip('faiss')
    refused(call(core=f'{CORE} --search ivfpq', sampler='-p 0.01 approx_greedy_coreset'), 2, 'at least 256 patches')
    monkeypatch.setitem(sys.modules, 'faiss', None)
    for o in ('ivfpq', 'faiss'): refused(call(core=f'{CORE} --search {o}'), 2, f"search {o} needs faiss, which is not installed: pip install 'patchcore_nb[faiss]'")


def test_the_exact_search_has_nothing_to_say(call, tmp_path):
    assert 'search:' not in call()[2] and 'search_recall' not in next((tmp_path/'results').rglob('metrics.csv')).read_text()


def test_augment(call, tmp_path): assert scores(tmp_path, call, dataset=f'{SMALL} -d tile --augment')[0].n_patches_ == 5*4*64


@pytest.mark.parametrize('sampler, size', [('-p 1 approx_greedy_coreset', 256), ('-p 0.5 greedy_coreset', 128), ('-p 0.5 identity', 256), ('-p 0.0001 approx_greedy_coreset', 1), ('-p 0.25 random', 64)])
def test_samplers(call, tmp_path, sampler, size): assert len(scores(tmp_path, call, sampler=sampler)[0].memory_bank_) == size


def test_threads_and_devices_of_the_search(call, monkeypatch):
    seen = []
    monkeypatch.setattr(scorer, 'limit_threads', lambda n, real=scorer.limit_threads: seen.append(n) or real(n))
    assert call(core=f'{CORE} --faiss_num_workers 1')[0] == 0 and 1 in seen
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        _, lines, _ = call(core=f'{CORE} --faiss_on_gpu')
        assert any('--faiss_on_gpu' in o for o in lines)


def test_batches_and_workers_change_nothing(call, tmp_path):
    base = plain_scores(tmp_path, call)
    for flag in ('--batch_size 1 --num_workers 0', '--batch_size 7 --num_workers 3'):
        assert torch.allclose(scores(tmp_path, call, dataset=f'{SMALL} -d tile {flag}')[1], base, rtol=1e-4)


def test_threshold_from_held_out_images(call, tmp_path):
    path = make_miniature(tmp_path/'more', n_train=40)
    code, _, out = call('--save_patchcore_model', dataset=f'{SMALL} -d tile --train_val_split 0.5', path=path)
    assert code == 0 and 'threshold' in out and 'false alarms' in out
    values = json.loads(next((tmp_path/'results').rglob('model.json')).read_text())
    found = values['learned']['calibration']
    assert found['threshold'] > 0 and found['promise'] == 'average' and len(found['scores']) == values['learned']['n_images'] == 20


def test_several_seeds_beside_one_in_the_backbones_name(call, tmp_path):
    code, lines, out = call('--seed 0 --seed 1 --no_report', core=CORE.replace('resnet18', 'resnet18.seed-3'))
    assert code == 0 and 'nan' not in out and any('which beats --seed' in o for o in lines)

def test_denoise_takes_two_images(call, tmp_path):
    refused(call(sampler='-p 0.1 --denoise 0.1 approx_greedy_coreset', path=make_miniature(tmp_path/'one', n_train=1)), 2, 'denoise', 'only one')
    assert not (tmp_path/'results').exists()

def test_false_alarms_of_good_images_alone_have_an_interval(call, tmp_path):
    path = make_miniature(tmp_path/'more', n_train=20)
    shutil.rmtree(path/'tile'/'test'/'spot')
    code, _, out = call(path=path)
    table = pd.read_csv(tmp_path/'results'/'project'/'group'/'intervals.csv', index_col='name')
    assert code == 0 and table.value['false_alarms'] == 0 and 0 == table.low['false_alarms'] < table.high['false_alarms'] < 1

def test_categories_and_kinds_keep_their_names_and_digits_in_tables(tmp_path):
    for key in ('b', '01'): results.add_rows(tmp_path/'kinds.csv', key, pd.DataFrame(dict(aupro=[.1+.2, np.nan]), ['007', 'none']))
    found = pd.read_csv(tmp_path/'kinds.csv', dtype=str, keep_default_na=False)
    assert found.values.tolist() == [[k, *row] for k in ('b', '01') for row in (['007', '0.30000000000000004'], ['none', ''])]


# Bad input

@pytest.mark.parametrize('kw, words', [
    (dict(sampler='-p 0 identity'), ['(0, 1]']), (dict(sampler='-p 2 approx_greedy_coreset'), ['(0, 1]', 'got 2']), (dict(sampler='-p nan approx_greedy_coreset'), ['(0, 1]']),
    (dict(sampler='-p x identity'), ['not a valid float']),
    (dict(sampler='gredy_coreset'), ['unknown sampler', "'greedy_coreset'"]), (dict(name='mvtek'), ['unknown dataset', "'mvtec'"]),
    (dict(core=CORE.replace('resnet18', 'resnet81')), ['unknown backbone', "'resnet18'"]), (dict(core=CORE.replace('layer3', 'layr3')), ['unknown layer', "'layer3'", 'layer1']),
    (dict(core=CORE.replace('layer3', 'fc')), ['not a map']), (dict(core=CORE+' -le layer2'), ['twice']), (dict(core=CORE+' --patchscore maks'), ['unknown --patchscore', "'max'"]),
    (dict(core=CORE+' --search exakt'), ['unknown search', "'exact'"]), (dict(group='--memory_budget much'), ['memory_budget', '2GB']), (dict(group='--memory_budget 50MB'), ['memory_budget of 50 MB is too small']),
    (dict(core=CORE+' -b wideresnet50'), ['-le layer2', 'from 0 to 1', '0.layer2']), (dict(core='-b resnet18 -b resnet18 -le 0.layer2 --weights random'), ['backbone 1', 'has no layer', '-le 1.']), (dict(core=CORE+' --patchsize 0'), ['patchsize']), (dict(core=CORE+' --patchsize 99'), ['far larger than the feature map']),
    (dict(core=CORE+' --patchoverlap 1'), ['patchoverlap']), (dict(core=CORE+' --anomaly_scorer_num_nn 0'), ['anomaly_scorer_num_nn']),
    (dict(core=CORE+' --patchscore reweighted', sampler='-p 0.0001 approx_greedy_coreset'), ['--patchscore reweighted needs at least 2', 'only 1', 'a larger -p']),
    (dict(core=CORE+' --anomaly_scorer_num_nn 26'), ['memory bank of 25', '--anomaly_scorer_num_nn']),
    (dict(dataset=f'{SMALL} -d tile --imagesize 65'), ['--imagesize 65 is larger than --resize 64']),
    (dict(dataset=f'{SMALL} -d tile --train_val_split 0'), ['(0, 1]']), (dict(dataset=f'{SMALL} -d tile --train_val_split 0.01'), ['at least 1']),
    (dict(dataset=f'{SMALL} -d tile --batch_size 0'), ['batch_size']), (dict(dataset=SMALL), ['subdatasets']), (dict(dataset=f'{SMALL} -d tile -d tile'), ['twice']),
    (dict(args='--gpu -2 results patch_core -b resnet18 -le layer2 sampler identity dataset -d a mvtec b'.split()), ['index of a device']), (dict(group='--no_such_flag'), ['no_such_flag']), (dict(group='--log_online'), ['does not know it', 'leave it out']), (dict(group='--model_format pickle'), ['pickle']), (dict(group='--model_format ours'), ['--save_patchcore_model']),
    (dict(group='--seed 99999999999999999999'), ['seed']), (dict(core=CORE+' --weights_dir x'), ['--weights random']), (dict(core='-b filterbank -le layer2 --weights random'), ['has no weights']),
    (dict(dataset='--resize 16 --imagesize 16 -d tile', core=CORE+' -pa 2 --batchnorm trained'), ['larger than the map of layer3']), (dict(group='--log_group='), ['log_group']), (dict(args=[]), ['RESULTS_PATH']),
    (dict(args=['results']), ['RESULTS_PATH patch_core']), (dict(args=['r', 'sampler', 'identity']), ['patch_core', 'missing']),
    (dict(args=['r', 'patch_core_loader', '-p', 'x']), ['dataset', 'missing', 'patch_core_loader']), (dict(dataset=f'{SMALL} -d tile --no_crop'), ['--no_crop', '--imagesize']), (dict(dataset='-d tile --resize 1x2x3'), ['HEIGHTxWIDTH']), (dict(sampler='-p 0.1 preset'), ['goes with --preset', 'greedy_coreset']), (dict(core=CORE+' --target_embed_dimension few'), ['few']), (dict(core=CORE+' --smoothing -1'), ['smoothing']), (dict(group='--preset papr'), ['preset']), (dict(args=['r', 'patch_cor']), ['patch_cor']),
    (dict(group='--no_report --lang zh'), ['--lang', '--no_report']), (dict(core=CORE+' --reweighting_num_nn 3'), ['--patchscore reweighted']), (dict(core=CORE+' --false_alarms none --confidence .99'), ['--confidence', '--false_alarms none'])])
def test_usage_errors(call, tmp_path, kw, words):
    refused(call(**kw), 2, *words)
    assert not (tmp_path/'results').exists()


def spoil(f): return pytest.param(f, id=f.__name__)

@spoil
def missing_folder(data): return dict(path=data/'none'), ['none', 'is not there']
@spoil
def empty_folder(data):
    (data/'empty').mkdir()
    return dict(path=data/'empty'), ['no category', 'no folders']
@spoil
def folder_is_a_file(data): return dict(path=data/'tile'/'test'/'good'/'000.png'), ['is not there']
@spoil
def no_train_good(data):
    shutil.rmtree(data/'tile'/'train')
    return {}, ['train', 'is not there']
@spoil
def empty_train_good(data):
    for p in (data/'tile'/'train'/'good').iterdir(): p.unlink()
    return {}, ['holds no images']
@spoil
def no_test(data):
    shutil.rmtree(data/'tile'/'test')
    return {}, ['no test images']
@spoil
def wrong_category(data): return dict(dataset=f'{SMALL} -d tilt'), ["did you mean 'tile'"]
@spoil
def zero_bytes(data):
    (data/'tile'/'train'/'good'/'001.png').write_bytes(b'')
    return {}, ['001.png', '0 bytes', 'remove']
@spoil
def zero_bytes_in_test(data):
    (data/'tile'/'test'/'good'/'001.png').write_bytes(b'')
    return {}, ['001.png', '0 bytes']
@spoil
def not_an_image(data):
    (data/'tile'/'train'/'good'/'001.png').write_text('hello')
    return {}, ['001.png', 'not an image']
@spoil
def mask_of_another_size(data):
    Image.new('L', (9, 9)).save(data/'tile'/'ground_truth'/'spot'/'000_mask.png')
    return {}, ['000_mask.png', '9 x 9', '40 x 48']
@spoil
def no_weights(data): return dict(core=CORE.replace('--weights random', '')), ['resnet18.pth', '--weights_dir', 'PATCHCORE_NB_WEIGHTS', 'no route to host', 'filterbank']
@spoil
def weights_folder_missing(data): return dict(core=CORE.replace('--weights random', '--weights_dir nowhere')), ['nowhere', 'is not there']
@spoil
def weights_damaged(data):
    (data/'w').mkdir()
    (data/'w'/'resnet18.pth').write_bytes(b'x'*100)
    return dict(core=CORE.replace('--weights random', f"--weights_dir {data/'w'}")), ['resnet18.pth', 'cannot be read']


@pytest.mark.parametrize('case', [missing_folder, empty_folder, folder_is_a_file, no_train_good, empty_train_good, no_test, wrong_category, zero_bytes, zero_bytes_in_test,
                                  not_an_image, mask_of_another_size, no_weights, weights_folder_missing, weights_damaged])
def test_data_errors(call, tmp_path, data, case, monkeypatch):
    def offline(library, name, pretrained, real=build.build_network):
        if pretrained: raise OSError('no route to host')
        return real(library, name, pretrained)
    monkeypatch.setattr(build, 'build_network', offline)
    kw, words = case(data)
    refused(call(**kw), 1, *words)
    assert not (tmp_path/'results').exists()


def test_results_that_cannot_be_written(call, tmp_path):
    (tmp_path/'results').write_text('a file in the way')
    refused(call(), 1, 'results', 'cannot be written')
    (tmp_path/'results').unlink()
    (tmp_path/'results').mkdir()
    (tmp_path/'results'/'project').write_text('')
    refused(call(), 1, 'cannot be written')


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='needs a folder that this user may not write to')
def test_results_without_permission(call, tmp_path):
    (tmp_path/'results').mkdir(mode=0o500)
    refused(call(), 1, 'ermission')


@pytest.mark.parametrize('what', ['model.safetensors', 'results.csv', 'spot_000.png'])
def test_a_full_disk_leaves_nothing_half_written(call, tmp_path, monkeypatch, what):
    "The disk fills up while one kind of file is synced."
    import errno
    def full(path, real=complete._sync):
        if what in path.name: raise OSError(errno.ENOSPC, 'No space left on device')
        real(path)
    monkeypatch.setattr(complete, '_sync', full)
    refused(call('--save_patchcore_model --save_segmentation_images'), 1, 'No space left', 'free some space')
    assert not only(tmp_path/'results', f'*{what}*') and not only(tmp_path/'results', '*.tmp*')


# Errors of the library name arguments; the command line names its own flags.

SAYS = [
    ('ratio must be in (0, 1], got 10: pass 0.1 to keep 10%', '-p must be in (0, 1], got 10: pass 0.1 to keep 10%'),
    ('k = 26 neighbours asked of a memory bank of 25 patches: pass a smaller k or a larger ratio', '--anomaly_scorer_num_nn = 26 neighbours asked of a memory bank of 25 patches: pass a smaller --anomaly_scorer_num_nn or a larger -p'),
    ('patch_score reweighted needs 2 patches, reweight_k is 9: pass patch_score="max"', '--patchscore reweighted needs 2 patches, --reweighting_num_nn is 9: pass --patchscore max'),
    ('the memory_budget of 1 MB is too small: pass memory_budget=2GB, a smaller ratio or batch_size', 'the --memory_budget of 1 MB is too small: pass --memory_budget 2GB, a smaller -p or --batch_size'),
    ('no layers named: pass layers=["layer2", "layer3"], or another search', 'no layers named: pass -le layer2 -le layer3, or another --search'),
    ('denoise must be in [0, 1), and `search` exact: check weights_dir', '--denoise must be in [0, 1), and --search exact: check --weights_dir'),
    ('pass a smaller --batch_size or -p, or --no_crop', 'pass a smaller --batch_size or -p, or --no_crop'), # flags that are there already
    ('the ratio of the distances, the search and the layers of this backbone', 'the ratio of the distances, the search and the layers of this backbone'),
    ("unknown layer 'imagesize', known: k, ratio", "unknown layer 'imagesize', known: k, ratio")]

@pytest.mark.parametrize('argument, flag', SAYS, ids=[o[0][:30] for o in SAYS])
def test_errors_are_told_in_flags(call, monkeypatch, argument, flag):
    def wrong(*args, **kw): raise core.ArgumentError(argument)
    monkeypatch.setattr(experiment, 'run', wrong)
    refused(call(), 2, flag)

def test_of_an_error_about_data_the_remedy_alone_is_told_in_flags(call, monkeypatch):
    def wrong(*args, **kw): raise core.DataError('my batch_size 8/k.png is too long: pass a smaller imagesize')
    monkeypatch.setattr(experiment, 'run', wrong)
    refused(call(), 1, 'error: my batch_size 8/k.png is too long: pass a smaller --imagesize')

def test_a_program_names_no_flag_that_it_does_not_have():
    from patchcore_nb.answers import as_flags, flags_of, spelling
    from patchcore_nb.cli import cli
    from patchcore_nb.saved import evaluate_cli, predict_cli
    said = 'pass a smaller ratio, k or imagesize=224'
    assert as_flags(said, flags_of(predict_cli)) == 'pass a smaller ratio, k or --imagesize 224'
    assert as_flags(said, flags_of(cli, 'r patch_core_loader -p m dataset -d a mvtec b'.split())) == 'pass a smaller ratio, k or --imagesize 224'
    assert as_flags(said, flags_of(cli, 'r patch_core -b x sampler -p 1 a dataset -d a mvtec b'.split())) == 'pass a smaller -p, --anomaly_scorer_num_nn or --imagesize 224'
    arguments = set(inspect.signature(PatchCore).parameters)
    for command in (cli, evaluate_cli, predict_cli):
        found = flags_of(command)
        assert all(spelling(o).startswith('-') for o in found.values()) and {'imagesize', 'resize', 'batch_size', 'weights_dir', 'device'} <= found.keys()
    unsaid = {'sampler', 'stride', 'show', 'spill_dir'} # an argument of the command line, an overlap, and what it settles itself
    assert arguments-flags_of(cli).keys() == unsaid

def test_a_device_is_called_gpu_where_it_is_typed():
    "And an unknown score by its flag; Python's users read the names of the arguments."
    from patchcore_nb.answers import as_flags, flags_of
    from patchcore_nb.cli import cli
    for ask, said in [(lambda: core.pick_device(-2), '--gpu must be -1'), (lambda: core.pick_device(-2, 'search_device'), '--faiss_on_gpu must be'), (lambda: scorer.image_scores(torch.zeros(1, 2, 2), 'maks'), "unknown --patchscore 'maks'")]:
        with pytest.raises(core.ArgumentError) as e: ask()
        assert as_flags(str(e.value), flags_of(cli)).startswith(said)

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_gpu_that_is_not_there(call):
    code, lines, _ = call(args=['--gpu', '0', 'results', 'patch_core', *CORE.split(), 'sampler', 'identity', 'dataset', *SMALL.split(), '-d', 'tile', 'mvtec', 'data'])
    assert code == 0 and any('--gpu 0 is not there' in o and '--gpu -1 says so' in o for o in lines), lines


def test_debug_shows_the_traceback(call, monkeypatch):
    monkeypatch.setenv('PATCHCORE_NB_DEBUG', '1')
    with pytest.raises(core.ArgumentError): main('r patch_core -b resnet18 -le layer2 sampler -p 2 identity dataset -d a mvtec b'.split())


def test_the_installed_program(tmp_path):
    program = Path(sys.executable).with_name('patchcore_nb_run'+('.exe' if os.name == 'nt' else ''))
    done = subprocess.run([program, '--help'], capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 0
    for flag in ('--gpu', '--backbone_names', '-le', '--percentage', '--subdatasets', '--train_val_split', '--faiss_num_workers', '--model_format', '--weights_dir', '--patchsize_aggregate'):
        assert flag in done.stdout
    done = subprocess.run([program, *'r patch_core -b resnet18 -le layer2 sampler -p 0 identity dataset -d a mvtec b'.split()], capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_what_changes_nothing_is_said(call):
    code, err, _ = call('', CORE+' --confidence .99 --false_alarms .3', sampler='-p 0.5 identity')
    said = ' '.join(err)
    assert code == 0 and '-p 0.5 changes nothing' in said and '--confidence is for images that are held out' in said
    code, err, _ = call('', CORE+' --confidence .5 --false_alarms .3', dataset=f'{SMALL} -d tile --train_val_split 0.5')
    assert code == 0 and 'held out, and there are none' not in ' '.join(err)


# Help, and what other packages bring

@pytest.mark.parametrize('code', [
    "from patchcore_nb.cli import cli as f; f.main(['--help'], standalone_mode=False)",
    "from patchcore_nb.cli import cli as f; f.main(['r', 'dataset', '-d', 'a', 'mvtec', 'b', 'sampler', '--help'], standalone_mode=False)",
    "from patchcore_nb.saved import evaluate_cli as f; f.main(['--help'], standalone_mode=False)",
    "from patchcore_nb.saved import predict_cli as f; f.main(['--help'], standalone_mode=False)"])
def test_help_imports_nothing_heavy(code):
    heavy = "sorted({'torch', 'torchvision', 'timm', 'numpy', 'pandas', 'matplotlib', 'PIL', 'scipy', 'sklearn'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, '-c', f'import sys; {code}; print({heavy}, file=sys.stderr)'], capture_output=True, text=True, encoding='utf-8')
    assert done.stderr.strip() == '[]' and '--help' in done.stdout

PLUGIN = """
import torch
from patchcore_nb.data import load_category
from patchcore_nb.filterbank import FilterBank
from patchcore_nb.names import SAMPLERS, SEARCHES
def sampler(*args, **kw): return SAMPLERS.find('random')(*args, **kw)
def patch_score(patch_scores): return patch_scores.flatten(1).median(1)[0]
def distance(dists): return 2*dists
class Search(SEARCHES.find('exact')): pass
def dataset(root, category, seed=0): return load_category('mvtec', root, category, seed=seed)
def backbone(): return FilterBank()
"""

@pytest.fixture
def plugin(tmp_path, monkeypatch):
    "An installed package that promises one of each kind by entry points, after the command line was imported."
    from patchcore_nb import names
    tables = names.SAMPLERS, names.PATCH_SCORES, names.DISTANCES, names.SEARCHES, names.DATASETS, names.BACKBONES
    what = dict(samplers='sampler', patch_scores='patch_score', distances='distance', searches='Search', datasets='dataset', backbones='backbone')
    meta = tmp_path/'site'/'our_parts-1.0.dist-info'
    meta.mkdir(parents=True)
    (meta/'METADATA').write_text('Metadata-Version: 2.1\nName: our-parts\nVersion: 1.0\n', encoding='utf-8')
    promised = [f'[patchcore_nb.{group}]\nour_{name.lower()} = our_parts:{name}\n' for group, name in what.items()]
    (meta/'entry_points.txt').write_text('\n'.join(promised), encoding='utf-8')
    (tmp_path/'site'/'our_parts.py').write_text(PLUGIN, encoding='utf-8')
    monkeypatch.syspath_prepend(str(tmp_path/'site'))
    yield
    sys.modules.pop('our_parts', None)
    for table in tables: # what this package has is registered once, and stays
        for name in [o for o in table.found if o.startswith('our_')]: del table[name]

OURS = '--patchscore our_patch_score --distance our_distance --search our_search'

def test_the_command_line_finds_what_another_package_brings(call, tmp_path, plugin):
    core_args = f'-b our_backbone -le layer2 -le layer3 --pretrain_embed_dimension 16 --target_embed_dimension 16 {OURS}'
    code, lines, out = call('--save_patchcore_model --model_format ours', core_args, '-p 0.1 our_sampler', name='our_dataset')
    assert code == 0, lines
    params = json.loads(next((tmp_path/'results').rglob('model.json')).read_text())['params']
    assert {k: params[k] for k in ('backbone', 'sampler', 'patch_score', 'distance', 'search')} == {k: f'our_{k}' for k in ('backbone', 'sampler', 'patch_score', 'distance', 'search')}

def test_help_and_errors_name_what_another_package_brings(call, plugin):
    said = ' '.join(call(args=['--help'])[2].split()).replace('| ', '|')
    for o in ('our_sampler', 'our_patch_score', 'our_distance', 'our_search', 'our_dataset'): assert o in said, o
    refused(call(core=f'{CORE} --distance our_distanc'), 2, "unknown distance 'our_distanc'", "did you mean 'our_distance'")
    refused(call(core=f'{CORE} --patchscore our_patch_scor'), 2, "did you mean 'our_patch_score'")
