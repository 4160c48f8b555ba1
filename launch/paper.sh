#!/usr/bin/env bash
# The paper's comparison: pre-train GPT-2 345M at a global batch of 4,096 by ALTO, LAMB, AdamW and
# Adam, one after the other, from the same seed on the same text; then make a page of them.
#
#     launch/paper.sh TEXT ARGUMENTS...
#
# TEXT is a .jsonl file with "text" in each line: webtext.train.jsonl of
# https://github.com/openai/gpt-2-output-dataset. ARGUMENTS go to alto_ds.pretrain, besides those
# given here. It prints the plan before it trains; the same command goes on where it was stopped.
# Variables and their defaults:
#
#     LAUNCH         what starts a run: launch/torchrun.sh, on this machine's GPUs; for more nodes
#                    "launch/hostfile.sh HOSTFILE", launch/mpirun.sh with MPIRUN_OPTIONS, or
#                    "sbatch --wait --nodes 8 launch/slurm.sbatch"
#     NODES, GPUS_PER_NODE, GPU    1, 8, h100: what is planned for
#     OPTIMIZERS     "alto lamb adamw adam": each NAME has a CONFIGS/paper_NAME.json
#     SEEDS          1234; "1 2 3" trains each optimizer three times
#     STEPS          those of the configurations; fewer rehearse
#     TOKENIZER      gpt2: hub name or folder; empty trains one on the text
#     OUTPUT_DIR     runs/paper
#     CONFIGS        configs/gpt2-medium
#     MODEL          gpt2-medium
set -euo pipefail

refuse() {
    echo "launch/paper.sh: error: $1" >&2
    exit 2
}

source_of_text="the paper's is webtext.train.jsonl of https://github.com/openai/gpt-2-output-dataset"
if [ $# -eq 0 ]; then refuse "TEXT is missing; name a .jsonl file, $source_of_text"; fi
case $1 in
    *.jsonl) [ -f "$1" ] || refuse "TEXT=$1 is no file; $source_of_text" ;;
    *) refuse "TEXT=$1 must end with .jsonl: a JSON object with \"text\" in each line" ;;
esac
text=$(realpath "$1")
shift
per_node=${GPUS_PER_NODE:-8}
if [ "${NODES:-1}" != 1 ] && [ -z "${LAUNCH:-}" ]; then
    refuse "NODES=$NODES needs LAUNCH; write what starts a run there, such as launch/mpirun.sh"
fi

accelerator=${DS_ACCELERATOR:-}
source "$(dirname "$0")/environment.sh" compare
# The host that starts the runs may have no GPU; each launcher looks at its own.
if [ -z "$accelerator" ]; then unset DS_ACCELERATOR; fi
export TORCHRUN_OPTIONS="${TORCHRUN_OPTIONS:---standalone --nproc_per_node $per_node}"

output=${OUTPUT_DIR:-runs/paper}
configs=${CONFIGS:-configs/gpt2-medium}
model=${MODEL:-gpt2-medium}
read -ra launch <<<"${LAUNCH:-launch/torchrun.sh}"
read -ra optimizers <<<"${OPTIMIZERS:-alto lamb adamw adam}"
read -ra seeds <<<"${SEEDS:-1234}"
for name in "${optimizers[@]}"; do
    file=$configs/paper_$name.json
    [ -f "$file" ] || refuse "OPTIMIZERS names $name, and there is no $file; write it, or leave $name out"
done
tokenizer=()
if [ -n "${TOKENIZER=gpt2}" ]; then tokenizer=(--tokenizer "$TOKENIZER"); fi
planned=() trained=()
if [ -n "${STEPS:-}" ]; then planned=(--steps "$STEPS") trained=(--max_steps "$STEPS"); fi

python -m alto_ds.pretrain.prepare \
    --dataset "$text" "${tokenizer[@]}" --output_prefix "$output/data/text"

echo
echo "== Plan of ${optimizers[0]}, one of $((${#optimizers[@]} * ${#seeds[@]})) runs of this size =="
python -m alto_ds.plan "$configs/paper_${optimizers[0]}.json" --model "$model" \
    --gpu "${GPU:-h100}" --nodes "${NODES:-1}" --gpus-per-node "$per_node" "${planned[@]}"
if [ -t 0 ]; then read -rp "Press Enter to train, Ctrl-C to stop here. "; fi

runs=()
for seed in "${seeds[@]}"; do
    for name in "${optimizers[@]}"; do
        run=$output/$name-seed$seed
        runs+=("$run")
        echo
        echo "== $run =="
        status=0
        # slurm.sbatch takes the folder from OUTPUT_DIR.
        OUTPUT_DIR=$run "${launch[@]}" --deepspeed_config "$configs/paper_$name.json" \
            --model "$model" --data "$output/data/text" --seed "$seed" "${trained[@]}" "$@" \
            --output_dir "$run" || status=$?
        if [ "$status" -ne 0 ]; then
            echo "launch/paper.sh: $run has ended with status $status. The same command goes on" \
                "from its last checkpoint; OPTIMIZERS without $name leaves it out." >&2
            exit "$status"
        fi
    done
done

python -m alto_ds.report "${runs[@]}" --output_dir "$output/page"
