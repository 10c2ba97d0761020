#!/usr/bin/env bash
# Makes .venv ready to use: `bash tools/setup.sh` to run megachat, `bash tools/setup.sh dev` to work on it, too.
# `bash tools/setup.sh gpu` on a machine without a GPU, such as a cluster's login node, for others that have them.
# Quick when nothing has changed. PYTHON=python3.12 chooses the Python that a new .venv is made with.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv log=.venv/setup.log

extras=()
[[ " $* " == *" dev "* ]] && extras+=(dev)
[[ " $* " == *" gpu "* ]] || nvidia-smi -L >/dev/null 2>&1 && extras+=(gpu)
wanted=$(IFS=,; echo "${extras[*]:-}")
# The folder is part of it: a moved .venv still names its old place in every script it holds.
stamp() { { cat pyproject.toml tools/constraints.txt tools/setup.sh; echo "$PWD $1"; } | cksum; }
for set in "$wanted" "dev${wanted:+,$wanted}"; do      # one made for development serves the user as well
    [[ -f $venv/ready && $(<"$venv/ready") == "$(stamp "$set")" ]] && "$venv/bin/python" -c '' 2>/dev/null && exit 0
done

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }
has_venv() { "$1" -c 'import venv, ensurepip' >/dev/null 2>&1; }
candidates=(python3 python3.12 python3.11 python3.13)
[[ ${PYTHON:-} ]] && candidates=("$PYTHON")
find_python() {
    local candidate bare=
    for candidate in "${candidates[@]}"; do
        fits "$candidate" || continue
        has_venv "$candidate" && { echo "$candidate"; return; }
        bare=${bare:-$candidate}
    done
    if [[ $bare ]]; then
        version=$("$bare" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        echo "$bare cannot make virtual environments (it lacks ensurepip)." >&2
        echo "On Debian or Ubuntu: sudo apt-get install $version-venv" >&2
    else
        echo "megachat needs Python 3.11, 3.12 or 3.13, and found none of them among: ${candidates[*]}." >&2
        echo "On Debian 12 or Ubuntu 24.04: sudo apt-get install python3 python3-venv. Elsewhere: uv python install 3.12, or python.org." >&2
    fi
    return 1
}

if [[ ! -f $venv/path || $(<"$venv/path") != "$PWD" ]] || ! fits "$venv/bin/python"; then
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
    pwd > "$venv/path"
fi

install() {  # pip in full goes to the log; the terminal gets one line per package
    # --no-compile: byte code comes with the first import, and for what is imported only: half the time.
    if ! DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --no-input --no-compile \
            -c tools/constraints.txt "$@" 2>&1 | tee -a "$log" | sed -un 's/^Collecting \([^ ]*\).*/  \1/p'; then
        echo "Installing failed. The end of $log:" >&2
        tail -n 15 "$log" >&2
        exit 1
    fi
}

echo "Installing into $venv: some minutes and gigabytes the first time (all of pip's words are in $log)"
# Without an NVIDIA GPU, PyPI's torch for Linux would bring gigabytes of CUDA for nothing.
cpu=https://download.pytorch.org/whl/cpu
if [[ $wanted != *gpu* && $(uname -s) == Linux ]] &&
        "$venv/bin/python" -c "import urllib.request as r; r.urlopen('$cpu/', timeout=3)" 2>/dev/null; then
    install torch --extra-index-url "$cpu"
fi
if [[ $wanted == *gpu* ]] && "$venv/bin/python" -c "import sys, torch; sys.exit(torch.version.cuda is not None)" 2>/dev/null
then
    "$venv/bin/python" -m pip uninstall --quiet --yes torch   # a build for the CPU, which pip would let stay
fi
install --editable ".${wanted:+[$wanted]}"
stamp "$wanted" > "$venv/ready"
