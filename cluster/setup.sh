#!/usr/bin/env bash
# Makes .venv: system packages, pinned dependencies, this project. `make setup` runs it; run again, it does only what is missing.
# `cluster/Dockerfile` runs it too.
#
#   PYTHON=python3.12   the interpreter to use
#   VARIANT=cpu         the same versions with PyTorch's CPU build, without 4 GB of CUDA libraries
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} VARIANT=${VARIANT:-cuda}

fail() { echo "setup: $*" >&2; exit 2; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "Python 3.11 or newer is needed, '$PYTHON' is $("$PYTHON" --version 2>&1 || true); set PYTHON=/path/to/python3"

missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
pkg-config --exists libjpeg 2>/dev/null || missing+=(libjpeg-dev)
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"$PYTHON" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  missing+=(python3-dev)

if ((${#missing[@]})); then
  if [[ $(id -u) == 0 ]]; then as_root=(); elif sudo -n true 2>/dev/null; then as_root=(sudo -n); else
    fail "system packages are missing; type: sudo apt-get install -y ${missing[*]}"
  fi
  echo "setup: installing ${missing[*]}"
  "${as_root[@]}" apt-get update -q >/dev/null
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
fi

[[ -x .venv/bin/python ]] || "$PYTHON" -m venv .venv
echo "setup: installing the pinned dependencies into .venv (minutes the first time)"
lock=requirements.lock index=()    # its hashes make pip refuse any other file of the same name
if [[ $VARIANT == cpu ]]; then
  # PyTorch's CPU builds are other files of the same versions, so versions alone are held here.
  lock=.venv/requirements-cpu.lock index=(--extra-index-url https://download.pytorch.org/whl/cpu)
  sed -E 's/ *\\$//; /^ +--hash/d; /^(nvidia-(cu|nccl|nv)|cuda-|triton==)/d' requirements.lock >"$lock"
elif [[ $VARIANT != cuda ]]; then
  fail "VARIANT is '$VARIANT'; set cuda or cpu"
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${index[@]}" -r "$lock"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
touch .venv/.ready
