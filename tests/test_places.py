"""Where a run writes: below the folder that was given, and nowhere else."""
import os
from pathlib import Path

import pytest

from patchcore_nb.base import ArgumentError
from patchcore_nb.cli import main
from patchcore_nb.demo import make_demo
from patchcore_nb.results_folder import new_folder
from patchcore_nb.saved import predict_main

PARTS = ('patch_core', '-b', 'filterbank', '-le', 'layer2', 'sampler', '-p', '0.01', 'approx_greedy_coreset')


def leave(program, *args):
    "The status with which a program leaves."
    try: program([*map(str, args)])
    except SystemExit as e: return e.code


@pytest.mark.parametrize('odd', ['../x', '../../x', 'a/../../x', '..', '/x/y'])
def test_a_group_stays_inside(tmp_path, odd, capfd):
    home = tmp_path/'deep'/'results'
    with pytest.raises(ArgumentError, match='log_group must be a name below'): new_folder(home, 'p', odd).__enter__()
    with pytest.raises(ArgumentError, match='log_project must be a name below'): new_folder(home, odd, 'g').__enter__()
    make_demo(tmp_path/'data', 'cog')
    assert leave(main, '--log_group', odd, home, *PARTS, 'dataset', '-d', 'cog', 'demo', tmp_path/'data') != 0
    assert '--log_group must be a name below' in capfd.readouterr().err
    assert {o.name for o in tmp_path.iterdir()} <= {'deep', 'data'} and not [*home.rglob('*.csv')]


def test_groups_may_lie_deeper(tmp_path):
    with new_folder(tmp_path, 'p', 'a/b') as folder: assert folder == tmp_path/'p'/'a'/'b'


def test_home_is_home(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make_demo(tmp_path/'data', 'cog')
    status = leave(main, '--gpu', -1, '--no_report', '--cache', '~/kept', '--save_patchcore_model', '~/results', *PARTS, 'dataset', '--resize', 64, '--imagesize', 64, '-d', 'cog', 'demo', '~/data')
    assert status == 0, capfd.readouterr().err
    assert (tmp_path/'results').is_dir() and (tmp_path/'kept').is_dir()
    model = next((tmp_path/'results').rglob('model.json')).parent
    assert leave(predict_main, f'~/{model.relative_to(tmp_path)}', '~/data/cog/test/good', '-o', '~/said', '--gpu', -1) == 0
    assert (tmp_path/'said'/'scores.csv').is_file() and not (tmp_path/'~').exists()
    with new_folder(Path('~/more'), 'p', 'g') as folder: assert folder.is_relative_to(os.environ['HOME'])
