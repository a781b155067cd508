/* Look-up tables that step over Huffman codes and their values. */
#ifndef DATA_PREP_HUFFMAN_STEPS_H
#define DATA_PREP_HUFFMAN_STEPS_H
#include <stdint.h>

enum { LOOK_BITS = 10, AC_COEFFICIENTS = 63 };

/* A step over one code with its value, or over several:
 *   bits 0-4   bits to step over
 *   bits 5-15  what to take from a counter that starts at LIVE plus the coefficients that a block still lacks.
 * So the counter's bit TOO_MANY tells whether more was taken than there was, and any value up to LIVE that a part of
 * the image is complete. */
typedef uint16_t Step;
enum {
    BITS_FIELD = 5,
    LIVE = 1024,
    END_OF_BLOCK = 1024, /* taken on top of one coefficient */
    NOT_QUICK = 64,      /* taken where the look-ahead does not hold a whole code: more than there can be */
    TOO_MANY = 512
};

static inline unsigned bits_of(Step step) { return step & ((1u << BITS_FIELD) - 1); }
static inline int taken_by(Step step) { return step >> BITS_FIELD; }

typedef struct {
    int is_defined;
    uint8_t counts[17]; /* [bits]: number of codes of this length */
    uint8_t symbols[256];
} HuffmanTable;

typedef struct {
    Step several[1 << LOOK_BITS]; /* as many codes as the bits hold, to the end of the block at most */
    Step first[1 << LOOK_BITS];   /* the first of them, 0 where it is longer */
    int32_t last_code[17];        /* [bits]: the largest code of this length, -1 if there is none */
    int32_t offset[17];           /* [bits]: place of the first symbol of this length, less its code */
    Step by_place[256];
} LookUp;

/* False for a table that libjpeg refuses or that baseline JPEGs of 8 bits do not have. */
int build_look_up(LookUp *look_up, const HuffmanTable *table, int is_ac);

/* The step over the one code at the top of `window`; 0 if there is none. */
Step first_step(const LookUp *look_up, uint64_t window);

#endif
