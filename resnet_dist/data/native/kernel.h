/* What the decode kernel is asked for. The structs are laid out as in Python: 64-bit numbers and pointers only. */
#ifndef RESNET_DIST_KERNEL_H
#define RESNET_DIST_KERNEL_H

#include <stdint.h>

#include "augment.h"
#include "pool.h"

/* Where an image is in the file: `STORED_IMAGE` in kernel.py. */
typedef struct {
    int64_t offset, bytes;
    int64_t height, width; /* px */
    int64_t mode;          /* 0: JPEG, 1: raw pixels */
} StoredImage;

/* What is shown of it, `VIEW` in crops.py: `box` is cut out and resized; of that, the size x size window at
 * (window_top, window_left). */
typedef struct {
    int64_t box_top, box_left, box_height, box_width;
    int64_t resized_height, resized_width;
    int64_t window_top, window_left; /* may lie outside, among zeros, where nothing is resized */
    int64_t mirrored;
} View;

/* `_Batch` in native_kernel.py. */
typedef struct {
    const uint8_t *file;
    int64_t file_bytes;
    int64_t num_images;
    const StoredImage *stored;   /* [num_images] */
    const View *views;           /* [num_images] */
    const Operation *operations; /* [num_images][num_operations] */
    int64_t num_operations;
    int64_t size;        /* 1 to 65535, with operations to 16384 */
    int64_t bicubic;     /* how to resize: bicubic, else bilinear */
    int64_t own_huffman; /* whether huffman.c may take over */
    uint8_t *images;     /* [num_images][size][size][3], written; undefined where the status is not OK */
    int64_t *statuses;   /* [num_images], written */
    char *message;       /* [MESSAGE_BYTES] or NULL: libjpeg's, if the only image is JPEG_BROKEN */
} Batch;

/* Decodes a batch on the pool's threads and this one. */
void resnet_dist_decode(Pool *pool, Batch *batch);

#endif
