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

void resnet_dist_decode_crop_resize(const uint8_t *file, int64_t file_bytes, int64_t num_images,
                                    const int64_t *offsets, const int64_t *sizes, const uint8_t *modes,
                                    const int64_t *heights, const int64_t *widths, const int64_t *view,
                                    const uint8_t *flips, int64_t size, int64_t own_huffman, uint8_t *images,
                                    int64_t *statuses, char message[200]);
int resnet_dist_augment(int64_t num_images, int64_t num_operations, const void *operations, int64_t size,
                        uint8_t *images);

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

static void any_view(int64_t view[8], int64_t height, int64_t width, int64_t size)
{
    int64_t box_height = between(1, height), box_width = between(1, width);
    int copies = below(3) == 0, unfit = below(20) == 0;
    view[0] = below(height - box_height + 1), view[1] = below(width - box_width + 1);
    view[2] = box_height, view[3] = box_width;
    view[4] = copies ? box_height : between(size, 3 * size), view[5] = copies ? box_width : between(size, 3 * size);
    view[6] = copies ? between(-size, size) : below(view[4] - size + 1);
    view[7] = copies ? between(-size, size) : below(view[5] - size + 1);
    if (unfit)
        view[below(8)] = (int64_t)((uint64_t)below(INT64_MAX) << below(3)) >> below(64);
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

/* Three operations of any kind, with numbers that make sense or none. */
static void augment(int64_t size, uint8_t *images)
{
    struct {
        int64_t kind;
        double values[8];
    } operations[3];
    for (int k = 0; k < 3; k++) {
        operations[k].kind = between(-1, 14);
        for (int j = 0; j < 8; j++) {
            int64_t bits = (int64_t)((uint64_t)below(INT64_MAX) << 1);
            operations[k].values[j] = (double)between(-300, 300) / (below(2) ? 1 : 100);
            if (below(10) == 0)
                memcpy(&operations[k].values[j], &bits, 8); /* huge, tiny, infinite, no number */
        }
    }
    if (resnet_dist_augment(1, 3, operations, size, images))
        exit(4);
}

static int64_t decode(const uint8_t *data, int64_t bytes, int64_t mode, int64_t height, int64_t width, int damaged)
{
    int64_t size = between(1, 40), view[8], offset = 0, status = -1;
    uint8_t *file = malloc(bytes), *images = malloc(3 * size * size), flip = (uint8_t)below(2), small_mode = (uint8_t)mode;
    char *message = malloc(200);
    memcpy(file, data, bytes);
    any_view(view, height, width, size);
    if (damaged && below(20) == 0)
        offset = between(-3, 3);
    if (damaged && below(50) == 0)
        height = between(-1, 70000);
    resnet_dist_decode_crop_resize(file, bytes, 1, &offset, &bytes, &small_mode, &height, &width, view, &flip, size,
                                   below(8) > 0, images, &status, message);
    if (status == 0)
        augment(size, images);
    uint64_t sum = 0; /* every px of a good image was written: MemorySanitizer and valgrind look at this */
    for (int64_t k = 0; status == 0 && k < 3 * size * size; k++)
        sum += images[k];
    state ^= sum & 1;
    state |= 1;
    free(file), free(images), free(message);
    return status;
}

int main(int argc, char **argv)
{
    int64_t header[4], counts[2][9] = {{0}};
    if (argc != 3)
        return 2;
    state = strtoull(argv[1], NULL, 10) * 0x9E3779B97F4A7C15u | 1;
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
            int64_t status = decode(copy, kept, header[1], header[2], header[3], k > 0);
            if (status < 0 || status > 8)
                return 3;
            counts[k > 0][status]++;
        }
        free(data), free(copy);
    }
    for (int row = 0; row < 2; row++)
        for (int k = 0; k < 9; k++)
            printf("%lld%c", (long long)counts[row][k], k < 8 ? ' ' : '\n');
    return 0;
}
