/* What a JPEG's markers say of it, by the file's ends, many files in one call: `data_prep/jpeg/header.py` in C.
 *
 * The answer goes one way: only the headers of plain files are told; Python reads the markers of all others. */
#include "jpeg_bytes.h"

#include <string.h>

enum { ASK_PYTHON, TOLD, NONE };

/* `jpeg_headers.HEADER`. */
typedef struct {
    uint8_t answer; /* TOLD: 8 bits a value, an end of image, 1 or 3 components; NONE: it does not lie in the head */
    uint8_t frame, num_components, factors[3]; /* horizontal << 4 | vertical */
    uint16_t height, width;
} Header;

static int read_frame(const uint8_t *at, unsigned size, Header *header)
{
    if (size < 6 || header->num_components || at[0] != 8 || (at[5] != 1 && at[5] != 3) || size != 6 + 3u * at[5])
        return 0;
    header->height = (uint16_t)two_bytes(at + 1);
    header->width = (uint16_t)two_bytes(at + 3);
    header->num_components = at[5];
    for (int k = 0; k < at[5]; k++)
        header->factors[k] = at[7 + 3 * k];
    return 1;
}

static int has_end(const uint8_t *at, const uint8_t *end)
{
    while (end - at >= 2 && (at = memchr(at, 0xFF, (size_t)(end - at) - 1)))
        if (*++at == EOI)
            return 1;
    return 0;
}

static int read_header(const uint8_t *at, const uint8_t *head_end, const uint8_t *tail_end, Header *header)
{
    if (head_end - at < 3 || at[0] != 0xFF || at[1] != SOI || at[2] != 0xFF)
        return ASK_PYTHON;
    for (at += 2; head_end - at >= 4 && at[0] == 0xFF;) {
        unsigned marker = at[1], length = two_bytes(at + 2);
        if (marker == 0xFF || marker == TEM || (marker >= RST0 && marker <= EOI) || length < 2)
            return ASK_PYTHON;
        if (head_end - at < 2 + (long)length)
            return NONE;
        const uint8_t *segment = at + 4, *next = at + 2 + length;
        if (marker >= SOF_BASELINE && marker <= SOF_PROGRESSIVE) {
            if (!read_frame(segment, length - 2, header))
                return ASK_PYTHON;
            header->frame = (uint8_t)marker;
        } else if (marker > SOF_PROGRESSIVE && marker < RST0 && marker != DHT && marker != DAC && marker != JPG)
            return ASK_PYTHON;
        if (marker == SOS)
            return header->num_components && (has_end(head_end, tail_end) || has_end(next, head_end)) ? TOLD : ASK_PYTHON;
        at = next;
    }
    return head_end - at < 4 ? NONE : ASK_PYTHON;
}

/* Of `count` files whose ends lie in rows of `stride` bytes: at most `max_head` bytes of the file's beginning, and at once
 * behind them at most `max_tail` of its end; `num_bytes` of the whole file, or -1: no row. */
__attribute__((visibility("default"))) void data_prep_jpeg_headers(const uint8_t *rows, int64_t stride, int64_t count,
                                                                   const int64_t *num_bytes, int64_t max_head,
                                                                   int64_t max_tail, Header *headers)
{
    for (int64_t k = 0; k < count; k++) {
        int64_t size = num_bytes[k] < 0 ? 0 : num_bytes[k];
        int64_t head = size < max_head ? size : max_head, tail = size - head < max_tail ? size - head : max_tail;
        const uint8_t *row = rows + k * stride;
        memset(headers + k, 0, sizeof *headers);
        headers[k].answer = (uint8_t)read_header(row, row + head, row + head + tail, headers + k);
    }
}
