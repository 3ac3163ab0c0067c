"Packaging: everything comes from settings.ini."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LICENSES = dict(apache2='Apache-2.0')
STATUSES = dict(
    enumerate(['Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Stable'], start=1)
)

parser = ConfigParser(delimiters=['='])
parser.read(HERE / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
package = cfg['lib_path']


def package_files(pattern):
    "Files that match a pattern, with all in matching folders; relative to the package."
    root = HERE / package
    found = []
    for match in root.glob(pattern):
        found += [match] if match.is_file() else match.rglob('*')
    found = [p for p in found if p.is_file() and '__pycache__' not in p.parts]
    return [str(p.relative_to(root)) for p in found]


def classifiers():
    "Trove classifiers of the package index."
    status = cfg.getint('status')
    return [
        f'Development Status :: {status} - {STATUSES[status]}',
        f'Intended Audience :: {cfg["audience"]}',
        f'Natural Language :: {cfg["language"]}',
        f'Programming Language :: Python :: {cfg["min_python"]}',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ]


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    url=cfg['git_url'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license=LICENSES[cfg['license']],
    classifiers=classifiers(),
    packages=find_packages(include=[package, f'{package}.*']),
    package_data={
        package: [f for p in cfg['package_data'].split() for f in package_files(p)]
    },
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require=dict(dev=cfg['dev_requirements'].split()),
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f'{cfg["lib_name"]} = {package}._modidx:d'],  # links to symbols
    },
    zip_safe=False,
)
