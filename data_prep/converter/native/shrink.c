/* A whole image, made smaller as Pillow's HAMMING does it, bit for bit. */
#include "resize.h"

#include <stdlib.h>
#include <string.h>

/* `pixels` [height][width][3] to `shrunk` [shrunk_height][shrunk_width][3]; sides from 1 to 65,535. 0, or -1 without
 * memory. */
__attribute__((visibility("default"))) int data_prep_shrink(const uint8_t *pixels, int height, int width,
                                                            int shrunk_height, int shrunk_width, uint8_t *shrunk)
{
    Scratch *scratch = calloc(1, sizeof *scratch);
    if (!scratch)
        return -1;
    Resizer resizer;
    Window whole = {0, 0, shrunk_height, shrunk_width};
    size_t stride = 3 * (size_t)width;
    uint8_t *last = scratch_take(scratch, SOURCE_ROW, stride + ROW_PADDING_BYTES);
    int status = last ? resizer_plan(&resizer, scratch, HAMMING, height, width, shrunk_height, shrunk_width, whole, 0)
                      : -1;
    for (int y = 0; status == 0 && y < resizer.rows.length; y++) {
        int place = resizer.rows.start + y;
        const uint8_t *row = pixels + (size_t)place * stride;
        if (place == height - 1) /* nothing may be read behind it */
            row = memcpy(last, row, stride);
        resizer_push(&resizer, row + 3 * (size_t)resizer.columns.start, shrunk);
    }
    scratch_free(scratch);
    return status;
}
