/* Stage 2 for one head that fits the cache of a core: forward, gradient by hand and update in one sweep over a batch.

Included once for each instruction set and precision, with REAL, INT (a signed integer as wide as REAL), BYTES of a
vector, ROWS × COLS of a register tile (COLS in vectors) and NAME(x) defined. Classes lie along vectors: the weight is
kept as (D, P), P being C padded to whole vectors; padding has weight 0 and bias −1e30, so its probability is exactly 0.

Formulas: IWB (AAAI 2024) Eq. 3–10 and their gradients as engine/norm_gradient.py states them. */

#ifndef PIPELINE_HEAD
#define PIPELINE_HEAD
enum { SOFTMAX, BCE };
enum { KL, MSE };
enum { NORMS_TO_TARGET, TARGET_TO_NORMS };
enum { VECTOR, SCALAR, NONE };

/* One head; arrays of REAL: weight, velocity (D, P), the others (P). The same fields as HEAD in c_backend.py. */
struct head {
    void *weight, *velocity, *bias, *bias_velocity, *half_target, *class_weight, *prior;
    double kl_weight;
    int32_t penalised, summed, loss, by_sum, divergence, direction, hardness, moving;
};
#endif

typedef REAL NAME(vec) __attribute__((vector_size(BYTES)));
typedef INT NAME(ints) __attribute__((vector_size(BYTES)));
typedef uint32_t NAME(bits) __attribute__((vector_size(BYTES)));
typedef REAL NAME(loose) __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
#define VEC NAME(vec)
#define INTS NAME(ints)
#define BITS NAME(bits)
#define LANES ((long)(BYTES / sizeof(REAL)))
#define TINY (sizeof(REAL) == 4 ? (REAL)1.17549435e-38 : (REAL)2.2250738585072014e-308)
#define EPSILON (sizeof(REAL) == 4 ? (REAL)1.1920929e-07 : (REAL)2.220446049250313e-16)

INLINE VEC NAME(load)(const REAL *from) { return *(const NAME(loose) *)from; }
INLINE void NAME(store)(REAL *to, VEC value) { *(NAME(loose) *)to = value; }
INLINE VEC NAME(select)(INTS mask, VEC a, VEC b) { return (VEC)((mask & (INTS)a) | (~mask & (INTS)b)); }
INLINE VEC NAME(larger)(VEC a, VEC b) { return NAME(select)(a > b, a, b); }

INLINE REAL NAME(sum_of)(VEC v) {
    REAL sum = 0;
    for (long i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

INLINE REAL NAME(largest_of)(VEC v) {
    REAL most = v[0];
    for (long i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

/* e^x for x ≤ 0, to 1 ulp; 0 below −60, whose share of a probability float32 cannot show */
INLINE VEC NAME(exponential)(VEC x) {
#if SINGLE
    const REAL magic = 12582912.0f; /* 1.5·2^23: adding it rounds to an integer, in the low bits */
    VEC shifted = x * 1.44269504f + magic;
    VEC n = shifted - magic;
    VEC r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    VEC p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    VEC scaled = (VEC)((BITS)p + ((BITS)shifted << 23)); /* unsigned: padding may wrap around, and is masked out */
    return NAME(select)(x < -60.0f, x - x, scaled);
#else
    VEC y;
    for (long i = 0; i < LANES; i++) y[i] = exp(x[i]);
    return y;
#endif
}

/* sum[m][v] += Σ_k a[m·row_step + k·step] · b[k·stride + v], the one matrix product that a step does twice */
INLINE void NAME(accumulate)(const int rows, const int cols, const REAL *a, long row_step, long step, const REAL *b,
                             long stride, long count, VEC sum[ROWS][COLS]) {
    for (long k = 0; k < count; k++) {
        VEC right[COLS];
        UNROLL for (int v = 0; v < cols; v++) right[v] = NAME(load)(b + k * stride + v * LANES);
        UNROLL for (int m = 0; m < rows; m++) {
            REAL left = a[m * row_step + k * step];
            UNROLL for (int v = 0; v < cols; v++) sum[m][v] += left * right[v];
        }
    }
}

/* logits (rows, P) of a batch: features · weight + bias */
INLINE void NAME(logits_tile)(const int rows, const int cols, const struct head *h, const struct block *k,
                              const REAL *features, REAL *logits, long c) {
    VEC sum[ROWS][COLS];
    UNROLL for (int v = 0; v < cols; v++) {
        VEC bias = NAME(load)((REAL *)h->bias + c + v * LANES);
        UNROLL for (int m = 0; m < rows; m++) sum[m][v] = bias;
    }
    NAME(accumulate)(rows, cols, features, k->width, 1, (REAL *)h->weight + c, k->padded, k->width, sum);
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < cols; v++) NAME(store)(logits + m * k->padded + c + v * LANES, sum[m][v]);
}

/* gradient of a tile of the weight, straight into velocity, weight and the norms of the next step */
INLINE void NAME(update_tile)(const int rows, const int cols, const struct head *h, const struct block *k,
                              const REAL *features, const REAL *residual, long batch, const REAL *norm_factor, REAL *squares,
                              long d, long c) {
    VEC sum[ROWS][COLS];
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < cols; v++) sum[m][v] = (VEC){0};
    NAME(accumulate)(rows, cols, features + d, 1, k->width, residual + c, k->padded, batch, sum);
    REAL *weight = (REAL *)h->weight + d * k->padded + c, *velocity = (REAL *)h->velocity + d * k->padded + c;
    REAL momentum = k->momentum, rate = k->lr;
    UNROLL for (int v = 0; v < cols; v++) {
        VEC factor = NAME(load)(norm_factor + c + v * LANES), square = NAME(load)(squares + c + v * LANES);
        UNROLL for (int m = 0; m < rows; m++) {
            long at = m * k->padded + v * LANES;
            VEC w = NAME(load)(weight + at);
            VEC moved = NAME(load)(velocity + at) * momentum + sum[m][v] + factor * w;
            NAME(store)(velocity + at, moved);
            w -= rate * moved;
            NAME(store)(weight + at, w);
            square += w * w;
        }
        NAME(store)(squares + c + v * LANES, square);
    }
}

#define LESS(a, b) ((a) < (b) ? (a) : (b))
#define OVER_ROWS(total, cols, TILE)                                     \
    {                                                                    \
        long i = 0;                                                      \
        for (; i + ROWS <= (total); i += ROWS) TILE(ROWS, cols);         \
        for (; i + 4 <= (total); i += 4) TILE(4, cols);                  \
        for (; i < (total); i++) TILE(1, cols);                          \
    }
#define OVER_TILES(total, TILE)                                                                          \
    for (long c = from, vectors = (to - from) / LANES, tiles = (vectors + COLS - 1) / COLS; tiles; tiles--) { \
        long cols = (vectors + tiles - 1) / tiles; /* as even as can be */                               \
        if (cols == 1) OVER_ROWS(total, 1, TILE)                                                         \
        else if (cols == 2) OVER_ROWS(total, LESS(2, COLS), TILE)                                        \
        else if (cols == 3) OVER_ROWS(total, LESS(3, COLS), TILE)                                        \
        else OVER_ROWS(total, COLS, TILE)                                                                \
        c += cols * LANES, vectors -= cols;                                                              \
    }

#define LOGITS(rows, cols) NAME(logits_tile)(rows, cols, h, k, features + i * k->width, logits + i * k->padded, c)
static void NAME(logits)(const struct head *h, const struct block *k, const REAL *features, REAL *logits, long batch,
                         long from, long to) {
    OVER_TILES(batch, LOGITS)
}

#define UPDATE(rows, cols) NAME(update_tile)(rows, cols, h, k, features, residual, batch, norm_factor, squares, i, c)
static void NAME(update)(const struct head *h, const struct block *k, const REAL *features, const REAL *residual,
                         long batch, const REAL *norm_factor, REAL *squares, long from, long to) {
    OVER_TILES(k->width, UPDATE)
}

/* p (P) = softmax of z (P) */
INLINE void NAME(softmax)(const REAL *z, REAL *p, long padded) {
    VEC most = NAME(load)(z);
    for (long c = LANES; c < padded; c += LANES) most = NAME(larger)(NAME(load)(z + c), most);
    REAL top = NAME(largest_of)(most);
    VEC total = {0};
    for (long c = 0; c < padded; c += LANES) {
        VEC e = NAME(exponential)(NAME(load)(z + c) - top);
        NAME(store)(p + c, e);
        total += e;
    }
    REAL scale = 1 / NAME(sum_of)(total);
    for (long c = 0; c < padded; c += LANES) NAME(store)(p + c, NAME(load)(p + c) * scale);
}

static void NAME(log_softmax)(const REAL *z, REAL *p, long classes) {
    REAL top = z[0], total = 0;
    for (long c = 1; c < classes; c++) top = z[c] > top ? z[c] : top;
    for (long c = 0; c < classes; c++) total += REAL_EXP(z[c] - top);
    top += REAL_LOG(total);
    for (long c = 0; c < classes; c++) p[c] = z[c] - top;
}

/* Arrays of one thread in a step, all (P): the first four are sums over its samples, then over the threads of a team. */
struct NAME(part) {
    REAL *slope;                     /* ∂loss/∂bias */
    REAL *mean;                      /* of W_c·x_i/|x_i|, or of q_ic */
    REAL *along;                     /* of ∂L/∂g_ic · g_ic: what a moving target adds along W_c */
    REAL *cosine;                    /* [0]: of the cosine with the true class */
    REAL *norms, *share, *log_share; /* n, softmax(n), its logarithm */
    REAL *norm_factor, *row, *target, *edge; /* factor of W_c in the gradient; of one sample: residual, P_i, ∂L/∂P_i */
    REAL *inverse, *factor, *cosines; /* 1/n; ∂L/∂P → ∂L/∂g/n; of one sample: g_i */
    REAL scale;                      /* kl_weight, times the batch where it is summed */
};
enum { NAME(SUMS) = 4, NAME(ARRAYS) = 18 }; /* the last SUMS hold those of the whole team */

/* ∂L/∂g_i into residual for a target that moves with W; the mean of q for the direction that needs it */
static void NAME(target_of_sample)(const struct head *h, const struct block *k, struct NAME(part) *s, const REAL *z,
                                   REAL *residual, REAL inverse, REAL cosine, long label) {
    const REAL *bias = h->bias, *half = h->half_target;
    REAL *p = s->target, *e = s->edge, *g = s->cosines;
    long classes = k->classes;
    for (long c = 0; c < k->padded; c += LANES) {
        VEC b = NAME(load)(bias + c), of_class = (VEC){0} + (h->hardness == SCALAR ? cosine : (REAL)-1);
        if (h->hardness == VECTOR) of_class = (NAME(load)(z + c) - b) * inverse * NAME(load)(s->inverse + c);
        NAME(store)(g + c, of_class);
        VEC value = NAME(load)(half + c) * (1 - of_class);
        NAME(store)(p + c, NAME(select)(b < (REAL)-1e29, b, value)); /* padding stays without probability */
    }
    if (h->divergence == MSE) {
        for (long c = 0; c < classes; c++) e[c] = (p[c] - s->norms[c]) * 2 / classes;
    } else {
        NAME(softmax)(p, e, k->padded);
        if (h->direction == TARGET_TO_NORMS)
            for (long c = 0; c < classes; c++) s->mean[c] += e[c];
        if (!h->moving) return;
        if (h->direction == TARGET_TO_NORMS) {
            REAL kl = 0;
            NAME(log_softmax)(p, p, classes);
            for (long c = 0; c < classes; c++) kl += e[c] * (p[c] - s->log_share[c]);
            for (long c = 0; c < classes; c++) e[c] *= p[c] - s->log_share[c] - kl;
        } else {
            for (long c = 0; c < k->padded; c += LANES) NAME(store)(e + c, NAME(load)(e + c) - NAME(load)(s->share + c));
        }
    }
    if (!h->moving) return;
    if (h->hardness == VECTOR) {
        for (long c = classes; c < k->padded; c++) e[c] = 0;
        for (long c = 0; c < k->padded; c += LANES) {
            VEC edge = NAME(load)(e + c) * NAME(load)(s->factor + c);
            NAME(store)(residual + c, NAME(load)(residual + c) + edge * inverse);
            NAME(store)(s->along + c, NAME(load)(s->along + c) + edge * NAME(load)(g + c));
        }
    } else { /* all targets of a sample depend on its one cosine, with its true class */
        REAL edge = 0;
        for (long c = 0; c < classes; c++) edge += e[c] * s->factor[c] * s->norms[c];
        edge *= s->inverse[label];
        residual[label] += edge * inverse;
        s->along[label] += edge * cosine;
    }
}

/* norm_factor (P): factor of W_c in the gradient, from the gathered sums; weight decay comes on top of it */
static void NAME(norm_factors)(const struct head *h, const struct block *k, struct NAME(part) *s, long batch) {
    const REAL *half = h->half_target;
    REAL total = 0, *norm_factor = s->norm_factor;
    for (long c = 0; c < k->classes; c++) {
        REAL n = s->norms[c];
        if (h->divergence == KL && h->direction == TARGET_TO_NORMS) {
            norm_factor[c] = s->share[c] - s->mean[c] / batch;
            continue;
        }
        REAL cosine = h->hardness == VECTOR   ? s->mean[c] / n / batch
                      : h->hardness == SCALAR ? s->cosine[0] / batch
                                              : -1;
        norm_factor[c] = n - half[c] * (1 - cosine);
        if (h->divergence == MSE)
            norm_factor[c] *= (REAL)2 / k->classes;
        else
            total += s->share[c] * norm_factor[c];
    }
    for (long c = 0; c < k->classes; c++) {
        if (h->divergence == KL && h->direction == NORMS_TO_TARGET) norm_factor[c] = s->share[c] * (norm_factor[c] - total);
        norm_factor[c] = (norm_factor[c] * s->scale - s->along[c]) / s->norms[c];
    }
}

/* From logits to ∂loss/∂logits, in place, for samples from … to − 1, with the sums that the penalty needs of them. */
static void NAME(residuals)(const struct head *h, const struct block *k, struct NAME(part) *s, REAL *logits,
                            const int32_t *labels, const REAL *inverse_norms, long batch, long from, long to) {
    const REAL *class_weight = h->class_weight, *bias = h->bias;
    long padded = k->padded;
    REAL total_weight = batch;
    if (h->by_sum) {
        total_weight = 0;
        for (long i = 0; i < batch; i++) total_weight += class_weight[labels[i]];
    }
    int linear_mean = h->penalised && h->hardness == VECTOR && !(h->divergence == KL && h->direction == TARGET_TO_NORMS);
    int each = h->penalised && (h->moving || (h->divergence == KL && h->direction == TARGET_TO_NORMS));
    REAL *slope = s->slope, inverses = 0;
    for (long i = from; i < to; i++) {
        REAL *z = logits + i * padded, weight = class_weight[labels[i]] / total_weight, cosine = 0;
        REAL inverse = inverse_norms[i], *r = each ? s->row : z;
        long label = labels[i];
        if (h->penalised && h->hardness == SCALAR) {
            cosine = (z[label] - bias[label]) * inverse / s->norms[label];
            s->cosine[0] += cosine;
        }
        VEC most = NAME(load)(z);
        for (long c = LANES; c < padded; c += LANES) most = NAME(larger)(NAME(load)(z + c), most);
        REAL top = NAME(largest_of)(most);
        VEC total = {0};
        if (linear_mean)
            for (long c = 0; c < padded; c += LANES) {
                VEC value = NAME(load)(z + c), e = NAME(exponential)(value - top);
                NAME(store)(s->mean + c, NAME(load)(s->mean + c) + value * inverse);
                NAME(store)(r + c, e);
                total += e;
            }
        else
            for (long c = 0; c < padded; c += LANES) {
                VEC e = NAME(exponential)(NAME(load)(z + c) - top);
                NAME(store)(r + c, e);
                total += e;
            }
        REAL sum = NAME(sum_of)(total);
        if (h->loss == SOFTMAX) {
            REAL scale = weight / sum;
            r[label] -= sum;
            for (long c = 0; c < padded; c += LANES) {
                VEC value = NAME(load)(r + c) * scale;
                NAME(store)(r + c, value);
                NAME(store)(slope + c, NAME(load)(slope + c) + value);
            }
        } else { /* binary cross-entropy of the probabilities: ∂l/∂z = ratio − p·Σratio, ratio −1 or p/(1 − p) */
            REAL *ratio = s->target, share = 1 / sum, ratios;
            VEC all = {0};
            for (long c = 0; c < padded; c += LANES) {
                VEC p = NAME(load)(r + c) * share, q = p / NAME(larger)(1 - p, (VEC){0} + EPSILON);
                NAME(store)(r + c, p);
                NAME(store)(ratio + c, q);
            }
            ratio[label] = -1; /* before the sum: taken out of it afterwards, a sure label's would leave no digits */
            for (long c = 0; c < padded; c += LANES) all += NAME(load)(ratio + c);
            ratios = NAME(sum_of)(all);
            for (long c = 0; c < padded; c += LANES) {
                VEC value = weight * (NAME(load)(ratio + c) - NAME(load)(r + c) * ratios);
                NAME(store)(r + c, value);
                NAME(store)(slope + c, NAME(load)(slope + c) + value);
            }
        }
        if (each) {
            NAME(target_of_sample)(h, k, s, z, r, inverse, cosine, label);
            memcpy(z, r, padded * sizeof(REAL));
        }
        inverses += inverse;
    }
    if (linear_mean) /* the bias has no part in a cosine */
        for (long c = 0; c < k->classes; c++) s->mean[c] -= bias[c] * inverses;
}

static void NAME(norms)(const struct head *h, const struct block *k, struct NAME(part) *s, const REAL *squares,
                        long batch) {
    const REAL *half = h->half_target;
    for (long c = 0; c < k->padded; c++) {
        REAL n = REAL_SQRT(squares[c]);
        s->norms[c] = n > TINY ? n : TINY;
        s->inverse[c] = 1 / s->norms[c];
        s->factor[c] = -s->scale / batch * half[c] * s->inverse[c];
        s->target[c] = c < k->classes ? s->norms[c] : (REAL)-1e30;
    }
    NAME(softmax)(s->target, s->share, k->padded);
    if (h->direction == TARGET_TO_NORMS) NAME(log_softmax)(s->target, s->log_share, k->classes);
}

/* One step by one member of a team, which has a share of the classes in the products and of the samples in between.

scratch: squares of the norms (P), logits (B, P), then the arrays of every member. */
static void NAME(step)(const struct head *h, const struct block *k, const struct team *team, long first, long batch,
                       REAL *scratch) {
    const long padded = k->padded, vectors = padded / LANES, size = NAME(ARRAYS) * padded;
    const long from = vectors * team->rank / team->members * LANES;
    const long to = vectors * (team->rank + 1) / team->members * LANES;
    const REAL *features = (const REAL *)k->features + first * k->width;
    const REAL *inverse_norms = (const REAL *)k->inverse_norm + first;
    REAL *squares = scratch, *logits = squares + padded, *parts = logits + k->batch * padded;
    REAL *arrays_of_thread = parts + team->rank * size, *arrays[NAME(ARRAYS)];
    for (int i = 0; i < NAME(ARRAYS); i++) arrays[i] = arrays_of_thread + i * padded;
    struct NAME(part) s = {arrays[0],  arrays[1],  arrays[2],  arrays[3],
                           arrays[4],  arrays[5],  arrays[6],  arrays[7],
                           arrays[8],  arrays[9],  arrays[10], arrays[11],
                           arrays[12], arrays[13], h->summed ? h->kl_weight * batch : h->kl_weight};

    NAME(logits)(h, k, features, logits, batch, from, to);
    wait_for_team(team);
    memset(arrays_of_thread, 0, NAME(SUMS) * padded * sizeof(REAL));
    memset(s.norm_factor, 0, padded * sizeof(REAL));
    if (h->penalised) NAME(norms)(h, k, &s, squares, batch);
    NAME(residuals)(h, k, &s, logits, k->labels + first, inverse_norms, batch, batch * team->rank / team->members,
                    batch * (team->rank + 1) / team->members);
    wait_for_team(team);
    if (team->members > 1) { /* beside the sums of this thread, which others may still have to read */
        REAL *all = arrays_of_thread + (NAME(ARRAYS) - NAME(SUMS)) * padded;
        memcpy(all, parts, NAME(SUMS) * padded * sizeof(REAL));
        for (long m = 1; m < team->members; m++)
            for (long c = 0; c < NAME(SUMS) * padded; c++) all[c] += parts[m * size + c];
        s.slope = all, s.mean = all + padded, s.along = all + 2 * padded, s.cosine = all + 3 * padded;
    }
    if (h->penalised) NAME(norm_factors)(h, k, &s, batch);
    if (k->weight_decay)
        for (long c = 0; c < k->classes; c++) s.norm_factor[c] += (REAL)k->weight_decay;
    memset(squares + from, 0, (to - from) * sizeof(REAL));
    NAME(update)(h, k, features, logits, batch, s.norm_factor, squares, from, to);
    REAL *bias = h->bias, *velocity = h->bias_velocity, momentum = k->momentum, decay = k->weight_decay, rate = k->lr;
    const REAL *prior = h->prior; /* in the bias while fitting; it does not decay */
    for (long c = from; c < LESS(to, k->classes); c++) {
        velocity[c] = momentum * velocity[c] + s.slope[c] + decay * (bias[c] - prior[c]);
        bias[c] -= rate * velocity[c];
    }
}
/* Every batch of a block, by one member of the team that has the head; scratch as `scratch_size` says. */
static void NAME(advance)(const struct head *h, const struct block *k, const struct team *team, void *scratch) {
    const long vectors = k->padded / LANES;
    const long from = vectors * team->rank / team->members * LANES;
    const long to = vectors * (team->rank + 1) / team->members * LANES;
    REAL *squares = scratch;
    memset(squares + from, 0, (to - from) * sizeof(REAL));
    for (long d = 0; d < k->width; d++)
        for (long c = from; c < to; c += LANES) {
            VEC w = NAME(load)((REAL *)h->weight + d * k->padded + c);
            NAME(store)(squares + c, NAME(load)(squares + c) + w * w);
        }
    for (long first = 0; first < k->rows; first += k->batch)
        NAME(step)(h, k, team, first, LESS(k->batch, k->rows - first), scratch);
    wait_for_team(team); /* else the team of the next head could write into scratch that is still read */
}

#undef BYTES
#undef ROWS
#undef COLS
#undef NAME
#undef VEC
#undef INTS
#undef BITS
#undef LANES
#undef TINY
#undef EPSILON
#undef OVER_ROWS
#undef LESS
#undef OVER_TILES
#undef LOGITS
#undef UPDATE
