"""`prompt-jax lmbff`: templates, label words or demonstrations for few shots.

Reads rows of the user's own and a template, and writes a file of templates, for
`--inputs=@file:name`. Nothing is trained: what is found is ranked by the
accuracy of the model as it is. The paper tunes the model with each of the best
before it ranks them; `prompt-jax train` does that, template by template.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any

from absl import logging
import numpy as np

from prompt_jax import checkpoints
from prompt_jax import run as run_lib
from prompt_jax import schedules
from prompt_jax.row_files import UserDataError
from prompt_jax.search import beams
from prompt_jax.search import demonstrations
from prompt_jax.search import examples as examples_lib
from prompt_jax.search import label_words
from prompt_jax.search import writing
from prompt_jax.search.examples import Task

SEARCHES = ('templates', 'words', 'demonstrations')
COLUMN = 'demonstrations'


def lmbff(
  run: run_lib.Run,
  *,
  output: str | None,
  search: str = 'templates',
  beam: int = 100,
  max_tokens: int = 20,
  aggregate: str = 'sum_log_probs',
  word_candidates: int = 100,
  combinations: int = 100,
  kept: int = 20,
  samples: int = 16,
  share: float = 0.5,
  batch_size: int = 32,
) -> list[tuple[float, float]]:
  """Searches, and writes a file of templates.

  Args:
    run: model and data, with `--train_data` and perhaps `--eval_data`, which
      then ranks. Its method is not looked at; the seed draws demonstrations.
    output: the file of templates; of demonstrations the rows go beside it.
    search: 'templates': around the label words of the targets, for the columns
      of the inputs, one or two; 'words': label words for the template;
      'demonstrations': rows with demonstrations.
    beam: prefixes that are kept. Of a single column the blank may stand behind
      the text or in front: of each half as many templates are kept.
    max_tokens: of a template's two parts.
    aggregate: as in `beams.model_log_probs`.
    word_candidates: words of a label that are combined.
    combinations: of words, that are ranked.
    kept: templates or combinations that are written; of templates they are the
      ones that are ranked, too.
    samples: rows of each training row, with other demonstrations.
    share: of a class's examples that demonstrations are drawn from, the most
      similar ones.
    batch_size: examples of a program call.

  Returns:
    (accuracy, loss) of each template that was written; of demonstrations none.

  Raises:
    ValueError: a number or `search` is wrong, a label's word is not one token
      or another label's too, and what `examples.task` raises.
    UserDataError: a file, template or row is wrong, or a label has no example.
    CheckpointError: a file cannot be written.
  """
  writing.one_of('search', search, SEARCHES)
  writing.one_of('aggregate', aggregate, beams.AGGREGATES)
  in_range = isinstance(share, int | float) and 0 < share <= 1
  schedules.require(in_range, 'share', 'above 0 and at most 1', share)
  task = examples_lib.task(
    run, output, beam=beam, max_tokens=max_tokens, samples=samples,
    word_candidates=word_candidates, combinations=combinations, kept=kept,
    batch_size=batch_size,
  )  # fmt: skip
  if task.prompt.inputs.soft_tokens:
    raise UserDataError(
      f'The inputs {task.prompt.inputs.text!r} hold soft tokens, for which '
      'there is nothing in this search: leave them out.'
    )
  path = pathlib.Path(str(output))
  with run.partitioner.activate():
    if search == 'words':
      return _words(task, path, word_candidates, combinations, kept, batch_size)
    if search == 'demonstrations':
      return _demonstrations(task, path, samples, share, batch_size, run.seed)
    return _templates(task, path, beam, max_tokens, aggregate, kept, batch_size)


# ---- templates ---------------------------------------------------------------


def placements(columns: Sequence[str], choice: str) -> list[tuple[str, str]]:
  """Inputs for T5, and templates with {part1} and {part2} yet to be filled.

  Of two columns both stand as they are: LM-BFF's code takes the last mark off
  the first and writes the second's first letter small, which a template in one
  line cannot say of a column.

  Raises:
    UserDataError: there is no column, or more than two.
  """
  shown = [f'{{{column}|cut}}' for column in columns]
  if len(shown) == 1:
    [text] = shown
    return [
      (f'{text} <mask> {choice} <mask>', f'{text}%1 <mask>%2'),
      (f'<mask> {choice} <mask> {text}', f'%1 <mask>%2 {text}'),
    ]
  if len(shown) == 2:
    first, second = shown
    return [
      (f'{first} <mask> {choice} <mask> {second}',
       f'{first}%1 <mask>%2 {second}'),
    ]  # fmt: skip
  raise UserDataError(
    'Templates are searched for one column or two; the inputs show '
    f'{", ".join(columns) or "none"}.'
  )


def _templates(
  task: Task,
  path: pathlib.Path,
  beam: int,
  max_tokens: int,
  aggregate: str,
  kept: int,
  batch_size: int,
) -> list[tuple[float, float]]:
  """Searches templates, and writes the best."""
  words, vocabulary = task.words, task.vocabulary
  placed = placements(task.columns, task.choice)
  # T5 is asked before anything is loaded: a vocabulary without blanks fails.
  asked = [task.read('train', inputs) for inputs, _ in placed]
  model, frozen = task.run.model, task.run.load().frozen
  grammar = beams.grammar(vocabulary, model.config.vocab_size)
  kept_of_each = max(1, beam // len(placed))
  found: dict[str, float] = {}
  word = int(words.ids[0, 0, 0])
  for (inputs, outline), examples in zip(placed, asked, strict=True):
    logging.info('Searching %r with a beam of %d.', inputs, beam)
    log_probs = beams.model_log_probs(
      model, frozen, examples, max_tokens, aggregate
    )
    answers = beams.search(log_probs, grammar, beam, max_tokens)
    for parts in answers[:kept_of_each]:
      part1, part2 = (
        beams.text_after(vocabulary, word, ids)
        for ids in (parts.part1, parts.part2)
      )
      text = outline.replace('%1', part1, 1).replace('%2', part2, 1).strip()
      found.setdefault(text, parts.score)
  best = sorted(found, key=lambda text: -found[text])[:kept]
  ranked = []
  for i, text in enumerate(best, start=1):
    dev = task.read(task.dev_split, text)
    loss, accuracy = examples_lib.evaluate(
      model, frozen, examples_lib.NOTHING, dev, words, batch_size
    )
    logging.info('Template %d of %d: %.1f%%.', i, len(best), 100 * accuracy)
    ranked.append((accuracy, loss, text))
  ranked.sort(key=lambda x: (-x[0], x[1]))
  targets = task.prompt.targets.text
  return _write(
    task, path, 'template',
    [(text, targets) for _, _, text in ranked],
    [(accuracy, loss) for accuracy, loss, _ in ranked],
    [f'log p {found[text]:.2f}' for _, _, text in ranked],
  )  # fmt: skip


def _write(
  task: Task,
  path: pathlib.Path,
  kind: str,
  sides: Sequence[tuple[str, str]],
  scores: Sequence[tuple[float, float]],
  more: Sequence[str],
) -> list[tuple[float, float]]:
  """Writes templates, the best first, and says so."""
  names = [f'{kind}{i}' for i in range(1, len(sides) + 1)]
  notes = [
    f'{name}: accuracy {accuracy:.1%}, loss {loss:.4f} on {task.dev_split}; '
    f'{said}.'
    for name, (accuracy, loss), said in zip(names, scores, more, strict=True)
  ]
  found = dict(zip(names, sides, strict=True))
  writing.write_templates(path, found, notes)
  accuracy, (inputs, targets) = scores[0][0], sides[0]
  hint = ''
  if '|' not in targets:  # the labels are said by --labels alone
    hint = f' --labels={",".join(task.names)}'
  print(
    f'Wrote {path}: {len(names)} of {kind}1, ..., by accuracy without '
    f'training. The first, {accuracy:.1%} on {task.dev_split}: {inputs} ||| '
    f'{targets}\nTrain with --inputs=@{path}:{names[0]}{hint}'
  )
  return list(scores)


# ---- words -------------------------------------------------------------------


def _words(
  task: Task,
  path: pathlib.Path,
  candidates: int,
  combinations: int,
  kept: int,
  batch_size: int,
) -> list[tuple[float, float]]:
  """Searches label words, and writes the best combinations."""
  from prompt_jax.search import autoprompt

  for split in dict.fromkeys(('train', task.dev_split)):
    writing.check_numbers(task.path(split), task.field)
  train, dev = task.read('train'), task.read(task.dev_split)
  texts = writing.texts(task.vocabulary)
  allowed = np.array([any(c.isalnum() for c in text) for text in texts])
  model, frozen = task.run.model, task.run.load().frozen
  found = label_words.search(
    model, frozen, train, dev, allowed, len(task.names), candidates,
    combinations, batch_size,
  )[:kept]  # fmt: skip
  sides, more = [], []
  for choice in found:
    names = tuple(texts[i] for i in choice.ids)
    new = dataclasses.replace(task, names=names)
    targets = autoprompt.template_with(task, new.choice)
    sides.append((task.prompt.inputs.text, targets))
    more.append(', '.join(names))
  scores = [(choice.accuracy, choice.loss) for choice in found]
  return _write(task, path, 'words', sides, scores, more)


# ---- demonstrations ----------------------------------------------------------


def _demonstrations(
  task: Task,
  path: pathlib.Path,
  samples: int,
  share: float,
  batch_size: int,
  seed: int,
) -> list[tuple[float, float]]:
  """Writes rows with demonstrations, and the template that shows them."""
  inputs = task.prompt.inputs
  if inputs.num_masks > 1:
    raise UserDataError(
      f'The inputs {inputs.text!r} have {inputs.num_masks} blanks; '
      'demonstrations fill one.'
    )
  if COLUMN in inputs.fields or task.data.skip_bad_rows:
    raise UserDataError(
      f'Demonstrations are written as a column {COLUMN!r}, which the inputs '
      'must not show yet, and of good rows: leave out --skip_bad_rows.'
    )
  columns = ' '.join(f'{{{column}|cut}}' for column in task.columns)
  splits = ['train', *(['validation'] if task.data.eval_data else [])]
  read = {split: task.read(split, columns) for split in splits}
  rows = {split: task.rows(split) for split in splits}
  model, frozen = task.run.model, task.run.load().frozen
  states = {
    split: demonstrations.mean_states(model, frozen, found, batch_size)
    for split, found in read.items()
  }
  labels = read['train'].labels
  texts = [
    demonstrations.text(inputs, row, task.names[int(label)])
    for row, label in zip(rows['train'], labels, strict=True)
  ]
  for split in splits:
    train = split == 'train'
    drawn = demonstrations.draw(
      demonstrations.similarities(states[split], states['train']),
      labels, len(task.names), seed, share, samples if train else 1, train,
    )  # fmt: skip
    beside = path.with_name(f'{path.stem}.{split}.jsonl')
    _write_rows(beside, rows[split], drawn, texts)
    print(f'Wrote {beside}: {drawn.shape[0] * drawn.shape[1]} rows.')
  sides = (f'{inputs.text} {{{COLUMN}|cut}}', task.prompt.targets.text)
  writing.write_templates(path, {COLUMN: sides})
  print(f'Wrote {path}. Train on these rows with --inputs=@{path}:{COLUMN}')
  return []


def _write_rows(
  path: pathlib.Path,
  rows: Sequence[dict[str, Any]],
  drawn: np.ndarray,
  texts: Sequence[str],
) -> None:
  lines = []
  for row, sets in zip(rows, drawn, strict=True):
    for chosen in sets:
      said = demonstrations.joined(texts[int(i)] for i in chosen)
      line = json.dumps({**row, COLUMN: said}, ensure_ascii=False)
      lines.append(f'{line}\n')
  checkpoints.write_atomically(path, ''.join(lines).encode())
