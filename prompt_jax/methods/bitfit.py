"""BitFit (Zaken et al. 2021) on a network without biases: they are added."""

from collections.abc import Sequence

from flax import linen as nn

from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import projections


class Shifts(nn.Module):
  """Biases, `y = x W + b`; b starts at 0.

  BitFit trains the biases of a network and nothing else. T5 has none: neither
  its projections nor its norms. What comes nearest is to add them, at 0, and to
  train the norms' scales beside them (`TRAINABLE_PATTERNS`).

  A bias of the keys is not among the default targets: it adds one number to all
  the logits of a query, which the softmax does not see, so that it gets no
  gradient, and adds nothing. With a prefix in front of the keys it does: the
  prefix has no such bias.

  Attributes:
    targets: patterns of whole paths of projections.
    num_tasks: G, biases kept apart; an example of task g uses those of g.

  Raises:
    ValueError: a number of tasks below 1; a target that is not there.

  Source: Zaken et al. 2021, arXiv 2106.10199, section 3 (as known from the
  paper); on T5, r-three/t-few `src/models/bitfit.py` with
  `configs/bitfit.json`, which has a bias at the keys and, its pattern saying
  `w_o`, none at `wo`.
  """

  targets: str | Sequence[str] = (
    '.*/query',
    '.*/value',
    '.*/out',
    '.*/(wi|wi_0|wi_1)',
    '.*/wo',
  )
  num_tasks: int = 1

  def __post_init__(self):
    projections.check_whole_numbers(self, 'num_tasks')
    projections.as_patterns(self)
    super().__post_init__()

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays `shift` on the targets."""
    sites = projections.find(context, projections.as_patterns(self))
    found = projections.vectors(
      self, sites, 'bias', nn.initializers.zeros, self.num_tasks
    )
    return {
      f'{s.path}/shift': context.route(found[s.path], s.shape[:-2])
      for s in sites
    }
