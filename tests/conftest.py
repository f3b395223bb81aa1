"What the tests share: the golden results and real images, where they are at hand, and the demo set."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def pytest_addoption(parser): parser.addoption('--slow', action='store_true', help='also run the tests that are marked slow')

def pytest_configure(config): config.addinivalue_line('markers', 'slow: takes minutes or gigabytes; runs with --slow alone')

def pytest_collection_modifyitems(config, items):
    if config.getoption('--slow'): return
    for o in items:
        if 'slow' in o.keywords: o.add_marker(pytest.mark.skip(reason='takes minutes or gigabytes of memory: pass --slow to run it'))


@pytest.fixture(scope='session')
def testdata()->Path: # a folder with data/, golden/ and weights/
    "The reference's golden results, real images and real weights; the test is skipped where there are none."
    root = os.environ.get('PATCHCORE_NB_TESTDATA')
    if not root: pytest.skip('PATCHCORE_NB_TESTDATA is not set: no golden results, real images or weights to test with')
    if not Path(root).is_dir(): pytest.fail(f'PATCHCORE_NB_TESTDATA is {root}, which is not a folder')
    return Path(root)


@pytest.fixture(scope='session')
def demo_root(tmp_path_factory)->Path: # a folder in MVTec's layout
    "The generated demo set, written once a session."
    from patchcore_nb.demo import DEMO_CATEGORIES, make_demo
    root = tmp_path_factory.mktemp('demo')
    for category in DEMO_CATEGORIES: make_demo(root, category)
    return root


@pytest.fixture(scope='session')
def weights(tmp_path_factory)->Path: # a folder with resnet18.pth
    "Weights that pass for pretrained ones."
    import torch
    from patchcore_nb.extractor import create_backbone
    folder = tmp_path_factory.mktemp('weights')
    torch.save(create_backbone('resnet18', 'random', seed=7).state_dict(), folder/'resnet18.pth')
    return folder


@pytest.fixture(scope='session')
def wheel_file(tmp_path_factory)->Path: # patchcore_nb-*.whl
    "The package as it is published, built from a copy of what it is built from."
    pytest.importorskip('setuptools', minversion='77', reason='setuptools 77 or later is not installed: no wheel is built')
    tree, root = tmp_path_factory.mktemp('tree'), Path(__file__).resolve().parents[1]
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'): shutil.copy(root/name, tree)
    shutil.copytree(root/'patchcore_nb', tree/'patchcore_nb', ignore=shutil.ignore_patterns('__pycache__'))
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '.', '-w', 'made']
    made = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout+made.stderr
    return next((tree/'made').glob('*.whl'))


@pytest.fixture
def offline(monkeypatch):
    "A test that would download weights fails."
    from patchcore_nb import build
    def local(library, name, pretrained, real=build.build_network):
        assert not pretrained, f'{name} would be downloaded'
        return real(library, name, pretrained)
    monkeypatch.setattr(build, 'build_network', local)
    monkeypatch.delenv('PATCHCORE_NB_WEIGHTS', raising=False)
