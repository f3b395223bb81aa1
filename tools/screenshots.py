"""Photographs of the widgets for the site, taken in a real JupyterLab: `python tools/screenshots.py`, into nbs/images/widgets/.

They show the generated demo set, and are taken again when a widget has changed its looks.
"""
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import browser
import nbformat
from PIL import Image, ImageChops, ImageColor, ImageOps

from patchcore_nb.board import OUTCOMES
from patchcore_nb.plots import CYAN
from patchcore_nb.reasons import LAYER_COLOURS

PLACE = Path(__file__).resolve().parents[1]/'nbs/images/widgets'
CELLS = '''
from tempfile import TemporaryDirectory
from patchcore_nb import Category, PatchCore, coreset_playground, explorer, feature_lab, labeller, load_category, why
---
folder = TemporaryDirectory()
category = load_category('demo', folder.name, 'cog')
model = PatchCore('filterbank', ratio=.05, target_dim=512).fit(category)
seen = model.predict(category.test)
---
widget = explorer(seen, category.test)
widget.view.p['threshold'].value = 76.
widget.view.p['at'].value = 3
widget
---
widget = why(model, seen, 2, category, category.test)
widget
---
small = Category('demo', 'cog', category.train[:20], category.test)
widget = coreset_playground(PatchCore('filterbank', target_dim=256), small, (.001, .002, .005, .01, .02, .05))
widget.view['ratio'].value = 4
widget
---
widget = feature_lab(small, model=PatchCore(target_dim=256, ratio=.02, false_alarms=None))
for layers, patchsize, k in ((['layer3'], 3, 1), (['layer2'], 3, 1), (['layer2', 'layer3'], 5, 3)):
    widget.view.layers.value, widget.view.patchsize.value, widget.view.k.value = layers, patchsize, k
widget.view.image.value = 3
widget
---
from pathlib import Path
from shutil import copy
photos = Path(folder.name)/'photographs'
photos.mkdir()
for i, o in enumerate([*category.train[:30], *category.test[3:5]]): copy(o.path, photos/f'part_{i:02}.png')
widget = labeller(photos)
for i in range(30): widget.view.mark('good')
widget.view.at.value, widget.view.kind.value = 31, 'broken tooth'
widget
'''
NAMES = dict(explorer='explorer', why='why', coreset='coreset_playground', lab='feature_lab', labeller='labeller')


def write_notebook(
    path:Path, # where to
):
    "A notebook that shows every widget."
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o.strip()) for o in CELLS.split('---')], metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3'}}), path)


def batched(palette:list[int])->list[list[int]]: return [palette[i:i+3] for i in range(0, len(palette), 3)]

def keep(
    path:Path, # a PNG, which is changed
    most:int=200_000, # bytes
):
    "Make a photograph small: no white around it, and no more colours than there is room for, those of the drawings among them."
    im = Image.open(path).convert('RGB')
    im = im.crop((0, 3, im.width, im.height-3)) # lines of the notebook above and below
    im = im.crop(ImageChops.difference(im, Image.new('RGB', im.size, 'white')).point(lambda v: 255*(v > 16)).getbbox())
    im = ImageOps.expand(im, 8, 'white')
    fixed = [c for o in ('white', 'black', CYAN, *OUTCOMES.values(), *LAYER_COLOURS) for c in (ImageColor.getrgb(o) if isinstance(o, str) else o)]
    for colours in (240, 160, 96, 64):
        palette = Image.new('P', (1, 1))
        palette.putpalette(fixed+im.quantize(colours).getpalette()[:3*colours])
        small = im.quantize(palette=palette, dither=Image.Dither.NONE)
        small.putpalette([255 if min(c) > 245 else v for c in batched(small.getpalette()) for v in c]) # white is white
        small.save(path, optimize=True)
        if path.stat().st_size < most: return
    raise RuntimeError(f'{path.name} is {path.stat().st_size} bytes, more than {most}')


if __name__ == '__main__':
    if not browser.find_browser(): sys.exit('There is no Chromium on this machine: install chromium.')
    PLACE.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, TemporaryDirectory() as home:
        write_notebook(Path(folder)/'all.ipynb')
        with browser.lab(Path(folder), Path(home)) as (url, token), browser.page(1400, 1400, 1) as page:
            browser.open_notebook(page, url, token, 'all.ipynb')
            if errors := browser.run_all(page, 500): sys.exit('\n'.join(errors))
            for shown, name in NAMES.items():
                widget = page.locator(f'.patchcore-{shown}').first
                widget.scroll_into_view_if_needed()
                page.wait_for_timeout(1500)
                widget.screenshot(path=PLACE/f'{name}.png')
                keep(PLACE/f'{name}.png')
                print(f'{name}.png: {(PLACE/f"{name}.png").stat().st_size:,} bytes')
