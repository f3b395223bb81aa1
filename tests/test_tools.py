"The tools behind make: the generator of README and its like, and the check that clean and export change nothing."
import base64
import json
import subprocess
import sys
from pathlib import Path

import links
import look
import nbformat
import pages
import pytest
import readme
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

TOOLS = Path(readme.__file__).parent
PNG, OTHER = (base64.b64encode(o).decode() for o in (b'a picture', b'another'))


def notebook(*cells):
    "Strings are Markdown; pairs are code and its outputs."
    made = [new_markdown_cell(c) if isinstance(c, str) else new_code_cell(c[0], outputs=list(c[1:])) for c in cells]
    for i, cell in enumerate(made): cell['id'] = f'c{i}'
    return new_notebook(cells=made, metadata={'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}})

def body(*cells):
    "The README below title and note."
    return readme.build(notebook('# T\n\n> s', *cells))[0].split('-->\n', 1)[1].strip()

def said(text): return new_output('stream', name='stdout', text=text)
def shown(**data): return new_output('display_data', data={k.replace('_', '/'): v for k, v in data.items()})


def test_head():
    text, pictures = readme.build(notebook('# Title\n\n> Summary', 'Prose.'))
    assert text.startswith('# Title\n\n> Summary\n\n<!-- ') and text.endswith('-->\n\nProse.\n') and not pictures

@pytest.mark.parametrize('directive', ['hide', 'default_exp core', 'export', 'exporti', 'include: false'])
def test_cells_that_are_not_shown(directive): assert body((f'#| {directive}\n1', said('1'))) == ''

def test_code_and_output():
    assert body(('1 + 1', said('2\n'))) == '```python\n1 + 1\n```\n\n```\n2\n```'
    assert body(('#| echo: false\n1 + 1', said('2\n'))) == '```\n2\n```'
    assert body(('#|output: false\n1 + 1', said('2\n'))) == '```python\n1 + 1\n```'
    assert body(('#| echo: false\n#| output: asis\nx', said('**two**\n'))) == '**two**'
    assert body(('#| echo: false\nx', said('\x1b[31mred\x1b[0m ```\n'))) == '````\nred ```\n````'

def test_richest_output_that_markdown_can_show():
    assert body(('#| echo: false\nx', shown(text_markdown='*m*', text_plain='p'))) == '*m*'
    assert body(('#| echo: false\nx', shown(text_html='<b>', text_plain='p'))) == '```\np\n```'
    with pytest.raises(ValueError, match='nbs/index.ipynb, cell 1: an output has none'): body(('x', shown(text_html='<b>')))

def test_pictures_become_files():
    text, pictures = readme.build(notebook('# T\n\n> s', ('#| echo: false\n#| fig-cap: "A: b"\nx', shown(image_png=PNG)), ('#| fig-alt: c\nx', shown(image_png=OTHER))))
    assert pictures == {'figure-1.png': b'a picture', 'figure-2.png': b'another'}
    assert '![A: b](nbs/images/readme/figure-1.png)\n\n*A: b*' in text and '![c](nbs/images/readme/figure-2.png)' in text

def test_links_are_seen_from_the_root():
    assert body('[a](04_samplers.ipynb#x) [`b`](../LICENSE) ![c](images/c.png) [d](https://d) [e](#e) <img src="f.png">') == (
        '[a](nbs/04_samplers.ipynb#x) [`b`](LICENSE) ![c](nbs/images/c.png) [d](https://d) [e](#e) <img src="nbs/f.png">')
    assert body('`x[0](y)`\n\n```\n[x](y)\n```') == '`x[0](y)`\n\n```\n[x](y)\n```'

def test_links_to_documents_lead_to_the_documents():
    assert body('[a](index_zh.ipynb) [b](contributing.ipynb#c)') == '[a](README.zh.md) [b](CONTRIBUTING.md#c)'

def test_a_picture_is_kept_once():
    "The twin shows the README's own picture; another one gets the next number."
    shows = lambda *pictures: notebook('# T\n\n> s', *[('#| echo: false\nx', shown(image_png=o)) for o in pictures])
    _, pictures = readme.build(shows(PNG))
    text, pictures = readme.build(shows(OTHER, PNG), 'index_zh.ipynb', pictures=pictures)
    assert pictures == {'figure-1.png': b'a picture', 'figure-2.png': b'another'}
    assert 'edit nbs/index_zh.ipynb' in text and text.index('figure-2.png') < text.index('figure-1.png')

@pytest.mark.parametrize('cell, message', [
    (('#| code-fold: true\n1',), 'does not know.*code-fold'), (('1/0', new_output('error', ename='E', evalue='v', traceback=[])), 'stored an error: E: v'),
    ('![x](attachment:x.png)', 'cannot show attachments'), (('#| fig-alt: a: b\n1',), 'cell 1: ')])
def test_what_the_readme_cannot_show_is_refused(cell, message):
    with pytest.raises(ValueError, match=message): body(cell)


@pytest.fixture
def project(tmp_path):
    "A small project: an index with a picture, and one notebook that is exported."
    for folder in 'nbs', 'lib': (tmp_path/folder).mkdir()
    lines = ['[DEFAULT]', 'repo = lib', 'lib_name = lib', 'lib_path = lib', 'nbs_path = nbs', 'version = 0.0.1', 'author = a', 'user = u', 'branch = main']
    (tmp_path/'settings.ini').write_text('\n'.join(lines), encoding='utf-8')
    nbformat.write(notebook('# Lib\n\n> s', ('#| echo: false\nx', shown(image_png=PNG))), tmp_path/'nbs/index.ipynb')
    nbformat.write(notebook('# Core\n\n> s', ('#| default_exp core',), ('#| export\ndef f(): return 1',)), tmp_path/'nbs/00_core.ipynb')
    return tmp_path

def run(tool, cwd, *args): return subprocess.run([sys.executable, TOOLS/tool, *args], cwd=cwd, capture_output=True, text=True, timeout=300)

def change(path, old, new): path.write_text(path.read_text(encoding='utf-8').replace(old, new), encoding='utf-8')

def told(result):
    "The files that the check named, or None where it passed."
    assert result.returncode in (0, 1), result.stderr
    return None if result.returncode == 0 else [line.strip() for line in result.stderr.splitlines() if line.startswith('  ')]

def test_check_clean(project):
    "Each way of being behind is told once and mended, and then there is nothing to tell."
    assert {'README.md', 'lib/core.py', 'nbs/images/readme/figure-1.png'} <= set(told(run('check_clean.py', project)))
    change(project/'nbs/00_core.ipynb', 'return 1', 'return 2')
    change(project/'nbs/index.ipynb', '> s', '> other')
    assert told(run('check_clean.py', project)) == ['README.md', 'lib/core.py']
    change(project/'nbs/00_core.ipynb', '"execution_count": null', '"execution_count": 3')
    change(project/'lib/core.py', 'return 2', 'return 3')
    assert told(run('check_clean.py', project)) == ['lib/core.py', 'nbs/00_core.ipynb']
    assert told(run('check_clean.py', project)) is None

def test_check_clean_does_not_pass_over_a_broken_notebook(project):
    (project/'nbs/01_broken.ipynb').write_text('{', encoding='utf-8')
    result = run('check_clean.py', project)
    assert result.returncode == 1 and 'Failed to clean notebook' in result.stderr

def test_readme_check_writes_nothing(project):
    stale = project/'nbs/images/readme/figure-2.png'
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b'')
    result = run('readme.py', project, '--check')
    assert result.returncode == 1 and 'README.md, nbs/images/readme/figure-1.png, nbs/images/readme/figure-2.png' in result.stderr
    assert stale.exists() and not (project/'README.md').exists()
    assert run('readme.py', project).returncode == 0 and run('readme.py', project, '--check').returncode == 0
    assert not stale.exists() and (project/'nbs/images/readme/figure-1.png').read_bytes() == b'a picture'

def test_execute(project):
    "Flagged cells are passed over unless their flag is named, outputs are stored, views of widgets are not."
    path = project/'nbs/01_runs.ipynb'
    def sources(*cells): nbformat.write(notebook('# Runs\n\n> s', *[(o,) for o in cells]), path)
    def outputs(): return [[o.get('data', {}).get('text/plain') for o in c.outputs] for c in nbformat.read(path, 4).cells[1:]]
    sources('1 + 1', '#| notest\n1/0', '#| eval: false\n1/0', 'import ipywidgets', 'ipywidgets.IntSlider()')
    result = run('execute.py', project, path)
    assert result.returncode == 0 and '2 cells passed over' in result.stdout, result.stderr
    assert outputs() == [['2'], [], [], [], []] and 'widgets' not in nbformat.read(path, 4).metadata
    result = run('execute.py', project, '--flags', 'notest', path)
    assert result.returncode == 1 and 'ZeroDivisionError' in result.stderr


@pytest.mark.parametrize('heading, name', [('The `k` of it', 'the-k-of-it'), ('PatchCore.fit', 'patchcore.fit'), ('`--train_val_split`', 'train_val_split'), ('`-b`, [c](d)!', 'b-c'), ('3 sizes', 'sizes'), ('运行', '运行'), ('1', 'section')])
def test_names_of_headings(heading, name): assert links.slug(heading) == name

def test_anchors():
    nb = notebook('## Two\n\n### Two\n\n```\n# no heading\n```\n\n<a id="place"></a>', ('#| output: asis\nx', shown(text_markdown='### f\n\ntext')))
    assert links.anchors(nb) == {'two', 'two-1', 'place', 'f'}

@pytest.fixture
def processed(tmp_path):
    "Two processed pages, one of them in a folder, and a picture."
    head = lambda name: nbformat.v4.new_raw_cell(f'---\ntitle: {name}\noutput-file: {name}.html\n---\n')
    def page(path, *cells):
        nb = notebook(*cells)
        nb.cells.insert(0, head(Path(path).stem.split('_', 1)[-1]))
        (tmp_path/path).parent.mkdir(exist_ok=True)
        nbformat.write(nb, tmp_path/path)
    page('index.ipynb', '[a](tutorials/01_first.ipynb) [b](tutorials/01_first.ipynb#here) [c](#there) `[d](no.ipynb)` ![e](p.png)\n\n## There', '[`f`](https://s/x/tutorials/first.html#f) [`g`](https://s/x/tutorials/first.html#g) [h](https://other/no.html)')
    page('tutorials/01_first.ipynb', '## Here', '[up](../index.ipynb#there)', ('#| echo: false\n#| output: asis\nshow_doc(f)', shown(text_markdown='---\n\n[source](https://s/r.py){target="_blank"}\n\n### f\n\ntext')))
    (tmp_path/'p.png').write_bytes(base64.b64decode(PNG))
    (tmp_path/'sidebar.yml').write_text('website: {sidebar: {contents: [index.ipynb, {section: S, contents: [tutorials/01_first.ipynb]}]}}', encoding='utf-8')
    return tmp_path

def test_links_to_names_without_an_entry_are_taken_back(processed):
    assert links.broken(processed, 'https://s/x') == ['index.ipynb: https://s/x/tutorials/first.html#g']
    links.unlink(processed, 'https://s/x')
    text = (processed/'index.ipynb').read_text(encoding='utf-8')
    assert links.broken(processed, 'https://s/x') == [] and ' `g` ' in text and 'first.html#f' in text

SIGNATURE = '### f\n\n```python\ndef f(\n    a, # as [`g`](https://s/x/tutorials/first.html#f) and [`L`](https://lib/basics.html#l) take it\n):\n```\n\n[`f`](https://s/x/tutorials/first.html#f)'

def pieces(path):
    "Every text of a notebook's file, as it is stored."
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        yield cell['source']
        for out in cell.get('outputs', []): yield from [out[k] for k in ('text',) if k in out]+[v for k, v in out.get('data', {}).items() if k.startswith('text/')]

def test_texts_are_written_as_lines(processed):
    "Quarto loses the line ends of a text in one piece: headings would swallow paragraphs, and code would run inline."
    pages = [processed/'index.ipynb', processed/'tutorials/01_first.ipynb']
    for path in pages:
        nb = nbformat.read(path, 4)
        nb.cells.append(new_code_cell('1\n2', outputs=[said('a\nb\n'), shown(text_markdown='c\n\nd')]))
        text = json.loads(nbformat.writes(nb))
        for cell in text['cells']: cell['source'] = ''.join(cell['source'])
        path.write_text(json.dumps(text), encoding='utf-8')
    assert links.garbled(processed) == [f'{path.relative_to(processed).as_posix()}, cell {i}: a text is no list of lines' for path in pages for i in range(len(nbformat.read(path, 4).cells))]
    links.unlink(processed, 'https://s/x')
    assert links.garbled(processed) == []
    for text in (o for path in pages for o in pieces(path)):
        assert isinstance(text, list) and all(line.endswith('\n') for line in text[:-1]) and not any('\n' in line[:-1] for line in text)

def test_signatures_hold_no_links(processed):
    "They are code: a link in it is brackets and an address."
    path = processed/'tutorials/01_first.ipynb'
    nb = nbformat.read(path, 4)
    nb.cells += [new_code_cell('#| echo: false\nshow_doc(f)', outputs=[shown(text_markdown=SIGNATURE)]), new_markdown_cell(SIGNATURE)]
    nbformat.write(nb, path)
    assert links.garbled(processed) == ['tutorials/01_first.ipynb, cell 4: a link within a signature']
    links.unlink(processed, 'https://s/x')
    made = nbformat.read(path, 4).cells
    text = made[4].outputs[0].data['text/markdown']
    assert 'a, # as `g` and `L` take it' in text and text.endswith('[`f`](https://s/x/tutorials/first.html#f)') and links.garbled(processed) == []
    assert made[5].source == SIGNATURE # what is written in a notebook's own code block stays as it is

@pytest.mark.parametrize('text, right', [([], True), (['a'], True), (['a\n', 'b'], True), (['a\n', 'b\n'], True), ('a', False), ('', False), (['a', 'b'], False), (['a\nb'], False), (['a\n', 'b\nc\n'], False)])
def test_lists_of_lines(text, right): assert links.in_lines(text) == right

@pytest.mark.parametrize('link', ['no.ipynb', 'tutorials/01_first.ipynb#no', '#no', 'no.png', '../LICENSE', 'https://s/x/no.html', 'https://s/x/tutorials/first.html#no'])
def test_broken_links_are_found(processed, link):
    nb = nbformat.read(processed/'index.ipynb', 4)
    nb.cells.append(new_markdown_cell(f'[x]({link})'))
    nbformat.write(nb, processed/'index.ipynb')
    links.unlink(processed, 'https://s/x')
    assert links.broken(processed, 'https://s/x') == [f'index.ipynb: {link}']

def test_broken_links_of_a_rendered_site(tmp_path):
    (tmp_path/'a.html').write_text('<a id="x" href="b.html#y">1</a><a href="#x">2</a><img src="no.png"><a href="b.html?q=1">3</a><a href="https://o/n">4</a><a href="b.html#z">5</a>', encoding='utf-8')
    (tmp_path/'b.html').write_text('<h1 id="y">1</h1>', encoding='utf-8')
    assert links.broken_html(tmp_path) == ['a.html: no.png', 'a.html: b.html#z']

def test_the_table_of_contents():
    contents = {'website': {'sidebar': {'contents': ['index.ipynb', {'section': 'S', 'contents': ['a.ipynb', {'text': 'B', 'href': 'b.ipynb'}, 'a.ipynb']}]}}}
    assert pages.listed(contents['website']['sidebar']['contents']) == ['index.ipynb', 'a.ipynb', 'b.ipynb', 'a.ipynb']
    assert pages.misplaced(contents, ['index.ipynb', 'a.ipynb', 'c.ipynb']) == ['c.ipynb is not in it', 'b.ipynb is not there', 'a.ipynb is in it 2 times']

def test_pages_for_sphinx(processed, tmp_path_factory):
    "Named as on the site, with links that follow, a title, and a table of contents on the first."
    links.unlink(processed, 'https://s/x')
    source = tmp_path_factory.mktemp('source')
    look.write_source(processed, source, 'https://s/x')
    index, first = ('\n'.join(c.source for c in nbformat.read(source/o, 4).cells) for o in ('index.ipynb', 'tutorials/first.ipynb'))
    assert index.startswith('# index') and '(tutorials/first.ipynb#here)' in index and '[`f`](tutorials/first.ipynb#f)' in index and ':caption: S\n\ntutorials/first.ipynb' in index
    assert '(../index.ipynb#there)' in first and '### f' in first and 'show_doc' not in first and 'target=' not in first
    assert (source/'p.png').exists()

def test_sphinx_renders_what_quarto_would(processed, tmp_path_factory):
    for o in ('sphinx', 'myst_nb', 'sphinx_book_theme', 'latex2mathml'): pytest.importorskip(o, reason="pip install -e '.[docs]'")
    links.unlink(processed, 'https://s/x')
    out = tmp_path_factory.mktemp('site')/'docs'
    look.render(processed, out, 'T', 'https://s/x', 'https://github.com/a/b')
    assert (out/'tutorials/first.html').exists() and links.broken_html(out) == []


def test_changed(project):
    "What differs from the main branch is run, committed or not; what does not is left alone, and so is what is no notebook."
    def git(*words): subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *words], cwd=project, check=True, capture_output=True)
    nbformat.write(notebook('# Wrong\n\n> s', ('1/0',)), project/'nbs/02_wrong.ipynb')
    for words in (['init', '-q', '-b', 'main'], ['add', '.'], ['commit', '-qm', 'a']): git(*words)
    result = run('changed.py', project)
    assert result.returncode == 0 and result.stdout == 'Notebooks that differ from main: none\n', result.stderr
    git('switch', '-qc', 'mine')
    change(project/'nbs/00_core.ipynb', 'return 1', 'return 2')
    git('commit', '-qam', 'b')
    nbformat.write(notebook('# New\n\n> s', ('assert True',)), project/'nbs/03_new.ipynb')
    result = run('changed.py', project)
    assert result.returncode == 0 and 'main: 00_core.ipynb, 03_new.ipynb\n' in result.stdout and 'Success' in result.stdout, result.stderr
    nbformat.write(notebook('# Wrong\n\n> s', ('2/0',)), project/'nbs/02_wrong.ipynb')
    result = run('changed.py', project)
    assert result.returncode == 1 and 'ZeroDivisionError' in result.stdout+result.stderr
    result = run('changed.py', project, '--base', 'no')
    assert result.returncode == 1 and 'git merge-base HEAD no' in result.stderr
