"""Tables at projections: what LoRA, (IA)^3 and added biases have in common.

Not for what a table means: each method says that of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn

from prompt_jax.methods import base
from prompt_jax.network.layers import Initializer

# How the change of one layer and task is drawn: (initializer, the site, sizes
# and logical names of its axes).
Spec = tuple[Initializer, base.Site, Sequence[tuple[int, str | None]]]


def check_whole_numbers(module: nn.Module, *fields: str) -> None:
  """Refuses fields that are no whole number of at least 1.

  Raises:
    ValueError: one of them is not.
  """
  for field in fields:
    value = getattr(module, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(
        f'{type(module).__name__}.{field} must be a whole number of at least '
        f'1, got {value!r}.'
      )


def as_patterns(module: nn.Module) -> tuple[str, ...]:
  """`module.targets`, one pattern or several, as a tuple.

  Raises:
    ValueError: there is none, or it is no text.
  """
  found: Any = module.targets  # pyright: ignore[reportAttributeAccessIssue]
  patterns = (found,) if isinstance(found, str) else found
  good = isinstance(patterns, Sequence) and len(patterns) > 0
  if not good or not all(isinstance(p, str) for p in patterns):
    raise ValueError(
      f'{type(module).__name__}.targets must be patterns of whole paths, such '
      f"as ('.*/query', '.*/value'), got {found!r}."
    )
  return tuple(patterns)


def find(context: base.Context, patterns: Sequence[str]) -> list[base.Site]:
  """The sites that a pattern matches, each once.

  Raises:
    ValueError: a pattern matches nothing; with the paths that come near.
  """
  sites = {s.path: s for pattern in patterns for s in context.match(pattern)}
  return list(sites.values())


def tables(
  module: nn.Module, specs: Mapping[str, Spec], num_tasks: int
) -> dict[str, Any]:
  """Parameters [(L,) (G,) ...] at paths of the network, as [(L,) G, ...].

  Args:
    module: the method that they belong to.
    specs: path, such as 'encoder/layers/attention/query/lora_a' -> what is
      there.
    num_tasks: G; where it is 1 the parameters have no axis of tasks.
  """
  made = {}
  for path, (init, site, sizes) in specs.items():
    layers = zip(site.shape[:-2], site.axes[:-2], strict=True)
    tasks = [(num_tasks, 'task')] if num_tasks > 1 else []
    shape, axes = zip(*layers, *tasks, *sizes, strict=True)
    made[path] = init, shape, axes
  found = base.params_at(module, made)
  for path, (_, site, sizes) in specs.items():
    one = [size for size, _ in sizes]
    shape = (*site.shape[:-2], num_tasks, *one)
    found[path] = found[path].reshape(shape)
  return found


def vectors(
  module: nn.Module,
  sites: Sequence[base.Site],
  name: str,
  init: Initializer,
  num_tasks: int,
) -> dict[str, Any]:
  """A vector at the output of each site: its path -> [(L,) G, E]."""
  specs: dict[str, Spec] = {
    f'{s.path}/{name}': (init, s, [(s.shape[-1], s.axes[-1])]) for s in sites
  }
  found = tables(module, specs, num_tasks)
  return {s.path: found[f'{s.path}/{name}'] for s in sites}
