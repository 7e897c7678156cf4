"""Evaluations beyond the splits of pairs, run by evaluate.py.

evaluate_file.py  a file of pairs (`evaluate.py --data=FILE`)
rewardbench.py    the section scores of RewardBench
rm_bench.py       the scores of RM-Bench, by the styles of the texts
first_error.py    the first wrong step of a solution (`evaluate.py --steps=FILE`)
labels.py         responses that are labelled correct or incorrect
"""
