"""How much memory a run takes: anonymous memory above the process's own after its imports, with and without a budget.

`python benchmarks/memory.py` runs the command line on bottle with ResNet-18, if PATCHCORE_NB_TESTDATA names a folder
with data/ and weights/, else on a category of the demo set. It prints a table and writes results/memory.json. Linux only.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil

HERE = Path(__file__).resolve().parent
CHILD = '''
import re, sys
from pathlib import Path
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
)->dict: # base and peak in bytes, seconds, the plan's line, and the course as [second, MB above the base]
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
    return dict(base=base, peak=max(m for _, m in course)-base, seconds=round(seconds, 1), plan=plan, course=[[round(t, 1), round((m-base)/1e6)] for t, m in course[::25]])


def arguments()->tuple[str,str,list[str]]: # what it is, the model's part, the data's part
    "The run to be measured."
    root = os.environ.get('PATCHCORE_NB_TESTDATA')
    if not root: return 'demo cog, filterbank', '-b filterbank', ['-d', 'cog', 'demo', str(Path(tempfile.gettempdir())/'patchcore_nb_demo')]
    return 'bottle, ResNet-18', f'-b resnet18 --weights_dir {root}/weights', ['-d', 'bottle', 'mvtec', f'{root}/data/mvtec256']


def main():
    what, model, data = arguments()
    rows, results = [], []
    with tempfile.TemporaryDirectory() as temp:
        for name, flags in ROWS.items():
            cache = ['--cache', 'cache'] if 'cache' in name else []
            tail = f'patch_core {model} -le layer2 -le layer3 sampler -p 0.1 approx_greedy_coreset dataset'.split()+data
            for _ in range(1+len(cache)//2): # the first time fills the cache
                found = watch(['--gpu', '-1', '--log_group', re.sub(r'\W+', '_', name), *flags, *cache, 'results', *tail], Path(temp))
            rows.append(dict(budget=name, **found))
            results.append(sorted(Path(temp).glob(f'results/project/{re.sub(r"[^a-zA-Z0-9]+", "_", name)}*/results.csv'))[-1].read_bytes())
    same = ['same' if o == results[0] else 'OTHER' for o in results]
    table = pd.DataFrame([dict(budget=r['budget'], **{'peak above imports, MB': round(r['peak']/1e6), 'planned, MB': r['plan'].split('peak about ')[1].split(' of ')[0], 's': r['seconds'], 'results.csv': o}) for r, o in zip(rows, same)])
    print(f'{what}, ratio 0.1: fit, predict and metrics by the command line\n', table.to_string(index=False), sep='\n')
    (HERE/'results').mkdir(exist_ok=True)
    (HERE/'results'/'memory.json').write_text(json.dumps(dict(what=what, step=STEP, rows=[r | {'results.csv': o} for r, o in zip(rows, same)]), indent=1)+'\n', encoding='utf-8')


if __name__ == '__main__':
    if not Path('/proc/self/status').exists(): sys.exit('the memory benchmark reads /proc, which only Linux has')
    main()
