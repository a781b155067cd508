/* Antialiased bilinear resizing of 8-bit RGB, row by row, with Pillow's arithmetic: its results bit for bit.
 *
 * Source rows are pushed from top to bottom; an output row is written as soon as its last source row has come. So there
 * is never a whole image in memory, only as many filtered rows as one output row needs, and a few more.
 */
#ifndef RESNET_DIST_RESIZE_H
#define RESNET_DIST_RESIZE_H

#include <stdint.h>

#include "scratch.h"

enum { ROW_PADDING_BYTES = 16 }; /* readable behind every pushed row, because pixels are loaded four bytes at a time */

/* One axis of a resize: output i is the sum of `taps` source px from start + first[i] on, times its weights. */
typedef struct {
    int size;           /* outputs */
    int start, length;  /* the source px that the outputs need */
    int taps;           /* the same for all outputs, filled up with zero weights */
    int32_t *first;     /* [size] */
    int32_t *weights;   /* [size][taps], 22 fractional bits */
} Axis;

typedef struct {
    Axis rows, columns;
    int32_t *group;      /* [columns.length][2][4]: px of two rows that are not filtered yet; the fourth is anything */
    uint8_t *filtered;   /* ring of rows.taps + 1 rows, filtered along the columns */
    int32_t *sums;       /* [3 * size] */
    int num_pushed, num_filtered, num_written;
} Resizer;

/* Plans the size x size window at (window_top, window_left) of a height x width image resized to
 * resized_height x resized_width, mirrored or not. The window must lie inside. 0, or -1 without memory. All memory is the
 * scratch's. */
int resizer_plan(Resizer *resizer, Scratch *scratch, int height, int width, int resized_height, int resized_width,
                 int window_top, int window_left, int size, int mirrored);

/* `row`: source row rows.start + num_pushed, from px columns.start on. Writes what is complete to
 * `output` [size][size][3]. */
void resizer_push(Resizer *resizer, const uint8_t *row, uint8_t *output);

#endif
