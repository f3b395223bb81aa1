"""JupyterLab in a browser that nobody sees: what the browser test and the photographs of the widgets have in common."""
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

FLAGS = ['--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
ANNOUNCEMENTS = '@jupyterlab/apputils-extension:announcements' # which ask the network for news
FINISHED = '''() => {
    const cells = window.jupyterapp?.shell.currentWidget?.content?.widgets ?? [];
    const code = cells.filter((o) => o.model.type === "code" && o.model.sharedModel.source.trim());
    const failed = code.some((o) => o.model.outputs.toJSON().some((x) => x.output_type === "error"));
    return code.length > 0 && (failed || code.every((o) => o.model.executionCount && o.model.executionState !== "running" && o.prompt !== "*"));
}'''
ERRORS = '''() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap((o) => o.model.type === "code" ? o.model.outputs.toJSON() : [])
    .filter((o) => o.output_type === "error").map((o) => `${o.ename}: ${o.evalue}`)'''


def find_browser()->str|None: # its path; None: there is none
    "A Chromium of the system."
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))), None)


def free_port()->int:
    "A port on loopback that nobody listens at."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def write_settings(
    home:Path, # an empty folder
)->dict[str,str]: # environment variables that make JupyterLab look there
    "Settings of a JupyterLab of one's own: no news, and every cell on the page, also those out of sight."
    settings = {'labconfig/page_config.json': {'disabledExtensions': {ANNOUNCEMENTS: True}},
                'settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings': {'windowingMode': 'none'}}
    for name, content in settings.items():
        (home/name).parent.mkdir(parents=True, exist_ok=True)
        (home/name).write_text(json.dumps(content), encoding='utf-8')
    places = dict(JUPYTER_CONFIG_DIR='', JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces', JUPYTER_RUNTIME_DIR='runtime', IPYTHONDIR='ipython')
    return {k: str(home/v) for k, v in places.items()}


def wait_for(
    url:str,               # of the server
    process:subprocess.Popen, # the server
    log:Path,              # what it says
    seconds:float=90,      # how long to wait
):
    "Wait until a server answers, or say what it said instead."
    end = time.monotonic()+seconds
    while time.monotonic() < end and process.poll() is None:
        try: return urllib.request.urlopen(f'{url}/api', timeout=5).close()
        except (urllib.error.URLError, OSError): time.sleep(.3)
    raise RuntimeError(f'JupyterLab does not answer at {url}:\n{log.read_text(encoding="utf-8", errors="replace")[-2000:]}')


def end(
    process:subprocess.Popen, # the server, which ends its kernels when it is told to go
    seconds:float=20,         # before it is not asked any more
):
    "End a server."
    process.send_signal(signal.SIGTERM)
    try: process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def lab(
    folder:Path, # with the notebooks
    home:Path,   # an empty folder, for settings and the log
):
    "JupyterLab on loopback: yields its address and its token."
    port, token, log = free_port(), secrets.token_hex(16), home/'log.txt'
    env = os.environ | write_settings(home) | dict(JUPYTER_TOKEN=token)
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', f'--ServerApp.root_dir={folder}', '--LabApp.expose_app_in_browser=True']
    if hasattr(os, 'geteuid') and os.geteuid() == 0: command.append('--allow-root')
    with open(log, 'wb') as f: process = subprocess.Popen(command, cwd=folder, env=env, stdout=f, stderr=subprocess.STDOUT)
    try:
        wait_for(url := f'http://127.0.0.1:{port}', process, log)
        yield url, token
    finally: end(process)


@contextmanager
def page(
    width:int=1400, height:int=1000, # of the window, pixels
    scale:float=1,                   # pixels of the screen to a pixel of the page
):
    "A page in a browser that nobody sees."
    from playwright.sync_api import sync_playwright
    flags = FLAGS+(['--no-sandbox'] if hasattr(os, 'geteuid') and os.geteuid() == 0 else [])
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find_browser(), args=flags)
        try: yield browser.new_page(viewport=dict(width=width, height=height), device_scale_factor=scale)
        finally: browser.close()


def open_notebook(
    page,      # as `page` yields it
    url:str, token:str, # as `lab` yields them
    name:str,  # of the notebook, relative to the folder of `lab`
):
    "Open a notebook and wait for its kernel."
    page.goto(f'{url}/lab/tree/{name}?token={token}&reset', wait_until='domcontentloaded', timeout=90_000)
    page.wait_for_selector('.jp-NotebookPanel .jp-Cell', timeout=90_000)
    page.wait_for_function('() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === "idle"', timeout=90_000)


def run_all(
    page,              # with a notebook in it
    seconds:float=240, # how long it may take
)->list[str]: # what went wrong
    "Run all cells by the menu, and wait for the last."
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()
    page.wait_for_function(FINISHED, timeout=1000*seconds)
    return page.evaluate(ERRORS)
