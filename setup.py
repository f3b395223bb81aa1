"Reads settings.ini, the single source of the package's metadata; pyproject.toml lists as dynamic what is set here."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
readme = here/'README.md'
lib = here/cfg['lib_path']

# What nbdev calls licences and the states of a project, as the package index calls them.
LICENCES = {'apache2': 'Apache-2.0', 'mit': 'MIT', 'bsd3': 'BSD-3-Clause', 'gpl2': 'GPL-2.0-only', 'gpl3': 'GPL-3.0-only'}
STATES = ['Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Production/Stable', 'Mature', 'Inactive']

# Each `NAME_requirements` is an extra, `pip install patchcore_nb[NAME]`; `all` is their union.
extras = {k.removesuffix('_requirements'): shlex.split(v) for k, v in cfg.items() if k.endswith('_requirements')}
extras['all'] = list(dict.fromkeys(r for found in extras.values() for r in found))

# The files of the package that are no modules: py.typed, templates, styles.
files = [p.relative_to(lib).as_posix() for p in sorted(lib.rglob('*')) if p.is_file() and p.suffix not in ('.py', '.pyc')]

setup(
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license_expression=LICENCES[cfg['license']],
    keywords=cfg['keywords'].split(),
    classifiers=[
        f"Development Status :: {cfg['status']} - {STATES[int(cfg['status'])-1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    package_data={cfg['lib_path']: files},
    install_requires=shlex.split(cfg['requirements']),
    extras_require=extras,
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
