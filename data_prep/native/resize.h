/* Antialiased resizing of 8-bit RGB, row by row, with Pillow's arithmetic: its results bit for bit.
 *
 * Source rows are pushed from top to bottom; an output row is written as soon as its last source row has come. So there
 * is never a whole image in memory, only as many filtered rows as one output row needs, and a few more.
 */
#ifndef DATA_PREP_RESIZE_H
#define DATA_PREP_RESIZE_H

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

/* Pillow's. BICUBIC reaches two output px to either side, the others one; it alone has negative weights. */
typedef enum { BILINEAR, BICUBIC, HAMMING } Filter;

typedef struct {
    Filter filter;
    Axis rows, columns;
    int32_t *group;      /* [columns.length][2][4]: px of two rows that are not filtered yet; the fourth is anything */
    uint8_t *filtered;   /* ring of rows.taps + 1 rows, filtered along the columns */
    int32_t *sums;       /* [3 * columns.size] */
    int num_pushed, num_filtered, num_written;
} Resizer;

typedef struct {
    int top, left, height, width;
} Window;

/* Plans the window of a height x width image resized to resized_height x resized_width, mirrored or not. The window must
 * lie inside. 0, or -1 without memory. All memory is the scratch's. */
int resizer_plan(Resizer *resizer, Scratch *scratch, Filter filter, int height, int width, int resized_height,
                 int resized_width, Window window, int mirrored);

/* `row`: source row rows.start + num_pushed, from px columns.start on. Writes what is complete to
 * `output` [window.height][window.width][3]. */
void resizer_push(Resizer *resizer, const uint8_t *row, uint8_t *output);

#endif
