/* The calls of the kernels, which kernels.py makes: each is complete when it returns. */
#pragma once
#include <stdint.h>

/* product.c */
enum { FLOAT32, BFLOAT16, TILED }; /* how weights are packed; TILED: as BFLOAT16, for tiles if they can be used */

typedef struct {
    const float *x;     /* (rows, inputs); a row begins `x_stride` numbers after the last */
    const char *packed;
    const float *bias;  /* (outputs,), or NULL */
    float *out;         /* (rows, outputs), `out_stride` numbers apart */
    const int64_t *index; /* row t is x[index[t]]; NULL for the same row */
    long rows, inputs, outputs, x_stride, out_stride;
    int weights;        /* FLOAT32, BFLOAT16 or TILED */
    int narrow;         /* x has bfloat16 values */
    int rounded;        /* round the results to bfloat16 values */
} product;

long panel_outputs(void);
long row_scratch(void);
int request_tiles(void);
void pack(const void *w, void *packed, long inputs, long outputs, long first, int transposed, int weights);
int pairs_are_chains(void);
int pairs_are_faster(void);
int use_pairs(int choice);
long product_tasks(const product *products, long count);
void multiply(const product *products, long count, float *scratch, long first, long last);

/* attention.c */
typedef struct {
    long row, length, start, first_page; /* the sequence's pages begin at pages[first_page] */
} segment;

typedef struct {
    const float *queries; /* (rows, heads, dim), scaled */
    const char *keys, *values;
    float *out;           /* (rows, heads, value_dim) */
    const segment *segments;
    const int32_t *pages;
    const float *sinks;   /* (heads,), or NULL */
    long num_segments, heads, kv_heads, dim, value_dim;
    long value_stride;    /* numbers from one value to that of the next head */
    long window;          /* 0 for all positions */
    const int64_t *first_tasks; /* (num_segments + 1,): the first task of a segment: a chunk of queries of one head */
    int is_bfloat16;      /* the cache */
    int rounded;          /* round the results to bfloat16 values */
} attention;

long chunk_queries(void);
void attend(const attention *a, long first, long last);

/* selection.c */
typedef struct {
    const float *queries;    /* (rows, heads, dim) */
    const float *weights;    /* (rows, heads) */
    const char *keys;        /* the cache, of one head */
    float *scores;           /* scratch memory, (rows, width) */
    int32_t *positions;      /* (rows, top_k) */
    const int64_t *seen;     /* (rows,): positions that a row sees, more than top_k and at most width */
    const int64_t *first_pages; /* (rows,): the pages of a row's sequence begin at pages[first_pages[row]] */
    const int32_t *pages;
    long rows, heads, dim, width, top_k;
    int is_bfloat16;         /* the cache */
} selection;

void select_positions(const selection *s);

/* rows.c */
typedef struct {
    const float *x;      /* rows of `heads` vectors of `width` numbers; a row begins `stride` numbers after the last */
    const float *y;      /* added to x first, or NULL */
    const float *weight; /* (width,) */
    float *sum;          /* x + y, if there is a y */
    float *out;          /* (rows, heads, width) */
    long rows, heads, width, stride;
    float eps;
    int quotient_rounded, rounded;
} norm;

typedef struct {
    const float *gate_up; /* (rows, 2 * width) */
    float *out;           /* (rows, width) */
    long rows, width;
    int clamped, rounded;
    float limit, alpha;
} activation;

typedef struct {
    const float *x;              /* rows of `heads` vectors of `dim` numbers, `stride` numbers apart */
    const float *cosine, *sine;  /* (rows, pairs); NULL to copy */
    float *out;                  /* (rows, heads, dim), or NULL */
    char *cache;                 /* or rows of (heads, dim) numbers of a cache, row t at cached[t] */
    const int64_t *cached;
    const float *weight;         /* (dim,) of a norm that comes first, or NULL */
    long rows, heads, dim, stride, pairs;
    float eps;
    int quotient_rounded;        /* of the norm */
    int interleaved, rounded;
    int is_bfloat16;             /* the cache */
} rotation;

typedef struct {
    const void *from;     /* rows of `width` numbers */
    void *to;             /* (rows, width) */
    const int64_t *index; /* row t is from[index[t]]; NULL for the same row */
    long rows, width;
    int widens, narrows;  /* bfloat16 bits to float32; float32 of bfloat16 values to their bits */
    int bytes;            /* of a number that stays as it is */
} gathering;

typedef struct {
    const void *buffer;         /* rows of `width` numbers */
    const int64_t *output_rows; /* (rows, slots) */
    const float *weights;       /* (rows, slots) */
    const float *addends[2];    /* (rows, width), or NULL */
    float *out;                 /* (rows, width) */
    long rows, slots, width;
    int is_bfloat16;            /* the buffer */
    int rounded;
} combination;

typedef struct {
    const float *logits;   /* (rows, width) */
    float *highest, *sums; /* (rows, blocks): of each block of numbers the largest, and the sum of exp(x - largest) */
    long rows, width, block;
} exponential_sums;

typedef struct {
    const int64_t *positions;
    const float *frequencies;
    float *cosine, *sine; /* (rows, pairs) */
    long rows, pairs;
    float amplitude;
} angles;

void normalize_rows(const norm *n);
void activate_rows(const activation *a);
void rotate_rows(const rotation *r);
void gather_rows(const gathering *g);
void combine_rows(const combination *c);
void sum_exponentials(const exponential_sums *e);
void angle_rows(const angles *a);

/* delta_rule.c */
typedef struct {
    int64_t row, length, start, state; /* rows of a sequence from position `start` on; 0: its state begins with zeros */
} span;

typedef struct {
    const float *x;    /* rows of `channels` numbers, `stride` apart */
    const float *taps; /* (num_taps, channels), the last for the row itself */
    const float *bias; /* (channels,), or NULL */
    float *tail;       /* (states, num_taps - 1, channels): the last rows of each sequence */
    float *out;        /* (rows, channels) */
    const span *spans;
    long num_spans, channels, num_taps, stride;
    int rounded;
} convolution;

typedef struct {
    const float *queries, *keys, *values; /* of each row by head; rows are `stride` numbers apart */
    const float *alpha, *beta;            /* (rows, heads) */
    const float *skip;                    /* (heads,) of state spaces, or NULL: then it is a delta rule */
    float *unit_queries, *unit_keys;      /* (rows, key_heads, key_dim): scratch memory; outputs and inputs of states */
    float *memory;                        /* (states, heads, key_dim, value_dim) */
    float *out;                           /* (rows, heads, value_dim) */
    const span *spans;
    long num_spans, rows, key_heads, heads, key_dim, value_dim, stride;
    int rounded;
} delta_rule;

typedef struct {
    const float *x, *gate; /* (rows, heads, width) */
    const float *weight;   /* (width,) */
    float *out;            /* (rows, heads, width) */
    long rows, heads, width;
    float eps;
    int rounded;
} gated_norm;

void convolve(const convolution *c);
void apply_delta_rule(const delta_rule *r);
void normalize_gated(const gated_norm *n);

/* router.c */
enum { SOFTMAX, SIGMOID, SOFTMAX_CHOSEN };

typedef struct {
    const float *logits;     /* (rows, num) */
    const float *correction; /* (num,), or NULL: added to the scores that select */
    float *scores;           /* scratch memory, (rows, 4 * num) */
    int32_t *experts;        /* (rows, top_k) */
    float *weights;          /* (rows, top_k) */
    long rows, num, top_k;
    long num_groups, kept_groups, scores_of_group; /* a group's score is the sum of its `scores_of_group` best */
    int scoring, renormalize, rounds_logits, rounded;
    float least_sum, scaling;
} choice;

void choose_experts(const choice *c);

/* layer.c */
typedef struct {
    const float *weight; /* NULL if there is no norm */
    float eps;
    int quotient_rounded;
} norm_weights;

typedef struct {
    const char *packed;
    const float *bias; /* (outputs,), or NULL */
    long inputs, outputs;
    int weights;       /* FLOAT32, BFLOAT16 or TILED */
} matrix;

typedef struct {
    matrix qkv, output;
    norm_weights before, of_queries, of_keys, after;
    long heads, kv_heads, dim;
    float scale;
    int interleaved;
    int is_bfloat16; /* the rows and the cache */
} attention_layer;

typedef struct {
    const float *x;             /* (rows, width) */
    const float *cosine, *sine; /* (rows, pairs) */
    char *keys, *values;        /* the cache; row t is written to row cached[t] */
    const int64_t *cached;
    float *queries, *attended;  /* (rows, heads, dim) */
    float *sum, *out;           /* (rows, width): x plus the output, and its norm */
    void *scratch;
    long rows, pairs;
} attention_rows;

typedef struct {
    const char *gate_up, *down;
    const float *gate_up_bias, *down_bias; /* or NULL */
} expert;

typedef struct {
    matrix router, gate_up, down; /* `gate_up` and `down` without addresses, which `experts` (num) has */
    const expert *experts;
    const float *correction;      /* it and the fields from `num` to `scaling` are of the choice */
    long num, top_k, num_groups, kept_groups, scores_of_group;
    int scoring, renormalize, rounds_logits, rounds_weights;
    float least_sum, scaling;
    int clamped;                  /* the activation */
    float limit, alpha;
    int is_bfloat16;              /* the rows */
} experts_layer;

typedef struct {
    const float *x;          /* (rows, width) */
    const float *addends[2]; /* (rows, width), or NULL */
    float *out;              /* (rows, width) */
    int32_t *experts;        /* (rows, top_k): what the router chooses */
    float *weights;          /* (rows, top_k) */
    int64_t *load;           /* (num,): the choices of each expert are added */
    void *scratch;
    long rows;
} experts_rows;

typedef struct {
    const attention_layer *attention;
    const experts_layer *experts;
    char *keys, *values; /* the cache */
    const float *sinks;  /* (heads,), or NULL */
    long window;
} layer;

typedef struct {
    const float *x;             /* (rows, width) */
    const float *cosine, *sine; /* (rows, pairs) */
    const int64_t *cached;
    const segment *segments;    /* they and the next fields are of the attention */
    const int32_t *pages;
    const int64_t *first_tasks;
    float *out;                 /* (rows, width) */
    int32_t *experts;           /* (layers, rows, top_k) */
    float *weights;             /* (layers, rows, top_k) */
    int64_t *const *loads;      /* (layers) */
    void *scratch;
    long rows, pairs, num_segments;
} layers_rows;

long attention_scratch(const attention_layer *l, long rows);
void begin_attention(const attention_layer *l, const attention_rows *a);
void end_attention(const attention_layer *l, const attention_rows *a);
long experts_scratch(const experts_layer *l, long rows);
void compute_experts(const experts_layer *l, const experts_rows *r);
long layers_scratch(const layer *layers, long count, long rows);
void compute_layers(const layer *layers, long count, const layers_rows *r);
