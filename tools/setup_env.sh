#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: tools/setup_env.sh [onedl|upstream|latest]

Sets up a virtual environment with mmtoken and an OpenMMLab stack:

  onedl     .venv           the distributions maintained by VBTI (the default); Python 3.10-3.12
  upstream  .venv-upstream  the last releases of OpenMMLab itself; Python 3.10-3.11
  latest    .venv-latest    onedl on the newest torch that mmcv's ops compile for; Python 3.10-3.12

The first run compiles mmcv's ops, for which no wheels are published (10 to 15 minutes); the wheel
is kept for later runs, also of other clones. A run returns at once if nothing has changed, updates
the environment if the requirements have, and makes it anew after an interruption.

Environment variables:

  PYTHON         the Python to use; default: that of the environment, else the first supported one
  MMTOKEN_CACHE  where compiled wheels are kept; default: ~/.cache/mmtoken
  MAX_JOBS       how many files to compile at once (some 2 GB of memory each)
  UV_*           options of uv, which installs the packages; UV_FIND_LINKS may have a wheel of mmcv
  TORCH_CUDA_ARCH_LIST
                 GPUs to compile for, such as '8.0;9.0'; default: those of this machine

The ops are compiled for CUDA if there is a GPU (or TORCH_CUDA_ARCH_LIST, as on a login node) and
nvcc of torch's version of CUDA, otherwise for the CPU. Ops for CUDA stay when the script runs again
where there is no GPU.

On Debian and Ubuntu this needs:

  apt-get install python3-venv python3-dev g++ libgl1 libglib2.0-0
EOF
}

die() {
  printf 'setup_env: %s\n' "$*" >&2
  exit 1
}

say() { printf '==> %s\n' "$*"; }

pin() { sed -n "s/^$1==\([^ ]*\).*/\1/p" "$requirements"; }

# Sets python, never that of a virtual environment, and version, such as 3.11.
find_python() {
  local candidates=("$venv/bin/python" python3 python3.12 python3.11 python3.10) candidate found
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    found=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys._base_executable)' \
      2>/dev/null) || continue
    version=${found%% *} python=${found#* }
    [[ " $supported " != *" $version "* ]] || return 0
  done
  die "the $stack stack needs Python ${supported// / or }, which ${candidates[*]} are not; set PYTHON"
}

# Prints cpu or, for instance, cuda13-9.0: for what mmcv's ops are to be compiled.
find_variant() {
  local nvcc architectures
  nvcc=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9]*\).*/\1/p') || true
  architectures=${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi --query-gpu=compute_cap \
    --format=csv,noheader 2>/dev/null | sort -u)} || true
  if [[ -n $architectures && $nvcc == "$cuda" ]]; then
    printf 'cuda%s-%s\n' "$cuda" "$(tr -s '; \n' '-' <<<"$architectures" | sed 's/-$//')"
  elif [[ $old_variant == cuda* ]]; then
    printf '%s\n' "$old_variant"
  else
    echo cpu
  fi
}

# The environment is complete when it holds this stamp, which is written last.
stamp() { printf '%s\n' "$version $venv" "$(cat "${sources[@]}" | cksum)" "$variant"; }

is_complete() {
  old_variant=''
  [[ ! -e $venv/.stamp ]] || old_variant=$(tail -n 1 "$venv/.stamp")
  variant=$(find_variant)
  [[ -x $venv/bin/python && $(cat "$venv/.stamp" 2>/dev/null) == "$(stamp)" ]]
}

check_opencv_libraries() {
  local library
  for library in libGL.so.1=libgl1 libgthread-2.0.so.0=libglib2.0-0; do
    [[ $(uname -s) != Linux ]] || "$python" -c "import ctypes; ctypes.CDLL('${library%=*}')" 2>/dev/null ||
      die "OpenCV needs ${library%=*}; run: apt-get install ${library#*=}"
  done
}

# An environment that was complete, for this Python and place, is updated; any other is made anew.
make_venv() {
  if [[ $(head -n 1 "$venv/.stamp" 2>/dev/null) != "$version $venv" || ! -x $venv/bin/python ]]; then
    say "Creating $venv"
    "$python" -m venv --clear "$venv"
  fi
  rm -f "$venv/.stamp"
  "$venv/bin/python" -m pip install --quiet "$(grep ^uv== "$root/requirements/build.txt")"
}

install() {
  "$venv/bin/uv" pip install --python "$venv/bin/python" --constraints "$constraints" \
    --build-constraints "$constraints" "$@"
}

# Installs a wheel of mmcv that was compiled for this torch, Python and variant, if there is one.
install_mmcv() {
  install --quiet --no-index --no-deps --reinstall --only-binary :all: --find-links "$wheels" "$mmcv"
}

compile_mmcv() {
  local include scratch
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  command -v "${CXX:-c++}" >/dev/null && [[ -e $include/Python.h ]] ||
    die "compiling mmcv needs ${CXX:-c++} and $include/Python.h; run: apt-get install g++ python$version-dev"
  install "torch==$(pin torch)" --requirement "$root/requirements/build.txt"
  say "Compiling mmcv's ops for $variant (once; 10 to 15 minutes on two cores)"
  # Next to its destination, the wheel is put in place by one rename: there is never half a wheel.
  rm -rf "$wheels"/.build.*
  scratch=$(mktemp -d "$wheels/.build.XXXXXX")
  env PATH="$venv/bin:$PATH" TMPDIR="$scratch" MMCV_WITH_OPS=1 \
    FORCE_CUDA="$([[ $variant == cpu ]] && echo 0 || echo 1)" \
    "$venv/bin/python" -m pip wheel --no-deps --no-build-isolation --no-cache-dir \
    --no-binary "${mmcv%==*}" --wheel-dir "$scratch" "$mmcv"
  mv "$scratch"/*.whl "$wheels/"
  rm -rf "$scratch"
}

verify() {
  "$venv/bin/python" -W ignore -c "
import torch, mmcv._ext, mmdet, mmpretrain, mmseg, mmtoken
assert (torch.version.cuda or '$cuda').startswith('$cuda.'), 'this script has another CUDA than torch'
assert '$variant' == 'cpu' or mmcv._ext.get_compiling_cuda_version() != 'not available'" ||
    die "what was installed does not work; if it is mmcv, remove its wheel from $wheels or UV_FIND_LINKS"
}

main() {
  stack=${1:-onedl}
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  case $stack in # cuda is torch's
    -h | --help) usage && exit ;;
    onedl) venv=$root/.venv family=onedl supported='3.10 3.11 3.12' cuda=13 ;;
    upstream) venv=$root/.venv-upstream family=upstream supported='3.10 3.11' cuda=12 ;;
    latest) venv=$root/.venv-latest family=onedl supported='3.10 3.11 3.12' cuda=13 ;;
    *) die "there is no stack '$stack', only onedl, upstream and latest; see: $0 --help" ;;
  esac
  requirements=$root/requirements/$stack.txt
  constraints=$root/requirements/constraints-$family.txt
  sources=("$requirements" "$constraints" "$root"/requirements/{build,tests}.txt
    "$root"/{tools/setup_env.sh,setup.py,pyproject.toml})
  mmcv=$(grep -oE '^[a-z-]*mmcv==[^ ]+' "$requirements")
  find_python
  if ! is_complete; then
    wheels=${MMTOKEN_CACHE:-$HOME/.cache/mmtoken}/wheels/$(pin torch)-cp${version/./}-$variant
    mkdir -p "$wheels"
    exec 9<"$wheels"
    ! command -v flock >/dev/null || flock 9 # until exit; other set-ups wait here
  fi
  if ! is_complete; then # still, once the lock is ours
    check_opencv_libraries
    make_venv
    install_mmcv 2>/dev/null || { compile_mmcv && install_mmcv; }
    say "Installing the $stack stack"
    install --requirement "$requirements" --requirement "$root/requirements/tests.txt" \
      --requirement "$root/requirements/build.txt" --editable "$root"
    verify
    stamp >"$venv/.stamp"
    [[ $variant != cpu ]] || say "mmcv's ops run on the CPU only, not on a GPU; see: $0 --help"
  fi
  printf '%s is ready: the %s stack on Python %s\n' "$venv" "$stack" "$version"
  exit # without reading on in this file, which may have been edited during a long set-up
}

main "$@"
