/* Whether an image has blocks of 8 x 8 px at which the fast DCT of libjpeg-turbo may overflow.
 *
 * It computes in 16 bits (jidctfst): DCT coefficients times 4 and AAN's factors, of which sums are multiplied after a
 * shift by two bits, so that a sum beyond 8,191 wraps around. Only blocks near full contrast reach that, and few of
 * them: most are passed over by their variance, the others' sums are computed. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu.h"

enum { SIDE = 8, CHANNELS = 3, ROW_BYTES = SIDE * CHANNELS };
/* For values before quantization, which adds less than 300 at qualities from 80 on. */
static const float MOST = 7400.0f;
/* In a column pass a sum is at most 11.1 times the root of the block's energy, in a row pass 22.7 times that of the
 * row's. Colours are mixed of channels with factors of a sum of 1, so one channel has at least the energy of the mixture. */
static const int32_t BLOCK_ENERGY = 444000, ROW_ENERGY = 107000;

typedef struct {
    float of[SIDE][SIDE]; /* [place][frequency]: of the orthonormal DCT, times AAN's factor */
} Basis;

static void make_basis(Basis *basis)
{
    for (int u = 0; u < SIDE; u++)
        for (int x = 0; x < SIDE; x++)
            basis->of[x][u] = u ? (float)(sqrt(0.5) * cos((2 * x + 1) * u * M_PI / 16) * cos(u * M_PI / 16))
                                : (float)sqrt(0.125);
}

/* `in`: the eight inputs of a pass, `stride` apart. Whether one of the sums that are multiplied is too large. */
static INLINE int overflows(const float *in, int stride, float scale)
{
    float in1 = in[stride], in2 = in[2 * stride], in3 = in[3 * stride];
    float in5 = in[5 * stride], in6 = in[6 * stride], in7 = in[7 * stride];
    float z13 = in5 + in3, z10 = in5 - in3, z11 = in1 + in7, z12 = in1 - in7, most = MOST / scale;
    return (fabsf(z11 - z13) > most) | (fabsf(z10) > most) | (fabsf(z12) > most) | (fabsf(z10 + z12) > most) |
           (fabsf(in2 - in6) > most);
}

static INLINE int component_overflows(const Basis *basis, float block[SIDE][SIDE])
{
    float rows[SIDE][SIDE] = {{0}}, all[SIDE][SIDE] = {{0}}; /* [y][v] and [u][v] */
    int found = 0;
    for (int y = 0; y < SIDE; y++)
        for (int x = 0; x < SIDE; x++)
            for (int v = 0; v < SIDE; v++)
                rows[y][v] += basis->of[x][v] * block[y][x];
    for (int u = 0; u < SIDE; u++)
        for (int y = 0; y < SIDE; y++)
            for (int v = 0; v < SIDE; v++)
                all[u][v] += basis->of[y][u] * rows[y][v];
    for (int k = 0; k < SIDE; k++)
        found |= overflows(all[0] + k, SIDE, 4.0f) | overflows(rows[k], 1, 4 * 2.828427f);
    return found;
}

/* Whether there is energy enough, in the whole block or in one of its rows. */
static INLINE int may_reach(float block[SIDE][SIDE])
{
    float sum = 0, squares = 0, row_most = 0;
    for (int y = 0; y < SIDE; y++) {
        float row_sum = 0, row_squares = 0;
        for (int x = 0; x < SIDE; x++) {
            row_sum += block[y][x];
            row_squares += block[y][x] * block[y][x];
        }
        float energy = row_squares - row_sum * row_sum / SIDE;
        row_most = energy > row_most ? energy : row_most;
        sum += row_sum, squares += row_squares;
    }
    return squares - sum * sum / (SIDE * SIDE) >= (float)BLOCK_ENERGY || row_most >= (float)ROW_ENERGY;
}

static INLINE int block_overflows(const Basis *basis, uint8_t block[SIDE][ROW_BYTES])
{
    static const float colours[CHANNELS][CHANNELS] = {
        {0.299f, 0.587f, 0.114f}, {-0.168736f, -0.331264f, 0.5f}, {0.5f, -0.418688f, -0.081312f}};
    for (int c = 0; c < CHANNELS; c++) {
        float component[SIDE][SIDE];
        for (int y = 0; y < SIDE; y++)
            for (int x = 0; x < SIDE; x++) {
                const uint8_t *px = block[y] + CHANNELS * x;
                component[y][x] = colours[c][0] * px[0] + colours[c][1] * px[1] + colours[c][2] * px[2] - (c ? 0 : 128);
            }
        if (may_reach(component) && component_overflows(basis, component))
            return 1;
    }
    return 0;
}

/* For the channel with the largest result: number of values times variance, over that many rows of a block. */
static INLINE int32_t energy(const uint16_t *sums, const uint32_t *squares, int rows)
{
    int32_t most = 0;
    for (int c = 0; c < CHANNELS; c++) {
        int32_t total = 0, total_squares = 0;
        for (int x = 0; x < SIDE; x++) {
            total += sums[CHANNELS * x + c];
            total_squares += (int32_t)squares[CHANNELS * x + c];
        }
        int32_t here = total_squares - (int32_t)((int64_t)total * total / (SIDE * rows));
        most = here > most ? here : most;
    }
    return most;
}

static INLINE void add_row(const uint8_t *restrict row, int bytes, uint16_t *restrict sums, uint32_t *restrict squares)
{
    for (int i = 0; i < bytes; i++) {
        sums[i] += row[i];
        squares[i] += (uint32_t)row[i] * row[i];
    }
}

static int has_strong_row(uint8_t block[SIDE][ROW_BYTES])
{
    for (int y = 0; y < SIDE; y++) {
        uint16_t sums[ROW_BYTES] = {0};
        uint32_t squares[ROW_BYTES] = {0};
        add_row(block[y], ROW_BYTES, sums, squares);
        if (energy(sums, squares, 1) >= ROW_ENERGY)
            return 1;
    }
    return 0;
}

/* Fills up blocks at the right and lower edge with the last px, as JPEG encoders do. */
static void take_block(const uint8_t *pixels, int height, int width, int top, int left, uint8_t block[SIDE][ROW_BYTES])
{
    for (int y = 0; y < SIDE; y++) {
        const uint8_t *row = pixels + CHANNELS * (size_t)width * (top + y < height ? top + y : height - 1);
        for (int x = 0; x < SIDE; x++)
            memcpy(block[y] + CHANNELS * x, row + CHANNELS * (left + x < width ? left + x : width - 1), CHANNELS);
    }
}

enum { BAND_BLOCKS = 64 }; /* side by side, of which the sums are taken together */

/* `pixels` [height][width][3]. */
FOR_EACH_CPU __attribute__((visibility("default"))) int data_prep_may_overflow(const uint8_t *pixels, int height,
                                                                              int width)
{
    Basis basis;
    make_basis(&basis);
    for (int top = 0; top < height; top += SIDE)
        for (int start = 0; start < width; start += BAND_BLOCKS * SIDE) {
            uint16_t sums[BAND_BLOCKS * ROW_BYTES] = {0};
            uint32_t squares[BAND_BLOCKS * ROW_BYTES] = {0};
            int columns = width - start < BAND_BLOCKS * SIDE ? width - start : BAND_BLOCKS * SIDE;
            for (int y = top; y < top + SIDE && y < height; y++)
                add_row(pixels + CHANNELS * ((size_t)y * width + start), CHANNELS * columns, sums, squares);
            for (int x = 0; x < columns; x += SIDE) {
                int is_whole = x + SIDE <= columns && top + SIDE <= height;
                int32_t found = is_whole ? energy(sums + CHANNELS * x, squares + CHANNELS * x, SIDE) : BLOCK_ENERGY;
                if (found < ROW_ENERGY)
                    continue;
                uint8_t block[SIDE][ROW_BYTES];
                take_block(pixels, height, width, top, start + x, block);
                if ((found >= BLOCK_ENERGY || has_strong_row(block)) && block_overflows(&basis, block))
                    return 1;
            }
        }
    return 0;
}
