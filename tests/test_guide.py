"The guide: an entry for every option of every program, none for an option that is gone, and two languages with one structure."
import ast
import re
from pathlib import Path

import click
import nbformat
import pytest

from patchcore_nb.cli import cli
from patchcore_nb.compared import compare_cli
from patchcore_nb.exported import export_cli
from patchcore_nb.saved import evaluate_cli, predict_cli

NBS = Path(__file__).resolve().parents[1]/'nbs'
LANGUAGES = {'en': 'guide.ipynb', 'zh': 'guide_zh.ipynb'}
# What each section of the guide is about, in order
SECTIONS = {'run': cli, **{o: cli.commands[o] for o in ('patch_core', 'sampler', 'dataset', 'patch_core_loader')}, 'evaluate': evaluate_cli, 'predict': predict_cli, 'compare': compare_cli, 'export': export_cli}

each_language = pytest.mark.parametrize('lang', LANGUAGES)


def cells(name): return nbformat.read(NBS/name, 4).cells

def names(command):
    "What the options and arguments of a command are called, as a person types them."
    return {n for o in command.params for n in (o.opts if isinstance(o, click.Option) else [o.human_readable_name if o.human_readable_name.isupper() and '|' not in o.human_readable_name else o.name.upper()])}

def sections(markdown):
    "The text below each second-level heading."
    parts = re.split(r'^## .+$', re.sub(r'```.*?```', '', markdown, flags=re.DOTALL), flags=re.MULTILINE)
    return dict(zip(SECTIONS, parts[1:], strict=True))

def entries(text):
    "The options that have a heading of their own, or lead a point of a list, in order."
    lines = re.findall(r'^(?:### |- )((?:`[^`]+`(?:, |、)?)+)(?:$|[:：])', text, re.MULTILINE)
    return [n for line in lines for n in re.findall(r'`([^`]+)`', line)]

def guide(lang): return {k: entries(v) for k, v in sections('\n\n'.join(c.source for c in cells(LANGUAGES[lang]) if c.cell_type == 'markdown')).items()}

def without_strings(source):
    "Python with all its strings emptied: what is left is the same in every language."
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str): node.value = ''
    return ast.dump(tree)


def test_the_reading_of_entries():
    assert entries('### `--a`, `-b`\n\nprose `--c`\n\n- `--d`、`-e`：text\n- `f` is no entry') == ['--a', '-b', '--d', '-e']

@each_language
@pytest.mark.parametrize('section', SECTIONS)
def test_every_option_has_its_entry(lang, section):
    found = guide(lang)[section]
    assert len(found) == len(set(found)), 'an entry is there twice'
    missing, gone = names(SECTIONS[section])-set(found), set(found)-names(SECTIONS[section])
    assert not missing, f'{LANGUAGES[lang]} says nothing about {sorted(missing)}'
    assert not gone, f'{LANGUAGES[lang]} tells of {sorted(gone)}, which {section} does not have'

def test_parts_that_are_told_by_reference_hold_nothing_new():
    "The guide says of patchcore_nb_evaluate that its parts are those of patchcore_nb_run, less four options of dataset."
    for part, fewer in (('patch_core_loader', set()), ('dataset', {'--train_val_split', '--augment', '--tile', '--tile_overlap'})):
        assert names(cli.commands[part])-names(evaluate_cli.commands[part]) == fewer and names(evaluate_cli.commands[part]) <= names(cli.commands[part])

@each_language
def test_every_entry_says_something(lang):
    for name, text in sections('\n\n'.join(c.source for c in cells(LANGUAGES[lang]) if c.cell_type == 'markdown')).items():
        for part in re.split(r'^### ', text, flags=re.MULTILINE)[1:]:
            head, _, body = part.partition('\n')
            assert len(body.strip()) > (40 if lang == 'en' else 25), f'{name}: {head} has no words of its own'

def test_both_languages_have_one_structure():
    assert guide('en') == guide('zh')
    one, other = map(cells, LANGUAGES.values())
    assert [c.cell_type for c in one] == [c.cell_type for c in other]
    for a, b in zip(one, other):
        if a.cell_type == 'code': assert without_strings(a.source) == without_strings(b.source)
        else: assert [len(o) for o in re.findall(r'^#+(?= )', a.source, re.MULTILINE)] == [len(o) for o in re.findall(r'^#+(?= )', b.source, re.MULTILINE)]

def test_chinese_is_chinese():
    "Every cell of prose has been translated."
    for i, c in enumerate(cells(LANGUAGES['zh'])):
        if c.cell_type == 'markdown': assert len(re.findall('[\u4e00-\u9fff]', c.source)) >= 2, f'cell {i}: {c.source[:60]}'

@each_language
@pytest.mark.parametrize('section', SECTIONS)
def test_tables_are_of_today(lang, section):
    "Each table shows the options and the help of the program as it is."
    tables = [''.join(o.data['text/markdown']) for c in cells(LANGUAGES[lang]) if c.cell_type == 'code' and 'flags(' in c.source and 'def flags' not in c.source for o in c.outputs]
    table = dict(zip(SECTIONS, tables, strict=True))[section].replace('\\|', '|')
    command = SECTIONS[section]
    for o in command.params:
        if not isinstance(o, click.Option): continue
        assert all(n in table for n in o.opts), f'{o.name} is not in the table: run the notebook again'
        assert o.help in table, f'the help of {o.name} has changed: run the notebook again'
    assert table.count('\n') == len(command.params)+1
