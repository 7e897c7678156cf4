"""Intra-trajectory consistency: the derivation, and every regularizer in the box. The student's file.

    python regularizer.py       the derivation checked on an enumerated world; one response link by link

Read the reward of a prefix as the probability that the response will turn out well,
r(y_1:m) = P(e | x, y_1:m). The law of total probability (the paper's Eq. 3) ties each prefix to its
continuations,

    r(y_1:m) = sum over next tokens y' of P(y' | x, y_1:m) r(y_1:m, y'),

and so, for the token that was really generated, with probability p and rewards in [0, 1],

    |r(y_1:m) - r(y_1:m+1)| <= 1 - p.                                         (the gap bound)

A predictable token cannot change what we believe about the outcome; a surprising one may. That is
all the derivation gives. The paper's loss (`icrm`) is inspired by it, it does not follow from it.

Every regularizer is f(rewards (2B, T), probs (2B, T-1), mask (2B, T)) -> (penalty (), scale () or None).
Rows are B chosen responses, then the B rejected ones in the same order. Link t joins the prefixes
that end with tokens t and t+1 of a response; probs[:, t] is the generator's P(token t+1 | tokens 0..t).
`penalty` carries gradient. `scale` is what the training loop's running normaliser S follows (penalty
is divided by S), None where nothing is normalised. There is no state here.

To add your own: write such a function and put it into REGULARIZERS.
"""
import torch
import torch.nn.functional as F

KAPPA = 128.0       # weight of the gap in icrm_gap_bound, its controls and icrm_squared_gap
TD_LAMBDA = 0.9     # how far td_lambda looks ahead


# The derivation ------------------------------------------------------------------------------------

def total_probability(probs, rewards):
    """Eq. 3: r(prefix) = sum_y' P(y' | prefix) r(prefix, y').  (..., V), (..., V) -> (...)"""
    return (probs * rewards).sum(-1)


def largest_gap(probs):
    """|r(y_1:m) - r(y_1:m+1)| <= 1 - p for rewards in [0, 1].  (...) -> (...)"""
    return 1 - probs


# Values and links ----------------------------------------------------------------------------------

def masked_mean(x, mask, dim=None):
    """Mean of x where mask is True (0 where it is nowhere). What is masked out may be NaN: it is never touched."""
    kept = torch.where(mask, x, 0.0)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def value_logits(rewards, mask):
    """logit of z_t (Eq. 4): r_t - sg[mean of the opposing response's r] on chosen rows, its negative on rejected.

    (2B, T), (2B, T) -> (2B, T). So sigmoid gives  z = sigma(r - mean)  and  z = 1 - sigma(r - mean).
    """
    rewards = torch.where(mask, rewards, 0.0)
    means = masked_mean(rewards, mask, dim=1).detach()[:, None]     # (2B, 1)
    B = len(rewards) // 2
    return torch.cat([rewards[:B] - means[B:], means[:B] - rewards[B:]])


def link_mask(mask):
    """True for the links with both ends inside the response.  (2B, T) -> (2B, T-1)"""
    return mask[:, :-1] & mask[:, 1:]


def gaps(rewards, probs, mask):
    """|z_t - z_t+1|, p (0 outside the responses) and the mask of every link; (2B, T-1) each."""
    links = link_mask(mask)
    z = torch.sigmoid(value_logits(rewards, mask))
    return (z[:, :-1] - z[:, 1:]).abs(), torch.where(links, probs, 0.0), links


# The regularizers ----------------------------------------------------------------------------------

def none(rewards, probs, mask):
    """0: the GRM or Bradley-Terry baseline takes the same path."""
    return 0.0 * torch.where(mask, rewards, 0.0).sum(), None


def icrm(rewards, probs, mask):
    """The paper's loss: mutually weighted binary cross-entropy of neighbours, weighted by p.

    l_t = -1/2 { sg[z_t+1] log z_t + sg[z_t] log z_t+1 },  penalty = mean over links of 2 p_t l_t,
    scale = mean over links of 2 p_t (z_t + z_t+1) / 2.
    """
    links = link_mask(mask)                                             # (2B, T-1)
    log_z = F.logsigmoid(value_logits(rewards, mask))                   # (2B, T)
    z = log_z.detach().exp()
    l = -0.5 * (z[:, 1:] * log_z[:, :-1] + z[:, :-1] * log_z[:, 1:])    # (2B, T-1)
    p = torch.where(links, probs, 0.0)
    penalty = masked_mean(2 * p * l, links)
    scale = masked_mean(2 * p * (z[:, :-1] + z[:, 1:]) / 2, links)
    return penalty, scale


def icrm_uniform(rewards, probs, mask):
    """Control: `icrm` with p = 1 on every link. Do the generator's probabilities matter?"""
    return icrm(rewards, torch.ones_like(probs), mask)


def dense_bt(rewards, probs, mask):
    """Control: -log z_t at every response token. Propagating the label, with no consistency in it."""
    return masked_mean(-F.logsigmoid(value_logits(rewards, mask)), mask), None


def shuffled(probs, mask):
    """p permuted inside each response: the right amounts, on the wrong links.  (2B, T-1), (2B, T) -> (2B, T-1)"""
    links = link_mask(mask)
    place = (links.long().cumsum(1) - 1).clamp(min=0)               # 0, 1, 2, ... along each response's links
    key = (place * 2654435761 % 2 ** 32 * 40503) % 65521            # one fixed pseudo-random order for each length
    source = torch.where(links, key, 2 ** 20).argsort(dim=1, stable=True)    # links in random order, then the rest
    target = (~links).long().argsort(dim=1, stable=True)            # links in their own order, then the rest
    return torch.zeros_like(probs).scatter(1, target, probs.gather(1, source))


def icrm_shuffled(rewards, probs, mask):
    """Control: `icrm` with p permuted inside each response. Does it matter which tokens were predictable?"""
    return icrm(rewards, shuffled(probs, mask), mask)


def squared_gap(rewards, probs, mask):
    """The obvious two-sided consistency: p_t (z_t - z_t+1)^2."""
    gap, p, links = gaps(rewards, probs, mask)
    return masked_mean(p * gap ** 2, links), None


def gap_bound(rewards, probs, mask):
    """What the derivation really implies: relu(|z_t - z_t+1| - (1 - p_t))^2, the excess over `largest_gap`."""
    gap, p, links = gaps(rewards, probs, mask)
    return masked_mean(F.relu(gap - largest_gap(p)) ** 2, links), None


def icrm_gap_bound(rewards, probs, mask, kappa=KAPPA):
    """Ours: the paper's term and the bound that its derivation gives: 2 p_t l_t + kappa relu(|z_t - z_t+1| - (1 - p_t))^2.

    S follows the paper's term alone and divides both: the bound's weight is really kappa / S, less where p is larger.
    """
    penalty, scale = icrm(rewards, probs, mask)
    return penalty + kappa * gap_bound(rewards, probs, mask)[0], scale


def icrm_gap_bound_uniform(rewards, probs, mask, kappa=KAPPA):
    """Control: `icrm_gap_bound` with p = 1, which bounds every gap by 0: 2 l_t + kappa (z_t - z_t+1)^2."""
    return icrm_gap_bound(rewards, torch.ones_like(probs), mask, kappa)


def icrm_gap_bound_shuffled(rewards, probs, mask, kappa=KAPPA):
    """Control: `icrm_gap_bound` with p permuted inside each response."""
    return icrm_gap_bound(rewards, shuffled(probs, mask), mask, kappa)


def icrm_squared_gap(rewards, probs, mask, kappa=KAPPA):
    """Ours: the same idea, smooth: 2 p_t l_t + kappa p_t (z_t - z_t+1)^2."""
    penalty, scale = icrm(rewards, probs, mask)
    return penalty + kappa * squared_gap(rewards, probs, mask)[0], scale


def tcrm_smooth(rewards, probs, mask):
    """Temporal-difference term of TCRM (arXiv 2604.22981; weight 0.1 there): (r_t - sg[r_t+1])^2."""
    rewards = torch.where(mask, rewards, 0.0)
    return masked_mean((rewards[:, :-1] - rewards[:, 1:].detach()) ** 2, link_mask(mask)), None


def tcrm_lookahead(rewards, probs, mask):
    """Monte-Carlo term of TCRM (weight 0.01 there): (r_t - sg[r_last])^2 at every token before the last."""
    rewards = torch.where(mask, rewards, 0.0)
    ends = mask & ~F.pad(mask[:, 1:], (0, 1))                       # each response's last token
    last = torch.where(ends, rewards, 0.0).sum(1, keepdim=True)     # (2B, 1)
    return masked_mean((rewards - last.detach()) ** 2, mask & ~ends), None


def td_lambda(rewards, probs, mask):
    """TC-lambda (arXiv 2505.16548): cross-entropy of z_t to a lambda-mixture of the values behind it.

    G_last = 1, the label;  G_t = (1 - lambda) z_t+1 + lambda G_t+1;  -{ sg[G_t] log z_t + (1 - sg[G_t]) log(1 - z_t) }.
    """
    logits = value_logits(rewards, mask)
    z, target, targets = torch.sigmoid(logits).detach(), torch.ones_like(rewards[:, 0]), []
    for t in reversed(range(rewards.size(1))):
        targets.insert(0, target)       # G_t: 1 at the last token, and after it
        before = (1 - TD_LAMBDA) * z[:, t] + TD_LAMBDA * target
        target = torch.where(mask[:, t], before, 1.0)
    loss = F.binary_cross_entropy_with_logits(logits, torch.stack(targets, 1), reduction="none")
    return masked_mean(loss, mask), None


REGULARIZERS = {
    "none": none,
    "icrm": icrm,
    "icrm_uniform": icrm_uniform,
    "icrm_shuffled": icrm_shuffled,
    "dense_bt": dense_bt,
    "squared_gap": squared_gap,
    "gap_bound": gap_bound,
    "icrm_gap_bound": icrm_gap_bound,
    "icrm_gap_bound_uniform": icrm_gap_bound_uniform,
    "icrm_gap_bound_shuffled": icrm_gap_bound_shuffled,
    "icrm_squared_gap": icrm_squared_gap,
    "tcrm_smooth": tcrm_smooth,
    "tcrm_lookahead": tcrm_lookahead,
    "td_lambda": td_lambda,
}


# Demonstrations --------------------------------------------------------------------------------

def enumerated_world(depth=5, vocabulary=3, seed=0):
    """A random world small enough to write down: at each depth m, the probabilities of the next token
    (V^m, V) and the exact reward of every prefix (V^m,), found backwards from the leaves by Eq. 3."""
    rng = torch.Generator().manual_seed(seed)
    probs = [torch.rand(vocabulary ** m, vocabulary, generator=rng).double().pow(4) for m in range(depth)]
    probs = [p / p.sum(1, keepdim=True) for p in probs]
    rewards = [(torch.rand(vocabulary ** depth, generator=rng) < 0.5).double()]     # a leaf is good or bad
    for p in reversed(probs):
        rewards.insert(0, total_probability(p, rewards[0].view(-1, vocabulary)))
    return probs, rewards


def show_derivation():
    probs, rewards = enumerated_world()
    print("1. The gap bound |r(y_1:m) - r(y_1:m+1)| <= 1 - p in a world of 3 tokens and 5 steps,")
    print("   every prefix enumerated; rewards are exact probabilities of a good end.\n")
    print("   step   links   largest gap   largest gap / (1 - p)   links that break the bound")
    for m, p in enumerate(probs):
        gap = (rewards[m][:, None] - rewards[m + 1].view_as(p)).abs()
        broken = (gap > largest_gap(p) + 1e-12).sum()
        print(f"   {m:4d}   {p.numel():5d}   {gap.max():11.4f}   {(gap / largest_gap(p)).max():21.4f}   {broken:26d}")


def show_response():
    words = "The soup was cold , as usual , but the staff were lovely .".split()
    p = torch.tensor([.02, .9, .03, .5, .3, .9, .8, .1, .7, .05, .9, .04, .8])
    rewards = torch.tensor([.1, .1, .2, -.9, -.8, -1.3, -.6, -.7, -.1, -.2, .2, .1, 1., .9])
    rewards = torch.stack([rewards, torch.zeros(len(words))])     # the opposing response's rewards are 0
    mask = torch.ones_like(rewards, dtype=torch.bool)
    z = torch.sigmoid(value_logits(rewards, mask))[0]
    print("\n2. A chosen response under `icrm`: the penalty of a link is 2 p l. A predictable step (p near 1)")
    print("   counts in full, a surprising one (p near 0) for nothing. The penalty alone does not show a gap: with")
    print("   both values at z it is -2 p z log z. What it does is in its gradient (3.).\n")
    print("   token t    -> token t+1       p     z_t   z_t+1   penalty   gap bound")
    for t in range(len(words) - 1):
        link = torch.zeros_like(mask)
        link[0, t:t + 2] = True  # one link of one row; the opponent's mean stays what it was, 0
        penalty, _ = icrm(rewards, p.expand(2, -1), link)
        held = "kept" if (z[t] - z[t + 1]).abs() <= largest_gap(p[t]) else "broken"
        print(f"   {words[t]:10s} -> {words[t + 1]:10s}  {p[t]:5.2f}  {z[t]:6.3f}  {z[t + 1]:6.3f}  "
              f"{penalty:8.4f}   {held}")


def link_gradient(name, z, z_next, p=0.9):
    """d penalty / d r_t on one link of a chosen response between values z and z_next."""
    rewards = torch.zeros(2, 2, dtype=torch.double)
    rewards[0] = torch.logit(torch.tensor([z, z_next]))     # the opposing response's rewards are 0
    mask = torch.tensor([[True, True], [False, True]])      # it has no link
    penalty, _ = REGULARIZERS[name](rewards.requires_grad_(), torch.full((2, 1), p, dtype=torch.double), mask)
    return torch.autograd.grad(penalty, rewards)[0][0, 0].item()


def show_one_sidedness():
    values = (0.1, 0.3, 0.5, 0.7, 0.9)
    print("\n3. The gradient on r_t of a chosen link with p = 0.9, by its two values. Consistency is 0 where they")
    print("   agree and changes sign there; `icrm` is negative everywhere: it pushes chosen prefixes up.")
    for name in ("icrm", "squared_gap", "gap_bound"):
        print(f"\n   {name:12s} z_t+1 =" + "".join(f"{after:8.1f}" for after in values))
        for z in values:
            print(f"   z_t = {z:.1f}           " + "".join(f"{link_gradient(name, z, after):8.3f}" for after in values))


if __name__ == "__main__":
    show_derivation()
    show_response()
    show_one_sidedness()
