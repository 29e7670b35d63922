"""Packaging. `gin_configs/` and `tasks/` ship under `prompt_jax`'s name."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
# Folder in the checkout -> package in the wheel.
FOLDERS = {
  'prompt_jax': 'prompt_jax',
  'tasks': 'prompt_jax.tasks',
  'gin_configs': 'prompt_jax.gin_configs',
}


def version() -> str:
  """The version, read without importing (and so installing) anything."""
  text = (ROOT / 'prompt_jax' / '__init__.py').read_text()
  found = re.search(r"^__version__ = '(.+)'$", text, re.MULTILINE)
  if found is None:
    raise RuntimeError('prompt_jax/__init__.py does not set __version__.')
  return found[1]


def packages() -> list[str]:
  """Every package below `FOLDERS`, by the name it is imported as."""
  names = []
  for folder, package in FOLDERS.items():
    below = setuptools.find_packages(str(ROOT / folder))
    names += [package, *(f'{package}.{name}' for name in below)]
  return names


def long_description() -> str:
  """The README; empty in a tree that has none."""
  readme = ROOT / 'README.md'
  return readme.read_text() if readme.exists() else ''


setuptools.setup(
  name='prompt_jax',
  version=version(),
  description='Soft prompts and parameter-efficient tuning of T5 in JAX.',
  long_description=long_description(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  packages=packages(),
  package_dir={package: folder for folder, package in FOLDERS.items()},
  package_data={'prompt_jax.gin_configs': ['**/*.gin']},
  python_requires='>=3.11',
  entry_points={'console_scripts': ['prompt-jax = prompt_jax.cli:main']},
  # The versions that the tests run with lie inside these ranges. Imported too,
  # and never missing: what jax (numpy, scipy), seqio (TensorFlow, its datasets
  # and text ops, sentencepiece), orbax (tensorstore, absl) and sacrebleu
  # (tabulate) bring along.
  install_requires=[
    'jax>=0.10,<0.11',
    'flax>=0.12,<0.13',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12,<0.13',
    'jaxtyping>=0.3,<0.4',
    'gin-config>=0.5,<0.6',
    'seqio>=0.0.20,<0.1',
    # TFDS imports it before a download, and leaves its listing to etils, which
    # no longer brings it along.
    'importlib_resources>=6,<8',
    'safetensors>=0.8,<0.9',
    'sacrebleu>=2.6,<3',
    'rouge-score>=0.1.2,<0.2',
    'scikit-learn>=1.9,<2',
    'matplotlib>=3.10,<4',
    'tqdm>=4.67,<5',
    'jinja2>=3.1,<4',
    'pyyaml>=6,<7',
  ],
  extras_require={
    'report': ['plotly>=6,<7'],  # a study's report.html
    'slurm': ['submitit>=1.5,<2'],
    # Pinned: a new version of a tool is a change of its own.
    'test': [
      'pytest==9.1.1',  # pytest-xdist 3.8 has no groups with 9.2
      'pytest-xdist==3.8.0',
      'ruff==0.17.5',
      'pyright[nodejs]==1.1.414',  # node from the package index
      'plotly==6.9.0',
      'submitit==1.5.4',
      'beartype==0.23.1',  # jaxtyping's run-time check; not typeguard 4
      'transformers==5.23.0',  # parity tests against another T5
      'torch==2.13.0',
    ],
    'gpu': ['jax[cuda13]>=0.10,<0.11'],
    'tpu': ['jax[tpu]>=0.10,<0.11'],
    # Not on the package index: pip clones the repository.
    't5x': ['t5x @ git+https://github.com/google-research/t5x'],
  },
)
