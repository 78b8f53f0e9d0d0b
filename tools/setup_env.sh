#!/usr/bin/env bash
set -euo pipefail
shopt -s inherit_errexit

usage() {
  cat <<'EOF'
Usage: tools/setup_env.sh [onedl|upstream]

Sets up a virtual environment with mmtoken and one of the two OpenMMLab stacks:

  onedl     .venv           the maintained distributions of VBTI (the default); Python 3.10-3.12
  upstream  .venv-upstream  the last releases of OpenMMLab itself; Python 3.10-3.11

The first run takes some minutes, and 10 to 15 more to compile mmcv's ops, for which no wheels are
published that fit. The wheel so built is kept, so that a later set-up, also of another clone, takes
it from there. Running the script again is safe: it returns at once when nothing has changed,
brings the environment up to date when the requirements have, and starts afresh after an
interruption.

Environment variables:

  PYTHON          the Python to use; default: that of the existing environment, otherwise the first
                  supported one among python3, python3.11, python3.12 and python3.10
  MMTOKEN_CACHE   where wheels and logs are kept; default: ~/.cache/mmtoken
  MAX_JOBS        how many files to compile at once (some 2 GB of memory each)
  PIP_FIND_LINKS  as in pip; an mmcv wheel with ops found there is used instead of compiling one
  FORCE_CUDA      1 to compile mmcv's ops for CUDA though this machine has no GPU
  TORCH_CUDA_ARCH_LIST
                  for which GPUs to compile, such as '8.0;9.0'; default: those of this machine

mmcv's ops are compiled for CUDA when torch sees a GPU and nvcc is on PATH, otherwise for the CPU,
where detectors cannot run on a GPU; the script says so. Run it again once there is a GPU and nvcc,
and it compiles them anew. On a login node without a GPU, for machines that have one (H100: 9.0):

  FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 tools/setup_env.sh

Ops for CUDA stay when the script runs where there is no GPU: they work on a CPU, too.

On Debian and Ubuntu, these packages are all it takes besides Python itself:

  apt-get install python3-venv python3-dev g++ libgl1 libglib2.0-0
EOF
}

# ---------------------------------------------------------------------------------------------
# Telling what happens
# ---------------------------------------------------------------------------------------------

problems=0 # found by the checks so far
job=''     # process group of the long command that runs
scratch='' # temporary folder to remove at the end

say() { printf '%s\n' "$*"; }
problem() {
  printf 'setup_env: %s\n' "$*" >&2
  problems=$((problems + 1))
}
die() {
  problem "$@"
  exit 1
}
stop_if_problems() { ((problems == 0)) || exit 1; }

# step LOG TITLE COMMAND...: announce and run a long command, show that it is alive, explain failure.
step() {
  local log=$cache/logs/$1 title=$2 started=$SECONDS minutes=0 status=0
  shift 2
  mkdir -p "$cache/logs"
  say "==> $title; log: $log"
  # In a process group of its own, an interrupted command can be ended with all its compilers.
  set -m
  "$@" >"$log" 2>&1 </dev/null &
  job=$!
  set +m
  while kill -0 "$job" 2>/dev/null; do
    sleep 0.1
    if [[ -t 1 ]]; then
      printf '\r    %d:%02d ' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
    elif ((SECONDS - started >= 60 * (minutes + 1))); then
      minutes=$((minutes + 1))
      say "    $minutes min so far"
    fi
  done
  [[ ! -t 1 ]] || printf '\r\033[K'
  wait "$job" || status=$?
  job=''
  if ((status != 0)); then
    tail -n 20 "$log" | sed 's/^/    | /' >&2
    die "failed: $title; the whole log is in $log"
  fi
}

# shellcheck disable=SC2329 # the trap calls it
clean_up() {
  if [[ -n $job ]]; then
    kill -INT -- "-$job" 2>/dev/null || true # on which pip removes its temporary files
    for _ in {1..50}; do
      kill -0 -- "-$job" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL -- "-$job" 2>/dev/null || true
  fi
  [[ -z $scratch ]] || rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# lock PATH: wait until no other set-up holds it; released at exit.
lock() {
  local fd
  command -v flock >/dev/null || return 0
  exec {fd}<"$1"
  flock -n "$fd" && return
  say "==> Waiting for another set-up, which holds $1"
  flock "$fd" || true # some network file systems have no locks
}

# ---------------------------------------------------------------------------------------------
# Checks: each failure is one line that names what is missing and the command that mends it
# ---------------------------------------------------------------------------------------------

# Sets python, never that of a virtual environment, and version, such as 3.11.
find_python() {
  local candidates=("$venv/bin/python" python3 python3.11 python3.12 python3.10) candidate found
  local wanted="the $stack stack needs Python ${supported// / or }" seen=''
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    found=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys._base_executable)' \
      2>/dev/null) || continue
    version=${found%% *} python=${found#* }
    [[ " $supported " != *" $version "* ]] || return 0
    seen+="${seen:+, }$candidate is $version"
  done
  [[ -n $seen ]] ||
    die "$wanted, but there is no ${PYTHON:-python3}; run: apt-get install python3 python3-venv"
  die "$wanted, but $seen; run: apt-get install python3.11 python3.11-venv, then set PYTHON=python3.11"
}

check_venv_module() {
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    problem "$python cannot create virtual environments; run: apt-get install python$version-venv"
}

# Folders on one file system share its free space, so their needs add up.
check_disk() {
  local -A needed=() free=() users=()
  local row folder size mount space
  for row in "7 $venv" "1 $cache" "3 ${TMPDIR:-/tmp}"; do
    size=${row%% *} folder=${row#* }
    while [[ ! -e $folder ]]; do folder=$(dirname "$folder"); done
    read -r space mount < <(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1024 ^ 2), $6 }')
    needed[$mount]=$((${needed[$mount]:-0} + size))
    users[$mount]+=", ${row#* }: $size GB"
    free[$mount]=$space
  done
  for mount in "${!needed[@]}"; do
    ((free[$mount] >= needed[$mount])) ||
      problem "${needed[$mount]} GB are needed on $mount (${users[$mount]#, }), but ${free[$mount]} GB are free; make room, or set MMTOKEN_CACHE or TMPDIR to a folder elsewhere"
  done
}

check_opencv_libraries() {
  local library
  [[ $(uname -s) == Linux ]] || return 0
  for library in libGL.so.1=libgl1 libgthread-2.0.so.0=libglib2.0-0; do
    "$python" -c "import ctypes; ctypes.CDLL('${library%=*}')" 2>/dev/null ||
      problem "OpenCV needs the system library ${library%=*}; run: apt-get install ${library#*=}"
  done
}

check_build_tools() {
  local compiler=${CXX:-c++} headers
  compiler=${compiler%% *} # CXX may hold options
  command -v "$compiler" >/dev/null ||
    problem "compiling mmcv's ops needs a C++ compiler, but there is no $compiler; run: apt-get install g++"
  headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [[ -e $headers/Python.h ]] ||
    problem "compiling mmcv's ops needs the headers of Python $version, but there is no $headers/Python.h; run: apt-get install python$version-dev"
}

check_forced_cuda() {
  [[ ${FORCE_CUDA:-0} == 1 ]] || return 0
  [[ -n $nvcc ]] ||
    problem "FORCE_CUDA=1 needs nvcc on PATH; install or load CUDA's toolkit, of the version that torch has"
  has_gpu || [[ -n ${TORCH_CUDA_ARCH_LIST:-} ]] ||
    problem "FORCE_CUDA=1 without a GPU needs to know for which to compile; set TORCH_CUDA_ARCH_LIST, for instance to 9.0 for an H100 or to '8.0;8.6' for an A100 and an RTX 3090"
}

# ---------------------------------------------------------------------------------------------
# mmcv's wheel with compiled ops
# ---------------------------------------------------------------------------------------------

# pin NAME: the version that the stack's requirements give to a distribution.
pin() { sed -n "s/^$1==\([^ ]*\).*/\1/p" "$requirements"; }

has_ops() { "$venv/bin/python" -m zipfile -l "$1" | grep 'mmcv/_ext.*\.so' >/dev/null; }

# wheel_folder VARIANT: a wheel fits one version of torch and Python, and either the CPU or a CUDA.
wheel_folder() { printf '%s' "$cache/wheels/$(pin torch)-cp${version/./}-$1"; }

# cached_wheel VARIANT: set wheel to one that was built earlier.
cached_wheel() {
  local name=${mmcv%==*}
  wheel=$(compgen -G "$(wheel_folder "$1")/${name//-/_}-${mmcv#*==}-*.whl" | head -n 1) || return 1
}

# Sets wheel to one that pip is offered through PIP_FIND_LINKS or its configuration, if it has ops.
offered_wheel() {
  if [[ ! -v offered ]]; then
    offered=''
    scratch=$(mktemp -d)
    if "$venv/bin/python" -m pip download --quiet --no-index --no-deps --only-binary=:all: \
      --dest "$scratch" "$mmcv" &>/dev/null; then
      offered=$(compgen -G "$scratch/*.whl")
      has_ops "$offered" || {
        say "==> Passing over the ${offered##*/} that pip is offered: it has no compiled ops"
        offered=''
      }
    fi
  fi
  wheel=$offered
  [[ -n $wheel ]]
}

has_gpu() { compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/dxg ]]; }

# Sets nvcc to its version, and device to all that decides for what the ops are compiled, as far as
# it is known without torch, which takes seconds to import.
look_for_cuda() {
  nvcc=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p') || true
  device="nvcc=$nvcc force=${FORCE_CUDA:-0} for=${TORCH_CUDA_ARCH_LIST:-} gpu="
  ! has_gpu || device+=yes
}

say_cpu_only() { # REASON MEND
  say "    mmcv's ops will run on the CPU only, so detectors fail on a GPU: $1; $2" >&2
}

# Prints cpu or, for instance, cu130-sm90: CUDA's version and the architectures compiled for. Where
# there is no CUDA, ops that the environment had for it are taken over.
find_variant() {
  local cuda architectures
  read -r cuda architectures < <("$venv/bin/python" -c '
import torch
if torch.cuda.is_available():
    devices = range(torch.cuda.device_count())
    names = {"sm%d%d" % torch.cuda.get_device_capability(device) for device in devices}
    print(torch.version.cuda, "-".join(sorted(names)))') || true
  [[ ${FORCE_CUDA:-0} != 1 ]] || cuda=$nvcc # if that does not suit torch, the build says so
  [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]] ||
    architectures=$(sed -E 's/([0-9]+)\.([0-9])/sm\1\2/g; s/[; ]+/-/g' <<<"$TORCH_CUDA_ARCH_LIST")
  if [[ -n $cuda && ${nvcc%%.*} == "${cuda%%.*}" ]]; then
    say "cu${cuda/./}-$architectures"
  elif [[ $variant == cu* ]] && cached_wheel "$variant"; then
    say "$variant"
  else
    if [[ -z $cuda ]]; then
      say_cpu_only 'torch sees no GPU here' \
        'where it does and there is nvcc, set up again; to compile for a GPU here, see --help'
    else
      say_cpu_only "torch has CUDA $cuda, but nvcc is ${nvcc:-missing}" \
        "install CUDA's toolkit $cuda, put nvcc on PATH and set up again"
    fi
    say cpu
  fi
}

build_wheel() {
  local variant=$1 folder cuda=0
  folder=$(wheel_folder "$variant")
  mkdir -p "$folder"
  lock "$folder"
  ! cached_wheel "$variant" || return 0 # another set-up may have built it meanwhile
  check_build_tools
  stop_if_problems
  [[ $variant == cpu ]] || cuda=1
  rm -rf "$folder"/.build.* "$scratch" # the former where a set-up could not clean up
  # Next to its destination, the wheel is put in place by one rename: there is never half a wheel.
  scratch=$(mktemp -d "$folder/.build.XXXXXX")
  step "${folder##*/}-${mmcv%==*}.log" \
    "Compiling mmcv's ops (once; 10 to 15 minutes on two cores)" \
    env PATH="$venv/bin:$PATH" TMPDIR="$scratch" MMCV_WITH_OPS=1 FORCE_CUDA="$cuda" \
    "$venv/bin/python" -m pip wheel --no-deps --no-build-isolation --no-cache-dir \
    --no-binary "${mmcv%==*}" --wheel-dir "$scratch" "$mmcv"
  wheel=$(compgen -G "$scratch/*.whl")
  has_ops "$wheel" || die "the mmcv that was built has no compiled ops; see the log above"
  mv "$wheel" "$folder/"
  wheel=$folder/${wheel##*/}
}

# ---------------------------------------------------------------------------------------------
# The environment
# ---------------------------------------------------------------------------------------------

# The environment is complete when it holds this stamp, which is written last: for which Python and
# place it was made, and a checksum of what it was made from. The variant of mmcv's ops and the
# device that it was chosen for follow, each in a line.
make_stamp() { printf '%s %s %s' "$version" "$venv" "$(cat "${sources[@]}" | cksum)"; }

# Where the device is another, ops for the CPU are incomplete once there can be some for CUDA; those
# for CUDA, which run on every machine, when they are wanted for other GPUs.
is_complete() {
  local stamped
  [[ -x $venv/bin/python && -e $venv/.stamp ]] || return
  mapfile -t stamped <"$venv/.stamp"
  variant=${stamped[1]:-}
  [[ ${stamped[0]:-} == "$stamp" ]] || return
  case ${FORCE_CUDA:-0}-$variant in
    *-cpu) [[ ${stamped[2]} == "$device" || (${FORCE_CUDA:-0} != 1 && -z $nvcc) ]] ;;
    1-*) [[ ${stamped[2]} == *" for=${TORCH_CUDA_ARCH_LIST:-} "* ]] ;;
  esac
}

# An environment that was complete, for this Python and place, is updated; any other is remade.
make_venv() {
  if [[ $(cat "$venv/.stamp" 2>/dev/null) == "$version $venv "* ]] &&
    "$venv/bin/python" -m pip --version &>/dev/null; then
    rm "$venv/.stamp"
    return
  fi
  check_venv_module
  stop_if_problems
  rm -rf "$venv"
  check_disk
  stop_if_problems
  "$python" -m venv "$venv"
}

pip_install() { # LOG TITLE ARGUMENT...
  step "$stack-$1.log" "$2" "$venv/bin/python" -m pip install --constraint "$constraints" "${@:3}"
}

install() {
  pip_install torch "Installing torch (some 3 GB to download, the first time)" \
    "torch==$(pin torch)" "torchvision==$(pin torchvision)"
  pip_install build "Installing build tools" --requirement "$root/requirements/build.txt"
  variant=$(find_variant)
  cached_wheel "$variant" || offered_wheel || build_wheel "$variant"
  pip_install mmcv "Installing ${wheel##*/}" --no-deps --force-reinstall "$wheel"
  pip_install stack "Installing the $stack stack and the tests' tools" --no-build-isolation \
    --requirement "$requirements" --requirement "$root/requirements/tests.txt"
  pip_install mmtoken "Installing mmtoken in place" --no-deps --no-build-isolation --editable "$root"
}

verify() {
  local culprit="$wheel; remove it" compiled
  [[ $wheel == "$cache"/* ]] || culprit="${wheel##*/} of PIP_FIND_LINKS; take it out of there"
  "$venv/bin/python" -c 'import torch, mmcv._ext' ||
    die "torch $(pin torch) cannot load $culprit and set up again, to have mmcv's ops compiled"
  compiled=$("$venv/bin/python" -c '
import torch, mmcv._ext
print(mmcv._ext.get_compiling_cuda_version())')
  [[ $variant == cpu || $compiled != 'not available' ]] ||
    die "there is CUDA, but no ops for it are in $culprit and set up again, to have them compiled"
  [[ $variant != cpu || $compiled != [0-9]* ]] || variant=cuda # those of an offered wheel
  "$venv/bin/python" -W ignore -c 'import mmdet, mmpretrain, mmseg, mmtoken' ||
    die "the packages are installed, but importing them fails as shown above"
}

main() {
  stack=${1:-onedl}
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  cache=${MMTOKEN_CACHE:-$HOME/.cache/mmtoken}
  case $stack in
    -h | --help) usage && exit ;;
    onedl) venv=$root/.venv supported='3.10 3.11 3.12' ;;
    upstream) venv=$root/.venv-upstream supported='3.10 3.11' ;;
    *) problem "there is no stack '$stack', only onedl and upstream; see: $0 --help" && exit 2 ;;
  esac
  [[ $cache == /* ]] || cache=$PWD/$cache
  requirements=$root/requirements/$stack.txt
  constraints=$root/requirements/constraints-$stack.txt
  sources=("$requirements" "$constraints" "$root"/requirements/{build,tests}.txt
    "$root"/{tools/setup_env.sh,setup.py,pyproject.toml})
  mmcv=$(grep -oE '^[a-z-]*mmcv==[^ ]+' "$requirements")
  find_python
  look_for_cuda
  variant='' # of mmcv's ops, as far as there are any
  stamp=$(make_stamp)

  is_complete || lock "$requirements"
  if ! is_complete; then # still, once the lock is ours
    check_forced_cuda
    stop_if_problems
    make_venv
    check_opencv_libraries
    cached_wheel '*' || offered_wheel || check_build_tools
    stop_if_problems
    install
    verify
    printf '%s\n' "$stamp" "$variant" "$device" >"$venv/.stamp"
  elif [[ $variant == cpu ]] && has_gpu; then
    say_cpu_only 'they were compiled so' "put nvcc of CUDA's toolkit on PATH and set up again"
  fi
  say "$venv is ready: the $stack stack on Python $version"
  exit # without reading on in this file, which may have been edited during a long set-up
}

main "$@"
