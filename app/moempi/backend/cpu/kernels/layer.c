/* Layers and their parts: the calls of the other files, one after another, on rows in scratch memory.
 *
 * begin_attention   norm, queries, keys and values, norms of heads, rotation, keys and values into the cache
 * end_attention     output, sum with the residual stream, norm
 * compute_experts   router, choice, SwiGLU networks of the chosen experts, weighted sums plus addends
 * compute_layers    all of these for adjacent layers
 *
 * The bits are those of the separate calls. Twin: the verbs that `model.Attention` and `model.MixtureOfExperts` call.
 */
#include "kernels.h"
#include "simd.h"

/* The next `bytes` bytes of memory from `at` on, whose end is moved; only an address if there is no memory yet. */
static void *take(size_t *at, long bytes) {
    size_t here = *at;
    *at = here + ((size_t)bytes + 63) / 64 * 64;
    return (void *)here;
}

static float *take_numbers(size_t *at, long count) { return take(at, (long)sizeof(float) * count); }

static long product_scratch(const matrix *m, long rows) { return rows * (m->inputs + row_scratch()); }

static void multiply_all(const product *products, long count, float *scratch) {
    multiply(products, count, scratch, 0, product_tasks(products, count));
}

/* Rows by a matrix; `narrow` rows have bfloat16 values. */
static product product_of(const matrix *m, const float *x, float *out, long rows, int narrow, int rounded) {
    product p = {x, m->packed, m->bias, out, NULL, rows, m->inputs, m->outputs, m->inputs, m->outputs, m->weights,
                 narrow, rounded};
    return p;
}

/* The scratch memory of an attention. */
typedef struct {
    float *normed, *qkv, *products;
} attention_memory;

static attention_memory lay_out_attention(const attention_layer *l, long rows, size_t *at) {
    attention_memory m;
    m.normed = take_numbers(at, rows * l->qkv.inputs);
    m.qkv = take_numbers(at, rows * l->qkv.outputs);
    m.products = take_numbers(at, largest(product_scratch(&l->qkv, rows), product_scratch(&l->output, rows)));
    return m;
}

/* Bytes of scratch memory. */
long attention_scratch(const attention_layer *l, long rows) {
    size_t end = 0;
    lay_out_attention(l, rows, &end);
    return (long)end;
}

/* The heads from number `first` of each row of qkv on, normalized and rotated. */
static rotation rotation_of(const attention_layer *l, const attention_rows *a, const float *x, const norm_weights *n,
                            long heads) {
    rotation r = {0};
    r.x = x, r.rows = a->rows, r.heads = heads, r.dim = l->dim, r.stride = l->qkv.outputs;
    r.cosine = a->cosine, r.sine = a->sine, r.pairs = a->pairs, r.interleaved = l->interleaved;
    r.weight = n->weight, r.eps = n->eps, r.quotient_rounded = n->quotient_rounded, r.rounded = l->is_bfloat16;
    r.cached = a->cached, r.is_bfloat16 = l->is_bfloat16;
    return r;
}

/* Write the scaled queries to `queries`, and keys and values to the cache. */
void begin_attention(const attention_layer *l, const attention_rows *a) {
    size_t at = (size_t)a->scratch;
    attention_memory m = lay_out_attention(l, a->rows, &at);
    long width = l->qkv.inputs, of_queries = l->heads * l->dim, of_keys = l->kv_heads * l->dim;
    norm before = {a->x, NULL, l->before.weight, NULL, m.normed, a->rows, 1, width, width, l->before.eps,
                   l->before.quotient_rounded, l->is_bfloat16};
    normalize_rows(&before);
    product qkv = product_of(&l->qkv, m.normed, m.qkv, a->rows, l->is_bfloat16, l->is_bfloat16);
    multiply_all(&qkv, 1, m.products);
    rotation queries = rotation_of(l, a, m.qkv, &l->of_queries, l->heads);
    queries.out = a->queries;
    rotate_rows(&queries);
    rotation keys = rotation_of(l, a, m.qkv + of_queries, &l->of_keys, l->kv_heads);
    keys.cache = a->keys;
    rotate_rows(&keys);
    rotation values = rotation_of(l, a, m.qkv + of_queries + of_keys, &(norm_weights){0}, l->kv_heads);
    values.cache = a->values, values.cosine = values.sine = NULL;
    rotate_rows(&values);
    for (long i = 0; i < a->rows * of_queries; i++)
        a->queries[i] *= l->scale;
}

/* Write `sum` and `out`, once `attended` is computed. */
void end_attention(const attention_layer *l, const attention_rows *a) {
    size_t at = (size_t)a->scratch;
    attention_memory m = lay_out_attention(l, a->rows, &at);
    long width = l->output.outputs;
    product output = product_of(&l->output, a->attended, m.normed, a->rows, l->is_bfloat16, l->is_bfloat16);
    multiply_all(&output, 1, m.products);
    norm after = {a->x, m.normed, l->after.weight, a->sum, a->out, a->rows, 1, width, width, l->after.eps,
                  l->after.quotient_rounded, l->is_bfloat16};
    normalize_rows(&after);
}

/* The scratch memory of the experts; the choices (rows * top_k) are sorted by expert. */
typedef struct {
    float *logits, *scores, *gate_up, *hidden, *outputs, *products;
    int64_t *source_rows; /* the row of each choice */
    int64_t *output_rows; /* (rows, top_k): where each choice is */
    int64_t *ends;        /* (num,): the end of each expert's choices */
    product *described;
} experts_memory;

static experts_memory lay_out_experts(const experts_layer *l, long rows, size_t *at) {
    experts_memory m;
    long choices = rows * l->top_k, bytes = (long)sizeof(int64_t);
    long of_experts = largest(product_scratch(&l->gate_up, choices), product_scratch(&l->down, choices));
    m.logits = take_numbers(at, rows * l->num);
    m.scores = take_numbers(at, 4 * rows * l->num);
    m.gate_up = take_numbers(at, choices * l->gate_up.outputs);
    m.hidden = take_numbers(at, choices * l->down.inputs);
    m.outputs = take_numbers(at, choices * l->down.outputs);
    m.products = take_numbers(at, largest(of_experts, product_scratch(&l->router, rows)));
    m.source_rows = take(at, bytes * choices);
    m.output_rows = take(at, bytes * choices);
    m.ends = take(at, bytes * l->num);
    m.described = take(at, (long)sizeof(product) * smallest(choices, l->num));
    return m;
}

/* Bytes of scratch memory. */
long experts_scratch(const experts_layer *l, long rows) {
    size_t end = 0;
    lay_out_experts(l, rows, &end);
    return (long)end;
}

/* Choose experts and weights from the logits of the router. */
static void choose(const experts_layer *l, const experts_rows *r, const experts_memory *m) {
    product router = product_of(&l->router, r->x, m->logits, r->rows, l->is_bfloat16, 0);
    multiply_all(&router, 1, m->products);
    choice c = {m->logits, l->correction, m->scores, r->experts, r->weights, r->rows, l->num, l->top_k, l->num_groups,
                l->kept_groups, l->scores_of_group, l->scoring, l->renormalize, l->rounds_logits, l->rounds_weights,
                l->least_sum, l->scaling};
    choose_experts(&c);
}

/* Sort the choices by expert, those of an expert by row, and add their numbers to the load. */
static void sort_choices(const experts_layer *l, const experts_rows *r, const experts_memory *m) {
    long choices = r->rows * l->top_k, first = 0;
    memset(m->ends, 0, sizeof(int64_t) * (size_t)l->num);
    for (long i = 0; i < choices; i++)
        m->ends[r->experts[i]]++;
    for (long e = 0; e < l->num; e++) {
        long count = m->ends[e];
        r->load[e] += count;
        m->ends[e] = first; /* it moves to the end while choices are placed */
        first += count;
    }
    for (long i = 0; i < choices; i++) {
        long place = m->ends[r->experts[i]]++;
        m->output_rows[i] = place;
        m->source_rows[place] = i / l->top_k;
    }
}

/* The products of the choices with matrices of their experts: gate_up of rows of x, or down of rows of `hidden`. */
static void multiply_choices(const experts_layer *l, const experts_rows *r, const experts_memory *m, int is_down) {
    long first = 0, count = 0;
    for (long e = 0; e < l->num; first = m->ends[e++]) {
        const expert *own = l->experts + e;
        matrix w = is_down ? l->down : l->gate_up;
        if (m->ends[e] == first)
            continue;
        w.packed = is_down ? own->down : own->gate_up;
        w.bias = is_down ? own->down_bias : own->gate_up_bias;
        const float *x = is_down ? m->hidden + first * w.inputs : r->x;
        float *out = (is_down ? m->outputs : m->gate_up) + first * w.outputs;
        product p = product_of(&w, x, out, m->ends[e] - first, l->is_bfloat16, l->is_bfloat16);
        p.index = is_down ? NULL : m->source_rows + first;
        m->described[count++] = p;
    }
    multiply_all(m->described, count, m->products);
}

void compute_experts(const experts_layer *l, const experts_rows *r) {
    size_t at = (size_t)r->scratch;
    experts_memory m = lay_out_experts(l, r->rows, &at);
    choose(l, r, &m);
    sort_choices(l, r, &m);
    multiply_choices(l, r, &m, 0);
    activation a = {m.gate_up, m.hidden, r->rows * l->top_k, l->down.inputs, l->clamped, l->is_bfloat16, l->limit, l->alpha};
    activate_rows(&a);
    multiply_choices(l, r, &m, 1);
    combination c = {m.outputs, m.output_rows, r->weights, {r->addends[0], r->addends[1]}, r->out, r->rows, l->top_k,
                     l->down.outputs, 0, l->is_bfloat16};
    combine_rows(&c);
}

/* The scratch memory of layers, one after another. */
typedef struct {
    float *queries, *attended, *sum, *normed;
    void *part; /* of an attention, then of experts */
} layers_memory;

static layers_memory lay_out_layers(const layer *layers, long count, long rows, size_t *at) {
    layers_memory m;
    const attention_layer *first = layers->attention;
    long of_heads = rows * first->heads * first->dim, of_rows = rows * first->qkv.inputs, bytes = 0;
    m.queries = take_numbers(at, of_heads);
    m.attended = take_numbers(at, of_heads);
    m.sum = take_numbers(at, of_rows);
    m.normed = take_numbers(at, of_rows);
    for (const layer *l = layers; l < layers + count; l++)
        bytes = largest(bytes, largest(attention_scratch(l->attention, rows), experts_scratch(l->experts, rows)));
    m.part = take(at, bytes);
    return m;
}

/* Bytes of scratch memory. */
long layers_scratch(const layer *layers, long count, long rows) {
    size_t end = 0;
    lay_out_layers(layers, count, rows, &end);
    return (long)end;
}

/* Layer number `i` for rows x of the residual stream; `out` may be x. */
static void compute_layer(const layer *l, const layers_rows *r, const layers_memory *m, const float *x, long i) {
    const attention_layer *of = l->attention;
    attention_rows rows = {x, r->cosine, r->sine, l->keys, l->values, r->cached, m->queries, m->attended, m->sum,
                           m->normed, m->part, r->rows, r->pairs};
    attention a = {m->queries, l->keys, l->values, m->attended, r->segments, r->pages, l->sinks, r->num_segments,
                   of->heads, of->kv_heads, of->dim, of->dim, of->dim, l->window, r->first_tasks, of->is_bfloat16,
                   of->is_bfloat16};
    begin_attention(of, &rows);
    attend(&a, 0, r->first_tasks[r->num_segments]);
    end_attention(of, &rows);
    long choices = r->rows * l->experts->top_k;
    experts_rows chosen = {m->normed, {m->sum, NULL}, r->out, r->experts + i * choices, r->weights + i * choices,
                           r->loads[i], m->part, r->rows};
    compute_experts(l->experts, &chosen);
}

/* Write `out`, the residual stream behind `count` layers, which have equal numbers of heads, experts and choices. */
void compute_layers(const layer *layers, long count, const layers_rows *r) {
    size_t at = (size_t)r->scratch;
    layers_memory m = lay_out_layers(layers, count, r->rows, &at);
    for (long i = 0; i < count; i++)
        compute_layer(layers + i, r, &m, i ? r->out : r->x, i);
}
