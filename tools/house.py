"""How the house reads, in numbers: `python tools/house.py` prints the table whose limits tests/test_house.py holds.

The limits come from what reads well elsewhere: in fastcore, nbdev, miniai, einops, scikit-learn, timm and minGPT a
statement holds five or six expression nodes (10 to 15 at the 90th percentile), and under 2.4% of statements assign
several unrelated things at once.
"""
import ast
import io
import json
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from readme import directives, joined

ROOT = Path(__file__).resolve().parents[1]
MEDIAN, P90 = 7, 16 # expression nodes of a statement
PARALLEL = 2.4      # per cent of statements, less than
COLUMNS = 110
LINES = 30          # of a function, without its signature
METHODS = 25        # of PatchCore, properties apart
MINUTES = 20        # of a numbered notebook: 200 words or 20 lines of code a minute
UNSHOWN = 60        # exported lines in a row with nothing shown

FUNCTIONS = ast.FunctionDef|ast.AsyncFunctionDef
BODIES = FUNCTIONS|ast.ClassDef|ast.If|ast.For|ast.AsyncFor|ast.While|ast.With|ast.AsyncWith|ast.Try|ast.Match
COMPREHENSIONS = ast.ListComp|ast.SetComp|ast.DictComp|ast.GeneratorExp
OPEN = {'_replace', '_asdict', '_fields', '_make', '_field_defaults'} # of named tuples: public, for all the underscore


class Module(NamedTuple):
    "A piece of code: its name, its text and its syntax tree."
    name: str
    text: str
    tree: ast.Module


def modules(
    root:Path=ROOT, # of the project
)->list[Module]: # sorted by name, without nbdev's index
    "Read the modules of the package."
    paths = [p for p in sorted((root/'patchcore_nb').rglob('*.py')) if p.name != '_modidx.py']
    texts = {p.relative_to(root/'patchcore_nb').as_posix(): p.read_text(encoding='utf-8') for p in paths}
    return [Module(name, text, ast.parse(text)) for name, text in texts.items()]


def scripts(
    root:Path=ROOT, # of the project
)->list[Module]:
    "Read the benchmarks and the tools."
    paths = [p for folder in ('benchmarks', 'tools') for p in sorted((root/folder).glob('*.py'))]
    texts = {p.relative_to(root).as_posix(): p.read_text(encoding='utf-8') for p in paths}
    return [Module(name, text, ast.parse(text)) for name, text in texts.items()]


def cells(
    path:Path, # of a notebook
)->Module: # all its code in one piece
    "Read the code of a notebook, but for cells that are no Python by themselves."
    sources = [joined(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    text = '\n'.join(o for o in sources if parses(o))
    return Module(path.name, text, ast.parse(text))


def parses(
    source:str, # of a cell
)->bool:
    "Tell whether it is Python."
    try: return bool(ast.parse(source))
    except SyntaxError: return False


def numbered(
    root:Path=ROOT, # of the project
)->list[Path]: # sorted; neither guide and benchmarks nor tutorials
    "The notebooks that tell the package."
    return sorted((root/'nbs').glob('[0-9]*.ipynb'))


def statements(
    tree:ast.AST, # of a module
)->Iterator[ast.stmt]:
    "The statements that say something themselves: neither imports nor docstrings, nor those that only hold others."
    for node in ast.walk(tree):
        documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not isinstance(node, BODIES|ast.Import|ast.ImportFrom) and not documents: yield node


class Size(NamedTuple):
    "Expression nodes of a statement, and where it stands."
    nodes: int
    place: str


def sizes(
    found:list[Module],
)->list[Size]: # ascending
    "Count the expression nodes of every statement."
    return sorted(Size(sum(isinstance(o, ast.expr) for o in ast.walk(s)), f'{m.name}:{s.lineno}') for m in found for s in statements(m.tree))


def median(found:list[Size])->float: return statistics.median(o.nodes for o in found)

def p90(found:list[Size])->int: return found[int(.9*len(found))].nodes


def parallel(
    found:list[Module],
)->list[str]: # places
    "Statements that assign several things at once, `a, b = 1, 2`; the result of one call may be taken apart."
    def is_parallel(s): return isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Tuple) and isinstance(s.value, ast.Tuple)
    return [f'{m.name}:{s.lineno}' for m in found for s in statements(m.tree) if is_parallel(s)]


def commented(
    text:str, # of a module
)->set[int]: # numbers of lines
    "The lines with a comment."
    return {o.start[0] for o in tokenize.generate_tokens(io.StringIO(text).readline) if o.type == tokenize.COMMENT}


def listed(
    tree:ast.Module,
)->set[int]: # numbers of lines
    "The lines of the list of public names, which nbdev writes."
    found = [o for o in tree.body if isinstance(o, ast.Assign) and ast.unparse(o.targets[0]) == '__all__']
    return {i for o in found for i in range(o.lineno, o.end_lineno+1)}


def wide(
    found:list[Module],
)->list[str]: # places, each with its columns
    "Lines of too many columns; `__all__`, lines with a comment, and texts of errors, warnings and help may be longer."
    places = []
    for m in found:
        free = commented(m.text)|listed(m.tree)
        lines = [(i, o) for i, o in enumerate(m.text.splitlines(), 1) if len(o) > COLUMNS and i not in free]
        places += [f'{m.name}:{i} ({len(o)})' for i, o in lines if not re.search(r'Error\(|warn\(|help=', o)]
    return places


def long_functions(
    found:list[Module],
)->list[str]: # "place: lines"
    "Functions that are too long without their signature."
    made = [(m, o) for m in found for o in ast.walk(m.tree) if isinstance(o, FUNCTIONS)]
    lines = [(o.end_lineno-o.body[0].lineno+1, f'{m.name}:{o.name}') for m, o in made]
    return [f'{place}: {n} lines' for n, place in sorted(lines, reverse=True) if n > LINES]


def nested(
    found:list[Module],
)->list[str]: # places
    "Comprehensions within comprehensions."
    outer = [(m, o) for m in found for o in ast.walk(m.tree) if isinstance(o, COMPREHENSIONS)]
    return sorted({f'{m.name}:{o.lineno}' for m, o in outer if sum(isinstance(c, COMPREHENSIONS) for c in ast.walk(o)) > 1})


def is_property(
    function:ast.FunctionDef,
)->bool:
    "Tell whether a method is read like an attribute."
    return any(re.search(r'property|as_prop|setter', ast.unparse(o)) for o in function.decorator_list)


def patched(
    function:ast.FunctionDef,
)->str: # the classes' names in one text; empty: to none
    "Name the class to which fastcore's `patch` adds a function as a method, `def f(self:PatchCore)`."
    first = function.args.args[0] if function.args.args else None
    typed = first is not None and first.arg in ('self', 'cls') and first.annotation is not None
    return ast.unparse(first.annotation) if typed else ''


def methods(
    found:list[Module],
    cls:str='PatchCore', # name of a class
)->list[str]: # sorted
    "The methods of a class, patched ones and those of our own classes that it inherits from among them, properties apart."
    nodes = [o for m in found for o in ast.walk(m.tree)]
    own = [o for o in nodes if isinstance(o, ast.ClassDef) and o.name == cls]
    members = [f for c in own for f in c.body if isinstance(f, FUNCTIONS)]
    members += [o for o in nodes if isinstance(o, FUNCTIONS) and re.search(rf'\b{cls}\b', patched(o))]
    names = {f.name for f in members if not is_property(f)}
    bases = {b.id for c in own for b in c.bases if isinstance(b, ast.Name)}
    return sorted(names.union(*(methods(found, b) for b in bases-{cls})))


def is_private(name:str)->bool: return name.startswith('_') and not name.endswith('_') and name not in OPEN


def private_imports(
    found:list[Module],
)->list[str]: # "module <- name"
    "Underscore names that one module of the package imports from another."
    nodes = [(m, o) for m in found for o in ast.walk(m.tree) if isinstance(o, ast.ImportFrom)]
    ours = [(m, o) for m, o in nodes if o.level or (o.module or '').split('.')[0] == 'patchcore_nb']
    return [f'{m.name} <- {a.name}' for m, o in ours for a in o.names if is_private(a.name)]


def defined(
    module:Module,
)->set[str]: # names
    "What a module defines itself: functions, classes, variables, fields, and attributes of `self`."
    nodes = list(ast.walk(module.tree))
    names = {o.name for o in nodes if isinstance(o, FUNCTIONS|ast.ClassDef)}
    names |= {o.id for o in nodes if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)}
    names |= {o.attr for o in nodes if isinstance(o, ast.Attribute) and isinstance(o.ctx, ast.Store) and is_own(o.value)}
    return names


def is_own(
    node:ast.expr, # what an attribute is read from
)->bool:
    "Tell whether it is `self`, `cls` or `super()`."
    called = node.func if isinstance(node, ast.Call) else node
    return isinstance(called, ast.Name) and called.id in ('self', 'cls', 'super')


def foreign(
    module:Module,
)->set[str]: # names
    "The modules of other libraries that a module imports as such: their underscores are not ours to mend."
    found = [a for o in ast.walk(module.tree) if isinstance(o, ast.Import) for a in o.names if not a.name.startswith('patchcore_nb')]
    return {(a.asname or a.name).split('.')[0] for a in found}


def private_uses(
    found:list[Module],
)->list[str]: # "module: expression", sorted
    "Private attributes of other objects, used outside the module that defines them."
    places = []
    for m in found:
        own, others = defined(m), foreign(m)
        used = [o for o in ast.walk(m.tree) if isinstance(o, ast.Attribute) and is_private(o.attr) and o.attr not in own and not is_own(o.value)]
        places += [f'{m.name}: {ast.unparse(o)}' for o in used if not (isinstance(o.value, ast.Name) and o.value.id in others)]
    return sorted({*places, *patched_uses(found)})


def patched_uses(
    found:list[Module],
)->list[str]: # "module: expression"
    "Private attributes of `self` in methods that are patched onto a class of another module."
    places = []
    for m in found:
        own = defined(m)
        made = [o for o in ast.walk(m.tree) if isinstance(o, FUNCTIONS) and (cls := patched(o)) and cls not in own]
        used = [o for f in made for o in ast.walk(f) if isinstance(o, ast.Attribute) and is_private(o.attr) and o.attr not in own and is_own(o.value)]
        places += [f'{m.name}: {ast.unparse(o)}' for o in used]
    return places


class Reading(NamedTuple):
    "How a notebook reads: minutes, and the most exported lines in a row with nothing shown."
    name: str
    minutes: float
    unshown: int


def words(
    text:str, # Markdown
)->int: # a formula counts as one
    "Count the words of a text."
    return len(re.findall(r'\w+', re.sub(r'\$.*?\$', 'x', text, flags=re.DOTALL)))


def reading(
    path:Path, # of a notebook
)->Reading:
    "Time the reading of a notebook, hidden cells apart."
    said = code = run = longest = 0
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] == 'markdown': said += words(joined(cell['source']))
        if cell['cell_type'] != 'code': continue
        marks, source = directives(joined(cell['source']))
        lines = sum(bool(o.strip()) for o in source.splitlines())
        if 'hide' not in marks: code += lines
        if cell['outputs']: run = 0
        elif {'export', 'exporti', 'exports'} & marks.keys(): run += lines
        longest = max(longest, run)
    return Reading(path.stem, said/200+code/20, longest)


def main(
    root:Path=ROOT, # of a project
):
    "Print the table."
    found = modules(root)
    counted = sizes(found)
    share = 100*len(parallel(found))/len(counted)
    print(f'expression nodes a statement: median {median(counted):g} (at most {MEDIAN}), 90th percentile {p90(counted)} (at most {P90})')
    print(f"the densest: {', '.join(f'{o.place} ({o.nodes})' for o in counted[:-9:-1])}")
    print(f'parallel assignments: {share:.1f}% of {len(counted)} statements (less than {PARALLEL}%)')
    print(f'comprehensions within comprehensions: {len(nested(found))}')
    print(f'methods of PatchCore: {len(methods(found))} (at most {METHODS})')
    for what, places in {f'lines over {COLUMNS} columns': wide(found), f'functions over {LINES} lines': long_functions(found),
                         'private names that cross modules': private_imports(found)+private_uses([*scripts(root), *map(cells, numbered(root))])}.items():
        print(f"{what}: {len(places)}{': ' if places else ''}{'; '.join(places[:8])}{'; ...' if len(places) > 8 else ''}")
    print(f'\n{"notebook":24}minutes  exported lines with nothing shown')
    for o in sorted(map(reading, numbered(root)), key=lambda o: -o.minutes):
        print(f"{o.name:24}{o.minutes:7.1f}{'*' if o.minutes > MINUTES else ' '} {o.unshown:4}{'*' if o.unshown > UNSHOWN else ''}")


if __name__ == '__main__': main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
