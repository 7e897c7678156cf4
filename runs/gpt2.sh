#!/usr/bin/env bash
# GPT-2 on real preferences, on one GPU with a network: a generator, then plain Bradley-Terry, GRM and ICRM, then the benchmarks.
#     bash runs/gpt2.sh unified_feedback      the paper's 40K setting; also: unified_400k, skywork, hh_rlhf
#     INIT=gpt2-medium SEEDS="0 1 2" EXTRA="--accumulate=4 --recompute=True" bash runs/gpt2.sh skywork      less memory
# Needs `pip install datasets` for the downloads. One epoch each; a killed recipe goes on where it was.
# lambda is the paper's 0.1. Settings were not tuned at this size: choose them on val, never on the benchmarks.
set -euo pipefail
dataset=${1:-unified_feedback} init=${INIT:-gpt2} seeds=${SEEDS:-0} pairs=64; name=$(basename "$init")
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
common="--dataset=$dataset --init_from=$init --block_size=1024 --compile=True --batch_size=$pairs --warmup=50
  --learning_rate=2e-5 --weight_decay=0.01 --steps=$steps --eval_interval=200 --save_interval=200
  --generator=out/$dataset-$name-generator"
python generator.py --dataset="$dataset" --init_from="$init" --block_size=1024 --batch_size="$pairs" --learning_rate=2e-5 --warmup=50 \
  --steps="$steps" --out_dir="out/$dataset-$name-generator"
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
