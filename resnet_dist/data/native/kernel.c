/* The native decode kernel: stored images, views, flips and operations in, pixels and one status per image out.
 *
 * Plain C, called without Python's lock; it knows nothing of Python. Every read is checked against the mapped file,
 * every write against its buffer: what the beton says is not trusted.
 */
#include <stdbool.h>
#include <string.h>

#include "kernel.h"

#include "jpeg_region.h"
#include "pool.h"
#include "resize.h"

enum { MODE_JPEG, MODE_RAW }; /* as ffcv's RGBImageField numbers them */
enum { MAX_SIDE = 65535 };
/* Of what is resized only the window is computed, so this bounds no memory: the net's size and window need 32 bits. */
static const int64_t MAX_RESIZED_SIDE = INT32_MAX - MAX_SIDE;

/* Takes the rows of a region one by one, resized or as they are. */
typedef struct {
    uint8_t *output;
    int size;
    Filter filter;
    bool resizes;
    Resizer resizer;
    int next_row, first_column, num_columns; /* copying: where in the output the px go */
    bool mirrored;
} Picture;

static void take_row(void *taker, const uint8_t *row)
{
    Picture *picture = taker;
    if (picture->resizes) {
        resizer_push(&picture->resizer, row, picture->output);
        return;
    }
    uint8_t *output = picture->output + (size_t)picture->next_row++ * picture->size * 3;
    if (!picture->mirrored) {
        memcpy(output + 3 * picture->first_column, row, 3 * (size_t)picture->num_columns);
        return;
    }
    uint8_t *last = output + 3 * (picture->size - 1 - picture->first_column);
    for (int i = 0; i < picture->num_columns; i++)
        memcpy(last - 3 * i, row + 3 * i, 3);
}

static bool fits(const StoredImage *image, const View *view, int size)
{
    bool box = view->box_top >= 0 && view->box_left >= 0 && view->box_height > 0 && view->box_width > 0 &&
               view->box_top <= image->height - view->box_height && view->box_left <= image->width - view->box_width;
    if (!box || view->resized_height < 1 || view->resized_width < 1 || view->resized_height > MAX_RESIZED_SIDE ||
        view->resized_width > MAX_RESIZED_SIDE)
        return false;
    if (view->resized_height == view->box_height && view->resized_width == view->box_width)
        return view->window_top >= -MAX_SIDE && view->window_top <= MAX_SIDE && view->window_left >= -MAX_SIDE &&
               view->window_left <= MAX_SIDE;
    return view->window_top >= 0 && view->window_left >= 0 && view->window_top <= view->resized_height - size &&
           view->window_left <= view->resized_width - size;
}

/* What of [0, length) the window of `size` px at `window` shows: *start and the number of px. */
static int overlap(int64_t window, int size, int64_t length, int *start)
{
    int64_t low = window > 0 ? window : 0, high = window + size < length ? window + size : length;
    *start = (int)low;
    return high > low ? (int)(high - low) : 0;
}

/* Readies the picture; `region` becomes what it needs of the stored image. */
static int plan(Picture *picture, Scratch *scratch, const StoredImage *image, const View *view, Region *region)
{
    if (!fits(image, view, picture->size))
        return VIEW_UNFIT;
    picture->resizes = view->resized_height != view->box_height || view->resized_width != view->box_width;
    if (picture->resizes) {
        Resizer *resizer = &picture->resizer;
        Window window = {(int)view->window_top, (int)view->window_left, picture->size, picture->size};
        if (resizer_plan(resizer, scratch, picture->filter, (int)view->box_height, (int)view->box_width,
                         (int)view->resized_height, (int)view->resized_width, window, picture->mirrored))
            return NO_MEMORY;
        *region = (Region){(int)view->box_top + resizer->rows.start, (int)view->box_left + resizer->columns.start,
                           resizer->rows.length, resizer->columns.length};
        return OK;
    }
    region->height = overlap(view->window_top, picture->size, view->box_height, &region->top);
    region->width = overlap(view->window_left, picture->size, view->box_width, &region->left);
    picture->next_row = region->top - (int)view->window_top;
    picture->first_column = region->left - (int)view->window_left;
    picture->num_columns = region->width;
    if (region->height < picture->size || region->width < picture->size)
        memset(picture->output, 0, (size_t)picture->size * picture->size * 3);
    region->top += (int)view->box_top;
    region->left += (int)view->box_left;
    return OK;
}

static int show_raw(const StoredImage *image, const uint8_t *data, Region region, uint8_t *row, Picture *picture)
{
    if (image->bytes != image->height * image->width * 3)
        return RAW_SIZE_DIFFERS;
    for (int y = region.top; y < region.top + region.height; y++) {
        memcpy(row, data + 3 * (y * image->width + region.left), 3 * (size_t)region.width);
        take_row(picture, row);
    }
    return OK;
}

static int show(const Batch *batch, const StoredImage *image, const View *view, int own_huffman, Picture *picture,
                Scratch *scratch)
{
    const uint8_t *data = batch->file + image->offset;
    Region region;
    char unread[MESSAGE_BYTES];
    char *message = batch->message != NULL && batch->num_images == 1 ? batch->message : unread;
    int status = plan(picture, scratch, image, view, &region);
    if (status != OK)
        return status;
    uint8_t *row = scratch_take(scratch, SOURCE_ROW, 3 * (size_t)image->width + ROW_PADDING_BYTES);
    if (row == NULL)
        return NO_MEMORY;
    if (image->mode == MODE_RAW)
        return show_raw(image, data, region, row, picture);
    if (image->mode != MODE_JPEG)
        return MODE_UNKNOWN;
    return jpeg_region(data, (size_t)image->bytes, (int)image->height, (int)image->width, region,
                       own_huffman, scratch, row, take_row, picture, message);
}

static int decode_one(const Batch *batch, int64_t k, uint8_t *output, Scratch *scratch)
{
    const StoredImage *image = &batch->stored[k];
    const View *view = &batch->views[k];
    Picture picture = {.output = output, .size = (int)batch->size, .filter = batch->bicubic ? BICUBIC : BILINEAR,
                       .mirrored = view->mirrored != 0};
    if (image->offset < 0 || image->bytes < 1 || image->bytes > batch->file_bytes ||
        image->offset > batch->file_bytes - image->bytes)
        return OUTSIDE_FILE;
    if (image->height < 1 || image->width < 1 || image->height > MAX_SIDE || image->width > MAX_SIDE)
        return VIEW_UNFIT;
    int status = show(batch, image, view, batch->own_huffman != 0, &picture, scratch);
    if (status == ASK_LIBJPEG)
        status = show(batch, image, view, 0, &picture, scratch);
    return status;
}

static void work(void *given, int64_t k, Scratch *scratch)
{
    const Batch *batch = given;
    uint8_t *output = batch->images + k * batch->size * batch->size * 3;
    int status = decode_one(batch, k, output, scratch);
    if (status == OK && batch->num_operations > 0 &&
        resnet_dist_augment(1, batch->num_operations, batch->operations + k * batch->num_operations, batch->size, output))
        status = NO_MEMORY;
    batch->statuses[k] = status;
    scratch_trim(scratch);
}

/* Tells whether library and Python sources belong together: as in data_prep/native/__init__.py. */
int resnet_dist_interface(void)
{
    return 6;
}

void resnet_dist_decode(Pool *pool, Batch *batch)
{
    pool_run(pool, work, batch, batch->num_images);
}
