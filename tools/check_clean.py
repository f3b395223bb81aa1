"""Check that nbdev_clean, nbdev_export and the generator of README, CONTRIBUTING and CHANGELOG have nothing left to do.

They are run, and what they change is listed; it stays changed: look at the difference and commit it.
nbdev_clean only warns where it fails, so its warnings count as failures here.
"""
import hashlib
import sys
import warnings
from pathlib import Path

import readme
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export


def held(
    root:Path, # the project's root
)->dict[str,str]: # path, relative to the root -> SHA-256 of what it holds
    "What clean, export and the documents' generator may touch."
    cfg = get_config()
    found = [*cfg.nbs_path.rglob('*.ipynb'), *(cfg.nbs_path/readme.PICTURES).glob('*'), *cfg.lib_path.rglob('*'), *(root/o for o in readme.DOCUMENTS.values())]
    kept = [p for p in found if p.is_file() and not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)]
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def changes(
    root:Path, # the project's root
)->list[str]: # the files that were changed, made or removed, relative to the root
    "Run clean, export and the documents' generator, and compare before with after."
    before = held(root)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        nbdev_clean.__wrapped__()
        nbdev_export.__wrapped__()
    readme.write(readme.wanted())
    after = held(root)
    return sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))


if __name__ == '__main__':
    if changed := changes(get_config().config_path):
        sys.exit('\n  '.join(['These files are not as nbdev_clean, nbdev_export and tools/readme.py leave them:', *changed])
                 + '\nThey are now: look at the difference, and commit it.')
    print('Clean, export and documents: nothing to change.')
