#include "jpeg_region.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

/* Fancy upsampling looks at the neighbours of a px: the px at the edge of what is decoded may differ from a full
 * decode's, so two more on every side are decoded and dropped. */
enum { MARGIN = 2 };

/* A few bytes can order any number of passes over an image of any size. Encoders make about ten. The limits are those
 * of data_prep/jpeg/header.py and, on the number of scans, of TurboJPEG. */
enum { MAX_SCANS = 500 };
static const int64_t MAX_SCAN_PIXELS = 2000000000; /* scans times pixels */
static const int64_t MAX_COEFFICIENT_BYTES = 256 << 20;

typedef struct {
    struct jpeg_error_mgr manager; /* first: libjpeg hands out its address */
    jmp_buf escape;
    char *message;
} Errors;

static void give_up(j_common_ptr common)
{
    Errors *errors = (Errors *)common->err;
    common->err->format_message(common, errors->message);
    longjmp(errors->escape, 1);
}

/* Warnings, of level -1, are about damaged data; what is above is chatter. */
static void take_message(j_common_ptr common, int level)
{
    if (level < 0)
        give_up(common);
}

static void print_nothing(j_common_ptr common)
{
    (void)common;
}

static void limit_scans(j_common_ptr common)
{
    Errors *errors = (Errors *)common->err;
    j_decompress_ptr jpeg = (j_decompress_ptr)common;
    int64_t scans = jpeg->input_scan_number, pixels = (int64_t)jpeg->image_width * jpeg->image_height;
    if (scans > MAX_SCANS || (jpeg_has_multiple_scans(jpeg) && scans * pixels > MAX_SCAN_PIXELS)) {
        snprintf(errors->message, MESSAGE_BYTES, "more than %d scans of %u x %u px", (int)scans - 1, jpeg->image_width,
                 jpeg->image_height);
        longjmp(errors->escape, 1);
    }
}

/* A JPEG of several scans is in memory as a whole. */
static int64_t coefficient_bytes(j_decompress_ptr jpeg)
{
    int64_t blocks = 0;
    for (int k = 0; k < jpeg->num_components && jpeg_has_multiple_scans(jpeg); k++) {
        const jpeg_component_info *component = &jpeg->comp_info[k];
        int64_t across = component->h_samp_factor, down = component->v_samp_factor;
        blocks += (component->width_in_blocks + across - 1) / across * across *
                  ((component->height_in_blocks + down - 1) / down * down);
    }
    return blocks * (int64_t)sizeof(JBLOCK);
}

/* Whether a part decoded by itself may differ from that part of the whole. libjpeg smooths over what a progressive file
 * lacks, looking at blocks further away than MARGIN; and sampling factors that hardly a file has are not worth a proof. */
static int needs_the_whole(j_decompress_ptr jpeg)
{
    for (int k = 0; k < jpeg->num_components && jpeg->num_components > 1; k++) {
        int across = jpeg->comp_info[k].h_samp_factor, down = jpeg->comp_info[k].v_samp_factor;
        if (k > 0 ? across != 1 || down != 1 : (across > 2 || down > 2) && (across != 4 || down != 1))
            return 1;
    }
    for (int k = 0; k < jpeg->num_components && jpeg->progressive_mode; k++)
        for (int coefficient = 0; coefficient < DCTSIZE2; coefficient++)
            if (jpeg->coef_bits[k][coefficient] != 0)
                return 1;
    return 0;
}

/* May leave by longjmp at any call of libjpeg; owns nothing. */
static int decode(j_decompress_ptr jpeg, int height, int width, Region region, uint8_t *clean, Scratch *scratch,
                  uint8_t *row, TakeRow take_row, void *taker)
{
    jpeg_read_header(jpeg, TRUE);
    if ((int)jpeg->image_height != height || (int)jpeg->image_width != width)
        return JPEG_SIZE_DIFFERS;
    if (jpeg->jpeg_color_space != JCS_GRAYSCALE && jpeg->jpeg_color_space != JCS_YCbCr &&
        jpeg->jpeg_color_space != JCS_RGB)
        return COLOURS_UNKNOWN;
    if (region.height == 0 || region.width == 0)
        return OK;
    if (coefficient_bytes(jpeg) > MAX_COEFFICIENT_BYTES)
        return TOO_MUCH_HELD;
    jpeg->out_color_space = JCS_RGB;
    jpeg->dct_method = JDCT_ISLOW;
    jpeg->do_fancy_upsampling = TRUE;
    jpeg_start_decompress(jpeg);

    int right = region.left + region.width + MARGIN, left = region.left > MARGIN ? region.left - MARGIN : 0;
    JDIMENSION first_column = left, num_columns = (right < width ? right : width) - left;
    JDIMENSION skipped = region.top > MARGIN ? region.top - MARGIN : 0;
    if (needs_the_whole(jpeg))
        first_column = 0, num_columns = width, skipped = 0;
    if (num_columns < (JDIMENSION)width)
        jpeg_crop_scanline(jpeg, &first_column, &num_columns); /* moves first_column left, to a block's edge */
    if (clean != NULL)
        huffman_take_over(scratch->huffman, jpeg, clean, first_column, num_columns);
    if (skipped > 0 && jpeg_skip_scanlines(jpeg, skipped) != skipped)
        return JPEG_BROKEN;
    for (int y = skipped; y < region.top + region.height; y++) {
        if (jpeg_read_scanlines(jpeg, &row, 1) != 1)
            return JPEG_BROKEN;
        if (y >= region.top)
            take_row(taker, row + 3 * (size_t)(region.left - first_column));
    }
    return OK;
}

int jpeg_region(const uint8_t *data, size_t bytes, int height, int width, Region region, int own_huffman,
                Scratch *scratch, uint8_t *row, TakeRow take_row, void *taker, char message[MESSAGE_BYTES])
{
    uint8_t *clean = own_huffman ? scratch_take(scratch, CLEAN_DATA, bytes + MCU_BYTES) : NULL;
    if (own_huffman && scratch->huffman == NULL)
        scratch->huffman = calloc(1, sizeof *scratch->huffman);
    if (own_huffman && (clean == NULL || scratch->huffman == NULL))
        return NO_MEMORY;
    if (own_huffman)
        scratch->huffman->stepped_aside = 0; /* by an earlier image, if this one never comes to huffman.c */
    struct jpeg_decompress_struct jpeg;
    struct jpeg_progress_mgr progress = {.progress_monitor = limit_scans};
    Errors errors = {.message = message};
    volatile int status = JPEG_BROKEN;
    memset(&jpeg, 0, sizeof jpeg); /* so that jpeg_destroy is safe if jpeg_create fails */
    jpeg.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = give_up;
    errors.manager.emit_message = take_message;
    errors.manager.output_message = print_nothing;
    if (setjmp(errors.escape) == 0) {
        /* One decompressor per image: it would keep an earlier image's tables for one that has none. */
        jpeg_create_decompress(&jpeg);
        jpeg.mem->max_memory_to_use = 0; /* whatever the environment's JPEGMEM says */
        jpeg.progress = &progress;
        jpeg_mem_src(&jpeg, data, bytes);
        status = decode(&jpeg, height, width, region, clean, scratch, row, take_row, taker);
    }
    jpeg_destroy_decompress(&jpeg); /* not jpeg_finish: rows are left */
    return own_huffman && scratch->huffman->stepped_aside ? ASK_LIBJPEG : status;
}

/* Whether huffman.c knows the inside of this process' libjpeg, found by means of any baseline JPEG. */
int resnet_dist_huffman_fits(const uint8_t *data, int64_t bytes)
{
    char message[MESSAGE_BYTES];
    struct jpeg_decompress_struct jpeg;
    Errors errors = {.message = message};
    volatile int fits = 0;
    memset(&jpeg, 0, sizeof jpeg);
    jpeg.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = give_up;
    errors.manager.output_message = print_nothing;
    if (setjmp(errors.escape) == 0) {
        jpeg_create_decompress(&jpeg);
        jpeg_mem_src(&jpeg, data, (unsigned long)bytes);
        jpeg_read_header(&jpeg, TRUE);
        jpeg_start_decompress(&jpeg);
        fits = huffman_fits(&jpeg);
    }
    jpeg_destroy_decompress(&jpeg);
    return fits;
}
