r"""Questions that are answered by reasoning, as a task.

    Q: How many are 2 and 3?
    A: 2 and 3 are 5. The answer is 5.

    Q: How many are 4 and 3?
    A:

Rows have `question`, `answer` and, where they are demonstrations or are trained
on, `rationale`. A run's data in place of `user_data.UserData`; see
`runs/chain_of_thought.gin`. Texts, answers and votes are in `reasoning.py`.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, cast

import numpy as np
import seqio

from prompt_jax import deltas
from prompt_jax import feature_converters
from prompt_jax import in_context
from prompt_jax import reasoning
from prompt_jax import row_files
from prompt_jax import user_data
from prompt_jax.row_files import UserDataError


@dataclasses.dataclass(frozen=True)
class ChainOfThought:
  """The task as a configuration.

  Attributes:
    train_data: .jsonl, .csv or .tsv file of split `train`, from which the
      demonstrations come; None with k = 0.
    eval_data: file of split `validation`.
    k: demonstrations.
    select: as `in_context.InContext`.
    order: as `in_context.InContext`.
    seed: as `in_context.InContext`.
    cue: whether the answer begins with `reasoning.CUE`, without demonstrations.
  """

  train_data: str | None = None
  eval_data: str | None = None
  k: int = 0
  select: str = 'fixed'
  order: str = 'drawn'
  seed: int = 0
  cue: bool = False
  # Answers are free.
  labels = None
  label_texts = ()

  def __post_init__(self):
    if self.k and self.train_data is None:
      raise UserDataError(
        f'{self.k} demonstrations need --train_data with `rationale`.'
      )

  @property
  def given(self) -> bool:
    """True: there is no other task."""
    return True

  def register(self, name: str, vocabulary: seqio.Vocabulary) -> seqio.Task:
    """Registers the files as the task `name`.

    Raises:
      UserDataError: no file, or a file or row is wrong.
      ValueError: as `in_context.InContext`.
    """
    files = {'train': self.train_data, 'validation': self.eval_data}
    rows = {s: self._rows(p, s) for s, p in files.items() if p is not None}
    if not rows:
      raise UserDataError('Give --eval_data, and --train_data, with questions.')
    pool = [
      (x['inputs'], x['targets']) for x in rows.get('train', ()) if self.k
    ]
    context = in_context.InContext(
      pool, self.k, self.select, self.order, self.seed
    )
    seqio.TaskRegistry.remove(name)
    made = seqio.TaskRegistry.add(
      name,
      source=cast(Any, user_data.RowsDataSource(rows)),
      preprocessors=[
        context,
        seqio.preprocessors.tokenize,
        feature_converters.trim_and_append_eos,
      ],
      postprocess_fn=_said,
      metric_fns=[answer_accuracy],
      output_features=feature_converters.output_features(vocabulary),
      shuffle_buffer_size=None,  # the source shuffles
    )
    user_data._registered.add(name)
    return made

  def _rows(self, path: str, split: str) -> list[dict[str, str]]:
    needed = ('question', 'answer')
    # What is evaluated needs no rationale.
    needed += ('rationale',) if split == 'train' else ()
    out = []
    for line, row in row_files.read_rows(path):
      missing = [k for k in needed if not str(row.get(k) or '').strip()]
      if missing:
        raise UserDataError(
          f'{path}, line {line}: no {missing[0]!r}.'
          f'{deltas.near_misses(missing[0], row)} The columns: '
          f'{", ".join(row)}.'
        )
      cue = f' {reasoning.CUE}' if self.cue else ''
      why, answer = str(row.get('rationale') or ''), str(row['answer'])
      out.append(
        {
          'inputs': f'Q: {str(row["question"]).strip()}\nA:{cue}',
          'targets': reasoning.worked(why, answer),
        }
      )
    if not out:
      raise UserDataError(f'{path}: no rows.')
    return out


def answer_accuracy(
  targets: Sequence[str | None], predictions: Sequence[str | None]
) -> dict[str, float]:
  """Share of right answers, and of texts without an answer, in per cent.

  A text without an answer (None) is wrong.

  Raises:
    ValueError: no predictions.
  """
  if not len(predictions) or len(targets) != len(predictions):
    raise ValueError(
      f'Expected as many predictions as targets and at least one, got '
      f'{len(predictions)} and {len(targets)}.'
    )
  right = [
    said is not None and said == gold
    for gold, said in zip(targets, predictions, strict=True)
  ]
  return {
    'answer_accuracy': 100.0 * float(np.mean(right)),
    'no_answer': 100.0 * float(np.mean([p is None for p in predictions])),
  }


def _said(text: str, **unused: Any) -> str | None:
  return reasoning.answer(text)
