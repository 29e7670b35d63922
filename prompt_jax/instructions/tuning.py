"""`prompt-jax instruct`: tune on instructions, test on held-out tasks.

Trains as `prompt-jax train` does, with any method, and goes on where an earlier
start stopped. Then each held-out task is evaluated by each of its prompts. No
held-out score is seen before the last step, so that none can choose a
checkpoint.
"""

from collections.abc import Callable
import json
import pathlib
from typing import Any

from prompt_jax import evaluation
from prompt_jax import infer
from prompt_jax import run as run_lib
from prompt_jax.instructions import prompted
from prompt_jax.instructions import table


def tune(
  run: run_lib.Run,
  *,
  model_dir: str,
  train_fn: Callable[[], Any],
  eval_config: evaluation.EvalConfig,
  evaluate_untrained: bool = True,
) -> table.Scores:
  """Trains, evaluates, prints the table and writes it to `model_dir`.

  Args:
    run: whose `user_data` registers a mixture with held-out tasks.
    model_dir: of the run; untrained.json, eval_<split>.json and prompts.tsv,
      .md and .png go there beside what training writes.
    train_fn: `train.train`, bound.
    eval_config: of held-out tasks.
    evaluate_untrained: whether to evaluate the model before training too.

  Returns:
    Data set -> prompt -> score.

  Raises:
    ValueError: nothing is held out, or as training.
  """
  directory = pathlib.Path(model_dir)
  with run.partitioner.activate():
    run.register_tasks()
    about = prompted.heldout(run.task_names)
  if not about:
    raise ValueError(
      f'{run.mixture_or_task_name!r} has no held-out tasks: instruction '
      'tuning is for runs/t0.gin, runs/flan.gin and runs/natural.gin.'
    )
  before: dict[str, dict[str, float]] = {}
  if evaluate_untrained:
    before = _untrained(run, directory / 'untrained.json', eval_config)
    before = table.by_data_set(before, about)
  train_fn()
  trained = infer.Trained(model_dir=model_dir)
  found = infer.evaluate(run, trained=trained, eval_config=eval_config)
  scores = table.by_data_set(found, about)
  title = f'{run.mixture_or_task_name}: held-out data sets'
  paths = table.write(scores, before, about, directory, title)
  print(f'Wrote {", ".join(map(str, paths))}')
  return scores


def _untrained(
  run: run_lib.Run, path: pathlib.Path, config: evaluation.EvalConfig
) -> Any:
  """Metrics of the method at its initial value; kept for the next start."""
  if path.exists():
    return json.loads(path.read_text())
  path.parent.mkdir(parents=True, exist_ok=True)
  return infer.evaluate(
    run, trained=infer.Trained(), eval_config=config, output=str(path)
  )
