"The package as it is published, installed outside of the checkout: the demo, the report, a saved model."
import os
import subprocess
import sys
from pathlib import Path

import pytest

WHERE = """
import matplotlib.pyplot as plt, patchcore_nb
from patchcore_nb.report import TEXTS, render
plt.style.use('patchcore_nb.plots')
print(patchcore_nb.__file__)
print(*(len(render([], {}, lang)) > 5000 for lang in TEXTS))
"""


@pytest.fixture(scope='module')
def installed(wheel_file, tmp_path_factory)->Path: # its modules, and its programs in bin/
    "The wheel in a folder of its own; what it requires is where the tests find it too."
    home = tmp_path_factory.mktemp('installed')
    command = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', str(home), str(wheel_file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout+done.stderr
    return home

@pytest.fixture(scope='module')
def ask(installed, tmp_path_factory):
    "Run a program, where nothing but the installed package is to be found; what it printed."
    place = tmp_path_factory.mktemp('elsewhere')
    env = {k: v for k, v in os.environ.items() if not k.startswith('PATCHCORE_NB_')} | dict(PYTHONPATH=str(installed), PYTHONSAFEPATH='1')
    def go(*words):
        program = [str(installed/'bin'/words[0])] if words[0].startswith('patchcore_nb') else [sys.executable, words[0]]
        done = subprocess.run([*program, *words[1:]], cwd=place, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout+done.stderr
        return done.stdout
    go.place = place
    return go

@pytest.fixture(scope='module')
def demo(ask):
    "A run on the demo set, which the installed package generates."
    run = '--gpu -1 --seed 0 --save_patchcore_model --log_project demo --log_group small results'
    model = 'patch_core -b filterbank -le layer2 --pretrain_embed_dimension 64 --target_embed_dimension 64 sampler -p 0.01 approx_greedy_coreset'
    printed = ask('patchcore_nb_run', *run.split(), *model.split(), *'dataset --resize 128 --imagesize 112 -d cog demo data'.split())
    return printed, ask.place/'results'/'demo'/'small'

def test_it_is_the_installed_one(ask, installed):
    "With its style, its templates and its texts."
    place, *texts = ask('-c', WHERE).split()
    assert Path(place).parent == installed/'patchcore_nb' and set(texts) == {'True'}

def test_the_demo_and_its_report(demo):
    "A table on the terminal, a page that needs no other file."
    printed, folder = demo
    page = (folder/'report.html').read_text(encoding='utf-8')
    assert 'image AUROC' in printed and 'demo_cog' in page and 'src="http' not in page
    assert (folder/'results.csv').read_text().startswith('Row Names,instance_auroc')

def test_a_saved_model(demo, ask):
    "Judged again, it says the same; and it scores any image."
    folder = demo[1]
    model = str(folder/'models'/'demo_cog')
    ask('patchcore_nb_evaluate', '--gpu', '-1', '--no_report', 'again', 'patch_core_loader', '-p', model, *'dataset -d cog demo data'.split())
    assert (ask.place/'again'/'results.csv').read_bytes() == (folder/'results.csv').read_bytes()
    printed = ask('patchcore_nb_predict', model, str(ask.place/'data'/'cog'/'test'/'good'), '-o', 'judged', '--gpu', '-1')
    assert 'images' in printed and (ask.place/'judged'/'scores.csv').is_file() and list((ask.place/'judged'/'maps').iterdir())
