"""What the campaigns have in common: each case in a process of its own, watched from outside, and a count of what came of it.

A campaign tries far more than a test can, and is run by hand: `python tests/campaigns/models.py`. It prints what was tried,
how it ended and what did not hold, and writes the same to tests/campaigns/results/, from which the site shows it.
"""
import argparse
import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent/'results'
EXECUTES = ('exec', 'compile', 'import', 'pickle.find_class', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'subprocess.Popen', 'socket.connect', 'socket.bind', 'ctypes.dlopen')
SECONDS = 10 # that a case may take
SPARE = 32 << 20 # bytes by which two processes that do the same differ


@dataclass
class End:
    "How a case ended."
    what:str       # in small letters if it is well; in capitals if it must not happen
    more:str=''    # the error's text, or where it came from
    growth:int=0   # bytes by which the process grew

    @property
    def is_bad(self): return self.what.isupper()


# What a child does

class Watch:
    "Notes what no data file may bring about: code that is run, files that are written, processes, connections."
    def __init__(self): self.seen, self.on = [], False
    def __call__(self, event, args):
        if not self.on: return
        if event in EXECUTES: self.seen.append(f'{event} {str(args)[:80]}')
        if EXECUTES and event == 'open' and len(args) > 1 and set(str(args[1] or '')) & set('wax+'): self.seen.append(f'open {args[:2]}'[:120])

def memory(key):
    "A figure of this process in bytes: VmRSS, what it holds now, or VmHWM, the most that it held."
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(key): return int(line.split()[1]) << 10

def ends(work, job):
    "Do a job in this process; how it ended."
    from patchcore_nb.base import PatchCoreError
    before, watch = memory('VmRSS'), Watch()
    sys.addaudithook(watch)
    watch.on = True
    try: end = work(job)
    except PatchCoreError as e:
        said = str(e)
        end = End('refused', said) if len(said.splitlines()) == 1 and len(said) < 1500 else End('LONG ERROR', said[:300])
    except BaseException as e: end = End('RAISED', f'{type(e).__name__}: {str(e)[:200]} at {traceback.extract_tb(e.__traceback__)[-1].name}')
    watch.on = False
    if watch.seen: end = End('RAN CODE', '; '.join(watch.seen[:3]))
    end.growth = max(0, memory('VmHWM')-before)
    return end

def child(work, job, out):
    "What a child does from birth to death."
    try: said = json.dumps(vars(ends(work, job)))
    except BaseException as e: said = json.dumps(vars(End('RAISED', f'while it was judged: {type(e).__name__}: {e}')))
    os.write(out, said.encode())
    os._exit(0)


# What the parent does

def begin(work, job, quiet):
    "Start a child; its number, and what to read its answer from."
    into, out = os.pipe()
    pid = os.fork()
    if not pid:
        if quiet: os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.close(into)
        child(work, job, out)
    os.close(out)
    return pid, into

def finish(pid, into, late):
    "Read a child's answer; how the case ended."
    said = b''
    while not late and (block := os.read(into, 1 << 16)): said += block
    os.close(into)
    if late: os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if late: return End('HANG', f'more than {SECONDS} s')
    if status < 0: return End('SIGNAL', signal.Signals(-status).name)
    return End(**json.loads(said))

def in_children(work, jobs, workers=2, seconds=SECONDS, quiet=True):
    "Do each job in a process of its own, some at a time; yields the job and how it ended. Ctrl-C is the end of the jobs."
    try: yield from each(work, jobs, workers, seconds, quiet)
    except KeyboardInterrupt: print('interrupted: what follows is of the cases so far', file=sys.stderr)

def each(work, jobs, workers, seconds, quiet):
    "The same; Ctrl-C is an error."
    jobs, running, select = iter(jobs), {}, selectors.DefaultSelector()
    while True:
        while len(running) < workers and (job := next(jobs, None)) is not None:
            pid, into = begin(work, job, quiet)
            running[into] = pid, job, time.monotonic()+seconds
            select.register(into, selectors.EVENT_READ)
        if not running: return
        ready = {key.fd for key, _ in select.select(max(0, min(o[2] for o in running.values())-time.monotonic()))}
        for into in [o for o in running if o in ready or running[o][2] <= time.monotonic()]:
            pid, job, _ = running.pop(into)
            select.unregister(into)
            yield job, finish(pid, into, into not in ready)

def too_much(end, clean):
    "Say so if a process grew to more than twice what a clean case takes."
    if end.growth <= 2*clean+SPARE: return end
    return End('MEMORY', f'{end.growth >> 20} MiB, a clean one {clean >> 20} MiB; {end.what}: {end.more[:200]}', end.growth)


# What is told

def arguments(n, **more):
    "Read the command line of a campaign."
    parser = argparse.ArgumentParser(description=sys.modules['__main__'].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=n, help=f'cases; default: {n:,}')
    parser.add_argument('--seed', type=int, default=0, help='of the cases')
    parser.add_argument('--workers', type=int, default=2, help='processes at a time')
    parser.add_argument('--dry', action='store_true', help='write no file of results')
    for name, default in more.items(): parser.add_argument(f'--{name}', type=type(default), default=default)
    return parser.parse_args()

def tell(name, counts, bad, took, asked):
    "Print what came of a campaign, and keep it for the site; the status of the program."
    figures = {group: dict(sorted(ends.items())) for group, ends in sorted(counts.items())}
    for group, ends in figures.items(): print(f'{group:>24}: {sum(ends.values()):6,} tried; '+', '.join(f'{k} {v:,}' for k, v in ends.items()))
    print(f'{len(bad)} did not hold; {took:.0f} s')
    for o in bad[:40]: print('  ', o)
    if not asked.dry:
        RESULTS.mkdir(exist_ok=True)
        found = dict(command=' '.join([f'python tests/campaigns/{name}.py', *sys.argv[1:]]), date=time.strftime('%Y-%m-%d'), figures=figures, did_not_hold=bad)
        (RESULTS/f'{name}.json').write_text(json.dumps(found, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')
    return bool(bad)

class Tally:
    "Counts how cases ended, and keeps those that did not hold."
    def __init__(self): self.counts, self.bad, self.began = {}, [], time.monotonic()
    def add(self, group, case, end):
        self.counts.setdefault(group, Counter())[end.what] += 1
        if end.is_bad: self.bad.append(f'{group}, {case}: {end.what}: {end.more}')
        done = sum(map(Counter.total, self.counts.values()))
        if not done % 500: print(f'{done:,} done, {len(self.bad)} did not hold', file=sys.stderr)
    def tell(self, name, asked): return tell(name, self.counts, self.bad, time.monotonic()-self.began, asked)
