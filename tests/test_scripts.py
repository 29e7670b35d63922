"""The launchers, with made-up gcloud, srun and scontrol on the PATH."""

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

SCRIPTS = pathlib.Path(__file__).parent.parent / 'scripts'
FAKES = {
  'gcloud': 'printf "%s\\0" "$@"',
  # The host names of a job, many, of which the first is wanted.
  'scontrol': '[[ $1 == show && $3 == "n[7-9]" ]] && printf "n%s\\n" 7 8 9',
  'srun': '[[ $1 == --gpu-bind=none ]] && shift\n'
  'for i in 0 1; do SLURM_NTASKS=2 SLURM_PROCID=$i "$@"; done',
  'prompt-jax': 'printf "%s\\0" "$JAX_COORDINATOR_ADDRESS" '
  '"$JAX_PROCESS_ID/$JAX_NUM_PROCESSES ${JAX_LOCAL_DEVICE_IDS:-}" "$@"\n'
  'echo',
}
JOB = {
  'SLURM_JOB_NODELIST': 'n[7-9]',
  'SLURM_JOB_ID': '1234567',
  'SLURM_GPUS_ON_NODE': '4',
}
# What shells are fond of.
HARD = "--inputs=review: {text} 'it''s' $HOME \"x\" *"


@pytest.fixture
def call(tmp_path, monkeypatch):
  """Runs a script; (status, what it printed, errors)."""
  for name, text in FAKES.items():
    path = tmp_path / name
    path.write_text(f'#!/usr/bin/env bash\nset -euo pipefail\n{text}\n')
    path.chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
  for name in ('SETUP', *JOB):
    monkeypatch.delenv(name, raising=False)

  def run(name, *args, **env):
    done = subprocess.run(
      [SCRIPTS / name, *args],
      capture_output=True,
      text=True,
      env={**os.environ, **env},
    )
    return done.returncode, done.stdout, done.stderr

  return run


@pytest.mark.parametrize('name', ['tpu_pod.sh', 'slurm.sh'])
def test_shell(name):
  assert os.access(SCRIPTS / name, os.X_OK)
  subprocess.run(['bash', '-n', SCRIPTS / name], check=True)
  if shutil.which('shellcheck') is None:
    pytest.skip('no shellcheck')
  subprocess.run(['shellcheck', SCRIPTS / name], check=True)


def test_tpu_pod(call):
  args = ('train', '--model_dir=/mnt/run', HARD)
  status, out, err = call('tpu_pod.sh', 'slice', 'us-east1-d', *args)
  assert status == 0, err
  *before, command, end = out.split('\0')
  assert not end
  assert before == [
    *('compute', 'tpus', 'tpu-vm', 'ssh', 'slice'),
    *('--zone=us-east1-d', '--worker=all'),
  ]
  # What the shell of a host makes of it.
  words = shlex.split(command.removeprefix('--command='))
  assert words == ['PROMPT_JAX_DISTRIBUTED=1', 'prompt-jax', *args]
  found = call(
    'tpu_pod.sh', 'slice', 'zone', *args, SETUP='. ~/venv/bin/activate'
  )[1]
  assert '--command=. ~/venv/bin/activate && PROMPT_JAX_DISTR' in found


def test_slurm(call):
  args = ('train', '--model_dir=/shared/run', HARD)
  status, out, err = call('slurm.sh', *args, **JOB)
  assert status == 0, err
  port = 20000 + 1234567 % 20000
  tasks = [line.split('\0')[:-1] for line in out.splitlines()]
  assert tasks == [[f'n7:{port}', f'{i}/2 0,1,2,3', *args] for i in (0, 1)]
  # A task a GPU: which is its own, JAX knows.
  out = call('slurm.sh', *args, **JOB, SLURM_NTASKS_PER_NODE='4')[1]
  assert out.split('\0')[1] == '0/2 '
  status, out, _ = call('slurm.sh', *args, **JOB, SETUP='echo prepared')
  assert status == 0 and out.startswith('prepared\n')


@pytest.mark.parametrize(
  ('name', 'before'), [('tpu_pod.sh', ('slice', 'zone')), ('slurm.sh', ())]
)
def test_studies_run_in_the_process_itself(call, name, before):
  args = ('study', 'studies/pocket.gin', '--model_dir', '/shared/study')
  status, out, err = call(name, *before, *args, **JOB)
  assert status == 0, err
  assert '--workers=0' in out


@pytest.mark.parametrize(
  ('args', 'env', 'message'),
  [
    (['tpu_pod.sh'], {}, 'no TPU is named'),
    (['tpu_pod.sh', 'slice'], {}, 'no zone is given'),
    (['tpu_pod.sh', 'slice', 'zone'], {}, 'no command is given'),
    (['tpu_pod.sh', 'slice', 'zone', 'trian'], {}, "'trian' is none of train"),
    (['tpu_pod.sh', 'slice', 'zone', 'train'], {}, '--model_dir is missing'),
    (['slurm.sh'], JOB, 'no command is given'),
    (['slurm.sh', 'report', '/shared/study'], JOB, "'report' is none of train"),
    (['slurm.sh', 'train'], JOB, '--model_dir is missing'),
    (['slurm.sh', 'train', '--model_dir=/s'], {}, 'give this file to sbatch'),
  ],
)
def test_missing_arguments_end_with_the_usage(call, args, env, message):
  status, out, err = call(*args, **env)
  assert status == 2 and not out
  assert err.startswith(f'{args[0]}: ') and message in err.splitlines()[0]
  assert f'scripts/{args[0]} ' in err and 'SETUP' in err


def test_places_that_lack_a_program(call, monkeypatch, tmp_path):
  (tmp_path / 'gcloud').unlink()
  if shutil.which('gcloud') is None:
    got = call('tpu_pod.sh', 'slice', 'zone', 'train', '--model_dir=/mnt/run')
    assert got[0] == 1 and 'gcloud is not on the PATH' in got[2]
  job = {**JOB, 'SLURM_JOB_NODELIST': 'm1'}
  status, _, err = call('slurm.sh', 'train', '--model_dir=/shared', **job)
  assert status == 1 and 'scontrol names no host of m1' in err
