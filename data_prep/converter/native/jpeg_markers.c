#include "jpeg_markers.h"

#include "jpeg_bytes.h"

#include <string.h>

enum {
    MAX_SIDE = 65500, /* libjpeg's JPEG_MAX_DIMENSION */
    MAX_BLOCKS = 1000000 /* beyond it the sum of DC differences could overflow, which libjpeg refuses */
};

typedef struct {
    int width, height, num_components;
    uint8_t ids[MAX_COMPONENTS], horizontal[MAX_COMPONENTS], vertical[MAX_COMPONENTS], quantization[MAX_COMPONENTS];
} Frame;

static int read_quantization(const uint8_t *at, const uint8_t *end, int *is_defined)
{
    while (at < end) {
        int number = *at & 15, size = *at >> 4 ? 128 : 64;
        if (*at >> 4 > 1 || number >= NUM_TABLES || end - at < 1 + size)
            return 0;
        is_defined[number] = 1;
        at += 1 + size;
    }
    return 1;
}

static int read_huffman(const uint8_t *at, const uint8_t *end, Scan *scan)
{
    while (at < end) {
        int number = *at & 15, count = 0;
        if (*at >> 4 > 1 || number >= NUM_TABLES || end - at < 17)
            return 0;
        HuffmanTable *table = (*at >> 4 ? scan->ac : scan->dc) + number;
        table->is_defined = 1;
        for (int bits = 1; bits <= 16; bits++)
            count += table->counts[bits] = at[bits];
        at += 17;
        if (count > 256 || end - at < count)
            return 0;
        memset(table->symbols, 0, sizeof table->symbols);
        memcpy(table->symbols, at, (size_t)count);
        at += count;
    }
    return 1;
}

/* The sampling factors that TurboJPEG has a name for: those of `data_prep/jpeg/header.LUMA_SAMPLING`. */
static int is_known_sampling(const Frame *frame)
{
    int across = frame->horizontal[0], down = frame->vertical[0];
    if (frame->num_components == 1)
        return across >= 1 && across <= 4 && down >= 1 && down <= 4;
    for (int k = 1; k < frame->num_components; k++)
        if (frame->horizontal[k] != 1 || frame->vertical[k] != 1)
            return 0;
    return (across == 4 && down == 1) || (across >= 1 && across <= 2 && down >= 1 && down <= 2);
}

static int read_frame(const uint8_t *at, const uint8_t *end, Frame *frame)
{
    if (frame->num_components || end - at < 6 || at[0] != 8)
        return 0;
    frame->height = (int)two_bytes(at + 1);
    frame->width = (int)two_bytes(at + 3);
    frame->num_components = at[5];
    if (!frame->width || !frame->height || frame->width > MAX_SIDE || frame->height > MAX_SIDE)
        return 0;
    if ((at[5] != 1 && at[5] != 3) || end - at != 6 + 3 * at[5])
        return 0;
    for (int k = 0; k < frame->num_components; k++) {
        const uint8_t *component = at + 6 + 3 * k;
        frame->ids[k] = component[0];
        frame->horizontal[k] = component[1] >> 4;
        frame->vertical[k] = component[1] & 15;
        frame->quantization[k] = component[2];
        if (component[2] >= NUM_TABLES)
            return 0;
        for (int other = 0; other < k; other++)
            if (frame->ids[other] == frame->ids[k])
                return 0;
    }
    return is_known_sampling(frame);
}

/* libjpeg warns of versions of JFIF and of Adobe's colours that it does not know. */
static int is_plain_application(int marker, const uint8_t *at, const uint8_t *end)
{
    if (marker == APP0 && end - at >= 5 && !memcmp(at, "JFIF", 5))
        return end - at >= 14 && at[5] == 1;
    if (marker == APP14 && end - at >= 5 && !memcmp(at, "Adobe", 5))
        return end - at >= 12 && at[11] <= 1;
    return 1;
}

static int read_scan(const uint8_t *at, const uint8_t *end, const Frame *frame, Scan *scan)
{
    int count = scan->num_components = frame->num_components;
    if (!count || end - at != 4 + 2 * count || at[0] != count)
        return 0;
    for (int k = 0; k < count; k++) {
        scan->dc_of[k] = at[2 + 2 * k] >> 4;
        scan->ac_of[k] = at[2 + 2 * k] & 15;
        if (at[1 + 2 * k] != frame->ids[k] || scan->dc_of[k] >= NUM_TABLES || scan->ac_of[k] >= NUM_TABLES)
            return 0;
    }
    const uint8_t *spectrum = at + 1 + 2 * count;
    scan->data = end;
    return spectrum[0] == 0 && spectrum[1] == AC_COEFFICIENTS && spectrum[2] == 0;
}

static int count_blocks(const Frame *frame, Scan *scan)
{
    int is_gray = frame->num_components == 1; /* its MCU is one block, whatever its sampling factors */
    int across = is_gray ? 1 : frame->horizontal[0], down = is_gray ? 1 : frame->vertical[0];
    scan->blocks_in_mcu = 0;
    for (int k = 0; k < frame->num_components; k++)
        for (int block = 0; block < (is_gray ? 1 : frame->horizontal[k] * frame->vertical[k]); block++)
            scan->component_of[scan->blocks_in_mcu++] = (uint8_t)k;
    int64_t columns = (frame->width + 8 * across - 1) / (8 * across), rows = (frame->height + 8 * down - 1) / (8 * down);
    int64_t blocks = columns * rows * scan->blocks_in_mcu;
    scan->num_blocks = (int)blocks;
    return blocks <= MAX_BLOCKS;
}

int read_markers(const uint8_t *file, size_t size, Scan *scan)
{
    int quantization[NUM_TABLES] = {0};
    Frame frame = {0};
    const uint8_t *at = file + 2, *end = file + size;
    for (int k = 0; k < NUM_TABLES; k++)
        scan->dc[k].is_defined = scan->ac[k].is_defined = 0;
    if (size < 4 || file[0] != 0xFF || file[1] != SOI)
        return 0;
    for (;;) {
        if (end - at < 4 || at[0] != 0xFF)
            return 0;
        int marker = at[1];
        unsigned length = two_bytes(at + 2);
        const uint8_t *segment = at + 4, *next = at + 2 + length;
        if (length < 2 || end - at < 2 + (ptrdiff_t)length)
            return 0;
        if (marker == SOS) {
            for (int k = 0; k < frame.num_components; k++)
                if (!quantization[frame.quantization[k]])
                    return 0;
            return read_scan(segment, next, &frame, scan) && count_blocks(&frame, scan);
        }
        int is_fine = marker == DQT   ? read_quantization(segment, next, quantization)
                      : marker == DHT ? read_huffman(segment, next, scan)
                      : marker == SOF_BASELINE || marker == SOF_EXTENDED
                          ? read_frame(segment, next, &frame)
                          : marker == COM || (marker >= APP0 && marker <= APP15 &&
                                              is_plain_application(marker, segment, next));
        if (!is_fine)
            return 0;
        at = next;
    }
}
