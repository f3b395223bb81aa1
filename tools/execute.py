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


class Runner(NotebookClient):
    "Executes all cells but some."
    skip = frozenset()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell_index in self.skip: return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def passed_over(
    nb,              # a notebook
    flags:set[str],  # of cells that are not to be executed
)->frozenset[int]: # indices of code cells
    "The cells that are not executed."
    marks = {i: directives(c.source)[0] for i, c in enumerate(nb.cells) if c.cell_type == 'code'}
    return frozenset(i for i, o in marks.items() if o.get('eval') is False or flags & o.keys())


def execute(
    path:Path,           # a notebook, which is changed
    flags:set[str]=frozenset(), # of cells that are to be executed, though nbdev_test would pass over them
    timeout:int=600,     # seconds, of a cell
)->int: # cells that were passed over
    "Execute a notebook in place."
    nb = nbformat.read(path, 4)
    runner = Runner(nb, timeout=timeout, kernel_name='python3', store_widget_state=False, resources={'metadata': {'path': str(path.parent)}})
    runner.skip = passed_over(nb, set(get_config().tst_flags.split())-set(flags))
    runner.execute()
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if VIEW not in o.get('data', {})]
    nbformat.write(nb, path)
    return len(runner.skip)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Execute notebooks in place.')
    parser.add_argument('notebooks', nargs='+', type=Path)
    parser.add_argument('--flags', default='', help='flags of cells that are to be executed too, parted by spaces')
    chosen = parser.parse_args()
    for notebook in chosen.notebooks: print(f'{notebook}: executed, {execute(notebook, set(chosen.flags.split()))} cells passed over')
