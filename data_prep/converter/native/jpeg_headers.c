/* JPEG headers from the ends of files, many in one call: `data_prep/jpeg/header.py` in C, but for plain files only.
 * Python reads the markers of all others. */
#include "jpeg_bytes.h"

#include <string.h>

enum { UNUSUAL, PLAIN, INCOMPLETE };

/* `encode.HEADER`. */
typedef struct {
    uint8_t status; /* PLAIN: 8 bits a value, an end of image, 1 or 3 components, in one scan unless it is progressive, with
                     * the first scan's tables, nothing that libjpeg warns about; INCOMPLETE: the head ends before the scan */
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

/* The tables that were defined, a bit for each number: of quantization; of Huffman codes for DC, and 16 bits on for AC. */
typedef struct {
    uint32_t quantization, huffman;
} Tables;

static int define_quantization(const uint8_t *at, const uint8_t *end, Tables *tables)
{
    while (at < end) {
        int size = *at >> 4 ? 129 : 65;
        if (end - at < size || (*at & 15) > 3)
            return 0;
        tables->quantization |= 1u << (*at & 15);
        at += size;
    }
    return 1;
}

static int define_huffman(const uint8_t *at, const uint8_t *end, Tables *tables)
{
    while (end - at >= 17) {
        int count = 0, code = 0;
        if (*at >> 4 > 1 || (*at & 15) > 3)
            return 0;
        for (int bits = 1; bits <= 16; bits++, code <<= 1) {
            count += at[bits];
            code += at[bits];
            if (at[bits] && code >= 1 << bits) /* no codes, or one is all ones */
                return 0;
        }
        if (count > 256 || end - at < 17 + count)
            return 0;
        for (int k = 0; k < count && *at < 16; k++)
            if (at[17 + k] > 15)
                return 0;
        tables->huffman |= 1u << *at;
        at += 17 + count;
    }
    return at == end;
}

/* Whether the first scan is of a plain kind, and all that it takes was defined. `frame`: its header's content. */
static int has_tables(const uint8_t *at, unsigned size, const uint8_t *frame, int is_progressive, const Tables *tables)
{
    if (size < 4 || size != 4 + 2u * at[0] || at[0] > frame[5] || (at[0] < frame[5] && !is_progressive))
        return 0;
    if (at[size - 3] != 0 || (is_progressive ? at[size - 2] != 0 || at[size - 1] > 13 : at[size - 2] != 63 || at[size - 1]))
        return 0;
    int last = -1;
    for (const uint8_t *chosen = at + 1; chosen < at + size - 3; chosen += 2) {
        int place = 0;
        while (place < frame[5] && frame[6 + 3 * place] != chosen[0])
            place++;
        if (place <= last || place == frame[5]) /* each once; if in another order, Python may say */
            return 0;
        last = place;
        const uint8_t *component = frame + 6 + 3 * place;
        if (component[2] > 3 || !(tables->quantization >> component[2] & 1) ||
            !(tables->huffman >> (chosen[1] >> 4) & 1) ||
            (!is_progressive && !(tables->huffman >> (16 + (chosen[1] & 15)) & 1)))
            return 0;
    }
    return 1;
}

/* Whether the version of JFIF and the colour transform are among those that libjpeg knows. */
static int is_plain_application(int marker, const uint8_t *at, const uint8_t *end)
{
    if (marker == APP0)
        return end - at < 14 || memcmp(at, "JFIF", 5) || at[5] == 1;
    return marker != APP14 || end - at < 12 || memcmp(at, "Adobe", 5) || at[11] <= 1;
}

static int has_end(const uint8_t *at, const uint8_t *end)
{
    if (end - at >= 2 && end[-2] == 0xFF && end[-1] == EOI)
        return 1;
    while (end - at >= 2 && (at = memchr(at, 0xFF, (size_t)(end - at) - 1)))
        if (*++at == EOI)
            return 1;
    return 0;
}

static int read_header(const uint8_t *at, const uint8_t *head_end, const uint8_t *tail_end, Header *header)
{
    if (head_end - at < 3 || at[0] != 0xFF || at[1] != SOI || at[2] != 0xFF)
        return UNUSUAL;
    const uint8_t *frame = NULL;
    Tables tables = {0, 0};
    for (at += 2; head_end - at >= 4 && at[0] == 0xFF;) {
        unsigned marker = at[1], length = two_bytes(at + 2);
        if (marker == 0xFF || marker == 0 || marker == TEM || (marker >= RST0 && marker <= EOI) || length < 2)
            return UNUSUAL;
        if (head_end - at < 2 + (long)length)
            return INCOMPLETE;
        const uint8_t *segment = at + 4, *next = at + 2 + length;
        if (marker >= SOF_BASELINE && marker <= SOF_PROGRESSIVE) {
            if (!read_frame(segment, length - 2, header))
                return UNUSUAL;
            header->frame = (uint8_t)marker;
            frame = segment;
        } else if (marker == DQT || marker == DHT) {
            if (!(marker == DQT ? define_quantization : define_huffman)(segment, next, &tables))
                return UNUSUAL;
        } else if (marker != SOS && (marker < APP0 || marker > APP15) && marker != COM && (marker != DRI || length != 4)) {
            return UNUSUAL;
        } else if (!is_plain_application((int)marker, segment, next))
            return UNUSUAL;
        if (marker == SOS)
            return frame && has_tables(segment, length - 2, frame, header->frame == SOF_PROGRESSIVE, &tables) &&
                           (has_end(head_end, tail_end) || has_end(next, head_end))
                       ? PLAIN
                       : UNUSUAL;
        at = next;
    }
    return head_end - at < 4 ? INCOMPLETE : UNUSUAL;
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
        headers[k].status = (uint8_t)read_header(row, row + head, row + head + tail, headers + k);
    }
}

/* Headers of whole files. */
__attribute__((visibility("default"))) void data_prep_whole_jpeg_headers(const uint8_t *const *files, const size_t *sizes,
                                                                         int64_t count, Header *headers)
{
    memset(headers, 0, (size_t)count * sizeof *headers);
    for (int64_t k = 0; k < count; k++)
        headers[k].status = (uint8_t)read_header(files[k], files[k] + sizes[k], files[k] + sizes[k], headers + k);
}
