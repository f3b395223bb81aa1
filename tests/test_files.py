"Templates, styles and texts are files of the package; that an installed one has them all is in test_house.py and test_installed.py."
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/'patchcore_nb'
FILES = sorted(p for p in PACKAGE.rglob('*') if p.is_file() and p.suffix not in ('.py', '.pyc'))
TEMPLATES = PACKAGE/'templates'

def test_the_templates_are_those_that_the_code_asks_for():
    "Nothing is missing, and nothing is left over."
    texts = [p.read_text(encoding='utf-8') for p in (*PACKAGE.glob('*.py'), *TEMPLATES.iterdir())]
    asked = {name for text in texts for name in re.findall(r"'(\w+\.(?:svg|html|css))'", text)}-{'report.html'} # which a run writes
    assert asked | {'report_en.json', 'report_zh.json'} == {p.name for p in TEMPLATES.iterdir()}

@pytest.mark.parametrize('path', FILES, ids=lambda p: p.name)
def test_a_file_says_that_it_is_edited_by_hand(path):
    if path.name == 'py.typed': return # an empty file, by the rules
    assert 'dited by hand' in path.read_text(encoding='utf-8')[:300]
