"""Intra-trajectory consistency: the derivation, the paper's loss and the controls.

    python regularizer.py       checks the four statements below numerically

Read the reward of a prefix as the probability that the finished response is good. The
law of total probability (the paper's Eq. 3) relates it to the rewards one token later:

    r(y_1:t) = sum over next tokens y' of P(y' | x, y_1:t) r(y_1:t, y')

1. The gap bound. Let p_t be the probability of the observed next token. Take that token
out of the sum:

    r_t           = p_t r_{t+1} + (1 - p_t) E[r | a token other than the observed one]
    r_t - r_{t+1} = (1 - p_t) (E[r | a token other than the observed one] - r_{t+1})
    |r_t - r_{t+1}| <= 1 - p_t      for rewards in [0, 1]

So a predictable token cannot change the reward much. Eq. 3 says nothing about the
direction of the change. The paper's loss (`icrm`) is motivated by the bound, but it
does not follow from it.

2. What the loss is. It is a mean over transitions t (from response token t to t+1) of

    2 p_t l_t = - p_t { sg[z_{t+1}] log z_t + sg[z_t] log z_{t+1} }

where z_t is the predicted probability of the response's own label, good if chosen and
bad if rejected, after token t (Eq. 4), and sg stops the gradient. Collect the
coefficient of each log z_t, with n transitions:

    L_reg S = (1/n) sum over tokens of w_t (-log z_t)
    w_t     = sg[p_{t-1} z_{t-1} + p_t z_{t+1}]

S is a running mean of (sum of w_t) / n. So `icrm` trains every token on the label of
its response. The normalized weights w_t / S average about 1. They are larger where
token t and the next one are predictable and the neighbouring prefixes are already
classified correctly. `dense_bt` is the same loss with equal weights.

3. It is close to the mean absolute error. Where p is 1 and the values before and after
token t are equal to z_t, the weight w_t is 2 sg[z_t], and sg[z] (-log z) has the
gradient of 1 - z. So the gradient of `icrm` is that of `dense_mae`, the absolute error
between every z_t and its label 1 (times 2, and times 1 at both ends of a response).
This error is symmetric: the errors under both labels add up to 1. So the minimiser of
its expectation does not change if a share e < 1/2 of all labels is flipped at random
(arXiv 1712.09482). That of `dense_bt` does.

4. Where its gradient is zero. Let every prefix h have one free reward, s = sigma(r),
and let data be unlimited. Let C(h) be the probability that a training response that
begins with h is a chosen one. Sum -w log s over the tokens of chosen responses and -w
log (1 - s) over those of rejected ones, where w has no gradient. The gradient is zero
where

    s / (1 - s) = C E[w | h, chosen] / ((1 - C) E[w | h, rejected])

A weight that depends on the prefix alone cancels, so `dense_bt` finds s = C. The
weights of `icrm` contain the neighbours' s in chosen responses and 1 - s in rejected
ones. They do not cancel, and push s towards 0 or 1: `icrm` is overconfident. The
minimiser of the absolute error is the majority label. (This leaves out Eq. 4's mean
over the other response, L_BT and L_SFT.)

A regularizer is a function f(rewards, probs, mask) -> (penalty, scale):

    rewards  (2B, T) prefix rewards: B chosen responses, then the B rejected ones
    probs    (2B, T-1) p_t: probability of response token t+1 given all before it
    mask     (2B, T) True on response tokens. If an example has a single labelled
             response, the row of the other one is all False
    penalty  () the training loop divides it by a running mean of scale
    scale    () or None: then the penalty is used as it is

To add your own, write such a function and list it in REGULARIZERS. The comments
`# task N` and `# end` enclose solutions of the course (exercises/README.md).
"""

import torch
import torch.nn.functional as F

GAP_BOUND_WEIGHT = 128.0  # weight of the bound in icrm_gap_bound
TD_LAMBDA = 0.9  # how far td_lambda looks ahead


# Values and transitions ---------------------------------------------------------------


def masked_mean(x, mask, dim=None):
    """Mean of the entries of x where mask is True, or 0 if there are none.

    Other entries may be NaN.
    x, mask: the same shape. dim: the dimension to average over (None: all)
    """
    # task 1
    total = torch.where(mask, x, 0.0).sum(dim)
    return total / mask.sum(dim).clamp(min=1)
    # end


def value_logits(rewards, mask):
    """The logit of z_t, the predicted probability of the response's label (Eq. 4).

    chosen    z_t =     sigma(r_t - sg[mean reward over the rejected response])
    rejected  z_t = 1 - sigma(r_t - sg[mean reward over the chosen response])
    (2B, T), (2B, T) -> (2B, T), finite on padding
    """
    # task 2
    rewards = torch.where(mask, rewards, 0.0)
    means = masked_mean(rewards, mask, dim=1).detach()[:, None]  # (2B, 1)
    chosen_rewards, rejected_rewards = rewards.chunk(2)  # (B, T) each
    chosen_means, rejected_means = means.chunk(2)  # (B, 1) each
    chosen_logits = chosen_rewards - rejected_means
    rejected_logits = chosen_means - rejected_rewards  # 1 - sigma(x) = sigma(-x)
    return torch.cat([chosen_logits, rejected_logits])  # (2B, T)
    # end


def transition_mask(mask):
    """True where tokens t and t+1 are both in the response. (2B, T) -> (2B, T-1)"""
    # task 1
    return mask[:, :-1] & mask[:, 1:]
    # end


def masked_transitions(probs, mask):
    """p, set to 0 outside the responses, and the transition mask. (2B, T-1) each"""
    transitions = transition_mask(mask)
    return torch.where(transitions, probs, 0.0), transitions


def last_tokens(mask):
    """True at the last token of each response. (2B, T) -> (2B, T)"""
    next_is_token = F.pad(mask[:, 1:], (0, 1))
    return mask & ~next_is_token


# The paper's loss ---------------------------------------------------------------------


def icrm(rewards, probs, mask):
    """The paper's L_reg: cross-entropy between neighbouring values, weighted by p.

    l_t     = -1/2 { sg[z_{t+1}] log z_t + sg[z_t] log z_{t+1} }
    penalty = mean over transitions of 2 p_t l_t
    scale   = mean over transitions of 2 p_t (z_t + z_{t+1}) / 2
    """
    # task 3
    p, transitions = masked_transitions(probs, mask)  # (2B, T-1)
    log_z = F.logsigmoid(value_logits(rewards, mask))  # (2B, T)
    z = log_z.detach().exp()
    before, after = log_z[:, :-1], log_z[:, 1:]  # (2B, T-1)
    z_before, z_after = z[:, :-1], z[:, 1:]
    l = -0.5 * (z_after * before + z_before * after)
    penalty = masked_mean(2 * p * l, transitions)
    scale = masked_mean(2 * p * (z_before + z_after) / 2, transitions)
    return penalty, scale
    # end


def label_weights(rewards, probs, mask):
    """w_t = sg[p_{t-1} z_{t-1} + p_t z_{t+1}], the weights in `icrm`. -> (2B, T)"""
    # task 3
    p, _ = masked_transitions(probs, mask)
    z = torch.sigmoid(value_logits(rewards, mask)).detach()
    from_previous = F.pad(p * z[:, :-1], (1, 0))  # (2B, T)
    from_next = F.pad(p * z[:, 1:], (0, 1))
    return from_previous + from_next
    # end


def icrm_by_token(rewards, probs, mask):
    """`icrm` as a sum over tokens (proof 2), to compare with the sum over transitions.

    Returns (1/n) sum_t w_t (-log z_t) and (1/n) sum_t w_t.
    """
    weights = label_weights(rewards, probs, mask)
    n_transitions = transition_mask(mask).sum().clamp(min=1)
    log_z = F.logsigmoid(value_logits(rewards, mask))
    return -(weights * log_z).sum() / n_transitions, weights.sum() / n_transitions


# Controls -----------------------------------------------------------------------------


def none(rewards, probs, mask):
    """No regularizer: the GRM or Bradley-Terry baseline."""
    return 0.0 * torch.where(mask, rewards, 0.0).sum(), None


def dense_bt(rewards, probs, mask):
    """Train every token on its response's label with equal weights: -log z_t."""
    return masked_mean(-F.logsigmoid(value_logits(rewards, mask)), mask), None


def dense_mae(rewards, probs, mask):
    """The mean absolute error between z and the label at every token: 1 - z_t."""
    z = torch.sigmoid(value_logits(rewards, mask))
    return masked_mean(1 - z, mask), masked_mean(z.detach(), mask)


def response_mae(rewards, probs, mask):
    """The mean absolute error of complete responses: 1 - sigma(margin)."""
    final_rewards = torch.where(last_tokens(mask), rewards, 0.0).sum(1)  # (2B,)
    chosen, rejected = final_rewards.chunk(2)  # (B,) each
    is_preferred = torch.sigmoid(chosen - rejected)
    return (1 - is_preferred).mean(), is_preferred.detach().mean()


def squared_gap(rewards, probs, mask):
    """Consistency without a stop-gradient: p_t (z_t - z_{t+1})^2."""
    p, transitions = masked_transitions(probs, mask)
    z = torch.sigmoid(value_logits(rewards, mask))
    return masked_mean(p * (z[:, 1:] - z[:, :-1]) ** 2, transitions), None


def gap_bound(rewards, probs, mask):
    """Penalize too large gaps: max(0, |z_t - z_{t+1}| - (1 - p_t))^2 (proof 1)."""
    # task 4
    p, transitions = masked_transitions(probs, mask)
    z = torch.sigmoid(value_logits(rewards, mask))
    gap = (z[:, 1:] - z[:, :-1]).abs()
    excess = F.relu(gap - (1 - p))
    return masked_mean(excess**2, transitions), None
    # end


def icrm_gap_bound(rewards, probs, mask):
    """`icrm` + GAP_BOUND_WEIGHT * `gap_bound`. The scale of `icrm` divides both."""
    penalty, scale = icrm(rewards, probs, mask)
    bound, _ = gap_bound(rewards, probs, mask)
    return penalty + GAP_BOUND_WEIGHT * bound, scale


def reward_smoothness(rewards, probs, mask):
    """Penalize reward changes at predictable tokens: p_t (r_{t+1} - r_t)^2."""
    # task 7
    p, transitions = masked_transitions(probs, mask)
    rewards = torch.where(mask, rewards, 0.0)
    changes = rewards[:, 1:] - rewards[:, :-1]
    return masked_mean(p * changes**2, transitions), None
    # end


def td_lambda(rewards, probs, mask):
    """Cross-entropy between z_t and a lambda-return (TC-lambda, arXiv 2505.16548).

    G_last = 1, the label. It is 1 for rejected responses too, because Eq. 4 flips z
    G_t = (1 - lambda) z_{t+1} + lambda G_{t+1}
    penalty = mean over tokens of -{ sg[G_t] log z_t + (1 - sg[G_t]) log(1 - z_t) }
    """
    logits = value_logits(rewards, mask)
    z = torch.sigmoid(logits).detach()
    targets = torch.ones_like(z)  # G: 1 at each response's last token
    for t in reversed(range(z.size(1) - 1)):
        mixture = (1 - TD_LAMBDA) * z[:, t + 1] + TD_LAMBDA * targets[:, t + 1]
        targets[:, t] = torch.where(mask[:, t + 1], mixture, 1.0)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return masked_mean(loss, mask), None


REGULARIZERS = {
    "none": none,
    "icrm": icrm,
    "dense_bt": dense_bt,
    "dense_mae": dense_mae,
    "response_mae": response_mae,
    "squared_gap": squared_gap,
    "gap_bound": gap_bound,
    "icrm_gap_bound": icrm_gap_bound,
    "reward_smoothness": reward_smoothness,
    "td_lambda": td_lambda,
}


# Demonstrations -----------------------------------------------------------------------


def enumerated_world(depth=5, vocabulary=3, seed=0):
    """A random world small enough to enumerate.

    With a vocabulary of K tokens, returns for each depth m the next token's
    probabilities (K^m, K) and the exact reward of every prefix (K^m,). Rewards are
    computed from the complete responses backwards.
    """
    rng = torch.Generator().manual_seed(seed)
    probs = []
    for m in range(depth):
        logits = torch.randn(vocabulary**m, vocabulary, generator=rng)
        probs.append((3 * logits.double()).softmax(1))
    is_good = torch.rand(vocabulary**depth, generator=rng) < 0.5
    rewards = [is_good.double()]
    for p in reversed(probs):
        next_rewards = rewards[0].view(-1, vocabulary)
        rewards.insert(0, (p * next_rewards).sum(-1))  # Eq. 3
    return probs, rewards


def prefix_probabilities(probs):
    """The probability of every prefix, for each depth. -> [(1,), (K,), (K^2,), ...]"""
    prefixes = [torch.ones(1).double()]
    for p in probs:
        prefixes.append((prefixes[-1][:, None] * p).flatten())
    return prefixes


def expected_icrm(rewards, probs, shares):
    """The expectation of `icrm` (not divided) for unlimited data, without Eq. 4's mean.

    rewards: a free reward of every prefix, a list as from enumerated_world
    shares: C, the share of chosen responses among those that begin with the prefix
    """
    prefixes, loss = prefix_probabilities(probs), 0.0
    for m in range(1, len(probs)):
        p = probs[m]  # (K^m, K)
        before = rewards[m][:, None].expand_as(p)
        after = rewards[m + 1].view_as(p)
        s_before, s_after = before.sigmoid().detach(), after.sigmoid().detach()
        chosen = s_after * F.logsigmoid(before) + s_before * F.logsigmoid(after)
        rejected = (1 - s_after) * F.logsigmoid(-before)
        rejected = rejected + (1 - s_before) * F.logsigmoid(-after)
        C = shares[m + 1].view_as(p)
        mean_log = C * chosen + (1 - C) * rejected
        loss = loss - (prefixes[m + 1].view_as(p) * p * mean_log).sum()
    return loss


def expected_weights(values, probs, shares, m):
    """E[w | h, chosen] and E[w | h, rejected] of the prefixes of depth m in `icrm`.

    values: s of every prefix. -> two tensors (K^m,)
    """
    C = shares[m]
    chosen, rejected = torch.zeros_like(C), torch.zeros_like(C)
    if m > 1:  # the token before
        p = probs[m - 1].flatten()
        before = values[m - 1].repeat_interleave(probs[m - 1].size(1))
        chosen, rejected = p * before, p * (1 - before)
    if m < len(probs):  # the token after
        p = probs[m]
        after, next_C = values[m + 1].view_as(p), shares[m + 1].view_as(p)
        chosen = chosen + (p * next_C * p * after).sum(1) / C
        rejected = rejected + (p * (1 - next_C) * p * (1 - after)).sum(1) / (1 - C)
    return chosen, rejected


def icrm_rest_point(probs, shares, iterations=1000):
    """The values s at which the gradient of expected_icrm is zero (statement 4)."""
    values = list(shares)
    for _ in range(iterations):
        new_values = [values[0]]
        for m in range(1, len(values)):
            chosen, rejected = expected_weights(values, probs, shares, m)
            odds = shares[m] * chosen / ((1 - shares[m]) * rejected)
            new_values.append(odds / (1 + odds))
        values = new_values
    return values


def show_gap_bound():
    probs, rewards = enumerated_world()
    print(
        "1. The gap bound in a world of 3 tokens and 5 steps, every prefix enumerated."
    )
    print("   identity error: largest deviation from the equation of proof 1\n")
    print("   step  transitions  max |gap|  max |gap| / (1 - p)  identity error")
    for m, p in enumerate(probs):
        before = rewards[m][:, None]  # (K^m, 1)
        after = rewards[m + 1].view_as(p)  # (K^m, K)
        weighted = p * after
        mean_of_others = (weighted.sum(1, keepdim=True) - weighted) / (1 - p)
        error = (before - after - (1 - p) * (mean_of_others - after)).abs().max()
        gap = (before - after).abs()
        ratio = (gap / (1 - p)).max()
        print(f"{m:7d}{p.numel():13d}{gap.max():11.4f}{ratio:21.4f}{error:16.0e}")


def show_response():
    words = "The soup was cold , as usual , but the staff were lovely .".split()
    p = torch.tensor(
        [[0.02, 0.9, 0.03, 0.5, 0.3, 0.9, 0.8, 0.1, 0.7, 0.05, 0.9, 0.04, 0.8]]
    ).double()
    r = torch.tensor(
        [0.1, 0.1, 0.2, -0.9, -0.8, -1.3, -0.6, -0.7, -0.1, -0.2, 0.2, 0.1, 1.0, 0.9]
    ).double()
    rewards = torch.stack([r, torch.zeros_like(r)]).requires_grad_()
    # The pair has no rejected response, so z = sigma(r).
    mask = torch.tensor([[True], [False]]).expand(2, len(r))
    arguments = rewards, p.expand(2, -1), mask
    by_transition, scale = icrm(*arguments)
    by_token, mean_weight = icrm_by_token(*arguments)
    weights = label_weights(*arguments)[0]
    gradient = torch.autograd.grad(by_transition, rewards)[0][0]
    print("\n2. A chosen response under `icrm`: every token is trained on the label.")
    print("   p: probability of the token.  w: weight of -log z")
    print("   gradient: of the loss w.r.t. the reward (negative: a step raises it)\n")
    print("   token       p     z  w / mean w  gradient")
    for t, word in enumerate(words):
        p_of_token = f"{p[0, t - 1]:.2f}" if t > 0 else ""
        relative_weight = weights[t] / weights.mean()
        print(
            f"   {word:7s}{p_of_token:>6s}{torch.sigmoid(r[t]):6.2f}"
            f"{relative_weight:12.2f}{gradient[t]:10.4f}"
        )
    print(f"\n   sum over transitions {by_transition:.9f}, over tokens {by_token:.9f}")
    print(f"   scale {scale:.9f}, mean weight {mean_weight:.9f}")


def show_absolute_error():
    rewards = torch.full((2, 6), 0.7).double().requires_grad_()
    mask, p = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 5).double()
    gradients = []
    for regularizer in (icrm, dense_mae):
        penalty, _ = regularizer(rewards, p, mask)
        gradients.append(torch.autograd.grad(penalty, rewards)[0][0])
    # Multiplied by the numbers over which the two are averaged.
    ratio = (5 * gradients[0]) / (6 * gradients[1])
    print("\n3. Gradient of `icrm` / gradient of `dense_mae`, all rewards equal, p = 1")
    print("   token 1 to 6: " + "  ".join(f"{value:.4f}" for value in ratio))
    values = torch.linspace(0.01, 0.99, 99).double()
    print("   The value with the smallest expected loss, if 70% of labels are good:")
    print("   wrong labels   dense_bt  dense_mae")
    for noise in (0.0, 0.2):
        C = noise + (1 - 2 * noise) * 0.7
        cross_entropy = -C * values.log() - (1 - C) * (1 - values).log()
        absolute_error = C * (1 - values) + (1 - C) * values
        best = [values[loss.argmin()] for loss in (cross_entropy, absolute_error)]
        print(f"   {noise:12.0%}{best[0]:11.2f}{best[1]:11.2f}")


def show_rest_point():
    probs, exact = enumerated_world()
    shares = [0.2 + (1 - 2 * 0.2) * V for V in exact]  # C with 20% wrong labels
    values = icrm_rest_point(probs, shares)
    rewards = [s.logit().requires_grad_() for s in values]
    gradients = torch.autograd.grad(expected_icrm(rewards, probs, shares), rewards[1:])
    weights = torch.cat(prefix_probabilities(probs)[1:])
    largest = (torch.cat(gradients) / weights).abs().max()
    C = torch.cat(shares[1:])
    print("\n4. Values at which the gradient is zero, every prefix enumerated")
    print(
        "   uncertainty: mean min(s, 1 - s).  right side: s and C on one side of 1/2\n"
    )
    print("   loss         mean |s - C|  uncertainty  right side")
    for name, s in (
        ("dense_bt", C),
        ("icrm", torch.cat(values[1:])),
        ("dense_mae", (C > 0.5).double()),
    ):
        columns = (s - C).abs(), torch.minimum(s, 1 - s), ((s > 0.5) == (C > 0.5))
        means = [(weights * x).sum() / weights.sum() for x in columns]
        print(f"   {name:10s}{means[0]:15.3f}{means[1]:13.3f}{means[2]:12.1%}")
    print(f"\n   largest gradient of icrm there: {largest:.0e}")


if __name__ == "__main__":
    show_gap_bound()
    show_response()
    show_absolute_error()
    show_rest_point()
