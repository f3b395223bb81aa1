"""Execute notebooks in place, top to bottom, in a kernel: `python tools/execute.py [--flags tutorial] nbs/tutorials/01_first_look.ipynb`.

Cells that nbdev_test would pass over are passed over, and keep their outputs: those marked `eval: false`, and those with
one of the flags of settings.ini (`tst_flags`) that is not named. The view of a widget is not stored, since it shows
nothing without the kernel that made it. Run nbdev_clean afterwards.
"""
import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.config import get_config
from readme import directives

VIEW = 'application/vnd.jupyter.widget-view+json'
SKIP = 'skip-execution' # the tag by which nbclient passes over a cell


def passed_over(
    cell,           # a cell of a notebook
    flags:set[str], # of cells that are not to be executed
)->bool:
    "Tell whether a cell is not executed."
    marks = directives(cell.source)[0] if cell.cell_type == 'code' else {}
    return marks.get('eval') is False or bool(flags & marks.keys())


def execute(
    path:Path,           # a notebook, which is changed
    flags:set[str]=frozenset(), # of cells that are to be executed, though nbdev_test would pass over them
    timeout:int=600,     # seconds, of a cell
)->int: # cells that were passed over
    "Execute a notebook in place."
    nb = nbformat.read(path, 4)
    skipped = [o for o in nb.cells if passed_over(o, set(get_config().tst_flags.split())-set(flags))]
    for cell in skipped: cell.metadata['tags'] = [SKIP]
    resources = {'metadata': {'path': str(path.parent)}}
    NotebookClient(nb, timeout=timeout, kernel_name='python3', store_widget_state=False, resources=resources).execute()
    for cell in nb.cells:
        cell.metadata.pop('tags', None)
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if VIEW not in o.get('data', {})]
    nbformat.write(nb, path)
    return len(skipped)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Execute notebooks in place.')
    parser.add_argument('notebooks', nargs='+', type=Path)
    parser.add_argument('--flags', default='', help='flags of cells that are to be executed too, parted by spaces')
    chosen = parser.parse_args()
    for notebook in chosen.notebooks: print(f'{notebook}: executed, {execute(notebook, set(chosen.flags.split()))} cells passed over')
