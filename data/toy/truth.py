"""How near a reward model's prefixes are to the toy world's exact values."""
from functools import lru_cache

import numpy as np

from benchmarks import sigmoid
from config import UserError


def exact_traces(world, rows, tokenizer):
    """World.trace of each row's response."""
    encode = lru_cache(maxsize=None)(tokenizer.encode)
    traces = [world.trace(row.response.tolist(), encode, tokenizer.end_of_text) for row in rows]
    if [len(trace) for trace in traces] != [len(row.response) for row in rows]:
        raise UserError("a response that this toy world cannot write; prepare the dataset again")
    return traces


def compare_with_truth(world, rows, rewards, tokenizer):
    """z = sigma(r - mean reward of all prefixes) of every response prefix against its exact value V.

    correlation: Pearson's, over all prefixes. calibration_error: mean |z - V| over ten equal bins of z (value_bins).
    credit_leak: mean |r_t - r_t-1| on the first token of a remark, over the same for evidence;
    0 where no credit goes to what was predictable.
    """
    values, steps = [], {"remark": [], "evidence": []}
    for trace, r in zip(exact_traces(world, rows, tokenizer), rewards):
        values += [value for _, value, _, _ in trace]
        for t, (_, _, kind, first) in enumerate(trace):
            if first and kind in steps:
                steps[kind].append(abs(r[t] - r[t - 1]))
    r, V = np.concatenate(rewards), np.array(values)
    z = sigmoid(r - r.mean())       # Eq. 4 with the whole split as the opponent
    bins = np.minimum((z * 10).astype(int), 9)
    rows = [{"z": float(z[bins == b].mean()), "value": float(V[bins == b].mean()), "share": float((bins == b).mean())}
            for b in np.unique(bins)]
    return {"correlation": float(np.corrcoef(z, V)[0, 1]), "value_bins": rows,
            "calibration_error": float(sum(row["share"] * abs(row["z"] - row["value"]) for row in rows)),
            "credit_leak": float(np.mean(steps["remark"]) / np.mean(steps["evidence"]))}
