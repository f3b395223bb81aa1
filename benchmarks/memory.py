"""How much memory a run takes: anonymous memory above the process's own after its imports, with and without a budget.

`python benchmarks/memory.py` runs the command line on bottle with ResNet-18, if PATCHCORE_NB_TESTDATA names a folder
with data/ and weights/, else on a category of the demo set. It prints a table and writes results/memory.json. Linux only.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import options, report

CHILD = '''
import re, sys
from pathlib import Path
import patchcore_nb.experiment, patchcore_nb.patchcore # what a run needs, which the command line imports only then
from patchcore_nb.cli import main
print(re.search(r"RssAnon:\\\\s+(\\\\d+)", Path("/proc/self/status").read_text(encoding="ascii"))[1], flush=True)
main(sys.argv[1:])
'''.replace('\\\\', '\\')
STEP = .02 # seconds between two looks
ROWS = {'what is free': [], '600 MB': ['--memory_budget', '600MB'], '600 MB, from the cache': ['--memory_budget', '600MB']}


def anonymous(
    process:psutil.Process, # and its children
)->int: # bytes; 0 when it is gone
    "Memory that belongs to no file."
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try: total += 1024*int(re.search(r'RssAnon:\s+(\d+)', Path(f'/proc/{p.pid}/status').read_text(encoding='ascii'))[1])
        except (OSError, TypeError): pass # it has just ended
    return total


def watch(
    args:list[str], # of the command line
    folder:Path,    # to run in
)->dict: # base and peak in bytes, the plan's line, seconds, and the course as [second, MB above the base]
    "Run the command line and look at its memory all the time."
    with open(folder/'stderr.txt', 'w+', encoding='utf-8') as err:
        start, course = time.perf_counter(), []
        child = subprocess.Popen([sys.executable, '-c', CHILD, *args], stdout=subprocess.PIPE, stderr=err, text=True, encoding='utf-8', cwd=folder)
        base, process = 1024*int(child.stdout.readline() or sys.exit('the program did not start: is patchcore_nb installed?')), psutil.Process(child.pid)
        while child.poll() is None:
            try: course.append((time.perf_counter()-start, anonymous(process)))
            except psutil.NoSuchProcess: break
            time.sleep(STEP)
        seconds = time.perf_counter()-start
        err.seek(0)
        said = err.read().replace('\r', '\n')
    if child.wait(): sys.exit(said[-2000:])
    plan = next(o for o in said.splitlines() if o.startswith('plan'))
    return dict(base=base, peak=max(m for _, m in course)-base, plan=plan, seconds=seconds, course=[[round(t, 1), round((m-base)/1e6)] for t, m in course[::25]])


def arguments()->tuple[str,str,list[str]]: # what it is, the model's part, the data's part
    "The run to be measured."
    root = os.environ.get('PATCHCORE_NB_TESTDATA')
    if not root: return 'demo cog, filterbank', '-b filterbank', ['-d', 'cog', 'demo', str(Path(tempfile.gettempdir())/'patchcore_nb_demo')]
    return 'bottle, ResNet-18', f'-b resnet18 --weights_dir {root}/weights', ['-d', 'bottle', 'mvtec', f'{root}/data/mvtec256']


def main():
    args = options(__doc__)
    what, model, data = arguments()
    if args.quick: model, data = f'{model} --target_embed_dimension 64', ['--imagesize', '64', '--resize', '64', *data]
    rows, results = [], []
    with tempfile.TemporaryDirectory() as temp:
        for name, flags in ROWS.items():
            cache = ['--cache', 'cache'] if 'cache' in name else []
            tail = f'patch_core {model} -le layer2 -le layer3 sampler -p 0.1 approx_greedy_coreset dataset'.split()+data
            for _ in range(1+len(cache)//2): # the first time fills the cache
                found = watch(['--gpu', '-1', '--log_group', re.sub(r'\W+', '_', name), *flags, *cache, 'results', *tail], Path(temp))
            results.append(sorted(Path(temp).glob(f'results/project/{re.sub(r"[^a-zA-Z0-9]+", "_", name)}*/results.csv'))[-1].read_bytes())
            found['planned'] = found.pop('plan').split('peak about ')[1].split(' of ')[0]
            rows.append(dict(what=name, baseline=next(iter(ROWS)), **found, ratio=found['peak']/(rows[0]['peak'] if rows else found['peak']), same_results=results[-1] == results[0]))
    courses = [dict(what=r['what'], course=r.pop('course')) for r in rows]
    report(args, __file__, f'{what}, ratio 0.1: fit, predict and metrics by the command line; peak above the imports, bytes', rows, courses=courses)


if __name__ == '__main__':
    if not Path('/proc/self/status').exists(): sys.exit('the memory benchmark reads /proc, which only Linux has')
    main()
