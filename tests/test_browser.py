"The first tutorial as its readers meet it: in JupyterLab, in a browser, run from top to bottom, and then played with."
import re
import shutil
from pathlib import Path

import browser
import pytest

pytest.importorskip('playwright', reason='Playwright is not installed: pip install playwright')
pytestmark = pytest.mark.skipif(not browser.find_browser(), reason='there is no Chromium on this machine to test in: install chromium')

TUTORIAL = Path(__file__).resolve().parents[1]/'nbs/tutorials/01_first_look.ipynb'
COUNT = '.patchcore-explorer table td b'
# From the press of the mouse on the slider until the counts are written anew and the new picture is there, in milliseconds; -1: never.
WATCH = '''() => {
    const root = document.querySelector(".patchcore-explorer"), scores = [...root.querySelectorAll("svg")].at(-1).parentElement;
    let start = null;
    root.querySelector(".noUi-base").parentElement.addEventListener("pointerdown", () => { start = performance.now(); }, { once: true, capture: true });
    const written = new Promise((done) => { const o = new MutationObserver(() => { o.disconnect(); done(); }); o.observe(scores, { childList: true, subtree: true }); });
    const loaded = new Promise((done) => root.querySelector("img").addEventListener("load", done, { once: true }));
    const late = new Promise((done) => setTimeout(() => done(-1), 10000));
    window.timed = Promise.race([late, Promise.all([written, loaded]).then(() => performance.now() - start)]);
}'''


@pytest.fixture(scope='module')
def tutorial(tmp_path_factory):
    "A page with the first tutorial, run from top to bottom; and what went wrong on the way."
    folder, home = tmp_path_factory.mktemp('notebooks'), tmp_path_factory.mktemp('jupyter')
    shutil.copy(TUTORIAL, folder)
    with browser.lab(folder, home) as (url, token), browser.page() as page:
        said = []
        page.on('pageerror', lambda e: said.append(str(e)))
        browser.open_notebook(page, url, token, TUTORIAL.name)
        errors = browser.run_all(page)
        page.wait_for_selector('.patchcore-why img')
        yield page, errors+[o for o in said if 'patchcore' in o.lower() or 'anywidget' in o.lower()]


def counts(page)->list[int]: return [int(o) for o in page.locator(COUNT).all_inner_texts()]


def test_runs_without_error(tutorial):
    page, errors = tutorial
    assert not errors
    assert page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
    assert page.get_by_text(re.compile('Error displaying widget|Failed to load|Loading widget')).count() == 0
    assert page.locator('.patchcore-explorer').count() == page.locator('.patchcore-why').count() == 1

def test_the_threshold_moves_the_counts(tutorial):
    page, _ = tutorial
    explorer = page.locator('.patchcore-explorer')
    explorer.scroll_into_view_if_needed()
    before, board = counts(page), explorer.locator('table').evaluate('o => o.parentElement.innerHTML')
    picture = explorer.locator('img').first.get_attribute('src')
    assert len(before) == 4 and sum(before) == 24
    handle, track = explorer.locator('.noUi-handle').first, explorer.locator('.noUi-base').first.bounding_box()
    box = handle.bounding_box()
    page.mouse.move(box['x']+box['width']/2, box['y']+box['height']/2)
    page.mouse.down()
    page.mouse.move(track['x']+2, box['y']+box['height']/2, steps=8) # to the lowest threshold
    page.mouse.up()
    page.wait_for_function('before => document.querySelector(".patchcore-explorer table").parentElement.innerHTML !== before', arg=board, timeout=20_000)
    page.wait_for_timeout(500)
    after = counts(page)
    assert after != before and sum(after) == 24
    assert after[1] == after[3] == 0 and after[0] == 15 # at the lowest threshold everything is called anomalous: none missed, none passed
    assert explorer.locator('img').first.get_attribute('src') != picture

def test_a_change_of_the_threshold_is_shown_at_once(tutorial):
    page, _ = tutorial
    track, spent = page.locator('.patchcore-explorer .noUi-base').first.bounding_box(), []
    for x in (.1, .5, .2, .6, .15, .55, .25, .45, .05, .35): # the first image has the highest score, so that each of these outlines other patches
        page.evaluate(WATCH)
        page.mouse.click(track['x']+x*track['width'], track['y']+track['height']/2)
        spent.append(page.evaluate('() => window.timed'))
        page.wait_for_timeout(500) # while a handle glides to where it was sent, the slider hears no second press
    print(f'milliseconds from the press of the mouse to the new picture: {[*map(round, spent)]}')
    assert min(spent) > 0 # it is there; alone on a machine it takes less than a tenth of a second

def test_the_strip_is_clicked(tutorial):
    page, _ = tutorial
    explorer = page.locator('.patchcore-explorer')
    before = explorer.locator('img').first.get_attribute('alt')
    strip = explorer.locator('img').last
    strip.scroll_into_view_if_needed()
    box = strip.bounding_box()
    strip.click(position=dict(x=box['width']*.5, y=box['height']/2))
    page.wait_for_function('before => document.querySelector(".patchcore-explorer img").alt !== before', arg=before, timeout=20_000)

def test_a_click_on_the_map_shows_neighbours(tutorial):
    page, _ = tutorial
    why = page.locator('.patchcore-why')
    picture = why.locator('img').first
    picture.scroll_into_view_if_needed()
    reason = why.locator('.widget-html:has(table)').last
    before, box = reason.inner_html(), picture.bounding_box()
    picture.click(position=dict(x=box['width']*.5, y=box['height']*.75))
    table = '[...document.querySelectorAll(".patchcore-why .widget-html")].filter((o) => o.querySelector("table")).at(-1)' # none while it is drawn anew
    page.wait_for_function(f'before => {{ const table = {table}; return table && table.innerHTML !== before }}', arg=before, timeout=20_000)
    assert re.search(r'patch at row 2[01], column 1[34]', reason.inner_text()) # half way across, three quarters down
    shown = reason.locator('img').evaluate_all('imgs => imgs.map((o) => [o.complete, o.naturalWidth, o.alt])')
    assert len(shown) == 5 and all(done and width == 96 for done, width, _ in shown) # the patch, and four neighbours
    assert all(alt.startswith('training image') for *_, alt in shown[1:])

def test_the_keyboard_does_what_the_mouse_does(tutorial):
    page, _ = tutorial
    picture = page.locator('.patchcore-why img').first
    picture.focus()
    row = page.locator('.patchcore-why .widget-readout').nth(1)
    before = int(row.inner_text())
    picture.press('ArrowUp')
    page.wait_for_function('([before]) => +document.querySelectorAll(".patchcore-why .widget-readout")[1].innerText === before-1', arg=[before], timeout=20_000)

def test_restarts_and_runs_again(tutorial):
    page, _ = tutorial
    page.evaluate('() => document.querySelector(".patchcore-why").setAttribute("data-before", "yes")')
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Restart Kernel and Run All Cells', exact=False).first.click()
    page.locator('.jp-Dialog .jp-mod-accept').click()
    page.wait_for_selector('.patchcore-why:not([data-before]) img', timeout=240_000)
    page.wait_for_function(browser.FINISHED, timeout=60_000)
    assert not page.evaluate(browser.ERRORS)
    assert sum(counts(page)) == 24
