#!/usr/bin/env bash
# Creates .venv and installs the pinned stack into it, step by step.
#
# A finished step leaves a stamp with the checksum of its inputs. So an interrupted install continues where it stopped, a
# second call installs nothing, and a changed pin repeats its step and all later steps.
#
#   PYTHON       interpreter to build .venv with (default: the first of python3.11, python3.10, python3.12, python3)
#   TORCH_INDEX  extra package index for torch, e.g. the one with CPU-only or with other CUDA builds
#   STACK        openmmlab (default), the releases of OpenMMLab, or onedl, the maintained fork; .venv keeps its first one
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
stamps=$venv/.install
requirements=requirements
chain=""

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }

choose_stack() {
    if [ -x "$venv/bin/python" ]; then
        built=$(cat "$stamps/stack" 2>/dev/null || echo openmmlab)
    else
        built=${STACK:-openmmlab}
    fi
    [ "${STACK:-$built}" = "$built" ] || fail "$venv holds the stack $built, and both stacks have the same modules; delete $venv to build it with STACK=$STACK."
    case $built in
        openmmlab) mmcv=mmcv==2.1.0 ;;
        onedl) mmcv=onedl-mmcv==2.3.6 ;;
        *) fail "there is no stack $built; STACK is openmmlab or onedl." ;;
    esac
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.10 python3.12 python3}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 to 3.12 with the venv module found (tried: ${PYTHON:-python3.11 python3.10 python3.12 python3}); install python3.11 and python3.11-venv, or set PYTHON."
}

# step NAME DESCRIPTION FILE COMMAND...: run COMMAND unless it, FILE and every step before are unchanged since it last worked.
step() {
    local name=$1 description=$2 file=$3
    shift 3
    chain=$(printf '%s\n' "$chain" "$*" "$(cat "$file" 2>/dev/null)" | cksum)
    if [ "$(cat "$stamps/$name" 2>/dev/null)" = "$chain" ]; then
        return
    fi
    say "$description"
    "$@" || fail "this step failed: $description. Its output is above; the same command goes on from here."
    mkdir -p "$stamps"
    printf '%s\n' "$chain" > "$stamps/$name"
    installed=yes
}

pip_install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$requirements/constraints.txt" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$@"; }

create_venv() {
    local python
    python=$(find_python) || return
    mkdir -p "$stamps"
    echo "$built" > "$stamps/stack"
    "$python" -m venv "$venv"
}

compile_mmcv() {
    # -O2 without debug information: 6 minutes and a 1 MB library instead of half an hour and 84 MB.
    MAX_JOBS=${MAX_JOBS:-$(nproc)} CFLAGS="-g0 -O2 -w" pip_install --no-build-isolation --no-deps "$1" || return
    "$venv/bin/python" -W ignore -c 'import mmcv.ops' || fail "mmcv.ops does not import, for the reason above: it is compiled by g++ (C++17) with the headers of Python, and needs libGL and GLib (Debian: g++ python3-dev libgl1 libglib2.0-0)."
}

repair_torchvision() {
    "$venv/bin/python" -W ignore -c 'import torchvision' 2>/dev/null && return
    local site
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp requirements/torchvision_repair.py "$site/"
    echo 'import torchvision_repair' > "$site/torchvision_repair.pth"
    "$venv/bin/python" -W ignore -c 'import torchvision' || fail "torchvision does not fit this torch, and declaring its operators did not help"
}

torch_from=${TORCH_INDEX:-"PyPI, with CUDA: 2.7 GB to download, 6 GB in $venv at the end; for the CPU alone about 0.2 and 2 GB: TORCH_INDEX=https://download.pytorch.org/whl/cpu make install"}

installed=no
[ -x "$venv/bin/python" ] || rm -rf "$stamps"
choose_stack
step 0-venv "Creating the virtual environment $venv" "" create_venv
step 1-torch "Installing torch from $torch_from" "$requirements/torch.txt" pip_install -r "$requirements/torch.txt"
step 2-openmmlab "Installing mmengine, mmdet, mmsegmentation and mmpretrain ($built)" "$requirements/$built.txt" pip_install -r "$requirements/$built.txt"
step 3-torchvision "Installing torchvision" "" pip_install --no-deps torchvision==0.28.0
step 4-repair "Checking torchvision against torch" requirements/torchvision_repair.py repair_torchvision
step 5-mmcv "Compiling mmcv for this torch (about 7 minutes on 2 cores)" "" compile_mmcv "$mmcv"
step 6-dev "Installing what tests and linters need" "$requirements/dev.txt" pip_install -r "$requirements/dev.txt"
step 7-docs "Installing what builds the pages" "$requirements/docs.txt" pip_install -r "$requirements/docs.txt"
step 8-package "Installing this project into $venv (editable)" setup.py pip_install --no-build-isolation --no-deps -e .
if [ $installed = yes ]; then say "The environment $venv is ready"; fi
