#!/usr/bin/env bash
# Sets up what is missing, then lint, types, tests; the total comes last.
#   bash tools/test.sh                     what runs anywhere
#   bash tools/test.sh --all               also what needs Slurm, a browser, or injected faults
#   bash tools/test.sh --vllm              only what needs vLLM, in an environment of its own that it makes
#   bash tools/test.sh tests/align -k dpo  other arguments go to pytest
# A part that fails does not hide the next one; the exit status says whether everything passed.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh dev
unset PYTHONDONTWRITEBYTECODE  # many containers set it: then every process compiles torch's sources anew, 10 s each

marks=(-m "not slurm and not faults and not browser and not vllm and not gpu and not multigpu")
arguments=()
for argument in "$@"; do
    if [[ $argument == --all ]]; then
        marks=(-m "not vllm") arguments+=(-rs)  # and say what this machine could not run, and why
    elif [[ $argument == --vllm ]]; then
        bash tools/bench/setup.sh vllm
        marks=(-m vllm) arguments+=(-rs)
    else
        arguments+=("$argument")
    fi
done
color=$([[ -t 1 ]] && echo yes || echo no)
log=.venv/pytest.log

failed=()
check() {
    local name=$1 begin=$SECONDS
    shift
    echo "== $name"
    "$@" || failed+=("$name")
    echo "   $((SECONDS - begin)) s"
}
tests() { .venv/bin/python -m pytest --color="$color" "${marks[@]}" "${arguments[@]}" | tee "$log"; }

check "ruff check" .venv/bin/ruff check --quiet --output-format concise .
check "ruff format" .venv/bin/ruff format --check .
check mypy .venv/bin/mypy
check pytest tests

echo
if (( ${#failed[@]} )); then echo "FAILED: ${failed[*]}"; else echo "All checks passed."; fi
total=$(tail -n 1 "$log" | sed 's/\x1b\[[0-9;]*m//g; s/^=* *//; s/ *=*$//')   # pytest's last line, undressed
echo "Total: $total; $SECONDS s with lint and types"
(( ${#failed[@]} == 0 ))
