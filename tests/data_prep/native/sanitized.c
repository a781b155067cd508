/* Runs the C that reads JPEGs' headers and follows their data under AddressSanitizer and UndefinedBehaviorSanitizer: files
 * from stdin, each as it is and then damaged at random. Every buffer is a block of its own and exactly as large as
 * promised.
 *
 *     sanitized DAMAGED_PER_FILE < records
 *
 * A record: the size as a little-endian int64, then the bytes. Prints how many were read, how many headers were told,
 * and how many files are sound. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint8_t answer, frame, num_components, factors[3];
    uint16_t height, width;
} Header;
void data_prep_whole_jpeg_headers(const uint8_t *const *files, const size_t *sizes, int64_t count, Header *headers);
void data_prep_jpeg_headers(const uint8_t *rows, int64_t stride, int64_t count, const int64_t *num_bytes,
                            int64_t max_head, int64_t max_tail, Header *headers);
void data_prep_jpegs_are_sound(const uint8_t *const *files, const size_t *sizes, int count, uint8_t *sound);
enum { TOLD = 1, MOSTLY_HEADERS = 700 };

static uint64_t state = 1;

static int64_t below(int64_t limit)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (int64_t)(state % (uint64_t)limit);
}

static void damage(uint8_t *data, int64_t *bytes)
{
    if (below(3) == 0)
        *bytes = 1 + below(*bytes);
    for (int64_t times = below(4); times > 0; times--) {
        int64_t at = below(below(2) && *bytes > MOSTLY_HEADERS ? MOSTLY_HEADERS : *bytes);
        data[at] = (uint8_t)(below(2) ? below(256) : data[at] ^ 1 << below(8));
    }
}

static void read_ends(const uint8_t *data, int64_t bytes)
{
    int64_t max_head = 1 + below(bytes + 5), max_tail = below(70);
    int64_t head = bytes < max_head ? bytes : max_head, tail = bytes - head < max_tail ? bytes - head : max_tail;
    uint8_t *row = malloc(head + tail);
    Header header;
    memcpy(row, data, head);
    memcpy(row + head, data + bytes - tail, tail);
    data_prep_jpeg_headers(row, head + tail, 1, &bytes, max_head, max_tail, &header);
    free(row);
}

int main(int argc, char **argv)
{
    int64_t bytes, num_read = 0, num_told = 0, num_sound = 0;
    if (argc != 2)
        return 2;
    while (fread(&bytes, sizeof bytes, 1, stdin) == 1) {
        uint8_t *data = malloc(bytes), *copy = malloc(bytes);
        if (fread(data, 1, bytes, stdin) != (size_t)bytes)
            return 2;
        for (int64_t k = 0; k <= atoll(argv[1]); k++, num_read++) {
            int64_t kept = bytes;
            memcpy(copy, data, bytes);
            if (k > 0)
                damage(copy, &kept);
            uint8_t *exact = malloc(kept), sound;
            const uint8_t *const files[] = {exact};
            size_t sizes[] = {(size_t)kept};
            Header header;
            memcpy(exact, copy, kept);
            data_prep_whole_jpeg_headers(files, sizes, 1, &header);
            data_prep_jpegs_are_sound(files, sizes, 1, &sound);
            read_ends(exact, kept);
            num_told += header.answer == TOLD;
            num_sound += sound;
            free(exact);
        }
        free(data), free(copy);
    }
    printf("%lld %lld %lld\n", (long long)num_read, (long long)num_told, (long long)num_sound);
    return 0;
}
