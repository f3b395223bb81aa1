"""Test the notebooks that differ from the main branch, committed or not: `python tools/changed.py [--base main]`.

On the main branch itself those are the notebooks that are not committed yet. Each is run as nbdev_test runs it, tutorials
with their flag; notebooks that import a changed one are left to `make test`.
"""
import argparse
import re
import subprocess
import sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.test import nbdev_test

TUTORIALS = 'tutorials'


def git(
    *words:str, # of a command
)->list[str]: # lines of its answer
    "Ask git."
    answer = subprocess.run(['git', *words], cwd=get_config().config_path, capture_output=True, text=True)
    if answer.returncode: sys.exit(f"git {' '.join(words)}: {answer.stderr.strip()}")
    return answer.stdout.splitlines()


def changed(
    base:str='main', # a branch or commit
)->list[Path]: # relative to the folder of the notebooks, sorted
    "The notebooks that differ from where this branch left another; new ones among them."
    cfg = get_config()
    start = git('merge-base', 'HEAD', base)[0]
    names = git('diff', '--name-only', '--relative', start)+git('ls-files', '--others', '--exclude-standard')
    paths = {cfg.config_path/o for o in names if o.endswith('.ipynb')}
    return sorted(o.relative_to(cfg.nbs_path) for o in paths if o.is_relative_to(cfg.nbs_path) and o.exists())


def test(
    notebooks:list[Path], # relative to the folder of the notebooks
    **options, # of nbdev_test
):
    "Run notebooks as nbdev_test does."
    if not notebooks: return
    names = '|'.join(re.escape(o.name) for o in notebooks)
    nbdev_test.__wrapped__(file_re=f'^({names})$', **options)


def main(
    base:str='main', # a branch or commit
):
    "Test what differs."
    found = changed(base)
    print(f"Notebooks that differ from {base}: {', '.join(map(str, found)) or 'none'}")
    folder = Path(TUTORIALS)
    stories = [o for o in found if folder in o.parents]
    test([o for o in found if o not in stories])
    test(stories, path=get_config().nbs_path/folder, flags='tutorial')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Test the notebooks that differ from the main branch.')
    parser.add_argument('--base', default='main', help='the branch or commit that they are compared with; default: %(default)s')
    main(parser.parse_args().base)
