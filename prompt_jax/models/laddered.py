"""A frozen network and a side network on it, to be applied as one.

The frozen one runs first, without a gradient; the side network reads what its
layers have put out, and its logits are the result. Which method is a side
network, and what that is given, is in `methods/base.py`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax

from prompt_jax import deltas
from prompt_jax import train_state
from prompt_jax.methods import base
from prompt_jax.network.layers import T5Config


class Encoded(NamedTuple):
  """What `encode` gives and `decode_step` takes.

  Attributes:
    frozen: the frozen network's, [B, T, D].
    side: the side network's.
  """

  frozen: Any
  side: Any


@dataclasses.dataclass(frozen=True)
class Laddered:
  """Two networks with linen's `clone` and `apply`.

  Attributes:
    frozen: the network that is not trained.
    side: the network that reads it.
    reads: what of the frozen network's intermediates that is.
  """

  frozen: Any
  side: Any
  reads: Any

  def clone(self, **fields: Any) -> 'Laddered':
    """Both with these fields."""
    frozen, side = self.frozen.clone(**fields), self.side.clone(**fields)
    return dataclasses.replace(self, frozen=frozen, side=side)

  def apply(
    self,
    variables: Mapping[str, Any],
    *inputs: Any,
    rngs: Mapping[str, Any] | None = None,
    method: str | None = None,
    mutable: Sequence[str] = (),
  ) -> Any:
    """As linen's, for networks whose parameters and cache `join` has joined."""
    params, cache = (dict(variables.get(k, {})) for k in ('params', 'cache'))
    own, own_cache = params.pop('side'), cache.pop('side', {})
    laid = variables['deltas']
    # Stopped at what goes in, nothing of it is differentiated or kept.
    out, state = self.frozen.apply(
      jax.lax.stop_gradient({'params': params, 'deltas': laid})
      | {'cache': cache},
      *(x.frozen if isinstance(x, Encoded) else x for x in inputs),
      rngs=rngs,
      method=method,
      mutable=[*mutable, 'intermediates'],
    )
    side_out, side_state = self.side.apply(
      {
        'params': train_state.merge(own, _shared(params)),
        'deltas': _shared(laid),
        'cache': own_cache,
        'intermediates': self.reads(state['intermediates']),
      },
      *(x.side if isinstance(x, Encoded) else x for x in inputs),
      rngs={k: jax.random.fold_in(x, 1) for k, x in (rngs or {}).items()},
      method=method,
      mutable=[name for name in mutable if name != 'intermediates'],
    )
    out = Encoded(out, side_out) if method == 'encode' else side_out
    if not mutable:
      return out
    if 'cache' in side_state:
      both = {**state['cache'], 'side': side_state['cache']}
      state = {**state, 'cache': both}
    return out, {name: state[name] for name in mutable}


def _shared(tree: Any) -> Any:
  flat = train_state.flatten(tree)
  return train_state.unflatten(
    {path: x for path, x in flat.items() if base.SHARED.fullmatch(path)}
  )


def beside(network: Any, config: T5Config, method: Any) -> Any:
  """The network, with the method's own beside it if it is a side network."""
  found = base.side_network(method)
  if found is None:
    return network
  return Laddered(network, found[0].network(config), found[0].reads)


def join(
  params: Any, laid: deltas.Deltas, method: Any, trainable: Any
) -> dict[str, Any]:
  """The network's parameters; under 'side' those of a side network.

  Raises:
    ValueError: something else is to be trained that no gradient would reach.
  """
  found = base.side_network(method)
  if found is None:
    return params
  changed = [*laid, *train_state.flatten(trainable['network'])]
  if cut := [path for path in changed if not base.SHARED.fullmatch(path)]:
    raise ValueError(
      f'{type(found[0]).__name__} stops the gradient at the frozen network, so '
      f'that what is laid on it or trained of it would never learn, such as '
      f'{cut[0]!r}. Only the token embedding and the output projection can be '
      'trained with it: take the other method out of the chain, or the pattern '
      'out of TRAINABLE_PATTERNS.'
    )
  own = trainable['method']
  for name in found[1]:
    own = own[name]
  return {**params, 'side': own}
