/* A JPEG's marker codes (ITU-T T.81, table B.1) and its numbers. */
#ifndef DATA_PREP_JPEG_BYTES_H
#define DATA_PREP_JPEG_BYTES_H
#include <stdint.h>

enum {
    TEM = 0x01, SOF_BASELINE = 0xC0, SOF_EXTENDED = 0xC1, SOF_PROGRESSIVE = 0xC2, DHT = 0xC4, RST0 = 0xD0, SOI = 0xD8,
    EOI = 0xD9, SOS = 0xDA, DQT = 0xDB, DRI = 0xDD, APP0 = 0xE0, APP14 = 0xEE, APP15 = 0xEF, COM = 0xFE
};

static inline unsigned two_bytes(const uint8_t *at) { return (unsigned)at[0] << 8 | at[1]; }

#endif
