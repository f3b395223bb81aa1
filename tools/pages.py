"""Process every notebook into a page for the site, in _proc/, and follow every link; with `--render`, render them into _docs/.

The first works without Quarto, and fails where a page cannot be made (an exported cell that does not run by itself,
imports mixed with other code, a title that is no front matter), where a page is not in nbs/sidebar.yml, and where a
link leads nowhere. Rendering takes Quarto; where that is missing, Sphinx renders the same pages for a look.
The documents at the root are not touched.
"""
import argparse
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import yaml
from links import broken, broken_html, garbled, unlink
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

QUARTO = '1.7.34'


def listed(
    contents:list|str|dict, # of a sidebar, or a part of it
)->list[str]: # pages, in order
    "The pages that a table of contents names."
    if isinstance(contents, str): return [contents]
    if isinstance(contents, dict): return listed([contents[k] for k in ('href', 'contents') if k in contents])
    return [p for o in contents for p in listed(o)]


def misplaced(
    sidebar:dict,    # of nbs/sidebar.yml
    pages:list[str], # that there are
)->list[str]: # what is wrong, in words
    "Pages that the table of contents lacks, has twice, or has and should not."
    named = listed(sidebar['website']['sidebar']['contents'])
    return [f'{p} is not in it' for p in pages if p not in named]+[f'{p} is not there' for p in dict.fromkeys(named) if p not in pages]+[
        f'{p} is in it {named.count(p)} times' for p in dict.fromkeys(named) if named.count(p) > 1]


def process()->Path: # the folder with the processed notebooks
    "Write the site's settings, and process every notebook, one after the other."
    cfg = get_config()
    refresh_quarto_yml()
    pages, notebooks = cfg.config_path/'_proc', [p.relative_to(cfg.nbs_path) for p in nbglob(as_path=True)]
    def unmade(): return [p.as_posix() for p in notebooks if not (pages/p).exists()]
    with warnings.catch_warnings():
        for message in 'Found cells containing imports', 'Failed to create YAML': warnings.filterwarnings('error', message)
        try: proc_nbs(n_workers=0, force=True)
        except Exception as e: sys.exit(f'{cfg.nbs_path.name}/{unmade()[0]} gives no page: {e}' + (f'\n{e.__cause__!r}' if e.__cause__ else ''))
    if unmade(): sys.exit(f"These notebooks gave no page: {', '.join(unmade())}")
    sidebar = cfg.nbs_path/'sidebar.yml'
    complain(f'{cfg.nbs_path.name}/{sidebar.name} is not right', misplaced(yaml.safe_load(sidebar.read_text(encoding='utf-8')), [p.as_posix() for p in notebooks]))
    unlink(pages, address())
    complain('These cells would be garbled on the site', garbled(pages))
    complain('These links lead nowhere', broken(pages, address()))
    print(f'{len(notebooks)} pages processed without error, and no link between them is broken.')
    return pages


def address()->str: return get_config().doc_host.rstrip('/')+get_config().doc_baseurl.rstrip('/')


def complain(
    what:str,         # is wrong
    wrong:list[str],  # a line for each
):
    "Stop, if anything is wrong."
    if wrong: sys.exit('\n  '.join([f'{what}:', *wrong]))


def by_quarto(
    pages:Path, # the folder with the processed notebooks
    site:Path,  # where the site goes
):
    "Have Quarto render the pages, and put the site in the place of the last one."
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=pages, check=True)
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(pages/site.name, site)


def render(
    pages:Path, # the folder with the processed notebooks
):
    "Render the pages with Quarto, or with what there is, and follow the links of what came out."
    cfg = get_config()
    if shutil.which('quarto'): by_quarto(pages, cfg.doc_path)
    else:
        print(f'The site as it is published takes Quarto {QUARTO}, which is not on the PATH: get it from '
              f'https://github.com/quarto-dev/quarto-cli/releases/tag/v{QUARTO} and run this again. Until then, Sphinx gives a look.')
        if missing := [o for o in ('sphinx', 'myst_nb', 'sphinx_book_theme', 'latex2mathml') if not find_spec(o)]: sys.exit(f"{', '.join(missing)} missing: pip install -e '.[docs]'")
        import look
        look.render(pages, cfg.doc_path, cfg.title, address(), cfg.git_url)
    complain('These links of the rendered site lead nowhere', broken_html(cfg.doc_path))
    print(f'The site is in {cfg.doc_path.name}/: open {cfg.doc_path.name}/index.html')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description="Process the site's pages; with --render, render them too.")
    parser.add_argument('--render', action='store_true', help='render the pages too: with Quarto, or with Sphinx where that is missing')
    chosen = parser.parse_args()
    made = process()
    if chosen.render: render(made)
