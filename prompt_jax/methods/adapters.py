"""Adapters: a bottleneck after a sublayer (Houlsby et al. 2019) or beside it.

Also here, for every method that is made of bottlenecks: the sublayers of a
network, and how bottlenecks are laid on them.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from flax import linen as nn
import jax

from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import projections
from prompt_jax.network.layers import Initializer

# After self-attention and feed-forward blocks, not after cross-attention.
HOULSBY = ('.*/(attention|self_attention|mlp)',)
# Of a parameter: its initializer, then size and logical name of each axis.
Spec = tuple[Initializer, *tuple[tuple[int, str | None], ...]]
KINDS = ('bottleneck', 'parallel')
# The last projection of an attention and that of a feed-forward block: what is
# above it is a sublayer, and its width is the sublayer's.
_LAST = ('out', 'wo')


def _uniform(rng: Any, shape: Sequence[int], dtype: Any) -> Any:
  bound = shape[-2] ** -0.5
  return jax.random.uniform(rng, tuple(shape), dtype, -bound, bound)


_near_zero = nn.initializers.truncated_normal(1e-3)
_normal = nn.initializers.normal(0.02)
# Of the down projection A and the up projection B; biases start at 0.
INITS: Mapping[str, tuple[Initializer, Initializer]] = {
  'lora': (_uniform, nn.initializers.zeros),
  'near_identity': (_near_zero, _near_zero),
  'normal': (_normal, _normal),
}


def sublayers(
  context: base.Context, patterns: Sequence[str]
) -> list[base.Site]:
  """The attentions and feed-forward blocks whose whole path a pattern matches.

  Returns:
    Their paths ('encoder/layers/mlp'), each with shape and axes of its last
    projection, ((L,) E, D).

  Raises:
    ValueError: a pattern matches none; with the paths that come near.
  """
  known = {}
  for site in context.sites:
    path, _, name = site.path.rpartition('/')
    if name in _LAST:
      known[path] = dataclasses.replace(site, path=path)
  found = {}
  for pattern in patterns:
    matched = {p: s for p, s in known.items() if re.fullmatch(pattern, p)}
    if not matched:
      near = deltas.near_misses(pattern, known)
      raise ValueError(
        f'No sublayer of the network matches {pattern!r}.'
        f'{near or f" There are {sorted(known)}."}'
      )
    found |= matched
  return list(found.values())


def check_fields(method: Any, *whole: str) -> None:
  """Refuses the fields that all methods of bottlenecks have, if wrong.

  Args:
    method: with `targets`, `activation` and `num_tasks`.
    *whole: names of more fields that are whole numbers of at least 1.

  Raises:
    ValueError: which field, what it must be, and what it is.
  """
  projections.check_whole_numbers(method, 'num_tasks', *whole)
  check_choice(method, 'activation', deltas.ACTIVATIONS)
  targets = method.targets
  good = isinstance(targets, Sequence) and not isinstance(targets, str)
  if not good or not targets or not all(isinstance(t, str) for t in targets):
    raise ValueError(
      f'{type(method).__name__}.targets must be a sequence of patterns over '
      f"sublayers, such as ('encoder/.*/mlp',), got {targets!r}."
    )


def check_choice(method: nn.Module, field: str, choices: Any) -> None:
  """Refuses a field that is none of some names.

  Raises:
    ValueError: it is none; with the names that come near.
  """
  value = getattr(method, field)
  if value not in tuple(choices):
    raise ValueError(
      f'{type(method).__name__}.{field} must be one of {", ".join(choices)}, '
      f'got {value!r}.{deltas.near_misses(str(value), choices)}'
    )


def lay(
  method: Any,
  context: base.Context,
  kind: str,
  specs: Callable[[int], Mapping[str, Spec]],
  make: Callable[..., deltas.Adapter],
) -> deltas.Deltas:
  """A bottleneck with parameters of its own at each of a method's targets.

  Args:
    method: with `targets` and `num_tasks`; the parameters are its.
    context: of the network.
    kind: of delta, one of `KINDS`.
    specs: from the width D to the parameters of one layer and task, by name.
    make: from these as keywords, [(L,) G, ...] each, to the bottleneck.

  Raises:
    ValueError: a target matches no sublayer.
  """
  found = sublayers(context, method.targets)
  own: dict[str, projections.Spec] = {
    f'{site.path}/{name}': (init, site, sizes)
    for site in found
    for name, (init, *sizes) in specs(site.shape[-1]).items()
  }
  tables = projections.tables(method, own, method.num_tasks)
  out: deltas.Deltas = {}
  for site in found:
    mine = {n: tables[f'{site.path}/{n}'] for n in specs(site.shape[-1])}
    routed = context.route(make(**mine), site.shape[:-2])
    out[f'{site.path}/{kind}'] = routed
  return out


class Adapters(nn.Module):
  """A bottleneck at each target: `g(x)` becomes `z + s (f(v A + a) B + b)`.

  Here z = g(x) is the sublayer's output, before it is added to the residual
  stream; v is z (`kind` 'bottleneck', after the sublayer) or the sublayer's
  input x, which T5 has normalised (`kind` 'parallel', beside it); A [D, m] and
  a [m] lead down, B [m, D] and b [D] up. The network's residual dropout, which
  follows, is over the sum; in He et al.'s code it leaves a parallel adapter
  out.

  Trained: `down`, `down_bias`, `up`, `up_bias` at the sublayer's path, with
  leading axes (L,) of scanned layers and (G,) of tasks: 2 D m + m + D numbers
  a layer and task.

  Attributes:
    bottleneck_dim: m.
    targets: patterns of whole paths of sublayers, such as
      'encoder/.*/(attention|mlp)'. The default is Houlsby et al.'s for T5:
      self-attentions and feed-forward blocks of both stacks.
    kind: 'bottleneck' or 'parallel'.
    activation: f, a name of `deltas.ACTIVATIONS`.
    scale: s, a constant.
    adapter_init: 'lora' (A uniform in +-1/sqrt(D), B 0: the adapter starts as
      nothing at all), 'near_identity' (both truncated normal of deviation
      1e-3) or 'normal' (both normal of deviation 0.02); biases start at 0.
    num_tasks: G, adapters kept apart; an example of task g has adapter g.

  Raises:
    ValueError: a field out of its range; a target that matches no sublayer.

  Source: Houlsby et al. 2019, arXiv 1902.00751, google-research/adapter-bert
  `modeling.py` ('near_identity'); Pfeiffer et al. 2020, arXiv 2005.00247,
  adapter-hub/adapters `src/adapters/configuration/adapter_config.py`; He et
  al. 2022, arXiv 2110.04366, jxhe/unify-parameter-efficient-tuning
  `petl/petl_factory.py` ('parallel', 'lora'); r-three/t-few ('normal'). Where
  they stand in T5 is as in rabeehk/compacter
  `seq2seq/third_party/models/t5/modeling_t5.py`.
  """

  bottleneck_dim: int = 64
  targets: Sequence[str] = HOULSBY
  kind: str = 'bottleneck'
  activation: str = 'gelu'
  scale: float = 1.0
  adapter_init: str = 'lora'
  num_tasks: int = 1

  def __post_init__(self):
    check_fields(self, 'bottleneck_dim')
    check_choice(self, 'kind', KINDS)
    check_choice(self, 'adapter_init', INITS)
    number = isinstance(self.scale, int | float) and math.isfinite(self.scale)
    if not number or self.scale < 0:
      raise ValueError(
        'Adapters.scale must be a finite number of at least 0, got '
        f'{self.scale!r}.'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays an adapter on each target."""
    return lay(self, context, self.kind, self._specs, self._adapter)

  def _adapter(
    self, down: Any, down_bias: Any, up: Any, up_bias: Any
  ) -> deltas.Adapter:
    s = self.scale
    return deltas.Adapter(down, down_bias, s * up, s * up_bias, self.activation)

  def _specs(self, width: int) -> Mapping[str, Spec]:
    d, m = (width, 'embed'), (self.bottleneck_dim, 'adapter_mid')
    down, up = INITS[self.adapter_init]
    zeros = nn.initializers.zeros
    return {
      'down': (down, d, m),
      'down_bias': (zeros, m),
      'up': (up, m, d),
      'up_bias': (zeros, d),
    }
