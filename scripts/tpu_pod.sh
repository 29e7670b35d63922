#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat >&2 <<'END'
Runs one prompt-jax command on all hosts of a Cloud TPU slice, as one program.

  scripts/tpu_pod.sh TPU ZONE train --gin_file=... --model_dir=/mnt/DIR ...
  scripts/tpu_pod.sh TPU ZONE study FILE.gin --model_dir=/mnt/DIR

TPU   name of the slice; ZONE its zone. CLOUDSDK_CORE_PROJECT is the project, if
      it is not gcloud's own.
SETUP shell commands before, on every host, e.g. '. ~/venv/bin/activate'.

Also eval, infer and score. Every host has prompt_jax, and the files that are
named at the same place: --model_dir and the checkpoint are on a disk that all
of them mount (Filestore). The cells of a study are trained one after the
other, by all hosts together, which its recipes must say: together = 1. The same
command goes on with what was stopped.
END
  exit 2
}

refuse() {
  printf 'tpu_pod.sh: %s\n\n' "$1" >&2
  usage
}

[[ $# -ge 1 ]] || refuse 'no TPU is named.'
[[ $# -ge 2 ]] || refuse 'no zone is given.'
[[ $# -ge 3 ]] || refuse 'no command is given.'
tpu=$1 zone=$2 command=$3
shift 2
case $command in
  eval | infer | score) ;;
  train | study)
    case " $*" in
      *' --model_dir='* | *' --model_dir '*) ;;
      *) refuse '--model_dir is missing.' ;;
    esac
    ;;
  *) refuse "'$command' is none of train, eval, infer, score, study." ;;
esac
if [[ $command == study ]]; then
  set -- "$@" --workers=0
fi
if ! type gcloud >/dev/null 2>&1; then
  echo 'tpu_pod.sh: gcloud is not on the PATH: install the Google Cloud CLI.' >&2
  exit 1
fi

printf -v line '%q ' prompt-jax "$@"
exec gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all \
  --command="${SETUP:+$SETUP && }PROMPT_JAX_DISTRIBUTED=1 ${line% }"
