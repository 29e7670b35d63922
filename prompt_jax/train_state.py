"""What training changes, and the split of a parameter tree by patterns."""

from collections.abc import Sequence
import re
from typing import Any

from flax import struct
from flax import traverse_util

from prompt_jax import deltas


@struct.dataclass
class TrainState:
  """Everything that a step changes; with the data position, all of a run.

  Attributes:
    step: steps done, int32 scalar.
    trainable: {'method': ..., 'network': ...}, float32.
    opt_state: of the optimizer, over `trainable` only.
    rng: key data, uint32 [2]; each step folds its number in.
  """

  step: Any
  trainable: Any
  opt_state: Any
  rng: Any


def flatten(tree: Any) -> dict[str, Any]:
  """A nested dict by paths 'a/b/c'."""
  return traverse_util.flatten_dict(tree, sep='/')


def unflatten(flat: dict[str, Any]) -> Any:
  """The inverse of `flatten`."""
  return traverse_util.unflatten_dict(flat, sep='/')


def split(params: Any, patterns: Sequence[str]) -> tuple[Any, Any]:
  """Parameters whose whole path matches a pattern, and the others.

  Raises:
    ValueError: a pattern matches nothing; with the paths that come near.
  """
  flat = flatten(params)
  for pattern in patterns:
    if not any(re.fullmatch(pattern, path) for path in flat):
      near = deltas.near_misses(pattern, flat)
      raise ValueError(
        f'trainable_patterns: no parameter of the network matches '
        f'{pattern!r}.{near or f" Paths look like {min(flat)!r}."}'
      )
  chosen = {p for p in flat if any(re.fullmatch(r, p) for r in patterns)}
  return (
    unflatten({p: v for p, v in flat.items() if p in chosen}),
    unflatten({p: v for p, v in flat.items() if p not in chosen}),
  )


def merge(x: Any, y: Any) -> Any:
  """The inverse of `split`; the two have no path in common."""
  return unflatten({**flatten(x), **flatten(y)})
