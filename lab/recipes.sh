#!/usr/bin/env bash
# The paper's settings for one GPU: Bradley-Terry, GRM and ICRM, then the benchmarks.
# Models and data are downloaded.
#
#     bash lab/recipes.sh unified40k | unified400k | skywork | math SOLUTIONS.jsonl
#     BASE=Qwen/Qwen3-0.6B bash lab/recipes.sh skywork
#
# Every command trains from scratch. A finished run that was there before is kept in
# OUT_DIR/previous. The paper starts from larger models, such as Llama-3-8B. The default
# BASE fits into 80 GB with float32 weights. SOLUTIONS is example_model_solutions.jsonl
# of github.com/openai/grade-school-math.
set -euo pipefail
cd "$(dirname "$0")/.."
BASE=${BASE:-Qwen/Qwen2.5-1.5B-Instruct}
setting=${1:?name a setting: unified40k, unified400k, skywork or math}

generator="--steps=2000 --batch_size=16 --learning_rate=1e-5"
train="--batch_size=32 --learning_rate=1e-5 --gradient_checkpointing=True"
train="$train --log_interval=50 --eval_interval=500"
case $setting in
  unified40k)
    python data/prepare.py --name=unified40k --source=unified_feedback \
      --tokenizer="$BASE"
    train="$train --steps=1250" ;;
  unified400k)
    python data/prepare.py --name=unified400k --source=unified_feedback --subsample=2 \
      --tokenizer="$BASE"
    train="$train --steps=12500" ;;
  skywork)
    python data/prepare.py --name=skywork --source=skywork --tokenizer="$BASE" \
      --block_size=2048
    train="$train --steps=2400" ;;
  math) # labelled responses. The generator is the pretrained model, unchanged
    python data/prepare.py --name=math --source=gsm8k --tokenizer="$BASE" \
      --input="${2:?name the file of solutions}"
    generator="--steps=0 --temperature=0.7 --top_p=0.8"
    train="$train --steps=400" ;;
  *)
    echo "unknown setting $setting" >&2
    exit 2 ;;
esac
python data/prepare.py --source=rewardbench
python data/prepare.py --source=rm_bench

python generator.py --dataset="$setting" --init_from="$BASE" $generator
python train.py --dataset="$setting" $train --regularizer=none --lm_weight=0 \
  --out_dir="out/$setting-bt"
python train.py --dataset="$setting" $train --regularizer=none \
  --out_dir="out/$setting-grm"
python train.py --dataset="$setting" $train --regularizer=icrm --reg_weight=0.1 \
  --out_dir="out/$setting-icrm"

for name in bt grm icrm; do
  for benchmark in rewardbench rm_bench; do
    python evaluate.py --checkpoint="out/$setting-$name" --wrap_as_chat=True \
      --data="data/$benchmark/test.jsonl" --json="out/$setting-$name/$benchmark.json"
  done
done
python evaluate.py --compare="out/$setting-bt,out/$setting-grm,out/$setting-icrm"
