/* The working memory of one thread, kept from image to image: what malloc gives back to the system between two images
 * has to be cleared by it for the next one, which took 6 % of the time. */
#ifndef DATA_PREP_SCRATCH_H
#define DATA_PREP_SCRATCH_H

#include <stddef.h>

enum {
    SOURCE_ROW,
    ROW_FIRST, ROW_WEIGHTS, COLUMN_FIRST, COLUMN_WEIGHTS,
    EXACT_WEIGHTS, PACKED_WEIGHTS, WEIGHT_COUNTS,
    ROW_GROUP, FILTERED_ROWS, SUMS,
    CLEAN_DATA,
    NUM_BUFFERS
};

struct Huffman;

typedef struct Scratch {
    void *buffers[NUM_BUFFERS];
    size_t bytes[NUM_BUFFERS];
    struct Huffman *huffman; /* of who decodes JPEGs; NULL before the first */
} Scratch;

/* A Scratch of zeros is a valid start. Memory number `buffer`, of at least `bytes` and with no contents in particular,
 * which is what was given out under this number before; NULL if there is none. */
void *scratch_take(Scratch *scratch, int buffer, size_t bytes);

/* Gives back what is large: one huge image shall not hold memory to the end. */
void scratch_trim(Scratch *scratch);

void scratch_free(Scratch *scratch);

#endif
