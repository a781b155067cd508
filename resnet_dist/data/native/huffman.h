/* Entropy decoding of baseline JPEGs in the place of libjpeg's own, which takes half of an image's time.
 *
 * libjpeg calls its entropy decoder through a pointer, MCU by MCU (a group of 8 x 8 blocks); this puts another function
 * there and leaves the inverse transform, upsampling and colours to libjpeg. What it gains: stuffing is taken out
 * beforehand, one look-up gives run and length of nearly every coefficient, hardly a branch is left to guess, and
 * blocks outside the wanted columns are stepped over without unpacking them.
 *
 * It decodes what libjpeg decodes, to the same coefficients. Where it is not sure of that, with a code that is none or
 * data that end too early, it gives up: libjpeg decodes the image again, and alone decides whether it is damaged.
 */
#ifndef RESNET_DIST_HUFFMAN_H
#define RESNET_DIST_HUFFMAN_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <jpeglib.h>

enum { LOOK_AHEAD_BITS = 10 };

/* What a code says, packed so that one load gets it, and so that it can serve as the count of a shift:
 *   bits 0-5    bits of the code and of the value behind it; 0: the code is longer than the look-ahead
 *   bits 8-15   bits of the value
 *   bits 16-23  by how much the coefficient's number grows: the run of zeros, and itself */
typedef uint32_t Code;

/* Up to two coefficients with their values, if the look-ahead holds them; without a second one, the first twice. */
typedef struct {
    int16_t values[2];
    uint8_t advances[2];
    uint8_t bits; /* of both; 0: the look-ahead does not hold one */
} Pair;

typedef struct {
    JHUFF_TBL source;      /* what it was built from: images often have the same */
    int is_built;
    Code codes[1 << LOOK_AHEAD_BITS];
    Code strides[1 << LOOK_AHEAD_BITS]; /* AC only: as many whole codes as the look-ahead holds, with their values */
    Pair pairs[1 << LOOK_AHEAD_BITS];   /* AC only */
    int32_t last_code[17]; /* [bits]: the largest code of this length, -1 if there is none */
    int32_t offset[17];    /* [bits]: place of the first symbol of this length, less its code */
    Code by_place[256];
} CodeTable;

typedef struct {
    const uint8_t *next; /* in `data` */
    uint64_t window;     /* the next bits, from the top */
    int num_bits;        /* of them, those that `next` has passed */
} Bits;

typedef struct Huffman {
    Bits bits;
    const uint8_t *end; /* of the data; MCU_BYTES of zeros follow */
    unsigned last_dc[MAX_COMPS_IN_SCAN];
    JDIMENSION column, first_column, last_column; /* in MCUs: the current one, and those that are wanted */
    int stepped_aside; /* error_exit was called for no other reason */
    CodeTable dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
} Huffman;

/* Whether the private structure that is written to looks, in the libjpeg of this process, as it is known here. After
 * jpeg_start_decompress. Reads a few pointers within one allocation of libjpeg's, and nothing behind them. */
int huffman_fits(j_decompress_ptr jpeg);

enum { MCU_BYTES = 4096 }; /* no MCU takes more: 10 blocks of 63 coefficients of 26 bits and one of 27 are 2,082 */

/* Takes over if the JPEG is of the common kind; it may give up later, through error_exit. Call it after
 * jpeg_start_decompress and jpeg_crop_scanline, before the first row, and only where huffman_fits. A Huffman of zeros
 * is a valid start. Columns in px. `clean`: memory for what the source has left and MCU_BYTES. `huffman` and `clean` must
 * live as long as `jpeg`, whose client_data the former becomes; the next image may use both. */
void huffman_take_over(Huffman *huffman, j_decompress_ptr jpeg, uint8_t *clean, JDIMENSION first_column,
                       JDIMENSION num_columns);

#endif
