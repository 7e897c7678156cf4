"""Intra-trajectory consistency: derivation, read-outs and every regularizer. The student's file.

    python regularizer.py       both proofs on examples, and the paper's loss on one response

Read the reward of a prefix as the probability that the response will turn out well. The law of
total probability (the paper's Eq. 3) ties it to the rewards of its continuations,

    r(y_1:m) = sum over next tokens y' of P(y' | x, y_1:m) r(y_1:m, y').

1. The gap bound. Take the token that came, of probability p, out of the sum:

    r_m = p r_m+1 + (1 - p) E[r | another token than the one that came], and so
    r_m - r_m+1 = (1 - p) (E[r | another token] - r_m+1),   |r_m - r_m+1| <= 1 - p  for r in [0, 1].

A predictable token cannot be news. That is all the derivation gives; the paper's loss (`icrm`) is
inspired by it and does not follow from it.

2. What the loss is. It sums 2 p_t l_t = - p_t { sg[z_t+1] log z_t + sg[z_t] log z_t+1 } over links;
collect what stands before each log z_t:

    L_reg S = (1/|links|) sum over tokens of w_t (-log z_t),    w_t = sg[ p_t-1 z_t-1 + p_t z_t+1 ],

and S follows sum w / |links| exactly. So `icrm` is the label at every token (`dense_bt`) by weights
of mean about one that are large where a token's neighbours are predictable and already good.

A regularizer is f(rewards (2B, T), probs (2B, T-1), mask (2B, T)) -> penalty (), scale () or None.
Rows are B chosen responses, then the B rejected ones; columns are response tokens, mask is True on
the first ones of each row (on none where a pair has one side). Link t joins tokens t and t+1, and
probs[:, t] is P(token t+1 | all before it). The training loop divides penalty by a running mean of
scale. To add your own: write such a function and put it into REGULARIZERS.
"""
import torch
import torch.nn.functional as F

READOUTS = ("last", "mean", "sum")
KAPPA = 128.0           # weight of the bound in icrm_gap_bound
TD_LAMBDA = 0.9         # how far td_lambda looks ahead
SEGMENT_P = 0.5         # segment_bt: a token less probable than this begins a segment
SUM_SCALE = 0.1         # c of the read-out `sum`


# From scores of tokens to rewards of prefixes, values and links ----------------------------------

def read_out(scores, mask, kind):
    """The head scores each token, a_t; what is the reward of a prefix?  (2B, T), (2B, T) -> (2B, T)

    last  r_t = a_t                        the paper
    mean  r_t = (1/t) sum_s<=t a_s         Q-RM (arXiv 2505.23363)
    sum   r_t = c sum_s<=t a_s             the reward as a sum of increments, as a martingale's"""
    scores = torch.where(mask, scores, 0.0)
    if kind == "last":
        return scores
    totals = scores.cumsum(1)
    if kind == "sum":
        return SUM_SCALE * totals
    return totals / torch.arange(1, scores.size(1) + 1, device=scores.device)


def masked_mean(x, mask, dim=None):
    """Mean of x where mask is True, 0 where it is nowhere; what is masked out may be NaN."""
    # task 1
    return torch.where(mask, x, 0.0).sum(dim) / mask.sum(dim).clamp(min=1)
    # end


def value_logits(rewards, mask):
    """logit of z_t (Eq. 4): r_t - sg[mean of the opposing response's r], negated on rejected rows,
    where z_t is 1 - sigma(r_t - sg[mean]).  (2B, T), (2B, T) -> (2B, T)"""
    # task 2
    rewards = torch.where(mask, rewards, 0.0)
    means = masked_mean(rewards, mask, dim=1).detach()[:, None]     # (2B, 1)
    B = len(rewards) // 2
    return torch.cat([rewards[:B] - means[B:], means[:B] - rewards[B:]])
    # end


def link_mask(mask):
    """True for the links with both ends inside the response.  (2B, T) -> (2B, T-1)"""
    # task 1
    return mask[:, :-1] & mask[:, 1:]
    # end


def links_of(probs, mask):
    """p, 0 outside the responses, and the mask of every link.  (2B, T-1) each"""
    links = link_mask(mask)
    return torch.where(links, probs, 0.0), links


def last_tokens(mask):
    """True at each response's last token.  (2B, T) -> (2B, T)"""
    return mask & ~F.pad(mask[:, 1:], (0, 1))


# The paper's loss --------------------------------------------------------------------------------

def icrm(rewards, probs, mask):
    """Mutually weighted binary cross-entropy of neighbours, weighted by p (the paper's L_reg).
    l_t = -1/2 { sg[z_t+1] log z_t + sg[z_t] log z_t+1 },  penalty = mean over links of 2 p_t l_t,
    scale = mean over links of 2 p_t (z_t + z_t+1) / 2."""
    # task 3
    p, links = links_of(probs, mask)                                    # (2B, T-1)
    log_z = F.logsigmoid(value_logits(rewards, mask))                   # (2B, T)
    z = log_z.detach().exp()
    l = -0.5 * (z[:, 1:] * log_z[:, :-1] + z[:, :-1] * log_z[:, 1:])    # (2B, T-1)
    penalty = masked_mean(2 * p * l, links)
    scale = masked_mean(2 * p * (z[:, :-1] + z[:, 1:]) / 2, links)
    return penalty, scale
    # end


def label_weights(rewards, probs, mask):
    """w_t = sg[p_t-1 z_t-1 + p_t z_t+1], what `icrm` weighs -log z_t with (proof 2).  -> (2B, T)"""
    # task 3
    p, _ = links_of(probs, mask)
    z = torch.sigmoid(value_logits(rewards, mask)).detach()
    return F.pad(p * z[:, :-1], (1, 0)) + F.pad(p * z[:, 1:], (0, 1))
    # end


def icrm_by_token(rewards, probs, mask):
    """`icrm` regrouped by token: (1/|links|) sum_t w_t (-log z_t), and sum_t w_t / |links|."""
    weights, links = label_weights(rewards, probs, mask), link_mask(mask).sum().clamp(min=1)
    log_z = F.logsigmoid(value_logits(rewards, mask))                   # (2B, T)
    return -(weights * log_z).sum() / links, weights.sum() / links


# Controls and rivals -----------------------------------------------------------------------------

def none(rewards, probs, mask):
    """0: the GRM or Bradley-Terry baseline takes the same path."""
    return 0.0 * torch.where(mask, rewards, 0.0).sum(), None


def dense_bt(rewards, probs, mask, weight=1.0):
    """The label at every token and nothing else: -log z_t, times `weight`."""
    return masked_mean(-weight * F.logsigmoid(value_logits(rewards, mask)), mask), None


def place(mask, dtype):
    """t/T, where a token stands in its response, 1/2 on average.  (2B, T) -> (2B, T)"""
    middles = torch.arange(mask.size(1), dtype=dtype, device=mask.device) + 0.5     # (T,)
    return middles / mask.sum(1, keepdim=True).clamp(min=1)


def dense_bt_early(rewards, probs, mask):
    """`dense_bt` that falls along the response: -2 (1 - t/T) log z_t."""
    return dense_bt(rewards, probs, mask, 2 * (1 - place(mask, rewards.dtype)))


def dense_bt_late(rewards, probs, mask):
    """`dense_bt` that rises along the response: -2 (t/T) log z_t."""
    return dense_bt(rewards, probs, mask, 2 * place(mask, rewards.dtype))


def squared_gap(rewards, probs, mask):
    """The obvious two-sided consistency: p_t (z_t - z_t+1)^2."""
    p, links = links_of(probs, mask)
    z = torch.sigmoid(value_logits(rewards, mask))
    return masked_mean(p * (z[:, 1:] - z[:, :-1]) ** 2, links), None


def gap_bound(rewards, probs, mask):
    """What the derivation implies (proof 1): relu(|z_t - z_t+1| - (1 - p_t))^2."""
    # task 4
    p, links = links_of(probs, mask)
    z = torch.sigmoid(value_logits(rewards, mask))
    return masked_mean(F.relu((z[:, 1:] - z[:, :-1]).abs() - (1 - p)) ** 2, links), None
    # end


def icrm_gap_bound(rewards, probs, mask):
    """2 p_t l_t + kappa relu(|z_t - z_t+1| - (1 - p_t))^2; S, the paper's term's, divides both."""
    penalty, scale = icrm(rewards, probs, mask)
    return penalty + KAPPA * gap_bound(rewards, probs, mask)[0], scale


def quiet(rewards, probs, mask):
    """Small increments of the reward itself where tokens are predictable: p_t (r_t+1 - r_t)^2."""
    # task 7
    p, links = links_of(probs, mask)
    rewards = torch.where(mask, rewards, 0.0)
    return masked_mean(p * (rewards[:, 1:] - rewards[:, :-1]) ** 2, links), None
    # end


def segment_bt(rewards, probs, mask):
    """Segment rewards (arXiv 2501.02790): Bradley-Terry of the mean reward over segments' ends,
    which stand before each surprising token (p < SEGMENT_P) and at the response's end."""
    surprising = link_mask(mask) & (probs < SEGMENT_P)                  # (2B, T-1)
    ends = last_tokens(mask) | F.pad(surprising, (0, 1))                # (2B, T)
    chosen, rejected = masked_mean(rewards, ends, dim=1).chunk(2)       # (B,) each
    return -F.logsigmoid(chosen - rejected).mean(), None


def tcrm_smooth(rewards, probs, mask):
    """Temporal-difference term of TCRM (arXiv 2604.22981; weight 0.1): (r_t - sg[r_t+1])^2."""
    rewards = torch.where(mask, rewards, 0.0)
    return masked_mean((rewards[:, :-1] - rewards[:, 1:].detach()) ** 2, link_mask(mask)), None


def tcrm_lookahead(rewards, probs, mask):
    """Monte-Carlo term of TCRM (weight 0.01): (r_t - sg[r_last])^2 before the last token."""
    ends, rewards = last_tokens(mask), torch.where(mask, rewards, 0.0)
    last = torch.where(ends, rewards, 0.0).sum(1, keepdim=True)         # (2B, 1)
    return masked_mean((rewards - last.detach()) ** 2, mask & ~ends), None


def td_lambda(rewards, probs, mask):
    """TC-lambda (arXiv 2505.16548): cross-entropy of z_t to a mixture of the values behind it.
    G_last = 1, the label;  G_t = (1 - lambda) z_t+1 + lambda G_t+1;
    penalty = mean over tokens of -{ sg[G_t] log z_t + (1 - sg[G_t]) log(1 - z_t) }."""
    logits = value_logits(rewards, mask)
    z, targets = torch.sigmoid(logits).detach(), [torch.ones_like(rewards[:, 0])]
    for t in reversed(range(1, rewards.size(1))):
        before = (1 - TD_LAMBDA) * z[:, t] + TD_LAMBDA * targets[0]
        targets.insert(0, torch.where(mask[:, t], before, 1.0))         # G_t-1
    loss = F.binary_cross_entropy_with_logits(logits, torch.stack(targets, 1), reduction="none")
    return masked_mean(loss, mask), None


REGULARIZERS = {function.__name__: function for function in (
    none, icrm, dense_bt, dense_bt_early, dense_bt_late, squared_gap, gap_bound, icrm_gap_bound,
    quiet, segment_bt, tcrm_smooth, tcrm_lookahead, td_lambda)}


# Demonstrations ----------------------------------------------------------------------------------

def enumerated_world(depth=5, vocabulary=3, seed=0):
    """A random world small enough to write down: at each depth m, the next token's probabilities
    (V^m, V) and the exact reward of every prefix (V^m,), found from the leaves back."""
    rng = torch.Generator().manual_seed(seed)
    logits = [torch.randn(vocabulary ** m, vocabulary, generator=rng) for m in range(depth)]
    probs = [(3 * x.double()).softmax(1) for x in logits]
    rewards = [(torch.rand(vocabulary ** depth, generator=rng) < 0.5).double()]     # good or bad
    for p in reversed(probs):
        rewards.insert(0, (p * rewards[0].view(-1, vocabulary)).sum(-1))    # Eq. 3
    return probs, rewards


def show_gap_bound():
    probs, rewards = enumerated_world()
    print("1. The gap bound in a world of 3 tokens and 5 steps, every prefix enumerated.\n")
    print("   step  links  largest |gap|  / (1 - p), at most 1  identity off by")
    for m, p in enumerate(probs):
        before, after = rewards[m][:, None], rewards[m + 1].view_as(p)      # (V^m, 1), (V^m, V)
        others = (p * after) @ (1 - torch.eye(3).double()) / (1 - p)        # E[r | another token]
        off = (before - after - (1 - p) * (others - after)).abs().max()
        gap = (before - after).abs()
        print(f"{m:7d}{p.numel():7d}{gap.max():15.4f}{(gap / (1 - p)).max():23.4f}{off:17.0e}")


def show_response():
    p = torch.tensor([[.02, .9, .03, .5, .3, .9, .8, .1, .7, .05, .9, .04, .8]]).double()
    r = torch.tensor([.1, .1, .2, -.9, -.8, -1.3, -.6, -.7, -.1, -.2, .2, .1, 1., .9]).double()
    rewards = torch.stack([r, torch.zeros_like(r)]).requires_grad_()
    mask = torch.tensor([[True], [False]]).expand(2, len(r))    # nobody opposes it: z = sigma(r)
    arguments = rewards, p.expand(2, -1), mask
    (by_link, scale), (by_token, weight) = icrm(*arguments), icrm_by_token(*arguments)
    weights, gradient = label_weights(*arguments)[0], torch.autograd.grad(by_link, rewards)[0][0]
    print("\n2. A chosen response under `icrm`: the label at every token, by weight.\n")
    print("   token     p of it    z_t    w_t / mean w   gradient on r_t (negative: up)")
    for t, word in enumerate("The soup was cold , as usual , but the staff were lovely .".split()):
        odds = f"{p[0, t - 1]:.2f}" if t else ""
        print(f"   {word:8s}  {odds:>7s}  {torch.sigmoid(r[t]):5.2f}"
              f"  {weights[t] / weights.mean():14.2f}  {gradient[t]:16.4f}")
    print(f"\n   by links {by_link:.9f}, by tokens {by_token:.9f}; scale {scale:.9f}, {weight:.9f}")


if __name__ == "__main__":
    show_gap_bound()
    show_response()
