"""The command line on a model of one layer, in this process or in its own."""

import logging
import os
import pathlib
import re
import subprocess
import sys
import threading
from typing import Any

import jax

from prompt_jax import cli
from prompt_jax import gin_utils

PROGRAM = pathlib.Path(sys.executable).with_name('prompt-jax')
_SIZES = {
  'emb_dim': 16,
  'head_dim': 8,
  'mlp_dim': 32,
  'num_encoder_layers': 1,
  'num_decoder_layers': 1,
}
_FLAGS = {
  'inputs': 'review: {text}',
  'targets': '{label}',
  'labels': 'no,yes',
}
_MACROS = {
  'TRAIN_STEPS': 24,
  'BATCH_SIZE': 8,
  'EVAL_BATCH_SIZE': 8,
  'PROMPT_LENGTH': 4,
  'TASK_FEATURE_LENGTHS': {'inputs': 24, 'targets': 4},
  'LOG_PERIOD': 3,
  'EVAL_PERIOD': 12,
  'CHECKPOINT_PERIOD': 8,
}


def train(data: pathlib.Path, **changes: Any) -> list[str]:
  """The arguments of `prompt-jax train` on the files of `runs.write_data`.

  Args:
    data: the folder of the files.
    **changes: macros in capitals, flags in small letters; None leaves one out.
  """
  files = ('models/mini_bytes.gin', 'methods/soft_prompt.gin', 'runs/train.gin')
  flags = {
    'train_data': data / 'train.jsonl',
    'eval_data': data / 'dev.jsonl',
    **_FLAGS,
    **{f'gin.t5.T5Config.{name}': size for name, size in _SIZES.items()},
    **{f'gin.{name}': value for name, value in _MACROS.items()},
    **{f'gin.{k}' if k.isupper() else k: v for k, v in changes.items()},
  }
  return [
    'train',
    *(f'--gin_file={name}' for name in files),
    *(f'--{name}={v}' for name, v in flags.items() if v is not None),
  ]


def without_training(args: list[str], command: str) -> list[str]:
  """Of the arguments of `train` what another command takes."""
  other = r'--gin\.(TRAIN_STEPS|[A-Z]*_PERIOD)='
  kept = [a.replace('runs/train', f'runs/{command}') for a in args[1:]]
  return [command, *(a for a in kept if not re.match(other, a))]


def here(*args: str) -> int:
  """Runs a command in this process, which stays as it was; its status."""
  handlers = logging.root.handlers[:]
  hooks = threading.excepthook, sys.unraisablehook
  try:
    return cli.main(args)
  finally:
    gin_utils.clear()
    logging.root.handlers[:] = handlers
    threading.excepthook, sys.unraisablehook = hooks


def environment(**changes: Any) -> dict[str, str]:
  """Of a process of its own, which shares the tests' compiled programs."""
  cache = jax.config.jax_compilation_cache_dir
  fixed = {} if cache is None else {'JAX_COMPILATION_CACHE_DIR': cache}
  return {**os.environ, **fixed, **{k: str(v) for k, v in changes.items()}}


def start(*args: str, before: str = '', **env: Any) -> subprocess.Popen[str]:
  """Starts a command.

  Args:
    *args: of the command.
    before: Python to run before it, in its process.
    **env: more of the environment.
  """
  code = (
    f'import sys\n{before}\nfrom prompt_jax import cli\nsys.exit(cli.main())'
  )
  return subprocess.Popen(
    [sys.executable, '-c', code, *args] if before else [PROGRAM, *args],
    env=environment(**env),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait(process: subprocess.Popen[str]) -> tuple[int, str, str]:
  """(status, standard output, standard error) of a command."""
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def done(*args: str, **kwargs: Any) -> str:
  """Runs a command that must go well, in its own process; what it prints."""
  status, out, err = wait(start(*args, **kwargs))
  assert status == 0, err
  return out + err
