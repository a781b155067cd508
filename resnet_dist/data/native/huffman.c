#define _GNU_SOURCE /* dladdr */
#include "huffman.h"

#include <dlfcn.h>
#include <string.h>

#include "cpu.h"

/* libjpeg-turbo's, from jpegint.h, which not every distribution installs. The same from version 1.2 to 3.1; a version
 * that was never checked is left alone. */
#if defined(LIBJPEG_TURBO_VERSION_NUMBER) && LIBJPEG_TURBO_VERSION_NUMBER < 4000000
enum { VERSION_IS_KNOWN = 1 };
#else
enum { VERSION_IS_KNOWN = 0 };
#endif
struct jpeg_entropy_decoder {
    void (*start_pass)(j_decompress_ptr jpeg);
    boolean (*decode_mcu)(j_decompress_ptr jpeg, JBLOCKROW *blocks);
    boolean insufficient_data;
};

enum {
    MAX_DC_SIZE = 11, /* bits of a value, with 8 bits a sample (ITU T.81, tables F.1 and F.2) */
    MAX_AC_SIZE = 10,
    END_OF_BLOCK = 128, /* an advance that no run reaches */
    MAX_PIXELS = 48000000
};

/* Position of the k-th coefficient. A run past the last one ends its block; its value goes to the last place, as in
 * libjpeg. */
static const uint8_t NATURAL_ORDER[DCTSIZE2 + END_OF_BLOCK] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
#define EIGHT 63, 63, 63, 63, 63, 63, 63, 63
    EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT};

static INLINE int bits_of(Code code)
{
    return code & 63;
}

static INLINE int size_of(Code code)
{
    return code >> 8 & 255;
}

static INLINE int advance_of(Code code)
{
    return (int)(code >> 16);
}

/* Of the code at the head of `window`. The lower half of the range of `size` bits stands for negative numbers. */
static INLINE int value_of(uint64_t window, Code code)
{
    int range = 1 << size_of(code), value = (int)(window >> (64 - bits_of(code))) & (range - 1);
    return value < range >> 1 ? value - range + 1 : value;
}

static Code code_of(int bits, int symbol, int is_ac)
{
    int size = is_ac ? symbol & 15 : symbol, run = is_ac ? symbol >> 4 : 0;
    int ends = is_ac && size == 0 && run != 15;
    return (Code)((bits + size) | size << 8 | (ends ? END_OF_BLOCK : run + 1) << 16);
}

/* The codes at the head of `look`, to the end of the block at most, as one. */
static Code stride_of(const Code *codes, unsigned look)
{
    Code first = codes[look & ((1 << LOOK_AHEAD_BITS) - 1)];
    int bits = bits_of(first), advance = advance_of(first);
    while (first != 0 && bits < LOOK_AHEAD_BITS && advance < END_OF_BLOCK) {
        Code next = codes[look << bits & ((1 << LOOK_AHEAD_BITS) - 1)];
        if (next == 0 || bits + bits_of(next) > LOOK_AHEAD_BITS)
            break;
        bits += bits_of(next);
        advance += advance_of(next);
    }
    return (Code)(bits | advance << 16);
}

static Pair pair_of(const Code *codes, unsigned look)
{
    uint64_t window = (uint64_t)look << (64 - LOOK_AHEAD_BITS);
    Pair pair = {{0}, {0}, 0};
    for (int k = 0; k < 2; k++) {
        Code code = codes[window >> (64 - LOOK_AHEAD_BITS)];
        if (code == 0 || pair.bits + bits_of(code) > LOOK_AHEAD_BITS)
            break;
        pair.values[k] = (int16_t)value_of(window, code);
        pair.values[1] = pair.values[k];
        pair.advances[k] = (uint8_t)advance_of(code);
        pair.bits = (uint8_t)(pair.bits + bits_of(code));
        window <<= bits_of(code);
        if (advance_of(code) == END_OF_BLOCK)
            break;
    }
    return pair;
}

/* False for a table that is no prefix code, or that baseline JPEGs do not have. */
static int build(CodeTable *table, const JHUFF_TBL *source, int is_ac)
{
    if (!memcmp(table->source.bits, source->bits, sizeof source->bits) &&
        !memcmp(table->source.huffval, source->huffval, sizeof source->huffval) && table->is_built)
        return 1;
    int code = 0, place = 0;
    memset(table, 0, sizeof *table);
    for (int bits = 1; bits <= 16; bits++, code <<= 1) {
        int count = source->bits[bits];
        if (place + count > 256 || code + count > 1 << bits)
            return 0;
        table->offset[bits] = place - code;
        table->last_code[bits] = count > 0 ? code + count - 1 : -1;
        for (int k = 0; k < count; k++, code++, place++) {
            Code entry = table->by_place[place] = code_of(bits, source->huffval[place], is_ac);
            if (size_of(entry) > (is_ac ? MAX_AC_SIZE : MAX_DC_SIZE))
                return 0;
            int spare = LOOK_AHEAD_BITS - bits;
            for (int rest = 0; spare >= 0 && rest < 1 << spare; rest++)
                table->codes[(code << spare) + rest] = entry;
        }
    }
    for (unsigned look = 0; is_ac && look < 1 << LOOK_AHEAD_BITS; look++) {
        table->strides[look] = stride_of(table->codes, look);
        table->pairs[look] = pair_of(table->codes, look);
    }
    table->source = *source;
    table->is_built = 1;
    return 1;
}

/* What a code that is none means, or data that end too early, is for libjpeg to say: it ignores some of it. */
static void step_aside(j_decompress_ptr jpeg)
{
    Huffman *huffman = jpeg->client_data;
    huffman->stepped_aside = 1;
    jpeg->err->error_exit((j_common_ptr)jpeg);
}

/* A code that is longer than the look-ahead. */
static __attribute__((noinline)) Code long_code(uint64_t window, const CodeTable *table, j_decompress_ptr jpeg)
{
    for (int bits = LOOK_AHEAD_BITS + 1; bits <= 16; bits++) {
        int code = (int)(window >> (64 - bits));
        if (code <= table->last_code[bits])
            return table->by_place[(code + table->offset[bits]) & 255];
    }
    step_aside(jpeg);
    return 0;
}

/* At least 56 bits: two coefficients. The bits above num_bits are read once more; they are the same. */
static INLINE void fill(Bits *bits)
{
    uint64_t eight;
    memcpy(&eight, bits->next, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    eight = __builtin_bswap64(eight);
#endif
    bits->window |= eight >> bits->num_bits;
    bits->next += (63 - bits->num_bits) >> 3;
    bits->num_bits |= 56;
}

static INLINE Code look_up(const Bits *bits, const CodeTable *table, j_decompress_ptr jpeg)
{
    Code code = table->codes[bits->window >> (64 - LOOK_AHEAD_BITS)];
    return __builtin_expect(code == 0, 0) ? long_code(bits->window, table, jpeg) : code;
}

static INLINE void drop(Bits *bits, Code code)
{
    bits->window <<= bits_of(code);
    bits->num_bits -= bits_of(code);
}

static INLINE int take_dc(Bits *bits, const CodeTable *table, j_decompress_ptr jpeg)
{
    fill(bits);
    Code code = look_up(bits, table, jpeg);
    int value = value_of(bits->window, code);
    drop(bits, code);
    return value;
}

/* Where a look-up led that began before the last coefficient: to it, or to an end of block that stood before it? */
static INLINE int lies_in_block(int end)
{
    return end < DCTSIZE2 || (end >= END_OF_BLOCK && end < END_OF_BLOCK + DCTSIZE2 - 1);
}

static INLINE int unpack_ac(Bits *bits, const CodeTable *table, JCOEF *block, int k, j_decompress_ptr jpeg)
{
    const Pair *pair = &table->pairs[bits->window >> (64 - LOOK_AHEAD_BITS)];
    int first = k + pair->advances[0], second = first + pair->advances[1];
    if (__builtin_expect(pair->bits != 0 && lies_in_block(second), 1)) {
        block[NATURAL_ORDER[first]] = pair->values[0]; /* a zero at the end of the block and within long runs */
        block[NATURAL_ORDER[second]] = pair->values[1];
        bits->window <<= pair->bits;
        bits->num_bits -= pair->bits;
        return second;
    }
    Code code = look_up(bits, table, jpeg);
    k += advance_of(code);
    block[NATURAL_ORDER[k]] = (JCOEF)value_of(bits->window, code);
    drop(bits, code);
    return k;
}

/* From coefficient k on, one or more; more only where they are sure to lie within this block. */
static INLINE int step_over_ac(Bits *bits, const CodeTable *table, int k, j_decompress_ptr jpeg)
{
    Code code = table->strides[bits->window >> (64 - LOOK_AHEAD_BITS)];
    int end = k + advance_of(code);
    if (__builtin_expect(code == 0 || !lies_in_block(end), 0)) {
        code = look_up(bits, table, jpeg);
        end = k + advance_of(code);
    }
    drop(bits, code);
    return end;
}

FOR_EACH_CPU static boolean decode_mcu(j_decompress_ptr jpeg, JBLOCKROW *blocks)
{
    Huffman *huffman = jpeg->client_data;
    Bits bits = huffman->bits; /* a copy, which stays in registers */
    int wanted = blocks && huffman->column >= huffman->first_column && huffman->column <= huffman->last_column;
    for (int block = 0; block < jpeg->blocks_in_MCU; block++) {
        int number = jpeg->MCU_membership[block], k = 0;
        const jpeg_component_info *component = jpeg->cur_comp_info[number];
        const CodeTable *ac = &huffman->ac[component->ac_tbl_no];
        huffman->last_dc[number] += (unsigned)take_dc(&bits, &huffman->dc[component->dc_tbl_no], jpeg);
        if (wanted) {
            JCOEF *coefficients = *blocks[block];
            coefficients[0] = (JCOEF)huffman->last_dc[number];
            while (k < DCTSIZE2 - 1) {
                fill(&bits);
                k = unpack_ac(&bits, ac, coefficients, k, jpeg);
                if (k < DCTSIZE2 - 1)
                    k = unpack_ac(&bits, ac, coefficients, k, jpeg);
            }
        } else {
            while (k < DCTSIZE2 - 1) {
                fill(&bits);
                k = step_over_ac(&bits, ac, k, jpeg);
                if (k < DCTSIZE2 - 1)
                    k = step_over_ac(&bits, ac, k, jpeg);
            }
        }
    }
    if (8 * (bits.next - huffman->end) > bits.num_bits)
        step_aside(jpeg);
    huffman->bits = bits;
    if (++huffman->column == jpeg->MCUs_per_row)
        huffman->column = 0;
    return TRUE;
}

/* One scan of all components, Huffman codes, no restarts; so few blocks that no sum of DC differences overflows, which
 * some versions of libjpeg refuse. */
static int is_common(j_decompress_ptr jpeg)
{
    int64_t pixels = (int64_t)jpeg->image_width * jpeg->image_height;
    return !jpeg->progressive_mode && !jpeg->arith_code && jpeg->restart_interval == 0 && jpeg->data_precision == 8 &&
           jpeg->comps_in_scan == jpeg->num_components && jpeg->Ss == 0 && jpeg->Se == DCTSIZE2 - 1 &&
           jpeg->Ah == 0 && jpeg->Al == 0 && pixels <= MAX_PIXELS;
}

static int build_tables(Huffman *huffman, j_decompress_ptr jpeg)
{
    for (int k = 0; k < jpeg->comps_in_scan; k++) {
        unsigned dc = (unsigned)jpeg->cur_comp_info[k]->dc_tbl_no, ac = (unsigned)jpeg->cur_comp_info[k]->ac_tbl_no;
        if (dc >= NUM_HUFF_TBLS || ac >= NUM_HUFF_TBLS || !jpeg->dc_huff_tbl_ptrs[dc] || !jpeg->ac_huff_tbl_ptrs[ac] ||
            !build(&huffman->dc[dc], jpeg->dc_huff_tbl_ptrs[dc], 0) ||
            !build(&huffman->ac[ac], jpeg->ac_huff_tbl_ptrs[ac], 1))
            return 0;
    }
    return 1;
}

/* The data up to the next marker, without the zeros that follow an FF; MCU_BYTES of zeros behind it. False if there is
 * no marker: libjpeg warns of the end of the file when it looks ahead, so after some MCUs and not after others. False
 * where several FFs are followed by a zero: libjpeg takes them for one, but may leave in the block what it read when it
 * took them for a marker. */
static int take_out_stuffing(Huffman *huffman, j_decompress_ptr jpeg, uint8_t *clean)
{
    const uint8_t *next = jpeg->src->next_input_byte, *end = next + jpeg->src->bytes_in_buffer;
    huffman->bits = (Bits){.next = clean};
    while (next < end) {
        const uint8_t *marker = memchr(next, 0xFF, (size_t)(end - next));
        size_t length = (size_t)((marker ? marker : end) - next);
        memcpy(clean, next, length);
        clean += length;
        next += length;
        int num_fills = 0;
        for (; next < end && *next == 0xFF; num_fills++)
            next++;
        if (next < end && *next != 0) {
            huffman->end = clean;
            memset(clean, 0, MCU_BYTES);
            return 1;
        }
        if (next == end || num_fills > 1)
            return 0;
        *clean++ = 0xFF;
        next++;
    }
    return 0;
}

static int same_library(void (*one)(void), void (*other)(void))
{
    Dl_info a, b;
    return dladdr((void *)one, &a) && dladdr((void *)other, &b) && a.dli_fbase == b.dli_fbase;
}

int huffman_fits(j_decompress_ptr jpeg)
{
    const struct jpeg_entropy_decoder *entropy = jpeg->entropy;
    void (*library)(void) = (void (*)(void))jpeg_std_error;
    return VERSION_IS_KNOWN && entropy != NULL && same_library((void (*)(void))entropy->start_pass, library) &&
           same_library((void (*)(void))entropy->decode_mcu, library) &&
           (entropy->insufficient_data == FALSE || entropy->insufficient_data == TRUE);
}

void huffman_take_over(Huffman *huffman, j_decompress_ptr jpeg, uint8_t *clean, JDIMENSION first_column,
                       JDIMENSION num_columns)
{
    if (!is_common(jpeg) || !build_tables(huffman, jpeg) || !take_out_stuffing(huffman, jpeg, clean))
        return;
    JDIMENSION mcu_width = (JDIMENSION)(DCTSIZE * (jpeg->num_components == 1 ? 1 : jpeg->max_h_samp_factor));
    huffman->column = 0;
    huffman->first_column = first_column / mcu_width;
    huffman->last_column = (first_column + num_columns - 1) / mcu_width;
    memset(huffman->last_dc, 0, sizeof huffman->last_dc);
    jpeg->client_data = huffman;
    jpeg->entropy->decode_mcu = decode_mcu;
}
