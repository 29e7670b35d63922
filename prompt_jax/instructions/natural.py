r"""Super-NaturalInstructions: a definition and examples as the input.

    Definition: In this task, you will be given ...

    Positive Example 1 -
    Input: The woman went to the bank, so.
    Output: she will be out with some cash on her.

    Now complete the following example -
    Input: The man begged for forgiveness, so.
    Output:

A run's data in place of `user_data.UserData`; see `runs/natural.gin`. Whole
categories are held out; metrics are ROUGE-L and exact match, the best over an
instance's references, by category.

Source: Wang et al. 2022, arXiv 2204.07705; yizhongw/Tk-Instruct
`src/ni_collator.py` and `src/compute_metrics.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
import string
from typing import Any

import numpy as np
import seqio

from prompt_jax import deltas
from prompt_jax import row_files
from prompt_jax.instructions import prompted
from prompt_jax.instructions.prompted import Heldout
from prompt_jax.row_files import UserDataError

_PUNCTUATION = tuple(string.punctuation)


@dataclasses.dataclass(frozen=True)
class Task:
  """One task of the collection.

  Attributes:
    name: of its file.
    category: the task's kind.
    held_out: the collection itself says so; None: it says nothing.
    definition: what is to be done.
    positive: (input, output, explanation) of good examples.
    negative: of bad ones.
    instances: (input, references).
  """

  name: str
  category: str
  held_out: bool | None
  definition: str
  positive: tuple[tuple[str, str, str], ...]
  negative: tuple[tuple[str, str, str], ...]
  instances: tuple[tuple[str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class NaturalInstructions:
  """The mixture as a configuration: a task `train`, one a held-out category.

  Attributes:
    path: a folder of `task*.json` as the collection has them, or one with
      `tasks.jsonl` and `instances.jsonl`.
    holdout: categories that are evaluated only; (): those that the collection
      sets apart.
    lengths: tokens of inputs and targets: examples that do not fit are left
      out, the last first.
    definition: whether the definition stands there.
    positive: examples, k.
    negative: bad examples.
    explanations: whether examples are explained.
    max_instances: of a training task, the first; None: all.
    eval_instances: of a held-out task, the first; None: all.
    seed: of the choice among an instance's references.
  """

  path: str | None = None
  holdout: Sequence[str] = ()
  lengths: Mapping[str, int] | None = None
  definition: bool = True
  positive: int = 2
  negative: int = 0
  explanations: bool = False
  max_instances: int | None = 100
  eval_instances: int | None = 100
  seed: int = 0
  # Answers are free.
  labels = None
  given = True

  def register(self, name: str, vocabulary: seqio.Vocabulary) -> seqio.Mixture:
    """Registers the tasks and the mixture.

    Raises:
      UserDataError: no files, one that is wrong, or a category that is not
        there; or nothing is left to train on or to evaluate.
    """
    tasks = read(self.path)
    trained, held_out = self.divide(tasks)
    rng = np.random.default_rng(self.seed)
    examples = []
    for task in trained:
      for text, references in task.instances[: self.max_instances]:
        inputs = self.text(task, text, vocabulary)
        target = references[int(rng.integers(len(references)))]
        examples.append({'inputs': inputs, 'targets': target})
    train = prompted.task_name(name, 'train')
    prompted.add_training(train, examples, vocabulary)
    evaluated = []
    for category in sorted({t.category for t in held_out}):
      rows = [
        {
          'inputs': self.text(task, text, vocabulary),
          'targets': references[0],
          'references': list(references),
        }
        for task in held_out
        if task.category == category
        for text, references in task.instances[: self.eval_instances]
      ]
      one = prompted.task_name(name, 'held_out', category)
      about = Heldout(category, 'definition and examples', 'rougeL')
      prompted.add_decoded(
        one, about, rows, vocabulary, _references, [rouge_l, exact_match]
      )
      evaluated.append(one)
    return prompted.register(name, {train: float(len(examples))}, evaluated)

  def divide(self, tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """The tasks to train on, and those of held-out categories."""
    categories = {t.category for t in tasks}
    unknown = [c for c in self.holdout if c not in categories]
    if unknown:
      raise UserDataError(
        f'There is no category {unknown[0]!r}.'
        f'{deltas.near_misses(unknown[0], list(categories))} There are '
        f'{", ".join(sorted(categories))}.'
      )
    gone = set(self.holdout) or {t.category for t in tasks if t.held_out}
    trained = [t for t in tasks if t.category not in gone]
    held_out = [t for t in tasks if t.category in gone]
    if not trained or not held_out:
      raise UserDataError(
        f'Of {len(tasks)} tasks {len(trained)} are left to train on and '
        f'{len(held_out)} are held out: give --gin.HOLDOUT categories, of '
        f'{", ".join(sorted(categories))}.'
      )
    return trained, held_out

  def text(
    self, task: Task, instance: str, vocabulary: seqio.Vocabulary
  ) -> str:
    """The input of an instance, with as many examples as fit."""
    length = (self.lengths or {}).get('inputs')
    head = f'Definition: {_ended(task.definition)}\n\n'
    front = head if self.definition else ''
    end = 'Now complete the following example -\n'
    end += f'Input: {_ended(instance)}\nOutput: '
    for kind, examples, most in (
      ('Positive', task.positive, self.positive),
      ('Negative', task.negative, self.negative),
    ):
      for i, example in enumerate(examples[:most]):
        one = _example(f'{kind} Example {i + 1} -', example, self.explanations)
        text = front + one + end
        if length is not None and len(vocabulary.encode(text)) >= length:
          break  # EOS has no room
        front += one
    return front + end


def _example(
  head: str, example: tuple[str, str, str], explanations: bool
) -> str:
  given, answer, why = example
  lines = [head, f'Input: {_ended(given)}', f'Output: {_ended(answer)}']
  if explanations and why:
    lines.append(f'Explanation: {_ended(why)}')
  return '\n'.join(lines) + '\n\n'


def _ended(text: str) -> str:
  """The text stripped, with a full stop where it has no punctuation."""
  text = text.strip()
  return text if text.endswith(_PUNCTUATION) else f'{text}.'


# ---- metrics -----------------------------------------------------------------


def rouge_l(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """ROUGE-L, stemmed, the best F-measure over the references, times 100.

  Source: Lin 2004, aclanthology W04-1013; package rouge-score.

  Raises:
    ValueError: no predictions.
  """
  from rouge_score import rouge_scorer

  _check(targets, predictions)
  scorer = rouge_scorer.RougeScorer(['rougeL'], use_stemmer=True)
  best = [
    max(scorer.score(text, said)['rougeL'].fmeasure for text in texts)
    for texts, said in zip(targets, predictions, strict=True)
  ]
  return {'rougeL': 100.0 * float(np.mean(best))}


def exact_match(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Share of predictions that are a reference, but for case and punctuation."""
  _check(targets, predictions)
  same = [
    _normal(said) in {_normal(text) for text in texts}
    for texts, said in zip(targets, predictions, strict=True)
  ]
  return {'exact_match': 100.0 * float(np.mean(same))}


def _check(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
  if not len(predictions) or len(targets) != len(predictions):
    raise ValueError(
      f'Expected as many predictions as targets and at least one, got '
      f'{len(predictions)} and {len(targets)}.'
    )


def _normal(text: str) -> str:
  kept = ''.join(c for c in text.lower() if c not in string.punctuation)
  return ' '.join(kept.split())


def _references(
  text: str, example: Any = None, is_target: bool = False, **unused: Any
) -> Any:
  if not is_target:
    return text
  return [reference.decode() for reference in example['references']]


# ---- files -------------------------------------------------------------------


def read(path: str | None) -> list[Task]:
  """The tasks of a folder, in the order of their names.

  Raises:
    UserDataError: no folder, no tasks, or a file that is wrong.
  """
  if path is None or not pathlib.Path(path).is_dir():
    raise UserDataError(
      f'There is no folder {path}: --gin.TASKS_PATH=... is one of task*.json, '
      'or of tasks.jsonl and instances.jsonl.'
    )
  folder = pathlib.Path(path)
  if (folder / 'tasks.jsonl').is_file():
    found = list(_from_lines(folder))
  else:
    found = [_from_file(file) for file in sorted(folder.rglob('task*.json'))]
  empty = [t.name for t in found if not t.instances]
  if not found or empty:
    what = f'{empty[0]} has no instances' if empty else 'no task*.json'
    raise UserDataError(f'{path}: {what}.')
  return sorted(found, key=lambda t: t.name)


def _from_file(path: pathlib.Path) -> Task:
  """A task as the collection has it."""
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
    definition = content['Definition']
    if isinstance(definition, list):
      definition = definition[0]
    category = content['Categories'][0]
    return Task(
      path.stem,
      category,
      None,
      definition,
      _examples(content['Positive Examples']),
      _examples(content['Negative Examples']),
      tuple((x['input'], _outputs(x)) for x in content['Instances']),
    )
  except (ValueError, KeyError, TypeError, IndexError) as error:
    raise UserDataError(
      f'{path}: not a task of Super-NaturalInstructions ({error!r}); expected '
      'Definition, Categories, Positive Examples, Negative Examples and '
      'Instances.'
    ) from error


def _from_lines(folder: pathlib.Path) -> Iterator[Task]:
  """Tasks of tasks.jsonl, with the instances of instances.jsonl."""
  instances: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
  path = folder / 'instances.jsonl'
  for line, row in row_files.read_rows(path):
    try:
      one = (row['input'], _outputs(row))
      instances.setdefault(row['task'], []).append(one)
    except (KeyError, TypeError, ValueError) as error:
      raise UserDataError(f'{path}, line {line}: {error!r}.') from error
  path = folder / 'tasks.jsonl'
  for line, row in row_files.read_rows(path):
    try:
      yield Task(
        row['task'],
        row['category'],
        row.get('split') == 'held_out',
        row['definition'],
        _examples(row['positive_examples']),
        _examples(row['negative_examples']),
        tuple(instances.get(row['task'], ())),
      )
    except (KeyError, TypeError) as error:
      raise UserDataError(f'{path}, line {line}: {error!r}.') from error


def _examples(found: Sequence[Any]) -> tuple[tuple[str, str, str], ...]:
  return tuple(
    (x['input'], _outputs(x)[0], x.get('explanation') or '') for x in found
  )


def _outputs(row: Mapping[str, Any]) -> tuple[str, ...]:
  out = row['output']
  texts = (out,) if isinstance(out, str) else tuple(out)
  if not texts or not all(isinstance(x, str) for x in texts):
    raise ValueError(f'output must be text or a list of texts, got {out!r}')
  return texts
