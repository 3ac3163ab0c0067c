"Packaging: everything comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

LICENSES = dict(apache2='Apache-2.0')
STATUSES = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
package, readme = cfg['lib_path'], here/'README.md'

def package_files(pattern): # relative to the package, sub-folders included
    root = here/package
    found = [p for m in root.glob(pattern) for p in ([m] if m.is_file() else m.rglob('*'))]
    return [str(p.relative_to(root)) for p in found if p.is_file() and '__pycache__' not in p.parts]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'], long_description_content_type='text/markdown',
    url=cfg['git_url'], author=cfg['author'], author_email=cfg['author_email'], license=LICENSES[cfg['license']],
    classifiers=[f"Development Status :: {STATUSES[cfg.getint('status')-1]}", f"Intended Audience :: {cfg['audience']}",
                 f"Natural Language :: {cfg['language']}", f"Programming Language :: Python :: {cfg['min_python']}"],
    packages=find_packages(include=[package, f'{package}.*']),
    package_data={package: [f for p in cfg['package_data'].split() for f in package_files(p)]},
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(), extras_require=dict(dev=cfg['dev_requirements'].split()),
    entry_points=dict(console_scripts=cfg['console_scripts'].split()), zip_safe=False,
)
