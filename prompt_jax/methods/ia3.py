"""(IA)^3 (Liu et al. 2022): factors of keys, values and hidden units."""

from collections.abc import Sequence

from flax import linen as nn

from prompt_jax import deltas
from prompt_jax.methods import base
from prompt_jax.methods import projections


class IA3(nn.Module):
  """`y = (x W) * l` at keys, values and the feed-forward block; l starts at 1.

  In the gated block of T5 1.1, `(gelu(x W_0) * x W_1) W_o`, it is the same to
  scale W_1's output as the product, so l stands at `wi_1`. T5 1.0 has a single
  `wi` in front of its ReLU: there l acts as behind it while l is not negative.

  Attributes:
    targets: patterns of whole paths of projections.
    num_tasks: G, factors kept apart; an example of task g uses those of g.

  Raises:
    ValueError: a number of tasks below 1; a target that is not there.

  Source: Liu et al. 2022, arXiv 2205.05638, section 3.3 (as known from the
  paper); checked against r-three/t-few `src/models/lora.py` with
  `configs/ia3.json`, and the recorded numbers of google-research/prompt-tuning
  `prompt_tuning/extended/train/ia3.py`.
  """

  targets: str | Sequence[str] = ('.*/key', '.*/value', '.*/(wi_1|wi)')
  num_tasks: int = 1

  def __post_init__(self):
    projections.check_whole_numbers(self, 'num_tasks')
    projections.as_patterns(self)
    super().__post_init__()

  @nn.compact
  def __call__(self, context: base.Context) -> deltas.Deltas:
    """Lays `scale` on the targets."""
    sites = projections.find(context, projections.as_patterns(self))
    found = projections.vectors(
      self, sites, 'ia3_scaling', nn.initializers.ones, self.num_tasks
    )
    return {
      f'{s.path}/scale': context.route(found[s.path], s.shape[:-2])
      for s in sites
    }
