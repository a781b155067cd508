#include "huffman_steps.h"

#include <string.h>

/* Bits of a value, with 8 bits a sample (ITU-T T.81, tables F.1 and F.2). */
enum { MAX_DC_SIZE = 11, MAX_AC_SIZE = 10, SIXTEEN_ZEROS = 15 };

static Step step_of(int bits, int symbol, int is_ac)
{
    int size = is_ac ? symbol & 15 : symbol, run = is_ac ? symbol >> 4 : 0;
    if (is_ac && size == 0 && run != SIXTEEN_ZEROS)
        return (Step)(bits | (1 + END_OF_BLOCK) << BITS_FIELD);
    return (Step)((bits + size) | (run + 1) << BITS_FIELD);
}

static Step several_steps(const Step *first, unsigned look)
{
    unsigned bits = 0;
    int taken = 0;
    while (bits < LOOK_BITS && taken < END_OF_BLOCK) {
        Step next = first[look << bits & ((1 << LOOK_BITS) - 1)];
        int coefficients = taken_by(next) & (END_OF_BLOCK - 1);
        if (next == 0 || (taken && bits + bits_of(next) > LOOK_BITS) || taken + coefficients > AC_COEFFICIENTS)
            break;
        bits += bits_of(next);
        taken += taken_by(next);
    }
    return (Step)(bits | (unsigned)(taken ? taken : NOT_QUICK) << BITS_FIELD);
}

int build_look_up(LookUp *look_up, const HuffmanTable *table, int is_ac)
{
    int code = 0, place = 0;
    if (!table->is_defined)
        return 0;
    memset(look_up->first, 0, sizeof look_up->first);
    for (int bits = 1; bits <= 16; bits++, code <<= 1) {
        int count = table->counts[bits];
        if (count > 0 && code + count >= 1 << bits) /* no code may be all ones */
            return 0;
        look_up->offset[bits] = place - code;
        look_up->last_code[bits] = count > 0 ? code + count - 1 : -1;
        for (int k = 0; k < count; k++, code++, place++) {
            int symbol = table->symbols[place];
            if ((is_ac ? symbol & 15 : symbol) > (is_ac ? MAX_AC_SIZE : MAX_DC_SIZE))
                return 0;
            Step step = look_up->by_place[place] = step_of(bits, symbol, is_ac);
            for (int rest = 0, spare = LOOK_BITS - bits; spare >= 0 && rest < 1 << spare; rest++)
                look_up->first[(code << spare) + rest] = step;
        }
    }
    for (unsigned look = 0; look < 1 << LOOK_BITS; look++) {
        Step first = look_up->first[look];
        look_up->several[look] = is_ac        ? several_steps(look_up->first, look)
                                 : first != 0 ? first
                                              : (Step)(NOT_QUICK << BITS_FIELD);
    }
    return 1;
}

Step first_step(const LookUp *look_up, uint64_t window)
{
    Step step = look_up->first[window >> (64 - LOOK_BITS)];
    for (int bits = LOOK_BITS + 1; step == 0 && bits <= 16; bits++) {
        int32_t code = (int32_t)(window >> (64 - bits));
        if (code <= look_up->last_code[bits])
            step = look_up->by_place[(code + look_up->offset[bits]) & 255];
    }
    return step;
}
