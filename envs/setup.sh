# Sourced by ./run and ./test: the project folder, the device, and the .venv that both work in.
# shellcheck shell=bash

readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly STATE=.snakemake # git-ignored, and there anyway

exec 3>&1 # where progress goes; ./run moves it to stderr when its stdout is for another program

say() {
  printf 'kdclimb: %s\n' "$*" >&3
}

fail() {
  printf 'kdclimb: error: %s\n' "$*" >&2
  exit 1
}

enter_project() {
  unset CDPATH
  if [[ ${PYTHON:-} == */* && $PYTHON != /* ]]; then PYTHON=$PWD/$PYTHON; fi
  cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." || exit
  mkdir -p "$STATE"
  type -P flock >/dev/null || fail "flock is needed. On Debian and Ubuntu: apt install util-linux"
}

# ---- device -------------------------------------------------------------------------------------

find_gpus() {
  local listed
  GPUS=()
  if listed=$(nvidia-smi -L 2>/dev/null) && [[ $listed == GPU* ]]; then
    mapfile -t GPUS < <(grep '^GPU ' <<<"$listed")
  fi
}

# $1: auto, cpu or cuda
describe_device() {
  local device=$1 name
  if [[ $device == auto ]]; then
    device=cpu
    # As kdclimb.gpus reads that variable, which may hide them all.
    if ((${#GPUS[@]})) && [[ ${CUDA_VISIBLE_DEVICES-0} =~ ^[[:space:],]*([0-9]|GPU-|MIG-) ]]; then device=cuda; fi
  fi
  if [[ $device != cuda ]]; then
    # nproc would answer OMP_NUM_THREADS where that is set, and Snakemake doesn't look at it
    local cores
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
    printf '%s (%d %s)' "$device" "$cores" "$( ((cores == 1)) && echo core || echo cores)"
  elif ((${#GPUS[@]})); then
    name=${GPUS[0]#*: }
    printf 'cuda (%d x %s)' "${#GPUS[@]}" "${name%% (UUID*}"
  else
    printf 'cuda (no GPU found here)'
  fi
}

# ---- Python -------------------------------------------------------------------------------------

python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_supported() {
  [[ $1 == 3.11 || $1 == 3.12 ]]
}

# Sets BASE_PYTHON and PY, its version.
choose_python() {
  local candidate version seen='' candidates=(python3 python3.12 python3.11)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    version=$(python_version "$candidate") || version=''
    if is_supported "$version"; then
      BASE_PYTHON=$candidate
      PY=$version
      return
    fi
    seen+="; $candidate ${version:+is Python }${version:-does not run}"
  done
  fail "Python 3.11 or 3.12 is needed$seen. Install one, or name one: PYTHON=/path/to/python3.12 $0"
}

# ---- .venv --------------------------------------------------------------------------------------
# Three locks, of which the kernel frees those that a killed process held:
#   setup.lock  one set-up at a time
#   venv.lock   shared by all who work in .venv, exclusive while it is rebuilt
#   kdclimb.lock (in ./run) one ./run at a time
# pip inherits the first two: when ./run is killed during set-up, the next one waits for its pip to end.

# $1: run or test; $2: cpu or cuda. The name of the file that says: .venv has all that this needs.
stamp() {
  local files=(requirements.txt)
  if [[ $1 == test ]]; then files+=(requirements-dev.txt); fi
  printf '.venv/.kdclimb-%s' "$({ cat "${files[@]}" && echo "$1 $PY $2"; } | sha256sum | cut -c 1-12)"
}

# Sets PY and KIND (cpu or cuda) to what is wanted. A CUDA build serves a CPU too, as where GPU jobs
# are submitted from a machine without one.
decide_build() {
  if [[ -n ${PYTHON:-} ]] || ! PY=$(python_version .venv/bin/python) || ! is_supported "$PY"; then
    choose_python
  fi
  case ${KDCLIMB_TORCH:-} in
    cpu | cuda) KIND=$KDCLIMB_TORCH ;;
    '')
      KIND=cpu
      if ((${#GPUS[@]})) || [[ -e $(stamp run cuda) ]]; then KIND=cuda; fi
      ;;
    *) fail "KDCLIMB_TORCH=$KDCLIMB_TORCH; allowed: cpu, cuda, or unset to choose by the GPUs of this machine" ;;
  esac
}

# $1: run or test
is_ready() {
  [[ -e $(stamp run "$KIND") && -e $(stamp "$1" "$KIND") ]] && python_version .venv/bin/python >/dev/null
}

pip_install() {
  .venv/bin/python -m pip install --disable-pip-version-check --no-input "$@" >&3 ||
    fail "pip could not install this; starting $0 again sets up from the beginning"
}

# On its own, so that only torch is looked for at PyTorch's index, and its few retries delay nothing else.
install_torch() {
  local pin found options=(--no-deps)
  pin=$(grep '^torch==' requirements.txt)
  if [[ $KIND == cpu ]]; then options+=(--retries 1 --extra-index-url "$TORCH_CPU_INDEX"); fi
  if [[ ! -t 3 ]]; then options+=(-qq); fi # on a terminal pip draws how far the download is
  say "installing $pin for $KIND"
  pip_install "${options[@]}" "$pin"
  found=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))')
  if [[ $KIND == cpu && $found != *+cpu && $(uname -m) == x86_64 ]]; then
    found+=", a CUDA build, several GB, since PyTorch's CPU index had no answer; it works on a CPU too"
  fi
  say "installed torch $found"
}

# From nothing, whatever is there: a killed pip leaves packages that look whole and are not.
rebuild_venv() {
  choose_python
  "$BASE_PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$BASE_PYTHON cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"
  flock --exclusive --timeout 3 8 ||
    fail "the packages in .venv have to be installed anew, and a ./run or ./test works with them; wait for its end"
  say "setting up .venv with Python $PY: once, a minute or more"
  rm -f .venv/.kdclimb-*
  rm -rf .venv
  "$BASE_PYTHON" -m venv .venv >&3 || fail "$BASE_PYTHON -m venv failed"
  install_torch
  say "installing the rest of requirements.txt"
  pip_install -qq --require-hashes -r envs/locked.txt
  pip_install -qq -r requirements.txt # is all there but for the libraries that a CUDA build of torch names
  : >"$(stamp run "$KIND")"
  flock --shared 8
}

# Only adds to a whole .venv, so a ./run may go on meanwhile.
add_test_packages() {
  say "adding requirements-dev.txt to .venv"
  : >.venv/.kdclimb-unfinished
  pip_install -qq --require-hashes -r envs/locked-dev.txt
  : >"$(stamp test "$KIND")"
  rm .venv/.kdclimb-unfinished
}

# $1: run or test. On return the caller shares .venv, until its process ends.
ensure_venv() {
  exec 8>>"$STATE/kdclimb.venv.lock"
  decide_build
  if flock --shared --nonblock 8 && is_ready "$1"; then return; fi
  flock --unlock 8
  exec 7>>"$STATE/kdclimb.setup.lock"
  if ! flock --nonblock 7; then
    say "another set-up is at work here; waiting for its end"
    flock 7
  fi
  flock --shared 8
  decide_build
  if ! is_ready run || { ! is_ready "$1" && [[ -e .venv/.kdclimb-unfinished ]]; }; then rebuild_venv; fi
  if ! is_ready "$1"; then add_test_packages; fi
  exec 7>&-
}
