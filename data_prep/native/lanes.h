/* Eight sums of 32 bits side by side, four for the px of each of the two rows that are filtered together. GCC and clang
 * turn plain vector code into good NEON, but not into good SSE where bytes are widened and narrowed, so that is spelt
 * out. */
#ifndef DATA_PREP_LANES_H
#define DATA_PREP_LANES_H

#include <stdint.h>
#include <string.h>

#include "cpu.h"

enum { LANES = 4, GROUP = 2 };

typedef int32_t Pixel __attribute__((vector_size(4 * LANES)));
typedef int32_t Sums __attribute__((vector_size(4 * LANES * GROUP), aligned(4)));

#ifdef __SSE4_1__
#include <smmintrin.h>

static INLINE void widen_pixel(const uint8_t *pixel, int32_t *lanes)
{
    int32_t four;
    memcpy(&four, pixel, LANES);
    _mm_storeu_si128((__m128i *)lanes, _mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)));
}

/* Values outside 0 .. 255 are clipped. */
static INLINE void store_pixels(const Sums *sums, uint8_t *first, uint8_t *second)
{
    const __m128i *halves = (const __m128i *)sums;
    __m128i words = _mm_packs_epi32(_mm_loadu_si128(halves), _mm_loadu_si128(halves + 1));
    __m128i bytes = _mm_packus_epi16(words, words);
    int32_t one = _mm_cvtsi128_si32(bytes), other = _mm_extract_epi32(bytes, 1);
    memcpy(first, &one, LANES);
    memcpy(second, &other, LANES);
}
#else
static INLINE void widen_pixel(const uint8_t *pixel, int32_t *lanes)
{
    for (int k = 0; k < LANES; k++)
        lanes[k] = pixel[k];
}

static INLINE void store_pixels(const Sums *sums, uint8_t *first, uint8_t *second)
{
    const int32_t *lanes = (const int32_t *)sums;
    for (int k = 0; k < LANES; k++) {
        first[k] = (uint8_t)(lanes[k] < 0 ? 0 : lanes[k] > 255 ? 255 : lanes[k]);
        int32_t other = lanes[LANES + k];
        second[k] = (uint8_t)(other < 0 ? 0 : other > 255 ? 255 : other);
    }
}
#endif

#endif
