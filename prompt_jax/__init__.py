"""Soft prompts and other parameter-efficient tuning of frozen T5s, in JAX.

Names below are imported when they are first asked for, so that `import
prompt_jax` costs nothing. Not for anything else: every name lives in a module
of its own, e.g. `prompt_jax.deltas`.
"""

import importlib
from typing import Any

__version__ = '0.1.0'

# Public name -> the module that defines it.
_LAZY = {
  'T5': 'prompt_jax.network.t5',
  'T5Config': 'prompt_jax.network.t5',
  'DecoderOnly': 'prompt_jax.network.decoder_only',
  'EncoderDecoderModel': 'prompt_jax.models',
  'DecoderOnlyModel': 'prompt_jax.models',
}

__all__ = ['__version__', *_LAZY]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
  """Imports a public name at its first use (PEP 562)."""
  if name not in _LAZY:
    raise AttributeError(
      f'module {__name__!r} has no attribute {name!r}. '
      f'It has: {", ".join(__all__)}.'
    )
  value = getattr(importlib.import_module(_LAZY[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
