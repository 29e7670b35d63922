"""Sizes of T5 1.1, and the numbers of parameters that headers declare."""

import re

from prompt_jax import gin_rules

# d, L, H * k, f.
SIZES = {
  'small': (512, 8, 384, 1024),
  'base': (768, 12, 768, 2048),
  'large': (1024, 24, 1024, 2816),
  'xl': (2048, 24, 2048, 5120),
  'xxl': (4096, 24, 4096, 10240),
}


def declared(name):
  """What the header of `methods/NAME.gin` says, by size."""
  text = (gin_rules.packaged() / 'methods' / f'{name}.gin').read_text()
  text = text[text.index('Trained parameters') : text.index('prompt-jax train')]
  said = re.findall(r'\b(\w+) ([\d,]+)[;.]', text)
  return {s: int(n.replace(',', '')) for s, n in said if s in SIZES}


def check_declared(name, formula):
  """`formula(d, L, inner, f)` is what the header says, of every size."""
  assert declared(name) == {s: formula(*SIZES[s]) for s in SIZES}


def norm_scales(d, layers, *_):
  return 5 * layers * d + 2 * d
