"""Slow oracle for the DiSK distillation loss (Kag et al., ICLR 2023, "Scaffolding a Student to Instill Knowledge").

Written from the paper's equations with plain loops over lists and `math` alone; it shares no code with the library
and exists only so that tests can compare against it. Nothing here is fast. Everything is evaluated in log space, so
that results stay exact and finite for logits and guide logits of +-1e4.

Letters of the paper and names used here:
    l_S, l_T      student_logits, teacher_logits: one row of C floats per position
    tau, tau_s    temperature (teacher), student_temperature (student)
    s, t          softmax(l_S / tau_s), softmax(l_T / tau)
    g             sigmoid(guide logit), one number per position
    K             top_k: how many of the teacher's classes get g (None: all)
    alpha         ce_weight; 1 - alpha is distill_weight
    lambda, delta multiplier, budget
    A_lambda      period of the multiplier's cosine

A target is a list of class indices or a list of rows of probabilities. `hand_case` holds an example worked on paper.
"""

import math

# What the authors' scripts do differently from the paper. "official": the label joins the top-K classes, the target
# is zeroed outside them, the budget's cross-entropy is to the teacher's argmax and its mean is over the misclassified.
VARIANTS = {
    "paper": {"official": False, "clamp": math.inf, "extra": 0.0},
    "official_cifar": {"official": True, "clamp": 5.0, "extra": 0.9},
    "official_imagenet": {"official": True, "clamp": 2.0, "extra": 0.0},
}
VALUES = ("ce", "distill", "divergence", "usage")
VALUES += ("guide", "discount", "correct", "agreement", "teacher_correct", "discount_slope", "reach", "counted")
WEIGHTED = ("ce", "distill", "divergence", "usage", "extra")


# ---- scalar and row arithmetic ---------------------------------------------------------------------------------------


def argmax(row):
    """Returns the index of the largest entry, the first one on ties."""
    best = 0
    for index, value in enumerate(row):
        if value > row[best]:
            best = index
    return best


def log_sum_exp(row):
    """Returns log(sum(exp(row))); the largest term is kept apart so that a tiny remainder is not rounded away."""
    top = argmax(row)
    if row[top] == -math.inf:
        return -math.inf
    rest = math.fsum(math.exp(value - row[top]) for index, value in enumerate(row) if index != top)
    return row[top] + math.log1p(rest)


def log_softmax(logits, temperature):
    """Returns log softmax(logits / temperature) as a list."""
    largest = max(logits)
    scaled = [(value - largest) / temperature for value in logits]
    norm = log_sum_exp(scaled)
    return [value - norm for value in scaled]


def log_sigmoid(value):
    """Returns log(1 / (1 + exp(-value))) without overflow."""
    return -math.log1p(math.exp(-value)) if value >= 0 else value - math.log1p(math.exp(value))


def log_or_minus_inf(value):
    """Returns log(value), and minus infinity at 0."""
    return math.log(value) if value > 0 else -math.inf


def top_classes(teacher, top_k):
    """Returns the set of the top-K classes of one row of teacher logits; ties go to the lowest index."""
    order = sorted(range(len(teacher)), key=lambda k: (-teacher[k], k))
    return set(order if top_k is None else order[:top_k])


def label_of(entry):
    """Returns the label of one target: the index itself, or the argmax of a row of probabilities."""
    return argmax(entry) if isinstance(entry, (list, tuple)) else entry


def cross_entropy(log_s, entry):
    """Returns -log s_y, or -sum_y p_y log s_y for a row of probabilities p."""
    if isinstance(entry, (list, tuple)):
        return -math.fsum(p * value for p, value in zip(entry, log_s, strict=True))
    return -log_s[entry]


# ---- eq. (1): plain distillation -------------------------------------------------------------------------------------


def kl(teacher, student, temperature, student_temperature):
    """Returns KL(t || s) of one position."""
    log_t = log_softmax(teacher, temperature)
    log_s = log_softmax(student, student_temperature)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_t, log_s, strict=True))


def kd(
    student_logits,
    teacher_logits,
    target,
    *,
    ce_weight,
    distill_weight,
    temperature,
    student_temperature,
    ignore_index=-100,
):
    """Returns eq. (1): ce_weight * CE + distill_weight * tau * tau_s * mean KL(t || s)."""
    ce, divergence = [], []
    for student, teacher, entry in zip(student_logits, teacher_logits, target, strict=True):
        if entry == ignore_index:
            continue
        ce.append(cross_entropy(log_softmax(student, 1.0), entry))
        divergence.append(kl(teacher, student, temperature, student_temperature))
    count = max(len(ce), 1)
    scale = temperature * student_temperature
    return ce_weight * math.fsum(ce) / count + distill_weight * scale * math.fsum(divergence) / count


# ---- eqs. (3) to (5) -------------------------------------------------------------------------------------------------


def guided_classes(teacher, label, official, top_k):
    """Returns the set of classes that get g: the top-K, and in the authors' scripts the label too."""
    classes = top_classes(teacher, top_k)
    return classes | {label} if official else classes


def log_target(teacher, classes, official, temperature):
    """Returns log t; minus infinity where the authors' scripts zero the target."""
    if not official:
        return log_softmax(teacher, temperature)
    floor = min(teacher)  # not divided by the temperature
    mixed = [value / temperature if k in classes else floor for k, value in enumerate(teacher)]
    return [value if k in classes else -math.inf for k, value in enumerate(log_softmax(mixed, 1.0))]


def scaffold(log_t, log_s, log_g, classes):
    """Returns (sum_y t log(t / (s + 1[y in classes] g)), d, d d / d log g) of one position.

    The discount is d = 1 - sum w / sum t with w = t s / (s + 1_K g), computed as sum_K t g / (s + g) / sum t.
    """
    distance, taken, slope = [], [-math.inf], [-math.inf]
    for k, value in enumerate(log_t):
        if value == -math.inf:
            continue
        log_mix = log_sum_exp([log_s[k], log_g]) if k in classes else log_s[k]
        distance.append(math.exp(value) * (value - log_mix))
        if k in classes:
            taken.append(value + log_g - log_mix)
            slope.append(value + log_g + log_s[k] - 2 * log_mix)
    mass = log_sum_exp(log_t)
    return math.fsum(distance), math.exp(log_sum_exp(taken) - mass), math.exp(log_sum_exp(slope) - mass)


def divergence(log_t, log_s, log_g, classes):
    """Returns m KL(t / m || phi) of one position: phi is s + 1_K g over its sum, m the sum of t (1, unless zeroed)."""
    log_mix = [log_sum_exp([value, log_g]) if k in classes else value for k, value in enumerate(log_s)]
    log_norm, log_mass = log_sum_exp(log_mix), log_sum_exp(log_t)
    pairs = [(value, mix - log_norm) for value, mix in zip(log_t, log_mix, strict=True) if value > -math.inf]
    return math.fsum(math.exp(value) * (value - log_mass - log_phi) for value, log_phi in pairs)


def position(student, teacher, entry, guide_logit, rules, *, temperature, student_temperature, top_k):
    """Returns the unweighted values of one position that is not ignored, as a dict."""
    official, label, predicted = rules["official"], label_of(entry), argmax(student)
    log_p = log_softmax(student, 1.0)  # the student at temperature 1
    log_g = log_sigmoid(guide_logit)
    g = math.exp(log_g)
    classes = guided_classes(teacher, label, official, top_k)
    log_t = log_target(teacher, classes, official, temperature)
    log_s = log_softmax(student, student_temperature)
    distance, discount, slope = scaffold(log_t, log_s, log_g, classes)
    budget_ce = -log_p[argmax(teacher) if official else label]
    size = len(teacher) if top_k is None else min(top_k, len(teacher))
    return {
        "ce": cross_entropy(log_p, entry),
        "distill": temperature * student_temperature * distance,
        "divergence": temperature * student_temperature * divergence(log_t, log_s, log_g, classes),
        "usage": g * min(budget_ce, rules["clamp"]),
        "extra": rules["extra"] * math.log1p(size * g),
        "guide": g,
        "discount": discount,
        "correct": float(predicted == label),
        "agreement": float(predicted == argmax(teacher)),
        "teacher_correct": float(argmax(teacher) == label),
        "discount_slope": slope,
        "reach": math.exp(log_sum_exp([log_t[k] for k in classes]) - log_sum_exp(log_t)),
        "counted": 1.0,
    }


def table(student_logits, teacher_logits, target, guide_logits, rules, sample_weight, ignore_index, **settings):
    """Returns (list of dicts, one per position, weighted and 0.0 where ignored; how many are not ignored)."""
    rows, count = [], 0
    for i, entry in enumerate(target):
        if entry == ignore_index:
            rows.append(dict.fromkeys((*VALUES, "extra"), 0.0))
            continue
        row = position(student_logits[i], teacher_logits[i], entry, guide_logits[i], rules, **settings)
        for name in WEIGHTED if sample_weight is not None else ():
            row[name] *= sample_weight[i]
        rows.append(row)
        count += 1
    return rows, count


def disk(
    student_logits,
    teacher_logits,
    target,
    guide_logits,
    *,
    variant="paper",
    ce_weight,
    distill_weight,
    temperature,
    student_temperature,
    top_k,
    multiplier,
    budget,
    sample_weight=None,
    ignore_index=-100,
):
    """Returns eq. (5), its parts and the per-position values as a dict.

    Denominators are counts of positions not ignored, at least 1, whatever the weights; the authors' scripts divide
    the usage by the number of misclassified positions instead.
    """
    rows, count = table(
        student_logits,
        teacher_logits,
        target,
        guide_logits,
        VARIANTS[variant],
        sample_weight,
        ignore_index,
        temperature=temperature,
        student_temperature=student_temperature,
        top_k=top_k,
    )
    total = {name: math.fsum(row[name] for row in rows) for name in (*VALUES, "extra")}
    mean = {name: value / max(count, 1) for name, value in total.items()} | {"counted": total["counted"]}
    if VARIANTS[variant]["official"]:
        mean["usage"] = total["usage"] / max(count - int(total["correct"]), 1)
    violation = mean["usage"] - budget
    help_loss = distill_weight * mean["distill"]
    guide_loss = help_loss + multiplier * max(violation, 0.0) + mean.pop("extra")
    return {
        **mean,
        "logged_loss": ce_weight * mean["ce"] + distill_weight * mean["divergence"],
        "loss": ce_weight * mean["ce"] + guide_loss,
        "student_loss": ce_weight * mean["ce"] + help_loss,
        "guide_loss": guide_loss,
        "violation": violation,
        "per_sample": {name: [row[name] for row in rows] for name in VALUES},
    }


# ---- brute-force minimisers ------------------------------------------------------------------------------------------


def bisect(sign_is_positive, low, high, steps=200):
    """Returns where a function that rises from negative to positive on [low, high] changes its sign."""
    for _ in range(steps):
        middle = 0.5 * (low + high)
        if sign_is_positive(middle):
            high = middle
        else:
            low = middle
    return 0.5 * (low + high)


def kl_slope(student_logits, teacher_probabilities, beta):
    """Returns the derivative in beta = 1 / tau_s of sum KL(t || s): sum over positions of E_s[l_S] - E_t[l_S]."""
    terms = []
    for student, t_row in zip(student_logits, teacher_probabilities, strict=True):
        largest = max(student)
        log_s = log_softmax(student, 1.0 / beta)
        terms += [(math.exp(a) - t) * (value - largest) for a, t, value in zip(log_s, t_row, student, strict=True)]
    return math.fsum(terms)


def mean_kl(student_logits, teacher_logits, temperature, beta):
    """Returns mean KL(t || softmax(beta * l_S))."""
    pairs = list(zip(student_logits, teacher_logits, strict=True))
    return math.fsum(kl(teacher, student, temperature, 1.0 / beta) for student, teacher in pairs) / len(pairs)


def student_temperature(student_logits, teacher_logits, temperature):
    """Returns tau_s = argmin_x mean KL(t || softmax(l_S / x)) over x in [temperature / 4, 4 * temperature].

    The objective is convex in beta = 1 / x, so the sign of its slope is bisected (comparing its values cannot resolve
    better than about 1e-8); a grid of values then confirms that nothing is lower. An objective that is exactly flat at
    both ends (such as constant student logits) has no unique minimiser: the answer is then `temperature`.
    """
    low, high, cells = 0.25 / temperature, 4.0 / temperature, 400
    probabilities = [[math.exp(value) for value in log_softmax(row, temperature)] for row in teacher_logits]
    at_low, at_high = (kl_slope(student_logits, probabilities, beta) for beta in (low, high))
    if at_low == at_high == 0.0:
        return temperature
    if at_low >= 0:
        best = low
    elif at_high <= 0:
        best = high
    else:
        best = bisect(lambda beta: kl_slope(student_logits, probabilities, beta) > 0, low, high)
    grid = [low + (high - low) * i / cells for i in range(cells + 1)]
    value = mean_kl(student_logits, teacher_logits, temperature, best)
    lowest = min(mean_kl(student_logits, teacher_logits, temperature, beta) for beta in grid)
    assert value <= lowest + 1e-9 * (1.0 + abs(lowest)), "the slope disagrees with the objective"
    return 1.0 / best


def log_gain(g, log_t, log_s, classes):
    """Returns log sum_{k in K} t_k / (s_k + g), the log of how fast L_dist falls with g (without tau tau_s)."""
    log_g = log_or_minus_inf(g)
    return log_sum_exp([log_t[k] - log_sum_exp([log_s[k], log_g]) for k in sorted(classes)])


def best_guide(log_scale, log_cost, log_t, log_s, classes):
    """Returns where scale * sum_K t / (s + g), which falls with g, meets the cost, kept within [0, 1]."""

    def costs_more(g):
        return log_scale + log_gain(g, log_t, log_s, classes) <= log_cost

    if costs_more(0.0):
        return 0.0
    return bisect(costs_more, 0.0, 1.0) if costs_more(1.0) else 1.0


def optimal_guide(
    student_logits,
    teacher_logits,
    target,
    *,
    distill_weight,
    temperature,
    student_temperature,
    top_k,
    multiplier,
    ignore_index=-100,
):
    """Returns per position the g in [0, 1] that minimises distill_weight * L_dist(g) + multiplier * g * CE.

    The objective is convex; its stationarity, distill_weight tau tau_s sum_K t / (s + g) = multiplier CE, is bisected
    with both sides in logs. Where the objective does not depend on g the answer is 0, as it is where ignored.
    """
    log_scale = log_or_minus_inf(distill_weight * temperature * student_temperature)
    guides = []
    for student, teacher, entry in zip(student_logits, teacher_logits, target, strict=True):
        if entry == ignore_index:
            guides.append(0.0)
            continue
        log_cost = log_or_minus_inf(-multiplier * log_softmax(student, 1.0)[label_of(entry)])
        log_t, log_s = log_softmax(teacher, temperature), log_softmax(student, student_temperature)
        guides.append(best_guide(log_scale, log_cost, log_t, log_s, top_classes(teacher, top_k)))
    return guides


# ---- schedules -------------------------------------------------------------------------------------------------------


def multiplier_at(epoch, epochs, low, high, period=None):
    """Returns lambda of Algorithm 1: low + (high - low) * (1 - cos(pi * phase)) / 2, the phase restarting each period.

    An incomplete last period is merged into the one before it; the last period ends at `high` exactly at `epochs`.
    """
    if epoch >= epochs:
        return high
    period = math.ceil(epochs / 4) if period is None else period
    last_start = (max(epochs // period, 1) - 1) * period
    start, length = (last_start, epochs - last_start) if epoch >= last_start else (epoch - epoch % period, period)
    phase = (epoch - start) / length
    return low + (high - low) * (1.0 - math.cos(math.pi * phase)) / 2.0


def budget_at(epoch, high, low, period, decay):
    """Returns delta: a cosine from high to low in each period, the upper end times decay at each restart (>= low)."""
    upper = max(high * decay ** (epoch // period), low)
    phase = (epoch % period) / period
    return low + (upper - low) * (1.0 + math.cos(math.pi * phase)) / 2.0


# ---- worked by hand --------------------------------------------------------------------------------------------------


# tau = tau_s = 1, g = 1/2 on both samples, K = 1, alpha = 1/4 (so 1 - alpha = 3/4), lambda = 2, delta = 1/4.
# Sample 1: s = (1/2, 1/4, 1/4), t = (1/2, 1/4, 1/4), label 0, top-1 of t is class 0 where s + g = 1.
#     CE = log 2, g CE = (1/2) log 2
#     L_dist = (1/2) log((1/2) / 1) + 0 + 0 = -(1/2) log 2
#     w = (1/4, 1/4, 1/4), d = 1 - 3/4 = 1/4, its slope by log g (1/2)(1/2)(1/2) / 1 = 1/8
#     the student is right and agrees with the teacher
# Sample 2: s = (1/4, 1/4, 1/2), t = (1/4, 1/2, 1/4), label 1, top-1 of t is class 1 where s + g = 3/4.
#     CE = log 4 = 2 log 2, g CE = log 2
#     L_dist = 0 + (1/2) log((1/2) / (3/4)) + (1/4) log((1/4) / (1/2)) = (1/2) log(2/3) - (1/4) log 2
#            = (1/4) log 2 - (1/2) log 3
#     w = (1/4, 1/6, 1/4), d = 1 - 2/3 = 1/3, its slope (1/2)(1/4)(1/2) / (9/16) = 1/9
#     the student is wrong and disagrees with the teacher
# s + 1_K g sums to 1 + 1/2 in both: the divergence is L_dist + log(3/2) there.
# Means: CE = (3/2) log 2, L_dist = -(1/8) log 2 - (1/4) log 3 = -(1/8) log 18, usage = (3/4) log 2 > 1/4
# Loss: (1/4)(3/2) log 2 - (3/4)(1/8) log 18 + 2 ((3/4) log 2 - 1/4) = (15/8) log 2 - (3/32) log 18 - 1/2


def hand_case():
    """Returns (arguments of `disk`, expected results) of the case derived in the comment above."""
    half, quarter = math.log(1 / 2), math.log(1 / 4)
    arguments = {
        "student_logits": [[half, quarter, quarter], [quarter, quarter, half]],
        "teacher_logits": [[half, quarter, quarter], [quarter, half, quarter]],
        "target": [0, 1],
        "guide_logits": [0.0, 0.0],  # sigmoid(0) = 1/2
        "variant": "paper",
        "ce_weight": 1 / 4,
        "distill_weight": 3 / 4,
        "temperature": 1.0,
        "student_temperature": 1.0,
        "top_k": 1,
        "multiplier": 2.0,
        "budget": 1 / 4,
    }
    return arguments, _hand_expected()


def _hand_expected():
    """Returns the closed forms derived in the comment above `hand_case`."""
    log2, log3, log18 = math.log(2), math.log(3), math.log(18)
    return {
        "ce": 3 / 2 * log2,
        "distill": -log18 / 8,
        "divergence": math.log(3 / 2) - log18 / 8,
        "logged_loss": 3 / 8 * log2 + 3 / 4 * math.log(3 / 2) - 3 / 32 * log18,
        "usage": 3 / 4 * log2,
        "violation": 3 / 4 * log2 - 1 / 4,
        "loss": 15 / 8 * log2 - 3 / 32 * log18 - 1 / 2,
        "student_loss": 3 / 8 * log2 - 3 / 32 * log18,
        "guide_loss": 3 / 2 * log2 - 3 / 32 * log18 - 1 / 2,
        "guide": 1 / 2,
        "discount": 7 / 24,
        "correct": 1 / 2,
        "agreement": 1 / 2,
        "teacher_correct": 1.0,
        "discount_slope": 17 / 144,
        "reach": 1 / 2,
        "counted": 2.0,
        "per_sample": {
            "ce": [log2, 2 * log2],
            "distill": [-log2 / 2, log2 / 4 - log3 / 2],
            "divergence": [log3 - 3 / 2 * log2, log3 / 2 - 3 / 4 * log2],
            "usage": [log2 / 2, log2],
            "guide": [1 / 2, 1 / 2],
            "discount": [1 / 4, 1 / 3],
            "correct": [1.0, 0.0],
            "agreement": [1.0, 0.0],
            "teacher_correct": [1.0, 1.0],
            "discount_slope": [1 / 8, 1 / 9],
            "reach": [1 / 2, 1 / 2],
            "counted": [1.0, 1.0],
        },
    }
