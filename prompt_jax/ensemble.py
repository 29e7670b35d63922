"""Ensembles of prompts: N trained runs of one method, as one.

The members share the frozen model, so an ensemble costs a batch and no memory:
each example stands N times in it, with the soft tokens (and `task_ids`) of each
member. What they say is combined:

    majority  the answer that most members give; of answers given equally often
              the one whose members' log-likelihoods have the highest sum
    mean      the answer with the highest mean of all members' log-likelihoods,
              of the labels, or of what any member says

Any method with `num_tasks` will do: the members become its tasks. Not for
members of several models or methods.

Source: Lester et al. 2021, arXiv 2104.08691, section 6 (majority), as known
from the paper; how ties are broken is ours, and so is the mean.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

from absl import logging
import jax
from jaxtyping import Float, Int
import numpy as np

from prompt_jax import checkpoints
from prompt_jax import deltas
from prompt_jax import evaluation
from prompt_jax import infer
from prompt_jax import run as run_lib
from prompt_jax import trainer
from prompt_jax.methods import members as members_lib
from prompt_jax.methods.saved_prompts import FILE

COMBINE = ('majority', 'mean')


# ---- evaluation --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answers:
  """What the members say to each example of a batch.

  Attributes:
    ids: decoded ids of each member.
    texts: the same as text, [B][N].
    scores: log-likelihood that each member gives its own answer.
    chosen: the member that speaks for all.
  """

  ids: Int[np.ndarray, 'B N U']
  texts: list[list[str]]
  scores: Float[np.ndarray, 'B N']
  chosen: Int[np.ndarray, ' B']


class Evaluation(evaluation.Evaluation):
  """The evaluation of an ensemble: `members.stack`'s model.

  `loss_per_token` is the mean over members; for tasks with labels
  `member_rank_accuracy_mean` and `..._best` are those of the members alone.
  Where the majority ranks labels, lengths do not count.
  """

  def __init__(
    self,
    run: run_lib.Run,
    config: evaluation.EvalConfig,
    combine: str = 'majority',
  ):
    """Finds the tasks that have the split.

    Raises:
      ValueError: none has, an unknown `combine`, or a model without tasks.
    """
    if combine not in COMBINE:
      raise ValueError(
        f'combine must be one of {", ".join(COMBINE)}, got {combine!r}.'
        f'{deltas.near_misses(str(combine), COMBINE)}'
      )
    super().__init__(run, config)
    self.combine, self.count = combine, len(run.model.soft_ids)
    self._expand = functools.partial(
      members_lib.expand, soft_ids=run.model.soft_ids
    )
    self._ranked: list[Any] = []

    def loss(trainable: Any, frozen: Any, batch: Any) -> Any:
      many = self._expand(batch)
      return trainer.eval_step(trainable, frozen, many, model=run.model)

    self._loss = jax.jit(loss, out_shardings=run.partitioner.replicated)

  def converter(self) -> Any:
    """With the soft tokens of the first member, for `expand` to replace."""
    return self.run.converter(soft_ids=self.run.model.soft_ids[:1])

  def expanded(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The host batch with each example N times."""
    return {k: np.asarray(x) for k, x in self._expand(batch).items()}

  def member_scores(
    self, batch: Mapping[str, Any], trainable: Any, frozen: Any
  ) -> Float[np.ndarray, 'B N']:
    """Log-likelihood of each row's targets by each member."""
    found = super().score(self.expanded(batch), trainable, frozen)
    return found.reshape(-1, self.count)

  def score(
    self, batch: dict[str, Any], trainable: Any, frozen: Any
  ) -> np.ndarray:
    """The mean of the members' log-likelihoods of each row's targets, [B]."""
    return self.member_scores(batch, trainable, frozen).mean(axis=1)

  def member_label_scores(
    self,
    batch: dict[str, Any],
    labels: Sequence[str],
    trainable: Any,
    frozen: Any,
  ) -> Float[np.ndarray, 'B C N']:
    """Log-likelihood of each label by each member."""
    choices = [
      self.run.model.with_targets(batch, ids)
      for ids in self.label_tokens(labels)
    ]
    args = trainable, frozen
    return np.stack([self.member_scores(c, *args) for c in choices], axis=1)

  def rank(
    self,
    batch: dict[str, Any],
    rows: int,
    labels: Sequence[str],
    trainable: Any,
    frozen: Any,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores [N, C], gold index [N] or -1, tokens of each label [C])."""
    tokens = self.label_tokens(labels)
    choices = [self.run.model.with_targets(batch, ids) for ids in tokens]
    each = self.member_label_scores(batch, labels, trainable, frozen)[:rows]
    gold = evaluation.gold_labels(batch, choices)[:rows]
    lengths = np.sum(tokens > 0, axis=1)
    self._ranked.append((each, gold, lengths))
    return members_lib.combine_labels(each, self.combine), gold, lengths

  def _teacher_forced(
    self, task: str, trainable: Any, frozen: Any
  ) -> dict[str, float]:
    self._ranked = []
    out = super()._teacher_forced(task, trainable, frozen)
    if not self._ranked:
      return out
    labels = len(self.labels(task))
    alone = [
      evaluation.rank_metrics(
        [(each[..., n], *rest) for each, *rest in self._ranked], labels
      )['rank_accuracy']
      for n in range(self.count)
    ]
    mean, best = float(np.mean(alone)), float(np.max(alone))
    return out | {
      'member_rank_accuracy_mean': mean,
      'member_rank_accuracy_best': best,
    }

  def answers(
    self, batch: dict[str, Any], trainable: Any, frozen: Any
  ) -> Answers:
    """What each member generates, and who speaks for all."""
    many = self.expanded(batch)
    ids, _ = super().predict(many, trainable, frozen)
    ids = ids[:, -1].reshape(-1, self.count, ids.shape[-1])
    decode = self.run.model.vocabulary.decode
    texts = [[infer._text(decode, x) for x in row] for row in ids]
    if self.combine == 'majority':
      said = np.reshape(ids, (-1, ids.shape[-1]))
      own = super().score(self._saying(many, said), trainable, frozen)
      own = own.reshape(-1, self.count)
      chosen = [
        members_lib.majority(t, s.tolist())
        for t, s in zip(texts, own, strict=True)
      ]
      return Answers(ids, texts, own, np.array(chosen))
    every = np.stack(
      [
        self.member_scores(self._saying(batch, ids[:, n]), trainable, frozen)
        for n in range(self.count)
      ],
      axis=1,
    )  # [B, answers, N]
    own = np.einsum('bnn->bn', every)
    return Answers(ids, texts, own, every.mean(axis=-1).argmax(axis=1))

  def _saying(
    self, batch: dict[str, Any], ids: Int[np.ndarray, 'B U']
  ) -> dict[str, np.ndarray]:
    """The batch with targets of its own for each row."""
    rows = [
      self.run.model.with_targets(
        {k: x[i : i + 1] for k, x in batch.items()}, t
      )
      for i, t in enumerate(ids)
    ]
    return {k: np.concatenate([row[k] for row in rows]) for k in rows[0]}

  def predict(
    self, batch: dict[str, Any], trainable: Any, frozen: Any
  ) -> tuple[np.ndarray, np.ndarray]:
    """The ensemble's answer [B, 1, U] and the share of votes for it [B, 1]."""
    found = self.answers(batch, trainable, frozen)
    rows = np.arange(len(found.chosen))
    share = [
      row.count(row[k]) / self.count
      for row, k in zip(found.texts, found.chosen, strict=True)
    ]
    return found.ids[rows, found.chosen][:, None], np.array(share)[:, None]


# ---- the command -------------------------------------------------------------


def ensemble(
  run: run_lib.Run,
  *,
  members: Sequence[str],
  eval_config: evaluation.EvalConfig,
  combine: str = 'majority',
  output: str | None = None,
) -> evaluation.TaskMetrics:
  """Metrics of an ensemble on the tasks' split; prints them.

  Args:
    run: model, data, mesh and base of the members, which differ in the seed.
    members: their directories, or `trainable.safetensors` files.
    eval_config: what to compute.
    combine: 'majority' or 'mean'.
    output: a JSON file for the metrics, beside which a .jsonl file of the same
      name gets a line for each example: what each member says.

  Raises:
    ValueError: as `members.stack` and `Evaluation`.
    CheckpointError: a file is not there, or of another method or vocabulary.
    fingerprints.BaseMismatch: a member of another base.
  """
  if isinstance(members, str) or len(members) < 2:
    raise ValueError(
      'An ensemble needs the directories of two trained runs or more, got '
      f'{members!r}.'
    )
  paths = [pathlib.Path(m) for m in members]
  paths = [p / FILE if p.is_dir() else p for p in paths]
  members_lib.with_tasks(
    run.model.method, len(members)
  )  # tells what it refuses at once
  if output is not None:
    checkpoints.check_writable(str(pathlib.Path(output).parent))
  with run.partitioner.activate():
    run.register_tasks()
    base = run.load()
    loaded = [run.load_trainable(str(path), base) for path in paths]
    model, trainable = members_lib.stack(run.model, loaded)
    together = dataclasses.replace(run, model=model)
    frozen = base.frozen
    if 'constants' in frozen:  # they may be by task
      frozen = together.load().frozen
    call = Evaluation(together, eval_config, combine)
    found = call(trainable, frozen)
    lines = _lines(call, trainable, frozen) if output else []
  for task, values in found.items():
    for name, value in values.items():
      print(f'{task} ({eval_config.split}) {name}: {value:.5g}')
  if output is not None and jax.process_index() == 0:
    path = pathlib.Path(output)
    text = json.dumps(found, indent=2) + '\n'
    checkpoints.write_atomically(path, text.encode())
    text = ''.join(json.dumps(x, ensure_ascii=False) + '\n' for x in lines)
    checkpoints.write_atomically(path.with_suffix('.jsonl'), text.encode())
    logging.info('Wrote %s and %s.', path, path.with_suffix('.jsonl'))
  return found


def _lines(
  call: Evaluation, trainable: Any, frozen: Any
) -> list[dict[str, Any]]:
  """Of each example what the members say, and what all of them do."""
  out = []
  for task in call.tasks:
    labels = call.labels(task.name)
    for rows, batch in call.batches(task.name):
      shown = infer.show(call.run, batch)
      scores = None
      if labels:
        scores = call.member_label_scores(batch, labels, trainable, frozen)
      answers = call.answers(batch, trainable, frozen)
      for i in range(rows):
        said = answers.texts[i]
        line = {
          'task': task.name,
          **{k: v[i] for k, v in shown.items()},
          'prediction': said[answers.chosen[i]],
          'members': said,
          'scores': answers.scores[i].tolist(),
        }
        if scores is not None:
          line['label_scores'] = {
            label: scores[i, c].tolist() for c, label in enumerate(labels)
          }
        out.append(line)
  return out
