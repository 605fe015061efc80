"""Independent oracle for CIFD (NeurIPS 2024): plain NumPy, float64, per-sample losses, no gradients.

Written from the formulas alone, apart from the package. Equations are the paper's. Every loss comes back per sample,
shape (B,); the batch loss of the paper is its mean over B. Nothing is clamped.

Conventions
    density   a triple (matrices, biases, factors), or a dict with these keys
    linear    a pair (W (out, in), b (out,)); b may be None
    labels    integers, shape (B,); no label smoothing
"""

import numpy as np

# ---- elementary pieces


def _f64(a):
    return np.asarray(a, dtype=np.float64)


def _softplus(x):
    """log(1 + e^x) without overflow."""
    return np.logaddexp(0.0, x)


def _relu(x):
    return np.where(x > 0.0, x, 0.0)


def _linear(x, pair):
    """x W^T + b, one sample at a time."""
    weight = _f64(pair[0])
    bias = np.zeros(weight.shape[0]) if pair[1] is None else _f64(pair[1])
    x = _f64(x)
    assert x.ndim == 2
    assert weight.shape[1] == x.shape[1]
    assert bias.shape == (weight.shape[0],)
    out = np.empty((x.shape[0], weight.shape[0]))
    for i in range(x.shape[0]):
        out[i] = weight @ x[i] + bias
    return out


def _log_softmax(z):
    """One sample's log softmax, z of shape (K,)."""
    shifted = z - z.max()
    return shifted - np.log(np.exp(shifted).sum())


def _density(density):
    if isinstance(density, dict):
        return density["matrices"], density["biases"], density["factors"]
    matrices, biases, factors = density
    return matrices, biases, factors


# ---- factorised density


def _check_density(v, matrices, biases, factors):
    layers = len(matrices)
    assert v.ndim == 2
    assert layers >= 1
    assert len(biases) == layers
    assert len(factors) == layers - 1
    channels, width = v.shape[1], 1
    for k in range(layers):
        c, width_out, width_in = np.shape(matrices[k])
        assert c == channels
        assert width_in == width
        assert np.shape(biases[k]) == (channels, width_out, 1)
        if k < layers - 1:
            assert np.shape(factors[k]) == (channels, width_out, 1)
        width = width_out
    assert width == 1


def cumulative_logit(v, matrices, biases, factors):
    """l_c(v), v of shape (B, C): h <- softplus(M) h + b, and h <- h + tanh(a) tanh(h) but after the last."""
    v = _f64(v)
    _check_density(v, matrices, biases, factors)
    layers = len(matrices)
    out = np.empty_like(v)
    for c in range(v.shape[1]):
        h = v[:, c][None, :]  # (width, B), width 1 at first
        for k in range(layers):
            h = _softplus(_f64(matrices[k][c])) @ h + _f64(biases[k][c])
            if k < layers - 1:
                h = h + np.tanh(_f64(factors[k][c])) * np.tanh(h)
        out[:, c] = h[0]
    return out


def _logit_step(v, matrices, biases, factors):
    """l(v+1/2) - l(v-1/2) > 0, without subtracting the two logits.

    The difference d is carried through the layers beside h, the value at v-1/2:
        affine layer   d <- softplus(M) d                              (all terms positive)
        nonlinearity   d <- d + tanh(a) (tanh(h+d) - tanh(h)),
                       tanh(h+d) - tanh(h) = sinh(d) / (cosh(h) cosh(h+d)),
        the latter written with exponentials of non-positive numbers only.
    """
    v = _f64(v)
    layers = len(matrices)
    out = np.empty_like(v)
    for c in range(v.shape[1]):
        h = v[:, c][None, :] - 0.5
        d = np.ones_like(h)
        for k in range(layers):
            weight = _softplus(_f64(matrices[k][c]))
            h = weight @ h + _f64(biases[k][c])
            d = weight @ d
            if k < layers - 1:
                a = np.tanh(_f64(factors[k][c]))
                low, high = np.abs(h), np.abs(h + d)
                rise = (
                    2.0
                    * -np.expm1(-2.0 * d)
                    * np.exp(np.minimum(d - low - high, 0.0))
                    / ((1.0 + np.exp(-2.0 * low)) * (1.0 + np.exp(-2.0 * high)))
                )
                h = h + a * np.tanh(h)
                d = d + a * rise
        out[:, c] = d[0]
    return out


def log_bin_probability(v, matrices, biases, factors):
    """log of bin_probability.  With b = l(v+1/2), a = l(v-1/2), the exact identity
        sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(-(b-a)))
    gives  log p = -softplus(-b) - softplus(a) + log(1 - exp(-(b-a))),  no cancellation in either tail."""
    v = _f64(v)
    b = cumulative_logit(v + 0.5, matrices, biases, factors)
    a = cumulative_logit(v - 0.5, matrices, biases, factors)
    step = _logit_step(v, matrices, biases, factors)
    return -_softplus(-b) - _softplus(a) + np.log(-np.expm1(-step))


def bin_probability(v, matrices, biases, factors):
    """p_c(v) = sigmoid(l_c(v+1/2)) - sigmoid(l_c(v-1/2)), without the clamp; shape of v."""
    return np.exp(log_bin_probability(v, matrices, biases, factors))


def rate(v, matrices, biases, factors):
    """-sum_c log p_c(v_c) in nats, shape (B,)   (the -log q of eq. (4) and the -log r of eq. (8))."""
    logs = log_bin_probability(v, matrices, biases, factors)
    out = np.zeros(logs.shape[0])
    for c in range(logs.shape[1]):
        out -= logs[:, c]
    return out


# ---- rate-distortion module


def rdm_forward(x, weights, noise=None):
    """One RDM: X -Linear-ReLU-Linear-> Y -channel-> Yhat -decoder-> Xhat -Linear-> logits.

    channel    Y + noise in training, else Y rounded to integers, half to even
    decoder    without 'output': Linear, ReLU;   with 'output': Linear, ReLU, Linear, ReLU
               weights['relu_output'] = False takes away the last ReLU (and only that one)
    logits     None without 'classifier'
    """
    x = _f64(x)
    y = _linear(_relu(_linear(x, weights["encoder1"])), weights["encoder2"])
    if noise is None:
        y_hat = np.rint(y)
    else:
        assert np.shape(noise) == y.shape
        y_hat = y + _f64(noise)
    x_hat = _linear(y_hat, weights["decoder"])
    if weights.get("output") is not None:
        x_hat = _linear(_relu(x_hat), weights["output"])
    if weights.get("relu_output", True):
        x_hat = _relu(x_hat)
    logits = None
    if weights.get("classifier") is not None:
        logits = _linear(x_hat, weights["classifier"])
    return {"y": y, "y_hat": y_hat, "x_hat": x_hat, "logits": logits}


# ---- loss pieces


def smooth_l1(a, b):
    """Elementwise, beta = 1: d^2/2 where |d| < 1, |d| - 1/2 elsewhere, d = a - b."""
    d = np.abs(_f64(a) - _f64(b))
    return np.where(d < 1.0, 0.5 * d * d, d - 0.5)


def distortion(a, b, kind, reduction):
    """D(a, b) of eq. (4) and (8), per sample: 'smooth_l1' or 'mse', 'mean' or 'sum' over the width."""
    a, b = _f64(a), _f64(b)
    assert a.ndim == 2
    assert a.shape == b.shape
    if kind == "smooth_l1":
        each = smooth_l1(a, b)
    elif kind == "mse":
        each = (a - b) ** 2
    else:
        raise ValueError(kind)
    if reduction == "sum":
        return each.sum(axis=1)
    if reduction == "mean":
        return each.sum(axis=1) / each.shape[1]
    raise ValueError(reduction)


def cross_entropy(logits, labels):
    """CE(y, V) = -log softmax(logits)[y], per sample (eq. (5), (9))."""
    logits = _f64(logits)
    labels = np.asarray(labels)
    assert labels.shape == (logits.shape[0],)
    return np.array([-_log_softmax(logits[i])[int(labels[i])] for i in range(logits.shape[0])])


def kl(student_logits, source_logits, temperature):
    """T^2 KL(softmax(source/T) || softmax(student/T)), summed over the classes, per sample."""
    student, source, t = _f64(student_logits), _f64(source_logits), float(temperature)
    assert student.shape == source.shape
    out = np.empty(student.shape[0])
    for i in range(student.shape[0]):
        log_p = _log_softmax(source[i] / t)
        log_q = _log_softmax(student[i] / t)
        out[i] = t * t * (np.exp(log_p) * (log_p - log_q)).sum()
    return out


# ---- stage A


def stage_a_loss(
    x, labels, teacher_logits, weights, density, noise, R, ce_weight, kl_weight, temperature, kind, reduction
):
    """Eq. (4): R D(X, Xhat) - log q(Yhat);  eq. (5): + ce_weight CE(y, V_RDM) + kl_weight T^2 KL(V_T || V_RDM).

    'loss' is the whole; 'rate', 'distortion', 'ce' and 'kl' are WITHOUT R, ce_weight and kl_weight (the kl has
    its T^2).  No classifier: ce = kl = 0.  noise None rounds (validation).
    """
    x = _f64(x)
    out = rdm_forward(x, weights, noise)
    nats = rate(out["y_hat"], *_density(density))
    d = distortion(out["x_hat"], x, kind, reduction)
    ce, kl_teacher = np.zeros(x.shape[0]), np.zeros(x.shape[0])
    if out["logits"] is not None:
        ce = cross_entropy(out["logits"], labels)
        if teacher_logits is not None:
            kl_teacher = kl(out["logits"], teacher_logits, temperature)
    loss = ce_weight * ce + kl_weight * kl_teacher + R * d + nats
    return {"loss": loss, "rate": nats, "distortion": d, "ce": ce, "kl": kl_teacher}


# ---- stage B


def stage_b_loss(
    features, noise, gain, head, projector, density, teacher_features, teacher_logits, modules, labels, settings, keep
):
    """Eq. (8) and (9), per sample, every loss already times its weight and mask:

        ce         ce_weight CE(y, V_S)
        kl         kl_weight m_0 T^2 KL(V_T || V_S)
        kl_modules kl_weight sum_n m_n lambda_n T^2 KL(V_n || V_S)
        embedding  embedding_weight [ m_0 D(U, X) + sum_n m_n lambda_n D(U, Xhat_n) ],  D a mean over the width
        rate       rate_weight (-log r(gain W + u))
        total      the sum of the five

    Channel: the head and the projector see W + u/gain, the density sees gain W + u.  noise None is u = 0.
    gain: a scalar, or one per channel.  projector: None (identity), or (W, b), or (W, None).
    modules: RDM weights, run with rounding; keep = (m_0, m_1, .., m_N).
    settings: ce_weight, kl_weight, module_weights, embedding_weight, rate_weight, temperature, and the kind of
    distortion under 'distortion' (or 'kind').
    """
    w = _f64(features)
    x = _f64(teacher_features)
    u = np.zeros_like(w) if noise is None else _f64(noise)
    gain = _f64(gain)
    keep = _f64(keep)
    count = len(modules)
    lambdas = [float(value) for value in settings["module_weights"]]
    assert u.shape == w.shape
    assert keep.shape == (1 + count,)
    assert len(lambdas) == count
    temperature = settings["temperature"]
    kind = settings["distortion"] if "distortion" in settings else settings["kind"]

    decoder_input = w + u / gain
    logits = _linear(decoder_input, head)
    embedding_hat = decoder_input if projector is None else _linear(decoder_input, projector)

    ce = settings["ce_weight"] * cross_entropy(logits, labels)
    kl_teacher = np.zeros(w.shape[0])
    if teacher_logits is not None:
        kl_teacher = settings["kl_weight"] * keep[0] * kl(logits, teacher_logits, temperature)

    kl_modules = np.zeros(w.shape[0])
    distances = keep[0] * distortion(embedding_hat, x, kind, "mean")
    for n in range(count):
        module = rdm_forward(x, modules[n])
        share = keep[1 + n] * lambdas[n]
        distances = distances + share * distortion(embedding_hat, module["x_hat"], kind, "mean")
        if module["logits"] is not None:
            kl_modules = kl_modules + settings["kl_weight"] * share * kl(logits, module["logits"], temperature)
    embedding = settings["embedding_weight"] * distances

    nats = np.zeros(w.shape[0])
    if density is not None:
        nats = settings["rate_weight"] * rate(gain * w + u, *_density(density))

    total = ce + kl_teacher + kl_modules + embedding + nats
    return {
        "logits": logits,
        "ce": ce,
        "kl": kl_teacher,
        "kl_modules": kl_modules,
        "embedding": embedding,
        "rate": nats,
        "total": total,
    }


# ---- guide


def guided_total(losses, w):
    """With the guide's weight w_i on 'embedding' and 'kl_modules' (rho_i = w_i); ce, kl, rate unweighted.

    Per sample; the batch loss divides by B, not by sum(w)."""
    w = _f64(w)
    assert w.shape == losses["ce"].shape
    return losses["ce"] + losses["kl"] + losses["rate"] + w * (losses["embedding"] + losses["kl_modules"])
