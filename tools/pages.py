"""Process every notebook into a page for the site, in _proc/; with `--render`, have Quarto render them into _docs/.

All but the rendering works without Quarto, and fails where a page cannot be made: an exported cell that does not
run by itself, imports mixed with other code, a title that is no front matter. The README is not touched.
"""
import argparse
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

QUARTO = '1.7.34'


def process()->Path: # the folder with the processed notebooks
    "Write the site's settings and sidebar, and process every notebook, one after the other."
    cfg = get_config()
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__()
    pages, notebooks = cfg.config_path/'_proc', [p.relative_to(cfg.nbs_path) for p in nbglob(as_path=True)]
    def unmade(): return [p.as_posix() for p in notebooks if not (pages/p).exists()]
    with warnings.catch_warnings():
        for message in 'Found cells containing imports', 'Failed to create YAML': warnings.filterwarnings('error', message)
        try: proc_nbs(n_workers=0, force=True)
        except Exception as e: sys.exit(f'{cfg.nbs_path.name}/{unmade()[0]} gives no page: {e}' + (f'\n{e.__cause__!r}' if e.__cause__ else ''))
    if unmade(): sys.exit(f"These notebooks gave no page: {', '.join(unmade())}")
    print(f'{len(notebooks)} pages processed without error.')
    return pages


def render(
    pages:Path, # the folder with the processed notebooks
)->None:
    "Have Quarto render the pages, and put the site in the place of the last one."
    if not shutil.which('quarto'):
        print(f'They are in {pages.name}/, not rendered: that takes Quarto {QUARTO}, which is not on the PATH. Get it from '
              f'https://github.com/quarto-dev/quarto-cli/releases/tag/v{QUARTO} and run this again.')
        return
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=pages, check=True)
    site = get_config().doc_path
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(pages/site.name, site)
    print(f'The site is in {site.name}/: open {site.name}/index.html')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description="Process the site's pages; with --render, render them too.")
    parser.add_argument('--render', action='store_true', help='render the pages with Quarto, if it is there')
    chosen = parser.parse_args()
    made = process()
    if chosen.render: render(made)
