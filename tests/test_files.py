"Templates, styles and texts are files of the package: an installed one has them all."
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/'patchcore_nb'
FILES = sorted(p for p in PACKAGE.rglob('*') if p.is_file() and p.suffix not in ('.py', '.pyc'))
TEMPLATES = PACKAGE/'templates'

TRY = """
import matplotlib.pyplot as plt, patchcore_nb
from patchcore_nb.report import TEXTS, render
plt.style.use('patchcore_nb.plots')
print(patchcore_nb.__file__)
print(*(len(render([], {}, lang)) > 5000 for lang in TEXTS))
"""

def test_the_templates_are_those_that_the_code_asks_for():
    "Nothing is missing, and nothing is left over."
    texts = [p.read_text(encoding='utf-8') for p in (*PACKAGE.glob('*.py'), *TEMPLATES.iterdir())]
    asked = {name for text in texts for name in re.findall(r"'(\w+\.(?:svg|html|css))'", text)}-{'report.html'} # which a run writes
    assert asked | {'report_en.json', 'report_zh.json'} == {p.name for p in TEMPLATES.iterdir()}

@pytest.mark.parametrize('path', FILES, ids=lambda p: p.name)
def test_a_file_says_that_it_is_edited_by_hand(path):
    if path.name == 'py.typed': return # an empty file, by the rules
    assert 'dited by hand' in path.read_text(encoding='utf-8')[:300]

def test_a_wheel_holds_the_files(tmp_path):
    pytest.importorskip('setuptools', minversion='70.1', reason='setuptools 70.1 or later is not installed: no wheel is built')
    source = tmp_path/'source'
    source.mkdir()
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'MANIFEST.in'): shutil.copy(ROOT/name, source)
    shutil.copytree(PACKAGE, source/'patchcore_nb', ignore=shutil.ignore_patterns('__pycache__'))
    build = f'from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})'
    subprocess.run([sys.executable, '-c', build], cwd=source, check=True, capture_output=True)
    wheel, = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as z:
        assert {p.relative_to(ROOT).as_posix() for p in FILES} <= set(z.namelist())
        z.extractall(tmp_path/'installed')
    env = os.environ|dict(PYTHONPATH=str(tmp_path/'installed'))
    done = subprocess.run([sys.executable, '-c', TRY], cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path/'installed'/'patchcore_nb'/'__init__.py'), 'True', 'True']
