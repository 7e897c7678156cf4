#!/usr/bin/env bash
# The table "What the regularizer buys" of the README: icrm against none on the toy world.
# worlds: ten draws of the world, each with its own data, generator and seed. seeds: one draw, ten training seeds.
# From the repository's root: bash runs/toy_seeds.sh [seeds to run].
# 60 runs of about 15 s on two CPU cores and eleven generators of about 20 s; finished runs are only evaluated.
set -euo pipefail
seeds=${1:-0 1 2 3 4 5 6 7 8 9}
run() { # name, regularizer, reg_weight, then the dataset and the seed
  python train.py --regularizer="$2" --reg_weight="$3" --dataset="$4" --seed="$5" --out_dir="out/$6/$1-$5"
}
for seed in $seeds; do
  [ -e "data/toy-$seed/dataset.json" ] || python data/toy/prepare.py --name="toy-$seed" --seed="$seed"
  for arm in "none none 0.5" "icrm0.1 icrm 0.1" "icrm0.5 icrm 0.5"; do
    run $arm "toy-$seed" "$seed" worlds
    run $arm toy "$seed" seeds
  done
done
for study in worlds seeds; do
  python evaluate.py --compare="$(printf "%s\n" out/$study/none-* out/$study/icrm0.1-* out/$study/icrm0.5-* | paste -sd,)" --json="runs/toy_$study.json"
done
