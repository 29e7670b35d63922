"""The commands that read what runs have left and need no model: their flags.

For `cli.py`, which calls them with runs/NAME.gin. Nothing heavy is imported.
"""

from typing import NamedTuple


class Flag(NamedTuple):
  """A flag of the command line.

  Attributes:
    name: `--name`, which binds the macro NAME.
    metavar: what stands for its value in the help.
    help: what it is.
    several: it may be repeated; the macro is then a list.
  """

  name: str
  metavar: str
  help: str
  several: bool = False


# Name: (function, what it does, flags).
TOOLS: dict[str, tuple[str, str, tuple[Flag, ...]]] = {
  'spot': (
    'transfer.spot',
    "rank prompts by their similarity to a target's",
    (
      Flag('target_prompt', 'RUN', "the target's own prompt: a run or file"),
      Flag('bank', 'PATH', 'a folder of prompts, a run or a file', True),
      Flag('output', 'FILE', 'a .png; the table goes beside it'),
    ),
  ),
  'recycle': (
    'recycle.recycle',
    'turn prompts of one model into those of another',
    (
      Flag('prompt', 'RUN', 'a prompt of the source: a run or a file', True),
      Flag('source_base', 'PATH', 'checkpoint that it was trained on'),
      Flag('target_base', 'PATH', 'checkpoint that it is to be for'),
      Flag('output', 'FILE', 'a .npy; of several prompts a folder'),
    ),
  ),
  'recover': (
    'recovery.recovery',
    "what a method recovers of another's scores (E_rel)",
    (
      Flag('result', 'Q=PATH', 'scores, in a subspace of q dimensions', True),
      Flag('reference', 'PATH', 'scores to recover: a run or a file', True),
      Flag('unseen', 'TASK', 'that the subspace was not trained on', True),
      Flag('output', 'FILE', 'a .png; the table goes beside it'),
    ),
  ),
  'compare_seeds': (
    'seeds.compare_runs',
    'whether two methods differ over seeds: a paired test',
    (
      Flag('result', 'SEED=PATH', 'scores of a seed: a run or a file', True),
      Flag('reference', 'SEED=PATH', "the other's, of the same seeds", True),
    ),
  ),
  'vote': (
    'reasoning.vote_decodes',
    'self-consistency: a vote over sampled reasoning',
    (Flag('decodes', 'FILE', 'of prompt-jax infer with NUM_DECODES'),),
  ),
}
