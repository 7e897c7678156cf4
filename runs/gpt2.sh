#!/usr/bin/env bash
# GPT-2 on real preferences, on one GPU with a network: a generator, then plain Bradley-Terry, GRM and ICRM, then the benchmarks.
#     bash runs/gpt2.sh unified_feedback      the paper's 40K setting; also: unified_400k, skywork, hh_rlhf
#     INIT=gpt2-medium SEEDS="0 1 2" EXTRA="--accumulate=4" bash runs/gpt2.sh skywork
# Needs `pip install datasets` for the downloads. One epoch each; a killed recipe goes on where it was.
# lambda is the paper's 0.1. Settings were not tuned at this size: choose them on val, never on the benchmarks.
#
# What to expect, computed and not yet seen on a GPU. One epoch of one arm, without recomputing, at 0.3 of a card's peak in
# bf16 (24 GB: 165 TFLOP/s, 80 GB: 312), for pairs of 242 tokens (HH-RLHF's) to 1,000 tokens, at 0.14 to 0.64 TFLOP a pair:
#                      pairs     24 GB            80 GB
#   hh_rlhf            38,000    2 min            1 min
#   unified_feedback   40,000    2 to 9 min       1 to 5 min
#   skywork            77,000    4 to 17 min      2 to 9 min
#   unified_400k      400,000    18 to 87 min     10 to 46 min
# The whole recipe is about 4.5 such arms and the benchmarks; recomputing adds up to a third; gpt2-medium takes 3.2 times as long.
# Memory: 3 GiB and 0.15 MiB for each of a batch's tokens, 13 GiB for 64 pairs of 1,000; without recomputing (RECOMPUTE=False)
# 0.43 MiB each, 30 GiB for the same, 10 GiB at HH-RLHF's lengths. (Measured in bf16 at 4,000 and 8,800 tokens, on a CPU.)
set -euo pipefail
export PYTORCH_ALLOC_CONF=expandable_segments:True      # every batch has shapes of its own
dataset=${1:-unified_feedback} init=${INIT:-gpt2} seeds=${SEEDS:-0} recompute=${RECOMPUTE:-True} pairs=64; name=$(basename "$init")
case $dataset in
  unified_400k) prepare="data/unified_feedback/prepare.py --name=unified_400k --every=2" ;;
  unified_feedback | skywork | hh_rlhf) prepare="data/$dataset/prepare.py" ;;
  *) echo "no recipe for $dataset; choose unified_feedback, unified_400k, skywork or hh_rlhf" >&2; exit 2 ;;
esac
[ -e "data/$dataset/dataset.json" ] || python $prepare
for benchmark in rewardbench rm_bench; do
  [ -e "data/$benchmark/test.jsonl" ] || python "data/$benchmark/prepare.py"
done
steps=$(($(wc -l < "data/$dataset/train.jsonl") / pairs + 1))
common="--dataset=$dataset --init_from=$init --block_size=1024 --compile=True --recompute=$recompute --batch_size=$pairs --warmup=50
  --learning_rate=2e-5 --weight_decay=0.01 --steps=$steps --eval_interval=1000 --save_interval=200
  --generator=out/$dataset-$name-generator"
python generator.py --dataset="$dataset" --init_from="$init" --block_size=1024 --batch_size="$pairs" --learning_rate=2e-5 --warmup=50 \
  --recompute="$recompute" --steps="$steps" --out_dir="out/$dataset-$name-generator"
runs=""
for seed in $seeds; do
  for arm in bt grm icrm; do
    case $arm in
      bt) objective="--regularizer=none --lm_weight=0" ;;
      grm) objective="--regularizer=none" ;;
      icrm) objective="--regularizer=icrm --reg_weight=0.1" ;;
    esac
    folder="out/$dataset-$name-$arm-seed$seed" runs="$runs,out/$dataset-$name-$arm-seed$seed"
    python train.py $common ${EXTRA:-} $objective --seed="$seed" --out_dir="$folder"
    for benchmark in rewardbench rm_bench; do
      python evaluate.py --checkpoint="$folder" --data="data/$benchmark/test.jsonl" --as_dialogue=True --json="$folder/$benchmark.json" \
        --examples="$folder/$benchmark.jsonl"
    done
  done
done
python evaluate.py --compare="${runs#,}"
