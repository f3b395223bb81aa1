"""Render the processed pages with Sphinx: a look at the site, with its contents, search and dark theme, where Quarto is not at hand.

It needs `pip install -e '.[docs]'`. The published site is Quarto's; this one differs in dress, not in what it says.
"""
import json
import posixpath
import re
import shutil
import tempfile
from pathlib import Path

import yaml
from links import front_matter, read_pages, slug
from readme import directives, joined

TAKEN = {'search', 'genindex'} # pages of Sphinx's own
STYLE = '.bd-header { display: none } .math-block { text-align: center; margin: 1rem 0 } .source-link { float: right; font-size: smaller }'
TOCTREE = '```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```'


def said(
    out:dict, # an output
)->str: # Markdown; empty if it has none
    "The Markdown of an output, without what only Quarto understands."
    text = re.sub(r'\A---\n', '', joined(out.get('data', {}).get('text/markdown', '')))
    text = re.sub(r'^\[source\]\(([^)]+)\)\{target=[^}]*\}', r'<a class="source-link" href="\1">source</a>', text, flags=re.MULTILINE)
    text = re.sub(r'^#+ .*__.*$', lambda o: o[0].replace('__', r'\_\_'), text, flags=re.MULTILINE)
    return re.sub(r'\{target=[^}]*\}', '', text)


def as_cells(
    cell:dict, # a code cell of a processed notebook
)->list[dict]: # one or several
    "A code cell as myst-nb shows it: Markdown that it wrote as Markdown, hidden code as a tag, a caption below."
    marks, source = directives(joined(cell['source']))
    if marks.get('include') is False: return []
    markdown = [said(o) for o in cell['outputs'] if said(o)]
    hidden = marks.get('echo') is False
    if hidden and markdown: return [dict(cell_type='markdown', metadata={}, source=o) for o in markdown]
    shown = cell | dict(source=source, metadata=dict(tags=['remove-input'] if hidden else []), outputs=[] if marks.get('output') is False else cell['outputs'])
    caption = marks.get('fig-cap')
    return [shown]+([dict(cell_type='markdown', metadata={}, source=f'*{caption}*')] if caption else [])


def relinked(
    text:str,   # Markdown
    page:str,   # the notebook it stands in
    names:dict, # notebook, or address within the site -> notebook, named as its page on the site
    site:str,   # the site's address
)->str: # Markdown whose links lead to the notebooks' new names
    "Links to notebooks, and to pages of the site by their address, as links to pages of this one."
    here = posixpath.dirname(page) or '.'
    def moved(found):
        path, mark, anchor = found[2].partition('#')
        goal = names.get(path.removeprefix(site+'/') if path.startswith(site) else posixpath.normpath(posixpath.join(here, path)))
        return found[1]+(posixpath.relpath(goal, here)+mark+anchor if goal else found[2])
    return re.sub(r'(\]\()([^)\s]+)', moved, text)


def sphinx_page(
    nb:dict,    # a processed notebook
    page:str,   # its path
    names:dict, # of all notebooks, as `relinked` takes it
    site:str,   # the site's address
)->dict: # a notebook that myst-nb reads
    "A page of the site for Sphinx."
    head = front_matter(nb)
    cells = [dict(cell_type='markdown', metadata={}, source=f"# {head.get('title', page)}\n\n*{head.get('description', '')}*")]
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': cells += as_cells(cell)
        elif cell['cell_type'] == 'markdown': cells.append(cell | dict(source=re.sub(r'^:::.*$', '', joined(cell['source']), flags=re.MULTILINE)))
    for i, cell in enumerate(cells):
        cells[i] = {k: v for k, v in cell.items() if k != 'id'} | dict(metadata=cell.get('metadata', {}))
        if cell['cell_type'] == 'markdown': cells[i]['source'] = relinked(joined(cell['source']), page, names, site)
    return nb | dict(cells=cells, nbformat=4, nbformat_minor=4, metadata=nb.get('metadata', {}))


def contents(
    sidebar:dict, # of nbs/sidebar.yml
    names:dict,   # notebook -> its new name
)->str: # Markdown
    "The table of contents as toctrees, a caption for each section."
    trees = []
    for o in sidebar['website']['sidebar']['contents']:
        pages = o.get('contents', [o.get('href')]) if isinstance(o, dict) else [o]
        lines = [names[p] if isinstance(p, str) else f"{p['text']} <{names[p['href']]}>" for p in pages if p != 'index.ipynb']
        if lines: trees.append(TOCTREE.format(caption=o.get('section') or o.get('text', ''), pages='\n'.join(lines)))
    return '\n\n'.join(trees)


def write_source(
    pages:Path,  # the folder with the processed notebooks
    source:Path, # an empty folder
    site:str,    # the site's address
):
    "Turn the processed pages into what Sphinx reads."
    notebooks, addresses = read_pages(pages)
    new = {k: f"{'the_'*(k.removesuffix('.html') in TAKEN)}{k.removesuffix('.html')}.ipynb" for k in addresses}
    names = new | {v: new[k] for k, v in addresses.items()}
    for page, nb in notebooks.items():
        made = sphinx_page(nb, page, names, site)
        if page == 'index.ipynb': made['cells'].append(dict(cell_type='markdown', metadata={}, source=contents(yaml.safe_load((pages/'sidebar.yml').read_text(encoding='utf-8')), names)))
        (source/names[page]).parent.mkdir(parents=True, exist_ok=True)
        (source/names[page]).write_text(json.dumps(made), encoding='utf-8')
    for p in pages.rglob('*'):
        if p.suffix in ('.png', '.jpg', '.svg'):
            (source/p.relative_to(pages)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(p, source/p.relative_to(pages))
    (source/'look.css').write_text(STYLE, encoding='utf-8')


def setup(app):
    "Formulas as MathML, which browsers draw without a script."
    from docutils import nodes
    from latex2mathml.converter import convert
    def draw(display):
        def visit(self, node):
            formula = convert(node.astext().replace(r'\arg', r'\operatorname{arg}'), display=display)
            self.body.append(f'<div class="math-block">{formula}</div>' if display == 'block' else formula)
            raise nodes.SkipNode
        return visit
    app.add_html_math_renderer('mathml', (draw('inline'), None), (draw('block'), None))


def settings(
    title:str, # of the site
    repo:str,  # its repository
)->dict: # of Sphinx
    "How Sphinx shall render."
    theme = dict(repository_url=repo, use_repository_button=True, show_navbar_depth=1, show_toc_level=2, home_page_in_toc=True, use_download_button=False, use_fullscreen_button=False)
    return dict(extensions=['myst_nb', 'look'], project=title, html_title=title, html_theme='sphinx_book_theme', html_theme_options=theme, html_math_renderer='mathml',
                html_static_path=['look.css'], html_css_files=['look.css'], html_show_sphinx=False, html_copy_source=False, html_show_copyright=False, nb_execution_mode='off',
                myst_enable_extensions=['dollarmath', 'attrs_inline'], myst_heading_anchors=6, myst_heading_slug_func=slug,
                suppress_warnings=['myst.header', 'mystnb.unknown_mime_type', 'misc.highlighting_failure', 'config.cache', 'toc.not_included'])


def render(
    pages:Path, # the folder with the processed notebooks
    out:Path,   # where the site goes; what was there is replaced
    title:str,  # of the site
    site:str,   # its address
    repo:str,   # its repository
):
    "Have Sphinx render the processed pages."
    from sphinx.application import Sphinx
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder)/'source', Path(folder)/'made'
        source.mkdir()
        write_source(pages, source, site)
        Sphinx(source, None, made, Path(folder)/'doctrees', 'html', confoverrides=settings(title, repo), status=None).build()
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(made, out)
