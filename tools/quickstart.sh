#!/usr/bin/env bash
# From nothing to a chat model on this machine: sets up what is missing, then runs every stage.
# Arguments are settings of the pipeline: `bash tools/quickstart.sh run=runs/second seed=1`.
# Finished stages are skipped, an interrupted one resumes: run it again after Ctrl-C or a crash.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
unset PYTHONDONTWRITEBYTECODE  # many containers set it: then every stage compiles torch's sources anew, 10 s each
exec .venv/bin/megachat pipeline experiment=quickstart "$@"
