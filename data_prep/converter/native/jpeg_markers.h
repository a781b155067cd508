/* A baseline JPEG's markers up to its only scan. */
#ifndef DATA_PREP_JPEG_MARKERS_H
#define DATA_PREP_JPEG_MARKERS_H
#include "huffman_steps.h"

#include <stddef.h>

enum { MAX_COMPONENTS = 3, MAX_BLOCKS_IN_MCU = 10, NUM_TABLES = 4 };

typedef struct {
    HuffmanTable dc[NUM_TABLES], ac[NUM_TABLES];
    uint8_t dc_of[MAX_COMPONENTS], ac_of[MAX_COMPONENTS]; /* which of them each component uses */
    int num_components;
    uint8_t component_of[MAX_BLOCKS_IN_MCU]; /* of each block in an MCU */
    int blocks_in_mcu;
    int num_blocks;      /* in all */
    const uint8_t *data; /* behind the scan's header */
} Scan;

/* False for whatever is no plain baseline JPEG with all components in one scan and no restart markers, and for what
 * libjpeg-turbo would warn of. */
int read_markers(const uint8_t *file, size_t size, Scan *scan);

#endif
