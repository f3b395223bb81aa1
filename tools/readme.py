"""Write README.md, its Chinese twin, CONTRIBUTING.md and CHANGELOG.md, and the pictures they show, from notebooks; `--check` writes nothing and says what differs.

nbdev's own commands for this need Quarto; this one does not, so the files are the same bytes with and without it.
The notebooks' stored outputs are shown as they are: nothing is executed here.
"""
import argparse
import base64
import json
import posixpath
import re
import sys
from pathlib import Path

import yaml
from nbdev.config import get_config

DOCUMENTS = {'index.ipynb': 'README.md', 'index_zh.ipynb': 'README.zh.md', 'contributing.ipynb': 'CONTRIBUTING.md', 'changelog.ipynb': 'CHANGELOG.md'}
PICTURES = 'images/readme'  # below nbs/, emptied and refilled at each run
HIDING = {'hide', 'default_exp', 'export', 'exporti'}
SHOWING = {'echo', 'output', 'include', 'eval', 'fig-alt', 'fig-cap'}
NOTE = '<!-- Written by tools/readme.py: edit nbs/{name} and run `make readme`. -->'


def directives(
    source:str, # a code cell
)->tuple[dict,str]: # its `#|` lines as name -> value, None for a bare name; its code without them
    "Take the directives off the head of a cell."
    lines = source.splitlines()
    head = next((i for i, line in enumerate(lines) if not re.match(r'\s*(#\s*\||$)', line)), len(lines))
    found = [re.sub(r'\s*#\s*\|\s*', '', line, count=1) for line in lines[:head] if line.strip()]
    pairs = [yaml.safe_load(d) if re.match(r'[\w-]+:', d) else {d.split()[0]: None} for d in found if d]
    return {name: value for pair in pairs for name, value in pair.items()}, '\n'.join(lines[head:])


def joined(
    text:str|list, # a notebook keeps text as it is or as a list of lines
)->str: # in one piece
    "The text of a cell or an output."
    return text if isinstance(text, str) else ''.join(text)


def fence(
    text:str,      # the block's lines
    language:str='', # written after the opening fence
)->str: # a fenced block, its fence longer than any run of backticks inside
    "A Markdown code block."
    ticks = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{ticks}{language}\n{text.strip(chr(10))}\n{ticks}'


def from_root(
    target:str, # where a link in the notebook leads
    folder:str, # the notebooks' folder, relative to the root
)->str: # the same place as seen from the root
    "Rebase a relative link, to a document where the notebook is one; leave addresses, anchors and absolute paths alone."
    if target.startswith('attachment:'): raise ValueError(f'{target}: a document cannot show attachments: put the picture into {folder}/images')
    if re.match(r'[a-zA-Z][\w+.-]*:|[/#]', target): return target
    page, mark, anchor = target.partition('#')
    return (DOCUMENTS.get(page) or posixpath.normpath(posixpath.join(folder, page))) + mark + anchor


def prose(
    source:str, # a Markdown cell
    folder:str, # the notebooks' folder, relative to the root
)->str: # the cell with its links seen from the root
    "Rebase the links of a Markdown cell, outside code."
    parts = re.split(r'(^```.*?^```|`[^`\n]*`)', source, flags=re.DOTALL|re.MULTILINE)
    link = re.compile(r'(\]\(|\b(?:src|href)=")([^)"\s]+)')
    parts[::2] = [link.sub(lambda m: m[1] + from_root(m[2], folder), p) for p in parts[::2]]
    return ''.join(parts).strip()


class Page:
    "A document while it is put together: `blocks` of Markdown, `pictures` by file name, those of earlier documents among them."
    def __init__(self, folder, pictures): self.folder,self.blocks,self.pictures = folder,[],pictures

    def picture(self, data, marks):
        "Keep a PNG output, once, and show it by its path."
        picture = base64.b64decode(data)
        name = next((k for k, v in self.pictures.items() if v == picture), f'figure-{len(self.pictures) + 1}.png')
        self.pictures[name] = picture
        caption = marks.get('fig-cap')
        self.blocks.append(f"![{marks.get('fig-alt') or caption or ''}]({self.folder}/{PICTURES}/{name})")
        if caption: self.blocks.append(f'*{caption}*')

    def output(self, out, marks):
        "Show one output: Markdown as Markdown, a picture as a file, anything else as text."
        if out['output_type'] == 'error': raise ValueError(f"the notebook stored an error: {out['ename']}: {out['evalue']}")
        data = {'text/plain': out['text']} if out['output_type'] == 'stream' else out['data']
        if 'text/markdown' in data: self.blocks.append(prose(joined(data['text/markdown']), self.folder))
        elif 'image/png' in data: self.picture(joined(data['image/png']), marks)
        elif 'text/plain' in data:
            text = re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', joined(data['text/plain']))
            self.blocks.append(prose(text, self.folder) if marks.get('output') == 'asis' else fence(text))
        else: raise ValueError(f'an output has none of Markdown, PNG and text, only {sorted(data)}')

    def code(self, cell):
        "Show a code cell and its outputs as its directives ask."
        marks, source = directives(joined(cell['source']))
        if unknown := marks.keys() - HIDING - SHOWING: raise ValueError(f'directives that a document does not know: {sorted(unknown)}')
        if HIDING & marks.keys() or marks.get('include') is False: return
        if source.strip() and marks.get('echo') is not False: self.blocks.append(fence(source, 'python'))
        if marks.get('output') is False: return
        for out in cell['outputs']: self.output(out, marks)


def build(
    nb:dict,                # a notebook's JSON
    name:str='index.ipynb', # its file name
    folder:str='nbs',       # the notebooks' folder, relative to the root
    pictures:dict[str,bytes]=None, # of the documents before this one
)->tuple[str,dict[str,bytes]]: # the document's text; file name -> bytes of each picture, those given among them
    "Turn a notebook with its stored outputs into a document."
    page = Page(folder, dict(pictures or {}))
    for i, cell in enumerate(nb['cells']):
        try:
            if cell['cell_type'] == 'markdown': page.blocks.append(prose(joined(cell['source']), folder))
            elif cell['cell_type'] == 'code': page.code(cell)
        except (ValueError, yaml.YAMLError) as e: raise ValueError(f'{folder}/{name}, cell {i}: {e}') from e
    page.blocks.insert(1, NOTE.format(name=name))
    return '\n\n'.join(b for b in page.blocks if b) + '\n', page.pictures


def wanted()->dict[Path,bytes]: # each file that is written -> what it should hold
    "The documents and their pictures, as the notebooks have them now."
    cfg = get_config()
    folder = cfg.nbs_path.relative_to(cfg.config_path).as_posix()
    files, pictures = {}, {}
    for name, document in DOCUMENTS.items():
        if not (cfg.nbs_path/name).exists(): continue
        nb = json.loads((cfg.nbs_path/name).read_text(encoding='utf-8'))
        text, pictures = build(nb, name, folder, pictures)
        files[cfg.config_path/document] = text.encode()
    return files | {cfg.nbs_path/PICTURES/k: v for k, v in pictures.items()}


def differing(
    files:dict[Path,bytes], # what each file should hold
)->list[Path]: # those that hold something else, are not there, or should not be there
    "Compare the documents on disk with those wanted; line ends do not count."
    def held(path): return path.read_bytes().replace(b'\r\n', b'\n') if path.suffix == '.md' else path.read_bytes()
    stale = set((get_config().nbs_path/PICTURES).glob('*')) - files.keys()
    return sorted(stale | {p for p, data in files.items() if not p.exists() or held(p) != data})


def write(
    files:dict[Path,bytes], # what each file should hold
)->list[Path]: # the files that changed
    "Bring the documents on disk up to date, and remove pictures that none shows any more."
    changed = differing(files)
    for path in changed:
        if path not in files: path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path])
    return changed


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=f"Write {', '.join(DOCUMENTS.values())} and their pictures from the notebooks in nbs/.")
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 if a document is not current')
    check = parser.parse_args().check
    root = get_config().config_path
    paths = [p.relative_to(root).as_posix() for p in (differing if check else write)(wanted())]
    if check and paths: sys.exit(f"Not as their notebooks have them: {', '.join(paths)}. Run `make readme` (python tools/readme.py).")
    print('Documents: ' + (', '.join(paths) or 'nothing to change'))
