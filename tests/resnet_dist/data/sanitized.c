/* Runs the kernel under AddressSanitizer and UndefinedBehaviorSanitizer on images from stdin, each as it is and then
 * damaged at random. Every buffer is a block of its own and exactly as large as promised.
 *
 *     sanitized SEED DAMAGED_PER_IMAGE < records
 *
 * A record: four little-endian int64 (bytes, mode, height, width), then the bytes. Prints how often each status came,
 * first for the images as they are, then for the damaged ones. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "jpeg_region.h"
#include "kernel.h"

Pool *resnet_dist_pool_open(int64_t num_threads);
void resnet_dist_pool_close(Pool *pool);
void resnet_dist_pool_release(Pool *pool);
enum { MOST_IMAGES = 3, NUM_OPERATIONS = 3 };

static uint64_t state;

static int64_t below(int64_t limit)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (int64_t)(state % (uint64_t)limit);
}

static int64_t between(int64_t low, int64_t high)
{
    return low + below(high - low + 1);
}

static void any_view(View *view, int64_t height, int64_t width, int64_t size)
{
    int64_t box_height = between(1, height), box_width = between(1, width);
    int copies = below(3) == 0, unfit = below(20) == 0;
    *view = (View){below(height - box_height + 1), below(width - box_width + 1), box_height, box_width};
    view->resized_height = copies ? box_height : between(size, 3 * size);
    view->resized_width = copies ? box_width : between(size, 3 * size);
    if (!copies && below(10) == 0)
        *(below(2) ? &view->resized_height : &view->resized_width) = between(size, INT32_MAX - 65535);
    view->window_top = copies ? between(-size, size) : below(view->resized_height - size + 1);
    view->window_left = copies ? between(-size, size) : below(view->resized_width - size + 1);
    view->mirrored = below(2);
    if (unfit)
        (&view->box_top)[below(8)] = (int64_t)((uint64_t)below(INT64_MAX) << below(3)) >> below(64);
}

static void damage(uint8_t *data, int64_t *bytes)
{
    for (int64_t times = between(1, 4); times > 0 && *bytes > 1; times--) {
        int64_t at = below(*bytes), length = between(1, 8);
        switch (below(6)) {
        case 0: *bytes = at > 0 ? at : 1; break;
        case 1: data[at] = 0xFF; break;
        case 2: data[at] ^= (uint8_t)(1 << below(8)); break;
        case 3: data[below(*bytes < 700 ? *bytes : 700)] = (uint8_t)below(256); break; /* mostly headers and tables */
        case 4: memmove(data + at, data + below(*bytes - at) + at, 1); break;
        default:
            for (; length > 0 && at < *bytes; length--)
                data[at++] = (uint8_t)below(256);
        }
    }
}

/* Of any kind, with numbers that make sense or none. */
static void any_operation(Operation *operation)
{
    operation->kind = between(-1, 14);
    for (int j = 0; j < 8; j++) {
        int64_t bits = (int64_t)((uint64_t)below(INT64_MAX) << 1);
        operation->values[j] = (double)between(-300, 300) / (below(2) ? 1 : 100);
        if (below(10) == 0)
            memcpy(&operation->values[j], &bits, 8); /* huge, tiny, infinite, no number */
    }
}

/* One image under up to three views at once, so on several threads. The status of the first. */
static int64_t decode(Pool *pool, const uint8_t *data, int64_t bytes, int64_t mode, int64_t height, int64_t width,
                      int damaged)
{
    int64_t size = between(1, 40), offset = 0, num = between(1, MOST_IMAGES);
    View *views = malloc(num * sizeof *views);
    StoredImage *stored = malloc(num * sizeof *stored);
    uint8_t *file = malloc(bytes), *images = malloc(num * 3 * size * size);
    int64_t *statuses = malloc(num * sizeof *statuses), num_operations = below(NUM_OPERATIONS + 1);
    Operation *operations = malloc(num * num_operations * sizeof *operations);
    char *message = malloc(MESSAGE_BYTES);
    memcpy(file, data, bytes);
    for (int64_t k = 0; k < num; k++)
        any_view(&views[k], height, width, size);
    for (int64_t k = 0; k < num * num_operations; k++)
        any_operation(&operations[k]);
    if (damaged && below(20) == 0)
        offset = between(-3, 3);
    if (damaged && below(50) == 0)
        height = between(-1, 70000);
    for (int64_t k = 0; k < num; k++) {
        stored[k] = (StoredImage){offset, bytes, height, width, mode};
        statuses[k] = -1;
    }
    Batch batch = {file, bytes, num, stored, views, operations, num_operations, size, below(2), below(8) > 0, images,
                   statuses, below(2) ? message : NULL};
    resnet_dist_decode(pool, &batch);
    uint64_t sum = 0; /* every px of a good image was written: MemorySanitizer and valgrind look at this */
    for (int64_t k = 0; k < num; k++) {
        if (statuses[k] < 0 || statuses[k] > 9)
            exit(3);
        for (int64_t j = 0; statuses[k] == 0 && j < 3 * size * size; j++)
            sum += images[k * 3 * size * size + j];
    }
    int64_t status = statuses[0];
    state ^= sum & 1;
    state |= 1;
    free(file), free(images), free(message), free(statuses), free(operations), free(views), free(stored);
    return status;
}

int main(int argc, char **argv)
{
    int64_t header[4], counts[2][10] = {{0}};
    if (argc != 3)
        return 2;
    state = strtoull(argv[1], NULL, 10) * 0x9E3779B97F4A7C15u | 1;
    Pool *pool = resnet_dist_pool_open(3);
    while (fread(header, sizeof header, 1, stdin) == 1) {
        int64_t bytes = header[0];
        uint8_t *data = malloc(bytes), *copy = malloc(bytes);
        if (fread(data, 1, bytes, stdin) != (size_t)bytes)
            return 2;
        for (int64_t k = 0; k <= atoll(argv[2]); k++) {
            int64_t kept = bytes;
            memcpy(copy, data, bytes);
            if (k > 0)
                damage(copy, &kept);
            int64_t status = decode(pool, copy, kept, header[1], header[2], header[3], k > 0);
            counts[k > 0][status]++;
        }
        free(data), free(copy);
    }
    resnet_dist_pool_close(pool);
    resnet_dist_pool_release(pool);
    for (int row = 0; row < 2; row++)
        for (int k = 0; k < 10; k++)
            printf("%lld%c", (long long)counts[row][k], k < 9 ? ' ' : '\n');
    return 0;
}
