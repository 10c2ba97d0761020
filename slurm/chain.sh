#!/bin/bash
# The whole pipeline as jobs that wait for what they read; prints their numbers. In the checkout, on the login node:
#   slurm/chain.sh run=runs/7b                                  settings for all stages,
#   slurm/chain.sh run=runs/7b pretrain.model=gpt_7b            for one of them,
#   STAGES="sft dpo evaluate report" slurm/chain.sh run=runs/7b          and only these: the others are there already
# What sbatch needs to know, for stages that train, those that use one GPU, and those that use none:
#   TRAIN="--partition=gpu --nodes=4" ONE_GPU="--partition=gpu --gpus=1" CPU="--partition=cpu" slurm/chain.sh ...
# When a job fails, those that wait for it are cancelled; the same line again skips what is finished and goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A reads=(
    [tokenizer]=clean [encode]="clean tokenizer" [encode_chat]=tokenizer [pretrain]="tokenizer encode"
    [sft]="encode_chat pretrain" [rm]=sft [ppo]="sft rm" [dpo]=sft [kto]=sft [grpo]="sft rm"
    [evaluate]="pretrain sft rm ppo dpo kto grpo" [report]=evaluate
)
order="clean tokenizer encode encode_chat pretrain sft rm ppo dpo kto grpo evaluate report"
stages=${STAGES:-clean tokenizer encode pretrain sft rm ppo dpo grpo evaluate report}

for stage in $stages; do
    [[ " $order " == *" $stage "* ]] || { echo "chain.sh: no stage $stage; there are $order" >&2; exit 2; }
done
declare -A job
for stage in $order; do
    [[ " $stages " == *" $stage "* ]] || continue
    case $stage in
        pretrain | sft) script=$stage.sh options=${TRAIN:-} ;;
        rm | ppo | dpo | kto | grpo) script=rlhf.sh options=${TRAIN:-} ;;
        evaluate) script=data.sh options=${ONE_GPU:-} ;;
        *) script=data.sh options=${CPU:-} ;;
    esac
    settings=()
    for setting; do                     # sft.epochs=2 is for SFT alone, without its name
        first=${setting%%[.=]*}
        if [[ " $order " != *" $first "* || $setting != "$first".* ]]; then
            settings+=("$setting")
        elif [[ $first == "$stage" ]]; then
            settings+=("${setting#*.}")
        fi
    done
    after=
    for before in ${reads[$stage]:-}; do after+=${job[$before]:+:${job[$before]}}; done
    # shellcheck disable=SC2086 -- options are words
    job[$stage]=$(STAGE=$stage sbatch --parsable --export=ALL --job-name="megachat-$stage" $options \
        ${after:+--dependency=afterok$after --kill-on-invalid-dep=yes} "slurm/$script" "${settings[@]}")
    echo "$stage ${job[$stage]}"
done
