"""Follow every link within the site: between the processed pages, before anything is rendered, and in the rendered site."""
import json
import posixpath
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml
from readme import joined

FENCED = re.compile(r'^(`{3,}|~{3,}).*?^\1[`~]*[ \t]*$', re.DOTALL|re.MULTILINE)
NAMED = re.compile(r'\[(`[^`\n]+`)\]\(https?://[^)\s]+\)') # a link that nbdev made of a name
MARKDOWN = 'text/markdown'
SPANS = re.compile(r'(`+)(?!`).+?(?<!`)\1(?!`)', re.DOTALL)


def slug(
    heading:str, # Markdown
)->str: # its identifier on the page, as pandoc makes it: "The `k` of it" -> "the-k-of-it"
    "What a heading is called in a link."
    words = re.sub(r'\[([^]]*)\]\([^)]*\)|[`*]', r'\1', heading).lower()
    words = re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', words.strip()))
    return re.sub(r'^[\W\d_]+', '', words) or 'section'


def texts(
    nb:dict, # a notebook's JSON
)->list[str]: # Markdown and HTML, in order
    "What a page says, outputs included."
    found = []
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': found.append(joined(cell['source']))
        for out in cell.get('outputs', []): found += [joined(out.get('data', {}).get(k, '')) for k in ('text/markdown', 'text/html')]
    return [o for o in found if o]


def front_matter(
    nb:dict, # a notebook's JSON, processed
)->dict[str,str]: # title, description and output-file
    "What the site is told of a page."
    head = next((joined(c['source']) for c in nb['cells'] if c['cell_type'] == 'raw'), '')
    return yaml.safe_load(head.strip().strip('-')) if head else {}


def anchors(
    nb:dict, # a notebook's JSON
)->set[str]: # without "#"
    "Where on a page a link may lead."
    text = FENCED.sub('', '\n\n'.join(texts(nb)))
    found, seen = {a or b for a, b in re.findall(r'\bid="([^"]+)"|\{#([\w.-]+)', text)}, {}
    for heading in re.findall(r'^#{1,6} +(.+?)(?: +#+| *\{[^}]*\})?$', text, re.MULTILINE):
        name = slug(heading)
        seen[name] = seen.get(name, -1)+1
        found.add(f'{name}-{seen[name]}' if seen[name] else name)
    return found


def targets(
    text:str, # Markdown or HTML
)->list[str]: # in order
    "Where the links and pictures of a text lead."
    text = SPANS.sub('', FENCED.sub('', text))
    return re.findall(r'\]\(<?([^)\s>]+)', text)+re.findall(r'\b(?:href|src)="([^"]+)"', text)


def read_pages(
    pages:Path, # the folder with the processed notebooks
)->tuple[dict[str,dict],dict[str,str]]: # path -> a notebook's JSON; its address within the site -> path
    "The processed notebooks."
    notebooks = {p.relative_to(pages).as_posix(): json.loads(p.read_text(encoding='utf-8')) for p in sorted(pages.rglob('*.ipynb'))}
    return notebooks, {posixpath.join(posixpath.dirname(k), front_matter(v).get('output-file', posixpath.basename(k))): k for k, v in notebooks.items()}


def unlinked(
    text:str,       # Markdown
    known:Callable, # takes a match of `entry`: does the page that it leads to have the entry?
    entry:re.Pattern, # a link to an entry of the site: [`name`](address#anchor)
    fences:bool=False, # are links within code blocks nbdev's too?
)->str: # Markdown whose links lead to entries
    "Take back the links to names without an entry, and those within code, where they are no links but brackets."
    text = entry.sub(lambda o: o[0] if known(o) else o[1], text)
    return FENCED.sub(lambda block: NAMED.sub(r'\1', block[0]), text) if fences else text


def unlink(
    pages:Path, # the folder with the processed notebooks
    site:str,   # the address of the site
):
    """Take back the links that nbdev made where there is nothing to link to, or nothing to link from.

    It links every name of a module, and enters only those that are public; and it links names in the comments of a
    signature, which is a block of code. Pages are written as Jupyter writes them, texts as lists of lines: Quarto
    loses the line ends of a text in one piece.
    """
    notebooks, addresses = read_pages(pages)
    places = {k: anchors(v) for k, v in notebooks.items()}
    entry = re.compile(r'\[(`[^`]+`)\]\('+re.escape(site)+r'/([\w./-]+)#([\w.-]+)\)')
    def known(found): return found[3] in places.get(addresses.get(found[2]), ())
    for page, nb in notebooks.items():
        for cell in nb['cells']:
            if cell['cell_type'] == 'markdown': cell['source'] = unlinked(joined(cell['source']), known, entry)
            for data in (out.get('data', {}) for out in cell.get('outputs', [])):
                if MARKDOWN in data: data[MARKDOWN] = unlinked(joined(data[MARKDOWN]), known, entry, fences=True)
        nbformat.write(nbformat.from_dict(nb), pages/page)


def in_lines(
    text, # of a cell or of an output
)->bool:
    "Tell whether a text is a list of lines, all but the last with their ends."
    return isinstance(text, list) and all(o.endswith('\n') and o.count('\n') == 1 for o in text[:-1]) and not any('\n' in o[:-1] for o in text[-1:])


def garbled(
    pages:Path, # the folder with the processed notebooks
)->list[str]: # "page, cell i: what is wrong"
    "What Quarto would render as a heap: texts that are no lists of lines, and links within signatures."
    wrong = []
    for page, nb in read_pages(pages)[0].items():
        for i, cell in enumerate(nb['cells']):
            bundles = [out.get('data', {}) for out in cell.get('outputs', [])]
            said = [cell['source'], *(o[k] for o in bundles for k in o if k.startswith('text/'))]
            code = [m[0] for o in bundles for m in FENCED.finditer(joined(o.get(MARKDOWN, '')))]
            if not all(map(in_lines, said)): wrong.append(f'{page}, cell {i}: a text is no list of lines')
            if any(map(NAMED.search, code)): wrong.append(f'{page}, cell {i}: a link within a signature')
    return wrong


def broken(
    pages:Path, # the folder with the processed notebooks
    site:str,   # the address of the site, by which its pages may also be called
)->list[str]: # "page: target", each that leads nowhere
    "The links within the site that lead to no page, no file or no anchor."
    notebooks, addresses = read_pages(pages)
    places, wrong = {k: anchors(v) for k, v in notebooks.items()}, []
    for page, nb in notebooks.items():
        for target in (t for text in texts(nb) for t in targets(text)):
            path, _, anchor = unquote(target).partition('#')
            if path.startswith(site+'/'): path = addresses.get(path[len(site)+1:] or 'index.html', path)
            elif re.match(r'[a-zA-Z][\w+.-]*:|//', path): continue
            else: path = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
            there = path in notebooks or (pages/path).is_file()
            if not there or anchor and anchor not in places.get(path, {anchor}): wrong.append(f'{page}: {target}')
    return wrong


class Rendered(HTMLParser):
    "The `ids` of a page, and where its `links` lead."
    def __init__(self):
        super().__init__()
        self.ids,self.links = set(),[]

    def handle_starttag(self, tag, attrs):
        "Note what a tag is called, and what it refers to."
        found = dict(attrs)
        self.ids |= {found[k] for k in ('id', 'name') if found.get(k)}
        self.links += [found[k] for k in ('href', 'src') if found.get(k)]


def broken_html(
    site:Path, # a folder with a rendered site
)->list[str]: # "page: target", each that leads nowhere
    "The relative links of a rendered site that lead to no file or no anchor."
    pages = {}
    for p in site.rglob('*.html'):
        if '_static' in p.parts: continue # templates of the theme
        pages[p.resolve()] = Rendered()
        pages[p.resolve()].feed(p.read_text(encoding='utf-8'))
    wrong = []
    for p, page in pages.items():
        for target in dict.fromkeys(page.links):
            path, _, anchor = unquote(target).partition('#')
            if re.match(r'[a-zA-Z][\w+.-]*:|/', target): continue
            goal = (p.parent/path.partition('?')[0]).resolve() if path.partition('?')[0] else p
            if goal.is_dir(): goal = goal/'index.html'
            if not goal.is_file() or anchor and goal in pages and anchor not in pages[goal].ids: wrong.append(f'{p.relative_to(site.resolve()).as_posix()}: {target}')
    return wrong
