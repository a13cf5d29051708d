/* Calls every kernel with the same numbers and prints a hash of each result: equal lines are equal bits.
 *
 * tests/instructions.sh compares the lines of a build for each set of instructions.
 */
#include "kernels.h"
#include "threads.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state = 1;

static float number(void) { /* in [-2, 2), a bfloat16 value; some are small, so that sums are rounded */
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((int)(state >> 56) - 128) / (float)(64 << (state >> 48) % 8);
}

static float *numbers(long count) {
    float *made = aligned_alloc(64, ((size_t)count * sizeof(float) / 64 + 1) * 64);
    for (long i = 0; i < count; i++)
        made[i] = number();
    return made;
}

static uint16_t *halves(const float *from, long count) {
    uint16_t *made = aligned_alloc(64, ((size_t)count * sizeof(uint16_t) / 64 + 1) * 64);
    for (long i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        made[i] = (uint16_t)(bits >> 16);
    }
    return made;
}

static void print(const char *name, const void *result, size_t bytes) {
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ ((const unsigned char *)result)[i]) * 1099511628211u;
    printf("%-28s %016llx\n", name, (unsigned long long)hash);
}

static void print_product(long rows, long inputs, long outputs, int is_bfloat16, int narrow, int rounded) {
    float *x = numbers(rows * inputs), *w = numbers(inputs * outputs), *bias = numbers(outputs);
    long panel = panel_outputs(), panels = (outputs + panel - 1) / panel;
    void *packed = calloc((size_t)(panels * panel * (inputs + 1)), sizeof(float));
    pack(is_bfloat16 ? (void *)halves(w, inputs * outputs) : (void *)w, packed, inputs, outputs, 0, 0, is_bfloat16);
    float *out = numbers(rows * outputs), *scratch = calloc((size_t)(rows * (inputs + 1 + panel)), sizeof(float));
    product p = {x, packed, bias, out, NULL, rows, inputs, outputs, inputs, outputs, is_bfloat16, narrow, rounded};
    multiply(&p, 1, scratch, 0, product_tasks(&p, 1));
    char name[64];
    snprintf(name, sizeof name, "product %ld x %ld x %ld %d%d%d", rows, inputs, outputs, is_bfloat16, narrow, rounded);
    print(name, out, sizeof(float) * (size_t)(rows * outputs));
}

static void print_attention(long heads, long kv_heads, long dim, long window, int is_bfloat16) {
    long rows = 75, positions = 6 * 64;
    float *keys = numbers(positions * kv_heads * dim), *values = numbers(positions * kv_heads * dim);
    segment segments[] = {{0, 5, 60, 0}, {5, 70, 130, 2}};
    int32_t pages[] = {4, 0, 5, 1, 3, 2};
    float *out = numbers(rows * heads * dim);
    long chunk = chunk_queries(), shared = heads / kv_heads;
    int64_t tasks[] = {0, (5 * shared + chunk - 1) / chunk * kv_heads, 0};
    tasks[2] = tasks[1] + (70 * shared + chunk - 1) / chunk * kv_heads;
    attention a = {numbers(rows * heads * dim), is_bfloat16 ? (char *)halves(keys, positions * kv_heads * dim) : (char *)keys,
                   is_bfloat16 ? (char *)halves(values, positions * kv_heads * dim) : (char *)values, out, segments, pages,
                   numbers(heads), 2, heads, kv_heads, dim, dim, dim, window, tasks,
                   is_bfloat16, 0};
    attend(&a, 0, tasks[2]);
    char name[64];
    snprintf(name, sizeof name, "attention %ld/%ld x %ld %ld%s", heads, kv_heads, dim, window, is_bfloat16 ? " b" : "");
    print(name, out, sizeof(float) * (size_t)(rows * heads * dim));
}

static void print_selection(long heads, long dim, int is_bfloat16) {
    enum { ROWS = 75, TOP_K = 50, WIDTH = 256 };
    long positions = 6 * 64;
    float *keys = numbers(positions * dim);
    int64_t seen[ROWS], first_pages[ROWS];
    for (long row = 0; row < ROWS; row++)
        seen[row] = row < 5 ? 61 + row : 126 + row, first_pages[row] = row < 5 ? 0 : 2;
    int32_t pages[] = {4, 0, 5, 1, 3, 2}, chosen[ROWS * TOP_K];
    float *scores = calloc(ROWS * WIDTH, sizeof(float));
    selection s = {numbers(ROWS * heads * dim), numbers(ROWS * heads),
                   is_bfloat16 ? (char *)halves(keys, positions * dim) : (char *)keys, scores, chosen, seen, first_pages,
                   pages, ROWS, heads, dim, WIDTH, TOP_K, is_bfloat16};
    select_positions(&s);
    char name[64];
    snprintf(name, sizeof name, "selection %ld x %ld%s", heads, dim, is_bfloat16 ? " b" : "");
    print(name, chosen, sizeof chosen);
    print("  scores", scores, sizeof(float) * ROWS * WIDTH);
}

static void print_rows(long width, int rounded) {
    long rows = 7, heads = 3;
    float *x = numbers(rows * heads * width), *y = numbers(rows * width), *out = numbers(rows * heads * width);
    float *sum = numbers(rows * width), *weight = numbers(width);
    char name[64];
    snprintf(name, sizeof name, "norm %ld %d", width, rounded);
    norm n = {x, y, weight, sum, out, rows, 1, width, width, 1e-6f, rounded, rounded};
    normalize_rows(&n);
    print(name, out, sizeof(float) * (size_t)(rows * width));
    snprintf(name, sizeof name, "activation %ld %d", width, rounded);
    activation a = {numbers(rows * 2 * width), out, rows, width, rounded, rounded, 1.5f, 1.7f};
    activate_rows(&a);
    print(name, out, sizeof(float) * (size_t)(rows * width));
    snprintf(name, sizeof name, "rotation %ld %d", width, rounded);
    rotation r = {x, numbers(rows * width), numbers(rows * width), out, NULL, NULL, weight, rows, heads, width,
                  heads * width, width / 2, 1e-6f, rounded, rounded, rounded, 0};
    rotate_rows(&r);
    print(name, out, sizeof(float) * (size_t)(rows * heads * width));
    int64_t places[] = {3, 0, 4, 1, 6, 5, 2};
    float *cached = numbers(rows * heads * width);
    r.out = NULL, r.cache = (char *)cached, r.cached = places, r.is_bfloat16 = rounded;
    snprintf(name, sizeof name, "rotation into a cache %ld %d", width, rounded);
    rotate_rows(&r);
    print(name, cached, (rounded ? sizeof(uint16_t) : sizeof(float)) * (size_t)(rows * heads * width));
    for (int widens = 0; widens < 2; widens++) {
        gathering g = {widens ? (void *)halves(x, rows * width) : (void *)x, out, places, rows, width, widens,
                       !widens && rounded, sizeof(float)};
        snprintf(name, sizeof name, "gathering %ld %d %d", width, rounded, widens);
        gather_rows(&g);
        print(name, out, (g.narrows ? sizeof(uint16_t) : sizeof(float)) * (size_t)(rows * width));
    }
    int64_t output_rows[] = {0, 3, 6, 6, 1, 2, 5, 4, 0, 0};
    combination c = {rounded ? (void *)halves(x, rows * width) : (void *)x, output_rows, numbers(10), {y, sum}, out, 5, 2,
                     width, rounded, rounded};
    snprintf(name, sizeof name, "combination %ld %d", width, rounded);
    combine_rows(&c);
    print(name, out, sizeof(float) * (size_t)(5 * width));
}

static void print_angles(long pairs) {
    int64_t positions[] = {0, 1, 77, 4095, 131071, 1999999};
    float frequencies[pairs], *cosine = numbers(6 * pairs), *sine = numbers(6 * pairs);
    for (long p = 0; p < pairs; p++)
        frequencies[p] = 1 / (1 + (float)(p * p));
    angles a = {positions, frequencies, cosine, sine, 6, pairs, 1.2f};
    angle_rows(&a);
    print("cosines", cosine, sizeof(float) * (size_t)(6 * pairs));
    print("sines", sine, sizeof(float) * (size_t)(6 * pairs));
}

static void print_exponential_sums(long width) {
    long blocks = (width + 15) / 16;
    float *out = numbers(6 * blocks);
    exponential_sums e = {numbers(3 * width), out, out + 3 * blocks, 3, width, 16};
    sum_exponentials(&e);
    print("exponential sums", out, sizeof(float) * (size_t)(6 * blocks));
}

static void print_choices(int scoring, long groups) {
    long rows = 50, num = 32, top_k = 4;
    int32_t experts[200];
    float weights[200];
    choice c = {numbers(rows * num), numbers(num), numbers(4 * rows * num), experts, weights, rows, num, top_k, groups, 2, 2,
                scoring, 1, 0, 0, 1e-20f, 2.5f};
    choose_experts(&c);
    char name[64];
    snprintf(name, sizeof name, "choices %d %ld", scoring, groups);
    print(name, experts, sizeof experts);
    print("  weights", weights, sizeof weights);
}

/* A delta rule, or a state space with its skip connection and a bias of the convolution. */
static void print_recurrence(int is_space, long key_heads, long heads, long key_dim, long value_dim, int rounded) {
    long rows = 30, channels = 2 * key_heads * key_dim + heads * value_dim, states = 3, taps = 4;
    span spans[] = {{0, 20, 5, 2}, {20, 1, 0, 0}, {21, 9, 0, 1}};
    float *tail = numbers(states * (taps - 1) * channels), *mixed = numbers(rows * channels);
    convolution c = {numbers(rows * channels), numbers(taps * channels), is_space ? numbers(channels) : NULL, tail, mixed,
                     spans, 3, channels, taps, channels, rounded};
    convolve(&c);
    float *alpha = numbers(rows * heads), *memory = numbers(states * heads * key_dim * value_dim);
    for (long i = 0; i < rows * heads; i++)
        alpha[i] = (alpha[i] + 2) / 4;
    float *out = numbers(rows * heads * value_dim), *gated = numbers(rows * heads * value_dim);
    delta_rule r = {mixed, mixed + key_heads * key_dim, mixed + 2 * key_heads * key_dim, alpha, alpha,
                    is_space ? numbers(heads) : NULL, numbers(rows * key_heads * key_dim),
                    numbers(rows * key_heads * key_dim), memory, out, spans, 3, rows, key_heads, heads, key_dim, value_dim, channels,
                    rounded};
    apply_delta_rule(&r);
    gated_norm n = {out, numbers(rows * heads * value_dim), numbers(value_dim), gated, rows, heads, value_dim, 1e-6f,
                    rounded};
    normalize_gated(&n);
    char name[64];
    snprintf(name, sizeof name, "%s %ld/%ld x %ld %d", is_space ? "space" : "delta rule", heads, key_heads, key_dim, rounded);
    print(name, gated, sizeof(float) * (size_t)(rows * heads * value_dim));
    print("  convolution", mixed, sizeof(float) * (size_t)(rows * channels));
    print("  tail", tail, sizeof(float) * (size_t)(states * (taps - 1) * channels));
    print("  memory", memory, sizeof(float) * (size_t)(states * heads * key_dim * value_dim));
}

/* A matrix of random weights, packed. */
static matrix packed_matrix(long inputs, long outputs, int is_bfloat16) {
    long panel = panel_outputs(), panels = (outputs + panel - 1) / panel;
    float *w = numbers(inputs * outputs);
    for (long i = 0; i < inputs * outputs; i++)
        w[i] /= 4;
    char *packed = calloc((size_t)(panels * panel * (inputs + 1)), sizeof(float));
    pack(is_bfloat16 ? (void *)halves(w, inputs * outputs) : (void *)w, packed, inputs, outputs, 0, 0, is_bfloat16);
    matrix m = {packed, numbers(outputs), inputs, outputs, is_bfloat16};
    return m;
}

static void print_layer(long rows, int is_bfloat16) {
    enum { WIDTH = 50, HEADS = 4, KV_HEADS = 2, DIM = 24, HIDDEN = 37, EXPERTS = 6, TOP_K = 3, POSITIONS = 128 };
    norm_weights norms[4];
    for (int i = 0; i < 4; i++)
        norms[i] = (norm_weights){numbers(i % 3 ? DIM : WIDTH), 1e-6f, is_bfloat16};
    attention_layer l = {packed_matrix(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, is_bfloat16),
                         packed_matrix(HEADS * DIM, WIDTH, is_bfloat16), norms[0], norms[1], norms[2], norms[3],
                         HEADS, KV_HEADS, DIM, 0.3f, 0, is_bfloat16};
    int64_t cached[rows], load[EXPERTS] = {0};
    for (long row = 0; row < rows; row++)
        cached[row] = 3 + row;
    float *keys = calloc(POSITIONS * KV_HEADS * DIM, sizeof(float)), *values = calloc(POSITIONS * KV_HEADS * DIM, sizeof(float));
    float *sum = numbers(rows * WIDTH), *out = numbers(rows * WIDTH);
    attention_rows a = {numbers(rows * WIDTH), numbers(rows * 10), numbers(rows * 10), (char *)keys, (char *)values, cached,
                        numbers(rows * HEADS * DIM), numbers(rows * HEADS * DIM), sum, out,
                        aligned_alloc(64, (size_t)attention_scratch(&l, rows)), rows, 10};
    begin_attention(&l, &a);
    end_attention(&l, &a);
    char name[64];
    snprintf(name, sizeof name, "attention of a layer %ld %d", rows, is_bfloat16);
    print(name, a.queries, sizeof(float) * (size_t)(rows * HEADS * DIM));
    print("  keys", keys, POSITIONS * KV_HEADS * DIM * sizeof(float));
    print("  values", values, POSITIONS * KV_HEADS * DIM * sizeof(float));
    print("  sum", sum, sizeof(float) * (size_t)(rows * WIDTH));
    print("  norm", out, sizeof(float) * (size_t)(rows * WIDTH));
    expert experts[EXPERTS];
    matrix gate_up, down;
    for (int e = 0; e < EXPERTS; e++) {
        gate_up = packed_matrix(WIDTH, 2 * HIDDEN, is_bfloat16), down = packed_matrix(HIDDEN, WIDTH, is_bfloat16);
        experts[e] = (expert){gate_up.packed, down.packed, gate_up.bias, down.bias};
    }
    experts_layer of_experts = {packed_matrix(WIDTH, EXPERTS, is_bfloat16), gate_up, down, experts, NULL, EXPERTS, TOP_K,
                                1, 1, 1, SOFTMAX, 1, is_bfloat16, is_bfloat16, 1e-20f, 1, 0, 0, 0, is_bfloat16};
    int32_t chosen[rows * TOP_K];
    experts_rows r = {out, {numbers(rows * WIDTH), NULL}, sum, chosen, numbers(rows * TOP_K), load,
                      aligned_alloc(64, (size_t)experts_scratch(&of_experts, rows)), rows};
    compute_experts(&of_experts, &r);
    snprintf(name, sizeof name, "experts of a layer %ld %d", rows, is_bfloat16);
    print(name, sum, sizeof(float) * (size_t)(rows * WIDTH));
    print("  load", load, sizeof load);
    layer layers[2] = {{&l, &of_experts, (char *)keys, (char *)values, NULL, 0},
                       {&l, &of_experts, (char *)keys, (char *)values, numbers(HEADS), 9}};
    segment segments[] = {{0, rows, 3, 0}};
    int32_t pages[] = {0, 1}, of_layers[2 * rows * TOP_K];
    int64_t tasks[] = {0, (rows * HEADS / KV_HEADS + chunk_queries() - 1) / chunk_queries() * KV_HEADS};
    int64_t *loads[] = {load, load};
    layers_rows both = {sum, a.cosine, a.sine, cached, segments, pages, tasks, out, of_layers, numbers(2 * rows * TOP_K), loads,
                        aligned_alloc(64, (size_t)layers_scratch(layers, 2, rows)), rows, 10, 1};
    compute_layers(layers, 2, &both);
    snprintf(name, sizeof name, "layers %ld %d", rows, is_bfloat16);
    print(name, out, sizeof(float) * (size_t)(rows * WIDTH));
    print("  load", load, sizeof load);
}

int main(void) {
    use_threads(2);
    for (int is_bfloat16 = 0; is_bfloat16 < 2; is_bfloat16++) {
        for (long rows = 1; rows < 200; rows += rows < 14 ? 1 : 61)
            for (int narrow = 0; narrow <= is_bfloat16; narrow++)
                print_product(rows, 101, 70, is_bfloat16, narrow, rows % 2);
        print_product(25, 1700, 33, is_bfloat16, is_bfloat16, 0);
        for (long window = 0; window < 200; window += 90) {
            print_attention(4, 4, 32, window, is_bfloat16);
            print_attention(6, 2, 24, window, is_bfloat16);
        }
        print_selection(6, 40, is_bfloat16);
        print_selection(64, 128, is_bfloat16);
        for (long width = 8; width < 80; width += 23)
            print_rows(width, is_bfloat16);
        for (long rows = 1; rows < 40; rows += 12)
            print_layer(rows, is_bfloat16);
        for (int is_space = 0; is_space < 2; is_space++) {
            print_recurrence(is_space, 2, 6, 16, 32, is_bfloat16);
            print_recurrence(is_space, 1, 1, 5, 21, is_bfloat16);
        }
    }
    print_angles(64);
    for (long width = 10; width < 1000; width *= 7)
        print_exponential_sums(width);
    for (int scoring = SOFTMAX; scoring <= SOFTMAX_CHOSEN; scoring++)
        for (long groups = 1; groups <= 8; groups += 7)
            print_choices(scoring, groups);
    return 0;
}
