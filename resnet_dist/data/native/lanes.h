/* Four 32-bit lanes for the channels of a px. GCC and clang turn plain vector code into good NEON, but not into good
 * SSE where bytes are widened and narrowed, so that is spelt out. */
#ifndef RESNET_DIST_LANES_H
#define RESNET_DIST_LANES_H

#include <stdint.h>
#include <string.h>

enum { LANES = 4 };

typedef int32_t Lanes __attribute__((vector_size(4 * LANES)));

#ifdef __SSE4_1__
#include <smmintrin.h>

static inline Lanes load_pixel(const uint8_t *pixel)
{
    int32_t four;
    memcpy(&four, pixel, LANES);
    return (Lanes)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four));
}

/* Values above 255 become 255. */
static inline void store_pixel(Lanes value, uint8_t *pixel)
{
    __m128i words = _mm_packs_epi32((__m128i)value, (__m128i)value);
    int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    memcpy(pixel, &four, LANES);
}
#else
typedef uint8_t LaneBytes __attribute__((vector_size(LANES)));

static inline Lanes load_pixel(const uint8_t *pixel)
{
    LaneBytes four;
    memcpy(&four, pixel, LANES);
    return __builtin_convertvector(four, Lanes);
}

static inline void store_pixel(Lanes value, uint8_t *pixel)
{
    Lanes over = value > 255;
    LaneBytes four = __builtin_convertvector((value & ~over) | (over & 255), LaneBytes);
    memcpy(pixel, &four, LANES);
}
#endif

#endif
