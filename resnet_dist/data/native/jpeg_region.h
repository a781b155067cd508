/* Rows of a rectangle of a JPEG, equal bit for bit to a full decode with libjpeg-turbo's accurate settings. */
#ifndef RESNET_DIST_JPEG_REGION_H
#define RESNET_DIST_JPEG_REGION_H

#include <stddef.h>
#include <stdint.h>

#include "huffman.h"
#include "scratch.h"

enum { MESSAGE_BYTES = 200 }; /* libjpeg's JMSG_LENGTH_MAX */

enum {
    ASK_LIBJPEG = -1, /* huffman.c stepped aside: decode again without it */
    OK,
    JPEG_BROKEN, /* libjpeg-turbo gave an error or a warning */
    JPEG_SIZE_DIFFERS,
    RAW_SIZE_DIFFERS,
    MODE_UNKNOWN,
    COLOURS_UNKNOWN, /* CMYK or YCCK, or not 1 or 3 components */
    OUTSIDE_FILE,
    VIEW_UNFIT, /* the box lies outside the image, or the window outside what it is resized to */
    NO_MEMORY,
    TOO_MUCH_HELD /* more coefficients than MAX_COEFFICIENT_BYTES, which a JPEG of several scans needs all at once */
};

typedef struct {
    int top, left, height, width; /* px, inside the image; without rows, only the header is read */
} Region;

typedef void (*TakeRow)(void *taker, const uint8_t *row);

/* Calls take_row(taker, RGB px of the region) for every row of it, top to bottom; 16 bytes behind the px can be read.
 * height, width: what the image must have. row: memory of 3 * width + 16 bytes. Returns a status; on JPEG_BROKEN
 * `message` says why. What lies below the region is not looked at. `own_huffman`: whether huffman.c may take over from
 * libjpeg; only then the status may be ASK_LIBJPEG, after any number of rows. */
int jpeg_region(const uint8_t *data, size_t bytes, int height, int width, Region region, int own_huffman,
                Scratch *scratch, uint8_t *row, TakeRow take_row, void *taker, char message[MESSAGE_BYTES]);

#endif
